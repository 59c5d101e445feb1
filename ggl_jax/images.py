"""The one place where image ranges are converted.

Public images are float32 NHWC in [0, 1]. Networks (the federated model and the generators) see
[-1, 1], as in the paper's published code.
"""

import jax


def to_signed(images: jax.Array) -> jax.Array:
    """Map images from the public range [0, 1] to the networks' range [-1, 1]."""
    return 2.0 * images - 1.0


def from_signed(images: jax.Array) -> jax.Array:
    """Map images from the networks' range [-1, 1] to the public range [0, 1]."""
    return 0.5 * (images + 1.0)
