"""The fused matching loss equals the direct one: values and derivatives, in float64 and float32."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ggl_jax as gx
from ggl_jax.adversary import matching
from ggl_jax.adversary.losses import posterior
from ggl_jax.adversary.matching import convolve, layers, winograd
from ggl_jax.adversary.matching.program import trace
from ggl_jax.adversary.matching.surrogate import smoothed
from ggl_jax.audit.paper import FORMS
from ggl_jax.client.models import get_model
from ggl_jax.spec import Client, Speed
from ggl_jax.types import Model

SHAPE = (10, 10, 3)


class Net(nn.Module):
    """Convolutions of many kinds, with normalisation between."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2, padding=((1, 1), (1, 1)), use_bias=False)(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not self.train)(x))
        x = x + nn.Conv(6, (1, 3), padding="SAME")(x)
        x = nn.tanh(nn.GroupNorm(num_groups=2)(x))
        x = nn.tanh(nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2)(x))
        return nn.Dense(3)(nn.tanh(nn.Dense(20)(x.reshape(x.shape[0], -1))))


class Wide(nn.Module):
    """Many channels on few positions: where Gram matrices beat formed gradients."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(24, (3, 3), strides=3, padding="VALID")(x))
        x = nn.tanh(nn.Conv(48, (3, 3), strides=2, padding=((1, 1), (0, 1)))(x))
        x = nn.tanh(nn.Conv(48, (2, 2))(x))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


class Odd(nn.Module):
    """What users do: shared and masked layers, periodic padding, transposed convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2, padding="CIRCULAR")(x))
        shared = nn.Conv(4, (3, 3), name="shared")
        x = nn.tanh(shared(nn.tanh(shared(x))))
        x = nn.tanh(nn.remat(nn.Conv)(4, (2, 2), strides=2, name="remat")(x))
        x = nn.tanh(nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x))
        x = nn.LayerNorm()(x.reshape(x.shape[0], -1, 4))
        x = nn.tanh(nn.Dense(5, name="tokens")(x))
        masked = nn.Conv(4, (3,), mask=jnp.ones((3, 5, 4)).at[0].set(0), name="masked")
        return nn.Dense(3)(jnp.mean(masked(x), axis=1))


class Channels(nn.Module):
    """Convolutions that go by Winograd's algorithm, forth, back and for formed gradients."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(32, (2, 2))(x))
        x = nn.tanh(nn.Conv(40, (3, 3), padding=((1, 0), (2, 1)))(x))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


MODELS = {
    "channels": (Channels(), {}),
    "many kinds": (Net(), {}),
    "wide": (Wide(), {}),
    "odd": (Odd(), {}),
    "train-mode norm": (Net(train=True), {"mutable": ["batch_stats"]}),
}


def double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def single(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@dataclasses.dataclass
class Problem:
    """A model in float64, an observed update, and a population [n b h w c] with labels."""

    model: Model
    variables: dict
    observed: dict
    defense: gx.Defense
    estimated: dict
    images: jax.Array
    labels: jax.Array

    def losses(
        self, method, *, kind=double, distance="squared_l2", client=None, derivative=True, **speed
    ):
        """Losses, and the derivative of their sum with respect to the images, unless not asked."""

        @jax.jit
        def run(variables, observed, estimated, images):
            loss = matching.matching_loss(
                self.model,
                variables,
                observed,
                view=self.defense.view,
                estimated=estimated,
                distance=distance,
                client=client,
                speed=Speed(method=method, **speed),
            )
            if not derivative:
                return loss(images, self.labels), jnp.nan
            values, pull_back = jax.vjp(lambda x: loss(x, self.labels), images)
            return values, pull_back(jnp.ones_like(values))[0]

        values, slope = run(
            *map(kind, (self.variables, self.observed, self.estimated, self.images))
        )
        return np.asarray(values), np.asarray(slope)


def problem(name, spec, *, batch=1, fidelity="paper", num=4):
    if name in MODELS:
        module, apply_kwargs = MODELS[name]
        model = gx.from_flax(module, image_shape=SHAPE, num_classes=3, apply_kwargs=apply_kwargs)
    else:
        model = get_model(name, 3, SHAPE)
    variables = double(model.init(jax.random.key(0)))
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.random((num + 1, batch, *SHAPE)))
    labels = jnp.asarray(rng.integers(0, 3, (num + 1, batch)))
    defense = gx.parse(FORMS[fidelity](spec))

    @jax.jit
    def observe(variables, images, labels):
        update = gx.gradient(model, variables, images, labels)
        context = gx.Context(model, variables, images, labels)
        observed = double(defense.apply(jax.random.key(2), update, context)[0])
        return observed, double(defense.view.estimate(observed, model.head))

    observed, estimated = observe(variables, images[0], labels[0])
    return Problem(model, variables, observed, defense, estimated, images[1:], labels[1:])


CASES = [
    ("many kinds", "clip:0.3", {"fidelity": "code"}, {"distance": "cosine"}),
    ("many kinds", "soteria:0.5", {"fidelity": "code", "batch": 2}, {"chunk_size": 3}),
    ("wide", "clip:0.1+noise:0.01", {}, {}),
    ("wide", "soteria:0.4+clip:0.2", {"fidelity": "code"}, {}),
    ("wide", "sparsify:0.7", {"batch": 2}, {"distance": "cosine"}),
    ("odd", "none", {"batch": 2}, {}),
    ("train-mode norm", "none", {"batch": 2}, {}),
    ("mlp:width=7", "clip:0.1", {}, {}),
    ("vit:patch=5,width=8,depth=1,heads=2", "none", {"batch": 2}, {"distance": "cosine"}),
    ("convnet:width=2,norm=group", "none", {}, {}),
]


@pytest.mark.parametrize(("name", "spec", "how", "options"), CASES)
def test_fused_equals_direct(name, spec, how, options):
    with jax.enable_x64(True):
        parts = problem(name, spec, **how)
        fused, fused_derivative = parts.losses("fused", **options)
        direct, derivative = parts.losses("direct", **options)
        np.testing.assert_allclose(fused, direct, rtol=1e-8)
        scale = np.abs(derivative).max()
        np.testing.assert_allclose(fused_derivative, derivative, atol=1e-7 * scale)
        assert len(set(np.round(direct, 6))) == len(direct)  # candidates differ


@pytest.mark.parametrize("distance", ["squared_l2", "cosine"])
def test_float32_agrees_with_float64(distance):
    with jax.enable_x64(True):
        parts = problem("wide", "clip:0.1", batch=2)
        fused, fused_derivative = parts.losses("fused", kind=single, distance=distance)
        direct, derivative = parts.losses("direct", distance=distance)
    assert fused.dtype == np.float32
    np.testing.assert_allclose(fused, direct, rtol=1e-5)
    np.testing.assert_allclose(fused_derivative, derivative, atol=1e-5 * np.abs(derivative).max())


def convolution_model(features, kernel, strides, padding, dilation, groups, bias):
    """A plain JAX model (no Flax): one convolution, a nonlinearity, a matrix product."""

    def apply(variables, x):
        params = variables["params"]
        y = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            strides,
            padding,
            rhs_dilation=dilation,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if bias:
            y = y + params["bias"]
        features = jnp.tanh(y).mean((1, 2))
        return features @ params["head"], features

    def init(channels):
        rng = np.random.default_rng(0)
        params = {
            "kernel": rng.standard_normal((*kernel, channels // groups, features)) / 4,
            "head": rng.standard_normal((features, 3)),
        }
        if bias:
            params["bias"] = rng.standard_normal(features)
        return {"params": jax.tree.map(jnp.asarray, params)}

    return init, apply


small = st.integers(1, 3)
pair = st.tuples(small, small)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    size=st.tuples(st.integers(7, 9), st.integers(7, 9)),
    kernel=pair,
    strides=pair,
    dilation=st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)]),
    padding=st.one_of(
        st.sampled_from(["SAME", "VALID"]),
        st.tuples(st.tuples(small, small), st.tuples(small, st.just(0))),
    ),
    groups=st.sampled_from([1, 1, 2]),
    batch=st.integers(1, 2),
    bias=st.booleans(),
    gram=st.booleans(),
)
def test_any_convolution(size, kernel, strides, dilation, padding, groups, batch, bias, gram):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "prefers_gram", lambda layer: gram)
        channels = 4
        init, apply = convolution_model(6, kernel, strides, padding, dilation, groups, bias)
        model = Model(init, apply, ("head",), (*size, channels), 3, "plain")
        variables = init(channels)
        rng = np.random.default_rng(1)
        images = jnp.asarray(rng.random((3, batch, *size, channels)))
        labels = jnp.asarray(rng.integers(0, 3, (3, batch)))
        observed = jax.tree.map(jnp.ones_like, variables["params"])
        assert set(matching.plan(model, variables).values()) >= {"gram" if gram else "formed"}

        @jax.jit
        def both(images):
            results = []
            for method in ("fused", "direct"):
                loss = matching.matching_loss(
                    model, variables, observed, speed=Speed(method=method)
                )
                values, pull_back = jax.vjp(lambda x, loss=loss: loss(x, labels), images)
                results.append((values, pull_back(jnp.ones_like(values))[0]))
            return results

        (fused, fused_derivative), (direct, derivative) = both(images)
        np.testing.assert_allclose(fused, direct, rtol=1e-9)
        np.testing.assert_allclose(fused_derivative, derivative, atol=1e-9)


def test_resnet18_in_float32():
    model = gx.resnet18(num_classes=2, image_shape=(16, 16, 3))
    variables = model.init(jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(0).random((3, 1, 16, 16, 3), np.float32))
    labels = jnp.zeros((3, 1), jnp.int32)
    observed = jax.jit(gx.gradient, static_argnums=0)(model, variables, images[0], labels[0])

    def losses(method):
        def run(variables, observed, images):
            loss = matching.matching_loss(model, variables, observed, speed=Speed(method=method))
            return loss(images, labels[1:])

        return jax.jit(run)(variables, observed, images[1:])

    np.testing.assert_allclose(losses("fused"), losses("direct"), rtol=1e-5)
    kinds = matching.plan(model, variables)
    assert kinds["layer4_1/conv2/kernel"] == kinds["fc/kernel"] == "gram"
    assert kinds["layer1_0/conv1/kernel"] == "formed"
    assert sum(kind == "autodiff" for kind in kinds.values()) == 62 - 21


def test_a_broken_layer_formula_would_be_noticed(monkeypatch):
    with jax.enable_x64(True):
        parts = problem("wide", "none", num=2)
        direct, _ = parts.losses("direct", derivative=False)
        for name in ("inner_product", "sq_norm"):
            whole = getattr(layers, name)
            with monkeypatch.context() as patch:
                patch.setattr(layers, name, lambda *args, whole=whole: 1.001 * whole(*args))
                fused, _ = parts.losses("fused", derivative=False)
            assert not np.allclose(fused, direct, rtol=1e-5)


@pytest.mark.parametrize("distance", ["squared_l2", "cosine"])
def test_near_the_private_image_in_float32(distance):
    # The expanded square cancels there; differences of entries take over.
    model = gx.from_flax(Wide(), image_shape=SHAPE, num_classes=3)
    variables = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    private = rng.random((1, *SHAPE))
    steps = np.array([0.0, 1e-3, 1e-2, 1.0]).reshape(-1, 1, 1, 1, 1)
    images = jnp.asarray(private + steps * rng.standard_normal((4, 1, *SHAPE)), jnp.float32)
    labels = jnp.zeros((4, 1), jnp.int32)
    observed = jax.jit(gx.gradient, static_argnums=0)(model, variables, images[0], labels[0])

    @jax.jit
    def losses(variables, observed, images):
        return [
            matching.matching_loss(
                model,
                variables,
                observed,
                speed=Speed(method=method),
                distance=distance,
                exact_below=below,
            )(images, labels)
            for method, below in (("fused", 1e-3), ("fused", 0.0), ("direct", 1e-3))
        ]

    fused, expanded, _ = losses(variables, observed, images)
    with jax.enable_x64(True):
        _, _, truth = losses(*map(double, (variables, observed, images)))
    at_zero = 1.0
    if distance == "squared_l2":
        at_zero = sum(float(jnp.sum(y**2)) for y in jax.tree.leaves(observed))
    assert 0 < truth[1] < 1e-4 * at_zero < 1e-3 * at_zero < truth[3]
    np.testing.assert_allclose(fused[1:], truth[1:], rtol=2e-4)
    assert 0 <= fused[0] < 1e-11 * at_zero
    assert abs(expanded[1] / truth[1] - 1) > 1e-3  # or the switch would be needless


def test_the_codes_distance_is_a_mean_over_tensors():
    with jax.enable_x64(True):
        parts = problem("wide", "none")
        paper, _ = parts.losses("auto", distance="squared_l2")
        code, _ = parts.losses("auto", distance="mean_squared_l2")
        np.testing.assert_allclose(paper, code * len(jax.tree.leaves(parts.observed)), rtol=1e-10)


def test_a_defense_of_the_users_own_that_mixes_tensors():
    def squash(update):
        biggest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(update)]))
        return jax.tree.map(lambda g: jnp.tanh(g / biggest), update)

    with jax.enable_x64(True):
        parts = problem("wide", "none")
        parts.defense = gx.from_function(
            lambda key, update: squash(update),
            name="own",
            simulate=lambda estimated, update: squash(update),
        )
        fused, fused_derivative = parts.losses("fused")
        direct, derivative = parts.losses("direct")
        np.testing.assert_allclose(fused, direct, rtol=1e-9)
        np.testing.assert_allclose(fused_derivative, derivative, atol=1e-9)


def test_instances_under_vmap():
    with jax.enable_x64(True):
        parts = problem("wide", "none", num=3)
        model, variables, observed = parts.model, parts.variables, parts.observed
        other = jax.tree.map(lambda g: -0.5 * g, observed)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), observed, other)
        images = jnp.stack([parts.images, 1 - parts.images])

        def of(observed, images):
            loss = matching.matching_loss(model, variables, observed)
            values, pull_back = jax.vjp(lambda x: loss(x, parts.labels), images)
            return values, pull_back(jnp.ones_like(values))[0]

        batched = jax.jit(jax.vmap(of))(both, images)
        alone = jax.jit(of)
        for number, own in enumerate((observed, other)):
            for together, separate in zip(batched, alone(own, images[number]), strict=True):
                np.testing.assert_allclose(together[number], separate, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_labels_may_be_shared_or_soft_and_jit_changes_nothing():
    with jax.enable_x64(True):
        parts = problem("wide", "none", num=2)
        labels = jnp.full((2, 1), 2)
        loss = matching.matching_loss(parts.model, parts.variables, parts.observed)
        expected = jax.jit(loss)(parts.images, labels)
        for form in (labels[0], jax.nn.one_hot(labels, 3), jax.nn.one_hot(labels[0], 3)):
            np.testing.assert_allclose(jax.jit(loss)(parts.images, form), expected, rtol=1e-12)
        np.testing.assert_allclose(loss(parts.images, labels), expected, rtol=1e-9)
        soft = jnp.full((2, 1, 3), 1 / 3)
        derivative = jax.jit(jax.grad(lambda x: jnp.sum(loss(parts.images, x))))(soft)
        assert jnp.all(jnp.isfinite(derivative))
        assert jnp.any(derivative != 0)


def test_local_steps_take_the_direct_way():
    with jax.enable_x64(True):
        parts = problem("wide", "none", num=2)
        how = {"client": Client(local_steps=2, local_learning_rate=0.1), "derivative": False}
        auto, _ = parts.losses("auto", **how)
        direct, _ = parts.losses("direct", **how)
        np.testing.assert_allclose(auto, direct, rtol=1e-12)
        one, _ = parts.losses("auto", derivative=False)
        assert not np.allclose(auto, one, rtol=1e-3)
        with pytest.raises(gx.GGLError, match="local_steps"):
            parts.losses("fused", **how)


_MEMORY = """
import jax, jax.numpy as jnp
import ggl_jax as gx

defense = gx.parse("sparsify:0.9")

def memory(depth):
    def apply(variables, x):
        x = x.reshape(x.shape[0], -1)
        for number in range(depth):
            x = jnp.tanh(x @ variables["params"][f"w{number}"])
        return x[:, :3], x

    model = gx.types.Model(None, apply, (), (16, 16, 2), 3, "deep")
    params = {f"w{number}": jnp.ones((512, 512)) / 500 for number in range(depth)}
    estimated = defense.view.estimate(jax.tree.map(jnp.zeros_like, params), ("w2",))

    def losses(params, observed, estimated, images):
        loss = gx.matching_loss(
            model, {"params": params}, observed, view=defense.view, estimated=estimated
        )
        return loss(images, jnp.zeros((1,), jnp.int32))

    images = jnp.ones((8, 1, 16, 16, 2))
    compiled = jax.jit(losses).lower(params, params, estimated, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes

print(memory(6) - memory(3))
"""


def test_sparsification_holds_one_tensor_at_a_time():
    # By default XLA's CPU backend orders operations for concurrency, whatever memory that takes;
    # its flags can only be set for a whole process.
    flags = f"{os.environ['XLA_FLAGS']} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    # Three more tensors of 1 MB for 8 candidates each would be 24 MB if all were held at once.
    assert int(done.stdout) < 4 * 2**20


def test_kernel_gradient_on_its_own():
    # A stride that leaves rows over, in a convolution that only the CPU's way handles.
    with jax.enable_x64(True):
        init, apply = convolution_model(5, (3, 2), (3, 2), ((1, 0), (0, 2)), (1, 1), 1, False)
        model = Model(init, apply, ("head",), (8, 9, 3), 3, "plain")
        variables = init(3)
        site, _ = trace(model, variables, jax.ShapeDtypeStruct((2, 8, 9, 3), jnp.float64)).sites
        rng = np.random.default_rng(0)
        a = jnp.asarray(rng.standard_normal((2, 8, 9, 3)))
        d = jnp.asarray(rng.standard_normal(site.output.shape))
        kernel = variables["params"]["kernel"]
        prepared = convolve.prepare(site.layer, kernel)

        def plain(a, kernel):
            return jax.lax.conv_general_dilated(
                a, kernel, (3, 2), ((1, 0), (0, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        output, pull_back = jax.vjp(plain, a, kernel)
        ours, own_pull_back = jax.vjp(lambda a: convolve.convolve(site.layer, a, prepared), a)
        np.testing.assert_allclose(ours, output, atol=1e-12)
        np.testing.assert_allclose(own_pull_back(d)[0], pull_back(d)[0], atol=1e-12)
        (g,) = convolve.kernel_gradients(site.layer, a[None], d[None])
        np.testing.assert_allclose(jnp.moveaxis(g, 0, -2), pull_back(d)[1], atol=1e-12)


@pytest.mark.parametrize(
    ("height", "width", "padding"),
    [(8, 8, ((1, 1), (1, 1))), (7, 10, ((0, 2), (1, 0))), (5, 8, ((0, 0), (0, 0)))],
)
def test_winograd_equals_the_plain_convolution(height, width, padding, monkeypatch):
    monkeypatch.setattr(winograd, "_BYTES", 2**18)  # several chunks
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((7, 2, height, width, 33)))
        kernel = jnp.asarray(rng.standard_normal((3, 3, 33, 40)))

        def plain(x, kernel):
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        output, pull_back = jax.vjp(plain, x.reshape(-1, height, width, 33), kernel)
        transformed = winograd.prepare(kernel)
        ours = winograd.convolve(x.reshape(-1, height, width, 33), transformed, padding)
        np.testing.assert_allclose(ours, output, atol=1e-11)
        d = jnp.asarray(rng.standard_normal((7, 2, *output.shape[1:])))
        back = tuple((2 - low, 2 - high) for low, high in padding)
        ours = winograd.convolve(d.reshape(output.shape), transformed, back, exchanged=True)
        np.testing.assert_allclose(ours, pull_back(d.reshape(output.shape))[0], atol=1e-11)
        gradients = winograd.kernel_gradients(x, d, padding)
        for own, a, cotangent in zip(gradients, x, d, strict=True):
            expected = jax.vjp(lambda k, a=a: plain(a, k), kernel)[1](cotangent)[0]
            np.testing.assert_allclose(own, expected, atol=1e-11)


@pytest.mark.parametrize(
    ("spec", "gram"),
    [pytest.param("clip:0.5", True, marks=pytest.mark.slow), ("sparsify:0.7", False)],
)
def test_winograd_within_the_loss_and_its_derivative(spec, gram, monkeypatch):
    monkeypatch.setattr(layers, "prefers_gram", lambda layer: gram)
    monkeypatch.setattr(winograd, "_MIN_TILES_OF_GRADIENTS", 16)
    used = []
    for name in ("convolve", "kernel_gradients"):
        inner = getattr(winograd, name)
        monkeypatch.setattr(
            winograd, name, lambda *a, inner=inner, name=name: used.append(name) or inner(*a)
        )
    test_fused_equals_direct("channels", spec, {"batch": 2}, {})
    assert set(used) == {"convolve", "kernel_gradients"}


def test_memory_bounds_what_is_computed_at_once(tiny_model, tiny_variables, tiny_images):
    # The program for a small allowance needs less memory, and gives the same losses.
    observed = gx.gradient(tiny_model, tiny_variables, tiny_images[:1], jnp.asarray([1]))
    images = jax.random.uniform(jax.random.key(0), (256, 1, 8, 8, 3))
    needed, losses = [], []
    for memory in (1.0, 1e-4):
        loss = matching.matching_loss(
            tiny_model, tiny_variables, observed, speed=Speed(memory=memory)
        )
        compiled = jax.jit(loss).lower(images, jnp.asarray([1])).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
        losses.append(compiled(images, jnp.asarray([1])))
    assert needed[1] < 0.5 * needed[0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"speed": Speed(method="fast")}, "method"),
        ({"speed": Speed(chunk_size=0)}, "chunk_size"),
        ({"distance": "l7"}, "l7"),
        ({"speed": Speed(precision="int8")}, "precision"),
        ({"client": Client(local_steps=0)}, "local_steps"),
        ({"speed": Speed(memory=0.0)}, "memory"),
        ({"exact_below": -1.0}, "exact_below"),
    ],
)
def test_bad_options_are_named(tiny_model, tiny_variables, options, word):
    observed = tiny_variables["params"]
    with pytest.raises(gx.GGLError, match=word):
        matching.matching_loss(tiny_model, tiny_variables, observed, **options)


def test_bad_arrays_are_named(tiny_model, tiny_variables):
    observed = tiny_variables["params"]
    with pytest.raises(gx.GGLError, match="observed"):
        matching.matching_loss(tiny_model, tiny_variables, {"w": jnp.ones(3)})
    loss = matching.matching_loss(tiny_model, tiny_variables, observed)
    with pytest.raises(gx.GGLError, match="images"):
        loss(jnp.ones((2, 1, 8, 7, 3)), jnp.zeros((2, 1), jnp.int32))
    untapped = Model(None, lambda v, x: (v["params"]["w"] * x.mean((1, 2)), x), (), SHAPE, 3, "toy")
    variables = {"params": {"w": jnp.ones(3)}}
    loss = matching.matching_loss(
        untapped, variables, {"w": jnp.ones(3)}, speed=Speed(method="fused")
    )
    with pytest.raises(gx.GGLError, match="toy"):
        loss(jnp.ones((2, 1, *SHAPE)), jnp.zeros((2, 1), jnp.int32))


def test_masks_get_a_slope_and_keep_their_values():
    """Finite differences of the loss with sigmoids for masks, moved to the masks' values."""
    w, width = jnp.asarray([[0.7, -1.3], [0.4, 0.9]]), 0.5
    last = jnp.asarray([[1.0, -2.0], [0.5, 1.0]])

    def apply(variables, images):
        hidden = nn.relu(images.reshape(len(images), -1) @ variables["params"]["w"])
        return hidden @ variables["params"]["fc"]["kernel"], hidden

    shared = {"params": {"w": w, "fc": {"kernel": last}}}
    model = Model(lambda key: shared, apply, ("fc",), (1, 2, 1), 2, "two")
    variables = model.init(None)
    x, target = jnp.asarray([[0.9, 0.3]]), jnp.asarray([[0.3, -0.2], [0.1, 0.4]])

    def loss_of(model, x):
        def logits(w):
            own = {"params": {**variables["params"], "w": w}}
            return model.apply(own, x.reshape(1, 1, 2, 1))[0]

        gradient = jax.grad(lambda w: jnp.sum(logits(w) @ jnp.asarray([1.0, -0.5])))(w)
        return jnp.sum((gradient - target) ** 2)

    soft = smoothed(model, width)
    assert loss_of(soft, x) == loss_of(model, x)
    cotangent = last @ jnp.asarray([1.0, -0.5])
    scale = width * jnp.sqrt(jnp.mean((x @ w) ** 2))
    masks = (x @ w > 0).astype(x.dtype)

    def by_hand(x, around):
        """The gradient x^T (mask * cotangent), the mask moved by the sigmoid's difference."""
        s = jax.nn.sigmoid(x @ w / scale) - jax.nn.sigmoid(around @ w / scale)
        return jnp.sum((x.T @ ((masks + s) * cotangent) - target) ** 2)

    slope = jax.grad(lambda x: loss_of(soft, x))(x)
    for i, unit in enumerate(np.eye(2, dtype=np.float32)):
        step = 1e-2 * unit
        expected = (by_hand(x + step, x) - by_hand(x - step, x)) / 2e-2
        assert float(slope[0, i]) == pytest.approx(float(expected), rel=2e-3)
    plain = jax.grad(lambda x: loss_of(model, x))(x)
    assert float(jnp.max(jnp.abs(slope - plain))) > 0.1


@pytest.mark.parametrize("variance", [0.0, 0.04])
def test_the_posterior_is_the_likelihood_or_a_multiple_of_the_cosine(variance):
    rng = np.random.default_rng(0)
    trees = [
        {
            "a": jnp.asarray(rng.normal(size=5), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        }
        for _ in range(2)
    ]
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(float) for t in trees]
    cosine = 1 - flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    expected = np.sum((flat[0] - flat[1]) ** 2) / 0.08 if variance else 7.0 * cosine
    distance = posterior(variance, 7.0)
    assert float(distance.between(*trees)) == pytest.approx(expected, rel=1e-5)
    near = jax.tree.map(lambda x: 1.0005 * x + 1e-4, trees[0])  # by squares
    near_flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(near)]).astype(float)
    cosine = 1 - flat[0] @ near_flat / np.linalg.norm(flat[0]) / np.linalg.norm(near_flat)
    expected = np.sum((flat[0] - near_flat) ** 2) / 0.08 if variance else 7.0 * cosine
    assert float(distance.between(near, trees[0])) == pytest.approx(expected, rel=1e-2)
