"""L-BFGS without a line search, in the arithmetic of ``torch.optim.LBFGS``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax.adversary.optimizers.base import make_info
from ggl_jax.spec import Count, ranged
from ggl_jax.trees import losses_and_gradients
from ggl_jax.types import OK, STALLED, Optimizer

#: torch's tolerances of the gradient (largest entry) and of the change (slope along the direction).
TOLERANCE_GRADIENT, TOLERANCE_CHANGE = 1e-7, 1e-9
#: Least inner product of move and change of gradient with which a pair is kept.
LEAST_CURVATURE = 1e-10


class LBFGSState(NamedTuple):
    """State of :func:`lbfgs`, with one row for each of ``r`` restarts.

    Attributes:
        point: [r z], where the next step evaluates.
        gradient: [r z], the gradient at the point before (0 before the first evaluation).
        move: [r z], from the point before to ``point``.
        moves: [r m z], past moves, the newest last; 0 where there are fewer than m.
        changes: [r m z], the changes of the gradient that go with them.
        inverse: [r m], one over their inner products; 0 where there is no pair.
        scale: [r], the initial inverse Hessian, a multiple of the identity.
        started: bool, False before the first evaluation.
    """

    point: jax.Array
    gradient: jax.Array
    move: jax.Array
    moves: jax.Array
    changes: jax.Array
    inverse: jax.Array
    scale: jax.Array
    started: jax.Array


def _direction(gradient, moves, changes, inverse, scale):
    """Minus the inverse Hessian times ``gradient`` [z], by the two loops, for one restart."""

    def newest_first(q, pair):
        move, change, inverse = pair
        share = inverse * jnp.vdot(move, q)
        return q - share * change, share

    def oldest_first(d, pair):
        move, change, inverse, share = pair
        return d + (share - inverse * jnp.vdot(change, d)) * move, None

    pairs = (moves, changes, inverse)
    q, shares = jax.lax.scan(newest_first, -gradient, pairs, reverse=True)
    return jax.lax.scan(oldest_first, scale * q, (*pairs, shares))[0]


@ranged
def lbfgs(*, memory_size: Count = 100) -> Optimizer:
    """L-BFGS with a fixed step and no line search, as the published DLG and iDLG take it.

    One step evaluates loss and gradient once for each restart and moves on along the quasi-Newton
    direction (by min(1, 1 / |g|_1) of it at first, then by all of it), whether or not the loss
    fell; the wrapper that remembers the best does the rest. On losses that jump, such as those of
    ReLU networks, this goes on where a line search, which asks for a decrease, stops
    (:func:`ggl_jax.adversary.optimizers.lbfgs_wolfe`).

    Args:
        memory_size: past moves in the inverse Hessian, at least 1. Two arrays of this many rows
            are kept for each restart.

    Returns:
        An :class:`Optimizer`.

    Edge cases:
        A move is remembered only if its inner product with the gradient's change exceeds 1e-10. A
        restart stays where it is, still evaluated, once its loss or gradient is not finite (torch
        would go on with NaN; what it found before is kept), its gradient has no entry above 1e-7,
        or its direction goes down by less than 1e-9. The status is NONFINITE when no restart's
        loss is finite, else STALLED when none can move. torch's other tolerances only end one of
        its calls of up to ``max_iter`` = 20 evaluations: the next call goes on from there, so that
        20 steps here are one iteration there.

    Reference:
        Liu and Nocedal (1989); PyTorch's ``LBFGS`` with its defaults, which both published codes
        use: ``lr=1``, ``history_size=100`` and no line search.
    """

    def init(key, latents):
        del key
        num, size = latents.shape
        # Weakly typed starts would compile the second step anew.
        latents = jax.lax.convert_element_type(latents, latents.dtype)
        zeros, past = jnp.zeros_like(latents), jnp.zeros((num, memory_size, size), latents.dtype)
        return LBFGSState(
            point=latents,
            gradient=zeros,
            move=zeros,
            moves=past,
            changes=past,
            inverse=past[:, :, 0],
            scale=jnp.ones_like(latents[:, 0]),
            started=jnp.zeros((), bool),
        )

    def remembered(state, gradient):
        """The state with the last move among its pairs, where it is to be kept."""
        change = gradient - state.gradient
        curvature = jnp.sum(change * state.move, axis=1)
        kept = curvature > LEAST_CURVATURE  # False for the first evaluation and for NaN
        row = kept[:, None]
        safe = jnp.where(kept, curvature, 1.0)

        def push(past, new):
            keep = row.reshape(-1, *(1,) * (past.ndim - 1))
            return jnp.where(keep, jnp.concatenate([past[:, 1:], new[:, None]], axis=1), past)

        squares = jnp.where(kept, jnp.sum(change**2, axis=1), 1.0)
        return state._replace(
            gradient=gradient,
            moves=push(state.moves, state.move),
            changes=push(state.changes, change),
            inverse=push(state.inverse, 1.0 / safe),
            scale=jnp.where(kept, safe / squares, state.scale),
            started=jnp.ones((), bool),
        )

    def step(key, state, loss_fn):
        del key
        point = state.point
        losses, gradient = losses_and_gradients(loss_fn, point)
        finite = jnp.isfinite(losses) & jnp.all(jnp.isfinite(gradient), axis=1)
        first = jnp.minimum(1.0, 1.0 / jnp.sum(jnp.abs(gradient), axis=1))
        stepsize = jnp.where(state.started, 1.0, first)
        with jax.default_matmul_precision("highest"):
            state = remembered(state, gradient)
            direction = jax.vmap(_direction)(
                gradient, state.moves, state.changes, state.inverse, state.scale
            )
        slope = jnp.sum(gradient * direction, axis=1)
        steep = jnp.max(jnp.abs(gradient), axis=1) > TOLERANCE_GRADIENT
        moving = finite & steep & (slope <= -TOLERANCE_CHANGE)
        move = jnp.where(moving[:, None], stepsize[:, None] * direction, 0.0)
        info = make_info(point, losses)
        stalled = (info.status == OK) & ~jnp.any(moving)
        info = info._replace(status=jnp.where(stalled, STALLED, info.status))
        return state._replace(point=point + move, move=move), info

    return Optimizer(
        init=init, step=step, evaluations_per_step=lambda num_restarts: num_restarts, name="lbfgs"
    )
