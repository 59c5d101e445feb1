"""What several subcommands share: the console, their inputs, the environment, folders, progress."""

import dataclasses
import math
import os
import platform
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ggl_jax import machine
from ggl_jax.errors import GGLError

# Without emoji: in text of the user's, ":100:" is a range.
console = Console(emoji=False)

#: Where progress is not live, no longer than this without a line.
_QUIET_SECONDS = 60.0


def fields_of(kind: type, command: Any) -> dict[str, Any]:
    """The options of a command that are fields of a dataclass of settings, too."""
    names = (field.name for field in dataclasses.fields(kind))
    return {name: getattr(command, name) for name in names if hasattr(command, name)}


#: The lowest values of options, the same in every subcommand that has them: whole numbers of at
#: least an int, finite numbers above a float.
LOWEST: dict[str, float] = {
    **{"seed": 0, "seeds": 1, "index": 0, "label": 0, "num_classes": 1, "images": 1},
    **{"suspects": 0, "batch_size": 1, "local_steps": 1, "local_learning_rate": 0.0},
    **{"steps": 1, "restarts": 1, "pool": 0, "population": 4, "finalists": 0},
    **{"final_steps": 1, "refine_steps": 1, "learning_rate": 0.0, "sigma0": 0.0},
    **{"chunk_size": 1, "memory": 0.0, "instances": 1, "num_controls": 1, "ceiling_steps": 1},
    **{"resolution": 2, "span": 0.0, "rounds": 1, "clients": 1, "test_images": 1},
}


def check_ranges(command: Any) -> None:
    """Refuse options below their lowest values (:data:`LOWEST`), by the options' own names.

    Args:
        command: a subcommand's options; None among them is not checked.

    Raises:
        GGLError: names the option, its value and what is allowed.
    """
    for name, low in LOWEST.items():
        value = getattr(command, name, None)
        whole = isinstance(low, int)
        if value is None or (value >= low if whole else low < value < math.inf):
            continue
        allowed = f"whole numbers of at least {low}" if whole else f"numbers above {low:g}"
        raise GGLError(f"{name}: got {value}, allowed: {allowed}")


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


class Inputs(NamedTuple):
    """What a search on private images starts from.

    Attributes:
        dataset: a :class:`ggl_jax.audit.data.Dataset`; its labels are there.
        prior: the generator.
        prior_params: its parameters.
        card: its card.
        model: the federated model, for the images' size and classes.
    """

    dataset: Any
    prior: Any
    prior_params: Any
    card: dict[str, Any]
    model: Any


def load_inputs(
    data: str,
    prior_name: str,
    *,
    indices: str | Sequence[int],
    label: int | None = None,
    unlabelled: int | None = None,
    remedy: str,
    model_name: str = "resnet18",
    num_classes: int | None = None,
    batch_norm: str | None = None,
) -> Inputs:
    """Load the prior and the private images that it never saw, and build the model for both.

    Args:
        data: private images, as for :func:`ggl_jax.audit.data.load`.
        prior_name: name or folder of a checkpoint.
        indices: which images.
        label: of every image, in place of the data's own.
        unlabelled: the label of every image where the data have none; None asks for labels.
        remedy: what the error for data without labels says to do.
        model_name: a key of :data:`ggl_jax.client.models.MODELS`.
        num_classes: the model's; by default those of a class-conditional prior, else of the data,
            at least 2.
        batch_norm: of a model that has it; None for the model's own default.

    Raises:
        GGLError: what cannot be loaded, images that the prior was trained on, or no labels.
    """
    import numpy as np

    from ggl_jax.audit import data as audit_data
    from ggl_jax.client.models import get_model
    from ggl_jax.priors import load_prior

    prior, prior_params, card = load_prior(prior_name)
    dataset = audit_data.load(data, image_size=prior.image_shape[0], indices=indices, labels=label)
    audit_data.check_prior_overlap(dataset, card, allow_held_out=True)
    labels = dataset.labels
    if labels is None:
        if unlabelled is None:
            raise GGLError(f"data: {data} has no labels; {remedy}")
        labels = np.full(len(dataset.images), unlabelled, np.int32)
    classes = count_classes(dataset, labels, num_classes, prior.num_classes)
    options = {} if batch_norm is None or model_name == "lenet" else {"batch_norm": batch_norm}
    model = get_model(model_name, num_classes=classes, image_shape=prior.image_shape, **options)
    return Inputs(dataset._replace(labels=labels), prior, prior_params, card, model)


def environment() -> dict[str, str]:
    """Versions and hardware that numbers depend on."""
    import importlib.metadata as metadata

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


class AuditBar:
    """Live progress on a terminal; elsewhere a line for each change of phase, and each minute.

    Args:
        audits: how many audits of equal size it will be the ``progress`` of, one after the other.
    """

    def __init__(self, audits: int = 1):
        self.audits = audits
        self.name, self.index = "", 0
        self.live = console.is_terminal
        self.last, self.printed = "", 0.0
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )

    def __enter__(self):
        self.bar.__enter__()
        self.task = self.bar.add_task("starting", total=1.0, shown="")
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)

    def begin(self, name: str, index: int) -> None:
        """The audit that follows: its name, and how many went before."""
        self.name, self.index = f"{name}: ", index

    def __call__(self, phase, number, total, fraction, loss):
        number, total = self.index * total + number, self.audits * total
        text = f"[{number + 1}/{total}] {self.name}{phase}"
        shown = "" if loss is None else f"loss {loss:.4g}"
        if self.live:
            self.bar.update(
                self.task, description=text, completed=number + fraction, total=total, shown=shown
            )
            return
        seconds, line = time.perf_counter() - self.began, text
        if text == self.last:
            if seconds - self.printed < _QUIET_SECONDS:
                return
            share = f"{(number + fraction) / total:.0%} of all"
            line = ", ".join(part for part in (text, share, shown) if part)
        console.print(f"{seconds:7.1f} s  {line}", markup=False)
        self.last, self.printed = text, seconds
