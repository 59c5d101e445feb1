"""What several defenses' server sides share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.types import Estimate, Factored, Path, PyTree, View


def with_slope_of(like: jax.Array, value: jax.Array) -> jax.Array:
    """``value``, with the derivative of ``like``: for rounding, whose own is zero everywhere.

    Reference: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
    """
    return jax.lax.stop_gradient(value) + (like - jax.lax.stop_gradient(like))


def nonzero(update: PyTree, noise: jax.Array | float) -> PyTree:
    """Which entries were shared, a pytree of booleans; all of them where noise lies on top."""
    noisy = jnp.asarray(noise) > 0
    return jax.tree.map(lambda y: (y != 0) | noisy, update)


def nothing_estimated(update: PyTree, head: Path, noise: jax.Array | float = 0.0) -> dict:
    """The estimate of a defense of whose parameters nothing is needed."""
    del update, head, noise
    return {}


def unchanged(estimated: PyTree, update: PyTree) -> PyTree:
    """The simulation of a defense under which candidates are compared as they are."""
    del estimated
    return update


def in_expectation(name: str, estimate, noise_std, rounds: str = "mean") -> View:
    """Of a defense whose result is the update on average: candidates are compared as they are."""
    return View(
        name,
        estimate,
        unchanged,
        lambda estimated: Factored(),
        adds_noise=True,
        noise_std=noise_std,
        rounds=rounds,
    )


def masking(name: str, estimate: Estimate, entry: str, **options: Any) -> View:
    """Of a defense that multiplies entries by what is estimated as ``entry``, and so candidates."""

    def simulate(estimated, update):
        return jax.tree.map(jnp.multiply, estimated[entry], update)

    return View(name, estimate, simulate, lambda found: Factored(mask=found[entry]), **options)


def add_draw(update: PyTree, draw: Callable[[int], jax.Array]) -> PyTree:
    """Add ``draw(number of entries)`` to an update, in each tensor's own type.

    One draw, cut up: with a key and a draw for each of ResNet-18's 62 tensors the program takes six
    times as long to compile.
    """
    leaves, treedef = jax.tree.flatten(update)
    ends = np.cumsum([leaf.size for leaf in leaves])
    noisy = [
        leaf + part.reshape(leaf.shape).astype(leaf.dtype)
        for leaf, part in zip(leaves, jnp.split(draw(int(ends[-1])), ends[:-1]), strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def root_mean(squares: PyTree, like: PyTree) -> jax.Array:
    """Square root of the mean over all entries of an update of a sum that each tensor has."""
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    return jnp.sqrt(jnp.sum(jnp.stack(jax.tree.leaves(squares))) / size).astype(jnp.float32)


def split_keys(key: jax.Array, update: PyTree) -> PyTree:
    """One key for every tensor, as a pytree."""
    leaves, treedef = jax.tree.flatten(update)
    return jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
