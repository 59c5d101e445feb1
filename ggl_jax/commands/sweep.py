"""``ggl-jax sweep``: audit a whole grid, resumably."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from ggl_jax import errors
from ggl_jax.audit import sweep
from ggl_jax.audit.run import Grid
from ggl_jax.audit.sweep import check_axes, expand
from ggl_jax.commands import _devices
from ggl_jax.commands._options import Parts, Preset, Running
from ggl_jax.commands._shared import about, load_inputs, run_grid
from ggl_jax.errors import GGLError
from ggl_jax.spec import Search, Setup, check, options_of, replace

_TABLES = ("preset", "fixed", "axes", "exclude")


@dataclasses.dataclass(frozen=True)
class SweepCommand:
    """Audit a whole grid: attacks x settings x defenses x images x seeds.

    The grid is a TOML file: `preset`, a table `[axes]` of lists (defense, image, seed, attack,
    optimizer, steps, model, weights, ... : any option of the search or the client), a table
    `[fixed]` of options of ggl-jax audit, and any number of `[[exclude]]` tables, each a
    combination to leave out. Every finished cell is kept at once; the same command goes on where a
    run ended, however it ended.
    """

    grid: tyro.conf.Positional[Path]
    """The grid, a .toml file (see docs/scale.md)."""
    out: Path | None = None
    """Folder for the results; by default the grid's name without .toml, here."""
    running: Running = dataclasses.field(default_factory=Running)
    coordinator: str | None = None
    """HOST:PORT of process 0, to share the work out to several processes or hosts."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """This process's number, from 0."""
    distributed: bool = False
    """Join the processes that JAX finds itself (SLURM, Kubernetes, TPU pods)."""


class GridFile(NamedTuple):
    """A grid as read from its file.

    Attributes:
        options: all of it as plain values, for ``config.json``: ``preset``, ``fixed``, ``axes``
            (with the images, as ``--indices``) and ``exclude``.
        fixed: what it fixes; of the search, without its preset.
        search: the options of the search that it fixes.
        axes: name -> values, without the images.
    """

    options: dict[str, Any]
    fixed: Parts
    search: dict[str, Any]
    axes: dict[str, list]


def read_grid(path: Path) -> GridFile:
    """Read and check a grid file.

    Raises:
        GGLError: no such file, not TOML, or as :func:`grid_of`.
    """
    what = f"grid: {path} does not exist, is no file or not TOML"
    with errors.explaining(what, "give a .toml file", (OSError, ValueError)):
        table = tomllib.loads(path.read_text())
    unknown = [name for name in table if name not in _TABLES]
    if unknown:
        raise GGLError(f"grid: {path} has {unknown[0]!r}; allowed: {', '.join(_TABLES)}")
    return grid_of(table)


def grid_of(table: dict[str, Any]) -> GridFile:
    """Check a grid's tables.

    Raises:
        GGLError: an unknown option, or a value of a wrong type.
    """
    preset = check("grid: preset", table.get("preset", "quick"), Preset)
    fixed, exclude = table.get("fixed", {}), table.get("exclude", [])
    axes = table.get("axes", {})
    if not isinstance(fixed, dict) or not isinstance(axes, dict) or not isinstance(exclude, list):
        raise GGLError("grid: write the tables as [fixed], [axes] and [[exclude]]")
    axes = dict(axes)
    images = axes.pop("image", "0")
    if isinstance(images, list):
        images = ",".join(str(i) for i in images)
    if not isinstance(images, str | int):
        raise GGLError(f"grid: axis image is {images!r}, allowed: a list of numbers, or '0:8'")
    for name in fixed:
        if name in axes:
            raise GGLError(f"grid: {name} is fixed and an axis; choose one")
        if name in ("defense", "defenses", "image", "indices", "seed"):
            axis = name.removesuffix("s") if name != "indices" else "image"
            raise GGLError(f"grid: [fixed]: {name} is an axis; write {axis} = [...] under [axes]")
    with errors.about("grid: [fixed]"):
        parts = replace(Parts(), **fixed)
    check_axes(axes)
    shown = {"preset": preset, "fixed": fixed, "axes": {**axes, "image": str(images)}}
    search = {name: value for name, value in fixed.items() if name in options_of(Search)}
    return GridFile({**shown, "exclude": exclude}, parts, search, axes)


def load_grid(file: GridFile, about: dict[str, Any] | None = None, **given: Any) -> Grid:
    """A :class:`ggl_jax.audit.run.Grid` of a grid, with images, model and prior loaded.

    Args:
        file: of :func:`read_grid` or :func:`grid_of`.
        about: entries for the folder's ``config.json``.
        **given: further arguments of :class:`ggl_jax.audit.cells.Inputs`.
    """
    inputs, _ = load_inputs(
        _first(file),
        file.fixed.judge,
        file.fixed.speed,
        indices=file.options["axes"]["image"],
        remedy="add a labels.csv (file,label) or fix label = 0",
        about={**(about or {}), "options": file.options},
        **given,
    )
    return sweep.plan(
        inputs,
        file.axes,
        exclude=file.options["exclude"],
        search=file.options["preset"],
        fixed=file.search,
        client=file.fixed.client,
    )


def _first(file: GridFile) -> Setup:
    """The setup with the first model and weights of the axes, which tell the number of classes."""
    setup, named = file.fixed.setup, file.axes.get("weights", [])
    read = [expand(one)[0] for one in named if one != "random"]
    weights = (read or ["random"])[0] if named else setup.weights
    model = expand(file.axes.get("model", [setup.model])[0])[0]
    return replace(setup, model=model, weights=weights)


def run(command: SweepCommand, argv: list[str]) -> int:
    """``ggl-jax sweep``."""
    _devices.join(
        command.coordinator, command.num_processes, command.process_id, command.distributed
    )
    mesh = _devices.mesh(command.running.shard)
    grid = load_grid(read_grid(command.grid), about(argv), mesh=mesh)
    return run_grid(grid, command.out or Path(command.grid.stem), command.running)
