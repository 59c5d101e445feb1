"""The client's defenses and their simulation: torch parity, guarantees, forms and messages."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ggl_jax as gx
from ggl_jax import selection, trees
from ggl_jax.adversary.estimation import noise_level
from ggl_jax.adversary.stages import combines, make_stages
from ggl_jax.audit import privacy
from ggl_jax.audit.paper import FORMS
from ggl_jax.client import defenses
from ggl_jax.client.defenses import (
    IN_CODE,
    chain,
    clip,
    from_function,
    in_code,
    noise,
    none,
    parse,
    soteria,
    sparsify,
)
from ggl_jax.client.defenses.noise import noise_view
from ggl_jax.client.defenses.soteria import jacobian_norms, pruned_gradient, pruned_variables
from ggl_jax.client.gradients import gradient
from ggl_jax.client.models import convnet, from_flax, get_model
from ggl_jax.errors import GGLError
from ggl_jax.priors.pixels import pixels
from ggl_jax.types import Context, Facts

FIDELITIES = ["paper", "code"]
SPECS = ["none", "noise:0.1", "clip:0.5", "sparsify:0.8", "soteria:0.7", "clip:0.5+noise:0.1"]
CHAINS = ["soteria:0.7+clip:0.3", "clip:0.5+clip:0.2", "noise:0.1+clip:0.5", "clip:0.4+soteria:0.5"]


def assert_trees(actual, expected, rtol=1e-5, atol=1e-6):
    assert trees.names(actual) == trees.names(expected)
    for name, a, b in zip(
        trees.names(actual), jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def client(tiny_model, tiny_variables, tiny_images):
    """A model's context of one image and its gradient."""
    context = Context(tiny_model, tiny_variables, tiny_images[:1], jnp.array([1]))
    plain = jax.jit(lambda v: gradient(tiny_model, v, context.images, context.labels))
    return context, plain(tiny_variables)


@pytest.fixture
def update(client):
    return client[1]


@pytest.fixture(scope="module")
def observe(client):
    """``observe(spec, fidelity) -> (defense, observed, estimated, record)``, computed once."""
    context, update = client

    @functools.cache
    def observe(spec, fidelity="paper"):
        defense = parse(FORMS[fidelity](spec))

        @jax.jit
        def both_sides(key, update):
            observed, record = defense.apply(key, update, context)
            estimated = defense.view.estimate(observed, context.model.head)
            return observed, estimated, record

        return defense, *both_sides(jax.random.key(4), update)

    return observe


# --------------------------------------------------------------------------------------------------
# Torch
# --------------------------------------------------------------------------------------------------


class GoldenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.softplus(nn.Conv(6, (3, 3), 2, padding=((1, 1), (1, 1)), name="conv0")(x))
        x = nn.Conv(8, (3, 3), 2, padding=((1, 1), (1, 1)), name="conv1")(x)
        x = nn.relu(x + 0.1)
        return nn.Dense(3, name="fc")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parent / "golden" / "defenses.npz"))


def group(golden, name):
    tree = {}
    for key, value in golden.items():
        if key.startswith(f"{name}/"):
            _, layer, kind = key.split("/")
            tree.setdefault(layer, {})[kind] = jnp.asarray(value)
    return tree


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("name", ["clip", "sparsify"])
def test_matches_torch(golden, name, fidelity):
    value = float(golden["bound"] if name == "clip" else golden["rate"])
    # 0.8 is stored in float32; the layer counts must come out of the decimal number.
    defense = parse(FORMS[fidelity](f"{name}:{round(value, 6)}"))
    actual = jax.jit(lambda g: defense.apply(None, g, None)[0])(group(golden, "gradient"))
    assert_trees(actual, group(golden, f"{name}_{fidelity}"), rtol=2e-6)


@pytest.mark.parametrize(("fidelity", "sigma"), [("paper", 0.1), ("code", 0.01)])
def test_noise_has_torchs_distribution(golden, fidelity, sigma):
    expected = np.concatenate(
        [v.ravel() for v in jax.tree.leaves(group(golden, f"noise_{fidelity}"))]
    )
    defense = noise(sigma=sigma)
    actual, record = defense.apply(jax.random.key(1), {"w": jnp.zeros(20_000)}, None)
    actual = actual["w"]
    assert record["sigma"] == np.float32(sigma)
    assert stats.ks_2samp(expected, actual).pvalue > 1e-3
    assert stats.ks_2samp(expected, 1.5 * actual).pvalue < 1e-3


@pytest.fixture(scope="module")
def golden_context(golden):
    model = from_flax(GoldenNet(), image_shape=(8, 8, 3), num_classes=3)
    variables = {"params": group(golden, "params")}
    return Context(model, variables, jnp.asarray(golden["images"]), jnp.asarray(golden["labels"]))


@pytest.mark.parametrize("chunk_size", [None, 7, 1])
def test_jacobian_norms_match_torch(golden, golden_context, chunk_size):
    c = golden_context
    run = jax.jit(lambda v, x: jacobian_norms(c.model, v, x, chunk_size=chunk_size))
    features, norms = run(c.variables, c.images)
    np.testing.assert_allclose(features, golden["features"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norms, golden["norms"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 100])
def test_jacobian_norms_by_pixels_that_share_no_feature(chunk_size):
    """Ten apart they share none in convnet; beside the backward passes of all features."""
    model = convnet(2, (27, 25, 3), width=4)
    assert model.reach == 10
    variables = jax.jit(model.init)(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (2, 27, 25, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, variables, images):
        return jacobian_norms(model, variables, images, chunk_size=chunk_size)

    features, norms = run(model, variables, images)
    expected = run(model._replace(reach=None), variables, images)
    assert features.shape[1] == 6 * 6 * 16 > 10 * 10 * 3
    np.testing.assert_allclose(features, expected[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(norms, expected[1], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(norms == 0, expected[1] == 0)
    for other in "convnet:norm=group", "convnet:batch_norm=train", "precode:convnet", "lenet":
        assert get_model(other, 2, (32, 32, 3)).reach is None


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_soteria_matches_torch(golden, golden_context, fidelity):
    c = golden_context
    defense = soteria(rate=0.8, representation=fidelity == "paper")

    @jax.jit
    def run(variables):
        plain = gradient(c.model, variables, c.images, c.labels)
        context = c._replace(variables=variables)
        return plain, *defense.apply(None, plain, context)

    plain, defended, record = run(c.variables)
    assert_trees(plain, group(golden, "soteria_plain"), rtol=1e-4)
    assert_trees(defended, group(golden, f"soteria_{fidelity}"), rtol=1e-4)
    # The record's mask is what the mask comes to: some image keeps a feature that is not silent.
    mask = golden[f"soteria_{fidelity}_mask"] * golden["features"]
    np.testing.assert_array_equal(record["mask"]["fc"]["kernel"][:, 0], (mask != 0).any(0))
    assert float(record["rate"]) == pytest.approx(25 / 32)


# --------------------------------------------------------------------------------------------------
# Guarantees
# --------------------------------------------------------------------------------------------------


def tensors(size):
    numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
    return st.lists(numbers, min_size=size, max_size=size).map(lambda v: np.asarray(v, np.float32))


@functools.cache
def compiled(spec, fidelity):
    return jax.jit(lambda g: parse(FORMS[fidelity](spec)).apply(None, g, None)[0])


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64)))


@pytest.mark.parametrize("fidelity", FIDELITIES)
@settings(max_examples=25, deadline=None)
@given(a=tensors(7), b=tensors(20), bound=st.sampled_from([1e-3, 0.5, 4.0, 1e3]))
def test_clip_bounds_norms_and_keeps_directions(fidelity, a, b, bound):
    after = compiled(f"clip:{bound}", fidelity)({"a": a, "b": b})
    for x, y in ((a, after["a"]), (b, after["b"])):
        assert norm(y) <= norm(x) * (1 + 1e-6)
        assert np.vdot(x, y) >= 0
    layers = [norm(after["a"]), norm(after["b"])]
    limited = layers if fidelity == "paper" else [np.hypot(*layers)]
    assert max(limited) <= bound * (1 + 1e-5)
    if norm(a) <= 0.9 * bound and np.hypot(norm(a), norm(b)) <= 0.9 * bound:
        np.testing.assert_array_equal(after["a"], a)


@pytest.mark.parametrize("rate", [0.0, 0.29, 0.9, 0.999])
@settings(max_examples=15, deadline=None)
@given(g=tensors(100))
def test_sparsify_zeroes_exactly_its_share(rate, g):
    after = np.asarray(compiled(f"sparsify:{rate}", "paper")({"g": g})["g"])
    assert np.sum(after == 0) == max({0.0: 0, 0.29: 29, 0.9: 90, 0.999: 99}[rate], np.sum(g == 0))
    kept, gone = np.abs(g)[after != 0], np.abs(g)[after == 0]
    assert not kept.size or not gone.size or kept.min() * (1 + 1.1e-4) >= gone.max()
    np.testing.assert_array_equal(after[after != 0], g[after != 0])


@pytest.mark.parametrize("rate", [0.0, 0.29, 0.9, 0.999])
@settings(max_examples=15, deadline=None)
@given(g=tensors(100))
def test_sparsify_code_is_numpys_percentile(rate, g):
    after = np.asarray(compiled(f"sparsify:{rate}", "code")({"g": g})["g"])
    threshold = np.percentile(np.abs(g.astype(np.float64)), 100 * rate)
    clear = np.abs(np.abs(g) - threshold) > 1.1e-4 * threshold + 1e-30
    np.testing.assert_array_equal((after != 0)[clear], ((np.abs(g) >= threshold) & (g != 0))[clear])


def test_sparsify_never_empties_a_tensor_and_meets_its_count_among_equals():
    tensors = {"one": jnp.ones(1), "tied": jnp.ones(10), "silent": jnp.zeros(10)}
    for fidelity in FIDELITIES:
        after = sparsify(rate=0.9, percentile=fidelity == "code").apply(None, tensors, None)[0]
        np.testing.assert_array_equal(after["one"], [1])
        assert float(jnp.sum(after["tied"])) == 1
        assert not jnp.any(after["silent"])


def test_defaults_are_the_papers():
    names = [parse(kind).name for kind in ("noise", "clip", "sparsify", "soteria")]
    assert names == ["noise:0.1", "clip:4", "sparsify:0.9", "soteria:0.8"]


def test_the_codes_forms_are_options_of_every_defense_that_has_one():
    assert in_code("clip:4+noise:0.1") == "clip:4,layerwise=False+noise:0.1"
    assert in_code("soteria + none") == "soteria:representation=False+none"
    for name, form in IN_CODE.items():
        assert parse(in_code(name)).name == f"{parse(name).name},{form}"


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 2.0])
def test_noise_has_its_sigma_and_no_other(sigma):
    """A chi-square test at 5 standard errors, which would reject 0.9 and 1.1 times sigma."""
    before = {"a": jnp.full((300, 100), 3.0), "b": jnp.zeros(10_000)}
    after = noise(sigma=sigma).apply(jax.random.key(2), before, None)[0]
    drawn = np.concatenate([np.ravel(after[k] - before[k]) for k in before]).astype(np.float64)
    accepts = lambda s: abs(np.mean(drawn**2) / s**2 - 1) < 5 * np.sqrt(2 / drawn.size)  # noqa: E731
    assert accepts(sigma)
    assert not accepts(0.9 * sigma)
    assert not accepts(1.1 * sigma)
    assert abs(drawn.mean()) < 5 * sigma / np.sqrt(drawn.size)
    # Tensors do not share draws.
    assert abs(np.corrcoef(drawn[:10_000], drawn[-10_000:])[0, 1]) < 0.05


def test_noise_depends_on_the_key_only():
    defense, zeros = noise(sigma=1), {"w": jnp.zeros(8)}
    first = defense.apply(jax.random.key(0), zeros, None)[0]["w"]
    np.testing.assert_array_equal(first, defense.apply(jax.random.key(0), zeros, None)[0]["w"])
    assert not np.any(first == defense.apply(jax.random.key(1), zeros, None)[0]["w"])


@pytest.mark.parametrize("spec", ["none", "noise:0", "sparsify:0", "soteria:0"])
def test_zero_hyper_parameters_change_nothing(update, observe, spec):
    for fidelity in FIDELITIES:
        assert_trees(observe(spec, fidelity)[1], update)


def test_soteria_acts_on_each_image(tiny_model, tiny_variables, tiny_images):
    """A batch's gradient is the mean of its images', each with its own mask (paper's form)."""
    labels = jnp.array([0, 2])
    defense = soteria(rate=0.6)

    @jax.jit
    def defended(images, labels):
        return defense.apply(None, None, Context(tiny_model, tiny_variables, images, labels))[0]

    singles = [defended(tiny_images[i : i + 1], labels[i : i + 1]) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *singles)
    assert_trees(defended(tiny_images, labels), mean)


def test_soteria_is_simulated_exactly_at_pruned_variables(client, observe):
    context, plain = client
    defense, observed, estimated, _ = observe("soteria:0.7")
    variables = pruned_variables(context.variables, context.model.head, estimated)
    own = gradient(context.model, variables, context.images, context.labels)
    assert_trees(defense.view.simulate(estimated, own), observed)
    # The plain gradient with the mask is an approximation only.
    approximate = defense.view.simulate(estimated, plain)
    assert jnp.abs(approximate["Dense_0"]["bias"] - observed["Dense_0"]["bias"]).max() > 1e-3


def test_soteria_prunes_features_that_do_not_move_first():
    """d r/dx = 0 with r > 0 has an infinite norm, with r = 0 none at all."""

    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x):
            moving = nn.Dense(3, name="inner")(x.reshape(x.shape[0], -1))
            r = jnp.concatenate([moving, jnp.ones_like(moving[:, :1]), 0 * moving[:, :1]], 1)
            return nn.Dense(2, name="fc")(r)

    model = from_flax(Constant(), image_shape=(2, 2, 1))
    variables = model.init(jax.random.key(0))
    context = Context(model, variables, jnp.full((1, 2, 2, 1), 0.7), jnp.array([0]))
    observed = jax.jit(lambda: soteria(rate=0.2).apply(None, None, context)[0])()
    assert jnp.all(observed["fc"]["kernel"][3] == 0)
    assert jnp.all(jnp.any(observed["fc"]["kernel"][:3] != 0, axis=1))


def test_soteria_memory_grows_with_its_chunk_not_with_its_features():
    """512 features of a 224x224 image in 4 GB: checked on the compiled program, nothing is run."""

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(64, (7, 7), strides=2)(x))  # ResNet-18's largest activation
            x = nn.relu(nn.Conv(512, (3, 3), strides=8)(x))
            return nn.Dense(10)(x.mean((1, 2)))

    model = from_flax(Wide(), image_shape=(224, 224, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    compiled = jax.jit(lambda v, x: jacobian_norms(model, v, x)).lower(variables, image).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this backend does not analyse memory")
    assert memory.temp_size_in_bytes < 1e9


# --------------------------------------------------------------------------------------------------
# Contracts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("spec", ["sparsify:0.8", "soteria:0.7", "clip:0.5+noise:0.1"])
def test_vmap_of_one_is_the_single_call(client, observe, spec, fidelity):
    """The client's side; test_contracts.py has the adversary's, and jit against eager."""
    context, update = client
    defense, observed, _, record = observe(spec, fidelity)
    both = jax.jit(jax.vmap(lambda k, u: defense.apply(k, u, context)))
    one = both(jax.random.key(4)[None], jax.tree.map(lambda x: x[None], update))
    assert_trees(jax.tree.map(lambda x: x[0], one), (observed, record), rtol=2e-4)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("spec", SPECS + CHAINS)
def test_factored_form_is_the_simulation(update, observe, spec, fidelity):
    if spec == "clip:0.4+soteria:0.5" and fidelity == "paper":
        with pytest.raises(GGLError, match="must come first"):
            parse(FORMS[fidelity](spec))
        return
    defense, _, estimated, _ = observe(spec, fidelity)
    factored = None if defense.view.factor is None else defense.view.factor(estimated)
    if factored is None:
        assert "sparsify" in spec or spec == "clip:0.4+soteria:0.5"
        return
    # A candidate's gradient, not the client's own.
    candidate = jax.tree.map(lambda g: 1.7 * g + 0.01 * jnp.sin(1e3 * g), update)
    result = candidate
    if factored.mask is not None:
        result = jax.tree.map(jnp.multiply, factored.mask, result)
    if factored.scale is not None:
        result = jax.tree.map(jnp.multiply, factored.scale(trees.sq_norms(result)), result)
    assert_trees(defense.view.simulate(estimated, candidate), result)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("spec", ["none", "clip:0.5", "sparsify:0.8", "soteria:0.7"])
def test_simulation_at_the_true_image_gives_the_observation(update, observe, spec, fidelity):
    defense, observed, estimated, _ = observe(spec, fidelity)
    simulated = jax.jit(defense.view.simulate)(estimated, update)
    if (spec, fidelity) == ("soteria:0.7", "paper"):
        kernels = [trees.head_parts(t, ("Dense_0",))[0] for t in (simulated, observed)]
        np.testing.assert_array_equal(kernels[0] == 0, kernels[1] == 0)
    else:
        assert_trees(simulated, observed, rtol=1e-4)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("spec", ["clip:0.5", "sparsify:0.8", "soteria:0.7"])
def test_simulation_has_finite_derivatives(update, observe, spec, fidelity):
    defense, observed, estimated, _ = observe(spec, fidelity)

    @jax.jit
    @jax.grad
    def slope(g):
        difference = jax.tree.map(jnp.subtract, defense.view.simulate(estimated, g), observed)
        return trees.total(trees.sq_norms(difference))

    for candidate in (update, jax.tree.map(jnp.zeros_like, update)):
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(slope(candidate)))


@pytest.mark.parametrize("spec", SPECS)
def test_record_has_the_true_parameters(observe, spec):
    expected = {}
    for part in spec.split("+"):
        name, _, value = part.partition(":")
        if value:
            expected[{"noise": "sigma", "clip": "bound"}.get(name, "rate")] = float(value)
    assert defenses.summary(observe(spec)[3]) == pytest.approx(expected, abs=0.02)


# --------------------------------------------------------------------------------------------------
# Chains, own functions, specifications
# --------------------------------------------------------------------------------------------------


def test_order_of_a_chain_matters(client):
    context, update = client
    key, bound = jax.random.key(6), 0.05
    norms = [
        max(
            float(jnp.sqrt(s))
            for s in jax.tree.leaves(trees.sq_norms(d.apply(key, update, context)[0]))
        )
        for d in (parse(f"clip:{bound}+noise:0.1"), parse(f"noise:0.1+clip:{bound}"))
    ]
    assert norms[0] > 4 * bound
    assert norms[1] <= bound * 1.0001


def test_chain_of_none_and_of_one():
    assert chain().name == "none"
    single = clip(bound=2)
    assert chain(single) is single
    assert chain(none(), clip(bound=2), noise(sigma=0.1)).name == "none+clip:2+noise:0.1"


def test_chains_nest(client):
    context, update = client
    inner = chain(clip(bound=0.5), noise(sigma=0.0))
    outer = chain(inner, clip(bound=0.1))
    observed, record = outer.apply(jax.random.key(0), update, context)
    assert_trees(observed, clip(bound=0.1).apply(None, update, None)[0])
    record = defenses.summary(record)
    assert sorted(v for k, v in record.items() if k.endswith("bound")) == pytest.approx([0.1, 0.5])
    assert record["sigma"] == 0


def test_summary_separates_equal_names(client):
    context, update = client
    _, record = parse("clip:4+clip:2+noise:0.1").apply(jax.random.key(0), update, context)
    assert defenses.summary(record) == pytest.approx({"0.bound": 4, "1.bound": 2, "sigma": 0.1})


def test_own_noise_counts_as_noise(client):
    """A user's Laplace noise: combined, not refined in pixels, and known to other estimators."""
    context, update = client

    def laplace(key, g):
        leaves, treedef = jax.tree.flatten(g)
        keys = jax.random.split(key, len(leaves))
        drawn = [x + jax.random.laplace(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, drawn)

    def estimate(update, head, noise=0.0):
        return {"scale": noise_view().estimate(update, head, noise)["sigma"] / jnp.sqrt(2.0)}

    named = functools.partial(from_function, laplace, name="laplace:0.1", estimate=estimate)
    plain = named()
    own = named(noise_std=lambda found: jnp.sqrt(2.0) * found["scale"])
    search = gx.Search(combine="auto", refine="auto")
    assert not combines(search, plain.view)
    for defense in (own, named(adds_noise=True), named(facts=Facts(gaussian=0.1)), noise()):
        assert combines(search, defense.view)
        assert combines(search, chain(none(), defense).view)
        prior = pixels(context.model.image_shape)
        stages = make_stages(search, context.model, prior, defense.view)
        assert [stage.attack.name for stage in stages] == ["ggl"]
    assert own.view.name == "laplace"
    # A parameter that happens to be called sigma is none.
    blur = from_function(lambda key, g: g, name="blur", estimate=lambda *_, **__: {"sigma": 3.0})
    assert float(noise_level(blur.view, blur.view.estimate(update, None))) == 0
    # Both levels of a chain add in variance.
    both = chain(noise(sigma=0.3), own).view
    level = noise_level(both, ({"sigma": jnp.float32(0.3)}, {"scale": jnp.float32(0.2)}))
    assert float(level) == pytest.approx(float(np.hypot(0.3, 0.2 * np.sqrt(2))), rel=1e-6)
    # The accountant takes a user's word, and nothing without it.
    gaussian = Facts(gaussian=0.3, processes=True)
    assert privacy.mechanism(chain(clip(bound=2), named(facts=gaussian)), 4)[:2] == (4.0, 0.3)
    bounded = Facts(l2_bound=lambda num_tensors: 2.0 * num_tensors)
    assert privacy.mechanism(chain(named(facts=bounded), noise(sigma=0.3)), 4)[:2] == (8.0, 0.3)
    assert privacy.mechanism(chain(clip(bound=2), named()), 4).sigma == 0


def test_from_function(client):
    context, update = client
    halve = from_function(lambda key, g: jax.tree.map(lambda x: x / 2, g), name="halve")
    assert_trees(halve.apply(None, update, context)[0], jax.tree.map(lambda x: x / 2, update))
    assert halve.view.estimate(update, context.model.head) == {}
    assert_trees(halve.view.simulate({}, update), update)
    assert halve.view.factor({}).mask is None

    def by_label(key, g, context):
        return jax.tree.map(lambda x: x * context.labels[0], g)

    adaptive = from_function(by_label, name="by_label", simulate=lambda estimated, g: g)
    assert_trees(adaptive.apply(None, update, context)[0], update)
    assert adaptive.view.factor is None
    chained = chain(halve, clip(bound=1))
    assert chained.view.factor is not None

    with pytest.raises(GGLError, match="fn takes 1 arguments"):
        from_function(lambda g: g, name="short")
    with pytest.raises(GGLError, match="not a function"):
        from_function(3, name="three")
    with pytest.raises(GGLError, match=r"without '\+'"):
        from_function(by_label, name="a+b")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("none", "none"),
        ("noise", "noise:0.1"),
        ("clip", "clip:4"),
        ("sparsify", "sparsify:0.9"),
        ("soteria", "soteria:0.8"),
        ("clip:4.0 + noise:1e-1", "clip:4+noise:0.1"),
        ("noise:1e+2", "noise:100"),
        ("soteria:rate=0.5,chunk_size=8", "soteria:0.5"),
        ("clip:3,layerwise=false", "clip:3,layerwise=False"),
        ("clip:3,layerwise=True", "clip:3"),
    ],
)
def test_parse(spec, name):
    assert parse(spec).name == name
    assert parse(parse(spec).name).name == name


def test_clip_bounds_each_tensor_or_the_whole(update):
    specs = ("clip:0.1", "clip:0.1,layerwise=False")
    layerwise, whole = (parse(spec).apply(None, update, None)[0] for spec in specs)
    assert float(trees.total(trees.sq_norms(layerwise))) > 2 * 0.01
    assert float(trees.total(trees.sq_norms(whole))) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nois:0.1", "allowed: none, noise, clip, sparsify, soteria.*; did you mean 'noise'"),
        ("", "got '', allowed: none"),
        ("clip:4+", "got '', allowed: none"),
        ("noise:-0.1", "noise: sigma: got -0.1, allowed: numbers of at least 0"),
        ("noise:nan", "sigma: got nan"),
        ("noise:inf", "sigma: got inf"),
        ("clip:0", "clip: bound: got 0, allowed: numbers above 0"),
        ("sparsify:1", "rate: got 1, allowed: numbers of at least 0 and below 1"),
        ("soteria:1.5", "rate: got 1.5"),
        (
            "soteria:0.8,chunk_size=0",
            "chunk_size: got 0, allowed: whole numbers of at least 1",
        ),
        ("clip:four", "bound: got 'four'"),
        ("clip:norm=4", r"'norm=4' in .* is not understood; clip takes bound, layerwise"),
        ("clip:4,bound=5", r"'bound=5' in .* is not understood"),
        ("none:1", "none has no options"),
        ("clip:4,layerwise=exact", "layerwise: got 'exact', allowed: True or False"),
        ("noise:0.1+soteria:0.8", "must come first in a chain"),
    ],
)
def test_parse_refuses_in_one_line(spec, message):
    with pytest.raises(GGLError, match=message) as error:
        parse(spec)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Tree helpers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_kth_smallest_is_exact(dtype):
    values = jnp.abs(jax.random.normal(jax.random.key(0), (257,))).astype(dtype)
    values = values.at[:9].set(0).at[9].set(jnp.inf)
    expected = np.sort(np.asarray(values, np.float32))
    ks = jnp.array([1, 5, 9, 10, 100, 256, 257])
    actual = jax.jit(jax.vmap(lambda k: selection.kth_smallest(values, k)))(ks)
    np.testing.assert_array_equal(np.asarray(actual, np.float32), expected[np.asarray(ks) - 1])


def test_half_precision_norms_do_not_overflow():
    square = trees.sq_norms({"w": jnp.full((1000,), 100, jnp.float16)})["w"]
    assert square.dtype == jnp.float32
    assert float(square) == 1e7


def test_pruned_gradient_with_a_full_mask_is_the_gradient(client):
    context, update = client
    ones = jnp.ones((1, update["Dense_0"]["kernel"].shape[0]))
    actual = pruned_gradient(context.model, context.variables, context.images, context.labels, ones)
    assert_trees(actual, update)


@pytest.mark.parametrize("size", [1, 2, 7, 5000, 100_003])
def test_selection_meets_its_count(size):
    rng = np.random.default_rng(size)
    values = np.abs(rng.standard_normal(size) * np.exp(3 * rng.standard_normal(size)))
    values = values.astype(np.float32)
    search = jax.jit(selection.split)
    order = np.sort(values)
    for count in {0, 1, size // 2, int(0.9 * size), size - 1, size}:
        threshold, below = search(values, count)
        assert np.sum(values < float(threshold)) == below == count
        kept = jax.jit(selection.zero_smallest)(values, count)
        np.testing.assert_array_equal(np.sort(kept)[count:], order[count:])
        if count:
            assert float(selection.kth_smallest(values, count)) == order[count - 1]


@pytest.mark.parametrize("copies", [1, 20_000])
def test_selection_among_equals(copies):
    # Ties that make the count impossible: the largest possible count below it.
    tied = jnp.repeat(jnp.asarray([0, 0, 0, 1, 1, 1, 2], jnp.float32), copies)
    below = [int(selection.split(tied, count * copies)[1]) for count in range(8)]
    assert below == [copies * count for count in (0, 0, 0, 3, 3, 3, 6, 7)]
    # Zeros are equal everywhere and go in order; places decide among other equals.
    zeroed = selection.zero_smallest(tied, 4 * copies)
    assert int(jnp.sum(zeroed == 0)) == 4 * copies
    assert not jnp.any(zeroed[: 3 * copies])
    assert bool(jnp.all(zeroed[6 * copies :] == 2))


def test_support_compares_what_was_shared(client):
    context, update = client
    defense = parse("sparsify:0.5")
    view = defense.view.comparing(support=True)
    assert defense.view.comparing(support=False) is defense.view
    observed, _ = defense.apply(None, update, context)
    estimated = view.estimate(observed, context.model.head)
    other = jax.tree.map(lambda g: g + 1.0, update)
    simulated = view.simulate(estimated, other)
    assert_trees(simulated, jax.tree.map(lambda g, y: jnp.where(y != 0, g, 0), other, observed))
    assert_trees(view.simulate(estimated, update), observed)
    mask = view.factor(estimated).mask
    assert_trees(simulated, jax.tree.map(jnp.multiply, mask, other))
    # Under noise no entry is zero: candidates then select their own.
    noisy = parse("sparsify:0.5+noise:0.1").view
    assert noisy.comparing(support=True) is noisy
    # Of a chain, the other stages are simulated as ever.
    chained = parse("sparsify:0.5+clip:0.1").view.comparing(support=True)
    both = chained.simulate(chained.estimate(observed, context.model.head), other)
    assert_trees(
        both,
        parse("clip:0.1").view.simulate(
            parse("clip:0.1").view.estimate(observed, context.model.head), simulated
        ),
    )


@pytest.mark.parametrize("spec", ["noise:none", "soteria:None", "clip:true", "sparsify:rate=false"])
def test_a_word_is_no_strength(spec):
    with pytest.raises(GGLError, match=r"got (None|True|False)"):
        defenses.parse(spec)
