"""``ggl-jax check``: a verdict for continuous integration."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ggl_jax.commands._shared import console


@dataclasses.dataclass(frozen=True)
class CheckCommand:
    """Check that defenses leak no more than they may; for continuous integration.

    Compares the upper end of the 95 % interval over images, under the attack that got furthest, of
    a finished sweep or audit. Exit code 0: every defense keeps to every bound; 1: some do not (one
    line for each); 2: nothing can be claimed (unfinished cells, a single image, unusable input).
    """

    folder: tyro.conf.Positional[Path]
    """Folder of ggl-jax sweep or ggl-jax audit."""
    max_psnr_over_control: float | None = None
    """Largest PSNR allowed above the stronger blind control, dB."""
    max_ssim: float | None = None
    """Largest structural similarity allowed."""
    defenses: Annotated[
        tuple[str, ...], tyro.conf.arg(name="defense", metavar="DEFENSE [DEFENSE ...]")
    ] = ()
    """Check these only, written as in the results; by default all."""


def run(command: CheckCommand, argv: list[str]) -> int:
    """``ggl-jax check``."""
    from ggl_jax.audit import folder
    from ggl_jax.audit.check import check

    findings = check(
        folder.read(command.folder),
        max_psnr_over_control=command.max_psnr_over_control,
        max_ssim=command.max_ssim,
        defenses=command.defenses,
    )
    violated = [finding for finding in findings if finding.violated]
    for finding in violated:
        console.print(finding.sentence(), markup=False, soft_wrap=True, highlight=False)
    if not violated:
        names = list(dict.fromkeys(finding.defense for finding in findings))
        shown = f"within bounds (upper end of the 95 % interval): {', '.join(names)}"
        console.print(shown, markup=False, soft_wrap=True, highlight=False)
    return 1 if violated else 0
