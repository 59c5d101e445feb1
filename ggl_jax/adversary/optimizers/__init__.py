"""Searches over latents, all of one type, with budgets counted in gradient evaluations.

A new optimiser is one file that returns an :class:`ggl_jax.types.Optimizer` and one line in
:data:`OPTIMIZERS`.
"""

import inspect
from collections.abc import Callable

from ggl_jax.adversary.optimizers.adam import adam
from ggl_jax.adversary.optimizers.base import BestState, best_so_far
from ggl_jax.adversary.optimizers.cma_es import cma_es
from ggl_jax.adversary.optimizers.hybrid import hybrid
from ggl_jax.adversary.optimizers.lbfgs import lbfgs
from ggl_jax.adversary.optimizers.lbfgs_wolfe import lbfgs_wolfe
from ggl_jax.adversary.optimizers.turbo import turbo
from ggl_jax.errors import GGLError, did_you_mean
from ggl_jax.types import Optimizer

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "cma_es": cma_es,
    "hybrid": hybrid,
    "lbfgs": lbfgs,
    "lbfgs_wolfe": lbfgs_wolfe,
    "turbo": turbo,
}


def optimizer_options() -> dict[str, tuple[str, ...]]:
    """The options of all optimisers: name -> the optimisers that have it."""
    owners: dict[str, tuple[str, ...]] = {}
    for name, factory in OPTIMIZERS.items():
        for option in inspect.signature(factory).parameters:
            owners[option] = (*owners.get(option, ()), name)
    return owners


def make_optimizer(name: str, **options) -> Optimizer:
    """Build an optimiser by name, with those of the options that its factory takes.

    Args:
        name: a key of :data:`OPTIMIZERS`.
        **options: settings shared by all optimisers of a run (``steps``, ``population``,
            ``sigma0``, ``learning_rate``, ...). A factory gets those that it names; None means
            "the factory's own default".

    Raises:
        GGLError: for an unknown name, or an option that no optimiser has.
    """
    if name not in OPTIMIZERS:
        hint = did_you_mean(name, OPTIMIZERS, before="; ")
        known = ", ".join(sorted(OPTIMIZERS))
        raise GGLError(f"optimizer: unknown name {name!r}; known: {known}{hint}")
    owners = optimizer_options()
    for option in options:
        if option not in owners:
            hint = did_you_mean(option, owners, before="; ")
            raise GGLError(f"{option}: no optimizer has such an option{hint}")
    return OPTIMIZERS[name](
        **{k: v for k, v in options.items() if name in owners[k] and v is not None}
    )


__all__ = [
    "OPTIMIZERS",
    "BestState",
    "adam",
    "best_so_far",
    "cma_es",
    "hybrid",
    "lbfgs",
    "lbfgs_wolfe",
    "make_optimizer",
    "optimizer_options",
    "turbo",
]
