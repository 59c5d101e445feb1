"""TuRBO: its Gaussian process beside tinygp, its trust region by hand, and its search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggl_jax.adversary.optimizers import gaussian_process as gp
from ggl_jax.adversary.optimizers import turbo
from ggl_jax.adversary.optimizers.turbo import (
    candidates_around,
    latin_hypercube,
    start_region,
    update_region,
)
from ggl_jax.errors import GGLError

SMALL = {"round_size": 4, "num_initial": 8, "num_candidates": 100, "fit_steps": 10}


@pytest.fixture(scope="module")
def data():
    """12 used rows out of 16, in three dimensions; the padding holds rubbish."""
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(16, 3)).astype(np.float32)
    targets = np.sin(6 * points[:, 0]) + points[:, 1] ** 2 - 1
    targets[12:], mask = 1e3, np.arange(16) < 12
    hyper = gp.Hyperparameters(
        jnp.asarray([0.3, 0.7, 1.8]), jnp.asarray(1.7, jnp.float32), jnp.asarray(0.02, jnp.float32)
    )
    return points, targets.astype(np.float32), mask, hyper


def tiny_process(hyper, points):
    """The same process in tinygp (float64, inside ``jax.enable_x64``)."""
    tinygp = pytest.importorskip("tinygp")
    lengthscale, signal, noise = (jnp.asarray(x, np.float64) for x in hyper)
    # In several dimensions tinygp's Matérn kernels take the l1 norm unless told otherwise.
    matern = tinygp.kernels.Matern52(distance=tinygp.kernels.distance.L2Distance())
    kernel = signal * tinygp.transforms.Linear(1 / lengthscale, matern)
    return tinygp.GaussianProcess(
        kernel, np.asarray(points, np.float64), diag=noise + gp.JITTER * signal
    )


def test_marginal_likelihood_and_its_gradient_are_tinygps(data):
    points, targets, mask, hyper = data
    value, gradient = jax.value_and_grad(gp.log_marginal_likelihood)(hyper, points, targets, mask)
    used = points[mask], targets[mask], np.ones(12, bool)
    unpadded = jax.value_and_grad(gp.log_marginal_likelihood)(hyper, *used)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, (value, gradient), unpadded)
    with jax.enable_x64(True):
        theirs = jax.value_and_grad(
            lambda hyper: tiny_process(hyper, points[mask]).log_probability(
                np.asarray(targets[mask], np.float64)
            )
        )(jax.tree.map(lambda x: np.asarray(x, np.float64), hyper))
    np.testing.assert_allclose(value, theirs[0], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), gradient, theirs[1])


@pytest.mark.slow
def test_draws_have_the_posteriors_moments(data):
    points, targets, mask, hyper = data
    # Seen, near, and far from the data.
    queries = np.stack([points[0], [0.5, 0.5, 0.5], [0.9, 0.1, 0.2], [3.0, 3.0, 3.0]])
    queries = queries.astype(np.float32)
    draw = jax.jit(
        jax.vmap(lambda key: gp.sample_posterior(key, hyper, *data[:3], queries, num=20))
    )
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 400)), np.float64).reshape(-1, 4)
    with jax.enable_x64(True):
        process = tiny_process(hyper, points[mask])
        told = process.condition(
            np.asarray(targets[mask], np.float64), np.asarray(queries, np.float64)
        ).gp
        mean, cov = np.asarray(told.mean), np.asarray(told.covariance)
    deviation = np.sqrt(np.diag(cov))
    # 8,000 draws, 400 of them with frequencies of their own: standard errors are 1.1 % of a
    # deviation, and about 1.6 % of a variance.
    assert np.all(np.abs(draws.mean(axis=0) - mean) < 0.05 * deviation)
    np.testing.assert_allclose(
        np.cov(draws.T) / np.outer(deviation, deviation),
        cov / np.outer(deviation, deviation),
        atol=0.06,
    )
    # The four points tell the cases apart.
    assert deviation[0] < 0.2 < deviation[2] < deviation[3]


def test_fit_finds_the_scales_that_matter():
    rng = np.random.default_rng(1)
    points = rng.uniform(size=(40, 3)).astype(np.float32)
    targets = np.sin(8 * points[:, 0])
    targets = ((targets - targets.mean()) / targets.std()).astype(np.float32)
    mask = np.ones(40, bool)
    fit = jax.jit(functools.partial(gp.fit, steps=50))
    hyper = fit(points, targets, mask)
    assert float(jnp.min(hyper.lengthscale[1:])) > 1.5 > 0.6 > float(hyper.lengthscale[0])
    ranges = (gp.LENGTHSCALE, gp.SIGNAL, gp.NOISE)
    for values, (low, high) in zip(hyper, ranges, strict=True):
        assert low < float(jnp.min(values)) <= float(jnp.max(values)) < high
    assert float(hyper.noise) < 2e-3
    pad = np.full((24, 3), 0.3, np.float32)
    padded = fit(
        np.concatenate([points, pad]), np.append(targets, pad[:, 0]), np.append(mask, pad[:, 0] > 1)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), padded, hyper)


def test_degenerate_data_gives_finite_draws():
    # 60 copies of one point and no noise to speak of: singular but for the jitter.
    points = np.full((64, 5), 0.25, np.float32)
    hyper = gp.Hyperparameters(jnp.full(5, 2.0), jnp.asarray(20.0), jnp.asarray(5e-4))
    for used in (0, 60):
        mask = np.arange(64) < used
        draws = gp.sample_posterior(
            jax.random.key(0), hyper, points, np.ones(64, np.float32), mask, points[:3], num=2
        )
        assert bool(jnp.all(jnp.isfinite(draws)))
    np.testing.assert_allclose(draws, 1.0, atol=0.1)
    assert bool(jnp.all(jnp.isfinite(gp.fit(points, points[:, 0], mask, steps=2).lengthscale)))


@pytest.mark.parametrize(
    ("outcomes", "length"),
    [
        ("++", 0.8),
        ("+++", 1.6),
        ("++++++", 1.6),  # never above the maximum
        ("++-++", 0.8),  # in a row
        ("+++---+++", 1.6),  # counters start anew after a change
        ("----", 0.8),
        ("-----", 0.4),
        ("----+-----", 0.4),
        ("-----" * 3, 0.1),
    ],
)
def test_trust_region_rules(outcomes, length):
    region = start_region()
    for outcome in outcomes:
        region = update_region(
            region, jnp.asarray(outcome == "+"), success_tolerance=3, failure_tolerance=5
        )
    np.testing.assert_allclose(region.length, length, rtol=1e-6)


def test_latin_hypercube_has_one_point_in_each_slice():
    points = np.asarray(latin_hypercube(jax.random.key(0), 20, 3))
    for axis in points.T:
        np.testing.assert_array_equal(np.sort(np.floor(axis * 20)), np.arange(20))
    assert abs(np.corrcoef(points.T)[0, 1]) < 0.6  # the axes are shuffled apart


def test_candidates_fill_the_scaled_region():
    lengthscale = jnp.asarray([0.1, 0.2, 0.4])
    centre = jnp.full(3, 0.5)
    points = np.asarray(candidates_around(jax.random.key(0), centre, lengthscale, 0.4, 4000))
    sides = points.max(axis=0) - points.min(axis=0)
    np.testing.assert_allclose(sides, [0.2, 0.4, 0.8], rtol=0.01)
    np.testing.assert_allclose(points.mean(axis=0), 0.5, atol=0.02)
    # At a face of the cube the region is cut, not moved.
    edge = np.asarray(candidates_around(jax.random.key(0), jnp.ones(3), jnp.ones(3), 0.4, 500))
    assert 0.8 <= edge.min() < 0.81
    assert edge.max() <= 1.0
    # Many dimensions: about 20 entries move, and never none.
    centre = jnp.full(200, 0.5)
    wide = np.asarray(candidates_around(jax.random.key(1), centre, jnp.ones(200), 0.4, 2000))
    moved = (wide != 0.5).sum(axis=1)
    assert moved.min() >= 1
    assert abs(moved.mean() - 20.9) < 0.5


@functools.cache
def _stepper(loss_fn, items):
    optimizer = turbo(**dict(items))
    return optimizer, jax.jit(lambda key, state: optimizer.step(key, state, loss_fn))


def trace(loss_fn, *, rounds, start=None, seed=0, **options):
    """(state, info) of each round, from one compilation."""
    optimizer, step = _stepper(loss_fn, tuple(sorted({**SMALL, **options}.items())))
    key = jax.random.key(seed)
    state = optimizer.init(key, jnp.zeros((1, 3)) if start is None else start)
    out = []
    for i in range(rounds):
        state, info = step(jax.random.fold_in(key, i), state)
        out.append((state, info))
    assert step._cache_size() == 1
    return out


def flat(z):
    return jnp.ones(z.shape[0])


def test_design_then_failures_then_restart():
    start = jnp.asarray([[0.4, -9.0, 1.0]])
    out = trace(flat, rounds=12, start=start, steps=12, failure_tolerance=1)
    # The design: two rounds that start at the (clipped) start and leave the region alone.
    np.testing.assert_allclose(out[0][1].latents[0], [0.4, -2.0, 1.0], atol=1e-6)
    lengths = np.asarray([state.region.length[0] for state, _ in out])
    # Then every round halves it: 0.8 / 2^7 is below 2^-7, so the seventh starts a new run.
    np.testing.assert_allclose(lengths[:8], [0.8, 0.8, *(0.8 / 2.0 ** np.arange(1, 7))])
    assert lengths[8] == np.float32(0.8)
    counts = [int(jnp.sum(jnp.isfinite(state.losses))) for state, _ in out]
    assert counts == [4, 8, 12, 16, 20, 24, 28, 32, 0, 4, 8, 12]
    # The new design is another one, and it is what gets evaluated.
    old, new = out[7][0].design[0], out[8][0].design[0]
    assert float(jnp.max(jnp.abs(old - new))) > 0.1
    np.testing.assert_allclose(out[9][1].latents, 4 * new[:4] - 2, atol=1e-5)
    for _, info in out:
        assert float(jnp.max(jnp.abs(info.latents))) <= 2.0 + 1e-6


def bowl(z):
    return jnp.sum((z - 0.5) ** 2, axis=1)


@pytest.mark.slow
def test_failed_candidates_are_not_modelled():
    def flaky(z):
        return jnp.where(z[:, 0] > 0.8, jnp.nan, bowl(z))

    out = trace(flaky, rounds=12, steps=12)
    assert any(bool(jnp.any(jnp.isnan(info.losses))) for _, info in out)
    state = out[-1][0]
    used = np.isfinite(np.asarray(state.losses[0]))
    assert used.sum() == sum(int(jnp.sum(jnp.isfinite(info.losses))) for _, info in out)
    latents = 4 * np.asarray(state.points[0])[used] - 2
    np.testing.assert_allclose(bowl(latents), state.losses[0][used], rtol=1e-3, atol=1e-4)
    assert float(jnp.min(state.losses)) < 0.05
    # Not one finite loss: the search goes on without a model.
    state, info = trace(lambda z: jnp.full(z.shape[0], jnp.nan), rounds=4, steps=4)[-1]
    assert bool(jnp.all(jnp.isfinite(info.latents)))


def test_a_full_memory_drops_what_is_furthest_from_the_best():
    out = trace(bowl, rounds=12, steps=12, max_points=16)
    for (before, _), (after, _) in itertools.pairwise(out[4:]):
        assert after.losses.shape == (1, 16)
        assert bool(jnp.all(jnp.isfinite(after.losses)))
        best = int(jnp.argmin(before.losses[0]))
        distance = np.linalg.norm(before.points[0] - before.points[0][best], axis=1)
        kept = np.sort(distance)[:12]
        rows = {tuple(row) for row in np.asarray(after.points[0]).tolist()}
        for row, far in zip(np.asarray(before.points[0]).tolist(), distance, strict=True):
            assert (tuple(row) in rows) == (far <= kept[-1])


@pytest.mark.slow
def test_scan_over_instances_is_the_loop():
    optimizer = turbo(steps=5, **SMALL)
    starts = jnp.zeros((2, 1, 3))
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    @jax.vmap
    def scanned(key, start):
        def body(state, index):
            return optimizer.step(jax.random.fold_in(key, index), state, bowl)

        return jax.lax.scan(body, optimizer.init(key, start), jnp.arange(5))[1].losses

    losses = scanned(keys, starts)
    _, step = _stepper(bowl, tuple(sorted({**SMALL, "steps": 5}.items())))
    for key, start, theirs in zip(keys, starts, losses, strict=True):
        state = optimizer.init(key, start)
        for i in range(5):
            state, info = step(jax.random.fold_in(key, i), state)
            np.testing.assert_allclose(info.losses, theirs[i], rtol=2e-2, atol=2e-3)


def test_restarts_are_independent_runs():
    optimizer = turbo(steps=4, **SMALL)
    state = optimizer.init(jax.random.key(0), jnp.zeros((3, 3)))
    assert optimizer.evaluations_per_step(3) == 12
    designs = np.asarray(state.design)
    assert np.abs(designs[0] - designs[1]).max() > 0.1
    _, info = optimizer.step(jax.random.key(1), state, bowl)
    np.testing.assert_allclose(info.latents, 4 * designs[:, :4].reshape(12, 3) - 2, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"round_size": 0}, "round_size"),
        ({"num_initial": 1}, "num_initial"),
        ({"half_width": 0.0}, "half_width"),
        ({"num_candidates": 5}, "num_candidates"),
        ({"success_tolerance": 0}, "success_tolerance"),
        ({"failure_tolerance": 0}, "failure_tolerance"),
        ({"fit_steps": 0}, "fit_steps"),
        ({"max_points": 260}, "max_points"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(GGLError, match=word):
        turbo(**options)
