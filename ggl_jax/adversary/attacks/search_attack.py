"""What all attacks are made of: a prior, a search, a matching loss and regularisers."""

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import (
    batch_norm_distance,
    parse_regularizer,
    resolve_distance,
    tree_statistics,
)
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.adversary.optimizers import BestState, best_so_far
from ggl_jax.adversary.sharding import over_population
from ggl_jax.errors import GGLError
from ggl_jax.priors.decoding import decode
from ggl_jax.types import Attack, Candidates, Model, Optimizer, Prior, View

STARTS = ("zeros", "prior", "uniform", "normal")
BOUNDS = ("none", "tanh")


def search_attack(
    name: str,
    model: Model,
    prior: Prior,
    optimizer: Optimizer,
    *,
    view: View | None = None,
    batch_size: int = 1,
    restarts: int = 1,
    pool: int = 0,
    start: str = "zeros",
    bound: str = "none",
    soft_labels: bool = False,
    distance: str = "squared_l2",
    likelihood: bool = False,
    relative: bool = False,
    regularizer: str = "none",
    fidelity: str = "paper",
    method: str = "auto",
    precision: str | None = None,
    local_steps: int = 1,
    local_learning_rate: float = 0.01,
    chunk_size: int | None = None,
    memory: float | None = None,
    instances: int = 1,
) -> Attack:
    """Search a prior's latents for the images whose update matches the observed one.

    The adversary minimises, over latents z, the distance between the observed update and the
    update that the images G(z) would cause with the inferred labels, plus regularisers.

    Args:
        name: shown in results.
        model: the federated model.
        prior: the generator G; :func:`ggl_jax.priors.pixels` for a search over images themselves.
        optimizer: the search; the attack remembers each restart's candidate of lowest loss.
        view: how a candidate's gradient is transformed before comparison (with the parameters
            in ``problem.estimated``); None for a non-adaptive attack.
        batch_size: images per observed update, at least 1; a candidate is then a batch, and its
            latents are concatenated.
        restarts: independent searches in one batch, at least 1; the lowest loss wins.
        pool: this many random samples of the prior are compared first, and the best ``restarts`` of
            them become starting points; 0 for none.
        start: without a pool, "zeros" (first restart at 0, the others sampled from the prior),
            "prior" (all sampled), "uniform" (U[0, 1]) or "normal" (N(0, 1)).
        bound: "none", or "tanh" to search an unbounded vector whose tanh is the latent.
        soft_labels: search the labels, too, as logits that start at N(0, 1).
        distance: a name in :data:`ggl_jax.DISTANCES`: "squared_l2" (D1), "cosine" (D2), ...
        likelihood: where there is noise, divide the squared l2 distance by twice its estimated
            variance: minus the logarithm of the update's likelihood. It then takes the place of
            ``relative``.
        relative: divide the distance by that of an update of zero (for squared l2 |y|^2, less what
            the estimated noise adds to it), so that a regulariser weighs as much under each
            defense: Soteria's updates are fifty times smaller than undefended ones.
        regularizer: a weighted sum by name such as "kld:0.1+norm:1e-4"; "none" for none. Beside
            :data:`ggl_jax.REGULARIZERS` there is "batch_norm": the distance of the candidate's
            BatchNorm statistics to those that the client shared (``problem.statistics``), or else
            to the model's running ones, which say something of a model that was trained.
        fidelity: "paper", or "code" for the published code's forms of the regularisers.
        method: "auto", "fused" or "direct" evaluation of the matching loss.
        precision: of its products on accelerators; see :func:`ggl_jax.matching_loss`.
        local_steps: SGD steps in the client's update; 1 for a plain gradient.
        local_learning_rate: their step size.
        chunk_size: candidates evaluated at once; None chooses by memory.
        memory: gigabytes for them, in place of that choice.
        instances: searches that will run in one batch on a device and share its memory.

    Returns:
        An :class:`Attack`.

    Raises:
        GGLError: for an unknown ``start`` or ``bound``, a count out of its range, a likelihood of
            another distance than squared l2, or a class-conditional prior with another number of
            classes than the model's.
    """
    if batch_size < 1 or restarts < 1:
        raise GGLError(f"batch_size, restarts: got {batch_size}, {restarts}, allowed: at least 1")
    if pool and pool < restarts:
        raise GGLError(f"pool: got {pool}, allowed: 0, or at least the number of restarts")
    if prior.num_classes not in (None, model.num_classes):
        raise GGLError(
            f"num_classes: model {model.name} has {model.num_classes} classes, prior {prior.name} "
            f"{prior.num_classes}; a label must mean the same to both, so choose a model with "
            f"{prior.num_classes} (--num-classes) or another prior"
        )
    if likelihood and distance != "squared_l2":
        raise GGLError(
            f"compare: 'likelihood' is that of Gaussian noise, a squared l2 distance, and {name} "
            f"has distance {distance!r}; add --distance squared_l2"
        )
    if start not in STARTS:
        raise GGLError(f"start: got {start!r}, allowed: {', '.join(STARTS)}")
    if bound not in BOUNDS:
        raise GGLError(f"bound: got {bound!r}, allowed: {', '.join(BOUNDS)}")
    statistics = model.statistics
    if statistics is None and "batch_norm" in regularizer:
        raise GGLError(
            f"regularizer: batch_norm needs a model with BatchNorm layers, and {model.name} has "
            "none; leave it out"
        )

    def regularizer_of(problem):
        """``regularize(points, images) -> [n]`` for one problem."""

        def batch_norm(latents, images, *, fidelity):
            del latents, fidelity
            assert statistics is not None
            shared = problem.statistics
            target = problem.variables["batch_stats"] if shared is None else shared

            def one(batch):
                return batch_norm_distance(statistics(problem.variables, batch), target)

            return over_population(jax.vmap(one))(images)

        weighted = parse_regularizer(
            regularizer, fidelity=fidelity, more={"batch_norm": batch_norm}
        )
        return lambda points, images: weighted(to_latents(points), images)

    # For its errors: before the first step, and without a problem at hand.
    parse_regularizer(regularizer, fidelity=fidelity, more={"batch_norm": batch_norm_distance})
    search = best_so_far(optimizer)
    num_latents = batch_size * prior.latent_dim
    num_logits = batch_size * model.num_classes if soft_labels else 0

    def to_latents(points):
        points = points[:, :num_latents].reshape(len(points), batch_size, prior.latent_dim)
        return jnp.tanh(points) if bound == "tanh" else points

    def to_logits(points):
        return points[:, num_latents:].reshape(len(points), batch_size, model.num_classes)

    def classes_of(problem, points):
        """[n b] class indices."""
        if soft_labels:
            return jnp.argmax(to_logits(points), axis=-1)
        return jnp.broadcast_to(problem.labels, (len(points), batch_size))

    def images_of(problem, points):
        """Points [n p] to images [n b h w c]."""
        latents = to_latents(points).reshape(-1, prior.latent_dim)
        classes = classes_of(problem, points).reshape(-1)
        images = decode(prior, problem.prior_params, latents, classes)
        return images.reshape(len(points), batch_size, *images.shape[1:])

    def distance_of(problem):
        variables, observed = problem.variables, problem.observed
        if view is not None and view.observe is not None:
            observed = view.observe(problem.estimated, observed)
        if view is not None and view.rewire is not None:
            variables = view.rewire(problem.estimated, variables, model.head)
        distance_to = matching_loss(
            model,
            variables,
            observed,
            view=view,
            estimated=problem.estimated,
            distance=distance,
            method=method,
            precision=precision,
            chunk_size=chunk_size,
            memory=memory,
            instances=instances,
            local_steps=local_steps,
            learning_rate=local_learning_rate,
        )
        if not (likelihood or relative):
            return distance_to
        variance = jnp.square(problem.noise)
        scale = 1.0 / energy(observed, variance) if relative else 1.0
        if likelihood:
            noisy = 0.5 / jnp.where(variance > 0, variance, 1.0)
            scale = jnp.where(variance > 0, noisy, scale)
        return lambda images, labels: scale * distance_to(images, labels)

    def energy(observed, variance):
        """The distance of an update of zero, the noise's share taken off; above 0."""
        chosen = resolve_distance(distance)
        reference = chosen.at_zero(tree_statistics(observed, observed))
        if chosen.scales is None:  # else the distance is relative by itself
            squares = sum(jnp.sum(y**2) for y in jax.tree.leaves(observed))
            entries = sum(y.size for y in jax.tree.leaves(observed))
            # The estimate of the noise is off by more than what is left under strong noise.
            left = jnp.maximum(squares - entries * variance, 1e-3 * squares)
            reference = reference * left / jnp.where(squares > 0, squares, 1.0)
        return jnp.where(reference > 0, reference, 1.0)

    def loss_fn_of(problem):
        distance_to = distance_of(problem)
        regularize = regularizer_of(problem)

        def loss_fn(points):
            images = over_population(lambda own: images_of(problem, own))(points)
            labels = classes_of(problem, points)
            if soft_labels:
                labels = jax.nn.softmax(to_logits(points))
            return over_population(distance_to)(images, labels) + regularize(points, images)

        return loss_fn

    def drawn(key, num):
        """Random points [num p]."""
        key_latents, key_logits = jax.random.split(key)
        if start == "uniform":
            points = jax.random.uniform(key_latents, (num, num_latents))
        elif start == "normal":
            points = jax.random.normal(key_latents, (num, num_latents))
        else:
            points = prior.sample_latent(key_latents, num * batch_size).reshape(num, num_latents)
        return jnp.concatenate([points, jax.random.normal(key_logits, (num, num_logits))], axis=1)

    def init(key, problem, points=None):
        key_start, key_search = jax.random.split(key)
        if points is None:
            points = drawn(key_start, pool or restarts)
            if pool:
                losses = loss_fn_of(problem)(points)
                losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
                points = points[jax.lax.top_k(-losses, restarts)[1]]
            elif start == "zeros":
                points = points.at[0, :num_latents].set(0.0)
        return search.init(key_search, points)

    def step(key, problem, state):
        return search.step(key, state, loss_fn_of(problem))

    def candidates(problem, state: BestState):
        order = jnp.argsort(state.losses)
        points, losses = state.latents[order], state.losses[order]
        images = images_of(problem, points)
        distances = losses - regularizer_of(problem)(points, images)
        return Candidates(points, images, classes_of(problem, points), losses, distances)

    def distances(problem, images, labels):
        return distance_of(problem)(images, labels)

    return Attack(
        init=init,
        step=step,
        candidates=candidates,
        distances=distances,
        # a candidate's update costs one gradient for each local step
        evaluations_per_step=optimizer.evaluations_per_step(restarts) * local_steps,
        evaluations_at_start=pool * local_steps,
        name=name,
    )
