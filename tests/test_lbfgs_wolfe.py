"""L-BFGS: as few evaluations as SciPy's, Wolfe's conditions, and restarts that fail alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from ggl_jax.adversary.optimizers import lbfgs_wolfe
from ggl_jax.errors import GGLError
from ggl_jax.types import NONFINITE, OK, STALLED


def rosenbrock(z):
    return jnp.sum(100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2, axis=1)


def quadratic(z):
    return jnp.sum(10.0 ** jnp.linspace(0, 3, z.shape[1]) * (z - 0.5) ** 2, axis=1)


def run(optimizer, loss_fn, start, steps):
    """States and infos of all steps."""
    state = optimizer.init(jax.random.key(0), start)
    step = jax.jit(lambda state: optimizer.step(jax.random.key(0), state, loss_fn))
    trace = []
    for _ in range(steps):
        state, info = step(state)
        trace.append((state, info))
    assert step._cache_size() == 1
    return trace


@pytest.mark.parametrize("loss_fn", [quadratic, rosenbrock])
def test_needs_as_few_evaluations_as_scipy(loss_fn):
    # Rosenbrock has a second minimum (3.99) in ten dimensions; these starts avoid it.
    starts = 0.5 + 0.3 * jax.random.normal(jax.random.key(1), (4, 10))
    value_and_grad = jax.jit(jax.value_and_grad(lambda z: loss_fn(z[None])[0]))

    def scipy_evaluations(start):
        losses = []

        def fun(z):
            value, gradient = value_and_grad(jnp.asarray(z, jnp.float32))
            losses.append(float(value))
            return losses[-1], np.asarray(gradient, float)

        options = {"maxcor": 10, "ftol": 0, "gtol": 0}
        scipy.optimize.minimize(fun, start, jac=True, method="L-BFGS-B", options=options)
        return int(np.argmax(np.asarray(losses) < 1e-5)) + 1

    theirs = [scipy_evaluations(np.asarray(start)) for start in starts]
    losses = np.stack([info.losses for _, info in run(lbfgs_wolfe(), loss_fn, starts, 150)])
    assert (losses < 1e-5).any(axis=0).all()
    ours = np.argmax(losses < 1e-5, axis=0) + 1
    assert ours.mean() < 1.25 * np.mean(theirs)


def test_accepted_steps_meet_the_weak_wolfe_conditions():
    starts = jax.random.normal(jax.random.key(0), (3, 6))
    gradient_of = jax.vmap(jax.grad(lambda z: rosenbrock(z[None])[0]))
    before, lines = None, 0
    for state, _ in run(lbfgs_wolfe(), rosenbrock, starts, 40):
        np.testing.assert_allclose(state.value, rosenbrock(state.point), rtol=1e-4, atol=1e-6)
        if before is not None:
            move = np.asarray(state.point - before.point, np.float64)
            old = np.sum(move * gradient_of(before.point), axis=1)
            new = np.sum(move * gradient_of(state.point), axis=1)
            moved = np.any(move != 0, axis=1)
            # Each line goes along the direction that was chosen, downwards.
            assert np.all(old[moved] < 0)
            assert np.all((state.value <= before.value + 1e-4 * old)[moved])
            assert np.all((new >= 0.9 * old - 1e-5)[moved])
            lines += moved.sum()
        before = state
    assert lines > 40


def test_one_batch_is_many_searches():
    starts = jax.random.normal(jax.random.key(2), (3, 5))
    together, info = run(lbfgs_wolfe(), rosenbrock, starts, 25)[-1]
    for i in range(3):
        alone, _ = run(lbfgs_wolfe(), rosenbrock, starts[i : i + 1], 25)[-1]
        np.testing.assert_allclose(together.point[i], alone.point[0], rtol=2e-2, atol=2e-3)
    assert int(info.evaluations) == 3 == lbfgs_wolfe().evaluations_per_step(3)


def test_a_wall_of_nan_is_stepped_back_from():
    # The minimum lies next to the wall, and first steps overshoot it.
    def walled(z):
        return jnp.where(z[:, -1] > 0.6, jnp.nan, quadratic(z))

    trace = run(lbfgs_wolfe(), walled, jnp.full((2, 4), -0.2), 60)
    assert any(bool(jnp.any(jnp.isnan(info.losses))) for _, info in trace)
    assert float(jnp.max(trace[-1][0].value)) < 1e-4


def test_a_gradient_that_is_not_finite_is_never_kept():
    # sqrt has a finite value and an infinite slope at 0.
    def root(z):
        return jnp.sqrt(jnp.maximum(z[:, 0], 0.0)) + jnp.sum(z[:, 1:] ** 2, axis=1)

    for state, _ in run(lbfgs_wolfe(), root, jnp.asarray([[0.5, 1.0], [0.1, -1.0]]), 40):
        assert bool(jnp.all(jnp.isfinite(state.gradient)))


def test_a_failed_start_stays_and_disturbs_no_other():
    def partial(z):
        return jnp.where(z[:, 0] > 5, jnp.nan, quadratic(z))

    state, info = run(lbfgs_wolfe(), partial, jnp.asarray([[9.0, 0.0], [1.0, 1.0]]), 30)[-1]
    np.testing.assert_array_equal(state.point[0], [9.0, 0.0])
    np.testing.assert_allclose(state.point[1], 0.5, atol=1e-3)
    _, info = run(lbfgs_wolfe(), partial, jnp.asarray([[9.0, 0.0]]), 3)[-1]
    assert int(info.status) == NONFINITE


def test_status_tells_a_stalled_search():
    trace = run(lbfgs_wolfe(max_trials=5), quadratic, jnp.ones((2, 4)), 60)
    statuses = [int(info.status) for _, info in trace]
    assert statuses[0] == OK
    assert statuses[-1] == STALLED
    # Once stalled it stays, and it stands at the minimum.
    assert statuses == sorted(statuses)
    np.testing.assert_allclose(trace[-1][0].point, 0.5, atol=1e-3)
    # Where float32 resolves no decrease, it stalls with a gradient that is not 0.
    tilted = lambda z: 1e6 + jnp.sum(1e-3 * z, axis=1)  # noqa: E731
    state, info = run(lbfgs_wolfe(max_trials=5), tilted, jnp.zeros((1, 3)), 12)[-1]
    assert int(info.status) == STALLED
    assert float(jnp.min(jnp.abs(state.gradient))) > 0
    # A zero gradient stalls at once.
    _, info = run(lbfgs_wolfe(), lambda z: jnp.sum(z**4, axis=1), jnp.zeros((1, 3)), 1)[-1]
    assert int(info.status) == STALLED


def test_spent_trials_take_the_decrease_found():
    # A straight slope never flattens: every line ends by its trials, at its longest step.
    trace = run(lbfgs_wolfe(max_trials=3), lambda z: jnp.sum(z, axis=1), jnp.zeros((1, 4)), 7)
    values = [float(state.value[0]) for state, _ in trace]
    # First the start; then lines of three trials: 1, 2 and 4 times a step of length 1 (loss -2).
    np.testing.assert_allclose(values, [0, 0, 0, -8, -8, -8, -16], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"), [({"memory_size": 0}, "memory_size"), ({"max_trials": 1}, "max_trials")]
)
def test_bad_options_are_named(options, word):
    with pytest.raises(GGLError, match=word):
        lbfgs_wolfe(**options)
