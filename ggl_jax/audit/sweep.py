"""Lays out whole grids: attacks x settings x defenses x images x seeds, as cells of one run."""

import dataclasses
import fnmatch
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ggl_jax.adversary.attacks import search_of
from ggl_jax.audit.cells import Cell, Cells, Inputs, image_batches
from ggl_jax.audit.run import Grid, Progress, RunResult, config_of, run
from ggl_jax.client.defenses.transformations import as_defense
from ggl_jax.client.models import get_model
from ggl_jax.client.updates import variables_of
from ggl_jax.errors import GGLError, check_once, did_you_mean
from ggl_jax.spec import Client, Search, Seed, check, combinations, options_of, replace
from ggl_jax.types import Defense, Model

#: Options of the search and of the client, by what they allow.
OPTIONS = options_of(Search) | options_of(Client)
#: What an axis can be, by what it allows.
AXES: dict[str, Any] = {
    **{"defense": str | Defense, "seed": Seed, "model": str, "weights": str},
    **OPTIONS,
}


def expand(spec: str) -> list[str]:
    """Write out the braces of a specification: ``"noise:{0.01,0.1}"`` are two defenses.

    Several braces give every combination.
    """
    found = re.search(r"\{([^{}]*)\}", spec)
    if found is None:
        return [spec]
    before, after = spec[: found.start()], spec[found.end() :]
    return [
        whole
        for value in found.group(1).split(",")
        for whole in expand(before + value.strip() + after)
    ]


def _shown(value: Any) -> Any:
    return value.name if isinstance(value, Defense) else value


def check_axes(axes: Mapping[str, Sequence]) -> dict[str, list]:
    """The axes, with plain values and braces written out.

    Raises:
        GGLError: an unknown axis, or a value that its option does not allow or that is there twice.
    """
    found: dict[str, list] = {}
    for name, values in axes.items():
        if name not in AXES:
            hint = did_you_mean(name, [*AXES, "image"], after=" ")
            raise GGLError(f"axes: {name!r} is no axis; {hint}allowed: {', '.join(AXES)}")
        if not isinstance(values, list | tuple | range | np.ndarray) or not len(values):
            raise GGLError(f"axes: {name} is {values!r}, allowed: a list of at least one value")
        plain = [
            check(f"axes: {name}", one, AXES[name])
            for value in values
            for one in (expand(value) if isinstance(value, str) else [as_defense(value)])
        ]
        # As text: else 1 and True would be the same.
        check_once(f"axes: {name}", [json.dumps(_shown(value)) for value in plain])
        found[name] = plain
    return found


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        return any(_matches(value, one) for one in wanted)
    if isinstance(value, str) and isinstance(wanted, str):
        return fnmatch.fnmatchcase(value, wanted)
    if isinstance(value, tuple):
        return any(_matches(one, wanted) for one in value)
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _check_exclusions(entries: Sequence[Mapping[str, Any]]) -> None:
    for number, entry in enumerate(entries):
        unknown = [name for name in entry if name not in (*AXES, "image")]
        if unknown or not entry:
            raise GGLError(
                f"exclude: entry {number + 1} names {unknown or 'nothing'}; allowed: image, "
                f"{', '.join(AXES)}"
            )


def _makers(inputs: Inputs) -> Callable[[str | None, str | None], Cells]:
    """``maker(model, weights)``: what makes the cells of each by name; None for the inputs' own."""
    shape, classes = inputs.model.image_shape, inputs.model.num_classes
    made = functools.cache(get_model)

    @functools.cache
    def maker(model: str | None, weights: str | None) -> Cells:
        if (model, weights) == (None, None):
            return Cells(inputs)
        own = inputs.model if model is None else made(model, classes, shape)
        variables = inputs.variables
        if weights is not None:
            variables = None if weights == "random" else variables_of(weights, own)
        return Cells(dataclasses.replace(inputs, model=own, variables=variables))

    return maker


def plan(
    inputs: Inputs,
    axes: Mapping[str, Sequence],
    *,
    exclude: Sequence[Mapping[str, Any]] = (),
    search: Search | str = "paper",
    fixed: Mapping[str, Any] | None = None,
    client: Client | None = None,
) -> Grid:
    """Lay out a grid: every combination of the axes' values, for every batch of images.

    Args:
        inputs: what all cells share.
        axes: name -> list of values. "defense" (specifications, in which braces list values, or
            :class:`Defense` objects; default "none"), "seed" (default 0), "model" (a built-in one
            with its options) and "weights" ("random", a file or a checkpoint folder; see
            :class:`ggl_jax.spec.Setup`) in place of the inputs' own, and any option of
            :class:`ggl_jax.spec.Search` and :class:`ggl_jax.spec.Client`. Braces in text list
            values: ``"adam:{0.05,0.1}"``.
        exclude: combinations to leave out: name -> value, list of values, or pattern with ``*``.
            A cell that matches every entry of one of them is left out. Names are those of the axes
            and "image" (a name or instance number).
        search: how to search where no axis says otherwise: a preset, which has a search for each
            attack and optimiser (:func:`ggl_jax.search_of`), or one for all, with which "attack"
            is no axis.
        fixed: options of the search that are the same in every cell.
        client: the client where no axis says otherwise.

    Returns:
        A :class:`Grid`, for :func:`ggl_jax.audit.run.run`.

    Raises:
        GGLError: an unknown axis, setting, attack or defense; a value that an axis has twice; an
            exclusion that matches nothing; no cell left; images that do not split into batches.
    """
    axes = check_axes(axes)
    if isinstance(search, Search) and "attack" in axes:
        raise GGLError(
            "axes: attack is no axis of one given search; give a preset's name, such as "
            "search='quick', which has a search for each attack"
        )
    _check_exclusions(exclude)
    client, maker, used = client or Client(), _makers(inputs), set[int]()
    searching, sharing = options_of(Search), options_of(Client)
    cells: dict[str, Cell] = {}
    # The seed varies fastest, so that cells of one program are together.
    order = {name: values for name, values in axes.items() if name not in ("defense", "seed")}
    order |= {"defense": axes.get("defense", ["none"]), "seed": axes.get("seed", [0])}
    for values in combinations(order):
        given = {**(fixed or {}), **{k: v for k, v in values.items() if k in searching}}
        own = search_of(search, **given) if isinstance(search, str) else replace(search, **given)
        shared = replace(client, **{k: v for k, v in values.items() if k in sharing})
        defense = maker(None, None).defense(values["defense"])
        world = values.get("model"), values.get("weights")
        whole = dataclasses.asdict(own) | dataclasses.asdict(shared)
        whole |= {"model": None, "weights": None, **values, "defense": defense.name}
        shown = {name: value for name, value in values.items() if name not in ("defense", "seed")}
        for batch in image_batches(len(inputs.images), shared.batch_size):
            names, ids = ([x[i] for i in batch] for x in (inputs.names, inputs.instance_ids))
            whole["image"] = (*names, *ids)
            matched = {
                number
                for number, entry in enumerate(exclude)
                if all(_matches(whole[name], wanted) for name, wanted in entry.items())
            }
            used |= matched
            if not matched:
                world_maker = maker(*world)
                defense = world_maker.defense(values["defense"])
                cell = world_maker.make(shown, own, shared, defense, values["seed"], batch)
                cells.setdefault(cell.id, cell)
    for number, entry in enumerate(exclude):
        if number not in used:
            raise GGLError(f"exclude: entry {number + 1} ({dict(entry)}) matches no cell")
    if not cells:
        raise GGLError("exclude: no cell is left; exclude less")
    made = list(cells.values())
    options = {
        "axes": {name: [_shown(value) for value in values] for name, values in axes.items()},
        "exclude": [dict(entry) for entry in exclude],
        "client": dataclasses.asdict(client),
        "search": search if isinstance(search, str) else dataclasses.asdict(search),
        "fixed": dict(fixed or {}),
    }
    return Grid(made, inputs, config_of(made, inputs, options))


def sweep(
    images,
    labels,
    *,
    model: Model,
    axes: Mapping[str, Sequence],
    out: str | Path,
    extend: bool = False,
    retry_failed: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> RunResult:
    """Audit every combination of the axes' values on every image; resumable.

    Args:
        images: [n h w c], float in [0, 1].
        labels: [n] integer classes.
        model: the federated model.
        axes: name -> list of values, see :func:`plan`.
        out: folder for the results; the same call goes on where one that was killed there ended.
        extend: see :func:`ggl_jax.audit.run.run`, like ``retry_failed`` and ``progress``.
        **options: of :func:`plan` (``search``, ``fixed``, ``client``, ``exclude``), and further
            arguments of :class:`ggl_jax.audit.cells.Inputs`.

    Returns:
        A :class:`ggl_jax.audit.run.RunResult`. :func:`ggl_jax.audit.report.make` makes its
        report.

    Raises:
        GGLError: as :func:`plan` and :func:`ggl_jax.audit.run.run`.
    """
    own = {k: options.pop(k) for k in ("search", "fixed", "client", "exclude") if k in options}
    grid = plan(Inputs(images, labels, model, **options), axes, **own)
    return run(grid, out, extend=extend, retry_failed=retry_failed, progress=progress)
