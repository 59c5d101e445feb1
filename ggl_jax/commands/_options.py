"""Options that depend on others: the search that a preset has for an attack and an optimiser."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from ggl_jax.adversary.attacks import PRESETS, search_of
from ggl_jax.spec import Search

Preset = Literal["quick", "standard", "paper", "code"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the defaults of the other options hang on, read before them."""

    preset: str | None = None
    attack: str | None = None
    optimizer: str | None = None
    config: Path | None = None

    @property
    def search(self) -> Search:
        """The search that was chosen, each option at its preset's value."""
        # An unknown preset is refused when all options are read.
        preset = self.preset if self.preset in PRESETS else "quick"
        assert preset is not None
        return search_of(preset, self.attack, self.optimizer)


def choice_of(argv: list[str]) -> Choice:
    """The choice among a command's arguments, whatever else these are."""
    return tyro.cli(Choice, args=argv, return_unknown_args=True, add_help=False)[0]
