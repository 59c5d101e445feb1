"""Audits a whole grid: attacks x settings x defenses x images x seeds, resumably.

Every cell is what :func:`ggl_jax.audit` would have computed for it: its random streams depend on
the seed and the image alone, so batching, order, resuming and sharding do not change a result
(but for float32 rounding in programs of different batch sizes).
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ggl_jax import files
from ggl_jax.adversary.attacks import resolve
from ggl_jax.adversary.strategy import AttackSettings
from ggl_jax.audit import results
from ggl_jax.audit.controls import Controls, read_controls, write_controls
from ggl_jax.audit.runner import (
    ClientSettings,
    Progress,
    audit,
    build_programs,
    check_batches,
    default_instances,
)
from ggl_jax.client import defenses as client_defenses
from ggl_jax.errors import GGLError, did_you_mean
from ggl_jax.priors import load_prior
from ggl_jax.types import Defense, Model, Prior, PyTree

#: Settings that change how fast a result comes, but not what it is.
_SPEED = ("instances", "chunk_size")
_SETTINGS = {field.name: field.default for field in dataclasses.fields(AttackSettings)}
_CLIENT = {field.name: field.default for field in dataclasses.fields(ClientSettings)}
#: What an axis can be.
AXES = (
    "defense",
    "seed",
    *(name for name in _SETTINGS if name not in _SPEED),
    *_CLIENT,
)
#: In an axis: the setting as the attack was published (TOML has no null).
PUBLISHED = "published"

#: What a search starts from: settings, or a function of a cell's values on the axes.
Base = AttackSettings | Callable[[Mapping[str, Any]], AttackSettings]


class SweepCell(NamedTuple):
    """One unit of work: an update of one batch of images, attacked in one way.

    Attributes:
        id: 16 hexadecimal digits, of everything that determines the result.
        axes: its values on the grid's axes, and its images' names.
        settings: the search.
        client: the client.
        defense: the client's defense.
        seed: of everything random.
        images: positions of the batch's images.
        evaluations: gradient evaluations of the search; 0 where it cannot be built.
    """

    id: str
    axes: dict[str, Any]
    settings: AttackSettings
    client: ClientSettings
    defense: Defense
    seed: int
    images: tuple[int, ...]
    evaluations: int

    @property
    def program(self) -> tuple:
        """Cells of the same program and seed can run in one batch."""
        return (self.settings, self.client, self.defense)


class SweepResult(NamedTuple):
    """What a sweep returns.

    Attributes:
        records: everything in the folder, see :class:`ggl_jax.audit.results.Records`.
        interrupted: Ctrl-C ended it; what is finished is kept.
    """

    records: results.Records
    interrupted: bool

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each image of each finished cell."""
        return self.records.rows

    @property
    def failures(self) -> dict[str, str]:
        """Failed cell -> reason."""
        return self.records.failures


class Grid(NamedTuple):
    """A sweep made ready: its cells, and all that they share. Made by :func:`plan`."""

    cells: list[SweepCell]
    images: np.ndarray
    labels: np.ndarray
    names: list[str]
    ids: list[int]
    model: Model
    prior: Prior
    prior_params: PyTree
    variables: PyTree | None
    others: np.ndarray | None
    num_controls: int
    ceiling_steps: int
    lpips: str
    options: dict[str, Any]
    inputs: dict[str, str]


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


def _digest(*parts: Any) -> str:
    """sha256 of JSON-able values and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
        elif isinstance(part, np.ndarray | jax.Array):
            array = np.asarray(part)
            digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _tree_digest(tree: PyTree) -> str:
    return _digest(*jax.tree.leaves(tree))


def _check_axes(axes: Mapping[str, Sequence]) -> None:
    for name, values in axes.items():
        if name not in AXES:
            hint = did_you_mean(name, AXES, after=" ")
            raise GGLError(f"axes: {name!r} is no axis; {hint}allowed: {', '.join(AXES)}")
        if not isinstance(values, list) or not values:
            raise GGLError(f"axes: {name} is {values!r}, allowed: a list of at least one value")
    for name, values in axes.items():
        shown = [v.name if isinstance(v, Defense) else json.dumps(v) for v in values]
        twice = sorted({v for v in shown if shown.count(v) > 1})
        if twice:
            raise GGLError(f"axes: {name} names {twice[0]} twice; name each value once")


def _excluded(cell: Mapping[str, Any], exclusion: Mapping[str, Any]) -> bool:
    def matches(value, wanted):
        if isinstance(wanted, list | tuple):
            return any(matches(value, one) for one in wanted)
        if isinstance(value, str) and isinstance(wanted, str):
            return fnmatch.fnmatchcase(value, wanted)
        if isinstance(value, tuple):
            return any(matches(one, wanted) for one in value)
        return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)

    return all(matches(cell[name], wanted) for name, wanted in exclusion.items())


def plan(
    images,
    labels,
    *,
    model: Model,
    axes: Mapping[str, Sequence],
    exclude: Sequence[Mapping[str, Any]] = (),
    settings: Base | None = None,
    client: ClientSettings | None = None,
    prior: Prior | str = "dcgan32_faces",
    prior_params: PyTree = None,
    variables: PyTree | None = None,
    names: Sequence[str] | None = None,
    instance_ids: Sequence[int] | None = None,
    others: np.ndarray | None = None,
    num_controls: int = 400,
    ceiling_steps: int = 300,
    lpips: str = "vgg",
    options: Mapping[str, Any] | None = None,
) -> Grid:
    """Lay out a grid: every combination of the axes' values, for every batch of images.

    Args:
        images: [n h w c] private images, float in [0, 1].
        labels: [n] integer classes.
        model: the federated model.
        axes: name -> list of values. "defense" (specifications, in which braces list values, or
            :class:`Defense` objects; default "none"), "seed" (default 0), and any field of
            :class:`AttackSettings` and :class:`ClientSettings` that affects results.
            ``"published"`` stands for None.
        exclude: combinations to leave out: name -> value, list of values, or pattern with ``*``.
            A cell that matches every entry of one of them is left out. Names are those of the axes
            and "image" (a name or instance number).
        settings: the search where no axis says otherwise; a function of the axes' values gives each
            attack its own.
        client: the client where no axis says otherwise.
        prior: as for :func:`ggl_jax.audit`, like ``prior_params``, ``variables``, ``names``,
            ``instance_ids``, ``others``, ``num_controls``, ``ceiling_steps`` and ``lpips``.
        options: what a folder's ``config.json`` shall say was asked for; by default these
            arguments. Cells are told apart by what they compute, whatever it says.

    Returns:
        A :class:`Grid`, for :func:`run` and :func:`estimate`.

    Raises:
        GGLError: an unknown axis, setting, attack or defense; a value that an axis has twice; an
            exclusion that matches nothing; no cell left; images that do not split into batches.
    """
    axes = {
        name: [v.item() if isinstance(v, np.generic) else v for v in values]
        if isinstance(values, list | tuple | range | np.ndarray)
        else values
        for name, values in axes.items()
    }
    _check_axes(axes)
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    names = [f"image-{i}" for i in range(len(images))] if names is None else list(names)
    ids = list(range(len(images))) if instance_ids is None else [int(i) for i in instance_ids]
    if not len(images) == len(labels) == len(names) == len(ids):
        raise GGLError(
            f"images, labels, names, instance_ids: got {len(images)}, {len(labels)}, {len(names)}, "
            f"{len(ids)} of them; give one of each for each image"
        )
    card: Mapping[str, Any] = {}
    if isinstance(prior, str):
        prior, prior_params, card = load_prior(prior)
    client = client or ClientSettings()
    inputs = {
        "images": _digest(images, labels),
        "prior": card.get("sha256") or _tree_digest(prior_params),
        "variables": "" if variables is None else _tree_digest(variables),
    }
    # Not the suspects: with more private images there are others, and a row says how many.
    common = {
        "model": [model.name, list(model.image_shape), model.num_classes],
        "prior": [prior.name, inputs["prior"]],
        "variables": inputs["variables"],
        "num_controls": num_controls,
        "ceiling_steps": ceiling_steps,
        "lpips": lpips,
    }
    per_image = [
        _digest(image, int(label), number)
        for image, label, number in zip(images, labels, ids, strict=True)
    ]
    parsed: dict[tuple[str, str, str], Defense] = {}
    steps: dict[tuple, int] = {}
    used = [False] * len(exclude)
    cells: dict[str, SweepCell] = {}
    for values in _combinations(axes):
        base = settings(values) if callable(settings) else settings or AttackSettings()
        chosen: dict[str, Any] = {
            name: None if value == PUBLISHED and _SETTINGS.get(name, "") is None else value
            for name, value in values.items()
        }
        own = dataclasses.replace(base, **{k: v for k, v in chosen.items() if k in _SETTINGS})
        sharing = dataclasses.replace(client, **{k: v for k, v in chosen.items() if k in _CLIENT})
        resolved = resolve(
            own.attack, **{k: v for k, v in dataclasses.asdict(own).items() if k != "attack"}
        )
        defense = values["defense"]
        if isinstance(defense, str):
            spec = (defense, own.fidelity, own.compare)
            if spec not in parsed:
                parsed[spec] = client_defenses.parse(
                    defense, fidelity=own.fidelity, compare=own.compare
                )
            defense = parsed[spec]
        program = (own, sharing, defense)
        if program not in steps:
            steps[program] = _evaluations(own, sharing, model, prior, defense)
        whole = dataclasses.asdict(own) | resolved | dataclasses.asdict(sharing)
        whole |= {"defense": defense.name, "seed": values["seed"]}
        check_batches(len(images), sharing.batch_size)
        differing = {
            "settings": _differing(own, _SETTINGS),
            "client": _differing(sharing, _CLIENT),
        }
        for first in range(0, len(images), sharing.batch_size):
            batch = tuple(range(first, first + sharing.batch_size))
            whole["image"] = tuple(names[i] for i in batch) + tuple(ids[i] for i in batch)
            for number, exclusion in enumerate(exclude):
                unknown = [name for name in exclusion if name not in whole]
                if unknown or not exclusion:
                    raise GGLError(
                        f"exclude: entry {number + 1} names {unknown or 'nothing'}; allowed: "
                        f"image, {', '.join(AXES)}"
                    )
            matched = [_excluded(whole, exclusion) for exclusion in exclude]
            used = [a or b for a, b in zip(used, matched, strict=True)]
            if any(matched):
                continue
            identity = _digest(
                common,
                differing,
                defense.name,
                values["seed"],
                [per_image[i] for i in batch],
            )[:16]
            # The canonical name, as in the rows, however it was spelled.
            shown = values | {"defense": defense.name}
            shown["image"] = ", ".join(names[i] for i in batch)
            cells.setdefault(
                identity,
                SweepCell(
                    identity, shown, own, sharing, defense, values["seed"], batch, steps[program]
                ),
            )
    for number, was_used in enumerate(used):
        if not was_used:
            raise GGLError(f"exclude: entry {number + 1} ({dict(exclude[number])}) matches no cell")
    if not cells:
        raise GGLError("exclude: no cell is left; exclude less")
    shown_axes = {
        name: [v.name if isinstance(v, Defense) else v for v in values]
        for name, values in axes.items()
    }
    default_options = {
        "axes": shown_axes,
        "exclude": [dict(e) for e in exclude],
        "client": dataclasses.asdict(client),
        "settings": None if callable(settings) else _differing(settings, _SETTINGS),
        **{k: v for k, v in common.items() if k in ("num_controls", "ceiling_steps", "lpips")},
        "model": model.name,
        "prior": prior.name,
    }
    return Grid(
        cells=list(cells.values()),
        images=images,
        labels=labels,
        names=names,
        ids=ids,
        model=model,
        prior=prior,
        prior_params=prior_params,
        variables=variables,
        others=others,
        num_controls=num_controls,
        ceiling_steps=ceiling_steps,
        lpips=lpips,
        options=dict(options) if options is not None else default_options,
        inputs=inputs,
    )


def _combinations(axes: Mapping[str, Sequence]) -> Iterator[dict[str, Any]]:
    """Every combination; the seed varies fastest, so that cells of one program are together."""
    defenses: list[Any] = []
    for value in axes.get("defense", ["none"]):
        if not isinstance(value, str | Defense):
            raise GGLError(f"axes: defense names {value!r}, allowed: a specification in quotes")
        defenses.extend(expand(value) if isinstance(value, str) else [value])
    seeds = axes.get("seed", [0])
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise GGLError(f"axes: seed names {seed!r}, allowed: whole numbers of at least 0")
    rest = {name: values for name, values in axes.items() if name not in ("defense", "seed")}
    for combination in itertools.product(*rest.values(), defenses, seeds):
        yield dict(zip([*rest, "defense", "seed"], combination, strict=True))


def _differing(given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ from their defaults, so that a new field changes no cell's name."""
    if given is None:
        return {}
    return {
        name: getattr(given, name)
        for name, default in defaults.items()
        if name not in _SPEED and getattr(given, name) != default
    }


def _evaluations(settings, client, model, prior, defense) -> int:
    """Of a search; 0 for one that cannot be built: its cells will fail and say why."""
    try:
        stages = build_programs(model, prior, defense, client, settings).stages
    except GGLError:
        return 0
    return sum(
        s.attack.evaluations_at_start + s.steps * s.attack.evaluations_per_step for s in stages
    )


def _prepare(
    folder: Path, grid: Grid, extend: bool, about: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Check or write ``config.json`` and ``plan.json``; the plan's cells."""
    options = json.loads(json.dumps(grid.options))
    config = {**about, "options": options, "inputs": grid.inputs}
    cells: dict[str, dict[str, Any]] = {
        cell.id: {**cell.axes, "evaluations": cell.evaluations} for cell in grid.cells
    }
    path, plan_path = folder / "config.json", folder / "plan.json"
    if path.exists():
        old = results.read_json(path, f"out: {folder} holds something else; choose another --out")
        changed = results.differences(
            {"": old.get("options", {}), "inputs": old.get("inputs", {})},
            {"": options, "inputs": grid.inputs},
        )
        changed = [line.removeprefix(".") for line in changed]
        same_cells = True
        before: dict[str, Any] = {}
        if plan_path.exists():
            before = results.read_json(plan_path, f"out: {folder} is damaged")["cells"]
            same_cells = set(cells) <= set(before)
        elif any(folder.glob("results*.jsonl")):
            raise GGLError(f"out: {folder} holds an audit, not a sweep; choose another --out")
        if not changed and not same_cells:
            changed = ["the meaning of these options (another version, preset or defense object)"]
        if changed and not extend:
            raise GGLError(
                f"out: {folder} holds a sweep with another configuration: {'; '.join(changed)}; "
                "give --extend to go on with this one and keep what is finished, or choose "
                "another --out"
            )
        if not changed:
            config, cells = old, before or cells
        else:
            finished = results.read(folder).finished
            cells = {c: v for c, v in before.items() if c in finished and c not in cells} | cells
            past = [*old.get("history", []), {k: v for k, v in old.items() if k != "history"}]
            config["history"] = past
    for name in ("reconstructions", "controls"):
        (folder / name).mkdir(exist_ok=True)
    files.write_json(plan_path, {"cells": cells})
    files.write_json(path, config)
    return cells


def _open_folder(out: str | Path, process: int) -> tuple[Path, results.Lock]:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise GGLError(f"out: {folder} is a file; choose another --out")
    if folder.is_dir() and not (folder / "config.json").exists():
        ours = ("lock-", "config.json", "plan.json", "reconstructions", "controls", "results-")
        if any(not path.name.startswith(ours) for path in folder.iterdir()):
            raise GGLError(
                f"out: {folder} is not an empty folder and not an earlier sweep; choose another "
                "--out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder, results.Lock(folder, process)


class _ControlStore:
    """The controls of the images under each seed, computed once and kept on disk."""

    def __init__(self, folder: Path, grid: Grid, write: bool):
        self._folder, self._grid, self._write = folder / "controls", grid, write
        self._loaded: dict[str, Controls] = {}

    def path(self, cell: SweepCell, image: int) -> Path:
        grid = self._grid
        # Random batches are put in order by the whole batch, so controls are those of all of it.
        batch = list(cell.images)
        name = _digest(
            grid.images[batch],
            grid.labels[batch],
            [cell.seed, grid.ids[batch[0]], batch.index(image)],
            [grid.prior.name, grid.inputs["prior"], grid.num_controls, grid.ceiling_steps],
        )[:16]
        return self._folder / f"{name}.npz"

    def load(self, cells: Sequence[SweepCell]) -> dict[str, Controls]:
        """Those that are known, by image name."""
        known = {}
        for cell in cells:
            for image in cell.images:
                path = self.path(cell, image)
                if path.name not in self._loaded and path.exists():
                    with contextlib.suppress(OSError, ValueError, KeyError):
                        self._loaded[path.name] = read_controls(path)[0]
                if path.name in self._loaded:
                    known[self._grid.names[image]] = self._loaded[path.name]
        return known

    def keep(self, cells: Sequence[SweepCell], controls: Mapping[str, Controls]) -> None:
        for cell in cells:
            for image in cell.images:
                path = self.path(cell, image)
                if path.name in self._loaded or self._grid.names[image] not in controls:
                    continue
                found = controls[self._grid.names[image]]
                self._loaded[path.name] = found
                if self._write and not path.exists():
                    write_controls(path, found, self._grid.images[image])


def _audit_cells(
    grid: Grid,
    cells: Sequence[SweepCell],
    controls,
    progress=None,
    mesh=None,
    searches=None,
):
    """Run cells of one program and seed as one audit."""
    first = cells[0]
    positions = [image for cell in cells for image in cell.images]
    return audit(
        grid.images[positions],
        grid.labels[positions],
        model=grid.model,
        defenses=[first.defense],
        prior=grid.prior,
        prior_params=grid.prior_params,
        variables=grid.variables,
        names=[grid.names[i] for i in positions],
        instance_ids=[grid.ids[i] for i in positions],
        others=grid.others,
        client=first.client,
        settings=dataclasses.replace(first.settings, instances=len(cells)),
        num_controls=grid.num_controls,
        ceiling_steps=grid.ceiling_steps,
        lpips=grid.lpips,
        seed=first.seed,
        controls=controls,
        mesh=mesh,
        searches=searches,
        progress=progress,
    )


def _reason(error: BaseException) -> str:
    """One line: the exception's type, unless it is ours, and its message."""
    text = " ".join(str(error).split())[:500] or "no message"
    return text if isinstance(error, GGLError) else f"{type(error).__name__}: {text}"


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def batches(cells: Sequence[SweepCell], size: int) -> Iterator[list[SweepCell]]:
    """Cells of one program and seed, in the plan's order, in batches of nearly equal size.

    Equal sizes mean equal shapes, so that a program is compiled once.
    """
    alike: dict[tuple, list[SweepCell]] = {}
    for cell in cells:
        alike.setdefault((*cell.program, cell.seed), []).append(cell)
    for group in alike.values():
        number = math.ceil(len(group) / (group[0].settings.instances or size))
        each = math.ceil(len(group) / number)
        for first in range(0, len(group), each):
            yield group[first : first + each]


def run(
    grid: Grid,
    out: str | Path,
    *,
    extend: bool = False,
    retry_failed: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Run a grid's cells that are not finished yet, and keep each as soon as it is.

    Args:
        grid: of :func:`plan`.
        out: folder. What an earlier run finished there is kept and not repeated, however that run
            ended.
        extend: go on although the folder holds a sweep of another configuration; its finished
            cells stay.
        retry_failed: try the cells again that failed in an earlier run.
        mesh: of devices to share a batch's searches out to; see :func:`ggl_jax.run_search`. With
            several processes (``jax.distributed``) each calls this with the same grid and a folder
            that they share, and writes its own file.
        about: more entries for ``config.json``, such as the command.
        progress: called as it goes on.

    Returns:
        A :class:`SweepResult`; Ctrl-C returns one, too.

    Raises:
        GGLError: the folder is in use or holds another configuration (without ``extend``).
        StorageError: the disk is full; nothing that was finished is lost.

    Edge cases:
        A batch that fails (out of memory, say) is split until it passes or a single cell is found
        to be the cause; that one is recorded with its reason, and the others go on.
    """
    process, processes = jax.process_index(), jax.process_count()
    folder, lock = _open_folder(out, process)
    journal = None
    try:
        if process == 0:
            _prepare(folder, grid, extend, about or {})
        _meet("ggl_jax: the plan is written", processes)
        journal = results.Journal(folder, process)
        _meet("ggl_jax: the journals are open", processes)
        records = results.read(folder)
        settled = records.finished | (set() if retry_failed else set(records.failures))
        todo = [cell for cell in grid.cells if cell.id not in settled]
        _agree([cell.id for cell in todo], processes)
        interrupted = False
        try:
            _run_cells(grid, todo, folder, journal, mesh, progress)
        except KeyboardInterrupt:
            interrupted = True
        else:
            _meet("ggl_jax: the sweep is done", processes)
        return SweepResult(results.read(folder), interrupted)
    finally:
        if journal is not None:
            journal.close()
        lock.release()


def _run_cells(grid, todo, folder, journal, mesh, progress) -> None:
    process, processes = jax.process_index(), jax.process_count()
    store = _ControlStore(folder, grid, write=process == 0)
    largest: dict[tuple, int] = {}
    done = 0

    def attempt(cells: list[SweepCell]) -> None:
        nonlocal done
        label = describe(cells[0])

        def report(phase, number, total, fraction, loss):
            if progress is not None:
                progress(f"{label}: {phase}", done + number, len(todo), fraction, loss)

        known = store.load(cells)
        try:
            kept = folder / "searches" / cells[0].id
            found = _audit_cells(grid, cells, known, report, mesh=mesh, searches=kept)
        except Exception as error:
            # One cell's failure is a result; a batch's is not yet known to be any cell's.
            if len(cells) > 1:
                half = len(cells) // 2
                if _out_of_memory(error):
                    largest[cells[0].program] = half
                attempt(cells[:half])
                attempt(cells[half:])
                return
            if process == 0:
                journal.append([{"cell": cells[0].id, "failed": _reason(error)}])
            done += 1
            return
        store.keep(cells, found.controls)
        position = 0
        for number, cell in enumerate(cells):
            parts = range(position, position + len(cell.images))
            position += len(cell.images)
            # Every process has every result; each writes its share.
            if number % processes == process:
                journal.append(_finish(cell, found, parts, folder, store))
            done += 1

    # Batches of the whole grid, so that a search that goes on finds the batch that it had.
    left = {cell.id for cell in todo}
    for whole in batches(grid.cells, default_instances(grid.model, mesh)):
        batch = [cell for cell in whole if cell.id in left]
        if not batch:
            continue
        limit = largest.get(batch[0].program, len(batch))
        for first in range(0, len(batch), limit):
            attempt(batch[first : first + limit])


def _finish(cell, found, parts, folder, store) -> list[dict[str, Any]]:
    """A finished cell's rows; its pictures are on disk before the rows are."""
    rows = []
    for part, position in enumerate(parts):
        name = f"reconstructions/{cell.id}-{part}.png"
        files.write_png(folder / name, found.reconstructions[position])
        rows.append(
            {
                "cell": cell.id,
                "part": part,
                "parts": len(parts),
                **found.rows[position],
                "axes": cell.axes,
                "reconstruction": name,
                "controls": f"controls/{store.path(cell, cell.images[part]).name}",
            }
        )
    return rows


def describe(cell: SweepCell) -> str:
    """A cell in a few words: its values on the axes but for the image."""
    shown = [str(v) for k, v in cell.axes.items() if k not in ("image", "seed", "defense")]
    return " ".join([*shown, cell.defense.name, f"seed {cell.seed}"])


def _meet(what: str, processes: int) -> None:
    if processes > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def _agree(cells: list[str], processes: int) -> None:
    """All processes have to run the same cells, or they would wait for each other for ever."""
    if processes == 1:
        return
    from jax.experimental import multihost_utils

    number = np.asarray([int(_digest(cells)[:7], 16), len(cells)], np.int32)
    try:
        multihost_utils.assert_equal(number)
    except AssertionError:
        raise GGLError(
            "out: the processes see different results; --out has to be one folder that they share"
        ) from None


def sweep(
    images,
    labels,
    *,
    model: Model,
    axes: Mapping[str, Sequence],
    out: str | Path,
    extend: bool = False,
    retry_failed: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SweepResult:
    """Audit every combination of the axes' values on every image; resumable.

    Args:
        images: [n h w c], float in [0, 1].
        labels: [n] integer classes.
        model: the federated model.
        axes: name -> list of values, see :func:`plan`.
        out: folder for the results; the same call goes on where one that was killed there ended.
        extend: see :func:`run`, like ``retry_failed``, ``mesh`` and ``progress``.
        **options: of :func:`plan`.

    Returns:
        A :class:`SweepResult`. :func:`ggl_jax.audit.report.make` makes its report.

    Raises:
        GGLError: as :func:`plan` and :func:`run`.
    """
    grid = plan(images, labels, model=model, axes=axes, **options)
    return run(grid, out, extend=extend, retry_failed=retry_failed, mesh=mesh, progress=progress)
