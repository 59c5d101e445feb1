"""Options of several subcommands: how a grid is run, and the search that a preset has."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from ggl_jax.adversary.attacks import PRESETS, search_of
from ggl_jax.spec import Client, Judge, Search, Setup, Speed

Preset = Literal["quick", "standard", "paper", "code"]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What determines a result, and how fast it comes."""

    setup: Setup = dataclasses.field(default_factory=Setup)
    client: Client = dataclasses.field(default_factory=Client)
    search: Search = dataclasses.field(default_factory=Search)
    judge: Judge = dataclasses.field(default_factory=Judge)
    speed: Speed = dataclasses.field(default_factory=Speed)


@dataclasses.dataclass(frozen=True)
class Running:
    """How a grid is run."""

    dry_run: bool = False
    """Only say how many cells, programs and gradient evaluations it would be, and which cells
    cannot run. ggl-jax status tells the pace once some are finished."""
    extend: bool = False
    """Go on in a folder of another configuration: what is finished there stays."""
    retry_failed: bool = False
    """Try failed cells again."""
    shard: bool = False
    """Share the work out to all devices of this machine: the images of a batch where there are as
    many as devices (see instances), else each step's candidates."""


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
