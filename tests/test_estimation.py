"""What the server finds out from the update alone, held against what the client did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggl_jax import trees
from ggl_jax.adversary.estimation import check_finite, compare, estimate
from ggl_jax.audit.paper import FORMS
from ggl_jax.client.defenses import parse, summary
from ggl_jax.client.defenses.clip import pooled_bound
from ggl_jax.client.defenses.noise import core_spread, estimate_sigma
from ggl_jax.client.defenses.soteria import estimate_mask, mask_tree
from ggl_jax.client.gradients import gradient
from ggl_jax.client.models import resnet18
from ggl_jax.errors import GGLError

HEAD = ("fc",)


@pytest.fixture(scope="module")
def resnet_update():
    """The gradient of an untrained ResNet-18 (initialised as the published code does)."""
    model = resnet18(weight_init="torchvision")
    variables = model.init(jax.random.key(0))
    waves = jnp.sin(jnp.arange(32) / jnp.array([3.0, 5.0, 8.0])[:, None])
    image = 0.5 + 0.4 * jnp.einsum("ch,cw->hwc", waves, waves[::-1])
    run = jax.jit(lambda v, x: gradient(model, v, x, jnp.array([1])))
    return run(variables, image[None])


@pytest.fixture(scope="module")
def run_defense(resnet_update):
    def run(spec, fidelity="paper", seed=0):
        """Errors of the estimates, and the estimates."""
        defense = parse(FORMS[fidelity](spec))
        observed, record = jax.jit(lambda k, g: defense.apply(k, g, None))(
            jax.random.key(seed), resnet_update
        )
        estimated = estimate(defense.view, observed, HEAD)
        return compare(record, estimated), summary(estimated)

    return run


# --------------------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sigma_of():
    return jax.jit(lambda update: estimate_sigma(update, HEAD))


@pytest.fixture(scope="module")
def add_noise():
    def add(key, update, sigma):
        leaves, treedef = jax.tree.flatten(update)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            g + sigma * jax.random.normal(k, g.shape) for k, g in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, drawn)

    return jax.jit(add)


@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 0.1, 1.0])
def test_sigma_within_a_tenth(resnet_update, add_noise, sigma_of, sigma):
    found, stderr = sigma_of(add_noise(jax.random.key(1), resnet_update, sigma))
    assert abs(found - sigma) < 0.1 * sigma
    assert 0 < stderr < 0.05 * sigma


def test_no_noise_is_found_where_there_is_none(resnet_update, sigma_of):
    assert sigma_of(resnet_update)[0] == 0
    assert sigma_of(jax.tree.map(jnp.zeros_like, resnet_update))[0] == 0


@pytest.mark.slow
def test_sigma_after_sparsification(run_defense):
    errors, _ = run_defense("sparsify:0.9+noise:0.1")
    assert errors["sigma_error"] < 0.1
    assert errors["rate_error"] < 0.05


def test_class_sums_alone_find_sigma():
    """Where every large tensor is full of signal, the head's class sums still tell the noise."""
    rng = np.random.default_rng(0)
    features, residual = rng.gamma(2, 1, 512), np.array([0.3, -0.8, 0.5])
    kernel = np.outer(features, residual) + 0.01 * rng.standard_normal((512, 3))
    update = {
        "conv": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 64, 64)), jnp.float32)},
        "fc": {"kernel": jnp.asarray(kernel, jnp.float32)},
    }
    found, stderr = estimate_sigma(update, HEAD)
    assert abs(found - 0.01) < 4 * stderr
    assert 0.02 < stderr / found < 0.05


@pytest.mark.parametrize("cut", [2.0, 3.0])
def test_core_spread_ignores_outliers_and_is_never_low(cut):
    """Ten per cent of large entries move the median absolute deviation by 13 %."""
    draw = jax.random.normal(jax.random.key(0), (200_000,))
    outliers = jnp.where(jnp.arange(200_000) % 10 == 0, 20.0, 0.0)
    spread = jax.jit(lambda x: core_spread(x, cut=cut))
    assert float(spread(draw)) == pytest.approx(1, abs=0.015)
    assert float(spread(draw + outliers)) == pytest.approx(1, abs=0.015)
    assert float(spread(draw + jnp.linspace(-3, 3, 200_000))) > 1.2
    assert float(spread(3 * draw)) == pytest.approx(3 * float(spread(draw)), rel=1e-3)
    assert spread(jnp.where(jnp.arange(200_000) % 2 == 0, draw, 0)) == 0
    assert jnp.isnan(spread(draw.at[5].set(jnp.nan)))


def test_noise_of_later_stages_is_taken_off(resnet_update, add_noise):
    defense = parse("noise:0.08")
    observed = add_noise(jax.random.key(2), resnet_update, 0.1)
    own = jax.jit(lambda y: defense.view.estimate(y, HEAD, noise=0.06)["sigma"])(observed)
    assert float(own) == pytest.approx(0.08, rel=0.05)


# --------------------------------------------------------------------------------------------------
# Clipping
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize("bound", [1, 4])
def test_bound_is_exact_without_noise(run_defense, fidelity, bound):
    errors, found = run_defense(f"clip:{bound}", fidelity)
    assert errors["bound_error"] < 1e-4
    assert found["bound_stderr"] == 0


def test_bound_without_any_clipping_is_the_largest_norm(run_defense, resnet_update):
    _, found = run_defense("clip:1000")
    norms = [float(jnp.linalg.norm(g.reshape(-1))) for g in jax.tree.leaves(resnet_update)]
    assert found["bound"] == pytest.approx(max(norms), rel=1e-4)


@pytest.mark.parametrize(("sigma", "within"), [(0.01, 0.01), (0.1, 0.1)])
def test_bound_under_noise(run_defense, sigma, within):
    """One per cent is there for sigma 0.01. At sigma 0.1 one clipped layer allows 3 % at best."""
    errors, found = run_defense(f"clip:4+noise:{sigma}")
    assert errors["bound_error"] < within
    assert errors["bound_error"] * 4 < 4 * found["bound_stderr"]
    assert errors["sigma_error"] < 0.1


def test_pooled_bound_is_unbiased_and_its_error_honest():
    """Ten clipped layers of 500 entries, ten below the bound, ten of a million entries."""
    sizes = np.array([500] * 20 + [10**6] * 10, float)
    energies = np.array([16.0] * 10 + [0.5 * i for i in range(10)] + [16.0, 1.0] * 5)
    rng = np.random.default_rng(0)
    sigma = 0.1
    draws = energies + sizes * sigma**2
    draws = draws + np.sqrt(2 * sizes * sigma**4 + 4 * sigma**2 * energies) * rng.standard_normal(
        (400, sizes.size)
    )
    run = jax.jit(jax.vmap(lambda squares: pooled_bound(squares, sizes, sigma)))
    found, stderr = (np.asarray(x) for x in run(jnp.asarray(draws, jnp.float32)))
    errors = found - 4
    assert abs(errors.mean()) < 0.02
    assert 0.7 < errors.std() / stderr.mean() < 1.4
    assert np.mean(np.abs(errors) < 0.04) > 0.6


def test_pooled_bound_where_nothing_can_be_measured():
    """Noise alone: an upper limit above zero, with a standard error as large."""
    squares = jnp.full((5,), 1e6 * 0.01)
    found, stderr = pooled_bound(squares, np.full(5, 1e6), 0.1)
    assert found > 0
    assert stderr == found


def test_global_bound_under_noise_reports_its_error(resnet_update, add_noise):
    """Good to one per cent at sigma 1e-4; at 0.1 the noise of 11 million entries hides it."""
    clip = parse("clip:4,layerwise=False")
    noisy = jax.jit(
        lambda g, s: clip.view.estimate(add_noise(jax.random.key(0), g, s), HEAD, noise=s)
    )
    observed, _ = jax.jit(lambda g: clip.apply(None, g, None))(resnet_update)
    found = summary(noisy(observed, 1e-4))
    assert found["bound"] == pytest.approx(4, rel=0.01)
    found = summary(noisy(observed, 0.1))
    assert abs(found["bound"] - 4) < 4 * found["bound_stderr"]
    assert found["bound_stderr"] > 1


# --------------------------------------------------------------------------------------------------
# Sparsification and Soteria
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fidelity", "rate"), [("paper", 0.99), ("code", 0.5)])
def test_rate_within_one_per_cent(run_defense, fidelity, rate):
    assert run_defense(f"sparsify:{rate}", fidelity)[0]["rate_error"] < 0.01


def test_rate_is_not_fooled_by_layers_that_were_silent(resnet_update):
    silent = {name: resnet_update[name] for name in ("conv1", "fc", "layer1_0")}
    silent["conv1"] = jax.tree.map(jnp.zeros_like, silent["conv1"])
    defense = parse("sparsify:0.6")
    observed, _ = jax.jit(lambda g: defense.apply(None, g, None))(silent)
    found = estimate(defense.view, observed, HEAD)
    assert float(found["rate"]) == pytest.approx(0.6, rel=1e-3)
    assert int(found["layer_counts"]["conv1"]["kernel"]) == silent["conv1"]["kernel"].size


def test_soteria_mask_is_read_off(resnet_update):
    kept = jax.random.bernoulli(jax.random.key(0), 0.2, (512,)).astype(jnp.float32)
    mask = mask_tree(resnet_update, HEAD, kept)
    observed = jax.tree.map(jnp.multiply, mask, resnet_update)
    silent = ~jnp.any(resnet_update["fc"]["kernel"] != 0, axis=1)
    for fidelity in ("paper", "code"):
        found = estimate(parse(FORMS[fidelity]("soteria:0.8")).view, observed, HEAD)
        row = found["mask"]["fc"]["kernel"][:, 0]
        np.testing.assert_array_equal(row, jnp.where(silent, 0, kept))
        assert float(found["rate"]) == pytest.approx(1 - float(row.mean()))
        agreement = compare({"mask": mask}, found)["mask_agreement"]
        assert agreement == pytest.approx(1 - float(jnp.mean(silent * kept)))


def test_soteria_mask_under_noise(resnet_update):
    kept = jax.random.bernoulli(jax.random.key(0), 0.2, (512,)).astype(jnp.float32)
    kernel = kept[:, None] * resnet_update["fc"]["kernel"]
    noisy = {"fc": {"kernel": kernel + 0.01 * jax.random.normal(jax.random.key(1), kernel.shape)}}
    found = estimate_mask(noisy, HEAD, 0.01)
    agreement = float(jnp.mean(found == kept))
    assert agreement > 0.95
    # Looking for exact zeros would find none.
    assert float(jnp.mean(estimate_mask(noisy, HEAD))) == 1


# --------------------------------------------------------------------------------------------------
# Reports and messages
# --------------------------------------------------------------------------------------------------


def test_compare_merges_stages():
    record = ({"bound": 4.0}, {"sigma": 0.1})
    estimated = ({"bound": 4.4, "bound_stderr": 0.1}, {"sigma": 0.09, "sigma_stderr": 0.01})
    assert compare(record, estimated) == pytest.approx({"bound_error": 0.1, "sigma_error": 0.1})
    twice = ({"bound": 4.0}, {"bound": 2.0})
    assert compare(twice, twice) == {"0.bound_error": 0.0, "1.bound_error": 0.0}
    assert compare({"sigma": 0.0}, {"sigma": 0.25}) == {"sigma_error": 0.25}
    assert compare({}, {}) == {}


def test_a_broken_update_is_named(resnet_update):
    broken = jax.tree.map(jnp.copy, resnet_update)
    broken["fc"]["kernel"] = broken["fc"]["kernel"].at[3, 1].set(jnp.nan).at[4, 0].set(jnp.inf)
    message = "fc/kernel holds 2 NaN or infinite values out of 1024"
    with pytest.raises(GGLError, match=message):
        check_finite(broken)
    with pytest.raises(GGLError, match=message):
        estimate(parse("noise:0.1").view, broken, HEAD)
    check_finite(resnet_update)


def test_a_wrong_head_is_named(resnet_update):
    with pytest.raises(GGLError, match=r"no matrix Dense_0/kernel .*fc/kernel"):
        estimate(parse("noise:0.1").view, resnet_update, ("Dense_0",))
    with pytest.raises(GGLError, match="no matrix"):
        trees.head_parts(resnet_update, ("bn1",))
