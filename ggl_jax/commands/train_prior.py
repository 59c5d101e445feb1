"""``ggl-jax train-prior``: train a generator on public images."""

import dataclasses
import shlex
from pathlib import Path

from ggl_jax.commands._shared import console, fields_of
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class TrainPriorCommand:
    """Train a face generator (DCGAN with WGAN-GP) on your own public images.

    Writes checkpoints, loss curves and sample grids as it goes; Ctrl-C saves, and the same command
    goes on from there.
    """

    data: tuple[str, ...]
    """Training files: .npz with uint8 images [n 32 32 3] and, for --conditional, labels [n].
    FILE*2 is drawn twice as often."""
    out: Path = Path("prior")
    """Folder for checkpoints, losses.csv, losses.png and sample grids."""
    trained_on: tuple[str, ...] = ()
    """Names of the data sets behind the files, such as celeba lfw: an audit refuses private images
    from them."""
    licence_note: str = "see the licences of the training data"
    """What the card says about using the weights."""
    width: int = 64
    """Channels before the generator's last layer (the paper: 128)."""
    latent_dim: int = 128
    """Size of the latent vector."""
    steps: int = 20_000
    """Generator updates."""
    critic_steps: int = 5
    """Critic updates for each generator update."""
    batch_size: int = 64
    """Images per update."""
    learning_rate: float = 1e-4
    """Step size of both Adams."""
    penalty: float = 10.0
    """Weight of the gradient penalty."""
    ema_decay: float = 0.999
    """Decay of the average of the generator's weights that is exported."""
    holdout: int = 256
    """Images of the first file to keep out of training."""
    flips: bool = True
    """Mirror images at random."""
    conditional: bool = False
    """Train a class-conditional generator: it learns the files' labels, and attacks give it the
    class that they inferred."""
    seed: int = 0
    """Seed of weights, batches and held-out images."""
    export: Path | None = None
    """Write the trained prior (weights and card) to this folder when done, for --prior."""


def run(command: TrainPriorCommand, argv: list[str]) -> int:
    """``ggl-jax train-prior``."""
    from ggl_jax.priors import wgan_gp

    files = []
    for entry in command.data:
        path, _, weight = entry.partition("*")
        try:
            files.append((path, float(weight or 1)))
        except ValueError:
            raise GGLError(f"data: {entry!r}: the weight after * must be a number") from None
    options = fields_of(wgan_gp.Config, command)
    if command.conditional:
        options["num_classes"] = wgan_gp.count_classes(files)
    config = wgan_gp.Config(**options)
    wgan_gp.train(config, files, command.out)
    if command.export is not None:
        wgan_gp.export(
            command.out,
            command.export,
            trained_on=command.trained_on,
            licence_note=command.licence_note,
            command="ggl-jax " + shlex.join(argv),
        )
        console.print(f"Exported to {command.export}; use it with --prior {command.export}")
    return 0
