"""The stages that a search goes through, and what becomes of its restarts."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.adversary.attack import finalists_of, refinement_of, search_attack
from ggl_jax.adversary.attacks import ATTACKS
from ggl_jax.adversary.estimation import check_rounds
from ggl_jax.adversary.regression import rank_of
from ggl_jax.adversary.search import SearchResult, Stage
from ggl_jax.client.local import check_client, gradients_summed, shares_gradient
from ggl_jax.errors import GGLError
from ggl_jax.images import assign
from ggl_jax.priors.ceiling import fit_latents, project
from ggl_jax.priors.pixels import pixels_of
from ggl_jax.spec import Client, Search, Speed, checked, replace
from ggl_jax.types import Candidates, Model, Prior, Problem, Public, View


def combines(search: Search, view: View) -> bool:
    """Whether the result is the mean image of the restarts.

    Under noise a loss tells the restarts' likenesses apart no longer: the best by loss is one of
    several guesses, whose mean is nearer to the private image than most of them, and than any of
    them knowably is.
    """
    return search.combine == "mean" or (search.combine == "auto" and view.adds_noise)


def refines(search: Search, view: View) -> bool:
    """Whether the search goes on in pixels: not under noise, which they would fit."""
    return search.refine == "pixels" or (search.refine == "auto" and not view.adds_noise)


def fits(search: Search, view: View) -> bool:
    """Whether the generator's fit has a part in the result.

    Under noise it takes off what no likelihood tells from the image; searches of latents are
    within the generator anyway.
    """
    noisy = view.adds_noise and search.space == "whitened"
    return search.refine == "generator" or (search.refine == "auto" and noisy)


def make_stages(
    search: Search,
    model: Model,
    prior: Prior,
    view: View,
    *,
    compared: View | None = None,
    client: Client | None = None,
    speed: Speed | None = None,
) -> list[Stage]:
    """The stages of a search, for :func:`ggl_jax.adversary.search.run_stages`.

    First the attack itself. Then, with ``search.finalists`` = f > 0, the f best of its restarts go
    on by Adam for ``final_steps`` (unless all restarts are to be combined). Then, with
    ``search.refine`` "pixels" (or "auto", unless the defense adds noise, which pixels would fit),
    the best, or the mean, is refined in pixels. (Its fit by the generator is no stage of the
    search: :func:`result_images`.)

    Args:
        search: see :class:`ggl_jax.spec.Search`.
        model: the federated model.
        prior: the generator.
        view: the server's side of the client's defense.
        compared: another form of it, in which problems have its parameters.
        client: images and local steps behind an update.
        speed: how losses are computed; ``instances`` searches will run in one batch on a device.

    Raises:
        GGLError: for an option out of its range, a defense of single gradients where there are
            several local steps, or one whose rounds cannot be attacked together.
    """
    search, client, speed = checked(search), checked(client or Client()), checked(speed or Speed())
    view = view.comparing(search.support)
    check_client(client)
    check_rounds(view, client.rounds)
    # Their mean is searched for as one round's update is, by the same compiled programs.
    client = replace(client, rounds=1)
    if client.clients > 1 and view.rewire is not None:
        raise GGLError(
            f"clients: what {view.name} did is read off each client's own update, which the mean "
            f"of {client.clients} does not show; use 1, or another form (representation=False)"
        )
    if not shares_gradient(client) and view.rewire is not None:
        raise GGLError(
            f"local_steps: {view.name} recomputes a single gradient step, so candidates cannot be "
            f"compared with {client.local_steps} local steps of {client.local_optimizer}; use 1 of "
            "sgd, or representation=False"
        )
    if client.batch_size > 1 and search.labels == "inferred" and gradients_summed(client) is None:
        raise GGLError(
            f"labels: the update of local_optimizer {client.local_optimizer} is no sum of "
            "gradients, so the classes of several images cannot be counted; search them: "
            "labels='searched', refine='none' (as attack dlg), or use batch_size 1"
        )
    if search.finalists > search.restarts:
        raise GGLError(
            f"finalists: got {search.finalists}, allowed: 0 to the number of restarts, "
            f"{search.restarts}"
        )
    options: dict[str, Any] = {"view": compared or view, "client": client}
    build = ATTACKS.get(search.attack)
    if build is None or isinstance(build, Search):
        build = _search_attack
    # Reduced precision is for the early search; near the optimum differences are small.
    exact = speed if speed.precision == "default" else replace(speed, precision="float32")
    whitened = search.space == "whitened"
    attack = build(model, prior, search, speed=exact if whitened else speed, **options)
    begin = None
    if search.start == "reading" and not whitened:  # where that is the origin
        begin = _around_reading(search, prior, client, model)
    stages = [Stage(attack, search.steps, begin=begin)]
    if whitened:
        # What was read, evaluated; then the most probable image, by the same program.
        stages = [Stage(attack, 1)]
        if search.steps > 1:
            enter = _best_points(search.restarts)
            stages.append(Stage(attack, search.steps, enter, _sharpened, _below(ACCEPT)))
    if search.finalists and not combines(search, view):
        last = finalists_of(search)
        attack = _search_attack(model, prior, last, speed=exact, **options)
        stages.append(Stage(attack, last.steps, _best_points(search.finalists)))
    if refines(search, view):
        size = math.prod(model.image_shape)
        if whitened and client.batch_size == 1 and rank_of(prior, search.bank) == size:
            # By the same program, too: the guess, and the weights beside it, are data.
            if search.refine_steps != search.steps:
                last = replace(search, steps=search.refine_steps)
                attack = build(model, prior, last, speed=exact, **options)
            freed = _BY_DENOISER if prior.denoise is not None else _BY_VARIATION
            return [*stages, Stage(attack, search.refine_steps, _origin, freed, _below(ACCEPT))]
        last = refinement_of(search)
        attack = _search_attack(model, prior, last, speed=exact, **options)
        mean = combines(search, view)
        stages.append(Stage(attack, last.steps, _mean_pixels if mean else _best_pixels))
    return stages


# The same search of the same model is the same object, so that its compiled program is found again.
_search_attack = functools.lru_cache(maxsize=64)(search_attack)

#: What the guess's own distance counts for each pixel in the whitened search, where a deviation of
#: one standard error counts a half. This and the numbers below were chosen on public images that no
#: prior was trained on (docs/results.md).
SHARPNESS = 3.0
#: Share of its first loss below which that search, and then its refinement, have to come: where
#: derivatives tell little (signs; masks that jump at every step, in a narrow network whose layers
#: are all clipped), a loss that hardly falls leads away from the image.
ACCEPT = 0.8
#: Beside the cosine distance in the whitened search's refinement: weight of the squared distance to
#: the denoised image or, of a prior without a denoiser, of the total variation.
DENOISED, SMOOTH = 0.0003, 0.005
#: The standard deviation of that refinement's pixels.
STRIDE = 0.13
#: Weight of the squared distance to the denoised image beside the noise's likelihood.
DENOISED_UNDER_NOISE = 60.0


def _sharpened(problem: Problem, candidates: Candidates) -> Problem:
    """The distance weighed by that of the guess: what is left there is what is uncertain."""
    assert problem.guess is not None
    size = np.prod(candidates.images.shape[2:])
    sharpness = SHARPNESS * size / jnp.maximum(candidates.distances[0], 1e-12)
    denoised = jnp.where(problem.noise > 0, jnp.float32(DENOISED_UNDER_NOISE), 0.0)
    guess = problem.guess._replace(sharpness=sharpness, denoised=denoised)
    return problem._replace(guess=guess)


def _freed(problem: Problem, candidates: Candidates, *, by: str) -> Problem:
    """Around the image that was found every pixel is as uncertain as any other."""
    assert problem.guess is not None
    image = jnp.clip(candidates.images[0], 0.0, 1.0).reshape(-1)
    factor = STRIDE * jnp.eye(image.size, dtype=image.dtype)
    guess = problem.guess._replace(mean=image, factor=factor, weight=jnp.float32(0))
    weight: dict[str, Any] = {by: {"denoised": DENOISED, "smooth": SMOOTH}[by] * guess.sharpness}
    return problem._replace(guess=guess._replace(**weight))


# The same objects for every search, or their programs would be compiled again.
_BY_DENOISER = functools.partial(_freed, by="denoised")
_BY_VARIATION = functools.partial(_freed, by="smooth")


def _below(share: float) -> Callable:
    """Accept a search whose loss falls below a share of its first.

    Noise has a share of the loss that no candidate can take away, so there it always counts.
    """
    return lambda problem, first, lowest: problem.noise > 0 or lowest < share * first


def _around_reading(search: Search, prior: Prior, client: Client, model: Model) -> Callable:
    """Starts [i r p] at what was read of each update, and at draws of its errors."""

    def starts(key, problem):
        guess, shape = problem.guess, (search.restarts, client.batch_size)
        key_draw, key_fit = jax.random.split(key)
        drawn = jax.random.normal(key_draw, (*shape, guess.factor.shape[1])).at[0].set(0.0)
        images = jnp.clip(guess.mean + drawn @ guess.factor.T, 0.0, 1.0)
        images = images.reshape(*shape, *model.image_shape)
        if search.space == "pixels":
            points = pixels_of(images)
        else:
            labels = jnp.tile(problem.labels, search.restarts)
            points, _, _ = fit_latents(
                *(prior, problem.prior_params, images.reshape(-1, *model.image_shape), key_fit),
                labels=None if prior.num_classes is None else labels,
            )
            points = points.reshape(search.restarts, -1)
            if search.bound == "tanh":
                points = jnp.arctanh(jnp.clip(points, -0.999, 0.999))
        if search.labels != "searched":
            return points
        logits = jnp.zeros((search.restarts, client.batch_size * model.num_classes))
        return jnp.concatenate([points, logits], axis=1)

    return lambda keys, problems: jnp.stack(list(map(starts, keys, problems)))


def _origin(candidates):
    return jnp.zeros_like(candidates.points[:, :1])


def _best_points(num: int):
    return lambda candidates: candidates.points[:, :num]


def _best_pixels(candidates):
    return jax.vmap(pixels_of)(jnp.clip(candidates.images[:, :1], 0.0, 1.0))


def _mean_pixels(candidates):
    return jax.vmap(pixels_of)(mean_image(candidates)[:, None])


def mean_image(candidates: Candidates) -> jax.Array:
    """The mean over the restarts, [i b h w c], of candidates [i r ...], each within [0, 1].

    An update does not tell the order of a batch's images, so restarts may hold the same ones in
    different places. Those of equal label are first brought into the order of the best restart,
    each beside the one that it resembles most.
    """
    images = jnp.clip(candidates.images, 0.0, 1.0)
    if images.shape[2] > 1:
        images = jnp.asarray(_in_one_order(np.asarray(images), np.asarray(candidates.labels)))
    return jnp.mean(images, axis=1)


def _in_one_order(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each restart's images [i r b h w c] in the places of the first one's."""
    ordered = images.copy()
    for i, (restarts, classes) in enumerate(zip(images, labels, strict=True)):
        for r in range(1, len(restarts)):
            # Pixels differ by at most 1, so another label costs more than any likeness gains.
            apart = 10.0 * (classes[0][:, None] != classes[r])
            ordered[i, r] = restarts[r][assign(restarts[r], restarts[0], apart)]
    return ordered


def result_images(search: Search, view: View, outcome: SearchResult, public: Public) -> np.ndarray:
    """What the adversary ends up with, [i b h w c] in [0, 1]: the best restart, or their mean.

    Under noise no estimate of a single image is certain, so that the mean of three is nearer to it
    than each: what was searched, the generator's fit to that, and what was read before.

    Args:
        search: its options.
        view: the server's side of the client's defense.
        outcome: from :func:`ggl_jax.adversary.search.run_stages`.
        public: whose prior fits.
    """
    # a refinement starts from the mean by itself
    mean = combines(search, view) and not refines(search, view)
    found = mean_image(outcome.candidates) if mean else outcome.images
    images = np.clip(np.asarray(found), 0.0, 1.0)
    if not fits(search, view):
        by_denoiser = search.space == "whitened" and refines(search, view)
        return _cleaned(images, public) if by_denoiser else images
    found = project(
        *(public.prior, public.prior_params, images.reshape(-1, *images.shape[-3:])),
        jax.random.key(0),  # the same samples for all: what is found does not depend on the batch
        labels=None if public.prior.num_classes is None else outcome.labels.reshape(-1),
    )
    fitted = np.asarray(found).reshape(images.shape)
    if search.refine == "generator":
        return fitted
    estimates = [images, fitted]
    if images.shape[1] == 1:  # of several images nothing is read
        guesses = [problem.guess for problem in outcome.problems if problem.guess is not None]
        read = np.stack([np.asarray(guess.mean) for guess in guesses])
        estimates.append(read.reshape(images.shape).clip(0.0, 1.0))
    return np.mean(estimates, axis=0)


#: Root mean square change of a pixel from which a denoiser has the last word: below it an image is
#: as near as the denoiser's own error, and keeps what it has.
COARSE = 0.01


def _cleaned(images: np.ndarray, public: Public) -> np.ndarray:
    """What the prior's denoiser leaves of refined images [i b h w c], each on its own."""
    if public.prior.denoise is None:
        return images
    every = images.reshape(-1, *images.shape[-3:])
    cleaned = np.clip(_denoise(public.prior, public.prior_params, every), 0.0, 1.0)
    change = np.sqrt(np.mean((cleaned - every) ** 2, axis=(1, 2, 3), keepdims=True))
    return np.where(change > COARSE, cleaned, every).reshape(images.shape)


@functools.partial(jax.jit, static_argnums=0)
def _denoise(prior: Prior, params, images):
    assert prior.denoise is not None
    return prior.denoise(params, images)
