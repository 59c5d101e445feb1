"""The direct matching loss: every candidate's gradient is formed, defended and compared."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import Distance
from ggl_jax.types import Model, PyTree


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [b k] against class indices [b] or soft labels [b k]."""
    log_probabilities = jax.nn.log_softmax(logits)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        picked = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)
        return -jnp.mean(picked)
    return -jnp.mean(jnp.sum(labels * log_probabilities, axis=-1))


def candidate_update(model, variables, images, labels, *, local_steps, learning_rate):
    """The update that a client with these images would share, before any defense."""

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, images)
        return cross_entropy(logits, labels)

    if local_steps == 1:
        return jax.grad(loss)(variables["params"])
    initial = variables["params"]
    params = initial
    for _ in range(local_steps):
        gradient = jax.grad(loss)(params)
        params = jax.tree.map(lambda w, g: w - learning_rate * g, params, gradient)
    return jax.tree.map(lambda before, after: (before - after) / learning_rate, initial, params)


def in_chunks(losses_of: Callable, chunk_size: int, images: jax.Array, labels: jax.Array):
    """Evaluate ``losses_of(images, labels) -> [n]`` on at most ``chunk_size`` candidates at once.

    The chunks have equal size, as few and as small as ``chunk_size`` allows; the last is filled up
    with copies of the first candidate, whose losses are dropped.
    """
    num = images.shape[0]
    if num <= chunk_size:
        return losses_of(images, labels)
    num_chunks = math.ceil(num / chunk_size)
    size = math.ceil(num / num_chunks)

    def split(array):
        fill = jnp.broadcast_to(array[:1], (num_chunks * size - num, *array.shape[1:]))
        filled = jnp.concatenate([array, fill])
        return filled.reshape(num_chunks, size, *array.shape[1:])

    losses = jax.lax.map(lambda chunk: losses_of(*chunk), (split(images), split(labels)))
    return losses.reshape(-1)[:num]


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
        update = candidate_update(
            model,
            variables,
            images,
            labels,
            local_steps=local_steps,
            learning_rate=learning_rate,
        )
        if simulate is not None:
            update = simulate(update)
        return distance.direct(update, observed)

    return jax.vmap(loss_of_one)
