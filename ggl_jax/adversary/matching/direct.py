"""The direct matching loss: every candidate's gradient is formed, defended and compared."""

from collections.abc import Callable

import jax

from ggl_jax.adversary.losses import Distance
from ggl_jax.client.gradients import local_update
from ggl_jax.types import Model, PyTree


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
