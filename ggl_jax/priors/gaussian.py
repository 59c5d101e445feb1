"""The Gaussian prior: a mean image and what is uncertain about it, in whitened coordinates."""

import functools
import math

import jax
import jax.numpy as jnp

from ggl_jax.types import Prior


def gaussian(image_shape: tuple[int, int, int], rank: int) -> Prior:
    """Images ``mean + factor u`` with u ~ N(0, I): a Gaussian of covariance ``factor factor^T``.

    In these coordinates every direction is equally uncertain, so that first-order searches are well
    conditioned although pixels are strongly correlated.

    Args:
        image_shape: (h, w, c) = p pixels.
        rank: r, entries of u.

    Returns:
        A :class:`Prior` whose parameters are ``{"mean": [p], "factor": [p r]}``, of images in
        [0, 1]; ``init`` gives grey with zero covariance. Images are not clipped, so that gradients
        pass.

    >>> gaussian((8, 8, 3), 5).latent_dim
    5
    """
    h, w, c = (int(size) for size in image_shape)
    return _gaussian((h, w, c), rank)


@functools.cache
def _gaussian(shape: tuple[int, int, int], rank: int) -> Prior:
    # the same prior for the same shape, so that programs compiled for it are found again
    size = math.prod(shape)

    def init(key):
        del key
        return {"mean": jnp.full(size, 0.5), "factor": jnp.zeros((size, rank))}

    def apply(params, latents, labels=None):
        del labels
        return (params["mean"] + latents @ params["factor"].T).reshape(-1, *shape)

    def sample_latent(key, num):
        return jax.random.normal(key, (num, rank))

    return Prior(init, apply, sample_latent, rank, shape, "gaussian")
