"""Every optimiser finds known minima, counts its budget, and keeps the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggl_jax.adversary.optimizers import OPTIMIZERS, adam, best_so_far, cma_es, make_optimizer
from ggl_jax.errors import GGLError
from ggl_jax.types import NONFINITE, OK, STALLED

OPTIONS = {
    "steps": 150,
    "population": 16,
    "batch_size": 5,
    "num_initial": 20,
    "num_candidates": 200,
    "max_points": 64,
    "fit_steps": 20,
}
TARGET = jnp.asarray([0.5, -0.3, 0.8, -1.0])


def sphere(z):
    return jnp.sum((z - TARGET) ** 2, axis=1)


def sum_of_squares(z):
    return jnp.sum(z**2, axis=1)


def ellipsoid(z):
    return jnp.sum(10.0 ** jnp.arange(4) * (z - TARGET) ** 2, axis=1)


PROBLEMS = {"sphere": (sphere, 1e-2), "ellipsoid": (ellipsoid, 0.5)}


def run(optimizer, loss_fn, *, restarts=2, steps=150, seed=0):
    optimizer = best_so_far(optimizer)
    key = jax.random.key(seed)
    state = optimizer.init(key, jax.random.normal(key, (restarts, 4)))
    step = jax.jit(lambda key, state: optimizer.step(key, state, loss_fn))
    spent = 0
    for i in range(steps):
        state, info = step(jax.random.fold_in(key, i), state)
        spent += int(info.evaluations)
    return state, info, spent, step


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finds_the_minimum(name, problem):
    loss_fn, tolerance = PROBLEMS[problem]
    optimizer = make_optimizer(name, **OPTIONS)
    state, info, spent, _ = run(optimizer, loss_fn)
    assert float(jnp.max(state.losses)) < tolerance  # both restarts
    np.testing.assert_allclose(state.losses, loss_fn(state.latents), rtol=1e-4, atol=1e-6)
    assert spent == 150 * optimizer.evaluations_per_step(2)
    # An exact minimum stalls L-BFGS, rightly.
    assert int(info.status) in (OK, STALLED)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contract(name):
    optimizer = make_optimizer(name, **OPTIONS)
    key = jax.random.key(3)
    # A fresh size, first met inside a jit: nothing traced may be kept.
    fresh = jax.random.normal(key, (2, 5))
    jax.jit(optimizer.init)(key, fresh)
    jax.tree.map(
        np.asarray,
        jax.jit(lambda k, s: optimizer.step(k, s, sum_of_squares))(key, optimizer.init(key, fresh)),
    )
    state = optimizer.init(key, jax.random.normal(key, (2, 4)))
    eager_state, eager = optimizer.step(key, state, sphere)
    step = jax.jit(lambda key, state: optimizer.step(key, state, sphere))
    jit_state, jitted = step(key, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (eager_state, eager),
        (jit_state, jitted),
    )
    assert eager.latents.shape == (optimizer.evaluations_per_step(2), 4)
    # No second compilation: the state's shapes, dtypes and weak types are stable.
    step(key, jit_state)
    assert step._cache_size() == 1
    # vmap over instances of one = a single call.
    add = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    _, batched = jax.vmap(lambda k, s: optimizer.step(k, s, sphere))(key[None], add(state))
    np.testing.assert_allclose(batched.losses[0], eager.losses, rtol=1e-4, atol=1e-5)


def test_cma_es_survives_failed_and_tied_candidates():
    def flaky(z):
        losses = jnp.where(z[:, 0] > 0.6, jnp.nan, sphere(z))
        return jnp.where(losses > 4.0, 4.0, losses)

    state, _, _, _ = run(cma_es(population=16), flaky)
    assert float(jnp.min(state.losses)) < 1e-2
    assert bool(jnp.all(jnp.isfinite(state.latents)))


def test_ties_do_not_move_the_mean():
    # With all losses equal, the ranks are broken by index: the step stays a weighted mean of the
    # candidates, whose weights sum to one. evosax itself loses that under ties.
    optimizer = cma_es(population=200, sigma0=1.0)
    state = optimizer.init(jax.random.key(0), jnp.full((1, 4), 10.0))
    state, _ = optimizer.step(jax.random.key(1), state, lambda z: jnp.zeros(z.shape[0]))
    assert float(jnp.max(jnp.abs(state.mean[0] - 10.0))) < 1.0


def test_failed_steps_are_reported_as_data():
    _, info, _, _ = run(cma_es(population=8), lambda z: jnp.full(z.shape[0], jnp.nan), steps=2)
    assert int(info.status) == NONFINITE


def test_best_so_far_never_forgets_and_ignores_nan():
    optimizer = best_so_far(cma_es(population=8))
    state = optimizer.init(jax.random.key(0), jnp.zeros((1, 4)))
    state, _ = optimizer.step(jax.random.key(1), state, sphere)
    best = float(state.losses[0])
    worse, _ = optimizer.step(jax.random.key(2), state, lambda z: sphere(z) + 100.0)
    assert float(worse.losses[0]) == best
    np.testing.assert_array_equal(worse.latents, state.latents)
    nan, _ = optimizer.step(jax.random.key(3), state, lambda z: jnp.full(z.shape[0], jnp.nan))
    assert float(nan.losses[0]) == best


def test_best_so_far_keeps_restarts_apart():
    optimizer = best_so_far(adam(steps=10))
    starts = jnp.asarray([[0.5, -0.5, 1.0, 0.2], [9.0, 9.0, 9.0, 9.0]])
    state, _ = optimizer.step(None, optimizer.init(None, starts), sphere)
    np.testing.assert_array_equal(state.latents, starts)
    np.testing.assert_allclose(state.losses, sphere(starts))
    # The second restart's candidate is poor, but it is that restart's own.
    assert float(state.losses[1]) > float(state.losses[0])


def test_adam_stays_in_its_box():
    optimizer = adam(steps=50, learning_rate=0.5, box=0.3, schedule="ramp", signed=False)
    state, _, _, _ = run(optimizer, sphere, steps=50)
    assert float(jnp.max(jnp.abs(state.inner[0]))) == pytest.approx(0.3)


def test_cma_es_is_as_good_as_its_published_form():
    # Hansen's tutorial: on the 10-dimensional sphere the default strategy gains about one order
    # of magnitude in distance every 10 (dims) * ~1.2 generations; 1e-6 well within 250.
    optimizer = best_so_far(cma_es(population=10, sigma0=0.5))
    state = optimizer.init(jax.random.key(0), jnp.ones((1, 10)))
    step = jax.jit(lambda k, s: optimizer.step(k, s, lambda z: jnp.sum(z**2, axis=1))[0])
    for i in range(250):
        state = step(jax.random.key(i), state)
    assert float(state.losses[0]) < 1e-8


@pytest.mark.parametrize(
    ("options", "word"),
    [({"population": 3}, "population"), ({"sigma0": 0.0}, "sigma0"), ({"std_min": -1}, "std_min")],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(GGLError, match=word):
        cma_es(**options)


def test_unknown_optimizer_suggests():
    with pytest.raises(GGLError, match="Did you mean 'adam'"):
        make_optimizer("adm")
