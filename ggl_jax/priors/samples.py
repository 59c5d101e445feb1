"""Sample grids: what a prior believes images look like."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ggl_jax.errors import GGLError
from ggl_jax.grammar import at_least
from ggl_jax.priors.decoding import check_labels, decode_each
from ggl_jax.types import Prior


def image_grid(images, *, num_columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Tile images [n h w c] in [0, 1], row by row, into one uint8 image on white.

    Args:
        images: [n h w c], c = 1 or 3; values outside [0, 1] are clipped, NaN becomes black.
        num_columns: images per row; by default the smallest square that holds them.
        gap: pixels between images.

    >>> image_grid(np.zeros((3, 4, 4, 3))).shape
    (10, 10, 3)
    """
    images = np.nan_to_num(np.asarray(images, np.float32))
    n, h, w, c = images.shape
    columns = num_columns or max(1, int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for index, image in enumerate(np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)):
        y, x = (index // columns) * (h + gap), (index % columns) * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return canvas


def save_grid(path, images, *, num_columns: int | None = None, scale: int = 2) -> Path:
    """Write :func:`image_grid` of images as a PNG, each pixel ``scale`` times enlarged."""
    canvas = image_grid(images, num_columns=num_columns)
    canvas = canvas.repeat(scale, axis=0).repeat(scale, axis=1)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.squeeze(-1) if canvas.shape[-1] == 1 else canvas).save(path, "PNG")
    except OSError as error:
        raise GGLError(f"cannot write the sample grid {path}: {error}") from error
    return path


def samples(
    prior: Prior, params, key, num: int, *, labels=None, path=None, num_columns: int | None = None
) -> jax.Array:
    """Draw ``num`` images from the prior and, given a path, writes them as a PNG grid.

    Args:
        prior: any prior.
        params: its parameters.
        key: typed key; the same key gives the same images.
        num: number of images, at least 1.
        labels: int [num] for class-conditional priors; by default classes evenly spaced over all.
        path: where the PNG goes; nothing is written when None.
        num_columns: images per row of the grid.

    Returns:
        Images [num h w c], float32 in [0, 1].

    Raises:
        GGLError: ``num`` below 1, a label that the prior does not know, or the file cannot be
            written.
    """
    at_least(1, num=num)
    if labels is None:
        labels = jnp.arange(num) * (prior.num_classes or 1) // num
    check_labels(prior, labels)
    latents = prior.sample_latent(key, num)
    images = jnp.concatenate(decode_each(prior, params, latents, labels))
    if path is not None:
        save_grid(path, images, num_columns=num_columns)
    return images
