"""What several subcommands share: the console, their inputs, the environment, folders, progress."""

import dataclasses
import importlib.metadata as metadata
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ggl_jax import machine
from ggl_jax.audit import data as audit_data
from ggl_jax.client.models import get_model
from ggl_jax.client.updates import read_variables
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
    say("Interrupted. The same command goes on from here.")
    return 130


def command_of(argv: list[str]) -> str:
    """The command line, as a shell takes it."""
    return "ggl-jax " + shlex.join(argv)


def about(argv: list[str]) -> dict[str, Any]:
    """What results tell of where they come from."""
    return {"command": command_of(argv), "environment": environment()}


def determining(command: Any, *left_out: str) -> dict[str, Any]:
    """A command's options as ``config.json`` has them, without those that change no result."""
    without = ("out", "shard", *flat(Speed()), *left_out)
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


class Loaded(NamedTuple):
    """What a search on private images starts from.

    Attributes:
        setup: what it was loaded by.
        dataset: a :class:`ggl_jax.audit.data.Dataset`; its labels are there.
        prior: the generator.
        prior_params: its parameters.
        card: its card.
        model: the federated model, for the images' size and classes.
        variables: its weights, where they were read; None for random ones.
    """

    setup: Setup
    dataset: Any
    prior: Any
    prior_params: Any
    card: dict[str, Any]
    model: Any
    variables: Any = None

    def given(self, judge: Judge, speed: Speed, **more: Any) -> dict[str, Any]:
        """The arguments of :class:`ggl_jax.audit.cells.Inputs`."""
        judged = dataclasses.asdict(judge)
        return {
            "others": self.suspects(judged.pop("suspects")),
            "images": self.dataset.images,
            "labels": self.dataset.labels,
            "names": self.dataset.names,
            "instance_ids": self.dataset.indices,
            "model": self.model,
            "variables": self.variables,
            "prior": self.prior,
            "prior_params": self.prior_params,
            **judged,
            "speed": speed,
            **more,
        }

    def suspects(self, most: int) -> Any:
        """Images [m h w c] of the same data, none of them audited; None where there are none."""
        setup, size = self.setup, self.prior.image_shape[0]
        options = {"image_size": size, "labels": setup.label}
        left = np.setdiff1d(np.arange(self.dataset.size), self.dataset.indices)
        chosen = np.random.default_rng(setup.seed).permutation(left)[:most]
        if not len(chosen):
            return None
        return audit_data.load(setup.data, indices=sorted(chosen.tolist()), **options).images


def load_inputs(
    setup: Setup,
    *,
    indices: str | Sequence[int],
    unlabelled: int | None = None,
    remedy: str = "add a labels.csv (file,label) or give --label 0",
) -> Loaded:
    """Load the prior and the private images that it never saw, and build the model for both.

    Args:
        setup: images, prior and model by name.
        indices: which images.
        unlabelled: the label of every image where the data have none; None asks for labels.
        remedy: what the error for data without labels says to do.

    Raises:
        GGLError: what cannot be loaded, images that the prior was trained on, no labels, or weights
            of another number of classes.
    """
    prior, prior_params, card = load_prior(setup.prior)
    size = prior.image_shape[0]
    dataset = audit_data.load(setup.data, image_size=size, indices=indices, labels=setup.label)
    audit_data.check_prior_overlap(dataset, card, allow_held_out=True)
    labels = dataset.labels
    if labels is None:
        if unlabelled is None:
            raise GGLError(f"data: {setup.data} has no labels; {remedy}")
        labels = np.full(len(dataset.images), unlabelled, np.int32)
    classes = count_classes(dataset, labels, setup.num_classes, prior.num_classes)
    model, variables = load_model(setup, classes, prior.image_shape)
    dataset = dataset._replace(labels=labels)
    return Loaded(setup, dataset, prior, prior_params, card, model, variables)


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
    "controls": (0.95, 1.0),
}
_FIRST = 3.0


def _left(seconds: float) -> str:
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


class AuditBar:
    """Live progress on a terminal; elsewhere a line for each change of phase, and each minute."""

    def __init__(self):
        self.live = console.is_terminal
        self.last, self.printed = "", 0.0
        self.starts: dict[int, float] = {}
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not self.live,
        )

    def __enter__(self):
        self.bar.__enter__()
        self.task = self.bar.add_task("starting", total=1.0, shown="", left="")
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)

    def __call__(self, phase, number, total, fraction, loss):
        text = f"[{number + 1}/{total}] {phase}"
        shown = "" if loss is None else f"loss {loss:.4g}"
        seconds = time.perf_counter() - self.began
        self.starts.setdefault(number, seconds)
        first, *others = sorted(self.starts)
        start, end = _PHASES.get(phase.rpartition(": ")[2], (0.0, 1.0))
        done = start + fraction * (end - start)
        done = _FIRST * done if number == first else _FIRST + number - first - 1 + done
        done = min(done / (_FIRST + total - first - 1), 1.0)
        left = ""
        if len(others) > 1:  # the first one says little of them
            left = (total - number) * (self.starts[number] - self.starts[others[0]])
            left = _left(left / (number - others[0]))
        elif done > 0:
            left = _left(seconds * (1 - done) / done)
        if self.live:
            self.bar.update(self.task, description=text, completed=done, shown=shown, left=left)
            return
        parts = [text]
        if text == self.last:
            if seconds - self.printed < _QUIET_SECONDS:
                return
            parts += [f"{done:.0%} of all", shown] if shown else [f"{done:.0%} of all"]
        console.print(f"{seconds:7.1f} s  {', '.join(filter(None, [*parts, left]))}", markup=False)
        self.last, self.printed = text, seconds
