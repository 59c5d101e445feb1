"""Reconstruction attacks, all of one type, with the settings they were published with.

A new attack is one file with a function that returns an :class:`ggl_jax.types.Attack` (usually
through :func:`search_attack`) and one line in :data:`ATTACKS`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ggl_jax.adversary.attacks.dlg import dlg, idlg
from ggl_jax.adversary.attacks.ggl import ggl
from ggl_jax.adversary.attacks.grad_inversion import grad_inversion
from ggl_jax.adversary.attacks.inverting_gradients import inverting_gradients
from ggl_jax.adversary.attacks.refinement import pixel_refinement
from ggl_jax.adversary.attacks.search_attack import BOUNDS, STARTS, search_attack
from ggl_jax.adversary.optimizers import make_optimizer
from ggl_jax.errors import GGLError
from ggl_jax.types import Attack, Defense, Model, Prior

__all__ = [
    "ATTACKS",
    "BOUNDS",
    "STARTS",
    "Published",
    "dlg",
    "ggl",
    "grad_inversion",
    "idlg",
    "inverting_gradients",
    "make_attack",
    "pixel_refinement",
    "resolve",
    "search_attack",
]


class Published(NamedTuple):
    """An attack as it was published, for 32x32 images.

    Attributes:
        build: ``build(model, prior, optimizer, **options) -> Attack``.
        adaptive: whether candidates' gradients go through the estimated defense.
        steps: of its search.
        settings: the optimiser's name ("optimizer"), its options, and those of the attack that the
            function itself does not default to.
    """

    build: Callable[..., Attack]
    adaptive: bool
    steps: int
    settings: Mapping[str, Any]


def _published(build, adaptive, steps, **settings):
    return Published(build, adaptive, steps, MappingProxyType(settings))


#: Attacks by name. The baselines' 4 trials are the paper's. Its 300 iterations of L-BFGS are
#: torch's, of up to 20 evaluations; a step here is one evaluation, and a converged search stops.
ATTACKS: dict[str, Published] = {
    "ggl": _published(ggl, True, 800, optimizer="cma_es", population=50),
    "dlg": _published(dlg, False, 6000, optimizer="lbfgs", restarts=4),
    "idlg": _published(idlg, False, 6000, optimizer="lbfgs", restarts=4),
    "ig": _published(
        inverting_gradients, False, 8000, optimizer="adam", signed=True, box=1.0, restarts=4
    ),
    "gi": _published(
        grad_inversion, False, 8000, optimizer="adam", signed=False, schedule="ramp", restarts=4
    ),
}


def resolve(name: str, **settings) -> dict[str, Any]:
    """An attack's published settings, with those of ``settings`` that are not None over them.

    Args:
        name: a key of :data:`ATTACKS`.
        **settings: of the attack and of its optimiser.

    Raises:
        GGLError: for an unknown name.
    """
    if name not in ATTACKS:
        near = difflib.get_close_matches(name, ATTACKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise GGLError(f"attack: got {name!r}, allowed: {', '.join(ATTACKS)}{hint}")
    published = ATTACKS[name]
    base = {"steps": published.steps, "adaptive": published.adaptive, **published.settings}
    given = {k: v for k, v in settings.items() if v is not None}
    if given.get("optimizer", base["optimizer"]) != base["optimizer"]:
        # Another search: the published one's options say nothing about it.
        base = {k: v for k, v in base.items() if k in ("steps", "adaptive", "restarts")}
    return {**base, **given}


def make_attack(
    name: str, model: Model, prior: Prior, *, defense: Defense | None = None, **settings
) -> Attack:
    """Build an attack by name: as published, unless settings say otherwise.

    Args:
        name: a key of :data:`ATTACKS`.
        model: the federated model.
        prior: the generator; attacks on pixels do without it.
        defense: what the client did; used only where the attack is adaptive.
        **settings: ``optimizer`` and its options, ``steps``, ``adaptive``, and the options of
            :func:`search_attack`. None means "as published".

    Raises:
        GGLError: for an unknown name, or an optimiser's or attack's option out of its range.
    """
    resolved = resolve(name, **settings)
    optimizer = make_optimizer(resolved.pop("optimizer"), **resolved)
    known = inspect.signature(search_attack).parameters
    options = {k: v for k, v in resolved.items() if k in known}
    return ATTACKS[name].build(
        model, prior, optimizer, defense=defense if resolved["adaptive"] else None, **options
    )
