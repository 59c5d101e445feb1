"""Federated training under a defense: what the defense costs in accuracy.

Each round, every client draws a batch of its own images, computes its update with the very function
that an audit's client runs, and defends it; the server takes an SGD step along the mean.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ggl_jax.client.gradients import predicted, update_fn
from ggl_jax.errors import GGLError
from ggl_jax.grammar import at_least
from ggl_jax.spec import Count, Positive, Share, ranged
from ggl_jax.types import Context, Defense, Model, PyTree

#: Images whose logits are computed at once when the accuracy is measured.
_EVALUATED_AT_ONCE = 256


class TrainingState(NamedTuple):
    """What the server carries from round to round.

    Attributes:
        variables: the global model's.
        optimizer: the state of the server's optimiser.
        round: rounds done, int32 scalar.
        diverged: the first round after which a weight was NaN or infinite, counted from 1; 0 while
            there is none. int32 scalar.
    """

    variables: PyTree
    optimizer: PyTree
    round: jax.Array
    diverged: jax.Array


class Training(NamedTuple):
    """Federated training as pure functions. Nothing in it is jitted.

    Attributes:
        init: ``init(variables) -> TrainingState``.
        share: ``share(key, variables, images[n h w c], labels[n]) -> update``: one client's
            defended update on a batch drawn from its images.
        serve: ``serve(state, total) -> TrainingState``: the server's step, given the sum of all
            clients' updates.
        num_clients: how many updates that sum has.
    """

    init: Callable
    share: Callable
    serve: Callable
    num_clients: int


@ranged
def federated(
    model: Model,
    defense: Defense,
    *,
    num_clients: Count = 4,
    batch_size: Count = 16,
    learning_rate: Positive = 0.03,
    momentum: Share = 0.9,
    local_steps: Count = 1,
    local_learning_rate: Positive = 0.01,
) -> Training:
    """Federated averaging of defended updates.

    Args:
        model: the federated model. Running statistics, if any, stay as they are throughout.
        defense: applied by every client to its own update, before the server's mean.
        num_clients: clients that share an update in each round, at least 1.
        batch_size: images that a client draws in a round, without repeats, at least 1.
        learning_rate: of the server's SGD, > 0. A client's update is a sum of gradients (see
            :func:`ggl_jax.client.gradients.local_update`), so with ``local_steps=1`` and without a
            defense this is SGD on batches of ``num_clients * batch_size`` images.
        momentum: of the server's SGD, in [0, 1): ``v = momentum v + u; w = w - learning_rate v``.
        local_steps: SGD steps behind each update, as in an audit.
        local_learning_rate: their step size.

    Returns:
        A :class:`Training`.

    Raises:
        GGLError: an argument is out of range.

    Reference: McMahan et al. 2017 (FedSGD, and FedAvg for ``local_steps > 1``).
    """
    update = update_fn(model, local_steps=local_steps, learning_rate=local_learning_rate)
    optimizer = optax.sgd(learning_rate, momentum=momentum or None)

    def init(variables):
        zero = jnp.zeros((), jnp.int32)
        return TrainingState(variables, optimizer.init(variables["params"]), zero, zero)

    def share(key, variables, images, labels):
        draw_key, defense_key = jax.random.split(key)
        drawn = jax.random.choice(draw_key, len(images), (batch_size,), replace=False)
        batch = Context(model, variables, images[drawn], labels[drawn])
        own = update(variables, batch.images, batch.labels)
        return defense.apply(defense_key, own, batch)[0]

    def serve(state, total):
        mean = jax.tree.map(lambda t: t / num_clients, total)
        params = state.variables["params"]
        change, inner = optimizer.update(mean, state.optimizer, params)
        params = optax.apply_updates(params, change)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)]))
        done = state.round + 1
        broken = jnp.where((state.diverged == 0) & ~finite, done, state.diverged)
        return TrainingState({**state.variables, "params": params}, inner, done, broken)

    return Training(init, share, serve, num_clients)


def client_key(key: jax.Array, round: jax.Array | int, client: jax.Array | int) -> jax.Array:
    """The key of one client in one round, whatever the defense: all draw the same batches."""
    return jax.random.fold_in(jax.random.fold_in(key, round), client)


def run_round(
    training: Training, key: jax.Array, state: TrainingState, images: jax.Array, labels: jax.Array
) -> TrainingState:
    """One round: every client shares, the server steps. Pure; clients one after the other.

    Args:
        training: of :func:`federated`.
        key: of the whole training, see :func:`client_key`.
        state: the server's.
        images: [m n h w c], each client's own n images, in [0, 1].
        labels: [m n], integers.

    Returns:
        The state after it.
    """

    def add(total, client):
        own = training.share(
            client_key(key, state.round, client), state.variables, images[client], labels[client]
        )
        return jax.tree.map(jnp.add, total, own), None

    zeros = jax.tree.map(jnp.zeros_like, state.variables["params"])
    total, _ = jax.lax.scan(add, zeros, jnp.arange(training.num_clients))
    return training.serve(state, total)


def train(
    training: Training,
    key: jax.Array,
    variables: PyTree,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_rounds: int,
    every: int | None = None,
    scan: bool | None = None,
) -> Iterator[TrainingState]:
    """Train, and stop by every so many rounds.

    Args:
        training: of :func:`federated`.
        key: of the batches and the defense's noise.
        variables: the global model's, as given by ``model.init``.
        images: [m n h w c], each client's own n images, in [0, 1]; m is ``num_clients``.
        labels: [m n], integers.
        num_rounds: at least 1.
        every: rounds between two states that are returned; None for the last alone.
        scan: whether rounds run as one program. None: on accelerators, but not on CPUs, where XLA
            runs a convolution within a loop on a single thread. The results differ by rounding.

    Yields:
        The state after ``every`` rounds, after twice as many, and so on, and after the last.

    Raises:
        GGLError: no rounds, or another number of clients.
    """
    every = num_rounds if every is None else every
    at_least(1, num_rounds=num_rounds, every=every)
    if len(images) != training.num_clients or len(labels) != training.num_clients:
        raise GGLError(
            f"images: got those of {len(images)} clients, allowed: num_clients="
            f"{training.num_clients}"
        )
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    scan = jax.default_backend() != "cpu" if scan is None else scan
    advance = (_scanned if scan else _stepped)(training)
    state = training.init(variables)
    for first in range(0, num_rounds, every):
        state = advance(key, state, images, labels, min(every, num_rounds - first))
        yield state


def _scanned(training: Training) -> Callable:
    # The number of rounds is traced, so that a shorter last part needs no second program.
    @jax.jit
    def advance(key, state, images, labels, num):
        def body(_, state):
            return run_round(training, key, state, images, labels)

        return jax.lax.fori_loop(0, num, body, state)

    return advance


def _stepped(training: Training) -> Callable:
    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, key, variables, images, labels):
        return jax.tree.map(jnp.add, total, training.share(key, variables, images, labels))

    serve = jax.jit(training.serve, donate_argnums=1)
    zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params))
    own_key = jax.jit(client_key)

    def advance(key, state, images, labels, num):
        for number in range(int(state.round), int(state.round) + num):
            total = zeros(state.variables["params"])
            for client in range(training.num_clients):
                total = add(
                    total,
                    own_key(key, number, client),
                    state.variables,
                    images[client],
                    labels[client],
                )
            state = serve(state, total)
        return state

    return advance


def accuracy(model: Model, variables: PyTree, images: jax.Array, labels: jax.Array) -> float:
    """Share of images that the model classifies right, in [0, 1].

    Args:
        model: the model.
        variables: its weights.
        images: [n h w c] in [0, 1], n at least 1.
        labels: [n], integers.

    Edge cases: an image whose logits are not all finite counts as wrong. Ties go to the lower
    class. A model in train-mode BatchNorm sees batches of up to 256 images, the last one filled up
    with copies of its first image.
    """
    size = min(_EVALUATED_AT_ONCE, len(images))
    right = 0
    for first in range(0, len(images), size):
        part, own = np.asarray(images[first : first + size]), np.asarray(labels[first:][:size])
        left = size - len(part)
        # -1 is no class, so that the copies count for nothing.
        part = np.concatenate([part, np.repeat(part[:1], left, axis=0)])
        own = np.concatenate([own, np.full(left, -1, own.dtype)])
        right += int(_num_right(model, variables, part, own))
    return right / len(images)


@functools.partial(jax.jit, static_argnums=0)
def _num_right(model, variables, images, labels):
    logits, _ = model.apply(variables, images)
    right = predicted(model, logits) == labels
    return jnp.sum(right & jnp.all(jnp.isfinite(logits), axis=-1))
