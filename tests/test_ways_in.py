"""Models of Flax NNX, Equinox and plain functions, other losses, and cells that fail."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY_SHAPE, TinyNet, make_tiny_prior
from flax import linen as nn
from flax import nnx

import ggl_jax as gx
from ggl_jax.adversary.labels import softmax_form
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.audit import folder as folders
from ggl_jax.audit import report
from ggl_jax.audit.check import check
from ggl_jax.client.defenses.soteria import pruned_gradient
from ggl_jax.client.gradients import predicted

PRIOR = make_tiny_prior()
PRIOR_PARAMS = PRIOR.init(jax.random.key(0))
IMAGES = np.random.default_rng(0).random((2, *TINY_SHAPE)).astype(np.float32)
SEARCH = gx.Search(optimizer="adam:0.1", steps=2, regularizer="none")

#: Each as one program, which compiles sooner than their operations one by one.
gradient = jax.jit(gx.gradient, static_argnums=0)
infer_labels = jax.jit(gx.infer_labels, static_argnums=1)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.conv(x))))
        return self.out(x.reshape(len(x), -1))


class Eq(eqx.Module):
    conv: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 4, 3, stride=2, padding=1, key=first)
        self.out = eqx.nn.Linear(64, 3, key=second)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.conv(jnp.transpose(x, (2, 0, 1)))).reshape(-1))


def of_nnx():
    net = Net(nnx.Rngs(0))
    net.eval()
    return gx.from_nnx(net, TINY_SHAPE), lambda x: net(2 * x - 1)


def of_nnx_in_training():
    net = Net(nnx.Rngs(0))
    return gx.from_nnx(net, TINY_SHAPE), None


def of_equinox():
    net = Eq(jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    model = gx.from_function_model(
        lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, TINY_SHAPE, name="eq"
    )
    return model, lambda x: jax.vmap(net)(2 * x - 1)


def layers():
    keys = jax.random.split(jax.random.key(0))
    sizes = ((192, 8), (8, 3))
    return [
        (0.1 * jax.random.normal(k, s), jnp.zeros(s[1])) for k, s in zip(keys, sizes, strict=True)
    ]


def perceptron(params, x):
    (w1, b1), (w2, b2) = params
    return jnp.tanh(x.reshape(len(x), -1) @ w1 + b1) @ w2 + b2


def of_function():
    params = layers()
    return gx.from_function_model(perceptron, params, TINY_SHAPE), lambda x: perceptron(
        params, 2 * x - 1
    )


def of_function_by_head():
    model = gx.from_function_model(
        lambda p, x: 3 * perceptron(p, x), layers(), TINY_SHAPE, head="1/0", name="scaled"
    )
    return model, None


WAYS = [of_nnx, of_nnx_in_training, of_equinox, of_function, of_function_by_head]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_the_function_that_it_was_made_of(way):
    model, reference = way()
    variables = model.init(jax.random.key(0))
    logits, features = jax.jit(model.apply)(variables, IMAGES)
    layer = variables["params"]
    for name in model.head:
        layer = layer[name]
    scale = 3 if model.name == "scaled" else 1
    np.testing.assert_allclose(
        scale * (features @ layer["kernel"] + layer["bias"]), logits, rtol=1e-4, atol=1e-5
    )
    if reference is not None:
        np.testing.assert_allclose(logits, reference(jnp.asarray(IMAGES)), rtol=1e-4, atol=1e-5)
    update = gradient(model, variables, IMAGES[:1], np.asarray([2]))
    assert infer_labels(update, model.head).tolist() == [2]


@pytest.mark.parametrize("way", [of_nnx, of_equinox, of_function])
def test_the_three_libraries_end_to_end(way):
    model, _ = way()
    row, other = gx.audit(
        IMAGES[:1],
        [1],
        model=model,
        prior=PRIOR,
        prior_params=PRIOR_PARAMS,
        defenses=["none", optax.clip_by_global_norm(0.1)],
        search=SEARCH,
        num_controls=4,
        ceiling_steps=2,
    ).rows
    assert row["label_inferred"] == 1
    assert other["defense"] == "clip_by_global_norm"
    assert np.isfinite(row["psnr"])
    assert row["distance"] != other["distance"]


def test_optax_noise_is_another_one_for_each_key():
    defense = gx.from_optax(optax.add_noise(0.1, 0.5, jax.random.key(0)))
    assert defense.view.adds_noise
    model, _ = of_function()
    variables = model.init(jax.random.key(0))
    update = variables["params"]
    context = gx.Context(model, variables, IMAGES[:1], np.asarray([1]))
    first, again, other = (
        jax.tree.leaves(defense.apply(jax.random.key(n), update, context)[0]) for n in (0, 0, 1)
    )
    np.testing.assert_array_equal(first[0], again[0])
    assert np.abs(first[0] - other[0]).max() > 1e-3


# --- losses -------------------------------------------------------------------------------------


def linear(outputs, loss, num_classes=None):
    params = {"w": 0.1 * jax.random.normal(jax.random.key(0), (192, outputs))}
    return gx.from_function_model(
        lambda p, x: x.reshape(len(x), -1) @ p["w"],
        params,
        TINY_SHAPE,
        num_classes,
        loss=loss,
        preprocess=lambda x: x,
        name="linear",
    )


def huber(logits, labels):
    targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[1])
    return jnp.mean(optax.huber_loss(logits, targets))


@pytest.mark.parametrize(
    ("outputs", "loss", "written"),
    [
        (1, "binary_cross_entropy", lambda z, y: optax.sigmoid_binary_cross_entropy(z[:, 0], y)),
        (3, "mean_squared_error", lambda z, y: (z - jax.nn.one_hot(y, 3)) ** 2),
        (1, "mean_squared_error", lambda z, y: (z[:, 0] - y) ** 2),
        (3, huber, lambda z, y: optax.huber_loss(z, jax.nn.one_hot(y, 3))),
    ],
)
def test_client_and_both_methods_of_matching_use_the_models_loss(outputs, loss, written):
    model = linear(outputs, loss, 2 if outputs == 1 else None)
    variables, labels = model.init(jax.random.key(0)), np.asarray([1, 0])
    update = gradient(model, variables, IMAGES, labels)
    x = IMAGES.reshape(2, -1)
    kernel = variables["params"]["head"]["kernel"]
    wanted = jax.grad(lambda w: jnp.mean(written(x @ w, labels)))(kernel)
    np.testing.assert_allclose(update["head"]["kernel"], wanted, rtol=1e-4, atol=1e-6)
    # Soteria takes the gradient anew; with nothing pruned it is the same.
    kept = np.ones((2, 192), np.float32)
    pruned = jax.jit(pruned_gradient, static_argnums=0)
    again = pruned(model, variables, jnp.asarray(IMAGES), labels, kept)
    np.testing.assert_allclose(again["head"]["kernel"], wanted, rtol=1e-4, atol=1e-6)
    losses = [
        jax.jit(matching_loss(model, variables, update, speed=gx.Speed(method=method)))(
            jnp.stack([IMAGES, IMAGES[::-1]]), labels
        )
        for method in ("fused", "direct")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3, atol=1e-6)
    assert losses[0][0] < 1e-5 < losses[0][1]


def test_the_class_of_one_output():
    logits = jnp.asarray([[-0.4], [1.6]])
    assert predicted(linear(1, "binary_cross_entropy"), logits).tolist() == [0, 1]
    assert predicted(linear(1, "mean_squared_error", 3), logits).tolist() == [0, 2]


@pytest.mark.parametrize("label", [0, 1])
def test_binary_labels_are_inferred(label):
    model = linear(1, "binary_cross_entropy")
    assert model.num_classes == 2
    update = gradient(model, model.init(jax.random.key(0)), IMAGES[:1], np.asarray([label]))
    assert infer_labels(*softmax_form(model, update)).tolist() == [label]


def audit(model, search=SEARCH, defenses=("none",), images=IMAGES[:1], labels=(1,), **options):
    return gx.audit(
        images,
        list(labels),
        model=model,
        prior=PRIOR,
        prior_params=PRIOR_PARAMS,
        defenses=list(defenses),
        search=search,
        num_controls=4,
        ceiling_steps=2,
        **options,
    )


def test_labels_that_a_loss_does_not_tell_have_to_be_searched():
    model = linear(3, huber)
    with pytest.raises(gx.GGLError, match=r"from the loss huber labels cannot be inferred"):
        audit(model)
    (row,) = audit(model, gx.Search(**{**vars(SEARCH), "labels": "searched"})).rows
    assert row["label_inferred"] in (0, 1, 2)


# --- cells that fail ----------------------------------------------------------------------------


def spoiled(change, name):
    return gx.from_function(lambda key, update: jax.tree.map(change, update), name=name)


def test_a_failing_cell_is_a_row_with_its_reason_and_the_others_go_on(tmp_path, capsys):
    model = gx.from_flax(TinyNet(), TINY_SHAPE)
    poison = spoiled(lambda g: g * jnp.nan, "poison")

    def frozen(key, update):
        return {**update, "Dense_0": jax.tree.map(jnp.zeros_like, update["Dense_0"])}

    headless = gx.from_function(frozen, name="headless")
    found = audit(model, defenses=[poison, headless, "none"], out=tmp_path)
    assert [row["defense"] for row in found.rows] == ["none"]
    assert "shared under poison" in found.failures["poison, image-0"]
    assert "label cannot be told" in found.failures["headless, image-0"]
    records = folders.read(tmp_path)
    assert len(records.failures) == 2
    page = report.make(records)
    report.write(page, tmp_path)
    assert "shared under poison" in (tmp_path / "report.md").read_text()
    with pytest.raises(gx.GGLError, match="1 cell of poison failed"):
        check(records, {"ssim": 0.5})
    again = audit(model, defenses=[poison, headless, "none"], out=tmp_path, retry_failed=True)
    assert again.failures == found.failures


def test_an_update_of_zero_tells_nothing(monkeypatch):
    model = gx.from_flax(TinyNet(), TINY_SHAPE)
    public = gx.Public(model, model.init(jax.random.key(0)), PRIOR, PRIOR_PARAMS)
    zero = gx.Shared(jax.tree.map(jnp.zeros_like, public.variables["params"]))
    with pytest.raises(gx.GGLError, match="zero in every entry"):
        gx.reconstruct(
            jax.random.split(jax.random.key(0), 1), public, [zero], view=gx.parse("none").view
        )


class Two(nn.Module):
    """Two inputs and two heads."""

    @nn.compact
    def __call__(self, x, age):
        x = nn.relu(nn.Dense(4)(x.reshape(len(x), -1))) + age
        return nn.Dense(3)(x), nn.Dense(1)(x)


def test_several_inputs_and_heads_by_a_function_around_them():
    module = Two()
    params = module.init(jax.random.key(0), jnp.zeros((1, *TINY_SHAPE)), 0.0)
    model = gx.from_function_model(lambda p, x: module.apply(p, x, 0.4)[0], params, TINY_SHAPE)
    assert model.head == ("params", "Dense_1")
    variables = model.init(jax.random.key(0))
    update = gradient(model, variables, IMAGES[:1], np.asarray([2]))
    assert infer_labels(update, model.head).tolist() == [2]
    assert not np.any(update["params"]["Dense_2"]["kernel"])
