"""``ggl-jax status``: how far a sweep or audit is."""

import dataclasses
import datetime
from pathlib import Path

import tyro

from ggl_jax.audit import folder
from ggl_jax.commands._shared import say


@dataclasses.dataclass(frozen=True)
class StatusCommand:
    """Say what of a sweep or audit is done, failed and left, and how long the rest takes."""

    folder: tyro.conf.Positional[Path]
    """Folder of ggl-jax sweep or audit, finished or running."""


def run(command: StatusCommand, argv: list[str]) -> int:
    """``ggl-jax status``."""
    records = folder.read(command.folder)
    done, failed, left = len(records.finished), len(records.failures), len(records.left)
    say(f"{len(records.cells):,} cells: {done:,} done, {failed:,} failed, {left:,} left.")
    seconds = remaining(records)
    if left and seconds is not None:
        left_time = datetime.timedelta(seconds=round(seconds))
        say(f"About {left_time} left at the pace of the finished cells.")
    for cell, reason in records.failures.items():
        shown = ", ".join(f"{k} {v}" for k, v in records.cells[cell].items() if k != "evaluations")
        say(f"failed: {shown}: {reason}")
    return 0


def remaining(records) -> float | None:
    """Seconds that the cells left will take, at the finished ones' pace; None before the first.

    The pace is that of cells of the same defense, where there are any: a defense's simulation is
    what makes evaluations dear.
    """
    spent: dict[str, list[float]] = {}
    for row in records.rows:
        for key in (row["defense"], ""):
            total = spent.setdefault(key, [0.0, 0.0])
            for place, name in enumerate(("seconds", "evaluations")):
                total[place] += row[name] / row.get("parts", 1)
    if not spent:
        return None
    seconds = 0.0
    for cell in records.left:
        known = spent.get(records.cells[cell].get("defense", ""), spent[""])
        seconds += records.cells[cell]["evaluations"] * known[0] / max(known[1], 1.0)
    return seconds
