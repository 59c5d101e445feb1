"""Reconstruction attacks, all of one type, with the settings they were published with.

A new attack is one file with a function that returns an :class:`ggl_jax.types.Attack` (usually
through :func:`search_attack`) and one line in :data:`ATTACKS`.
"""

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
from ggl_jax.adversary.optimizers import make_optimizer, optimizer_options
from ggl_jax.errors import GGLError, did_you_mean
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
        steps: of its search, by the optimiser's name; the first is the attack's own optimiser. One
            that is not named takes as many steps as that.
        optimizer_settings: options of its own optimiser.
        settings: those of the attack, whatever the optimiser.
    """

    build: Callable[..., Attack]
    adaptive: bool
    steps: Mapping[str, int]
    optimizer_settings: Mapping[str, Any] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})


def _published(build, adaptive, steps, optimizer_settings=None, **settings):
    proxies = (MappingProxyType(m) for m in (steps, optimizer_settings or {}, settings))
    return Published(build, adaptive, *proxies)


#: Attacks by name. The baselines' 4 trials are the paper's. Its 300 iterations of L-BFGS are
#: torch's, of 20 evaluations each; a step here is one evaluation.
#: GGL's budgets for CMA-ES, Adam and TuRBO (100 rounds of 10) are the paper's; those that it has
#: not, L-BFGS and the hybrid, get the evaluations of Adam and of CMA-ES.
ATTACKS: dict[str, Published] = {
    "ggl": _published(
        ggl,
        True,
        {
            "cma_es": 800,
            "adam": 2500,
            "turbo": 100,
            "lbfgs": 2500,
            "lbfgs_wolfe": 2500,
            "hybrid": 500,
        },
        {"population": 50},
    ),
    "dlg": _published(dlg, False, {"lbfgs": 6000}, restarts=4),
    "idlg": _published(idlg, False, {"lbfgs": 6000}, restarts=4),
    "ig": _published(
        inverting_gradients,
        False,
        {"adam": 8000},
        {"signed": True, "box": 1.0},
        restarts=4,
    ),
    "gi": _published(
        grad_inversion,
        False,
        {"adam": 8000},
        {"signed": False, "schedule": "ramp"},
        restarts=4,
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
        hint = did_you_mean(name, ATTACKS, before="; ")
        raise GGLError(f"attack: got {name!r}, allowed: {', '.join(ATTACKS)}{hint}")
    published = ATTACKS[name]
    given = {k: v for k, v in settings.items() if v is not None}
    own = next(iter(published.steps))
    optimizer = given.get("optimizer", own)
    base = {
        "optimizer": optimizer,
        "steps": published.steps.get(optimizer, published.steps[own]),
        "adaptive": published.adaptive,
        **published.settings,
    }
    distance = inspect.signature(published.build).parameters.get("distance")
    if distance is not None:  # a later refinement has to know it
        base["distance"] = distance.default
    if optimizer == own:  # the options of its own search say nothing about another
        base |= published.optimizer_settings
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
            :func:`search_attack`. None means "as published". Those of an optimiser other than the
            chosen one are left out; :func:`ggl_jax.adversary.strategy.unused_options` tells which.

    Raises:
        GGLError: for an unknown name or option, or an option out of its range.
    """
    resolved = resolve(name, **settings)
    optimizer, adaptive = resolved.pop("optimizer"), resolved.pop("adaptive")
    build = ATTACKS[name].build
    takes = {*inspect.signature(search_attack).parameters, *inspect.signature(build).parameters}
    takes -= {"name", "model", "prior", "optimizer", "defense", "options"}
    searches_take = optimizer_options()
    for option in resolved:
        if option not in takes and option not in searches_take:
            hint = did_you_mean(option, takes | searches_take.keys(), before="; ")
            raise GGLError(f"{option}: neither {name} nor an optimizer has such an option{hint}")
    search = make_optimizer(optimizer, **{k: v for k, v in resolved.items() if k in searches_take})
    options = {k: v for k, v in resolved.items() if k in takes}
    return build(model, prior, search, defense=defense if adaptive else None, **options)
