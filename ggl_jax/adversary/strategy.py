"""How hard, and with what, the adversary searches: settings, and the stages they stand for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ggl_jax.adversary.attacks import make_attack, pixel_refinement, resolve
from ggl_jax.adversary.search import Stage
from ggl_jax.errors import GGLError
from ggl_jax.priors.pixels import pixels_of
from ggl_jax.types import Defense, Model, Prior

#: Whether pixels are refined after the search: never, always, or wherever no noise was added.
REFINEMENTS = ("none", "pixels", "auto")


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
    refine: str = "none"
    refine_steps: int = 300
    compare: str = "published"
    distance: str | None = None
    regularizer: str | None = None
    fidelity: str = "paper"
    method: str = "auto"
    precision: str | None = None
    chunk_size: int | None = None
    instances: int | None = None


#: Fields that say nothing to an attack by itself.
_NOT_THE_ATTACKS = ("attack", "finalists", "final_steps", "refine", "refine_steps", "compare")


def make_stages(
    settings: AttackSettings,
    model: Model,
    prior: Prior,
    defense: Defense,
    *,
    batch_size: int = 1,
    local_steps: int = 1,
    local_learning_rate: float = 0.01,
) -> tuple[list[Stage], dict[str, Any]]:
    """The stages of a search, for :func:`ggl_jax.adversary.search.run_stages`.

    First the attack itself. Then, with ``settings.finalists`` = f > 0, the f best of its restarts
    go on by Adam for ``final_steps``. Then, with ``settings.refine`` "pixels" (or "auto", unless
    the defense adds noise, which pixels would fit), the best is refined in pixels.

    Args:
        settings: see there.
        model: the federated model.
        prior: the generator.
        defense: what the client did.
        batch_size: images per observed update.
        local_steps: SGD steps in the client's update.
        local_learning_rate: their step size.

    Returns:
        The stages, and the attack's settings as resolved.

    Raises:
        GGLError: for a setting out of its range.
    """
    if settings.refine not in REFINEMENTS:
        raise GGLError(f"refine: got {settings.refine!r}, allowed: {', '.join(REFINEMENTS)}")
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
    }
    resolved = resolve(settings.attack, **given)
    restarts = resolved.get("restarts", 1)
    if not 0 <= settings.finalists <= restarts:
        raise GGLError(
            f"finalists: got {settings.finalists}, allowed: 0 to the number of restarts, {restarts}"
        )
    attack = make_attack(settings.attack, model, prior, defense=defense, **given)
    stages = [Stage(attack, resolved["steps"])]
    if settings.finalists:
        by_adam = {
            "optimizer": "adam",
            "signed": False,
            "schedule": "ramp",
            "steps": settings.final_steps,
            "restarts": settings.finalists,
            "pool": 0,
        }
        last = make_attack(settings.attack, model, prior, defense=defense, **(given | by_adam))
        stages.append(Stage(last, settings.final_steps, _best_points(settings.finalists)))
    if settings.refine == "pixels" or (settings.refine == "auto" and "noise" not in defense.name):
        shared = ("distance", "likelihood", "fidelity", "method", "precision", "chunk_size")
        refinement = pixel_refinement(
            model,
            steps=settings.refine_steps,
            defense=defense if resolved["adaptive"] else None,
            batch_size=batch_size,
            local_steps=local_steps,
            local_learning_rate=local_learning_rate,
            **{name: resolved[name] for name in shared if name in resolved},
        )
        stages.append(Stage(refinement, settings.refine_steps, _best_pixels))
    return stages, resolved


def _best_points(num: int):
    return lambda candidates: candidates.points[:, :num]


def _best_pixels(candidates):
    return jax.vmap(pixels_of)(jnp.clip(candidates.images[:, :1], 0.0, 1.0))
