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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import Distance, Statistics
from ggl_jax.adversary.matching import convolve, layers
from ggl_jax.adversary.matching.program import Program, run, split_variables
from ggl_jax.adversary.matching.separate import separate
from ggl_jax.selection import any_of
from ggl_jax.trees import in_chunks
from ggl_jax.types import Factored, PyTree

#: Memory for formed gradients (and their patches) that are alive at once.
FORMED_BYTES = 2**28


def prepare_convolutions(program: Program, variables: PyTree) -> dict:
    """The kernels of those sites whose convolutions are spelled out (on the CPU), by number."""
    leaves = jax.tree.leaves(variables["params"])
    return {
        number: convolve.prepare(site.layer, leaves[site.leaf])
        for number, site in enumerate(program.sites)
        if _spelled_out(site.layer)
    }


def _spelled_out(layer: layers.Layer) -> bool:
    """Whether :mod:`.convolve` serves the layer: GPU libraries know the derivatives as such."""
    return jax.default_backend() == "cpu" and convolve.supported(layer)


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
            return program.loss(logits, labels), inputs

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
        at_once: candidates whose gradients are formed at once.
    """

    target: jax.Array
    gradients: Callable
    gram: Callable | None
    at_once: int


class Comparison(NamedTuple):
    """A distance, and how one candidate's tensors enter it: from lists with an entry for each.

    Attributes:
        distance: the distance.
        rescale: the factored form's scale; None for none.
        treedef: the update's structure.
        target_norms: |y|^2 of each tensor.
    """

    distance: Distance
    rescale: Callable | None
    treedef: Any
    target_norms: list[jax.Array]

    def statistics(self, inner, sq_norms):
        """The defense's scales of one candidate, and its statistics."""
        inner, sq_norms = self.treedef.unflatten(inner), self.treedef.unflatten(sq_norms)
        ones = functools.partial(jax.tree.map, jnp.ones_like)
        scales = (self.rescale or ones)(sq_norms)
        statistics = Statistics(
            jax.tree.map(lambda s, x: s * x, scales, inner),
            jax.tree.map(lambda s, x: s * s * x, scales, sq_norms),
            self.treedef.unflatten(self.target_norms),
        )
        return scales, statistics

    def expanded(self, inner, sq_norms):
        """One candidate's distance from statistics, and the scale of its rounding error."""
        _, statistics = self.statistics(inner, sq_norms)
        return self.distance.from_statistics(statistics), self.distance.at_zero(statistics)

    def factors(self, inner, sq_norms):
        """One candidate's factors a, b of the tensors in |b y - a g|^2."""
        scales, statistics = self.statistics(inner, sq_norms)
        if self.distance.scales is None:
            ones = jax.tree.map(jnp.ones_like, scales)
            return jax.tree.leaves(scales), jax.tree.leaves(ones)
        a, b = self.distance.scales(statistics)
        return jax.tree.leaves(jax.tree.map(jnp.multiply, a, scales)), jax.tree.leaves(b)


def tensors_of(
    program: Program, observed: PyTree, simulate: Callable, factored: Factored | None
) -> list[Tensor] | None:
    """Each tensor of the update by itself; None where the simulation mixes them."""
    if factored is not None:
        return _factored(program, observed, factored.mask)
    separated = separate(simulate, observed)
    return None if separated is None else _simulated(program, observed, separated)


def fused_losses(
    program: Program,
    variables: PyTree,
    observed: PyTree,
    *,
    simulate: Callable,
    factored: Factored | None,
    distance: Distance,
    exact_below: float,
) -> Callable:
    """``losses_of(images[n b h w c], labels) -> [n]`` without one backward pass per candidate.

    Args:
        program: the traced model.
        variables: its variables.
        observed: the observed update.
        simulate: what is done to a candidate's update before it is compared.
        factored: the same in factored form; None where there is none. Then each tensor's gradients
            are formed, simulated, compared and discarded in turn or, where ``simulate`` mixes
            tensors, each candidate's whole gradient is.
        distance: the distance.
        exact_below: see :func:`ggl_jax.adversary.matching.matching_loss`.
    """
    treedef = jax.tree.structure(observed)
    prepared = prepare_convolutions(program, variables)
    tensors = tensors_of(program, observed, simulate, factored)
    if tensors is None:
        return _whole_losses(program, variables, prepared, observed, simulate, distance)
    rescale = None if factored is None else factored.scale
    target_norms = [jnp.sum(tensor.target**2) for tensor in tensors]
    comparison = Comparison(distance, rescale, treedef, target_norms)
    # Without any scale a tensor's squared distance stands for itself, and where its gradients are
    # formed it is exact at no extra cost.
    plain = rescale is None and distance.scales is None

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
            losses, reference = jax.vmap(comparison.expanded)(inner, sq_norms)
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
                a, b = jax.vmap(comparison.factors)(inner, sq_norms)
                every = [
                    _squares(tensor, arrays[leaf], a[leaf], b[leaf])
                    for leaf, tensor in enumerate(tensors)
                ]
            sure = jax.vmap(lambda x: distance.from_squares(treedef.unflatten(x)))(every)
            return jnp.where(near, sure, losses)

        return jax.lax.cond(any_of(near), exact, lambda _: losses, None)

    return losses_of


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

    return Tensor(target, gradients, None, _at_once(target.nbytes))


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

    form, at_once = _former(layer, target)
    comparand = target
    if _spelled_out(layer):
        comparand = jnp.moveaxis(target, -2, 0)
        on_kernel = None if on_kernel is None else jnp.moveaxis(on_kernel, -2, 0)

    def gradients(arrays):
        g = form(*masked(arrays))
        return g if on_kernel is None else g * on_kernel

    known = convolve.prepare(layer, target) if _spelled_out(layer) else target

    def gram(arrays):
        a, d = masked(arrays)
        return layers.inner_product(layer, a, d, known), layers.sq_norm(layer, a, d)

    use_gram = on_kernel is None and layers.prefers_gram(layer)
    return Tensor(comparand, gradients, gram if use_gram else None, at_once)


def _former(layer: layers.Layer, like: jax.Array) -> tuple[Callable, int]:
    """How a layer's gradients are formed, ``form(a, d)``, and for how many candidates at once.

    Where :mod:`.convolve` serves the layer, with the input channels in front; else in the order of
    :func:`layers.form`.
    """
    if not _spelled_out(layer):
        return functools.partial(layers.form, layer), _at_once(layers.form_bytes(layer, like))
    form = functools.partial(convolve.kernel_gradients, layer)
    return form, convolve.gradients_at_once(layer, like.dtype)


def _at_once(size: int) -> int:
    return max(1, FORMED_BYTES // size)


def _whole_losses(program, variables, prepared, observed, simulate, distance):
    """Losses by forming every candidate's whole gradient, but still not one pass for each."""
    treedef = jax.tree.structure(observed)
    keep = [lambda leaf: leaf] * len(jax.tree.leaves(observed))
    tensors = _simulated(program, observed, keep)

    def losses_of(images, labels):
        arrays = passes(program, variables, prepared, images, labels)
        gradients = [
            in_chunks(tensor.gradients, tensor.at_once, own)
            for tensor, own in zip(tensors, arrays, strict=True)
        ]
        return jax.vmap(lambda g: distance.between(simulate(treedef.unflatten(g)), observed))(
            gradients
        )

    return losses_of


def _simulated(program: Program, observed: PyTree, simulate_one: list[Callable]) -> list[Tensor]:
    """The tensors under a defense that treats each by itself."""
    layer_of = {site.leaf: site.layer for site in program.sites}

    def own(leaf, target):
        def gradients(arrays):
            return jax.vmap(simulate_one[leaf])(arrays[0])

        return Tensor(target, gradients, None, _at_once(target.nbytes))

    def tapped(leaf, target, layer):
        form, at_once = _former(layer, target)

        def gradients(arrays):
            g = form(*arrays)
            if _spelled_out(layer):
                g = jnp.moveaxis(g, 1, -2)
            g = layers.kernel_as_stored(layer, g)
            if _spelled_out(layer) or at_once == 1:
                # `vmap` would turn the simulation's branches into selects.
                return in_chunks(lambda g: simulate_one[leaf](g[0])[None], 1, g)
            return jax.vmap(simulate_one[leaf])(g)

        return Tensor(target, gradients, None, at_once)

    return [
        tapped(leaf, target, layer_of[leaf]) if leaf in layer_of else own(leaf, target)
        for leaf, target in enumerate(jax.tree.leaves(observed))
    ]


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
    return in_chunks(jax.checkpoint(reduce), tensor.at_once, *arrays)
