"""Plain arguments: numbers, sizes, options, and images with their labels."""

from typing import Any

import numpy as np

from ggl_jax.errors import GGLError, explaining
from ggl_jax.gate.trying import brief
from ggl_jax.grammar import at_least
from ggl_jax.types import Model

#: Most classes of a model: a larger label is an identifier, and its last layer fills the memory.
MAX_CLASSES = 2**18


def as_image_shape(what: str, given: Any) -> tuple[int, int, int]:
    """``(h, w, c)``, three positive whole numbers."""
    try:
        shape = tuple(given)
    except TypeError:
        shape = ()
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in shape)
    if len(shape) != 3 or not whole or min(shape) < 1:
        raise GGLError(
            f"{what}={given!r}: give (height, width, channels), three positive integers, e.g. "
            "(32, 32, 3)"
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def check_classes(what: str, given: Any, least: int = 2) -> None:
    """A number of classes, from ``least`` to :data:`MAX_CLASSES`."""
    at_least(least, **{what: given})
    if given > MAX_CLASSES:
        raise GGLError(
            f"{what}={given!r}: give an integer of at most {MAX_CLASSES:,}; labels count from 0, "
            "so number the classes if they are identifiers"
        )


def as_options(name: str, given: Any, kind: type) -> Any:
    """Options of a kind; None for its defaults.

    Raises:
        GGLError: they are of another kind.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        way = f"; gx.search_of({given!r}) makes one" if isinstance(given, str) else ""
        raise GGLError(f"{name}: got {brief(given)}, allowed: gx.{kind.__name__}(...){way}")
    return given


def as_images(name: str, given: Any) -> np.ndarray:
    """Images as a float32 array.

    Raises:
        GGLError: they are no array of numbers.
    """
    what = f"{name}: got {brief(given)}, which is no array of numbers"
    with explaining(what, "give floats in [0, 1] of shape (n, h, w, c)"):
        return np.asarray(given, np.float32)


def as_suspects(given: Any, model: Model) -> np.ndarray:
    """Other images [m h w c] as an array, once they fit the model."""
    found = as_images("others", given)
    if found.ndim != 4 or not len(found) or found.shape[1:] != model.image_shape:
        raise GGLError(
            f"others: got shape {found.shape}, allowed: (m, *{model.image_shape}), at least one "
            "image; None for no test"
        )
    return found


def as_labels(given: Any) -> np.ndarray:
    """Labels as an array, whatever is in it.

    Raises:
        GGLError: they are no array.
    """
    what = f"labels: got {brief(given)}, which is no array"
    with explaining(what, "give one integer for each image"):
        return np.asarray(given)


def check_data(model: Model, images: np.ndarray, labels: np.ndarray) -> None:
    """Refuse images [n h w c] or labels [n] that do not fit the model."""
    if images.ndim and not len(images):
        raise GGLError("images: got none; give at least one")
    if images.ndim != 4 or images.shape[1:] != model.image_shape:
        raise GGLError(
            f"images: got shape {images.shape}, allowed: (n, *{model.image_shape}), as model "
            f"{model.name!r} takes them"
        )
    if not np.all(np.isfinite(images)) or images.min() < 0.0 or images.max() > 1.0:
        raise GGLError("images: values must be finite and lie in [0, 1]; divide uint8 by 255")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise GGLError(
            f"labels: got {labels.dtype} {labels.shape}, allowed: integers ({len(images)},), one "
            "per image; number classes that have names"
        )
    if labels.min() < 0 or labels.max() >= model.num_classes:
        raise GGLError(
            f"labels: got {labels.min()} to {labels.max()}, allowed: 0 to {model.num_classes - 1}; "
            "raise the model's number of classes"
        )
