"""The fused matching loss: one forward and one backward pass for the whole population.

The passes run over all candidates with shared weights only (plain batched convolutions). Each
tappable layer (see :mod:`.program`) leaves its input and output cotangent, from which
:mod:`.layers` computes what the distance needs. The other parameters (biases, normalisation scales,
kernels that the tracer cannot tap) get one gradient per candidate from ``vmap``; they are usually
tiny.

``vmap`` keeps candidates apart, so models whose images influence each other (batch normalisation in
training mode) are exact, too.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import Distance, Statistics
from ggl_jax.adversary.matching import convolve, layers
from ggl_jax.adversary.matching.direct import in_chunks
from ggl_jax.adversary.matching.program import Program, run, split_variables
from ggl_jax.adversary.matching.separate import separate
from ggl_jax.client.gradients import cross_entropy
from ggl_jax.types import Factored, PyTree

#: Memory for formed gradients (and their patches) that are alive at once.
FORMED_BYTES = 2**28


def prepare_convolutions(program: Program, variables: PyTree) -> dict:
    """The kernels of those sites whose convolutions are spelled out (on the CPU), by number."""
    if jax.default_backend() != "cpu":
        return {}  # GPU libraries know a convolution's derivative as such
    leaves = jax.tree.leaves(variables["params"])
    return {
        number: convolve.prepare(site.layer, leaves[site.leaf])
        for number, site in enumerate(program.sites)
        if convolve.supported(site.layer)
    }


def passes(
    program: Program, variables: PyTree, prepared: dict, images: jax.Array, labels: jax.Array
) -> list:
    """Forward and backward passes for all candidates.

    Args:
        program: the traced model.
        variables: its variables.
        prepared: from :func:`prepare_convolutions`.
        images: [n b h w c].
        labels: [n b] class indices or [n b k] soft labels.

    Returns:
        For each parameter leaf a tuple: a tappable layer's inputs and output cotangents,
        [n batch *spatial channels] each; or the leaf's gradients [n, *shape] alone.
    """
    params, others = split_variables(variables)
    leaves = jax.tree.leaves(params)
    tapped = {site.leaf for site in program.sites}
    own = {leaf: value for leaf, value in enumerate(leaves) if leaf not in tapped}

    replace = {
        number: functools.partial(convolve.convolve, program.sites[number].layer, prepared=kernels)
        for number, kernels in prepared.items()
    }

    def one(images, labels):
        def loss(taps, own):
            merged = [own.get(leaf, value) for leaf, value in enumerate(leaves)]
            logits, inputs = run(program, merged, others, images, taps, replace)
            return cross_entropy(logits, labels), inputs

        taps = [jnp.zeros(site.output.shape, site.output.dtype) for site in program.sites]
        (cotangents, gradients), inputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(taps, own)
        return inputs, cotangents, gradients

    inputs, cotangents, gradients = jax.vmap(one)(images, labels)
    arrays = {leaf: (gradient,) for leaf, gradient in gradients.items()}
    for site, a, d in zip(program.sites, inputs, cotangents, strict=True):
        arrays[site.leaf] = (
            layers.input_in_order(site.layer, a),
            layers.cotangent_in_order(site.layer, d),
        )
    return [arrays[leaf] for leaf in range(len(leaves))]


class Tensor(NamedTuple):
    """One tensor of the update, and how every candidate's gradient for it is had.

    "Its gradients" are those after the simulated defense, but for the factored form's scale.

    Attributes:
        target: the observed tensor, in the layout of ``gradients``.
        gradients: ``gradients(arrays) -> [n, *target.shape]``; ``arrays`` is what the passes left
            for this tensor, [n, ...] each.
        gram: ``gram(arrays) -> (inner[n], sq_norms[n])`` without forming the gradients, or None
            where forming them is faster.
        work_bytes: memory that one candidate's ``gradients`` takes.
    """

    target: jax.Array
    gradients: Callable
    gram: Callable | None
    work_bytes: int


def fused_losses(
    program: Program,
    variables: PyTree,
    observed: PyTree,
    *,
    simulate: Callable,
    factored: Factored | None,
    distance: Distance,
    exact_below: float,
) -> Callable | None:
    """``losses_of(images[n b h w c], labels) -> [n]`` without one gradient per candidate.

    Args:
        program: the traced model.
        variables: its variables.
        observed: the observed update.
        simulate: what is done to a candidate's update before it is compared.
        factored: the same in factored form; None where there is none, and then every tensor's
            gradients are formed, simulated, compared and discarded in turn.
        distance: the distance.
        exact_below: see :func:`ggl_jax.adversary.matching.matching_loss`.

    Returns:
        The function, or None: there is no factored form, and ``simulate`` mixes tensors.
    """
    if factored is None:
        rescale = None
        tensors = _simulated(program, observed, simulate)
        if tensors is None:
            return None
    else:
        rescale = factored.scale
        tensors = _factored(program, observed, factored.mask)
    treedef = jax.tree.structure(observed)
    prepared = prepare_convolutions(program, variables)
    target_norms = [jnp.sum(tensor.target**2) for tensor in tensors]
    # Without any scale a tensor's squared distance stands for itself, and where its gradients are
    # formed it is exact at no extra cost.
    plain = rescale is None and distance.scales is None

    def statistics_of(inner, sq_norms):
        """The defense's scales of one candidate, and its statistics."""
        inner, sq_norms = treedef.unflatten(inner), treedef.unflatten(sq_norms)
        scales = jax.tree.map(jnp.ones_like, sq_norms) if rescale is None else rescale(sq_norms)
        statistics = Statistics(
            jax.tree.map(lambda s, x: s * x, scales, inner),
            jax.tree.map(lambda s, x: s * s * x, scales, sq_norms),
            treedef.unflatten(target_norms),
        )
        return scales, statistics

    def expanded(inner, sq_norms):
        """One candidate's distance from statistics, and the scale of its rounding error."""
        _, statistics = statistics_of(inner, sq_norms)
        return distance.from_statistics(statistics), distance.at_zero(statistics)

    def factors(inner, sq_norms):
        """One candidate's factors a, b of the tensors in |b y - a g|^2."""
        scales, statistics = statistics_of(inner, sq_norms)
        if distance.scales is None:
            ones = jax.tree.map(jnp.ones_like, scales)
            return jax.tree.leaves(scales), jax.tree.leaves(ones)
        a, b = distance.scales(statistics)
        return jax.tree.leaves(jax.tree.map(jnp.multiply, a, scales)), jax.tree.leaves(b)

    def losses_of(images, labels):
        arrays = passes(program, variables, prepared, images, labels)
        inner, sq_norms, squares = {}, {}, {}
        for leaf, tensor in enumerate(tensors):
            if plain and tensor.gram is None:
                squares[leaf] = _squares(tensor, arrays[leaf])
            else:
                inner[leaf], sq_norms[leaf] = _statistics(tensor, arrays[leaf])
        if plain:
            mixed = [
                squares[leaf]
                if leaf in squares
                else target_norms[leaf] - 2.0 * inner[leaf] + sq_norms[leaf]
                for leaf in range(len(tensors))
            ]
            losses = jax.vmap(lambda x: distance.from_squares(treedef.unflatten(x)))(mixed)
            reference = distance.from_squares(treedef.unflatten(target_norms))
        else:
            every = range(len(tensors))
            inner, sq_norms = [inner[leaf] for leaf in every], [sq_norms[leaf] for leaf in every]
            losses, reference = jax.vmap(expanded)(inner, sq_norms)
        if len(squares) == len(tensors) or exact_below <= 0.0:
            return losses

        near = jax.lax.stop_gradient(losses < exact_below * reference)

        def exact(_):
            if plain:
                every = [
                    squares[leaf] if leaf in squares else _squares(tensor, arrays[leaf])
                    for leaf, tensor in enumerate(tensors)
                ]
            else:
                a, b = jax.vmap(factors)(inner, sq_norms)
                every = [
                    _squares(tensor, arrays[leaf], a[leaf], b[leaf])
                    for leaf, tensor in enumerate(tensors)
                ]
            sure = jax.vmap(lambda x: distance.from_squares(treedef.unflatten(x)))(every)
            return jnp.where(near, sure, losses)

        return jax.lax.cond(_any(near), exact, lambda _: losses, None)

    return losses_of


@jax.custom_batching.custom_vmap
def _any(flags):
    return jnp.any(flags)


@_any.def_vmap
def _any_of_all(axis_size, in_batched, flags):
    # One answer for all instances under vmap: with one answer each, `cond` would become a select
    # and always compute both branches.
    del axis_size, in_batched
    return _any(flags), False


def _factored(program: Program, observed: PyTree, mask: PyTree | None) -> list[Tensor]:
    """The tensors under a defense in factored form (its scale is left to the statistics)."""
    targets, treedef = jax.tree.flatten(observed)
    masks = [None] * len(targets) if mask is None else treedef.flatten_up_to(mask)
    layer_of = {site.leaf: site.layer for site in program.sites}
    return [
        _factored_own(target, own_mask)
        if leaf not in layer_of
        else _factored_layer(layer_of[leaf], target, own_mask)
        for leaf, (target, own_mask) in enumerate(zip(targets, masks, strict=True))
    ]


def _factored_own(target, mask) -> Tensor:
    def gradients(arrays):
        return arrays[0] if mask is None else arrays[0] * mask

    return Tensor(target, gradients, None, target.nbytes)


def _factored_layer(layer: layers.Layer, target, mask) -> Tensor:
    target = layers.kernel_in_order(layer, target)
    on_input = on_output = on_kernel = None
    if mask is not None:
        # A mask of input or output channels can be applied before anything is multiplied.
        shape = (1,) * (len(layer.kernel_shape) - jnp.ndim(mask)) + jnp.shape(mask)
        spread = [axis for axis, size in enumerate(shape) if size > 1]
        if not spread:
            on_output = jnp.reshape(mask, ())
        elif spread == [layer.kernel_order[-1]] and layer.plain_output:
            on_output = jnp.reshape(mask, -1)
        elif spread == [layer.kernel_order[-2]] and layer.plain_input:
            on_input = jnp.reshape(mask, -1)
        else:
            on_kernel = layers.kernel_in_order(
                layer, jnp.broadcast_to(jnp.reshape(mask, shape), layer.kernel_shape)
            )

    def masked(arrays):
        a, d = arrays
        return (
            a if on_input is None else a * on_input,
            d if on_output is None else d * on_output,
        )

    def gradients(arrays):
        g = layers.form(layer, *masked(arrays))
        return g if on_kernel is None else g * on_kernel

    def gram(arrays):
        a, d = masked(arrays)
        return layers.inner_product(layer, a, d, target), layers.sq_norm(layer, a, d)

    use_gram = on_kernel is None and layers.prefers_gram(layer)
    return Tensor(target, gradients, gram if use_gram else None, layers.form_bytes(layer, target))


def _simulated(program: Program, observed: PyTree, simulate: Callable) -> list[Tensor] | None:
    """The tensors under a defense that treats each by itself; None if it does not."""
    simulate_one = separate(simulate, observed)
    if simulate_one is None:
        return None
    layer_of = {site.leaf: site.layer for site in program.sites}

    def tensor(leaf, target):
        layer = layer_of.get(leaf)

        def gradients(arrays):
            if layer is None:
                formed = arrays[0]
            else:
                formed = layers.kernel_as_stored(layer, layers.form(layer, *arrays))
            return jax.vmap(simulate_one[leaf])(formed)

        size = target.nbytes if layer is None else layers.form_bytes(layer, target)
        return Tensor(target, gradients, None, size)

    return [tensor(leaf, target) for leaf, target in enumerate(jax.tree.leaves(observed))]


def _statistics(tensor: Tensor, arrays):
    """Inner products with the target and squared norms, [n] each."""
    if tensor.gram is not None:
        return jax.checkpoint(tensor.gram)(arrays)

    def reduce(arrays):
        g = tensor.gradients(arrays)
        axes = tuple(range(1, g.ndim))
        return jnp.sum(g * tensor.target, axis=axes), jnp.sum(g * g, axis=axes)

    return _stream(tensor, reduce, arrays)


def _squares(tensor: Tensor, arrays, a=None, b=None):
    """|b y - a g|^2, [n], from differences of single entries; factors [n], or None for 1."""

    def reduce(arrays, *factors):
        g = tensor.gradients(arrays)
        target = tensor.target
        if factors:
            a, b = (x.reshape(-1, *([1] * (g.ndim - 1))) for x in factors)
            g, target = a * g, b * target
        return jnp.sum((target - g) ** 2, axis=tuple(range(1, g.ndim)))

    return _stream(tensor, reduce, arrays, *(() if a is None else (a, b)))


def _stream(tensor: Tensor, reduce: Callable, *arrays):
    """Reduce formed gradients, no more of them alive at once than the budget allows."""
    # Recomputed in the backward pass, or every layer's gradients would be kept for it.
    size = max(1, FORMED_BYTES // tensor.work_bytes)
    return in_chunks(jax.checkpoint(reduce), size, *arrays)
