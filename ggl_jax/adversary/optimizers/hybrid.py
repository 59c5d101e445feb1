"""CMA-ES whose best candidates are refined by a few gradient steps."""

import jax.numpy as jnp
import optax

from ggl_jax.adversary.optimizers.base import make_info, require
from ggl_jax.adversary.optimizers.cma_es import Population, cma_es
from ggl_jax.spec import Count, Positive, ranged
from ggl_jax.trees import losses_and_gradients
from ggl_jax.types import Optimizer


@ranged
def hybrid(
    *,
    population: Population = 50,
    refine: Count = 5,
    refine_steps: Count = 5,
    refine_rate: Positive = 0.05,
    sigma0: Positive = 1.0,
    std_min: Positive = 1e-6,
) -> Optimizer:
    """CMA-ES with gradient refinement: a search over basins instead of points.

    In each generation the ``refine`` best candidates of every restart take ``refine_steps`` Adam
    steps. The lowest loss that each met on its way stands for its candidate when CMA-ES ranks the
    population. The samples themselves stay where they are, so the strategy keeps to its own
    distribution, and the refined points are reported for the memory of the best.

    One step costs ``restarts * (population + refine * (refine_steps + 1))`` gradient evaluations:
    each Adam step of a candidate counts one, as does the last look at where it ends.

    Args:
        population: candidates per restart and step, at least 4.
        refine: how many of them are refined, 1 to ``population``.
        refine_steps: Adam steps of each, at least 1.
        refine_rate: Adam's step size, > 0, in units of the latents.
        sigma0: initial step size of CMA-ES, > 0.
        std_min: its smallest step size, > 0.

    Returns:
        An :class:`Optimizer`.

    Edge cases:
        A refined candidate whose gradient is not finite stays where it is. Ties and NaN losses are
        ranked as by :func:`cma_es`.

    Reference:
        BasinCMA: Wampler and Popović (2009), "Optimal Gait and Form for Animal Locomotion"; Huh et
        al. (2020), "Transforming and Projecting Images into Class-conditional Generative
        Networks", who refine every candidate; here the best only, to spend gradients where they
        pay.
    """
    require(1 <= refine <= population, "refine", refine, f"1 to population ({population})")
    outer = cma_es(population=population, sigma0=sigma0, std_min=std_min)
    adam = optax.adam(refine_rate)

    def refined(latents, loss_fn):
        """All visited points [s n z] and their losses [s n], s = refine_steps + 1."""
        moments, visited = adam.init(latents), []
        # Unrolled: XLA runs a convolution inside a loop on one CPU thread only.
        for _ in range(refine_steps):
            losses, gradient = losses_and_gradients(loss_fn, latents)
            visited.append((latents, losses))
            finite = jnp.all(jnp.isfinite(gradient), axis=1, keepdims=True)
            updates, moments = adam.update(jnp.where(finite, gradient, 0.0), moments)
            latents = latents + jnp.where(finite, updates, 0.0)
        visited.append((latents, loss_fn(latents)))
        return tuple(jnp.stack(parts) for parts in zip(*visited, strict=True))

    def by_restart(num, sampled, visited):
        """Values of the sampled [r p ..] and visited [s r f ..] candidates, by restart."""
        rest = sampled.shape[1:]
        own = jnp.moveaxis(visited.reshape(refine_steps + 1, num, refine, *rest), 1, 0)
        parts = [sampled.reshape(num, population, *rest), own.reshape(num, -1, *rest)]
        return jnp.concatenate(parts, axis=1).reshape(-1, *rest)

    def step(key, state, loss_fn):
        report = {}

        def basin_loss_fn(latents):
            """Losses [n] of the population, those of the best replaced by their basins'."""
            losses = loss_fn(latents)
            num = latents.shape[0] // population
            rows = jnp.argsort(losses.reshape(num, population), axis=1)[:, :refine]
            rows = (rows + population * jnp.arange(num)[:, None]).reshape(-1)
            points, their_losses = refined(latents[rows], loss_fn)
            report["latents"] = by_restart(num, latents, points)
            report["losses"] = by_restart(num, losses, their_losses)
            lowest = jnp.min(jnp.where(jnp.isnan(their_losses), jnp.inf, their_losses), axis=0)
            # NaN stays NaN under a minimum, also where a refined point got out of it.
            return losses.at[rows].set(lowest)

        state, _ = outer.step(key, state, basin_loss_fn)
        return state, make_info(report["latents"], report["losses"])

    return Optimizer(
        init=outer.init,
        step=step,
        evaluations_per_step=lambda num_restarts: (
            num_restarts * (population + refine * (refine_steps + 1))
        ),
        name="hybrid",
    )
