"""Federated training under a defense: what it costs in accuracy, and weights to audit.

Each round, every client draws a batch of its own images, computes its update with the very function
that an audit's client runs, and defends it; the server takes an SGD step along the mean.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ggl_jax.client import defenses as client_defenses
from ggl_jax.client.defenses.transformations import as_defense
from ggl_jax.client.gradients import client_update, predicted
from ggl_jax.errors import GGLError
from ggl_jax.gate.defenses import check_defense
from ggl_jax.grammar import at_least
from ggl_jax.spec import Client, Count, Positive, Seed, Share, check, checked
from ggl_jax.types import Context, Defense, Model, PyTree, Shared

#: Images whose logits are computed at once when the accuracy is measured.
_EVALUATED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How the federated model is trained; see :func:`federated`."""

    clients: Count = 4
    """Clients; each has its own part of the images and takes part in every round."""
    batch_size: Count = 16
    """Images that a client draws in each round."""
    momentum: Share = 0.9
    """Momentum of the server's SGD."""
    test_images: Count | None = None
    """Images held out of training (default: a fifth, at most 1,000)."""
    seed: Seed = 0
    """Seed of the model's weights, the batches, the noise and the choice of test images."""

    @property
    def validates(self) -> bool:
        """Whether further images are held out of training, to choose among settings by."""
        return False


def admitted(given: Any, model: Model, client: Client) -> Defense:
    """A defense as it is given, where this model's clients can train under it.

    Raises:
        GGLError: it is none, or does not keep the contract.
    """
    given = as_defense(given)
    defense = client_defenses.parse(given) if isinstance(given, str) else given
    check_defense(defense, model)
    client_defenses.check_local_steps(defense, client)
    return defense


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
        share: ``share(key, variables, images[n h w c], labels[n]) -> Shared``: one client's
            defended update on a batch drawn from its images, and the batch's statistics if the
            server keeps a running mean of them.
        zeros: ``zeros(variables) -> Shared``: what sums start from.
        serve: ``serve(state, total) -> TrainingState``: the server's step, given the sum of what
            all clients shared.
        num_clients: how many clients that sum has.
    """

    init: Callable
    share: Callable
    zeros: Callable
    serve: Callable
    num_clients: int


#: Share of the running statistics that a round keeps, as a step of torch's BatchNorm does.
_KEPT = 0.9


def federated(
    model: Model,
    defense: Defense,
    settings: TrainingSettings,
    *,
    learning_rate: float | optax.Schedule = 0.03,
    client: Client | None = None,
    track: bool = False,
) -> Training:
    """Federated averaging of defended updates.

    Args:
        model: the federated model.
        defense: applied by every client to its own update, before the server's mean.
        settings: clients, what each draws in a round (without repeats), and the momentum of the
            server's SGD: ``v = momentum v + u; w = w - learning_rate v``.
        learning_rate: of the server's SGD, > 0, or one for each round, as an optax schedule. A
            client's update is a sum of gradients (see
            :func:`ggl_jax.client.gradients.local_update`), so with one local step and without a
            defense this is SGD on batches of ``clients * batch_size`` images.
        client: the local steps behind each update, as in an audit; its batch size and clients are
            not looked at. None for one step.
        track: whether the server keeps a running mean of the mean and variance that enter every
            BatchNorm layer, over clients and rounds, at the weights that a round starts from: a
            model in training mode then has real ones when it is put into eval mode. They are
            shared as they are, whatever the defense. Without, they stay as they are.

    Returns:
        A :class:`Training`.

    Raises:
        GGLError: an argument is out of range, or nothing to track.

    Reference: McMahan et al. 2017 (FedSGD, and FedAvg for several local steps). The variance is the
    batch's own (Flax), not torch's unbiased one.
    """
    settings, local = checked(settings), dataclasses.replace(client or Client(), clients=1)
    if not callable(learning_rate):
        check("learning_rate", learning_rate, Positive)
    statistics = model.statistics if track else None
    if track and statistics is None:
        raise GGLError(f"track: model {model.name} has no BatchNorm layers; leave it out")
    optimizer = optax.sgd(learning_rate, momentum=settings.momentum or None)

    def init(variables):
        zero = jnp.zeros((), jnp.int32)
        return TrainingState(variables, optimizer.init(variables["params"]), zero, zero)

    def share(key, variables, images, labels):
        draw_key, defense_key = jax.random.split(key)
        drawn = jax.random.choice(draw_key, len(images), (settings.batch_size,), replace=False)
        batch = Context(model, variables, images[drawn], labels[drawn])
        own = client_update(local, model, variables, batch.images, batch.labels)
        seen = None if statistics is None else statistics(variables, batch.images)
        return Shared(defense.apply(defense_key, own, batch)[0], seen)

    def zeros(variables):
        seen = None if statistics is None else variables["batch_stats"]
        return jax.tree.map(jnp.zeros_like, Shared(variables["params"], seen))

    def serve(state, total):
        mean = jax.tree.map(lambda t: t / settings.clients, total)
        variables, params = state.variables, state.variables["params"]
        if statistics is not None:
            kept = jax.tree.map(
                lambda old, new: _KEPT * old + (1 - _KEPT) * new,
                variables["batch_stats"],
                mean.statistics,
            )
            variables = {**variables, "batch_stats": kept}
        change, inner = optimizer.update(mean.update, state.optimizer, params)
        params = optax.apply_updates(params, change)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)]))
        done = state.round + 1
        broken = jnp.where((state.diverged == 0) & ~finite, done, state.diverged)
        return TrainingState({**variables, "params": params}, inner, done, broken)

    return Training(init, share, zeros, serve, settings.clients)


def uses_batch_statistics(model: Model, variables: PyTree) -> bool:
    """Whether a model's BatchNorm layers are in training mode: running statistics change nothing.

    False for a model that has none.
    """
    if model.statistics is None:
        return False
    images = jnp.linspace(0.0, 1.0, 2 * math.prod(model.image_shape))
    images = images.reshape(2, *model.image_shape)
    moved = {**variables, "batch_stats": jax.tree.map(lambda x: x + 1, variables["batch_stats"])}
    apply = jax.jit(lambda variables: model.apply(variables, images)[0])
    return bool(jnp.all(apply(variables) == apply(moved)))


def client_key(key: jax.Array, round: jax.Array | int, client: jax.Array | int) -> jax.Array:
    """The key of one client in one round, whatever the defense: all draw the same batches."""
    return jax.random.fold_in(jax.random.fold_in(key, round), client)


def train(
    training: Training,
    key: jax.Array,
    variables: PyTree,
    images: jax.Array,
    labels: jax.Array,
    *,
    stops: Sequence[int],
    state: TrainingState | None = None,
) -> Iterator[TrainingState]:
    """Train, and stop by after certain rounds.

    Args:
        training: of :func:`federated`.
        key: of the batches and the defense's noise.
        variables: the global model's, as given by ``model.init``.
        images: [m n h w c], each client's own n images, in [0, 1]; m is ``num_clients``.
        labels: [m n], integers.
        stops: the rounds after which the state is returned, in rising order; 0 is the start.
        state: one that an earlier call gave, to go on from; None for the start.

    Yields:
        The state after each of them.

    Raises:
        GGLError: no or unordered stops, or another number of clients.

    Edge cases: stops before the given state give that state.
    """
    at_least(0, **{f"stops[{place}]": stop for place, stop in enumerate(stops)})
    check_rising("stops", stops)
    if len(images) != training.num_clients or len(labels) != training.num_clients:
        raise GGLError(
            f"images: got those of {len(images)} clients, allowed: num_clients="
            f"{training.num_clients}"
        )
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    # A program for each client and not one for all: XLA's CPU backend runs a convolution within a
    # loop on a single thread.
    serve, zeros = jax.jit(training.serve, donate_argnums=1), jax.jit(training.zeros)
    own_key = jax.jit(client_key)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, key, variables, images, labels):
        return jax.tree.map(jnp.add, total, training.share(key, variables, images, labels))

    state = training.init(variables) if state is None else state
    for stop in stops:
        for number in range(int(state.round), stop):
            total = zeros(state.variables)
            for client in range(training.num_clients):
                own = own_key(key, number, client), state.variables, images[client], labels[client]
                total = add(total, *own)
            state = serve(state, total)
        yield state


def check_rising(name: str, rounds: Sequence[int]) -> None:
    """Refuse rounds that are none, twice the same or not in order, by their name."""
    if not rounds or list(rounds) != sorted(set(rounds)):
        shown = " ".join(map(str, rounds)) or "none"
        raise GGLError(f"{name}: got {shown}, allowed: different rounds in rising order")


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
