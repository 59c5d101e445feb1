"""CMA-ES on the device, through evosax."""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from ggl_jax.adversary.optimizers.base import make_info
from ggl_jax.spec import AtLeast, Positive, ranged
from ggl_jax.types import Optimizer


@functools.cache
def _strategy(population: int, num_dims: int) -> Any:
    # evosax's jit cache is keyed by the instance, so there is one for each size. Its default
    # metrics stack whole vectors at every step; we report through Info instead.
    # It holds small arrays: they must be real ones, also when the first use is inside a jit.
    with jax.ensure_compile_time_eval():
        # Importing it computes something, after which jax.distributed could not be started.
        from evosax.algorithms import CMA_ES

        return CMA_ES(
            population_size=population,
            solution=jnp.zeros(num_dims),
            metrics_fn=lambda *_: {},
        )


#: Candidates per restart and step.
Population = Annotated[int, AtLeast(4)]


@ranged
def cma_es(
    *, population: Population = 50, sigma0: Positive = 1.0, std_min: Positive = 1e-6
) -> Optimizer:
    """Covariance matrix adaptation evolution strategy (the paper's gradient-free search).

    Each restart keeps its own mean and covariance; the candidates of all restarts are evaluated in
    one call of the loss. One step costs ``restarts * population`` gradient evaluations.

    Args:
        population: candidates per restart and step, at least 4. The published code
            asks for 50 an update, in effect populations of 4 + floor(3 ln 128) = 18.
        sigma0: initial step size, > 0. 1.0 in the paper's published code (0.47 in some versions).
        std_min: smallest step size, > 0: below it float32 candidates no longer differ.

    Returns:
        An :class:`Optimizer`. ``init(key, latents[r z])`` takes the starting means.

    Edge cases:
        Losses enter as ranks, since the method only uses their order: ties are broken by index
        (evosax's recombination weights do not sum to one under ties), and NaN or infinite losses
        rank last. A step without any finite loss reports the status NONFINITE.

    Reference:
        Hansen, "The CMA Evolution Strategy: A Tutorial" (2016); paper, section 4 (800 updates).
    """

    def parameters(strategy):
        return strategy.default_params.replace(
            std_init=jnp.asarray(sigma0, jnp.float32), std_min=jnp.asarray(std_min, jnp.float32)
        )

    def init(key, latents):
        strategy = _strategy(population, latents.shape[1])
        state = jax.vmap(strategy.init, in_axes=(0, 0, None))(
            jax.random.split(key, latents.shape[0]), latents, parameters(strategy)
        )
        # evosax initialises with weakly typed scalars: the second step would compile anew.
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), state)

    def step(key, state, loss_fn):
        num_restarts, num_dims = state.mean.shape
        strategy = _strategy(population, num_dims)
        params = parameters(strategy)
        key_ask, key_tell = jax.random.split(key)
        # The strategy's own linear algebra is tiny and loses its symmetry in TF32.
        with jax.default_matmul_precision("highest"):
            candidates, state = jax.vmap(strategy.ask, in_axes=(0, 0, None))(
                jax.random.split(key_ask, num_restarts), state, params
            )
        latents = candidates.reshape(num_restarts * population, num_dims)
        losses = loss_fn(latents)
        ranks = jnp.argsort(jnp.argsort(losses.reshape(num_restarts, population), axis=1), axis=1)
        with jax.default_matmul_precision("highest"):
            state, _ = jax.vmap(strategy.tell, in_axes=(0, 0, 0, 0, None))(
                jax.random.split(key_tell, num_restarts),
                candidates,
                ranks.astype(jnp.float32),
                state,
                params,
            )
        return state, make_info(latents, losses)

    return Optimizer(
        init=init,
        step=step,
        evaluations_per_step=lambda num_restarts: num_restarts * population,
        name="cma_es",
    )
