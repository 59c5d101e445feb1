"""``ggl-jax sweep``: audit a whole grid, resumably."""

import dataclasses
import shlex
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import tyro

from ggl_jax.commands import _devices
from ggl_jax.commands import audit as audit_command
from ggl_jax.commands._shared import AuditBar, console, environment, fields_of, load_inputs
from ggl_jax.errors import GGLError, did_you_mean

#: Options of an audit that are axes of a grid, by the axes' names.
_AXIS_OF = {"indices": "image", "defenses": "defense", "seed": "seed"}
#: Those that a grid cannot fix: they are its axes, or say where things go.
_NOT_FIXED = ("preset", "config", "out", "shard", *_AXIS_OF)
_TABLES = ("preset", "fixed", "axes", "exclude")


@dataclasses.dataclass(frozen=True)
class SweepCommand:
    """Audit a whole grid: attacks x settings x defenses x images x seeds.

    The grid is a TOML file: `preset`, a table `[axes]` of lists (defense, image, seed, attack,
    optimizer, steps, ... : any option of the search or the client), a table `[fixed]` of options of
    ggl-jax audit, and any number of `[[exclude]]` tables, each a combination to leave out. Every
    finished cell is kept at once; the same command goes on where a run ended, however it ended.
    """

    grid: tyro.conf.Positional[Path]
    """The grid, a .toml file (see docs/scale.md)."""
    out: Path | None = None
    """Folder for the results; by default the grid's name without .toml, here."""
    dry_run: bool = False
    """Only say how many cells, programs and gradient evaluations it would be, and which cells
    cannot run. ggl-jax status tells the pace once some are finished."""
    extend: bool = False
    """Go on in a folder of another configuration: what is finished there stays."""
    retry_failed: bool = False
    """Try failed cells again."""
    shard: bool = False
    """Share the work out to all devices of this machine: images where there are as many as
    devices, else each step's candidates."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to share the work out to several processes or hosts."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """This process's number, from 0."""
    distributed: bool = False
    """Join the processes that JAX finds itself (SLURM, Kubernetes, TPU pods)."""


class GridFile(typing.NamedTuple):
    """A grid as read from its file.

    Attributes:
        command: preset and fixed options.
        axes: name -> values, without the images.
        indices: the images, as ``--indices``.
        exclude: combinations to leave out.
        options: all of it as plain values, for ``config.json``.
        fixed: the names that the file fixes.
    """

    command: audit_command.AuditCommand
    axes: dict[str, list]
    indices: str
    exclude: list[dict[str, Any]]
    options: dict[str, Any]
    fixed: dict[str, Any]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value is of an option's type."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (str, bool) and isinstance(value, hint)


def _check_option(where: str, name: str, value: Any, hints: dict[str, Any]) -> None:
    if name in _AXIS_OF:
        raise GGLError(
            f"grid: {where}: {name} is an axis; write {_AXIS_OF[name]} = [...] under [axes]"
        )
    if name in _NOT_FIXED:
        raise GGLError(f"grid: {where}: {name} is not a grid's; leave it out")
    if name not in hints:
        hint = did_you_mean(name, hints, after=" ")
        raise GGLError(f"grid: {where} has no option {name!r}; {hint}see ggl-jax audit --help")
    if not _fits(value, hints[name]):
        shown = getattr(hints[name], "__name__", str(hints[name])).replace("typing.", "")
        raise GGLError(f"grid: {where}: {name} is {value!r}, allowed: {shown}")


def read_grid(path: Path) -> GridFile:
    """Read and check a grid file.

    Raises:
        GGLError: no such file, not TOML, an unknown table or option, or a value of a wrong type.
    """
    from ggl_jax.audit.sweep import AXES, PUBLISHED

    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise GGLError(f"grid: {path} does not exist; give a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GGLError(f"grid: {path} is not TOML: {error}") from None
    unknown = [name for name in table if name not in _TABLES]
    if unknown:
        raise GGLError(f"grid: {path} has {unknown[0]!r}; allowed: {', '.join(_TABLES)}")
    preset, fixed = table.get("preset", "quick"), table.get("fixed", {})
    axes, exclude = dict(table.get("axes", {})), table.get("exclude", [])
    if preset not in audit_command.PRESETS:
        raise GGLError(f"grid: preset is {preset!r}, allowed: {', '.join(audit_command.PRESETS)}")
    if not isinstance(fixed, dict) or not isinstance(exclude, list):
        raise GGLError("grid: write the tables as [fixed], [axes] and [[exclude]]")
    every = typing.get_type_hints(audit_command.AuditCommand)
    hints = {name: hint for name, hint in every.items() if name not in _NOT_FIXED}
    for name, value in fixed.items():
        if name in axes:
            raise GGLError(f"grid: {name} is fixed and an axis; choose one")
        _check_option("[fixed]", name, value, hints)
    images = axes.pop("image", "0")
    if isinstance(images, list):
        images = ",".join(str(i) for i in images)
    if not isinstance(images, str | int):
        raise GGLError(f"grid: axis image is {images!r}, allowed: a list of numbers, or '0:8'")
    for name, values in axes.items():
        if name not in AXES:
            hint = did_you_mean(name, [*AXES, "image"], after=" ")
            raise GGLError(f"grid: {name!r} is no axis; {hint}allowed: image, {', '.join(AXES)}")
        own = name in ("defense", "seed")
        for value in [] if own or not isinstance(values, list) else values:
            open_ended = value == PUBLISHED and getattr(audit_command.AuditCommand, name) is None
            if not open_ended:
                _check_option("[axes]", name, value, hints)
    shown = {"preset": preset, "fixed": fixed, "axes": {**axes, "image": str(images)}}
    return GridFile(
        audit_command.AuditCommand(preset=preset, **fixed),
        axes,
        str(images),
        exclude,
        {**shown, "exclude": exclude},
        fixed,
    )


def load_grid(path: Path, about: dict[str, Any] | None = None):
    """A :class:`ggl_jax.audit.sweep.Grid` of a grid file, with images, model and prior loaded."""
    from ggl_jax.adversary.strategy import AttackSettings
    from ggl_jax.audit import sweep
    from ggl_jax.audit.cells import Inputs
    from ggl_jax.client.share import ClientSettings

    file = read_grid(path)
    command = file.command
    dataset, prior, prior_params, _, model = load_inputs(
        command.data,
        command.prior,
        indices=file.indices,
        label=command.label,
        remedy="add a labels.csv (file,label) or fix label = 0",
        model_name=command.model,
        num_classes=command.num_classes,
        batch_norm=command.batch_norm,
    )
    own = {k: v for k, v in file.fixed.items() if k in fields_of(AttackSettings, command)}

    def settings(values) -> AttackSettings:
        """The preset's settings for the attack and optimiser at hand, then the fixed ones."""
        chosen = ["--preset", command.preset]
        for name in ("attack", "optimizer"):
            value = values.get(name, own.get(name))
            if value not in (None, sweep.PUBLISHED):
                chosen += [f"--{name}", value]
        if values.get("adaptive", own.get("adaptive")) is False:
            chosen += ["--adaptive", "False"]
        base = audit_command.defaults(chosen)
        return AttackSettings(**(fields_of(AttackSettings, base) | own))

    inputs = Inputs(
        dataset.images,
        dataset.labels,
        model,
        prior=prior,
        prior_params=prior_params,
        names=dataset.names,
        instance_ids=dataset.indices,
        others=audit_command._others(command, dataset, prior.image_shape[0]),
        num_controls=command.num_controls,
        ceiling_steps=command.ceiling_steps,
        lpips=command.lpips,
        about={**(about or {}), "options": file.options},
    )
    return sweep.plan(
        inputs,
        file.axes,
        exclude=file.exclude,
        settings=settings,
        client=ClientSettings(**fields_of(ClientSettings, command)),
    )


def run(command: SweepCommand, argv: list[str]) -> int:
    """``ggl-jax sweep``."""
    _devices.join(
        command.coordinator, command.num_processes, command.process_id, command.distributed
    )
    import jax

    from ggl_jax.audit import folder, report
    from ggl_jax.audit.run import run as run_cells

    about = {"command": "ggl-jax " + shlex.join(argv), "environment": environment()}
    grid = load_grid(command.grid, about)
    out = command.out or Path(command.grid.stem)
    first = jax.process_index() == 0
    if command.dry_run:
        done = folder.read(out).finished if (out / "plan.json").exists() else set()
        return _dry_run(grid, done)
    if first:
        console.print(
            f"{len(grid.cells):,} cells, {sum(c.evaluations for c in grid.cells):,} gradient "
            f"evaluations. Results: {out}/",
            markup=False,
            soft_wrap=True,
        )
    with AuditBar() as bar:
        result = run_cells(
            grid.cells,
            grid.inputs,
            out,
            config=grid.config,
            extend=command.extend,
            retry_failed=command.retry_failed,
            mesh=_devices.mesh(command.shard),
            progress=bar if first else None,
        )
    records = result.records
    if first:
        console.print(
            f"{len(records.finished):,} cells finished, {len(records.failures):,} failed, "
            f"{len(records.left):,} left.",
            markup=False,
        )
        for cell, reason in list(records.failures.items())[:5]:
            shown = ", ".join(f"{k} {v}" for k, v in records.cells[cell].items())
            console.print(f"  failed: {shown}: {reason}", markup=False, soft_wrap=True)
        if records.failures:
            console.print("Try these again with --retry-failed.", markup=False)
        if records.rows:
            page = report.write(report.make(records), records.folder)
            console.print(f"Report: {page}", markup=False, soft_wrap=True)
    if result.interrupted:
        console.print("Interrupted. The same command goes on from here.", markup=False)
        return 130
    return 1 if records.failures else 0


def _dry_run(grid, done) -> int:
    left = [cell for cell in grid.cells if cell.id not in done]
    console.print(
        f"{len(grid.cells):,} cells ({len(grid.cells) - len(left):,} finished), "
        f"{len({cell.program for cell in left}):,} programs to compile, "
        f"{sum(cell.evaluations for cell in left):,} gradient evaluations.",
        markup=False,
        soft_wrap=True,
    )
    broken = [cell for cell in grid.cells if cell.evaluations == 0]
    for cell in broken[:5]:
        shown = ", ".join(f"{k} {v}" for k, v in cell.axes.items())
        console.print(f"  cannot run: {shown}: {_why(grid, cell)}", markup=False, soft_wrap=True)
    if len(broken) > 5:
        console.print(f"  and {len(broken) - 5:,} more")
    return 1 if broken else 0


def _why(grid, cell) -> GGLError | None:
    """Why the cell's search cannot be built."""
    from ggl_jax.adversary.reconstruct import search_for

    given = grid.inputs
    try:
        search_for(given.model, given.prior, cell.defense, cell.client, cell.settings)
    except GGLError as error:
        return error
    return None
