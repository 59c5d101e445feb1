"""``ggl-jax report``: a sweep or audit as one HTML page and Markdown."""

import dataclasses
from pathlib import Path

import tyro

from ggl_jax.audit import folder as folders
from ggl_jax.commands._shared import say, write_report
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Write a report of a sweep or audit: one self-contained HTML page, and Markdown.

    Works while a sweep still runs, on what is finished.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folder of ggl-jax sweep or ggl-jax audit; with --compare, two."""
    compare: bool = False
    """Compare two folders A and B, paired by image."""
    out: Path | None = None
    """Folder for the report; by default the results' own, or here for a comparison."""


def run(command: ReportCommand, argv: list[str]) -> int:
    """``ggl-jax report``."""
    from ggl_jax.audit import report

    wanted = 2 if command.compare else 1
    if len(command.folders) != wanted:
        raise GGLError(f"folders: got {len(command.folders)}, allowed: one, or two with --compare")
    records = [folders.read(folder) for folder in command.folders]
    if command.compare:
        compared = report.comparison(*records)
        path = report.write(compared, command.out or Path("."), "comparison")
        say(f"{path} and {path.with_suffix('.md')}")
    else:
        write_report(records[0], command.out)
    return 0
