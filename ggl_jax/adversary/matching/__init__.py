"""Gradient matching: how far each candidate's own update lies from the observed one.

The whole cost of an attack is here. Two methods agree:

- *direct* forms every candidate's gradient by differentiating the model, then defends and compares
  it;
- *fused* runs one forward and one backward pass for the whole population and gets from the layers'
  inputs and output cotangents what the distance needs (:mod:`.fused`, :mod:`.layers`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax import trees
from ggl_jax.adversary.losses import EXACT_BELOW, Distance, resolve_distance
from ggl_jax.adversary.matching import layers
from ggl_jax.adversary.matching.direct import direct_losses
from ggl_jax.adversary.matching.fused import fused_losses
from ggl_jax.adversary.matching.products import (
    differences_of,
    direct_differences,
    residual_products,
)
from ggl_jax.adversary.matching.program import Program, trace
from ggl_jax.client.gradients import split_among
from ggl_jax.client.local import local_optimizer, shares_gradient
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client, Speed, checked
from ggl_jax.types import Factored, Loss, Model, Products, PyTree, View

#: Memory for one chunk of candidates on the CPU: as much as stays near the caches. Larger chunks
#: are slower there, since their pages have to be mapped anew in every call.
CPU_CHUNK_BYTES = 2**28
#: The same where the backend does not tell how much memory it has.
OTHER_CHUNK_BYTES = 2**32


class _Pair(NamedTuple):
    """The observed update, and how a candidate's own comes about and is compared with it."""

    model: Model
    variables: PyTree
    observed: PyTree
    view: View | None
    estimated: PyTree | None
    distance: Distance
    exact_below: float
    client: Client
    method: str

    @property
    def plain(self) -> bool:
        """Whether the client shares a gradient."""
        return shares_gradient(self.client)

    @property
    def factored(self) -> Factored | None:
        """The defense's simulation in factored form; None where it has none."""
        if self.view is None:
            return Factored()
        return None if self.view.factor is None else self.view.factor(self.estimated)

    def linear(self) -> bool:
        """Whether the mean of the clients' defended updates is that of one batch, masked."""
        own = self.factored
        return self.client.clients == 1 or (own is not None and own.scale is None)

    def simulate(self, update: PyTree) -> PyTree:
        """What the defense makes of a candidate's update."""
        return update if self.view is None else self.view.simulate(self.estimated, update)

    def fusible(self, program: Program) -> bool:
        """Whether losses of this traced model can be had without each candidate's gradient."""
        return self.method != "direct" and self.plain and self.linear() and bool(program.sites)

    def losses(self, program: Program) -> Callable:
        """``losses_of(images[n b h w c], labels[n b (k)]) -> [n]``."""
        known = self.model, self.variables, self.observed
        options: dict[str, Any] = {"simulate": self.simulate, "distance": self.distance}
        if self.fusible(program):
            options |= {"factored": self.factored, "exact_below": self.exact_below}
            return fused_losses(program, *known[1:], **options)
        if self.method == "fused" and not self.linear():
            raise GGLError(
                f"method: 'fused' cannot serve the mean of {self.client.clients} updates that a "
                "defense changed one by one; use 'auto'"
            )
        if self.method == "fused":
            raise GGLError(
                f"method: 'fused' finds no layer to tap in {self.model.name}: no convolution or "
                "matrix product has a parameter as its kernel that is used only there; use 'auto'"
            )
        return direct_losses(*known, client=self.client, **options)

    def differences(self, program: Program, size: int) -> tuple[Callable, Factored | None]:
        """Candidates' differences from the observed update, and the form they are scaled by."""
        known = self.variables, self.observed
        options: dict[str, Any] = {"simulate": self.simulate, "size": size}
        own, of = None, None
        if self.fusible(program):
            own = self.factored
            of = differences_of(program, *known, factored=own, **options)
        return of or direct_differences(self.model, *known, client=self.client, **options), own


def matching_loss(
    model: Model,
    variables: PyTree,
    observed: PyTree,
    *,
    view: View | None = None,
    estimated: PyTree | None = None,
    distance: str | Distance = "squared_l2",
    client: Client | None = None,
    speed: Speed | None = None,
    exact_below: float = EXACT_BELOW,
) -> Loss:
    """The loss that every attack minimises: distance of a candidate's update to the observed one.

    A candidate is a batch of images with labels. Its update is computed as a client would, goes
    through what the adversary knows of the defense, and is compared. Make the function inside your
    own ``jax.jit``, with ``variables``, ``observed`` and ``estimated`` among the jitted function's
    arguments; nothing is baked into the program then.

    Args:
        model: the federated model: any JAX function of images, of Flax or not.
        variables: the variables that the update was computed at.
        observed: the shared update, a pytree like ``variables["params"]``.
        view: how candidates' updates are transformed; None leaves them alone.
        estimated: the defense's estimated parameters.
        distance: a name in :data:`ggl_jax.DISTANCES`, such as "squared_l2" (D1) and "cosine"
            (D2), or a :class:`ggl_jax.adversary.losses.Distance`.
        client: how an update comes about (local steps, their size and optimiser); None for a plain
            gradient.
        speed: see :class:`ggl_jax.spec.Speed`. ``method``: "fused" wherever it can be, by default.
            ``chunk_size``: by default chosen from the model's activations and the memory (256 MiB
            on the CPU, where larger chunks are slower; half of what is free on an accelerator);
            chunks run one after the other inside the compiled program. ``instances``: how many of
            these losses ``jax.vmap`` will compute at once; they share the memory. ``precision``: of
            matrix products on accelerators; the CPU always computes in float32.
        exact_below: candidates with a distance below this share of the distance at g = 0 (|y|^2 for
            squared l2) are computed again from differences of single entries. 0 for never.

    Returns:
        ``loss(images, labels) -> losses[n]`` for images [n b h w c] in [0, 1] and labels: class
        indices [n b] or [b], or soft labels [n b k] or [b k]. Candidates do not influence each
        other (nor does the chunk size influence them, but for rounding). It can be differentiated
        in reverse mode with respect to images and soft labels, and those alone: derivatives with
        respect to ``variables`` or ``observed`` are not supported (parts of them would be zero).
        ``jax.vmap`` over ``observed``, ``estimated``, images and labels gives many instances at
        once; tell their number by ``instances``. ``loss.products(images[r p b h w c], labels[r p b
        (k)])`` gives :class:`ggl_jax.types.Products` in their place, their noise as of variance 1:
        gradients are formed for it, one tensor of all candidates after the other (2.7 GB at once
        for 50 of ResNet-18 on a CPU), or whole where a defense mixes tensors and under several
        local steps.

    Rule:
        Fused serves every model in which some convolution or matrix product has a kernel that is a
        parameter and that is used once. Those layers are *tapped*; padding modes, strides,
        dilation, groups, and batch normalisation in either mode make no difference. All other
        parameters (biases, scales, kernels that are shared, masked, cast, or hidden in a scan) get
        one gradient per candidate from ``vmap``, which is slow only for large ones; :func:`plan`
        lists them. A defense with a factored form (noise, clipping, Soteria and their chains) is
        applied to norms and inner products. Any other defense gets every candidate's gradient: one
        tensor at a time where its program treats tensors apart (sparsification), else all together.
        Direct is left for several local steps (and Adam's one), for the mean of several clients
        whose defense is more than a mask, and for models without such layers.

    Accuracy:
        Where gradients are not formed, a tensor's squared distance is |y|^2 - 2 <y, g> + |g|^2. In
        float32 that is off by some 1e-7 of |y|^2 (its derivative, by 1e-7 of |y| |dg|): harmless
        until the loss falls under a thousandth of |y|^2, where ``exact_below`` takes over with
        differences of entries, accurate down to the private image itself. Recomputing adds at most
        a half to the time of the chunks that need it.

    Raises:
        GGLError: an argument is outside its range, ``observed`` does not fit ``variables``, images
            have the wrong shape, or ``method="fused"`` is impossible (see the rule).

    Reference:
        Paper, section 3. Per-candidate norms from inputs and cotangents: Goodfellow (2015),
        "Efficient per-example gradient computations"; for convolutions Rochette et al. (2019).
    """
    client, speed = checked(client or Client()), checked(speed or Speed())
    if not exact_below >= 0:
        raise GGLError(f"exact_below: got {exact_below!r}, allowed: numbers >= 0")
    _check_update(observed, variables["params"])
    known = (model, variables, observed, view, estimated, resolve_distance(distance), exact_below)
    pair = _Pair(*known, client, speed.method)
    if pair.method == "fused" and not pair.plain:
        raise GGLError(
            f"method: 'fused' needs local_steps=1 of sgd, got {client.local_steps} of "
            f"{client.local_optimizer}; use 'auto'"
        )
    precision = None if speed.precision == "default" else speed.precision
    apart = _apart(model, client.clients)

    def prepare(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Program, int]:
        """Labels for each candidate, the traced model, and how many candidates run at once."""
        labels = jnp.asarray(labels)
        if images.ndim != 5 or images.shape[2:] != tuple(model.image_shape):
            raise GGLError(
                f"images: got shape {images.shape}, allowed: [n b h w c] with "
                f"(h, w, c) = {tuple(model.image_shape)}"
            )
        shared = 1 if jnp.issubdtype(labels.dtype, jnp.integer) else 2
        if labels.ndim == shared:
            labels = jnp.broadcast_to(labels, (images.shape[0], *labels.shape))
        program = trace(apart, variables, jax.ShapeDtypeStruct(images.shape[1:], images.dtype))
        kept = 0 if pair.plain else _kept(client, variables["params"])
        size = speed.chunk_size or _chunk_size(program, images.dtype.itemsize, speed, kept)
        return labels, program, size

    def loss(images: jax.Array, labels: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(precision):
            labels, program, size = prepare(images, labels)
            losses_of = pair.losses(program)
            if images.shape[0] > size:
                # Or the residuals of all chunks would be kept for the backward pass.
                losses_of = jax.checkpoint(losses_of)
            return trees.in_chunks(losses_of, size, images, labels)

    def products(images: jax.Array, labels: jax.Array) -> Products:
        restarts = images.shape[0]
        images, labels = (x.reshape(-1, *x.shape[2:]) for x in (images, labels))
        with jax.default_matmul_precision(precision):
            labels, program, size = prepare(images, labels)
            of, own = pair.differences(program, size)
            distance = pair.distance
            return residual_products(of(images, labels), observed, distance, own, restarts)

    return Loss(loss, products)


def plan(model: Model, variables: PyTree, *, batch_size: int = 1) -> dict[str, str]:
    """How the fused method gets each tensor's share of the distance.

    Args:
        model: the model.
        variables: its variables (or their shapes).
        batch_size: images per candidate.

    Returns:
        For each tensor's name one of "gram" (inner product and norm without the gradient),
        "formed" (from the layer's input and output cotangent) and "autodiff" (one gradient per
        candidate from ``vmap``: a parameter that is no tapped layer's kernel).
    """
    kind = jnp.result_type(*jax.tree.leaves(variables["params"]))
    images = jax.ShapeDtypeStruct((batch_size, *model.image_shape), kind)
    program = trace(model, variables, images)
    kinds = {
        site.leaf: "gram" if layers.prefers_gram(site.layer) else "formed" for site in program.sites
    }
    names = trees.names(variables["params"])
    return {name: kinds.get(leaf, "autodiff") for leaf, name in enumerate(names)}


def _apart(model: Model, clients: int) -> Model:
    """The model, run on each client's part of a batch by itself: BatchNorm may mix within these."""
    if clients == 1:
        return model

    def apply(variables, images):
        parts = split_among(clients, images)
        found = jax.vmap(model.apply, (None, 0))(variables, parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    return model._replace(apply=apply)


def _kept(client: Client, params: PyTree) -> int:
    """Entries that the derivative through a candidate's local steps keeps."""
    state = jax.eval_shape(local_optimizer(client.local_optimizer).init, params)
    each = sum(leaf.size for leaf in jax.tree.leaves((params, state)))
    return client.local_steps * each


def _chunk_size(program: Program, itemsize: int, speed: Speed, kept: int = 0) -> int:
    """Candidates of each instance that fit into the memory set aside for a chunk, at least 1."""
    budget: float = OTHER_CHUNK_BYTES
    device = jax.local_devices()[0]
    if speed.memory is not None:
        budget = speed.memory * 2**30
    elif jax.default_backend() == "cpu":
        budget = CPU_CHUNK_BYTES
    else:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            budget = (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    # Activations, and their cotangents.
    entries = 2 * program.activations + kept
    return max(1, int(budget // (entries * itemsize * (speed.instances or 1))))


def _check_update(observed, params):
    same = jax.tree.structure(observed) == jax.tree.structure(params)
    if not same or any(
        jnp.shape(y) != jnp.shape(w)
        for y, w in zip(jax.tree.leaves(observed), jax.tree.leaves(params), strict=True)
    ):
        raise GGLError(
            "observed: its tensors differ from the model's parameters in name or shape; give the "
            "update that was computed at these variables"
        )
