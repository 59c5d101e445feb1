"""Gradient matching: how far each candidate's own update lies from the observed one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import Distance, resolve_distance
from ggl_jax.adversary.matching.direct import direct_losses, in_chunks
from ggl_jax.errors import GGLError
from ggl_jax.types import Defense, Model, PyTree

METHODS = ("auto", "direct")

__all__ = ["matching_loss"]


def matching_loss(
    model: Model,
    variables: PyTree,
    observed: PyTree,
    *,
    defense: Defense | None = None,
    estimated: PyTree | None = None,
    distance: str | Distance = "squared_l2",
    fidelity: str = "paper",
    method: str = "auto",
    chunk_size: int | None = None,
    local_steps: int = 1,
    learning_rate: float = 0.01,
    precision: str | None = None,
) -> Callable:
    """The loss that every attack minimises."""
    if method not in METHODS:
        raise GGLError(f"method: got {method!r}, allowed: {', '.join(METHODS)}")
    if chunk_size is not None and chunk_size < 1:
        raise GGLError(f"chunk_size: got {chunk_size!r}, allowed: whole numbers of at least 1")
    distance = resolve_distance(distance, fidelity=fidelity)
    simulate = None if defense is None else lambda update: defense.simulate(estimated, update)
    losses_of = direct_losses(
        model,
        variables,
        observed,
        simulate=simulate,
        distance=distance,
        local_steps=local_steps,
        learning_rate=learning_rate,
    )

    def loss(images: jax.Array, labels: jax.Array) -> jax.Array:
        labels = jnp.asarray(labels)
        if images.ndim != 5:
            raise GGLError(f"images: got shape {images.shape}, allowed: [n b h w c]")
        shared = 1 if jnp.issubdtype(labels.dtype, jnp.integer) else 2
        if labels.ndim == shared:
            labels = jnp.broadcast_to(labels, (images.shape[0], *labels.shape))
        size = images.shape[0] if chunk_size is None else chunk_size
        with jax.default_matmul_precision(precision):
            return in_chunks(losses_of, size, images, labels)

    return loss
