"""``ggl-jax weights``: fetch published weights that do not ship with the project."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ggl_jax.audit import weights
from ggl_jax.commands._shared import command_of, say
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class WeightsCommand:
    """Fetch published weights and keep them for later audits: those of the LPIPS metric.

    They come from torchvision's and LPIPS' official addresses; the sha256 is checked. Files are
    read without running code in them. Downloads need torch once, to read the files:
    pip install 'ggl-jax[convert]'.
    """

    name: tyro.conf.Positional[Literal["lpips-vgg", "lpips-alex", "lpips-squeeze"]]
    """Which: lpips-vgg (553 MB to fetch, 59 MB kept; the paper's), lpips-alex (244 MB, 10 MB) or
    lpips-squeeze (5 MB, 3 MB)."""
    files: Annotated[
        tuple[Path, ...] | None, tyro.conf.arg(name="from", metavar="FILE [FILE ...]")
    ] = None
    """Read these files instead of downloading: .pth, .npz or .safetensors with torch's names. Give
    the network's file and LPIPS' linear layers, or one file with both. Only names and shapes are
    checked."""
    out: Path | None = None
    """Folder to keep them in; by default the user's cache folder. Audits look there, or in the
    folder that the environment variable GGL_JAX_WEIGHTS names."""


def run(command: WeightsCommand, argv: list[str]) -> int:
    """``ggl-jax weights``."""
    if command.files == ():
        raise GGLError("from: names no file; give one or more, or leave --from out to download")
    path = weights.install(
        command.name,
        given=command.files or (),
        out=command.out,
        command=command_of(argv),
    )
    say(f"{command.name} is in {path}")
    if command.out is not None and command.out.absolute() != weights.folder().absolute():
        say(f"Audits find it with {weights.FOLDER_VARIABLE}={command.out.absolute()}")
    return 0
