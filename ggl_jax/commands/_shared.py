"""What several subcommands share: the console, their inputs, the environment, folders, progress."""

import dataclasses
import importlib.metadata as metadata
import os
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ggl_jax import machine
from ggl_jax.audit import data as audit_data
from ggl_jax.audit import folder
from ggl_jax.audit.cells import Inputs
from ggl_jax.audit.run import Grid, run
from ggl_jax.client.models import get_model
from ggl_jax.client.updates import read_variables
from ggl_jax.commands._options import Running
from ggl_jax.errors import GGLError, did_you_mean
from ggl_jax.priors import load_prior
from ggl_jax.spec import Judge, Setup, Speed, flat

# Without emoji: in text of the user's, ":100:" is a range.
console = Console(emoji=False)


def say(text: str, **style: Any) -> None:
    """Print a line as it is: the user's names are no markup, and paths are not broken."""
    console.print(text, markup=False, soft_wrap=True, **style)


def stopped() -> int:
    """The exit code of a command that Ctrl-C ended, once that is said."""
    say("Interrupted. What is finished is kept; the same command goes on from here.")
    return 130


def command_of(argv: list[str]) -> str:
    """The command line, as a shell takes it."""
    return "ggl-jax " + shlex.join(argv)


def about(argv: list[str]) -> dict[str, Any]:
    """What results tell of where they come from."""
    return {"command": command_of(argv), "environment": environment()}


def determining(command: Any, *left_out: str) -> dict[str, Any]:
    """A command's options as ``config.json`` has them, without those that change no result."""
    without = ("out", *flat(Running()), *flat(Speed()), *left_out)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in flat(command).items()}
    return {k: v for k, v in plain.items() if k not in without}


def check_number(images: int, found: int, data: str) -> None:
    """Raise :class:`GGLError` where data have fewer images than were asked for."""
    if found < images:
        raise GGLError(
            f"images: got {images}, but {data} has {found}; give --images {found} or other --data"
        )


#: Where progress is not live, no longer than this without a line.
_QUIET_SECONDS = 60.0


def count_classes(dataset: Any, labels: Any, *known: int | None) -> int:
    """The federated model's classes: the first that is known, else those of the data, at least 2.

    Args:
        dataset: a :class:`ggl_jax.audit.data.Dataset`.
        labels: [n], its labels or those given in their place.
        *known: numbers that win over the data's, None where there is none.
    """
    for number in known:
        if number is not None:
            return number
    return max(2, dataset.num_classes or 0, int(max(labels)) + 1)


def load_inputs(
    setup: Setup,
    judge: Judge,
    speed: Speed,
    *,
    indices: str | Sequence[int],
    unlabelled: int | None = None,
    remedy: str = "add a labels.csv (file,label) or give --label 0",
    **more: Any,
) -> tuple[Inputs, dict[str, Any]]:
    """Load the prior and the private images that it never saw, and build the model for both.

    Args:
        setup: images, prior and model by name.
        judge: what results stand beside; suspects are of the same data, none of them audited.
        speed: how losses are computed.
        indices: which images.
        unlabelled: the label of every image where the data have none; None asks for labels.
        remedy: what the error for data without labels says to do.
        **more: further arguments of :class:`ggl_jax.audit.cells.Inputs`.

    Returns:
        The inputs of a run, and the prior's card.

    Raises:
        GGLError: what cannot be loaded, images that the prior was trained on, no labels, or weights
            of another number of classes.
    """
    prior, prior_params, card = load_prior(setup.prior)
    options: dict[str, Any] = {"image_size": prior.image_shape[0], "labels": setup.label}
    dataset = audit_data.load(setup.data, indices=indices, **options)
    audit_data.check_prior_overlap(dataset, card, allow_held_out=True)
    labels = dataset.labels
    if labels is None:
        if unlabelled is None:
            raise GGLError(f"data: {setup.data} has no labels; {remedy}")
        labels = np.full(len(dataset.images), unlabelled, np.int32)
    classes = count_classes(dataset, labels, setup.num_classes, prior.num_classes)
    model, variables = load_model(setup, classes, prior.image_shape)
    judged = dataclasses.asdict(judge)
    left = np.setdiff1d(np.arange(dataset.size), dataset.indices)
    drawn = np.random.default_rng(setup.seed).permutation(left)[: judged.pop("suspects")].tolist()
    others = audit_data.load(setup.data, indices=sorted(drawn), **options).images if drawn else None
    inputs = Inputs(
        dataset.images,
        labels,
        model,
        prior=prior,
        prior_params=prior_params,
        variables=variables,
        names=dataset.names,
        instance_ids=dataset.indices,
        others=others,
        speed=speed,
        **judged,
        **more,
    )
    return inputs, card


def load_labelled(data: str, size: int, label: int | None = None) -> Any:
    """A :class:`ggl_jax.audit.data.Dataset` of ``size`` x ``size`` pixels, with labels.

    Raises:
        GGLError: what cannot be loaded, or has no labels.
    """
    dataset = audit_data.load(data, image_size=size, labels=label)
    if dataset.labels is None:
        raise GGLError(f"data: {data} has no labels; add a labels.csv (file,label)")
    return dataset


def load_model(setup: Setup, num_classes: int, image_shape: tuple[int, int, int]) -> Any:
    """The federated model and its weights, None for random ones; those that are read tell classes.

    Raises:
        GGLError: an unknown model, weights that are not its own, or another number of classes in
            them than the setup's.
    """
    if setup.weights == "random":
        return get_model(setup.model, num_classes=num_classes, image_shape=image_shape), None
    if not Path(setup.weights).exists():
        hint = did_you_mean(setup.weights, ["random"], before="; ")
        raise GGLError(
            f"weights: {setup.weights} does not exist, allowed: random, a file of tensors or a "
            f"checkpoint's folder{hint}"
        )
    model, variables = read_variables(setup.weights, setup.model, image_shape)
    if setup.num_classes not in (None, model.num_classes):
        raise GGLError(
            f"num_classes: got {setup.num_classes}, but {setup.weights} are weights of "
            f"{model.num_classes} classes; leave one of the two out"
        )
    return model, variables


def environment() -> dict[str, str]:
    """Versions and hardware that numbers depend on."""
    packages = ("ggl-jax", "jax", "jaxlib", "flax", "optax", "evosax", "orbax-checkpoint", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = machine.devices()
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "cpu": f"{machine.cpu_name()}, {os.cpu_count()} cores",
    }


#: Where the phases of an audit's first cell begin and end, as shares of its time, and how many of
#: the others take as long, which need not compile again: of the bare audit on two CPU cores. By it
#: the time left is guessed until a cell has been measured.
_PHASES = {
    "client's update": (0.05, 0.07),
    "label and defense estimation": (0.07, 0.17),
    "gradients of the bank": (0.17, 0.4),
    "compiling the search": (0.4, 0.72),
    "search": (0.72, 0.95),
    "controls": (0.95, 0.99),
    "bounds": (0.99, 1.0),
}
_FIRST = 3.0


def _left(seconds: float) -> str:
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


class AuditBar(Progress):
    """Live progress on a terminal; elsewhere a line for each change of phase, and each minute."""

    def __init__(self):
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.add_task("starting", total=1.0, shown="", left="")
        self.last, self.printed, self.began = "", 0.0, time.perf_counter()
        self.starts: dict[int, float] = {}

    def __call__(self, phase, number, total, fraction, loss):
        text = f"[{number + 1}/{total}] {phase}"
        shown = "" if loss is None else f"loss {loss:.4g}"
        seconds = time.perf_counter() - self.began
        self.starts.setdefault(number, seconds)
        first, *others = sorted(self.starts)
        start, end = _PHASES.get(phase.rpartition(": ")[2], (0.0, 1.0))
        share = start + fraction * (end - start)
        done = _FIRST * share if number == first else _FIRST + number - first - 1 + share
        done = min(done / (_FIRST + total - first - 1), 1.0)
        left = ""
        if len(others) > 1:  # the first one says little of them
            own, cells = seconds - self.starts[number], number - others[0]
            measured = self.starts[number] - self.starts[others[0]]
            rest = measured / cells - own
            if rest < 0:  # slower than those before it, so its own pace counts
                rest = own * (1 / max(share, 0.01) - 1)
            each = (measured + own + rest) / (cells + 1)
            left = _left(rest + (total - number - 1) * each)
        elif done > 0:
            left = _left(seconds * (1 - done) / done)
        if not self.disable:
            self.update(self.task, description=text, completed=done, shown=shown, left=left)
            return
        parts = [text]
        if text == self.last:
            if seconds - self.printed < _QUIET_SECONDS:
                return
            parts += [f"{done:.0%} of all", shown] if shown else [f"{done:.0%} of all"]
        console.print(f"{seconds:7.1f} s  {', '.join(filter(None, [*parts, left]))}", markup=False)
        self.last, self.printed = text, seconds


# --- runs ---------------------------------------------------------------------------------------


def dry_run(grid: Grid, out: Path, running: Running) -> int:
    """Say what a run would be; the exit code is 1 where some cells cannot run."""
    plan = {cell.id: cell.axes for cell in grid.cells}
    folder.prepare(out, grid.config or {}, plan, running.extend, dry=True)
    done = folder.read(out).finished if (out / "plan.json").exists() else set()
    left = [cell for cell in grid.cells if cell.id not in done]
    say(
        f"{len(grid.cells):,} cells ({len(grid.cells) - len(left):,} finished), "
        f"{len({cell.program for cell in left}):,} programs to compile, "
        f"{sum(cell.evaluations for cell in left):,} gradient evaluations."
    )
    broken = [f"cannot run: {folder.in_words(c.axes)}: {c.why}" for c in grid.cells if c.why]
    _say_first(broken)
    return int(bool(broken))


def tell(records: folder.Records, most: int = 5) -> None:
    """Say how far a run is, and the first cells that failed."""
    done, failed, left = (len(x) for x in (records.finished, records.failures, records.left))
    say(f"{len(records.cells):,} cells: {done:,} done, {failed:,} failed, {left:,} left.")
    lines = [
        f"failed: {folder.in_words(records.cells[c])}: {why}" for c, why in records.failures.items()
    ]
    _say_first(lines, most)


def _say_first(lines: Sequence[str], most: int = 5) -> None:
    for line in lines[:most]:
        say(line)
    if len(lines) > most:
        say(f"and {len(lines) - most:,} more")


def write_report(records: folder.Records, out: Path | None = None, *, shown: bool = False) -> None:
    """Write a run's report beside its results, or to ``out``, and say where it is."""
    from ggl_jax.audit import report  # here and not above: it loads matplotlib

    found = report.make(records)
    page = report.write(found, out or records.folder)
    if shown:
        console.print(report.terminal(found))
    say(f"Report: {page} and {page.with_suffix('.md')}")


def run_grid(
    grid: Grid,
    out: Path,
    running: Running,
    report: Callable[[folder.Records], None] = write_report,
) -> int:
    """Run a grid with progress, say how far it came, and report what is there; the exit code."""
    if running.dry_run:
        return dry_run(grid, out, running)
    first, evaluations = jax.process_index() == 0, sum(cell.evaluations for cell in grid.cells)
    if first:
        num = f"{len(grid.cells):,} cells, {evaluations:,} gradient evaluations"
        say(f"{num}. Results: {out}/")
    with AuditBar() as bar:
        done = run(
            grid,
            out,
            extend=running.extend,
            retry_failed=running.retry_failed,
            progress=bar if first else None,
        )
    if first:
        tell(done.records)
    if first and done.failures:
        say("Try these again with --retry-failed.")
    if first and done.rows:
        report(done.records)
    return stopped() if done.interrupted else int(bool(done.failures))
