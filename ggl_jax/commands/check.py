"""``ggl-jax check``: a verdict for continuous integration."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ggl_jax.audit import folder, tables
from ggl_jax.audit.check import canonical, check
from ggl_jax.commands._shared import say
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class CheckCommand:
    """Check that defenses leak no more than they may; for continuous integration.

    Compares the worse end of the 95 % interval over images, under the attack that got furthest, of
    a finished sweep or audit. Exit code 0: every defense keeps to every bound; 1: some do not (one
    line for each); 2: nothing can be claimed (unfinished cells, a single image, unusable input).
    Searches that stalled are named, whatever the exit code.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of ggl-jax sweep or ggl-jax audit."""
    max_psnr_over_control: float | None = None
    """Largest PSNR allowed above the stronger blind control, dB."""
    max_ssim: float | None = None
    """Largest structural similarity allowed, 0 to 1."""
    bounds: Annotated[
        tuple[str, ...], tyro.conf.arg(name="bound", metavar="SCORE=VALUE [SCORE=VALUE ...]")
    ] = ()
    """Bounds on other scores of the results, e.g. lpips=0.3: the nearest to the private image that
    is allowed (a smallest LPIPS, a largest PSNR)."""
    defenses: Annotated[
        tuple[str, ...], tyro.conf.arg(name="defense", metavar="DEFENSE [DEFENSE ...]")
    ] = ()
    """Check these only, in any spelling; by default all."""


def run(command: CheckCommand, argv: list[str]) -> int:
    """``ggl-jax check``."""
    records = folder.read(command.folder)
    given = {"gain": command.max_psnr_over_control, "ssim": command.max_ssim}
    bounds = {name: bound for name, bound in given.items() if bound is not None}
    for text in command.bounds:
        name, _, value = text.partition("=")
        try:
            bounds[name] = float(value)
        except ValueError:
            raise GGLError(f"bound: got {text!r}, allowed: SCORE=NUMBER, e.g. lpips=0.3") from None
    findings = check(records, bounds, defenses=command.defenses)
    violated = [finding for finding in findings if finding.violated]
    lines = [finding.sentence() for finding in violated]
    if not violated:
        names = dict.fromkeys(finding.group.defense for finding in findings)
        lines.append(f"within bounds (95 % interval): {', '.join(names)}")
    chosen = [canonical(defense) for defense in command.defenses]
    groups = tables.leakage(records.rows)
    lines += tables.troubles([g for g in groups if not chosen or g.defense in chosen])
    for line in lines:
        say(line)
    return 1 if violated else 0
