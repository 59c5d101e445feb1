"""The client's whole part: compute the update of a private batch, defend it, and send it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ggl_jax import trees
from ggl_jax.client.defenses import check_local_steps
from ggl_jax.client.gradients import client_update, split_among
from ggl_jax.client.local import check_client
from ggl_jax.errors import GGLError
from ggl_jax.gate.models import check_model
from ggl_jax.spec import Client, replace
from ggl_jax.types import Context, Defense, Model, Public, Shared


# Of the same objects, one call after the other, the compiled program is shared: that of the update
# by all defenses of it.
@functools.lru_cache(maxsize=64)
def update_program(model: Model, client: Client) -> Callable:
    """Compiled: ``update(variables, images[b h w c], labels[b])``, before any defense."""
    return jax.jit(functools.partial(client_update, client, model))


@functools.lru_cache(maxsize=64)
def _defended(model: Model, defense: Defense) -> Callable:
    def defended(key, update, variables, images, labels):
        return defense.apply(key, update, Context(model, variables, images, labels))

    return jax.jit(defended)


@functools.lru_cache(maxsize=64)
def _mean_defended(model: Model, defense: Defense, client: Client) -> Callable:
    alone = replace(client, clients=1)

    def program(key, variables, images, labels):
        def one(args):
            key, images, labels = args
            update = client_update(alone, model, variables, images, labels)
            return defense.apply(key, update, Context(model, variables, images, labels))

        keys = jax.random.split(key, client.clients)
        each = jax.lax.map(one, (keys, *split_among(client.clients, (images, labels))))
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each)

    return jax.jit(program)


@functools.lru_cache(maxsize=64)
def _statistics(model: Model) -> Callable:
    return jax.jit(cast(Callable, model.statistics))


def share(
    key: jax.Array,
    public: Public,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    defense: Defense,
    client: Client | None = None,
) -> tuple[Shared, Mapping[str, Any] | tuple]:
    """What a client with these images sends; of several clients, the mean of what they send.

    In each of ``client.rounds`` rounds it sends the update of the same images at the same weights,
    each time defended with a key of its own: the server has made no step in between.

    Args:
        key: typed key of the defense's randomness.
        public: the global model and its weights; the prior is not looked at.
        images: [b h w c] the private batch, floats in [0, 1]; of several clients one after the
            other, as many of each.
        labels: [b] its class indices.
        defense: what is done to the update before it is sent.
        client: local steps, number of clients, rounds, and whether BatchNorm statistics are sent
            as well; its batch size is not looked at.

    Returns:
        What crosses to the server, and the defense's own record of what it did, which stays with
        the client (the audit compares it with what the server estimates); of several clients its
        mean, of several rounds that of the first.

    Raises:
        GGLError: statistics of a model that has none or of several clients, images that these do
            not divide, several local steps under a defense of single gradients, or NaN or infinity
            in the update.
    """
    check_model(public.model)
    client = client or Client()
    check_local_steps(defense, client)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
    check_client(replace(client, batch_size=len(images)))
    if client.share_statistics and public.model.statistics is None:
        raise GGLError(
            f"share_statistics: model {public.model.name} has no BatchNorm layers, so there are "
            "none to share; leave it out"
        )
    private: tuple = (public.variables, images, labels)
    once = replace(client, rounds=1)
    if client.clients > 1:
        defended = _mean_defended(public.model, defense, once)
    else:
        private = (update_program(public.model, once)(*private), *private)
        defended = _defended(public.model, defense)
    if client.rounds == 1:
        update, record = defended(key, *private)
    else:
        keys = [jax.random.fold_in(key, number) for number in range(client.rounds)]
        sent = [defended(own, *private) for own in keys]
        update = jax.tree.map(lambda *each: jnp.stack(each), *(one for one, _ in sent))
        record = sent[0][1]
    trees.check_finite(update, f"the update shared under {defense.name}")
    statistics = None
    if client.share_statistics:
        statistics = _statistics(public.model)(public.variables, images)
    return Shared(update, statistics), record
