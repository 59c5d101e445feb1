"""The types that hold the library together.

Each is a ``NamedTuple`` of pure functions, in the manner of optax. Nothing in them is jitted;
callers compose them with ``jax.jit``, ``jax.vmap`` and ``jax.grad``. Keys are typed
(``jax.random.key``) and come first. Large arrays (model variables, generator parameters, observed
updates) are arguments, never closed over, because a closed-over array is baked into the compiled
program.

Shapes in the docstrings: ``b`` images in a batch, ``n`` candidates, ``z`` latent entries,
``h w c`` height, width, channels, ``d`` features, ``k`` classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

PyTree = Any
Path = tuple[str, ...]

#: Status codes of :class:`Info`. They are data, since exceptions cannot leave a compiled program.
OK, NONFINITE, STALLED = 0, 1, 2
STATUS_MESSAGES = {
    OK: "ok",
    NONFINITE: "the matching loss became NaN or infinite",
    STALLED: "the search stopped making progress",
}


class Model(NamedTuple):
    """A federated-learning model, known to the client and to the server alike.

    Attributes:
        init: ``init(key) -> variables`` with a ``"params"`` entry (and ``"batch_stats"``, if any).
        apply: ``apply(variables, images[b h w c] in [0, 1]) -> (logits[b k], features[b d])``;
            ``features`` is the input of the last Dense layer. Conversion to the network's own
            input range happens inside.
        head: path of the last Dense layer inside ``variables["params"]``, e.g. ``("fc",)``; it
            holds ``kernel`` [d k] and, usually, ``bias`` [k].
        image_shape: ``(h, w, c)``.
        num_classes: labels are 0 to ``num_classes - 1``; ``k`` of them, but for other losses.
        name: shown in results.
        statistics: ``statistics(variables, images[b h w c] in [0, 1]) -> tree`` shaped as
            ``variables["batch_stats"]``: the ``mean`` and ``var`` over the batch of what enters
            every BatchNorm layer; None where the model has none.
        loss: ``loss(logits[b k], labels) -> scalar``, the batch's mean loss, for labels [b] or soft
            ones [b num_classes]; None for softmax cross-entropy, of which alone k has to be the
            number of classes. See :data:`ggl_jax.LOSSES`.
        reach: at any image, a feature's derivative is 0 but within so many pixels a side; None
            where it may be the whole image.
    """

    init: Callable
    apply: Callable
    head: Path
    image_shape: tuple[int, int, int]
    num_classes: int
    name: str
    statistics: Callable | None = None
    loss: Callable | None = None
    reach: int | None = None


class Prior(NamedTuple):
    """Public knowledge of what images look like: a generator and the law of its latents.

    Attributes:
        init: ``init(key) -> params``.
        apply: ``apply(params, latents[b z], labels[b]) -> images[b h w c]`` in [0, 1].
        sample_latent: ``sample_latent(key, num) -> latents[num z]``.
        latent_dim: ``z``.
        image_shape: ``(h, w, c)``.
        name: shown in results.
        num_classes: of a class-conditional generator, which knows the labels 0 to
            ``num_classes - 1``; None for one that ignores labels.
        denoise: ``denoise(params, images[n h w c]) -> images``, what is left of images in [0, 1]
            once noise of unknown strength is taken off; None for a prior without a denoiser.
    """

    init: Callable
    apply: Callable
    sample_latent: Callable
    latent_dim: int
    image_shape: tuple[int, int, int]
    name: str
    num_classes: int | None = None
    denoise: Callable | None = None


class Public(NamedTuple):
    """What both sides have: the global model with its weights, and the prior.

    Attributes:
        model: the federated model.
        variables: its variables, at which updates are computed.
        prior: the generator.
        prior_params: its parameters.
        expected: what the model makes of the prior's samples, of
            :func:`ggl_jax.adversary.reconstruct.expectations`; by it the labels of a batch are told
            apart. None where it is not worked out yet.
    """

    model: Model
    variables: PyTree
    prior: Prior
    prior_params: PyTree
    expected: Mapping[str, jax.Array] | None = None


class Shared(NamedTuple):
    """All that a client sends, and so all that the adversary gets to see of its images.

    Attributes:
        update: the (defended) update, a pytree like ``variables["params"]``; of several rounds,
            with an axis of them in front of each leaf.
        statistics: what ``model.statistics`` gives for the private batch; None where the client
            does not share it.
    """

    update: PyTree
    statistics: PyTree | None = None


class Context(NamedTuple):
    """What a client's defense may look at. It holds private data: the adversary never gets one."""

    model: Model
    variables: PyTree
    images: jax.Array
    labels: jax.Array


class Factored(NamedTuple):
    """A defense's simulation written as ``scale(sq_norms(mask * g)) * mask * g``.

    The matching loss can then be computed from each layer's norm and inner product, without
    forming every candidate's gradient.

    Attributes:
        mask: a pytree with the update's structure whose leaves broadcast against the update's
            (a scalar 1.0 where nothing is masked), or None for no mask.
        scale: ``scale(sq_norms) -> scales``, both pytrees with the update's structure and scalar
            leaves; ``sq_norms`` are the squared l2 norms of the masked leaves. None for no scaling.
            As a ``jax.tree_util.Partial`` of a module's function it is data: searches under
            defenses of the same kind share one compiled program.
    """

    mask: PyTree | None = None
    scale: Callable | None = None


class Estimate(Protocol):
    """What a server makes of an observed update: a pytree of arrays (a dict; of a chain a tuple).

    ``noise`` is the standard deviation of noise that a later stage of a chain was found to add.
    """

    def __call__(self, update: PyTree, /, head: Path, noise: jax.Array | float = 0.0) -> PyTree: ...


class View(NamedTuple):
    """What a server makes of one kind of defense. It is made without the defense's parameters.

    All that the adversary is ever given of a defense: what it knows of the parameters it has
    estimated from the observed update.

    Attributes:
        name: the kind, e.g. ``"clip"`` or ``"clip+noise"``; without parameters.
        estimate: the defense's parameters, from the observed update alone.
        simulate: ``simulate(estimated, update) -> update``: what is done to a candidate's own
            gradient before it is compared.
        factor: ``factor(estimated) -> Factored``; None, or returning None, where the simulation has
            no such form (top-k sparsification).
        rewire: ``rewire(estimated, variables, head) -> variables`` at which candidates' gradients
            are taken, for a defense that changes the forward pass (Soteria on the representation);
            None where they are the shared ones.
        on_support: the view that compares candidates on the entries that were shared, whatever
            the defense would have left of them (sparsification); None where there is no such other.
        adds_noise: whether the shared update holds noise that no candidate can explain. The mean
            of several reconstructions then says more than the best by loss.
        noise_std: ``noise_std(estimated)``, the standard deviation of that noise on every entry;
            None where it is not estimated.
        rounds: from what the mean of several rounds' updates is attacked: "mean", parameters that
            are estimated from it; "each", the mean of those estimated from each round's update,
            for a defense whose draws they hold and whose result they multiply (random masks); None
            where the mean of updates is no update of this kind, and more than one is refused.
    """

    name: str
    estimate: Estimate
    simulate: Callable
    factor: Callable | None = None
    rewire: Callable | None = None
    on_support: "View | None" = None
    adds_noise: bool = False
    noise_std: Callable | None = None
    rounds: str | None = "mean"

    def comparing(self, support: bool) -> "View":
        """The view that compares on the support where that is wanted and there is one."""
        return self.on_support if support and self.on_support is not None else self


class Facts(NamedTuple):
    """What is known of a client's part of a defense: for an accountant of differential privacy.

    The defaults are what holds of any function: nothing.

    Attributes:
        gaussian: standard deviation of independent Gaussian noise that is added to every entry;
            None for none.
        l2_bound: ``l2_bound(num_tensors)`` -> largest l2 norm of the result; None for no bound.
        shrinks: the result's norm is at most the update's.
        processes: the result depends on the private data through the update alone.
        replaces_update: the gradient is computed anew from the images (Soteria, paper's form). Such
            a defense ignores the update that it is given: it cannot follow another one, and defends
            one gradient step rather than the sum of several local ones.
        stages: of a chain, in the order in which they are applied; empty for any other.
    """

    gaussian: float | None = None
    l2_bound: Callable | None = None
    shrinks: bool = False
    processes: bool = False
    replaces_update: bool = False
    stages: tuple = ()


class Defense(NamedTuple):
    """A privacy defense: what the client does, and what crosses to the adversary of it.

    Attributes:
        name: its specification, e.g. ``"clip:4"``.
        apply: client side, ``apply(key, update, context) -> (update, record)``. The record, a dict
            (of a chain a tuple of them), holds the parameters that were really used (and, for
            Soteria, the mask), which the audit shows beside the estimate.
        view: what the server knows and does.
        facts: what the audit may rely on.
    """

    name: str
    apply: Callable
    view: View
    facts: Facts = Facts()


class Info(NamedTuple):
    """What one optimiser step reports. Nothing in it is carried.

    Attributes:
        latents: [n z], the candidates that were evaluated, those of the first restart first.
        losses: [n], their losses.
        evaluations: gradient evaluations of the model spent in this step, int32 scalar.
        status: one of OK, NONFINITE, STALLED, int32 scalar.
    """

    latents: jax.Array
    losses: jax.Array
    evaluations: jax.Array
    status: jax.Array


class Products(NamedTuple):
    """Candidates' losses, and how their residuals lie to each other.

    Attributes:
        losses: [r p], of each of r restarts' p candidates.
        inner: [r p p], inner products of the residuals, whose squares are the losses.
        noise: [r], what the observation's noise adds to the loss in one direction; 0 for none.
    """

    losses: jax.Array
    inner: jax.Array
    noise: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss of candidates that can be asked for their :class:`Products`, too.

    No ``NamedTuple``, so that ``jax.jit`` takes it as the function that it is.

    Attributes:
        losses: ``losses(*candidates[n ...]) -> [n]``; calling the loss does the same.
        products: ``products(*candidates[r p ...]) -> Products``.
    """

    losses: Callable
    products: Callable

    def __call__(self, *candidates):
        return self.losses(*candidates)


class Optimizer(NamedTuple):
    """A search over latents whose budget is counted in gradient evaluations.

    Attributes:
        init: ``init(key, latents[r z]) -> state``: ``r`` independent restarts from these points.
        step: ``step(key, state, loss_fn) -> (state, Info)``; ``loss_fn(latents[n z]) -> losses[n]``
            is differentiable and treats candidates independently; an attack's is a :class:`Loss`.
        evaluations_per_step: gradient evaluations of one step with ``r`` restarts,
            ``evaluations_per_step(r) -> int``.
        name: shown in results.
    """

    init: Callable
    step: Callable
    evaluations_per_step: Callable
    name: str


class Guess(NamedTuple):
    """A Gaussian over images around what a server read off an update, or the prior's samples.

    Attributes:
        mean: [p] pixels in [0, 1].
        factor: [p r]; factor factor^T is the covariance.
        weight: of minus the Gaussian's log density in the search's loss.
        smooth: of the images' total variation there.
        denoised: of half the squared distance to the images that the prior's denoiser makes of
            them, which it holds constant in derivatives; of a prior without one it has no use.
        sharpness: what the cosine distance is multiplied by, under distance ``posterior``.
    """

    mean: jax.Array
    factor: jax.Array
    weight: jax.Array | np.float32 = np.float32(1)
    smooth: jax.Array | np.float32 = np.float32(0)
    denoised: jax.Array | np.float32 = np.float32(0)
    sharpness: jax.Array | np.float32 = np.float32(1)


class Problem(NamedTuple):
    """What an attack works on. Everything in it is known to the server.

    Attributes:
        observed: the shared (defended) update, a pytree like ``variables["params"]``.
        variables: the model's variables that the update was computed at.
        prior_params: the generator's parameters.
        labels: [b], the inferred labels.
        estimated: the defense's estimated parameters.
        noise: estimated standard deviation of noise on every entry of ``observed``; 0 for none.
        statistics: what ``model.statistics`` gives for the private batch, where the client shared
            it; None where it did not.
        guess: of the images, for searches of whitened pixels; None for others.
    """

    observed: PyTree
    variables: PyTree
    prior_params: PyTree
    labels: jax.Array
    estimated: PyTree
    noise: jax.Array | np.float32 = np.float32(0)
    statistics: PyTree | None = None
    guess: Guess | None = None


class Candidates(NamedTuple):
    """What an attack has found so far, one entry for each restart, lowest loss first.

    Attributes:
        points: [r p], in the space that the attack searches.
        images: [r b h w c], in [0, 1] or, for attacks on unbounded pixels, a little outside.
        labels: [r b], the classes that go with them.
        losses: [r], the attack's whole loss, regularisers included.
        distances: [r], the distance of updates alone, by which attacks with different regularisers
            can be compared. Exact but for a regulariser that couples the restarts ("group"), whose
            share is that at the restarts' present places.
    """

    points: jax.Array
    images: jax.Array
    labels: jax.Array
    losses: jax.Array
    distances: jax.Array


class Start(Protocol):
    """The state that an attack begins with; ``points`` [r p] replace its own starting points."""

    def __call__(
        self, key: jax.Array, problem: Problem, /, points: jax.Array | None = None
    ) -> PyTree: ...


class Attack(NamedTuple):
    """A reconstruction attack.

    Attributes:
        init: makes the state.
        step: ``step(key, problem, state) -> (state, Info)``.
        candidates: ``candidates(problem, state) -> Candidates``, each restart's best so far.
        distances: ``distances(problem, images[n b h w c], labels[b] or [n b]) -> [n]``, how far the
            images' updates lie from the observed one, as the attack's loss measures it, without
            regularisers.
        evaluations_per_step: gradient evaluations of one step.
        evaluations_at_start: gradient evaluations of ``init``.
        name: shown in results.
    """

    init: Start
    step: Callable
    candidates: Callable
    distances: Callable
    evaluations_per_step: int
    evaluations_at_start: int
    name: str
