"""``ggl-jax import-prior``: foreign generators' weights as a prior."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ggl_jax.commands._shared import command_of, say
from ggl_jax.errors import GGLError
from ggl_jax.priors import import_prior


@dataclasses.dataclass(frozen=True)
class ImportPriorCommand:
    """Make a prior from the weights of a generator that another library trained.

    BigGAN-deep (the published PyTorch weights, pytorch_model.bin) or a DCGAN. The result is a
    folder for --prior.
    """

    generator: tyro.conf.Positional[
        Literal["biggan-deep-128", "biggan-deep-256", "biggan-deep-512", "dcgan"]
    ]
    """What the weights are of."""
    source: Annotated[Path, tyro.conf.arg(name="from")]
    """The weights: .bin, .pt or .pth (torch; only arrays are read, no code is run), .safetensors
    or .npz."""
    out: Path
    """Folder for the prior; its last part is the prior's name."""
    config: Path | None = None
    """BigGAN: the config.json beside the weights, if they are not the published ones. DCGAN: a
    JSON file with latent_dim, latents (normal or uniform) and layers; without it, the paper's
    generator."""
    truncation: float = 1.0
    """BigGAN: truncation of the latents, in (0, 1]."""
    image_size: int | None = None
    """BigGAN: resize its images to this side by averaging areas, such as 224."""
    trained_on: tuple[str, ...] | None = None
    """Names of the data sets behind the weights: an audit refuses private images from them. By
    default imagenet for BigGAN."""
    licence_note: str = "see the licence of the weights"
    """What the card says about using the weights."""
    num_samples: int = 8
    """Images to draw into samples.png, to see that the import is right; 0 for none."""


def run(command: ImportPriorCommand, argv: list[str]) -> int:
    """``ggl-jax import-prior``."""
    if command.out.exists():
        raise GGLError(f"out: {command.out} exists; choose another --out, or remove it first")
    import_prior(**dataclasses.asdict(command), command=command_of(argv))
    say(f"Imported to {command.out}; use it with --prior {command.out}")
    return 0
