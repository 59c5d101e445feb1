"""How hard, and with what, the adversary searches: settings, and the stages they stand for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.adversary.attacks import make_attack, pixel_refinement, resolve
from ggl_jax.adversary.optimizers import optimizer_options
from ggl_jax.adversary.search import SearchResult, Stage
from ggl_jax.errors import GGLError
from ggl_jax.images import assign
from ggl_jax.priors.pixels import pixels_of
from ggl_jax.types import Candidates, Model, Prior, View

#: Whether pixels are refined after the search: never, always, or wherever no noise was added.
REFINEMENTS = ("none", "pixels", "auto")
#: What the result is: the restart of lowest loss, the mean image of all restarts, or the mean
#: wherever noise was added, else the best.
COMBINATIONS = ("best", "mean", "auto")


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """How hard, and with what, the adversary searches. See ``ggl-jax audit --help``.

    None means "as the attack was published".
    """

    attack: str = "ggl"
    adaptive: bool | None = None
    optimizer: str | None = None
    population: int | None = None
    steps: int | None = None
    restarts: int | None = None
    pool: int | None = None
    start: str | None = None
    bound: str | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    signed: bool | None = None
    sigma0: float | None = None
    finalists: int = 0
    final_steps: int = 100
    combine: str = "best"
    refine: str = "none"
    refine_steps: int = 300
    compare: str = "published"
    distance: str | None = None
    relative: bool | None = None
    regularizer: str | None = None
    fidelity: str = "paper"
    method: str = "auto"
    precision: str | None = None
    chunk_size: int | None = None
    memory: float | None = None
    instances: int | None = None


#: Fields that say nothing to an attack by itself.
_NOT_THE_ATTACKS = (
    *("attack", "finalists", "final_steps", "combine", "refine", "refine_steps", "compare"),
    "instances",
)


def combines(settings: AttackSettings, view: View) -> bool:
    """Whether the result is the mean image of the restarts.

    Under noise a loss tells the restarts' likenesses apart no longer: the best by loss is one of
    several guesses, whose mean is nearer to the private image than most of them, and than any of
    them knowably is.
    """
    if settings.combine not in COMBINATIONS:
        raise GGLError(f"combine: got {settings.combine!r}, allowed: {', '.join(COMBINATIONS)}")
    return settings.combine == "mean" or (settings.combine == "auto" and view.adds_noise)


def make_stages(
    settings: AttackSettings,
    model: Model,
    prior: Prior,
    view: View,
    *,
    batch_size: int = 1,
    local_steps: int = 1,
    local_learning_rate: float = 0.01,
    instances: int = 1,
) -> tuple[list[Stage], dict[str, Any]]:
    """The stages of a search, for :func:`ggl_jax.adversary.search.run_stages`.

    First the attack itself. Then, with ``settings.finalists`` = f > 0, the f best of its restarts
    go on by Adam for ``final_steps`` (unless all restarts are to be combined). Then, with
    ``settings.refine`` "pixels" (or "auto", unless the defense adds noise, which pixels would
    fit), the best, or the mean, is refined in pixels.

    Args:
        settings: see there.
        model: the federated model.
        prior: the generator.
        view: the server's side of the client's defense.
        batch_size: images per observed update.
        local_steps: SGD steps in the client's update.
        local_learning_rate: their step size.
        instances: searches that will run in one batch on a device.

    Returns:
        The stages, and the attack's settings as resolved.

    Raises:
        GGLError: for a setting out of its range, a comparison that a non-adaptive attack cannot
            make, or a defense of single gradients where there are several local steps.
    """
    if settings.refine not in REFINEMENTS:
        raise GGLError(f"refine: got {settings.refine!r}, allowed: {', '.join(REFINEMENTS)}")
    for name in ("final_steps", "refine_steps"):
        if getattr(settings, name) < 1:
            raise GGLError(f"{name}: got {getattr(settings, name)}, allowed: at least 1")
    if local_steps > 1 and view.rewire is not None:
        raise GGLError(
            f"local_steps: {view.name} recomputes a single gradient step, so candidates cannot be "
            f"compared with {local_steps} local steps; use 1, or --fidelity code"
        )
    given = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in _NOT_THE_ATTACKS
    }
    given |= {
        "likelihood": settings.compare == "likelihood" or None,
        "batch_size": batch_size,
        "local_steps": local_steps,
        "local_learning_rate": local_learning_rate,
        "instances": instances,
    }
    resolved = resolve(settings.attack, **given)
    if settings.compare in ("support", "undefended") and not resolved["adaptive"]:
        raise GGLError(
            f"compare: {settings.compare!r} changes how the defense is simulated, and this "
            f"{settings.attack} does not simulate it; add --adaptive True, or leave --compare out"
        )
    restarts = resolved.get("restarts", 1)
    if not 0 <= settings.finalists <= restarts:
        raise GGLError(
            f"finalists: got {settings.finalists}, allowed: 0 to the number of restarts, {restarts}"
        )
    attack = make_attack(settings.attack, model, prior, view=view, **given)
    stages = [Stage(attack, resolved["steps"])]
    mean = combines(settings, view)
    # Reduced precision is for the early search; near the optimum differences are small.
    last_precision = None if settings.precision is None else "float32"
    if settings.finalists and not mean:
        by_adam = {
            "optimizer": "adam",
            "signed": False,
            "schedule": "ramp",
            "steps": settings.final_steps,
            "restarts": settings.finalists,
            "pool": 0,
            "precision": last_precision,
        }
        last = make_attack(settings.attack, model, prior, view=view, **(given | by_adam))
        stages.append(Stage(last, settings.final_steps, _best_points(settings.finalists)))
    if settings.refine == "pixels" or (settings.refine == "auto" and not view.adds_noise):
        # Not the likelihood: it scales the distance, and the penalty is sized for a relative one.
        shared = ("distance", "fidelity", "method", "chunk_size", "memory", "instances")
        refinement = pixel_refinement(
            model,
            steps=settings.refine_steps,
            view=view if resolved["adaptive"] else None,
            precision=last_precision,
            batch_size=batch_size,
            local_steps=local_steps,
            local_learning_rate=local_learning_rate,
            **{name: resolved[name] for name in shared if name in resolved},
        )
        stages.append(
            Stage(refinement, settings.refine_steps, _mean_pixels if mean else _best_pixels)
        )
    return stages, resolved


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


def result_images(
    settings: AttackSettings, view: View, stages: Sequence[Stage], outcome: SearchResult
) -> np.ndarray:
    """What the adversary ends up with, [i b h w c] in [0, 1]: the best restart, or their mean.

    Args:
        settings: the search.
        view: the server's side of the client's defense.
        stages: from :func:`make_stages`.
        outcome: from :func:`ggl_jax.adversary.search.run_stages`.
    """
    refined = stages[-1].attack.name == "refine"  # starts from the mean by itself
    mean = combines(settings, view) and not refined
    images = mean_image(outcome.candidates) if mean else outcome.images
    return np.clip(np.asarray(images), 0.0, 1.0)


def unused_options(settings: AttackSettings) -> list[str]:
    """One line for each option that is given and that neither the attack nor its optimiser has."""
    # Every search has steps; the other names mean something else to an optimiser, if anything.
    others = (*_NOT_THE_ATTACKS, "steps")
    optimizer = resolve(settings.attack, optimizer=settings.optimizer)["optimizer"]
    at_work = {optimizer, "adam"} if settings.finalists else {optimizer}
    return [
        f"{name}: not used; {optimizer} has no such option, only {', '.join(owners)}"
        for name, owners in optimizer_options().items()
        if name not in others
        and getattr(settings, name, None) is not None
        and at_work.isdisjoint(owners)
    ]
