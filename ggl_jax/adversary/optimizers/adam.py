"""Adam in latent (or pixel) space, with both of the published schedules."""

from typing import Literal

import jax.numpy as jnp
import optax

from ggl_jax.adversary.optimizers.base import make_info
from ggl_jax.spec import Count, Positive, ranged
from ggl_jax.trees import losses_and_gradients
from ggl_jax.types import Optimizer


def _step_decay(learning_rate, steps):
    # x 0.1 at 3/8, 5/8 and 7/8 of the run, as in Inverting Gradients and the paper's 32x32 code.
    boundaries = {int(steps * share): 0.1 for share in (3 / 8, 5 / 8, 7 / 8)}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def _ramp(learning_rate, steps):
    # Linear warm-up over the first 5 %, cosine ramp-down over the last 25 % (the 224x224 code).
    warm, down = max(1, round(0.05 * steps)), max(1, round(0.25 * steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warm),
            optax.constant_schedule(learning_rate),
            optax.cosine_decay_schedule(learning_rate, down),
        ],
        [warm, max(warm, steps - down)],
    )


def _cosine(learning_rate, steps):
    return optax.cosine_decay_schedule(learning_rate, steps, alpha=0.02)


SCHEDULES = {"step": _step_decay, "ramp": _ramp, "cosine": _cosine}


@ranged
def adam(
    *,
    learning_rate: Positive = 0.1,
    schedule: Literal["step", "ramp", "cosine"] = "step",
    signed: bool = True,
    box: Positive | None = None,
    steps: Count = 2500,
) -> Optimizer:
    """Adam on the latents, every restart of the batch on its own.

    One step costs one gradient evaluation of the model for each restart (each of which is itself
    differentiated, so it takes about three times as long as a CMA-ES candidate).

    Args:
        learning_rate: > 0.
        schedule: "step" (x 0.1 at 3/8, 5/8, 7/8; published for 32x32) or "ramp" (warm-up over 5 %,
            cosine ramp-down over the last 25 %; published for 224x224) or "cosine" (from the
            first step down to 2 %).
        signed: feed Adam the sign of the gradient, as the published 32x32 code does.
        box: keep every entry within [-box, box], > 0; None for no bounds.
        steps: length of the run, which the schedule needs; at least 1. The paper uses 2,500.

    Returns:
        An :class:`Optimizer`.

    Edge cases:
        A restart whose gradient is not finite keeps its latents for that step.

    Reference:
        Kingma and Ba (2015); signed gradients: Geiping et al. (2020), "Inverting Gradients".
    """
    transform = optax.adam(SCHEDULES[schedule](learning_rate, steps))

    def init(key, latents):
        del key
        return latents, transform.init(latents)

    def step(key, state, loss_fn):
        del key
        latents, moments = state
        losses, gradient = losses_and_gradients(loss_fn, latents)
        finite = jnp.all(jnp.isfinite(gradient), axis=1, keepdims=True)
        gradient = jnp.where(finite, gradient, 0.0)
        updates, moments = transform.update(
            jnp.sign(gradient) if signed else gradient, moments, latents
        )
        moved = optax.apply_updates(latents, jnp.where(finite, updates, 0.0))
        if box is not None:
            moved = jnp.clip(moved, -box, box)
        return (moved, moments), make_info(latents, losses)

    return Optimizer(
        init=init, step=step, evaluations_per_step=lambda num_restarts: num_restarts, name="adam"
    )
