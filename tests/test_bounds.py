"""Bounds beside closed forms, numerical integrals, and attacks that must not pass them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import TINY_SHAPE
from test_report import make_row

import ggl_jax as gx
from ggl_jax.audit import bounds, report
from ggl_jax.audit import folder as folders
from ggl_jax.audit.tables import BOUNDED, leakage, passed
from ggl_jax.client.defenses import parse
from ggl_jax.errors import GGLError
from ggl_jax.priors.gaussian import gaussian
from ggl_jax.spec import Client


@pytest.mark.parametrize(("num", "mu"), [(2, 0.3), (10, 1.5), (100, 3.0)])
def test_identification_is_the_blow_up_of_two_gaussians(num, mu):
    # By its definition, the largest P(E) with Q(E) <= kappa, on a grid: the cells of the largest
    # likelihood ratio come first (Neyman and Pearson).
    x = np.linspace(-9, 9 + mu, 200_001)
    q, p = (scipy.stats.norm.pdf(x, m) * (x[1] - x[0]) for m in (0.0, mu))
    order = np.argsort(-p / q)
    inside = np.cumsum(q[order]) <= 1 / num
    assert bounds.identification(num, mu) == pytest.approx(p[order][inside].sum(), rel=2e-3)


def test_identification_at_its_ends():
    assert bounds.identification(7, 0.0) == pytest.approx(1 / 7)
    assert bounds.identification(7, np.inf) == bounds.identification(1, 0.0) == 1.0
    for num, mu in ((0, 1.0), (2, -1.0), (2, np.nan)):
        with pytest.raises(GGLError, match=r"num: got 0|mu="):
            bounds.identification(num, mu)


@pytest.mark.parametrize(("num", "mu"), [(2, 0.4), (2, 1.0), (5, 1.0), (50, 2.0)])
def test_the_likeliest_of_n_does_not_pass_the_bound(num, mu):
    rng = np.random.default_rng(num)
    means = rng.normal(size=(num, 12))
    means *= mu / np.linalg.norm(means, axis=1, keepdims=True)
    means[1] = -means[0]  # opposite each other, where the bound is exact for two
    private = rng.integers(num, size=40_000)
    seen = means[private] + rng.normal(size=(len(private), 12))
    named = np.argmax(seen @ means.T, axis=1)  # all means have one norm
    found, allowed = np.mean(named == private), 4 / np.sqrt(4 * len(private))
    bound = bounds.identification(num, mu)
    assert 1 / num < found < bound + allowed
    assert num > 2 or found > bound - allowed


def linear(matrix):
    """The secants of ``f(x) = A x``."""
    factors = [(2**k) ** 2 for k in range(len(bounds.STEPS))]

    def secants(points, steps):
        return np.sum((steps @ matrix.T) ** 2, axis=1)[:, None] * factors

    return secants


@pytest.mark.parametrize("sigma", [0.01, 0.3, 10.0])
def test_bound_of_a_linear_gaussian_model_is_its_least_squared_error(sigma):
    rng = np.random.default_rng(0)
    size = 10
    images = 0.5 + rng.normal(size=(40, size)) @ rng.normal(size=(size, size)) / 10
    matrix = rng.normal(size=(14, size))
    normal = bounds.Normal.of(images)
    covariance = np.cov(images.T, bias=True)
    exact = np.linalg.inv(matrix.T @ matrix / sigma**2 + np.linalg.inv(covariance))
    basis = normal.directions
    information = basis @ matrix.T @ matrix @ basis.T
    found = bounds.squared_error(linear(matrix), information, normal, sigma)
    assert found.mse == pytest.approx(np.trace(exact) / size, rel=1e-4)
    assert found.prior == pytest.approx(np.trace(covariance) / size)
    # The conditional mean has that error, and so is just not below the bound.
    x = normal.draw(rng, 20_000)
    y = x @ matrix.T + sigma * rng.normal(size=(len(x), 14))
    estimate = normal.mean + (y - normal.mean @ matrix.T) @ (exact @ matrix.T / sigma**2).T
    error = np.mean((estimate - x) ** 2, axis=1)
    assert abs(error.mean() - found.mse) < 4 * error.std() / np.sqrt(len(x))
    # Fewer directions can only lower it.
    few = bounds.Normal.of(images, directions=4)
    own = few.directions @ matrix.T @ matrix @ few.directions.T
    assert bounds.squared_error(linear(matrix), own, few, sigma).mse < found.mse
    # As do badly chosen ones: a bound needs no right guess.
    assert bounds.squared_error(linear(matrix), 0 * information, normal, sigma).mse < found.mse


def least_error(function, sigma):
    """The least mean squared error of x ~ N(0, 1) from ``f(x) + sigma N(0, 1)``, integrated."""
    x = np.linspace(-6, 6, 1201)
    weights = scipy.stats.norm.pdf(x)
    values = function(x)
    y = np.linspace(values.min() - 6 * sigma, values.max() + 6 * sigma, 1501)
    joint = scipy.stats.norm.pdf(y[:, None], values, sigma) * weights
    mean = (joint @ x) / np.maximum(joint.sum(axis=1), 1e-300)
    return np.sum(joint * (x - mean[:, None]) ** 2) / np.sum(joint)


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda x: 2.0 * (x > 0), lambda x: 0 * x),  # a unit that switches
        (lambda x: np.tanh(2 * x) + 0.5 * np.sin(5 * x), None),
        (np.floor, lambda x: 0 * x),
    ],
)
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_no_estimate_passes_the_bound_of_a_curved_or_broken_function(function, slope, sigma):
    rng = np.random.default_rng(1)
    normal = bounds.Normal.of(rng.normal(size=(4000, 1)))
    # Exactly standard, for the integral.
    normal = normal._replace(mean=np.zeros(1), factor=np.ones((1, 1)), variances=np.ones(1))
    x = rng.normal(size=20_000)
    slopes = (function(x + 1e-4) - function(x - 1e-4)) / 2e-4 if slope is None else slope(x)
    information = np.array([[np.mean(slopes**2)]])

    def secants(points, steps):
        far = 2.0 ** np.arange(len(bounds.STEPS)) * steps / 2
        return (function(points + far) - function(points - far)) ** 2

    found = bounds.squared_error(secants, information, normal, sigma, num=4000)
    least = least_error(function, sigma)
    assert 0.02 * least < found.mse < found.estimate < least * 1.01
    if slope is not None:  # derivatives alone claim that nothing can be learnt
        assert 1 / (information[0, 0] / sigma**2 + 1) > 1.2 * least


def test_the_limit_fails_no_more_often_than_it_says():
    # Against the same bound from many samples; few of them per run, and a heavy spread.
    normal = bounds.Normal(np.zeros(1), np.ones((1, 1)), np.ones((1, 1)), np.ones(1))

    def secants(points, steps):
        far = 2.0 ** np.arange(len(bounds.STEPS)) * steps / 2
        return ((points + far) ** 3 - (points - far) ** 3) ** 2

    def of(num, seed):
        return bounds.squared_error(secants, np.array([[9.0]]), normal, 1.0, num=num, seed=seed)

    true = of(200_000, 0).estimate
    high = np.mean([of(40, seed).mse > true for seed in range(1, 400)])
    assert high < 1.5 * bounds.FAILURE
    assert np.mean([of(40, seed).estimate > true for seed in range(1, 400)]) > 3 * bounds.FAILURE


@pytest.mark.parametrize(
    ("spec", "before", "sigma"),
    [
        ("noise:0.1", "", 0.1),
        ("clip:4+noise:0.3+noise:0.4", "clip", 0.5),
        ("noise:0.3+clip:4+noise:0.4", "", 0.3),
        ("sparsify:0.5+noise:0.1", "sparsify", 0.1),
        ("noise:0.1+sparsify:0.5", "", 0.1),
        ("dpsgd:2,multiplier=0.5", "clip", 1.0),
    ],
)
def test_a_defense_is_read_as_what_comes_before_its_noise(spec, before, sigma):
    found = bounds.noisy(parse(spec))
    assert not found.reason
    assert found.sigma == pytest.approx(sigma)
    assert "+".join(stage.name.partition(":")[0] for stage in found.before) == before


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("none", "no Gaussian noise"),
        ("clip:4", "no Gaussian noise"),
        ("noise:0", "no Gaussian noise"),
        ("laplace:0.1", "no Gaussian noise"),
        ("soteria:0.5+noise:0.1", "costly"),
        ("noise:0.1+own", "may look at the image"),
    ],
)
def test_where_there_is_no_bound(spec, words):
    if spec.endswith("own"):
        own = gx.from_function(lambda key, update: update, name="own")
        defense = gx.chain(parse("noise:0.1"), own)
    else:
        defense = parse(spec)
    assert words in bounds.noisy(defense).reason


@pytest.fixture(scope="module")
def world(tiny_model, tiny_variables):
    rng = np.random.default_rng(0)
    size, rank = int(np.prod(TINY_SHAPE)), 6
    basis = np.linalg.qr(rng.normal(size=(size, rank)))[0]
    params = {"mean": jnp.full(size, 0.5), "factor": jnp.asarray(0.7 * basis, jnp.float32)}
    return gx.Public(tiny_model, tiny_variables, gaussian(TINY_SHAPE, rank), params)


@pytest.mark.parametrize("spec", ["noise:0.1", "clip:0.05+noise:0.1"])
def test_programs_are_the_clients_own_jacobian_and_differences(world, spec):
    model, variables = world.model, world.variables
    before, _, _ = bounds.noisy(parse(spec))
    programs = bounds._programs(model, Client(), before)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.uniform(size=192), jnp.float32)
    key = jax.random.key(0)

    def shared(one):
        images, labels = one.reshape(1, *TINY_SHAPE), jnp.array([1])
        update = gx.gradient(model, variables, images, labels)
        if before:  # layer by layer, written out
            update = jax.tree.map(
                lambda g: g * jnp.minimum(1, 0.05 / jnp.linalg.norm(g.ravel())), update
            )
        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(update)])

    dense = np.asarray(jax.jacobian(shared)(x), np.float64)
    directions = rng.normal(size=(3, 192)).astype(np.float32)
    found = [programs.product(variables, key, 1, x, v) for v in directions]
    np.testing.assert_allclose(found, directions @ (dense.T @ dense), rtol=2e-3, atol=1e-5)
    step = jnp.asarray(0.1 * directions[0])
    seen = programs.secant(variables, key, 1, x, step)
    ends = [shared(x + s * step / 2) for s in (1, -1)]
    assert seen == pytest.approx(float(jnp.sum((ends[0] - ends[1]) ** 2)), rel=1e-3)
    found = bounds.Bounds(world, key, 1)
    images = [rng.uniform(size=TINY_SHAPE) for _ in range(3)]
    updates = np.stack([shared(jnp.asarray(i, jnp.float32).ravel()) for i in images])
    radius = np.max(np.linalg.norm(updates - updates.mean(axis=0), axis=1))
    reach = found.reach(parse(spec), Client(), 1, images)
    assert reach == pytest.approx(radius / 0.1, rel=1e-3)
    # No noise, two images behind one update, or statistics without noise: no bound.
    one, two = (jnp.asarray(np.stack(images[:n])) for n in (1, 2))
    assert found.row(parse("clip:1"), Client(), one, [1], None) == {}
    assert found.row(parse(spec), Client(batch_size=2), two, [1, 1], None) == {}
    assert found.row(parse(spec), Client(share_statistics=True), one, [1], None) == {}


def test_no_attack_of_an_audit_passes_its_bounds(world, tmp_path):
    # Images that are what the bounds take them for, and the attack that comes nearest.
    draws = world.prior.sample_latent(jax.random.key(9), 18)
    images = np.clip(world.prior.apply(world.prior_params, draws), 0, 1)
    shared = {"model": world.model, "variables": world.variables, "others": images[6:]}
    prior = {"prior": world.prior, "prior_params": world.prior_params}
    effort = {"num_controls": 8, "ceiling_steps": 1, "bound_samples": 60}
    found = gx.audit(
        images[:6], [1] * 6, defenses=["noise:0.01", "clip:0.05+noise:0.1"],
        search=gx.search_of("quick", "regression", bank=40), out=tmp_path / "run",
        **shared, **prior, **effort,
    )  # fmt: skip
    groups = {group.defense: group for group in leakage(found.rows)}
    assert not any(passed(group, name) for group in groups.values() for name in BOUNDED)
    weak, strong = (group.means for group in groups.values())
    assert weak["bound_mse"].mean < weak["mse"].mean < 0.8 * strong["bound_mse"].mean
    assert strong["bound_mse"].mean < strong["mse"].mean
    assert weak["bound_identified"].mean >= weak["identified_pixels"].mean > 40
    assert strong["bound_identified"].mean <= strong["bound_identified_any"].mean < 60
    assert "bound_identified_any" not in weak  # noise alone bounds nothing beforehand
    text = report.make(folders.read(tmp_path / "run")).text()
    assert "## What no attack can pass" in text
    assert "beyond its bound" not in text


def test_an_attack_beyond_its_bound_is_told():
    def told(**changes):
        rows = [make_row(f"{i}", f"{i}", "noise:0.1", 12.0, **changes) for i in range(3)]
        (group,) = leakage(rows)
        text = "\n".join(report._bounds([group]))
        found = [passed(group, name) for name in BOUNDED]
        assert any(found) == ("beyond its bound** under noise:0.1" in text)
        return found

    bound = {"bound_mse": 0.02, "bound_identified": 0.5, "suspects": 10}
    assert told(mse=0.021, rank_pixels=2, rank_features=2, **bound) == [False, False]
    assert told(mse=0.019, rank_pixels=2, rank_features=2, **bound) == [True, False]
    assert told(mse=0.021, rank_pixels=1, rank_features=2, **bound) == [False, True]
