"""What all attacks are made of: a space of candidates, a search, a matching loss and penalties."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax import grammar
from ggl_jax.adversary.attacks import members
from ggl_jax.adversary.losses import (
    batch_norm_distance,
    parse_regularizer,
    posterior,
    resolve_distance,
    total_variation,
    tree_statistics,
)
from ggl_jax.adversary.losses import gaussian as gaussian_penalty
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.adversary.matching.surrogate import smoothed
from ggl_jax.adversary.optimizers import OPTIMIZERS, BestState, best_so_far
from ggl_jax.adversary.regression import rank_of
from ggl_jax.adversary.sharding import over_population
from ggl_jax.client.gradients import is_binary
from ggl_jax.errors import GGLError
from ggl_jax.gate.models import variable_shapes
from ggl_jax.priors.decoding import decode
from ggl_jax.priors.gaussian import gaussian
from ggl_jax.priors.pixels import pixels
from ggl_jax.spec import Client, Search, Speed, checked
from ggl_jax.trees import head_parts
from ggl_jax.types import Attack, Candidates, Loss, Model, Optimizer, Prior, Products, View


class _Space(NamedTuple):
    """What a point [p] of the search stands for: a batch of latents and, perhaps, of labels.

    Attributes:
        latents: points [n p] to latents [n b z].
        logits: points [n p] to the searched labels' logits [n b k]; None where labels are inferred.
        classes: (problem, points) to class indices [n b].
        images: (problem, points) to images [n b h w c].
        draw: (key, num) to random points [num p].
        num_latents: the entries of a point that are latents, which come first.
    """

    latents: Callable
    logits: Callable | None
    classes: Callable
    images: Callable
    draw: Callable
    num_latents: int


def _space(model: Model, prior: Prior, search: Search, batch_size: int) -> _Space:
    num_latents = batch_size * prior.latent_dim
    searched = search.labels == "searched"
    num_logits = batch_size * model.num_classes if searched else 0

    def latents(points):
        points = points[:, :num_latents].reshape(len(points), batch_size, prior.latent_dim)
        return jnp.tanh(points) if search.bound == "tanh" else points

    def logits(points):
        return points[:, num_latents:].reshape(len(points), batch_size, model.num_classes)

    def classes(problem, points):
        if searched:
            return jnp.argmax(logits(points), axis=-1)
        return jnp.broadcast_to(problem.labels, (len(points), batch_size))

    def images(problem, points):
        own = latents(points).reshape(-1, prior.latent_dim)
        known = problem.prior_params
        if search.space == "whitened":
            known = {"mean": problem.guess.mean, "factor": problem.guess.factor}
        decoded = decode(prior, known, own, classes(problem, points).reshape(-1))
        return decoded.reshape(len(points), batch_size, *decoded.shape[1:])

    def draw(key, num):
        key_latents, key_logits = jax.random.split(key)
        if search.start == "uniform":
            points = jax.random.uniform(key_latents, (num, num_latents))
        elif search.start == "normal":
            points = jax.random.normal(key_latents, (num, num_latents))
        else:
            points = prior.sample_latent(key_latents, num * batch_size).reshape(num, num_latents)
        return jnp.concatenate([points, jax.random.normal(key_logits, (num, num_logits))], axis=1)

    return _Space(latents, logits if searched else None, classes, images, draw, num_latents)


#: Regularisers that need more than a candidate: the model's or client's statistics, the denoiser.
PROBLEMS = ("batch_norm", "denoised")


def _penalties(model: Model, prior: Prior | None, search: Search, space: _Space) -> Callable:
    """``penalties(problem) -> regularize(points, images) -> [n]``."""
    # a search over pixels needs no prior
    statistics, denoise = model.statistics, None if prior is None else prior.denoise
    if statistics is None and "batch_norm" in search.regularizer:
        raise GGLError(
            f"regularizer: batch_norm needs a model with BatchNorm layers, and {model.name} has "
            "none; leave it out"
        )
    if denoise is None and "denoised" in search.regularizer:
        raise GGLError(
            "regularizer: denoised needs a prior with a denoiser (ggl-jax train-denoiser), and "
            f"{prior.name if prior else 'no prior'} has none; leave it out"
        )

    def penalties(problem):
        def batch_norm(latents, images):
            del latents
            assert statistics is not None
            shared = problem.statistics
            target = problem.variables["batch_stats"] if shared is None else shared

            def one(batch):
                return batch_norm_distance(statistics(problem.variables, batch), target)

            return over_population(jax.vmap(one))(images)

        def denoised(latents, images):
            del latents
            assert denoise is not None

            def apart(images):
                every = images.reshape(-1, *images.shape[2:])
                cleaned = jax.lax.stop_gradient(denoise(problem.prior_params, every))
                return 0.5 * jnp.sum((images - cleaned.reshape(images.shape)) ** 2, (1, 2, 3, 4))

            return over_population(apart)(images)

        own = {"batch_norm": batch_norm, "denoised": denoised}
        weighted = parse_regularizer(search.regularizer, more=own)

        def regularize(points, images):
            latents = space.latents(points)
            total = weighted(latents, images)
            if search.space == "whitened":
                guess = problem.guess
                total += guess.weight * gaussian_penalty(latents, images)
                total += guess.smooth * total_variation(latents, images)
                if denoise is not None:
                    total += guess.denoised * denoised(latents, images)
            return total

        return regularize

    # For its errors: before the first step, and without a problem at hand.
    parse_regularizer(search.regularizer, more=dict.fromkeys(PROBLEMS, batch_norm_distance))
    return penalties


def _distance(
    model: Model, search: Search, view: View | None, client: Client, speed: Speed
) -> Callable:
    """``distance(problem) -> distance_to(images, labels) -> [n]``, scaled as the search asks."""
    chosen = resolve_distance(search.distance)
    if search.surrogate:
        model = smoothed(model, search.surrogate)

    def energy(observed, variance):
        """The distance of an update of zero, the noise's share taken off; above 0."""
        reference = chosen.at_zero(tree_statistics(observed, observed))
        if chosen.scales is None:  # else the distance is relative by itself
            squares = sum(jnp.sum(y**2) for y in jax.tree.leaves(observed))
            # Where nothing was shared there is no noise, either.
            entries = sum(jnp.count_nonzero(y) for y in jax.tree.leaves(observed))
            # The estimate of the noise is off by more than what is left under strong noise.
            left = jnp.maximum(squares - entries * variance, 1e-3 * squares)
            reference = reference * left / jnp.where(squares > 0, squares, 1.0)
        return jnp.where(reference > 0, reference, 1.0)

    def distance(problem):
        variables, observed = problem.variables, problem.observed
        if view is not None and view.rewire is not None:
            variables = view.rewire(problem.estimated, variables, model.head)
        variance = jnp.square(problem.noise)
        own = chosen
        if search.distance == "posterior":
            sharpness = 1.0 if problem.guess is None else problem.guess.sharpness
            own = posterior(variance, sharpness)
        distance_to = matching_loss(
            model,
            variables,
            observed,
            view=view,
            estimated=problem.estimated,
            distance=own,
            client=client,
            speed=speed,
        )
        likelihood = search.distance == "likelihood"
        plain = not (likelihood or search.relative)
        scale = 1.0 / energy(observed, variance) if search.relative else 1.0
        if likelihood:
            noisy = 0.5 / jnp.where(variance > 0, variance, 1.0)
            scale = jnp.where(variance > 0, noisy, scale)

        def losses(images, labels):
            return scale * distance_to(images, labels)

        def products(images, labels):
            found = distance_to.products(images, labels)
            found = jax.tree.map(lambda x: scale * x, found)
            return found._replace(noise=variance * found.noise)

        return Loss(distance_to.losses if plain else losses, products)

    return distance


def search_attack(
    model: Model,
    prior: Prior,
    search: Search,
    *,
    view: View | None = None,
    client: Client | None = None,
    speed: Speed | None = None,
    optimizer: Optimizer | None = None,
) -> Attack:
    """Search for the images whose update matches the observed one.

    The adversary minimises, over latents z, the distance between the observed update and the
    update that the images G(z) would cause with the inferred labels, plus penalties. In detail:

    - a candidate is a batch of ``client.batch_size`` images, whose latents are concatenated; with
      ``search.space`` "pixels" the latents are the images;
    - ``search.pool`` random samples are compared first, and the best ``search.restarts`` of them
      become starting points; without a pool, "zeros" puts the first restart at 0 and samples the
      others from the prior;
    - ``search.relative`` divides the distance by that of an update of zero (for squared l2 |y|^2,
      less what the estimated noise adds to it), so that a penalty weighs as much under each
      defense: Soteria's updates are fifty times smaller than undefended ones;
    - ``search.distance`` "likelihood" divides squared l2, where there is noise, by twice the
      noise's estimated variance, in place of ``relative``;
    - the penalty "batch_norm" is the distance of the candidate's BatchNorm statistics to those that
      the client shared (``problem.statistics``), or else to the model's running ones;
    - the penalty "denoised" is half the squared distance of the candidate's images to what the
      prior's denoiser makes of them, which is held constant in derivatives (Romano et al., 2017).

    Args:
        model: the federated model.
        prior: the generator G; a search over pixels uses its denoiser alone.
        search: its options, see :class:`ggl_jax.spec.Search`; ``steps`` are the schedule's.
        view: how a candidate's gradient is transformed before comparison, if ``search`` is
            adaptive (with the parameters in ``problem.estimated``).
        client: images and local steps behind an update; None for one image and one step.
        speed: how losses are computed; ``speed.instances`` searches share a device's memory.
        optimizer: a search of your own, in place of ``search.optimizer``.

    Returns:
        An :class:`Attack`.

    Raises:
        GGLError: an option out of its range, or a class-conditional prior with another number of
            classes than the model's.
    """
    search, client, speed = checked(search), client or Client(), speed or Speed()
    if members(search):
        raise GGLError(f"attack: got {search.attack!r}, which is several searches; choose one")
    known = prior  # what it knows of images serves searches of other coordinates, too
    if search.space == "pixels":
        prior = pixels(model.image_shape)
    _check(model, prior, search)
    if search.space == "whitened":  # the bank is the prior's own
        prior = gaussian(model.image_shape, rank_of(prior, search.bank))
    own = optimizer or grammar.build(
        OPTIMIZERS, search.optimizer, what="optimizer", steps=search.steps
    )
    best = best_so_far(own)
    space = _space(model, prior, search, client.batch_size)
    penalties = _penalties(model, known, search, space)
    distance = _distance(model, search, view if search.adaptive else None, client, speed)

    def loss_fn_of(problem):
        distance_to, regularize = distance(problem), penalties(problem)

        def candidates_of(points):
            images = over_population(lambda some: space.images(problem, some))(points)
            labels = space.classes(problem, points)
            if space.logits is not None:
                labels = jax.nn.softmax(space.logits(points))
            return images, labels

        def losses(points):
            images, labels = candidates_of(points)
            return over_population(distance_to.losses)(images, labels) + regularize(points, images)

        def products(points):
            flat = points.reshape(-1, points.shape[-1])
            images, labels = candidates_of(flat)
            groups = (x.reshape(*points.shape[:2], *x.shape[1:]) for x in (images, labels))
            own = over_population(distance_to.products)(*groups)
            # A penalty is the square of a residual with one entry.
            penalty = jnp.maximum(regularize(flat, images), 0).reshape(own.losses.shape)
            roots = jnp.sqrt(penalty)
            inner = own.inner + roots[:, :, None] * roots[:, None]
            return Products(own.losses + penalty, inner, own.noise)

        return Loss(losses, products)

    def init(key, problem, points=None):
        key_start, key_search = jax.random.split(key)
        if points is None:
            points = space.draw(key_start, search.pool or search.restarts)
            if search.pool:
                losses = loss_fn_of(problem)(points)
                losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
                points = points[jax.lax.top_k(-losses, search.restarts)[1]]
            elif search.start == "zeros" or search.space == "whitened":
                points = points.at[0, : space.num_latents].set(0.0)
        return best.init(key_search, points)

    def step(key, problem, state):
        return best.step(key, state, loss_fn_of(problem))

    def candidates(problem, state: BestState):
        order = jnp.argsort(state.losses)
        points, losses = state.latents[order], state.losses[order]
        images = space.images(problem, points)
        distances = losses - penalties(problem)(points, images)
        return Candidates(points, images, space.classes(problem, points), losses, distances)

    def distances(problem, images, labels):
        return distance(problem)(images, labels)

    return Attack(
        init=init,
        step=step,
        candidates=candidates,
        distances=distances,
        # a candidate's update costs one gradient for each local step
        evaluations_per_step=own.evaluations_per_step(search.restarts) * client.local_steps,
        evaluations_at_start=search.pool * client.local_steps,
        name=search.attack,
    )


def reads(search: Search) -> bool:
    """Whether a search needs what regression from a bank of samples reads."""
    return search.space == "whitened" or search.start == "reading"


def _check(model: Model, prior: Prior, search: Search) -> None:
    kernel, _ = head_parts(variable_shapes(model)["params"], model.head)
    inferred = search.labels != "searched"
    if inferred and not (model.loss is None or is_binary(model, kernel.shape[1])):
        name = getattr(model.loss, "__name__", "the model's own")
        raise GGLError(
            f"labels: got {search.labels!r} ({search.attack}), but from the loss {name} labels "
            "cannot be inferred, only from cross-entropy (softmax, or binary of one logit); "
            "search them: labels='searched', refine='none' (as attack dlg)"
        )
    if reads(search) and search.bank < 2:
        raise GGLError(
            f"bank: got {search.bank}, allowed: whole numbers of at least 2 where space is "
            "'whitened' or start is 'reading', which come from the bank"
        )
    if search.pool and search.pool < search.restarts:
        raise GGLError(
            f"pool: got {search.pool}, allowed: 0, or at least the number of restarts, "
            f"{search.restarts}"
        )
    if prior.num_classes not in (None, model.num_classes):
        raise GGLError(
            f"num_classes: model {model.name} has {model.num_classes} classes, prior {prior.name} "
            f"{prior.num_classes}; a label must mean the same to both, so choose a model with "
            f"{prior.num_classes} (--num-classes) or another prior"
        )


def refinement_of(search: Search) -> Search:
    """The search that goes on from another's images in pixels, free of the prior but kept smooth.

    A generator's range holds no face exactly; the update often tells the rest. Under noise the
    pixels would fit the noise: the loss falls, and the likeness does not rise. It has to be started
    from points: those of :func:`ggl_jax.priors.pixels.pixels_of`. The penalty is sized for a
    relative distance, so no likelihood is taken, which scales it.
    """
    own = search.distance
    return dataclasses.replace(
        search,
        attack="refine",
        space="pixels",
        labels="inferred",
        optimizer="adam:0.04,schedule=ramp,signed=False,box=1",
        distance={"likelihood": "squared_l2", "posterior": "cosine"}.get(own, own),
        regularizer="total_variation:0.03",
        steps=search.refine_steps,
        restarts=1,
        pool=0,
        bound="none",
        relative=True,
    )


def finalists_of(search: Search) -> Search:
    """The search by Adam that goes on from another's best restarts."""
    return dataclasses.replace(
        search,
        optimizer="adam:schedule=ramp,signed=False",
        steps=search.final_steps,
        restarts=search.finalists,
        pool=0,
    )
