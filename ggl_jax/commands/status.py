"""``ggl-jax status``: how far a sweep or audit is."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import tyro

from ggl_jax.audit import folder
from ggl_jax.audit.tables import grouped
from ggl_jax.commands._shared import say, tell


@dataclasses.dataclass(frozen=True)
class StatusCommand:
    """Say what of a sweep or audit is done, failed and left, and how long the rest takes."""

    folder: tyro.conf.Positional[Path]
    """Folder of ggl-jax sweep or audit, finished or running."""


def run(command: StatusCommand, argv: list[str]) -> int:
    """``ggl-jax status``."""
    records = folder.read(command.folder)
    tell(records, most=len(records.failures))
    seconds = remaining(records)
    if records.left and seconds is not None:
        left_time = datetime.timedelta(seconds=round(seconds))
        say(f"About {left_time} left at the pace of the finished cells.")
    return 0


def remaining(records) -> float | None:
    """Seconds that the cells left will take, at the finished ones' pace; None before the first.

    The pace is that of cells of the same defense, where there are any: a defense's simulation is
    what makes evaluations dear.
    """
    if not records.rows:
        return None

    def pace(rows: list[dict[str, Any]]) -> float:
        spent, done = (
            sum(row[name] / row.get("parts", 1) for row in rows)
            for name in ("seconds", "evaluations")
        )
        return spent / max(done, 1.0)

    usual, by_defense = pace(records.rows), grouped(records.rows, lambda row: row["defense"])
    known = {defense: pace(rows) for defense, rows in by_defense.items()}
    left = [records.cells[cell] for cell in records.left]
    return sum(one["evaluations"] * known.get(one.get("defense", ""), usual) for one in left)
