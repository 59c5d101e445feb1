"""The client's whole part: compute the update of a private batch, defend it, and send it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ggl_jax import gate, trees
from ggl_jax.client.defenses import check_local_steps
from ggl_jax.client.gradients import client_update
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client
from ggl_jax.types import Context, Defense, Model, Public, Shared


# Of the same objects, one call after the other, the compiled program is shared.
@functools.lru_cache(maxsize=64)
def _program(model: Model, defense: Defense, client: Client) -> Callable:
    def program(key, variables, images, labels):
        update = client_update(client, model, variables, images, labels)
        context = Context(model, variables, images, labels)
        return defense.apply(key, update, context)

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
    """What a client with these images sends.

    Args:
        key: typed key of the defense's randomness.
        public: the global model and its weights; the prior is not looked at.
        images: [b h w c] the private batch, floats in [0, 1].
        labels: [b] its class indices.
        defense: what is done to the update before it is sent.
        client: local steps, and whether BatchNorm statistics are sent as well; its batch size is
            not looked at.

    Returns:
        What crosses to the server, and the defense's own record of what it did, which stays with
        the client (the audit compares it with what the server estimates).

    Raises:
        GGLError: statistics of a model that has none, several local steps under a defense of
            single gradients, or NaN or infinity in the update.
    """
    gate.model(public.model)
    client = client or Client()
    check_local_steps(defense, client)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
    if client.share_statistics and public.model.statistics is None:
        raise GGLError(
            f"share_statistics: model {public.model.name} has no BatchNorm layers, so there are "
            "none to share; leave it out"
        )
    program = _program(public.model, defense, client)
    update, record = program(key, public.variables, images, labels)
    trees.check_finite(update, f"the update shared under {defense.name}")
    statistics = None
    if client.share_statistics:
        statistics = _statistics(public.model)(public.variables, images)
    return Shared(update, statistics), record
