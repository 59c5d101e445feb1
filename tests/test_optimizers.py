"""Every optimiser finds known minima, counts its budget, and keeps the contract."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggl_jax import grammar
from ggl_jax.adversary.optimizers import (
    OPTIMIZERS,
    adam,
    best_so_far,
    cma_es,
    hybrid,
)
from ggl_jax.errors import GGLError
from ggl_jax.gate.parts import least_squares
from ggl_jax.trees import safe_sqrt
from ggl_jax.types import NONFINITE, OK, STALLED, Loss


def make_optimizer(name, **options):
    """By name, with those of the options that it has."""
    return grammar.build(OPTIMIZERS, name, what="optimizer", **options)


OPTIONS = {
    "steps": 150,
    "population": 16,
    "round_size": 5,
    "num_initial": 20,
    "num_candidates": 100,
    "max_points": 64,
    "fit_steps": 4,
}
TARGET = jnp.asarray([0.5, -0.3, 0.8, -1.0])


sphere = least_squares(lambda z: z - TARGET)
sum_of_squares = least_squares(lambda z: z)
ellipsoid = least_squares(lambda z: 10.0 ** (jnp.arange(4) / 2) * (z - TARGET))
rosenbrock = least_squares(
    lambda z: jnp.concatenate([10 * (z[:, 1:] - z[:, :-1] ** 2), 1 - z[:, :-1]], axis=1)
)


def waves(z):
    z = z - TARGET
    waves = jnp.exp(jnp.mean(jnp.cos(2 * jnp.pi * z), axis=1))
    return 20 - 20 * jnp.exp(-0.2 * jnp.sqrt(jnp.mean(z**2, axis=1))) + jnp.e - waves


ackley = Loss(waves, least_squares(lambda z: safe_sqrt(waves(z))[:, None]).products)


#: Problems in four dimensions; each has its minimum, 0, inside of [-2, 2]^4.
PROBLEMS = {
    "sphere": sphere,
    "ellipsoid": ellipsoid,
    "rosenbrock": rosenbrock,
    "ackley": ackley,
}


class Case(NamedTuple):
    """What an optimiser must reach from each of three random starts.

    ``budget`` counts gradient evaluations. ``targets`` go by problem; one that is not named
    has local minima or a valley that this method is not made for.
    """

    budget: int
    options: dict
    targets: dict


CASES = {
    "adam": Case(300, {}, {"sphere": 1e-6, "ellipsoid": 1e-5}),
    "cma_es": Case(
        1600,
        {"population": 16},
        {"sphere": 1e-6, "ellipsoid": 1e-6, "rosenbrock": 1e-2, "ackley": 1e-3},
    ),
    "hybrid": Case(
        1600,
        {"population": 12, "refine": 2, "refine_steps": 4},
        {"sphere": 1e-6, "ellipsoid": 1e-5, "rosenbrock": 0.6, "ackley": 1e-2},
    ),
    "kalman": Case(
        300,
        {"population": 10, "damping": 1e-3},
        {"sphere": 1e-6, "ellipsoid": 1e-6, "rosenbrock": 1e-2},
    ),
    "lbfgs": Case(100, {}, {"sphere": 1e-8, "ellipsoid": 1e-8}),
    "lbfgs_wolfe": Case(100, {}, {"sphere": 1e-8, "ellipsoid": 1e-8, "rosenbrock": 1e-6}),
    "turbo": Case(
        160,
        {
            "round_size": 8,
            "num_initial": 24,
            "num_candidates": 300,
            "fit_steps": 20,
            "failure_tolerance": 4,
        },
        {"sphere": 0.05, "ellipsoid": 2.5, "rosenbrock": 4.0, "ackley": 1.0},
    ),
}
NUM_STARTS = 3


def run(optimizer, loss_fn, *, restarts=2, steps=150, seed=0):
    optimizer = best_so_far(optimizer)
    key = jax.random.key(seed)
    state = optimizer.init(key, jax.random.normal(key, (restarts, 4)))
    step = jax.jit(lambda key, state: optimizer.step(key, state, loss_fn))
    for i in range(steps):
        state, info = step(jax.random.fold_in(key, i), state)
    return state, info


@functools.cache
def searches(name):
    """Everything that one optimiser finds: (BestState, evaluations, statuses), [problem, start].

    The problem is data, so that there is one compilation.
    """
    case = CASES[name]
    steps = case.budget // make_optimizer(name, **case.options).evaluations_per_step(1)
    optimizer = best_so_far(make_optimizer(name, steps=steps, **case.options))

    def search(problem, key):
        def step(state, key):
            every = PROBLEMS.values()
            parts = [one.losses for one in every], [one.products for one in every]
            loss_fn = Loss(*(functools.partial(jax.lax.switch, problem, part) for part in parts))
            return optimizer.step(key, state, loss_fn)

        state = optimizer.init(key, jax.random.normal(key, (1, 4)))
        state, info = jax.lax.scan(step, state, jax.random.split(key, steps))
        return state._replace(inner=None), jnp.sum(info.evaluations), info.status

    keys = jax.random.split(jax.random.key(0), NUM_STARTS)
    starts = jax.vmap(search, in_axes=(None, 0))
    return jax.jit(jax.vmap(starts, in_axes=(0, None)))(jnp.arange(len(PROBLEMS)), keys)


def random_search(loss_fn, budget, num):
    """Lowest of ``budget`` losses of uniform points, for each of ``num`` seeds."""
    points = jax.random.uniform(jax.random.key(9), (num * budget, 4), minval=-2, maxval=2)
    return np.asarray(loss_fn(points)).reshape(num, budget).min(axis=1)


def test_every_optimizer_has_a_case():
    assert set(CASES) == set(OPTIMIZERS)
    assert all(set(case.targets) <= set(PROBLEMS) for case in CASES.values())


@pytest.mark.parametrize(
    ("name", "problem"), [(name, problem) for name in CASES for problem in CASES[name].targets]
)
def test_reaches_its_target_within_its_budget(name, problem):
    budget, _, targets = CASES[name]
    best, evaluations, statuses = jax.tree.map(
        lambda x: np.asarray(x)[list(PROBLEMS).index(problem)], searches(name)
    )
    assert np.all(best.losses[:, 0] < targets[problem])
    # The remembered latent has the remembered loss, and the budget was kept.
    np.testing.assert_allclose(
        best.losses[:, 0], PROBLEMS[problem](best.latents[:, 0]), rtol=1e-3, atol=1e-5
    )
    assert np.all(evaluations <= budget)
    assert np.all(evaluations > 0.9 * budget)
    # An exact minimum stalls L-BFGS, rightly.
    assert np.all((statuses == OK) | ((statuses == STALLED) & (name in ("lbfgs", "lbfgs_wolfe"))))
    # The target is none that chance reaches: 19 of 20 random searches of this budget miss it, so
    # three of three by chance has a probability of about 1e-4.
    assert np.sum(random_search(PROBLEMS[problem], budget, 20) < targets[problem]) <= 1


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
    _, batched = jax.jit(jax.vmap(lambda k, s: optimizer.step(k, s, sphere)))(key[None], add(state))
    np.testing.assert_allclose(batched.losses[0], eager.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_budget_counts_every_candidate_that_the_loss_sees(name):
    seen = []

    def counting(part, z):
        seen.append(z.size // z.shape[-1])
        return part(z)

    optimizer = make_optimizer(name, **OPTIONS)
    key = jax.random.key(0)
    state = optimizer.init(key, jnp.zeros((3, 4)))
    # No loop hides repeated calls: the loss is traced as often as it is run.
    loss_fn = Loss(*(functools.partial(counting, part) for part in vars(sphere).values()))
    program = jax.make_jaxpr(lambda s: optimizer.step(key, s, loss_fn))(state)
    assert sum(seen) == optimizer.evaluations_per_step(3)
    assert program.out_avals[-3].shape == (sum(seen),)


def test_hybrid_remembers_basins():
    # The minimum is 160 deviations away: samples never meet it, gradients lead there.
    def funnel(z):
        return jnp.sqrt(jnp.sum(z**2, axis=1))

    options = {"population": 8, "refine": 8, "refine_steps": 10, "refine_rate": 1.0}
    start = jnp.full((1, 4), 8.0)
    optimizer = best_so_far(hybrid(sigma0=0.1, **options))
    state, info = optimizer.step(
        jax.random.key(1), optimizer.init(jax.random.key(0), start), funnel
    )
    samples, refined = info.losses[:8], info.losses[8:].reshape(11, 8)
    assert float(jnp.min(samples)) > 15 > 5 > float(jnp.max(jnp.min(refined, axis=0)))
    assert float(state.losses[0]) == float(jnp.min(refined))
    np.testing.assert_allclose(refined[0], jnp.sort(samples), rtol=1e-6)
    # The strategy keeps to its own samples.
    assert float(jnp.max(jnp.abs(state.inner.mean - start))) < 1.0
    # A candidate without a finite gradient stays, and its loss still counts.
    cliff = lambda z: jnp.where(z[:, 0] > 8, jnp.sqrt(0 * z[:, 1]) + 3, funnel(z))  # noqa: E731
    _, info = optimizer.step(jax.random.key(1), optimizer.init(jax.random.key(0), start), cliff)
    assert bool(jnp.all(jnp.isfinite(info.latents)))
    assert int(info.status) == OK


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"refine": 51}, "refine"),
        ({"refine_steps": 0}, "refine_steps"),
        ({"refine_rate": 0}, "rate"),
    ],
)
def test_bad_hybrid_options_are_named(options, word):
    with pytest.raises(GGLError, match=word):
        hybrid(**options)


def test_hybrid_ranks_by_basins():
    # Samples are better on the left (1 against 4), but only the right leads further down.
    def fork(z):
        return jnp.where(z[:, 0] > 0, 4 - z[:, 0], 1.0)

    def mean_after(optimizer):
        state = optimizer.init(jax.random.key(0), jnp.zeros((2, 4)))
        state, _ = optimizer.step(jax.random.key(1), state, fork)
        return state.mean[:, 0]

    assert float(jnp.max(mean_after(cma_es(population=400)))) < -0.3
    refined = hybrid(population=400, refine=400, refine_steps=10, refine_rate=1.0)
    assert float(jnp.min(mean_after(refined))) > 0.3


def test_cma_es_survives_failed_and_tied_candidates():
    def flaky(z):
        losses = jnp.where(z[:, 0] > 0.6, jnp.nan, sphere(z))
        return jnp.where(losses > 4.0, 4.0, losses)

    state, _ = run(cma_es(population=16), flaky)
    assert float(state.losses[0]) < 1e-2
    assert bool(jnp.all(jnp.isfinite(state.latents)))


def test_ties_do_not_move_the_mean():
    # With all losses equal, the ranks are broken by index: the step stays a weighted mean of the
    # candidates, whose weights sum to one. evosax itself loses that under ties.
    optimizer = cma_es(population=200, sigma0=1.0)
    state = optimizer.init(jax.random.key(0), jnp.full((1, 4), 10.0))
    state, _ = optimizer.step(jax.random.key(1), state, lambda z: jnp.zeros(z.shape[0]))
    assert float(jnp.max(jnp.abs(state.mean[0] - 10.0))) < 1.0


def test_failed_steps_are_reported_as_data():
    _, info = run(cma_es(population=8), lambda z: jnp.full(z.shape[0], jnp.nan), steps=2)
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_candidates_are_ordered_by_restart(name):
    # Restarts that start far apart stay apart: a restart's best must be near its own start.
    optimizer = best_so_far(
        make_optimizer(name, population=8, steps=10, sigma0=0.1, spread=0.1, num_initial=10)
    )
    starts = jnp.asarray([[-1.5] * 4, [1.5] * 4])
    state = optimizer.init(jax.random.key(0), starts)
    losses = least_squares(lambda z: z - jnp.sign(z[:, :1]) * 1.5)
    state, info = optimizer.step(jax.random.key(1), state, losses)
    first, second = info.latents.reshape(2, -1, 4)
    assert any(bool(jnp.all(state.latents[0] == row)) for row in first)
    assert any(bool(jnp.all(state.latents[1] == row)) for row in second)
    if name != "turbo":  # which starts from a design over its whole box
        assert bool(jnp.all(first[:, 0] < 0) & jnp.all(second[:, 0] > 0))


def test_adam_follows_its_published_schedules():
    # Under a constant gradient Adam moves by its step size, but for rounding.
    moved = {}
    for schedule in ("step", "ramp"):
        optimizer = adam(steps=80, learning_rate=0.1, schedule=schedule, signed=True)
        state, places = optimizer.init(None, jnp.zeros((1, 1))), []
        for _ in range(80):
            state, _ = optimizer.step(None, state, lambda z: jnp.sum(z, axis=1))
            places.append(float(state[0][0, 0]))
        moved[schedule] = -np.diff([0.0, *places])
    expected = np.repeat([1e-1, 1e-2, 1e-3, 1e-4], [30, 20, 20, 10])
    np.testing.assert_allclose(moved["step"], expected, rtol=0.05)
    # 4 steps of warm-up from 0, 56 at the full rate, then half a cosine over the last 20.
    np.testing.assert_allclose(moved["ramp"][:5], [0, 0.025, 0.05, 0.075, 0.1], rtol=0.01)
    np.testing.assert_allclose(moved["ramp"][5:60], 0.1, rtol=1e-3)
    down = 0.05 * (1 + np.cos(np.pi * np.arange(20) / 20))
    np.testing.assert_allclose(moved["ramp"][60:], down, rtol=1e-2, atol=1e-6)


def test_adam_stays_in_its_box():
    optimizer = adam(steps=50, learning_rate=0.5, box=0.3, schedule="ramp", signed=False)
    state, _ = run(optimizer, sphere, steps=50)
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
    with pytest.raises(GGLError, match=r"optimizer: got 'adm'.*did you mean 'adam'"):
        make_optimizer("adm")
