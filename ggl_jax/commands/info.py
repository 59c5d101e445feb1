"""``ggl-jax info``: versions, devices, weights and data."""

import dataclasses
import os
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ggl_jax.audit import weights
from ggl_jax.audit.data import load
from ggl_jax.checkpoint import load_card, shipped
from ggl_jax.commands._shared import console, environment


@dataclasses.dataclass(frozen=True)
class InfoCommand:
    """Show versions, devices, and the data and weights that were found."""


def run(command: InfoCommand, argv: list[str]) -> int:
    """``ggl-jax info``."""
    table = Table("", "", show_header=False)
    for name, value in environment().items():
        table.add_row(name, escape(value))
    for name, folder in shipped().items():
        card = load_card(folder)
        trained = ", ".join(card.get("trained_on", ())) or "unknown data"
        table.add_row(f"prior {name}", escape(f"{folder} (trained on {trained})"))
    for name in weights.SOURCES:
        there = weights.installed().get(name)
        table.add_row(
            f"metric {name}", escape(str(there or f"absent; get it: ggl-jax weights {name}"))
        )
    for name in ("embedded", "embedded:faces", "embedded:nonfaces"):
        table.add_row(f"data {name}", f"{load(name, max_images=1).size} images")
    folder = Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")))
    prepared = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    told = f"{folder}: {', '.join(prepared) or 'nothing prepared'}"
    table.add_row("data tfds", escape(told))
    console.print(table)
    return 0
