"""The fused matching loss equals the direct one: values and derivatives, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ggl_jax as gx
from ggl_jax.adversary.matching import layers

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


MODELS = {
    "many kinds": (Net(), {}),
    "wide": (Wide(), {}),
    "train-mode norm": (Net(train=True), {"mutable": ["batch_stats"]}),
}


def problem(name, spec, *, batch=1, fidelity="paper", num=4):
    """A model in float64, an observed update, and a population [num batch h w c] with labels."""
    module, apply_kwargs = MODELS[name]
    model = gx.from_flax(module, image_shape=SHAPE, num_classes=3, apply_kwargs=apply_kwargs)
    double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)  # noqa: E731
    variables = double(model.init(jax.random.key(0)))
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.random((num + 1, batch, *SHAPE)))
    labels = jnp.asarray(rng.integers(0, 3, (num + 1, batch)))
    update = gx.gradient(model, variables, images[0], labels[0])
    defense = gx.parse(spec, fidelity=fidelity)
    context = gx.Context(model, variables, images[0], labels[0])
    observed = double(defense.apply(jax.random.key(2), update, context))
    estimated = defense.estimate(observed, model.head)
    return model, variables, observed, defense, estimated, images[1:], labels[1:]


def losses(parts, method, **options):
    model, variables, observed, defense, estimated, images, labels = parts

    def of(images):
        loss = gx.matching_loss(
            model,
            variables,
            observed,
            defense=defense,
            estimated=estimated,
            method=method,
            **options,
        )
        return loss(images, labels)

    values, pull_back = jax.vjp(of, images)
    return np.asarray(values), np.asarray(pull_back(jnp.ones_like(values))[0])


CASES = [
    ("many kinds", "clip:0.3", {}, {}),
    ("many kinds", "soteria:0.5", {"fidelity": "code", "batch": 2}, {}),
    ("wide", "none", {"batch": 3}, {}),
    ("wide", "sparsify:0.7", {}, {"distance": "cosine"}),
    ("train-mode norm", "none", {"batch": 2}, {}),
]
MORE_CASES = [
    ("many kinds", "none", {}, {}),
    ("many kinds", "clip:0.3", {"fidelity": "code"}, {"distance": "cosine"}),
    ("many kinds", "sparsify:0.7", {"batch": 2}, {}),
    ("wide", "noise:0.1", {}, {"distance": "cosine"}),
    ("wide", "clip:0.1+noise:0.01", {}, {}),
    ("wide", "soteria:0.4+clip:0.2", {"fidelity": "code"}, {}),
]


@pytest.mark.parametrize(
    ("name", "spec", "settings", "options"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_fused_equals_direct(name, spec, settings, options):
    with jax.enable_x64(True):
        parts = problem(name, spec, **settings)
        fused, fused_gradient = losses(parts, "fused", **options)
        direct, direct_gradient = losses(parts, "direct", **options)
        np.testing.assert_allclose(fused, direct, rtol=1e-8)
        scale = np.abs(direct_gradient).max()
        np.testing.assert_allclose(fused_gradient, direct_gradient, atol=1e-7 * scale)
        assert len(set(np.round(direct, 6))) == len(direct)  # candidates differ


@pytest.mark.parametrize("name", ["inner_product", "sq_norm"])
def test_a_broken_layer_formula_would_be_noticed(monkeypatch, name):
    whole = getattr(layers, name)
    monkeypatch.setattr(layers, name, lambda *args: 1.01 * whole(*args))
    with jax.enable_x64(True):
        parts = problem("wide", "none")
        fused, _ = losses(parts, "fused")
        direct, _ = losses(parts, "direct")
    assert not np.allclose(fused, direct, rtol=1e-5)


def test_zero_at_the_private_image_in_float32():
    # The expanded square cancels there; the direct form takes over.
    model = gx.from_flax(Wide(), image_shape=SHAPE, num_classes=3)
    variables = model.init(jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(0).random((2, 1, *SHAPE)), jnp.float32)
    labels = jnp.zeros((2, 1), jnp.int32)
    observed = gx.gradient(model, variables, images[0], labels[0])
    loss = gx.matching_loss(model, variables, observed, method="fused")(images, labels)
    norm = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(observed))
    assert 0 <= float(loss[0]) < 1e-9 * norm
    assert float(loss[1]) > 1e-3 * norm


def test_code_fidelity_divides_by_the_number_of_tensors():
    with jax.enable_x64(True):
        parts = problem("wide", "none")
        paper, _ = losses(parts, "auto", fidelity="paper")
        code, _ = losses(parts, "auto", fidelity="code")
        np.testing.assert_allclose(paper, code * len(jax.tree.leaves(parts[2])), rtol=1e-10)


def test_instances_under_vmap_and_chunks():
    with jax.enable_x64(True):
        model, variables, observed, _, _, images, labels = problem("wide", "none")
        other = jax.tree.map(lambda g: -0.5 * g, observed)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), observed, other)

        def of(observed, chunk_size=None):
            loss = gx.matching_loss(model, variables, observed, chunk_size=chunk_size)
            return loss(images, labels)

        batched = jax.vmap(of)(both)
        np.testing.assert_allclose(batched[0], of(observed), rtol=1e-8)
        np.testing.assert_allclose(batched[1], of(other), rtol=1e-8)
        np.testing.assert_allclose(of(observed, chunk_size=3), of(observed), rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"method": "fast"}, "method"), ({"chunk_size": 0}, "chunk_size"), ({"distance": "l7"}, "l7")],
)
def test_bad_options_are_named(options, word):
    with jax.enable_x64(True):
        model, variables, observed, _, _, _, _ = problem("wide", "none")
    with pytest.raises(gx.GGLError, match=word):
        gx.matching_loss(model, variables, observed, **options)
