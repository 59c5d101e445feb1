"""``ggl-jax train-prior``: train a generator on public images."""

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ggl_jax import checkpoint
from ggl_jax.commands._shared import AuditBar, command_of, say
from ggl_jax.errors import GGLError
from ggl_jax.priors.wgan_gp import Config


@dataclasses.dataclass(frozen=True)
class PriorTraining:
    """What the trainings of a prior and of its denoiser are told."""

    data: tuple[str, ...]
    """Training files: .npz with uint8 images [n h w 3] (of a new prior 32x32, and, for
    --conditional, labels [n]). FILE*2 is drawn twice as often."""
    trained_on: tuple[str, ...] = ()
    """Names of the data sets behind the files, such as celeba lfw: an audit refuses private images
    from them."""
    export: Path | None = None
    """Write the prior (weights and card) to this folder when done, for --prior; a denoiser's not
    while it does worse than no denoising."""


@dataclasses.dataclass(frozen=True)
class TrainPriorCommand(PriorTraining):
    """Train a face generator (DCGAN with WGAN-GP) on your own public images.

    Writes checkpoints, loss curves and sample grids as it goes; Ctrl-C saves, and the same command
    goes on from there.
    """

    out: Path = Path("prior")
    """Folder for checkpoints, losses.csv, losses.png and sample grids."""
    licence_note: str = "see the licences of the training data"
    """What the card says about using the weights."""
    conditional: bool = False
    """Train a class-conditional generator: it learns the files' labels, and attacks give it the
    class that they inferred."""
    config: Config = dataclasses.field(default_factory=Config)


def weighted(command: PriorTraining) -> list[tuple[str, float]]:
    """Files and weights, from FILE or FILE*WEIGHT, once it is known that the export is free."""
    if command.export is not None:
        checkpoint.check_free(command.export)  # rather than after hours
    files = []
    for entry in command.data:
        path, _, weight = entry.partition("*")
        try:
            files.append((path, float(weight or 1)))
        except ValueError:
            raise GGLError(f"data: {entry!r}: the weight after * must be a number") from None
    return files


def trained(train: Callable, steps: int) -> Any:
    """The last state of ``train(show)``, which calls ``show(step, loss)``; None if interrupted.

    A stop by the system saves as Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with AuditBar() as bar:
        state = train(lambda step, loss: bar("training", 0, 1, step / steps, loss))
    if state.step < steps:
        say(f"Interrupted after {state.step} steps. The same command goes on from there.")
        return None
    return state


def run(command: TrainPriorCommand, argv: list[str]) -> int:
    """``ggl-jax train-prior``."""
    from ggl_jax.priors import training

    files, config = weighted(command), command.config
    if command.conditional and config.num_classes is None:
        config = dataclasses.replace(config, num_classes=training.count_classes(files))

    def train(show):
        def progress(step, metrics):
            show(step, metrics["wasserstein"])

        return training.train(config, files, command.out, progress=progress)

    if trained(train, config.steps) is None:
        return 130
    if command.export is not None:
        training.export(
            command.out,
            command.export,
            trained_on=command.trained_on,
            licence_note=command.licence_note,
            command=command_of(argv),
        )
        say(f"Exported to {command.export}; use it with --prior {command.export}")
    return 0
