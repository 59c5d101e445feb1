"""What every optimiser shares: checks, and the memory of the best candidate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax.errors import GGLError
from ggl_jax.types import NONFINITE, OK, Info, Optimizer, PyTree


class BestState(NamedTuple):
    """State of :func:`best_so_far`.

    Attributes:
        inner: the wrapped optimiser's state.
        latents: [r z], each restart's candidate of lowest loss so far (its starting point at
            first).
        losses: [r], their losses, float32 (+inf at first).
    """

    inner: PyTree
    latents: jax.Array
    losses: jax.Array


def best_so_far(optimizer: Optimizer) -> Optimizer:
    """Wrap an optimiser so that its state remembers each restart's candidate of lowest loss.

    The choice is made by the matching loss alone, never by comparison with a private image. A NaN
    loss never counts as best.

    Args:
        optimizer: any optimiser; the candidates of its steps are ordered by restart.

    Returns:
        An optimiser whose state is a :class:`BestState`.
    """

    def init(key, latents):
        return BestState(
            inner=optimizer.init(key, latents),
            latents=latents,
            losses=jnp.full(latents.shape[0], jnp.inf, jnp.float32),
        )

    def step(key, state, loss_fn):
        inner, info = optimizer.step(key, state.inner, loss_fn)
        num_restarts, num_dims = state.latents.shape
        losses = jnp.where(jnp.isnan(info.losses), jnp.inf, info.losses).astype(jnp.float32)
        losses = losses.reshape(num_restarts, -1)
        index = jnp.argmin(losses, axis=1)
        lowest = jnp.take_along_axis(losses, index[:, None], axis=1)[:, 0]
        candidates = info.latents.reshape(num_restarts, -1, num_dims)
        chosen = jnp.take_along_axis(candidates, index[:, None, None], axis=1)[:, 0]
        better = lowest < state.losses
        return (
            BestState(
                inner=inner,
                latents=jnp.where(better[:, None], chosen, state.latents),
                losses=jnp.where(better, lowest, state.losses),
            ),
            info,
        )

    return optimizer._replace(init=init, step=step)


def status_of(losses: jax.Array) -> jax.Array:
    """NONFINITE where not one of a step's losses is finite, else OK (int32 scalar).

    Single candidates may fail without harm (a population loses one member); a step without any
    finite loss cannot guide the search.
    """
    return jnp.where(jnp.any(jnp.isfinite(losses)), OK, NONFINITE).astype(jnp.int32)


def make_info(latents: jax.Array, losses: jax.Array) -> Info:
    """An :class:`Info` for one evaluation of each of ``latents``."""
    evaluations = jnp.asarray(latents.shape[0], jnp.int32)
    return Info(latents=latents, losses=losses, evaluations=evaluations, status=status_of(losses))


def require(condition: bool, argument: str, value, allowed: str) -> None:
    """Raise a one-line error that names the argument, its value and what is allowed."""
    if not condition:
        raise GGLError(f"{argument}: got {value!r}, allowed: {allowed}")
