"""Attacks as data: how each was published, and how hard each preset searches.

An attack is a :class:`ggl_jax.spec.Search`: a new one is an entry of :data:`ATTACKS`. One that is
not a search of candidates is a function there, ``build(model, prior, search, *, view, client,
speed) -> Attack``.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ggl_jax import grammar
from ggl_jax.adversary.optimizers import OPTIMIZERS
from ggl_jax.errors import GGLError, did_you_mean
from ggl_jax.spec import Search, flat, replace
from ggl_jax.types import Attack, View

#: What the attacks on pixels share; the baselines' 4 trials are the paper's.
_PIXELS = Search(space="pixels", adaptive=False, start="normal", restarts=4, regularizer="none")


def _on_pixels(name: str, **options: Any) -> Search:
    return replace(_PIXELS, attack=name, **options)


#: Ours: what regression from a bank of gradients reads off the update, then the most probable image
#: around it: the update's likelihood (without noise, the cosine distance) beside a Gaussian prior
#: that has the regression's own error, in whitened pixels.
_MAP = Search(
    attack="map",
    space="whitened",
    bank=1000,
    distance="posterior",
    regularizer="none",
    optimizer="adam:0.3,schedule=cosine,signed=False",
    steps=60,
    refine="auto",
    refine_steps=150,
    support=True,
)


#: Attacks by name, as published for 32x32 images.
ATTACKS: dict[str, Search | Callable[..., Attack]] = {
    # Paper, section 3. Its code takes 50 samples in each of the paper's 800 updates of CMA-ES.
    "ggl": Search(),
    # Zhu, Liu and Han (2019), "Deep Leakage from Gradients". 300 iterations of torch's L-BFGS, of
    # up to 20 evaluations each; a step here is one evaluation.
    "dlg": _on_pixels("dlg", labels="searched", optimizer="lbfgs", steps=6000),
    # Zhao, Mopuri and Bilen (2020), "iDLG: Improved Deep Leakage from Gradients".
    "idlg": _on_pixels("idlg", optimizer="lbfgs", steps=6000),
    # Geiping et al. (2020), "Inverting Gradients: How easy is it to break privacy in federated
    # learning?". The published code's default weight of total variation, 0.1, is far too much for
    # 32x32 faces and this network; 0.01 is the best of those tried on public images that no prior
    # was trained on.
    "ig": _on_pixels(
        "ig",
        distance="cosine",
        regularizer="total_variation:0.01",
        optimizer="adam:box=1",
        steps=8000,
    ),
    # Yin et al. (2021), "See through Gradients: Image Batch Recovery via GradInversion"; without
    # BatchNorm statistics, as in the paper, whose clients do not share them.
    "gi": _on_pixels(
        "gi",
        # There is no published code; of the published weights, which belong to another loss, the
        # order is kept. Relative distances make them weigh as much under each defense.
        relative=True,
        regularizer="group:2+total_variation:1+l2:0.1",
        optimizer="adam:schedule=ramp,signed=False",
        steps=8000,
    ),
    "map": _MAP,
    # What regression alone reads: the search evaluates its start.
    "regression": replace(_MAP, attack="regression", steps=1, refine="none"),
}

#: The attack of a preset that is asked for none; ggl of the others.
STRONGEST = {"quick": "map", "standard": "map"}

#: What attack strongest runs, by preset; of what these find it keeps, in each cell, what explains
#: the update best.
MEMBERS = {
    "quick": ("map", "ggl", "ig"),
    "standard": ("map", "ggl", "ig"),
    "paper": ("ggl", "ig", "gi"),
    "code": ("ggl", "ig", "gi"),
}

#: GGL's budgets by another optimiser than its own: of Adam and TuRBO (100 rounds of 10) the
#: paper's; the others get the evaluations of Adam or CMA-ES.
_STEPS = {"adam": 2500, "turbo": 100, "lbfgs": 2500, "lbfgs_wolfe": 2500, "hybrid": 500}
#: What an optimiser takes from the search itself.
_OFFERED = ("steps",)

_BY_ADAM: dict[str, Any] = {
    **{"optimizer": "adam:schedule=ramp,signed=False", "relative": True},
    **{"regularizer": "kld:0.00125", "combine": "auto", "refine": "auto", "support": True},
}
#: What each preset changes, by attack and, for ggl by another optimiser than adam, by optimiser.
#: Its default search is the one of lowest loss on public images (docs/results.md). Preset paper
#: changes nothing, and code is the published code where that differs: 800 times 50 samples in
#: generations of 18, the mean over tensors but for Adam, which starts at N(0, 1); the sum over a
#: latent's entries is one term; labels by smallest sums.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "ggl": {**_BY_ADAM, "pool": 100, "restarts": 4, "steps": 40, "refine_steps": 60},
        "ggl/cma_es": {"steps": 16},
        "ggl/kalman": {"steps": 16},
        "ggl/turbo": {"steps": 60},
        "ggl/lbfgs": {"steps": 15, "restarts": 4},
        "ggl/hybrid": {"steps": 8},
        "dlg": {"steps": 60},
        "idlg": {"steps": 60},
        "ig": {"steps": 200},
        "gi": {"steps": 200},
        "map": {"bank": 300, "steps": 40, "refine_steps": 40},
        "regression": {"bank": 300},
    },
    "standard": {
        "ggl": {
            **_BY_ADAM,
            **{"pool": 200, "restarts": 8, "steps": 60, "finalists": 2, "final_steps": 60},
            "refine_steps": 120,
        },
        "ggl/cma_es": {"steps": 100},
        "ggl/kalman": {"steps": 40},
        "ggl/turbo": {"steps": 100},
        "ggl/lbfgs": {"steps": 60, "restarts": 8},
        "ggl/hybrid": {"steps": 40},
        "dlg": {"steps": 400},
        "idlg": {"steps": 400},
        "ig": {"steps": 1000},
        "gi": {"steps": 1000},
    },
    "paper": {},
    "code": {
        "ggl": {
            **{"optimizer": "cma_es:18", "steps": 2222, "distance": "mean_squared_l2"},
            **{"regularizer": "kld_mean:0.1", "labels": "smallest"},
        },
        "ggl/adam": {"start": "normal", "regularizer": "kld_mean:0.1", "labels": "smallest"},
        "ggl/turbo": {
            **{"distance": "mean_squared_l2", "regularizer": "none", "labels": "smallest"}
        },
        "idlg": {"labels": "smallest"},
        "ig": {"labels": "smallest"},
        "gi": {"labels": "smallest"},
    },
}


def search_of(
    preset: str = "paper",
    attack: str | None = None,
    optimizer: str | None = None,
    **changes: Any,
) -> Search:
    """An attack's search as a preset has it, for an optimiser.

    Args:
        preset: quick, standard, paper (as published), or code (as the published code has it).
        attack: a key of :data:`ATTACKS`, or strongest (:func:`members`), which has no options;
            None for the preset's own (map of quick and standard, else ggl) or, beside an
            optimiser, for ggl.
        optimizer: a name with options, see :mod:`ggl_jax.grammar`; options that it does not name
            are the preset's, where that has the same optimiser. None for the preset's own.
        **changes: further options, see :class:`ggl_jax.spec.Search`.

    Raises:
        GGLError: an unknown preset, attack, optimiser or option, or a value out of its range.

    >>> search_of("quick", "ig").steps
    200
    >>> search_of("quick").attack
    'map'
    >>> search_of("quick", optimizer="adam:0.05").optimizer
    'adam:0.05,schedule=ramp,signed=False'
    """
    if attack is None:
        attack = "ggl" if optimizer is not None else STRONGEST.get(preset, "ggl")
    if attack.partition(":")[0] == "strongest":
        found = Search(attack=attack if ":" in attack else f"{attack}:{preset}")
        members(found)  # for its errors
        _no_options([*([] if optimizer is None else ["optimizer"]), *changes], preset)
        return found
    choices = (
        ("preset", preset, list(PRESETS)),
        ("attack", attack, [*ATTACKS, "strongest"]),
    )
    for what, one, allowed in choices:
        if one not in allowed:
            hint = did_you_mean(one, allowed, before="; ")
            raise GGLError(f"{what}: got {one!r}, allowed: {', '.join(allowed)}{hint}")
    published = ATTACKS[attack]
    search = published if isinstance(published, Search) else Search(attack=attack)
    own, _ = _read(search.optimizer)
    name: str | None = None
    given: dict[str, Any] = {}
    if optimizer is not None:
        name, given = _read(optimizer)
    presets = PRESETS[preset]
    if name not in (None, own):
        steps = _STEPS.get(name, search.steps) if attack == "ggl" else search.steps
        search = replace(search, optimizer=name, steps=steps)
    # The preset's own search stands under the attack's name, whichever optimiser that has.
    preferred = presets.get(attack, {})
    usual, _ = _read(preferred.get("optimizer", own))
    chosen = preferred if name in (None, usual) else presets.get(f"{attack}/{name}", {})
    search = replace(search, **chosen)
    if name is not None:
        known, options = _read(search.optimizer)
        merged = {**options, **given} if known == name else given
        search = replace(
            search, optimizer=grammar.write(OPTIMIZERS, name, merged, offered=_OFFERED)
        )
    return replace(search, **changes)


def _read(optimizer: str) -> tuple[str, dict[str, Any]]:
    return grammar.read(OPTIMIZERS, optimizer, what="optimizer", offered=_OFFERED)


def members(search: Search, view: View | None = None) -> list[Search]:
    """The searches that attack strongest runs, of :data:`MEMBERS`; none of any other attack.

    Under noise, which free pixels would fit, strongest runs those on pixels only if it has no
    others.

    Args:
        search: "strongest:PRESET" as attack, or any other.
        view: of the defense; None for one without noise.

    Raises:
        GGLError: strongest of no preset, or with options of its own.

    >>> [one.attack for one in members(search_of("quick", "strongest"))]
    ['map', 'ggl', 'ig']
    """
    name, _, preset = search.attack.partition(":")
    if name != "strongest":
        return []
    if preset not in MEMBERS:
        allowed = ", ".join(f"strongest:{one}" for one in MEMBERS)
        raise GGLError(f"attack: got {search.attack!r}, allowed: {allowed}")
    usual = flat(Search(attack=search.attack))
    changed = [option for option, value in flat(search).items() if value != usual[option]]
    _no_options(changed, preset)
    found = [search_of(preset, one) for one in MEMBERS[preset]]
    noisy = view is not None and view.adds_noise
    return [one for one in found if not (noisy and one.space == "pixels")] or found


def _no_options(given: Sequence[str], preset: str) -> None:
    if given:
        raise GGLError(
            f"{given[0]}: attack strongest has no options, and its attacks those of preset "
            f"{preset}; leave it out, or choose one attack"
        )
