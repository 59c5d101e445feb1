"""Gradient matching: how far each candidate's own update lies from the observed one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import EXACT_BELOW, Distance, resolve_distance
from ggl_jax.adversary.matching.direct import direct_losses, in_chunks
from ggl_jax.adversary.matching.fused import fused_losses
from ggl_jax.adversary.matching.program import trace
from ggl_jax.errors import GGLError
from ggl_jax.types import Defense, Factored, Model, PyTree

METHODS = ("auto", "fused", "direct")

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
    exact_below: float = EXACT_BELOW,
) -> Callable:
    """The loss that every attack minimises."""
    if method not in METHODS:
        raise GGLError(f"method: got {method!r}, allowed: {', '.join(METHODS)}")
    if chunk_size is not None and chunk_size < 1:
        raise GGLError(f"chunk_size: got {chunk_size!r}, allowed: whole numbers of at least 1")
    distance = resolve_distance(distance, fidelity=fidelity)

    def simulate(update):
        return update if defense is None else defense.simulate(estimated, update)

    factored = None
    if defense is None:
        factored = Factored()
    elif defense.factor is not None:
        factored = defense.factor(estimated)

    def losses_for(shape, dtype):
        program = trace(model, variables, jax.ShapeDtypeStruct(shape, dtype))
        if method != "direct" and local_steps == 1:
            fused = fused_losses(
                program,
                variables,
                observed,
                simulate=simulate,
                factored=factored,
                distance=distance,
                exact_below=exact_below,
            )
            if fused is not None:
                return fused
        return direct_losses(
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
            return in_chunks(losses_for(images.shape[1:], images.dtype), size, images, labels)

    return loss
