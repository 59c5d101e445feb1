"""A long search's state on disk, so that a run that was killed goes on from there."""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ggl_jax import checkpoint
from ggl_jax.errors import GGLError
from ggl_jax.types import PyTree

#: Two places in turn: while one is written, the other is whole.
_SLOTS = ("a", "b")


class Saved(NamedTuple):
    """A search's state after ``done`` steps."""

    done: int
    state: PyTree
    history: np.ndarray
    statuses: np.ndarray


class Checkpoints:
    """Where and how often searches keep their state.

    Args:
        folder: of these checkpoints alone; made when the first is due.
        seconds: at least so long between two, so that short searches write none.
        write: whether this process writes; others only read.
    """

    def __init__(self, folder: Path, *, seconds: float = 300.0, write: bool = True):
        self.folder, self.seconds, self.write = Path(folder), seconds, write
        self._last = time.monotonic()
        self._kept = False

    def stage(self, number: int) -> "Checkpoints":
        """Those of one stage of a search."""
        return self.part(f"stage-{number}")

    def part(self, name: str) -> "Checkpoints":
        """Those of one of several searches."""
        return Checkpoints(self.folder / name, seconds=self.seconds, write=self.write)

    def due(self, last: bool) -> bool:
        """Whether it is time for the next; a search that kept any also keeps its last state."""
        return time.monotonic() - self._last >= self.seconds or (last and self._kept)

    def save(self, identity: str, saved: Saved) -> None:
        """Keep a state.

        Raises:
            GGLError: the disk is full or not writable.
        """
        self._last, self._kept = time.monotonic(), True
        if not self.write:
            return
        leaves = {f"{i:05d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(saved.state))}
        tree = {"state": leaves, "history": saved.history, "statuses": saved.statuses}
        # Never over the newest one.
        newest = max(self._cards(), default=(0, _SLOTS[1]))[1]
        slot = self.folder / _SLOTS[newest == _SLOTS[0]]
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(slot, tree, {"identity": identity, "done": saved.done})

    def load(self, identity: str, template: PyTree) -> Saved | None:
        """The newest state of this very search; None where there is none that is whole.

        Args:
            identity: of :func:`identity`.
            template: the state's structure, of arrays or shapes.
        """
        for _, slot in sorted(self._cards(), reverse=True):
            try:
                tree, card = checkpoint.load(self.folder / slot)
            except GGLError:
                continue  # damaged: killed while it was written
            leaves = [tree["state"][name] for name in sorted(tree["state"])]
            shapes = [(x.shape, np.dtype(x.dtype)) for x in jax.tree.leaves(template)]
            if card.get("identity") != identity or shapes != [(x.shape, x.dtype) for x in leaves]:
                continue
            state = jax.tree.unflatten(jax.tree.structure(template), leaves)
            self._kept = True
            return Saved(card["done"], state, tree["history"], tree["statuses"])
        return None

    def clear(self) -> None:
        """Remove them all."""
        if self.write:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _cards(self) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        for slot in _SLOTS:
            try:
                found.append((checkpoint.load_card(self.folder / slot).get("done", 0), slot))
            except GGLError:
                continue
        return found
