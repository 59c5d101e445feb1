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
        latent: [z], the candidate of lowest loss so far (the first starting point at first).
        loss: its loss, float32 scalar (+inf at first).
    """

    inner: PyTree
    latent: jax.Array
    loss: jax.Array


def best_so_far(optimizer: Optimizer) -> Optimizer:
    """Wrap an optimiser so that its state remembers the candidate of lowest loss.

    The choice is made by the matching loss alone, never by comparison with a private image. A NaN
    loss never counts as best.

    Args:
        optimizer: any optimiser.

    Returns:
        An optimiser whose state is a :class:`BestState`.
    """

    def init(key, latents):
        return BestState(
            inner=optimizer.init(key, latents),
            latent=latents[0],
            loss=jnp.asarray(jnp.inf, jnp.float32),
        )

    def step(key, state, loss_fn):
        inner, info = optimizer.step(key, state.inner, loss_fn)
        losses = jnp.where(jnp.isnan(info.losses), jnp.inf, info.losses).astype(jnp.float32)
        index = jnp.argmin(losses)
        better = losses[index] < state.loss
        return (
            BestState(
                inner=inner,
                latent=jnp.where(better, info.latents[index], state.latent),
                loss=jnp.where(better, losses[index], state.loss),
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
