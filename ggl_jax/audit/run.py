"""Runs cells: an audit is a list of them along the defenses, a sweep any list.

Each cell is three calls: :func:`ggl_jax.share` (the client), :func:`ggl_jax.reconstruct` (the
adversary) and :func:`ggl_jax.judge` (the audit). A cell's random streams depend on its seed and its
images alone, so batching, order, resuming and sharding do not change a result, but for float32
rounding in programs of different batch sizes.
"""

import contextlib
import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ggl_jax.adversary.attacks import members
from ggl_jax.adversary.reconstruct import Reconstruction, expectations, mismatch, reconstruct
from ggl_jax.adversary.resume import Checkpoints
from ggl_jax.adversary.search import release_programs
from ggl_jax.audit import folder as folders
from ggl_jax.audit.bounds import Bounds
from ggl_jax.audit.cells import BOUND_STREAM, PUBLIC_STREAM, Cell, Cells, Inputs, image_batches
from ggl_jax.audit.controls import Controls, batch_controls, read_controls, write_controls
from ggl_jax.audit.judge import in_order, jsonable, judge
from ggl_jax.audit.threat import threat_model
from ggl_jax.client.share import share
from ggl_jax.errors import GGLError, StorageError, check_once
from ggl_jax.files import digest
from ggl_jax.gate.arguments import as_options
from ggl_jax.spec import Client, Search, checked, varying
from ggl_jax.types import Model, Public

# Streams of an instance's key, so that defense noise and search never share random numbers.
STREAM_DEFENSE, STREAM_SEARCH, STREAM_CONTROLS = 0, 1, 2

#: ``progress(phase, cell_number, num_cells, fraction, loss)``, called often.
Progress = Callable[[str, int, int, float, float | None], None]


def instances_of(inputs: Inputs) -> int:
    """Searches in one program: as the inputs' speed says, or else as many as make sense.

    That is one where a single population fills the machine or its memory: on a CPU, and for images
    of more than 64x64 pixels. On a mesh, so many for each of its devices.
    """
    if inputs.speed.instances is not None:
        return inputs.speed.instances
    large = math.prod(inputs.model.image_shape[:2]) > 64 * 64
    each = 1 if large or jax.default_backend() == "cpu" else 8
    return each * (1 if inputs.mesh is None else inputs.mesh.size)


def batches(cells: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    """Neighbouring cells of one program and seed, in batches of nearly equal size.

    Equal sizes mean equal shapes, so that a program is compiled once.
    """
    for _, neighbours in itertools.groupby(cells, key=lambda cell: (*cell.program, cell.seed)):
        group = list(neighbours)
        number = math.ceil(len(group) / size)
        each = math.ceil(len(group) / number)
        for first in range(0, len(group), each):
            yield group[first : first + each]


class Grid(NamedTuple):
    """A run made ready.

    Attributes:
        cells: made by :class:`Cells`; neighbours of one program run in one batch.
        inputs: what they share. With several processes (``jax.distributed``) each makes the same
            cells, with a mesh of all their devices.
        config: of :func:`config_of`, to be checked against a folder's; None for a scratch folder
            that is one call's alone.
    """

    cells: Sequence[Cell]
    inputs: Inputs
    config: Mapping[str, Any] | None


class RunResult(NamedTuple):
    """What a run left in its folder.

    Attributes:
        records: everything that the folder holds.
        interrupted: Ctrl-C ended it; what is finished is kept.
    """

    records: folders.Records
    interrupted: bool

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each image of each finished cell."""
        return self.records.rows

    @property
    def failures(self) -> dict[str, str]:
        """Failed cell -> reason."""
        return self.records.failures


def run(
    grid: Grid,
    out: str | Path,
    *,
    extend: bool | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Run the cells that are not finished yet, and keep each as soon as it is.

    Args:
        grid: its cells, and what they share.
        out: folder. What an earlier run finished there is kept and not repeated, however that run
            ended. Several processes share it, and each writes its share of the cells.
        extend: go on although the folder holds another configuration; its finished cells stay.
            None: errors do not offer it.
        retry_failed: try the cells again that failed in an earlier run.
        progress: called as it goes on.

    Returns:
        A :class:`RunResult`; Ctrl-C returns one, too.

    Raises:
        GGLError: the folder is in use or holds something else.
        StorageError: the disk is full; nothing that was finished is lost.

    Edge cases:
        A batch that fails (out of memory, say) is split until it passes or a single cell is found
        to be the cause; that one is recorded with its reason, and the others go on.
    """
    (cells, inputs, config), folder = grid, Path(out)
    process, scratch = jax.process_index(), config is None
    plan = {c.id: {**c.axes, "evaluations": c.evaluations} for c in cells}
    with contextlib.ExitStack() as stack:
        if not scratch:
            stack.enter_context(folders.lock(folder, f"lock-{process:04d}"))
        if scratch or process == 0:
            folders.prepare(folder, config or {}, plan, extend)
        multihost_utils.sync_global_devices("ggl_jax: the plan is written")
        records = folders.read(folder)
        settled = records.finished | (set() if retry_failed else set(records.failures))
        todo = [cell.id for cell in cells if cell.id not in settled]
        _agree(todo)
        interrupted = False
        work = _Work(inputs, folder, cells, todo, scratch, progress)
        try:
            # Batches of all cells, so that a search that goes on finds the batch that it had.
            for batch in batches(cells, instances_of(inputs)):
                work.run([cell for cell in batch if cell.id in work.todo])
        except KeyboardInterrupt:
            interrupted = True
        else:
            multihost_utils.sync_global_devices("ggl_jax: the run is done")
        records = folders.read(folder)
        if process == 0:
            folders.export(records)
        return RunResult(records, interrupted)


def config_of(cells: Sequence[Cell], inputs: Inputs, options: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's ``config.json``: what was asked for, and of what, by content."""
    own = {cell.defense.name: cell.own for cell in cells if cell.own}
    shown = ("num_controls", "ceiling_steps", "lpips", "bound_samples")
    judged = {name: getattr(inputs, name) for name in shown}
    names = {"model": inputs.model.name, "prior": inputs.prior.name}
    known = dict(inputs.digests)
    for name in ("model", "variables"):
        each = list(dict.fromkeys(cell.inputs.digests[name] for cell in cells))
        known[name] = each if len(each) > 1 else each[0]
    played = dict.fromkeys(
        threat_model(one, c.client, c.inputs.model, c.inputs.prior)
        for c in cells
        for one in members(c.search, c.defense.view) or [c.search]
    )
    return {
        "options": {**options, **judged, **names},
        **(inputs.about or {}),
        "inputs": {**known, "defenses": own},
        "threat_model": [one._asdict() for one in played],
    }


def exchange(
    public: Public,
    cells: Sequence[Cell],
    *,
    checkpoints: Checkpoints | None = None,
    progress: Callable[[str, float, float | None], None] | None = None,
) -> list[tuple[Mapping[str, Any] | tuple, Reconstruction]]:
    """Both sides' part in cells of one program: the client's own record, and what the server finds.

    Args:
        public: what both sides have under the cells' seed.
        cells: see :attr:`Cell.program`.
        checkpoints: where a long search keeps its state.
        progress: as for :func:`ggl_jax.reconstruct`.
    """
    first, inputs = cells[0], cells[0].inputs
    if progress is not None:
        progress("client's update", 0.0, None)
    known: dict[str, Any] = {"defense": first.defense, "client": first.client}
    sent = [
        share(jax.random.fold_in(cell.key, STREAM_DEFENSE), public, *cell.private, **known)
        for cell in cells
    ]
    found = reconstruct(
        jnp.stack([jax.random.fold_in(cell.key, STREAM_SEARCH) for cell in cells]),
        public,
        [shared for shared, _ in sent],
        view=first.defense.view,
        client=first.client,
        search=first.search,
        speed=inputs.speed,
        mesh=inputs.mesh,
        checkpoints=checkpoints,
        progress=progress,
    )
    return [(record, one) for (_, record), one in zip(sent, found, strict=True)]


class _Work:
    """Runs batches of cells and keeps what they give."""

    def __init__(self, inputs, folder, cells, todo, scratch, progress):
        self.inputs, self.folder, self.progress = inputs, folder, progress
        self.todo, self.scratch, self.done = dict.fromkeys(todo), scratch, 0
        names = varying(cell.axes for cell in cells)
        self.varying = [name for name in names if name != "image"] or ["defense"]
        self.largest: dict[tuple, int] = {}
        self.known: dict[str, list[Controls]] = {}
        self.world: tuple[Inputs, int] | None = None

    def run(self, cells: list[Cell]) -> None:
        """Run a batch, in parts where it is known not to fit into memory."""
        if cells:
            limit = self.largest.get(cells[0].program, len(cells))
            for first in range(0, len(cells), limit):
                self.attempt(cells[first : first + limit])

    def attempt(self, cells: list[Cell]) -> None:
        """Run a batch at once; where that fails, in halves, to find the cell to blame."""
        try:
            found = self.find(cells)
        except StorageError:
            raise
        except Exception as error:
            # One cell's failure is a result; a batch's is not yet known to be any cell's.
            if len(cells) > 1:
                half = len(cells) // 2
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    self.largest[cells[0].program] = half
                self.attempt(cells[:half])
                self.attempt(cells[half:])
                return
            if self.scratch or jax.process_index() == 0:
                folders.fail(self.folder, cells[0].id, _reason(error))
        else:
            for number, (cell, (rows, images)) in enumerate(zip(cells, found, strict=True)):
                # Every process has every result; each writes its share.
                if self.scratch or number % jax.process_count() == jax.process_index():
                    folders.keep(self.folder, cell.id, rows, images)
            self.checkpoints(cells).clear()
        self.done += len(cells)
        release_programs()

    def checkpoints(self, cells: list[Cell]) -> Checkpoints:
        """Where long searches keep their state meanwhile."""
        kept = self.folder / "searches" / cells[0].id
        return Checkpoints(kept, write=self.scratch or jax.process_index() == 0)

    def find(self, cells: list[Cell]) -> list[tuple[list[dict[str, Any]], np.ndarray]]:
        """Share, reconstruct and judge cells of one program; rows and images of each."""
        began, first = time.perf_counter(), cells[0]
        label = " ".join(str(first.axes[name]) for name in self.varying)

        def report(phase, fraction=0.0, loss=None):
            if self.progress is not None:
                work = fraction * len(cells)
                self.progress(f"{label}: {phase}", self.done, len(self.todo), work, loss)

        self.enter(first)
        kept = self.checkpoints(cells)
        found = exchange(self.public, cells, checkpoints=kept, progress=report)
        # The wall-clock time of a batch is shared by its cells.
        seconds = (time.perf_counter() - began) / len(cells)
        return [
            self.judged(cell, record, one, seconds, report)
            for cell, (record, one) in zip(cells, found, strict=True)
        ]

    def enter(self, cell: Cell) -> None:
        """Make what both sides have under a cell's seed, and its bounds, or go on with them."""
        inputs, key = cell.inputs, jax.random.key(cell.seed)
        if self.world != (inputs, cell.seed):
            self.world = inputs, cell.seed
            self.public = inputs.public(cell.seed)
            own = jax.random.fold_in(key, BOUND_STREAM)
            self.bounds = Bounds(self.public, own, inputs.bound_samples)
        if cell.client.batch_size > 1 and self.public.expected is None:
            expected = expectations(jax.random.fold_in(key, PUBLIC_STREAM), self.public)
            self.public = self.public._replace(expected=expected)

    def judged(self, cell: Cell, record, found, seconds, report):
        """Rows and images of a cell, in the order of its private images."""
        inputs, batch, more = cell.inputs, cell.private, {}
        report("controls")
        if inputs.fit and cell.client.rounds == 1:
            view, told = cell.defense.view, found.search
            if "won" in told:  # of several attacks, each one's was worked out
                fit = told["mismatches"][told["won"]]
            else:
                fit = mismatch(found, public=self.public, view=view, client=cell.client)
            more["mismatch"] = jsonable(fit)
        found = in_order(found, batch[0])
        files, controls = self.controls(cell, found.labels)
        rows = judge(
            found,
            *batch,
            public=self.public,
            controls=controls,
            record=record,
            others=inputs.others,
            perceptual=inputs.perceptual,
        )
        report("bounds")
        rows[0] |= self.bounds.row(cell.defense, cell.client, *batch, inputs.others)
        names = [inputs.names[i] for i in cell.images]
        for row, name, file in zip(rows, names, files, strict=True):
            row |= {
                **{"image": name, "batch": names, "defense": cell.defense.name},
                **{"attack": cell.search.attack, "seed": cell.seed},
                **{"seconds": seconds, "axes": cell.axes, "controls": file, **more},
            }
        return rows, found.images

    def controls(self, cell: Cell, labels) -> tuple[list[str], list[Controls]]:
        """The controls of a cell's images, and their files: computed once, and kept on disk."""
        inputs = self.inputs
        batch = list(cell.images)
        # Random batches are put in order by the whole batch, so controls are those of all of it.
        # Labels tell something to a class-conditional prior alone.
        own = None if inputs.prior.num_classes is None else np.asarray(labels).tolist()
        stream = [cell.seed, inputs.instance_ids[batch[0]]]
        prior = "" if self.scratch else inputs.digests["prior"]
        settings = [inputs.num_controls, inputs.ceiling_steps]
        name = digest(inputs.images[batch], own, stream, prior, settings)[:16]
        names = [f"controls/{name}-{part}.npz" for part in range(len(batch))]
        if name not in self.known:
            with contextlib.suppress(GGLError):
                self.known[name] = [read_controls(self.folder / file)[0] for file in names]
        if name not in self.known:
            self.known[name] = batch_controls(
                inputs.prior,
                inputs.prior_params,
                jnp.asarray(inputs.images[batch]),
                [0] * len(batch) if own is None else own,
                jax.random.fold_in(jax.random.fold_in(cell.key, STREAM_CONTROLS), 0),
                num_samples=inputs.num_controls,
                ceiling_steps=inputs.ceiling_steps,
            )
            if self.scratch or jax.process_index() == 0:
                for file, found, image in zip(names, self.known[name], batch, strict=True):
                    write_controls(self.folder / file, found, inputs.images[image])
        return names, self.known[name]


def _reason(error: BaseException) -> str:
    """One line: the exception's type, unless it is ours, and its message."""
    text = " ".join(str(error).split())[:500] or "no message"
    return text if isinstance(error, GGLError) else f"{type(error).__name__}: {text}"


def _agree(cells: list[str]) -> None:
    """All processes have to run the same cells, or they would wait for each other for ever."""
    number = np.asarray([int(digest(cells)[:7], 16), len(cells)], np.int32)
    try:
        multihost_utils.assert_equal(number)
    except AssertionError:
        raise GGLError(
            "out: the processes see different results; --out has to be one folder that they share"
        ) from None


class AuditResult(NamedTuple):
    """What an audit returns.

    Attributes:
        rows: one dict for each image and defense, as in ``results.jsonl``.
        reconstructions: the images [h w c] in the order of ``rows``, float32 in [0, 1].
        controls: the controls of each image, by the image's name.
        originals: the private images by name.
        failures: "defense, image" -> the reason, for the cells that failed.
    """

    rows: list[dict[str, Any]]
    reconstructions: list[np.ndarray]
    controls: dict[str, Controls]
    originals: dict[str, np.ndarray]
    failures: Mapping[str, str] = MappingProxyType({})


class AuditInterrupted(KeyboardInterrupt):
    """Ctrl-C during an audit; ``result`` holds the cells that were finished."""

    def __init__(self, result: AuditResult):
        super().__init__("the audit was interrupted")
        self.result = result


def audit(
    images,
    labels,
    *,
    model: Model,
    defenses: Sequence[Any],
    search: Search | None = None,
    client: Client | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
    **inputs: Any,
) -> AuditResult:
    """Audit defenses on private images: how much of each does the shared update leak?

    For each image (or batch) and defense: the client's update is computed and defended; the
    adversary infers labels and the defense's parameters from it alone, and searches the prior's
    latents; the audit then compares with the truth, beside its controls.

    Args:
        images: [n h w c], the private images, float in [0, 1].
        labels: [n] integer class labels.
        model: the federated model; see :func:`ggl_jax.from_flax` for your own.
        defenses: specifications such as "clip:4+noise:0.1", :class:`Defense` objects, or optax
            transformations (:func:`ggl_jax.from_optax`), each of another name.
        search: how the adversary searches; None for GGL as published. :func:`ggl_jax.search_of`
            makes those of other attacks and of presets.
        client: batch size and local steps.
        seed: of everything random.
        out: folder for all results; ``ggl-jax report``, ``check`` and ``status`` read it. Cells
            that an earlier run of the same audit finished there are kept and not repeated. None
            keeps nothing.
        retry_failed: try the cells again that failed in an earlier run there.
        progress: called as the audit goes on.
        **inputs: further arguments of :class:`Inputs`: the prior and its parameters, the model's
            variables, names, controls, a mesh of devices, and so on.

    Returns:
        An :class:`AuditResult`. A cell that fails is among its failures, and the others go on.

    Raises:
        GGLError: for unusable input, a folder that holds something else, or if no cell finished.
        AuditInterrupted: Ctrl-C; it holds what was finished.
    """
    own: dict[str, Any] = {
        "search": search,
        "client": client,
        "seed": seed,
        "kept": out is not None,
    }
    grid = lay_out(Inputs(images, labels, model, **inputs), defenses, **own)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="ggl-jax-") as scratch:
            return _result(run(grid, scratch, progress=progress), grid)
    return _result(run(grid, out, retry_failed=retry_failed, progress=progress), grid)


def lay_out(
    inputs: Inputs,
    defenses: Sequence[Any],
    *,
    search: Search | None = None,
    client: Client | None = None,
    seed: int = 0,
    kept: bool = True,
) -> Grid:
    """The cells of :func:`audit`, whose arguments these are; ``kept``: whether in a folder.

    Raises:
        GGLError: for unusable input.
    """
    search = checked(as_options("search", search, Search))
    client = checked(as_options("client", client, Client))
    maker = Cells(inputs, told_apart=kept)
    if isinstance(defenses, str) or not isinstance(defenses, Iterable):
        raise GGLError(f"defenses: got {defenses!r}, allowed: a list, such as ['none', 'clip:4']")
    parsed = [maker.defense(defense) for defense in defenses]
    names = [defense.name for defense in parsed]
    if not names:
        raise GGLError("defenses: got none; name at least one, e.g. 'none'")
    check_once("defenses", names)
    at_once = instances_of(inputs)
    for defense in parsed:  # for its errors: options that do not fit are the call's, not a cell's
        maker.ready(search, client, defense)
    parts = image_batches(len(inputs.images), client.batch_size)
    each = math.ceil(len(parts) / math.ceil(len(parts) / at_once))
    # Those of the first images come first, so that these are complete first.
    cells = [
        maker.make({}, search, client, defense, seed, batch)
        for first in range(0, len(parts), each)
        for defense in parsed
        for batch in parts[first : first + each]
    ]
    plain = {"search": dataclasses.asdict(search), "client": dataclasses.asdict(client)}
    options = {"defenses": names, "seed": seed, **plain}
    return Grid(cells, inputs, config_of(cells, inputs, options) if kept else None)


def _result(found: RunResult, grid: Grid) -> AuditResult:
    records, inputs = found.records, grid.inputs
    kept = {row["image"]: records.folder / row["controls"] for row in records.rows}
    result = AuditResult(
        rows=records.rows,
        reconstructions=[records.image(row) for row in records.rows],
        controls={name: read_controls(path)[0] for name, path in kept.items() if path.exists()},
        originals=dict(zip(inputs.names, inputs.images, strict=True)),
        failures={
            f"{records.cells[cell]['defense']}, {records.cells[cell]['image']}": reason
            for cell, reason in records.failures.items()
        },
    )
    for row in [] if grid.config else result.rows:
        del row["reconstruction"], row["controls"]  # files that are gone
    if found.interrupted:
        raise AuditInterrupted(result)
    if not result.rows:
        which, reason = next(iter(result.failures.items()))
        raise GGLError(f"audit: no cell finished; {which}: {reason}")
    return result
