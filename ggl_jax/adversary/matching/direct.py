"""The direct matching loss: every candidate's gradient is formed, defended and compared."""

from collections.abc import Callable

import jax

from ggl_jax.adversary.losses import Distance
from ggl_jax.client.gradients import client_update
from ggl_jax.spec import Client
from ggl_jax.types import Model, PyTree


def direct_losses(
    model: Model,
    variables: PyTree,
    observed: PyTree,
    *,
    simulate: Callable,
    distance: Distance,
    client: Client,
) -> Callable:
    """``losses_of(images[n b h w c], labels) -> [n]`` by one update per candidate."""

    def loss_of_one(images, labels):
        update = client_update(client, model, variables, images, labels, simulate)
        return distance.between(update, observed)

    return jax.vmap(loss_of_one)
