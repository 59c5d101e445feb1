"""Which images a prior was not trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ggl_jax import files
from ggl_jax.errors import GGLError


def holdout_split(num: int, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split range(num) into indices to train on and indices to hold out.

    The held-out ones are the first ``holdout`` of a permutation that depends on ``seed`` alone
    (numpy's PCG64), so whoever knows the three numbers gets the same images.

    Args:
        num: number of images in the file.
        holdout: how many to hold out, in [0, num].
        seed: the run's seed.

    Returns:
        ``(train_indices, holdout_indices)``, both int64; the first sorted, the second in the
        permutation's order.

    Raises:
        GGLError: ``holdout`` outside [0, num].

    >>> train, held_out = holdout_split(6, 2, 0)
    >>> train.tolist(), held_out.tolist()
    ([0, 1, 4, 5], [3, 2])
    """
    if not 0 <= holdout <= num:
        raise GGLError(
            f"holdout={holdout} must lie in [0, {num}], the first file's number of images"
        )
    order = np.random.default_rng(seed).permutation(num)
    return np.sort(order[holdout:]), order[:holdout]


def held_out_of(card: Mapping[str, Any], entry: Mapping[str, Any]) -> list[int]:
    """The images of a training file (an entry of ``card["data"]``) that were held out."""
    if not entry.get("num_held_out"):
        return []
    seed = card["config"]["seed"]
    return holdout_split(entry["num_images"], entry["num_held_out"], seed)[1].tolist()


def held_out_indices(card: Mapping[str, Any], path: Path) -> list[int]:
    """The images in a prior's first training file that it was not trained on.

    Args:
        card: the prior's card.
        path: the file, which must be the very one that the card names (by its sha256).

    Raises:
        GGLError: the file is missing or another one, or the card names no held-out images.
    """
    try:
        first = card["data"][0]
        held_out = held_out_of(card, first)
        expected = first["sha256"]
    except (KeyError, IndexError, TypeError):
        raise GGLError("indices: the prior's card names no held-out images") from None
    if not path.is_file():
        raise GGLError(f"data: {path} does not exist")
    if files.sha256(path) != expected:
        raise GGLError(
            f"indices: held-out needs the prior's first training file, {first['file']} with "
            f"sha256 {expected[:12]}..., but {path} is another; give --indices numbers"
        )
    return held_out
