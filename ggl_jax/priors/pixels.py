"""The prior that knows nothing: an image is its own latent."""

import functools
import math

import jax

from ggl_jax.errors import GGLError
from ggl_jax.images import from_signed, to_signed
from ggl_jax.types import Prior


def pixels(image_shape: tuple[int, int, int]) -> Prior:
    """The identity prior, with which latent-space attacks become pixel-space attacks (DLG, IG).

    Latents are pixels in the networks' range [-1, 1], in which published step sizes are given.

    Args:
        image_shape: (h, w, c), each at least 1.

    Returns:
        A :class:`Prior` without parameters (``init`` gives an empty dict). A latent [h * w * c] is
        the image flattened row by row, channels last. ``apply`` only rescales and reshapes: values
        outside [-1, 1] pass through, so that gradients do too; keeping the box is the attack's
        business. ``sample_latent`` draws from U[-1, 1].

    Raises:
        GGLError: not three sizes of at least 1.

    >>> pixels((8, 8, 3)).latent_dim
    192
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise GGLError(f"pixels: image_shape={image_shape} must be (h, w, c), each at least 1")
    h, w, c = (int(size) for size in image_shape)
    return _pixels((h, w, c))


@functools.cache
def _pixels(shape: tuple[int, int, int]) -> Prior:
    # the same prior for the same shape, so that programs compiled for it are found again
    latent_dim = math.prod(shape)

    def init(key):
        del key
        return {}

    def apply(params, latents, labels=None):
        del params, labels
        return from_signed(latents.reshape(-1, *shape))

    def sample_latent(key, num):
        return jax.random.uniform(key, (num, latent_dim), minval=-1.0, maxval=1.0)

    return Prior(init, apply, sample_latent, latent_dim, shape, "pixels")


def pixels_of(images: jax.Array) -> jax.Array:
    """The latents of :func:`pixels` that give these images: [n b h w c] to points [n b*h*w*c]."""
    return to_signed(images).reshape(images.shape[0], -1)
