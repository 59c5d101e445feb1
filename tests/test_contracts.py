"""What every registered defense must keep, in one table: the ways to run it, its law, its options.

A new defense gets a line in ``conftest.DEFENSE_SPECS`` and, here, in :data:`LAWS` if it is random,
in :data:`EXACT` if the private image's own update is simulated exactly, and in :data:`ESTIMATES`.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import DEFENSE_SPECS
from dp_accounting import get_epsilon_gaussian
from jax.flatten_util import ravel_pytree

from ggl_jax import trees
from ggl_jax.adversary.estimation import compare
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.audit import privacy
from ggl_jax.client.bottleneck import with_bottleneck
from ggl_jax.client.defenses import DEFENSES, parse
from ggl_jax.client.defenses.nvflare import mean_of_cut
from ggl_jax.client.gradients import gradient
from ggl_jax.errors import GGLError
from ggl_jax.types import Context, Defense

CHAINS = ["clip:0.5+noise:0.01", "soteria:0.5+clip:0.5", "clip:0.5+sign", "qsgd:3+clip:0.5"]
SPECS = [
    *DEFENSE_SPECS.values(),
    "sign:scaled=True",
    "censor:3,exact=False",
    "clip:0.5,layerwise=False",
    "soteria:0.5,representation=False",
    *CHAINS,
]

#: Whose simulation meets the observed update at the private image.
EXACT = [
    *("none", "clip", "sparsify", "soteria", "sign", "topk", "randomk", "dropout"),
    *("percentile", "censor", "precode"),
]

#: With tests of their own laws, below.
OWN = ["dpsgd", "flower", "svt", "outpost", "censor", "mixup", "ats", "graddefense"]


def behind(model, variables, images):
    images, labels = images[:1], np.array([1])
    update = gradient(model, variables, images, labels)
    return update, Context(model, variables, images, labels)


@pytest.fixture(scope="module")
def shared(tiny_model, tiny_variables, tiny_images):
    return behind(tiny_model, tiny_variables, tiny_images)


@pytest.fixture(scope="module")
def for_spec(tiny_model, tiny_images, shared):
    """What a client shares, of a model that the defense can be applied to."""
    narrow = with_bottleneck(tiny_model, 5)
    other = behind(narrow, jax.jit(narrow.init)(jax.random.key(0)), tiny_images)
    return lambda spec: other if spec.startswith("precode") else shared


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), a, b)


def test_the_registry_is_covered():
    assert DEFENSE_SPECS.keys() == DEFENSES.keys()
    for name, spec in DEFENSE_SPECS.items():
        assert parse(spec).view.name == spec.partition(":")[0] == name
    assert LAWS.keys() | {*EXACT, *OWN} == DEFENSES.keys()


@pytest.mark.parametrize("spec", SPECS)
def test_defense_contract(spec, for_spec):
    update, context = for_spec(spec)
    defense = parse(spec)
    assert isinstance(defense, Defense)
    assert list(inspect.signature(defense.apply).parameters) == ["key", "update", "context"]
    head = context.model.head
    key = jax.random.key(0)

    eager, record = defense.apply(key, update, context)
    share = jax.jit(
        lambda key, update, images: defense.apply(key, update, context._replace(images=images))
    )
    close(share(key, update, context.images), (eager, record))
    share(jax.random.key(1), update, context.images)
    assert share._cache_size() == 1
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(jnp.shape, update)

    estimate = functools.partial(defense.view.estimate, head=head)
    estimated = estimate(eager)
    simulated = defense.view.simulate(estimated, update)

    @jax.jit
    def compiled(observed, estimated, update):
        one = jax.tree.map(lambda x: x[None], (observed, estimated, update))
        alone = estimate(observed), defense.view.simulate(estimated, update)
        return alone, (jax.vmap(estimate)(one[0]), jax.vmap(defense.view.simulate)(*one[1:]))

    alone, batch = compiled(eager, estimated, update)
    close(alone, (estimated, simulated))
    close(batch, jax.tree.map(lambda x: x[None], (estimated, simulated)))
    noisy = jax.eval_shape(lambda o: estimate(o, noise=jnp.float32(0.01)), eager)
    assert jax.tree.structure(noisy) == jax.tree.structure(estimated)
    assert jax.tree.structure(simulated) == jax.tree.structure(update)
    factored = None if defense.view.factor is None else defense.view.factor(estimated)
    if factored is not None:
        result = update
        if factored.mask is not None:
            result = jax.tree.map(jnp.multiply, factored.mask, result)
        if factored.scale is not None:
            result = jax.tree.map(jnp.multiply, factored.scale(trees.sq_norms(result)), result)
        close(result, simulated)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((eager, estimated, simulated)))
    if defense.view.noise_std is not None:
        assert jnp.shape(defense.view.noise_std(estimated)) == ()


# --------------------------------------------------------------------------------------------------
# The law of random defenses
# --------------------------------------------------------------------------------------------------

HEAD = ("head",)


@functools.cache
def synthetic():
    """An update with heavy tails, some zeros, and a head whose rows sum to zero."""
    rng = np.random.default_rng(0)
    body = rng.standard_normal((96, 128)) * np.exp(rng.standard_normal((96, 128)))
    rows = rng.gamma(2, 1, (400, 1)) * np.array([0.3, -0.8, 0.5])
    silent = rng.laplace(size=(40, 50)) * (np.arange(50) % 3 != 0)
    tree = {
        "body": {"kernel": 0.1 * body, "bias": 0.1 * rng.standard_normal(7)},
        "silent": {"kernel": 0.2 * silent},
        "head": {"kernel": rows, "bias": np.array([0.3, -0.8, 0.5])},
    }
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def rounding(levels):
    """Mean and variance of an entry that is rounded to multiples of the norm over ``levels``."""

    def law(g):
        q = np.linalg.norm(g) / levels
        p = np.abs(g) / q - np.floor(np.abs(g) / q)
        return g, q**2 * p * (1 - p)

    return law


def ternary_law(g):
    g = np.clip(g, -2 * g.std(), 2 * g.std())
    return g, np.abs(g) * (np.abs(g).max() - np.abs(g))


def kept(ratio):
    def law(g):
        k = g.size - np.floor((1 - ratio) * g.size + 1e-9)
        return g, g**2 * (g.size / k - 1)

    return law


#: ``law(tensor) -> (mean, variance)`` of each entry of :data:`DEFENSE_SPECS`' defense.
LAWS = {
    "noise": lambda g: (g, 0 * g + 0.1**2),
    "laplace": lambda g: (g, 0 * g + 2 * 0.1**2),
    "qsgd": rounding(3),
    "ternary": ternary_law,
    "randomk": kept(0.3),
    "dropout": lambda g: (g, g**2 * 0.4 / 0.6),
}


@pytest.mark.parametrize("name", LAWS)
def test_random_defenses_have_their_mean_and_variance(name):
    """Within five standard errors; a mean a tenth off or a variance a fifth off is rejected."""
    num, update = 300, synthetic()
    defense = parse(DEFENSE_SPECS[name])
    draw = jax.jit(jax.vmap(lambda key: defense.apply(key, update, None)[0]))
    drawn = jax.tree.leaves(draw(jax.random.split(jax.random.key(5), num)))
    offs, squares, means = [], [], []
    for x, g in zip(drawn, jax.tree.leaves(update), strict=True):
        mean, variance = LAWS[name](np.asarray(g, np.float64))
        x = np.asarray(x, np.float64)
        largest = np.max(np.abs(g))
        random = variance > 1e-9 * largest**2
        fixed = np.broadcast_to(mean, x.shape)[:, ~random]
        np.testing.assert_allclose(x[:, ~random], fixed, rtol=1e-3, atol=1e-4 * largest)
        std = np.sqrt(variance[random])
        offs.append(((x[:, random] - mean[random]) / std).T)
        means.append(mean[random] / std)
    offs, means = np.concatenate(offs), np.concatenate(means)
    squares = offs**2

    def unbiased(shift):
        # Sum over entries, each with the weight that finds a shift of the mean best.
        found = np.sum(means * (np.mean(offs, axis=1) - shift * means))
        return abs(found) < 5 * np.sqrt(np.sum(means**2) / num)

    def right(factor):
        one_entry = np.mean(squares, axis=1)
        stderr = np.std(one_entry) / np.sqrt(one_entry.size)
        return abs(np.mean(one_entry) / factor - 1) < 5 * stderr

    assert unbiased(0)
    assert not unbiased(0.1)
    assert not unbiased(-0.1)
    assert right(1)
    assert not right(0.8)
    assert not right(1.2)


def test_dpsgd_is_optaxs(tiny_model, tiny_variables, tiny_images):
    """Each image's gradient is clipped, before the sum; the noise is divided by their number."""
    context = Context(tiny_model, tiny_variables, tiny_images, jnp.array([1, 2]))
    each = jax.jit(jax.vmap(lambda x, y: gradient(tiny_model, tiny_variables, x[None], y[None])))(
        tiny_images, context.labels
    )
    rule = optax.contrib.differentially_private_aggregate(0.5, 0.0, jax.random.key(0))
    expected, _ = rule.update(each, rule.init(None))

    def shared(spec):
        return jax.jit(lambda key: parse(spec).apply(key, None, context))(jax.random.key(0))

    clean, _ = shared("dpsgd:0.5,multiplier=0")
    close(clean, expected)
    noisy, record = shared("dpsgd:0.5,multiplier=2")
    assert record[1]["sigma"] == 0.5
    drawn = ravel_pytree(jax.tree.map(jnp.subtract, noisy, clean))[0]
    assert abs(jnp.mean(drawn**2) / 0.25 - 1) < 5 * np.sqrt(2 / drawn.size)


def test_privacy_is_dp_accountings():
    """Of one update: the exact epsilon, below what the classical formula was asked for."""
    found = privacy.mechanism(parse("dpsgd:3,multiplier=1.5"), 62)
    assert found == (3.0, 4.5, "")
    own = privacy.epsilon(found.bound, found.sigma, rounds=1, delta=1e-5)
    assert own == pytest.approx(get_epsilon_gaussian(1.5, 1e-5))
    for sensitivity, private in ((2, True), (1, False)):
        spec = f"flower:0.9,clipping_norm=2,sensitivity={sensitivity}"
        found = privacy.mechanism(parse(spec), 62)
        sigma = sensitivity * np.sqrt(2 * np.log(1.25e5)) / 0.9
        assert found == (2.0, pytest.approx(sigma), "")
        own = privacy.epsilon(found.bound, found.sigma, rounds=1, delta=1e-5)
        assert (own <= 0.9) == private
    for spec in ("laplace:0.1", "clip:1+sign", "svt", "outpost", "censor", "qsgd:4"):
        assert privacy.mechanism(parse(spec), 62).sigma == 0


def test_percentile_is_numpys():
    update = synthetic()
    shared, _ = parse("percentile:60,gamma=0.05").apply(None, update, None)
    g, y = (np.asarray(ravel_pytree(tree)[0]) for tree in (update, shared))
    expected = np.where(np.abs(g) < np.percentile(np.abs(g), 60), 0, np.clip(g, -0.05, 0.05))
    assert np.mean(y != expected) < 1e-3  # rounding of the percentile
    assert 0.35 < np.mean(y != 0) <= 0.41


def test_svt_shares_its_fraction_and_noise_that_is_cut_has_that_mean():
    update = synthetic()
    defense = parse("svt:0.25,epsilon=50,noise_var=2,gamma=0.1,tau=0.05")
    g = np.asarray(ravel_pytree(update)[0])
    shared, _ = jax.jit(lambda key: defense.apply(key, update, None))(jax.random.key(0))
    y = np.asarray(ravel_pytree(shared)[0])
    assert np.sum(y != 0) == pytest.approx(np.ceil(0.25 * g.size), abs=2)
    assert np.mean(np.abs(g[y != 0]) > 0.05) > 1.1 * np.mean(np.abs(g) > 0.05)
    g = jnp.array([-0.3, -0.1, 0.0, 0.04, 0.1, 0.12])
    drawn = jnp.clip(g + 0.07 * jax.random.laplace(jax.random.key(1), (40_000, 6)), -0.1, 0.1)
    error = jnp.mean(drawn, axis=0) - mean_of_cut(g, jnp.float32(0.1), jnp.float32(0.07))
    assert jnp.all(jnp.abs(error) < 5 * jnp.std(drawn, axis=0) / 200)


def test_outpost_prunes_and_adds_noise_where_information_is(shared):
    update, context = shared
    defense = parse("outpost:0.5,phi=30,prune=80")
    draw = jax.jit(jax.vmap(lambda key: defense.apply(key, update, context)[0]))
    drawn = draw(jax.random.split(jax.random.key(0), 400))
    information = [np.mean(np.square(g), axis=-1, keepdims=True) for g in jax.tree.leaves(update)]
    threshold = np.percentile(np.concatenate([f.ravel() for f in information]), 70)
    params = jax.tree.leaves(context.variables["params"])
    for x, g, f, w in zip(
        jax.tree.leaves(drawn), jax.tree.leaves(update), information, params, strict=True
    ):
        noisy = np.broadcast_to(f >= threshold * (1 - 1e-5), g.shape)
        pruned = np.where(np.abs(g) < np.percentile(np.abs(g), 80) * (1 - 1e-5), 0, g)
        sigma = 0.5 * min(np.var(w, ddof=1), 1)
        np.testing.assert_allclose(np.mean(x, axis=0), pruned, atol=5.5 * sigma / 20 + 1e-7)
        spread = np.std(x, axis=0)
        np.testing.assert_allclose(spread, noisy * sigma, rtol=0.25, atol=1e-7)


def test_censor_is_orthogonal_as_published_and_not_as_released(shared):
    update, context = shared
    big = jax.tree.map(lambda g: 40 * g, update)
    along = {}
    for form in ("exact=True", "exact=False"):
        defense = parse(f"censor:20,{form}")
        share = jax.jit(lambda key, defense=defense: defense.apply(key, big, context)[0])
        found = []
        for seed in range(4):
            y = share(jax.random.key(seed))
            for a, g in zip(jax.tree.leaves(y), jax.tree.leaves(big), strict=True):
                if g.size > 4:
                    assert abs(jnp.linalg.norm(a) / jnp.linalg.norm(g) - 1) < 1e-3
            pairs = zip(jax.tree.leaves(y), jax.tree.leaves(big), strict=True)
            found.append(sum(jnp.vdot(a, g) for a, g in pairs))
        along[form] = np.array(found) / sum(jnp.sum(g**2) for g in jax.tree.leaves(big))
    assert np.abs(along["exact=True"]).max() < 1e-3
    # The lowest loss is where the update points along the gradient.
    assert along["exact=False"].min() > 0.02


# --------------------------------------------------------------------------------------------------
# The server's side
# --------------------------------------------------------------------------------------------------

#: Specification -> largest relative error of each estimate, on the synthetic update.
ESTIMATES = {
    "noise:0.1": {"sigma": 0.05},
    "laplace:0.1": {"scale": 0.08},
    "laplace:0.02": {"scale": 0.08},
    "clip:0.5": {"bound": 1e-4},
    "sparsify:0.9": {"rate": 0.01},
    "topk:0.05": {"rate": 0.01},
    "randomk:0.3": {"rate": 1e-3},
    "dropout:0.4": {"rate": 0.02},
    "qsgd:1": {"sigma": 0.15},
    "qsgd:4": {"sigma": 0.15},
    "qsgd:64": {"sigma": 0.15},
    "qsgd:1024": {"sigma": 0.15},
    "ternary:2.5": {"sigma": 0.15},
    "ternary:0": {"sigma": 0.15},
    "flower:0.5,sensitivity=0.001": {"bound": 0.15, "sigma": 0.1},
    "percentile:60,gamma=0.05": {"gamma": 1e-6, "rate": 0.02},
    "svt:0.3,noise_var=1,gamma=20": {"gamma": 1e-6, "scale": 0.1},
    "svt:0.1,noise_var=4,gamma=20": {"gamma": 1e-6, "scale": 0.1},
}


@pytest.mark.parametrize("spec", ESTIMATES)
def test_estimates_from_the_update_alone(spec):
    defense = parse(spec)

    @jax.jit
    def both(key):
        observed, record = defense.apply(key, synthetic(), None)
        return record, defense.view.estimate(observed, HEAD)

    errors = compare(*both(jax.random.key(3)))
    for key, allowed in ESTIMATES[spec].items():
        assert errors[f"{key}_error"] < allowed, errors


@pytest.mark.parametrize("name", EXACT)
def test_the_private_image_itself_has_loss_zero(name, for_spec):
    update, context = for_spec(name)
    defense = parse(DEFENSE_SPECS[name])
    observed, _ = jax.jit(lambda key: defense.apply(key, update, context))(jax.random.key(1))
    estimated = defense.view.estimate(observed, context.model.head)
    variables = context.variables
    if defense.view.rewire is not None:
        variables = defense.view.rewire(estimated, variables, context.model.head)

    @jax.jit
    @jax.value_and_grad
    def loss(images):
        return matching_loss(
            context.model, variables, observed, view=defense.view, estimated=estimated
        )(images[None], jnp.asarray(context.labels))[0]

    at_zero = sum(float(jnp.sum(y**2)) for y in jax.tree.leaves(observed))
    # The rate of what was dropped at random is known to some per cent only.
    assert loss(context.images)[0] < (0.02 if name in ("randomk", "dropout") else 1e-6) * at_zero
    value, slope = loss(1 - context.images)
    assert value > 1e-3 * at_zero
    assert 0 < jnp.sum(jnp.square(slope)) < jnp.inf


def test_a_sign_without_a_derivative_is_offered(shared):
    update, _ = shared
    weigh = jax.tree.map(lambda g: jnp.cos(jnp.arange(g.size)).reshape(g.shape), update)
    for spec, moves in (("sign", True), ("sign:straight_through=False", False)):
        simulate = parse(spec).view.simulate

        def seen(g, simulate=simulate):
            return sum(map(jnp.vdot, jax.tree.leaves(simulate({}, g)), jax.tree.leaves(weigh)))

        slope = jax.grad(seen)(update)
        assert jax.tree.all(
            jax.tree.map(lambda d, w, m=moves: bool(jnp.all(d == m * w)), slope, weigh)
        )


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------

#: Option -> a value that is taken and one that is not, where no defense says otherwise.
OPTIONS = {
    "sigma": ("0.2", "-1"),
    "bound": ("2", "0"),
    "rate": ("0.3", "1"),
    "ratio": ("0.3", "0"),
    "chunk_size": ("4", "0"),
    "levels": ("2", "0.5"),
    "clip": ("3", "-1"),
    "scale": ("0.2", "-1"),
    "scaled": ("True", "mean"),
    "straight_through": ("False", "2"),
    "exact": ("False", "2"),
    "layerwise": ("False", "2"),
    "representation": ("False", "2"),
    "sparsify.percentile": ("True", "5"),
    "multiplier": ("2", "-1"),
    "epsilon": ("2", "0"),
    "delta": ("0.1", "1"),
    "clipping_norm": ("2", "0"),
    "sensitivity": ("2", "-1"),
    "percentile": ("90", "100"),
    "gamma": ("2", "0"),
    "fraction": ("0.5", "0"),
    "noise_var": ("2", "0"),
    "tau": ("0", "-1"),
    "noise": ("0", "-1"),
    "phi": ("90", "100"),
    "prune": ("0", "100"),
    "trials": ("2", "0"),
    "alpha": ("0.5", "0"),
    "slices": ("20", "0"),
    "perturbed": ("3", "11"),
    "public": ("faces", "none.npz"),
    "roots": ("2", "0"),
    "policy": ("7/3-1", "3-50"),
}


@pytest.mark.parametrize("name", DEFENSES)
def test_every_option_is_reached_and_refused_in_one_line(name):
    for option in inspect.signature(DEFENSES[name]).parameters:
        good, bad = OPTIONS.get(f"{name}.{option}") or OPTIONS[option]
        assert parse(f"{name}:{option}={good}").view.name == name
        with pytest.raises(GGLError, match=rf"{name}: {option}: got") as error:
            parse(f"{name}:{option}={bad}")
        assert "\n" not in str(error.value)
