"""Statistical linearisation: ensemble Kalman steps from the updates that a population predicts."""

import jax
import jax.numpy as jnp

from ggl_jax.adversary.optimizers.base import make_info
from ggl_jax.adversary.optimizers.cma_es import Population
from ggl_jax.errors import GGLError
from ggl_jax.spec import Count, Positive, ranged
from ggl_jax.types import Loss, Optimizer


@ranged
def kalman(
    *,
    population: Population = 50,
    spread: Positive = 1.0,
    last_spread: Positive = 0.1,
    damping: Positive = 0.1,
    steps: Count = 20,
) -> Optimizer:
    """Gauss-Newton without derivatives: an ensemble Kalman step towards the observed update.

    Each restart's candidates are drawn around its mean, which is one of them. With C the ensemble's
    cross-covariances of latents u and updates g, the mean m moves by

        C_ug (C_gg + R)^-1 (y - g(m)),

    which needs the residuals' p x p inner products alone (:class:`ggl_jax.types.Products`), where
    the other searches see one number for each candidate. No derivative is taken, so it works where
    there is none (signs). One step costs ``restarts * population`` gradient evaluations, in one
    batch.

    An ensemble that moves as a whole stays in its first span and collapses there. This one is drawn
    anew in each step, so that a population smaller than the space sees all of it in turn.

    Args:
        population: candidates per restart and step, at least 4.
        spread: their standard deviation in the first step, > 0.
        last_spread: the same in the last step; it changes by the same factor in each.
        damping: R in units of the mean of C_gg's p eigenvalues, > 0. The noise that the server
            estimated is added to it, as large as it is for latents of variance 1.
        steps: length of the run, at least 1.

    Returns:
        An :class:`Optimizer`. ``init(key, latents[r z])`` takes the starting means.

    Raises:
        GGLError: in ``step``, where the loss is no :class:`ggl_jax.types.Loss`.

    Edge cases:
        Candidates whose loss is not finite have no part in the step; where the mean's own is not,
        it stays. Penalties enter as residuals with one entry, their square roots.

    Reference:
        Iglesias, Law and Stuart (2013), "Ensemble Kalman methods for inverse problems"; of its
        variants nearest to Chada, Chen and Sanz-Alonso (2021), "Iterative ensemble Kalman methods:
        a unified perspective with some new variants" (statistical linearisation).
    """

    def init(key, latents):
        del key
        return latents, jnp.zeros((), jnp.int32)

    def step(key, state, loss_fn):
        if not isinstance(loss_fn, Loss):
            raise GGLError(
                "optimizer: kalman needs residuals, and the loss is a function of candidates "
                "alone; give a ggl_jax.types.Loss, as attacks do"
            )
        means, count = state
        restarts, size = means.shape
        share = jnp.minimum(count / max(steps - 1, 1), 1.0)
        width = spread * (last_spread / spread) ** share
        drawn = width * jax.random.normal(key, (restarts, population, size), means.dtype)
        offsets = drawn.at[:, 0].set(0.0)
        found = loss_fn.products(means[:, None] + offsets)

        def move(offsets, losses, inner, noise):
            """The mean's way, from the residuals' differences to its own."""
            valid = jnp.isfinite(losses) & jnp.isfinite(losses[0])
            differences = inner - inner[0] - inner[:, :1] + inner[0, 0]
            differences = jnp.where(valid[:, None] & valid, differences, 0.0)
            towards = jnp.where(valid, inner[:, 0] - inner[0, 0], 0.0)
            ridge = damping * jnp.trace(differences) / population + noise * size * width**2
            ridge = jnp.where(ridge > 0, ridge, 1.0)
            with jax.default_matmul_precision("highest"):
                system = differences + ridge * jnp.eye(population, dtype=inner.dtype)
                return -jnp.linalg.solve(system, towards) @ offsets

        moved = means + jax.vmap(move)(offsets, *found)
        moved = jnp.where(jnp.isfinite(moved), moved, means)
        latents = (means[:, None] + offsets).reshape(-1, size)
        return (moved, count + 1), make_info(latents, found.losses.reshape(-1))

    return Optimizer(
        init=init,
        step=step,
        evaluations_per_step=lambda num_restarts: num_restarts * population,
        name="kalman",
    )
