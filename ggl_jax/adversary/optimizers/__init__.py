"""Searches over latents, all of one type, with budgets counted in gradient evaluations.

A new optimiser is one file that returns an :class:`ggl_jax.types.Optimizer` and its name in
:data:`OPTIMIZERS`.
"""

from collections.abc import Callable

from ggl_jax import grammar
from ggl_jax.adversary.optimizers.adam import adam
from ggl_jax.adversary.optimizers.base import BestState, best_so_far
from ggl_jax.adversary.optimizers.cma_es import cma_es
from ggl_jax.adversary.optimizers.hybrid import hybrid
from ggl_jax.adversary.optimizers.kalman import kalman
from ggl_jax.adversary.optimizers.lbfgs import lbfgs
from ggl_jax.adversary.optimizers.lbfgs_wolfe import lbfgs_wolfe
from ggl_jax.adversary.optimizers.turbo import turbo
from ggl_jax.types import Optimizer

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = grammar.named(
    adam, cma_es, hybrid, kalman, lbfgs, lbfgs_wolfe, turbo
)
