"""The one place where image ranges and sizes are converted.

Public images are float32 NHWC in [0, 1]. Networks (the federated model and the generators) see
[-1, 1], as in the paper's published code.
"""

import jax
import jax.numpy as jnp
import numpy as np


def to_signed(images: jax.Array) -> jax.Array:
    """Map images from the public range [0, 1] to the networks' range [-1, 1]."""
    return 2.0 * images - 1.0


def from_signed(images: jax.Array) -> jax.Array:
    """Map images from the networks' range [-1, 1] to the public range [0, 1]."""
    return 0.5 * (images + 1.0)


def assign(images: jax.Array, references: jax.Array, penalties: np.ndarray | None = None):
    """Which image belongs to which reference, by the Hungarian method on mean squared error.

    Args:
            images: [b h w c].
            references: [b h w c].
            penalties: [b b], added to the error of reference i and image j; None for none.

    Returns:
            [b] indices into ``images``.
    """
    from scipy.optimize import linear_sum_assignment

    a = np.asarray(references).reshape(len(references), 1, -1)
    b = np.asarray(images).reshape(1, len(images), -1)
    errors = np.mean((a - b) ** 2, axis=-1)
    return linear_sum_assignment(errors if penalties is None else errors + penalties)[1]


def _averaging(size: int, target: int, dtype) -> jax.Array:
    """The matrix [target size] whose row i averages the pixels that output pixel i touches."""
    row, column = jnp.arange(target)[:, None], jnp.arange(size)
    first, last = row * size // target, -((row + 1) * -size // target)
    return ((first <= column) & (column < last)).astype(dtype) / (last - first)


def area_resize(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resize images by averaging areas, as torch's ``interpolate(mode="area")``.

    Output pixel i is the plain mean of the input pixels floor(i H / h) to ceil((i + 1) H / h) - 1,
    in each direction: pixels that it touches in part count in full (adaptive average pooling).
    Linear in the images, keeps their range, and differentiable; enlarges too.

    Args:
        images: [b H W c], of a floating type.
        height: of the output, at least 1.
        width: of the output, at least 1.

    Returns:
        [b height width c]; the images themselves where the size is theirs already.
    """
    for axis, target in ((1, height), (2, width)):
        size = images.shape[axis]
        if size != target:
            matrix = _averaging(size, target, images.dtype)
            # accelerators' default precision would round the pixels to 10 bits
            mixed = jnp.tensordot(matrix, images, (1, axis), precision="highest")
            images = jnp.moveaxis(mixed, 0, axis)
    return images
