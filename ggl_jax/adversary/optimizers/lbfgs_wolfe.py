"""L-BFGS with a line search that costs one gradient evaluation per step."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ggl_jax.adversary.optimizers.base import make_info
from ggl_jax.spec import AtLeast, Count, ranged
from ggl_jax.trees import losses_and_gradients
from ggl_jax.types import NONFINITE, OK, STALLED, Optimizer, PyTree

#: Constants of the weak Wolfe conditions: sufficient decrease and curvature (Nocedal and Wright).
DECREASE, CURVATURE = 1e-4, 0.9


class WolfeState(NamedTuple):
    """State of :func:`lbfgs_wolfe`, with one row for each of ``r`` restarts.

    Attributes:
        point: [r z], where the current line starts; its loss is the lowest of its restart that met
            the sufficient decrease.
        value: [r], the loss there; +inf before the first evaluation.
        gradient: [r z], the gradient there.
        direction: [r z], the line's direction of descent (0 before the first evaluation).
        stepsize: [r], the next trial is ``point + stepsize * direction``.
        low: [r], largest trial step that met the decrease but not the curvature condition.
        low_value: [r], the loss at ``low``.
        low_gradient: [r z], the gradient at ``low``.
        high: [r], smallest trial step that did not meet the decrease; +inf if none.
        high_value: [r], the loss at ``high``.
        trials: [r], trials spent on this line.
        fresh: [r], True where the direction is plain steepest descent.
        stalled: [r], True where not even steepest descent finds a decrease.
        memory: optax's L-BFGS memory, each leaf with a first axis of ``r``.
    """

    point: jax.Array
    value: jax.Array
    gradient: jax.Array
    direction: jax.Array
    stepsize: jax.Array
    low: jax.Array
    low_value: jax.Array
    low_gradient: jax.Array
    high: jax.Array
    high_value: jax.Array
    trials: jax.Array
    fresh: jax.Array
    stalled: jax.Array
    memory: PyTree


def _rows(a, b):
    """Inner products of the rows of two [r z] arrays."""
    return jnp.sum(a * b, axis=1)


def _select(condition, chosen, other):
    """``jnp.where`` over trees whose leaves have a first axis of ``r``."""

    def each(x, y):
        return jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(each, chosen, other)


def _start_line(transform, state: WolfeState, move) -> WolfeState:
    """Choose directions for the rows in ``move``; those in ``state.fresh`` forget the past."""
    empty = jax.vmap(transform.init)(state.point)
    update = jax.vmap(transform.update)
    kept, kept_memory = update(
        state.gradient, _select(state.fresh, empty, state.memory), state.point
    )
    plain, plain_memory = update(state.gradient, empty, state.point)
    # Rounding can spoil the direction: it must go down.
    descends = _rows(kept, state.gradient) > 0
    fresh = state.fresh | ~descends
    slope = _rows(plain, state.gradient)
    zero, one = jnp.zeros_like(state.value), jnp.ones_like(state.value)
    started = state._replace(
        direction=-_select(fresh, plain, kept),
        stepsize=one,
        low=zero,
        low_value=state.value,
        low_gradient=state.gradient,
        high=one * jnp.inf,
        high_value=one * jnp.inf,
        trials=jnp.zeros_like(state.trials),
        fresh=fresh,
        stalled=state.stalled | ~(slope > 0),
        memory=_select(fresh, plain_memory, kept_memory),
    )
    return _select(move, started, state)


def _narrowed(state: WolfeState, losses, gradient, active, short, long) -> WolfeState:
    """The brackets after a trial of these losses (infinite where it failed), and the next step.

    Args:
        state: before the trial.
        losses: [r].
        gradient: [r z].
        active: [r], whether the trial counts.
        short: [r], whether it met the decrease but not the curvature condition.
        long: [r], whether it did not meet the decrease.
    """
    found = state._replace(
        low=jnp.where(short, state.stepsize, state.low),
        low_value=jnp.where(short, losses, state.low_value),
        low_gradient=_select(short, gradient, state.low_gradient),
        high=jnp.where(long, state.stepsize, state.high),
        high_value=jnp.where(long, losses, state.high_value),
        trials=state.trials + active,
    )
    width = found.high - found.low
    low_slope = _rows(state.direction, found.low_gradient)
    rise = found.high_value - found.low_value - low_slope * width
    share = jnp.clip(-low_slope * width / (2 * rise), 0.1, 0.9)
    # A value that is not finite says nothing about where the minimum lies.
    share = jnp.where(jnp.isfinite(share) & jnp.isfinite(found.high_value), share, 0.5)
    further = jnp.where(active, 2 * state.stepsize, state.stepsize)
    within = found.low + share * width
    return found._replace(stepsize=jnp.where(jnp.isfinite(found.high), within, further))


@ranged
def lbfgs_wolfe(
    *, memory_size: Count = 10, max_trials: Annotated[int, AtLeast(2)] = 20
) -> Optimizer:
    """Limited-memory BFGS, every restart of the batch on its own.

    One step evaluates loss and gradient once for each restart: the next trial of its line search.
    Thus the budget is exact, restarts never wait for each other's line searches, and the model
    runs in one batched call outside of any loop. A quasi-Newton iteration takes one step where the
    unit step is good, as it mostly is, and at most ``max_trials``.

    Args:
        memory_size: past iterations in the inverse Hessian, at least 1.
        max_trials: steps of one line search, at least 2. When they are spent, the best point with a
            sufficient decrease is taken and the memory is emptied.

    Returns:
        An :class:`Optimizer`.

    Edge cases:
        A trial whose loss or gradient is not finite counts as too long. A restart whose very start
        is not finite stays there; the status is NONFINITE if all do. A restart that finds no
        decrease along its direction tries steepest descent; if that fails too (float32 resolves no
        difference any more, or the gradient is 0), it stays where it is, still evaluated. The
        status is STALLED when no restart is left that can move.

    Reference:
        Liu and Nocedal (1989), by ``optax.scale_by_lbfgs``. Line search: bracketing of the weak
        Wolfe conditions (Lewis and Overton 2013, algorithm 2.6) with quadratic interpolation.
        Without a line search: :func:`ggl_jax.adversary.optimizers.lbfgs`.
    """
    transform = optax.scale_by_lbfgs(memory_size=memory_size)

    def init(key, latents):
        del key
        num = latents.shape[0]
        # Weakly typed starts (``jnp.full``) would compile the second step anew.
        latents = jax.lax.convert_element_type(latents, latents.dtype)
        zeros, none = jnp.zeros_like(latents), jnp.zeros_like(latents[:, 0])
        return WolfeState(
            point=latents,
            value=none + jnp.inf,
            gradient=zeros,
            direction=zeros,
            stepsize=none,
            low=none,
            low_value=none + jnp.inf,
            low_gradient=zeros,
            high=none + jnp.inf,
            high_value=none + jnp.inf,
            trials=jnp.zeros(num, jnp.int32),
            fresh=jnp.ones(num, bool),
            stalled=jnp.zeros(num, bool),
            memory=jax.vmap(transform.init)(latents),
        )

    def step(key, state, loss_fn):
        del key
        trial = state.point + state.stepsize[:, None] * state.direction
        losses, gradient = losses_and_gradients(loss_fn, trial)
        finite = jnp.isfinite(losses) & jnp.all(jnp.isfinite(gradient), axis=1)
        waiting = jnp.isinf(state.value)
        slope = _rows(state.direction, state.gradient)
        decreased = finite & (losses <= state.value + DECREASE * state.stepsize * slope)
        # Rounding can make the two sides equal: drifting on a plateau is no progress.
        decreased &= losses < state.value
        # The starts themselves are the first trial: all that is asked of them is to be finite.
        flat_enough = waiting | (_rows(state.direction, gradient) >= CURVATURE * slope)
        active = ~state.stalled & ~(waiting & ~finite)
        accepted = active & decreased & flat_enough

        usable, short = jnp.where(finite, losses, jnp.inf), active & decreased & ~flat_enough
        bracketed = _narrowed(state, usable, gradient, active, short, active & ~decreased)
        # Out of trials: take the decrease that was found, or go back to steepest descent.
        spent = active & ~accepted & (bracketed.trials >= max_trials)
        rescued, failed = spent & (bracketed.low > 0), spent & ~(bracketed.low > 0)
        low_point = state.point + bracketed.low[:, None] * state.direction
        moved = bracketed._replace(
            point=_select(accepted, trial, _select(rescued, low_point, state.point)),
            value=jnp.where(accepted, losses, jnp.where(rescued, bracketed.low_value, state.value)),
            gradient=_select(
                accepted, gradient, _select(rescued, bracketed.low_gradient, state.gradient)
            ),
            # The first line, and the lines after a failure, start from an empty memory.
            fresh=jnp.where(accepted, waiting, jnp.where(spent, True, state.fresh)),
            stalled=state.stalled | (failed & state.fresh),
        )
        with jax.default_matmul_precision("highest"):
            moved = _start_line(transform, moved, (accepted | spent) & ~moved.stalled)
        moved = moved._replace(stepsize=jnp.where(moved.stalled, 0.0, moved.stepsize))
        known = jnp.isfinite(moved.value)
        movable = jnp.any(known & ~moved.stalled)
        status = jnp.where(jnp.any(known), jnp.where(movable, OK, STALLED), NONFINITE)
        return moved, make_info(trial, losses)._replace(status=status.astype(jnp.int32))

    return Optimizer(
        init=init,
        step=step,
        evaluations_per_step=lambda num_restarts: num_restarts,
        name="lbfgs_wolfe",
    )
