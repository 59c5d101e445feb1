"""The direct matching loss: every candidate's gradient is formed, defended and compared."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import Distance
from ggl_jax.client.gradients import local_update
from ggl_jax.types import Model, PyTree


def in_chunks(function: Callable, chunk_size: int, *arrays: PyTree) -> PyTree:
    """Apply ``function`` to at most ``chunk_size`` candidates at once.

    The chunks have equal size, as few and as small as ``chunk_size`` allows; the last is filled up
    with copies of the first candidate, whose results are dropped.

    Args:
        function: maps pytrees of arrays [m, ...] to a pytree of arrays [m, ...].
        chunk_size: at least 1.
        arrays: pytrees of arrays [n, ...].

    Returns:
        A pytree of arrays [n, ...].
    """
    num = jax.tree.leaves(arrays)[0].shape[0]
    if num <= chunk_size:
        return function(*arrays)
    num_chunks = math.ceil(num / chunk_size)
    size = math.ceil(num / num_chunks)

    def split(array):
        fill = jnp.broadcast_to(array[:1], (num_chunks * size - num, *array.shape[1:]))
        return jnp.concatenate([array, fill]).reshape(num_chunks, size, *array.shape[1:])

    results = jax.lax.map(lambda chunk: function(*chunk), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], results)


def direct_losses(
    model: Model,
    variables: PyTree,
    observed: PyTree,
    *,
    simulate: Callable | None,
    distance: Distance,
    local_steps: int,
    learning_rate: float,
) -> Callable:
    """``losses_of(images[n b h w c], labels) -> [n]`` by one gradient per candidate."""

    def loss_of_one(images, labels):
        update = local_update(
            model,
            variables,
            images,
            labels,
            local_steps=local_steps,
            learning_rate=learning_rate,
        )
        if simulate is not None:
            update = simulate(update)
        return distance.between(update, observed)

    return jax.vmap(loss_of_one)
