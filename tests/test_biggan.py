"""Foreign generators: BigGAN-deep and declared DCGANs against torch, and their import."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ggl_jax import checkpoint
from ggl_jax.cli import run
from ggl_jax.errors import GGLError
from ggl_jax.images import area_resize, from_signed
from ggl_jax.priors import BIGGAN_DEEP, BigGANConfig, biggan_deep, convolutional, load_prior
from ggl_jax.priors.biggan import from_torch, published_layout
from ggl_jax.priors.convolutional import Layer
from ggl_jax.priors.convolutional import from_torch as convolutional_from_torch

GOLDEN = Path(__file__).parent / "golden" / "biggan.npz"
CELEBA32_FILE = Path(__file__).parents[2] / "shared/assets/generators/celeba32_dcgan_apache2.pt"
#: All that a BigGAN-deep has, in two blocks: up-sampling, dropped channels, attention.
TINY = BigGANConfig(
    8,
    ((False, 2, 2), (True, 2, 1)),
    z_dim=4,
    class_embed_dim=3,
    channel_width=8,
    num_classes=5,
    attention_layer_position=1,
    n_stats=6,
)
#: The true 256 layout, a sixteenth as wide.
NARROW = dataclasses.replace(BIGGAN_DEEP[256], channel_width=8, num_classes=10)
#: (truncation, fidelity) of the golden images; stored statistics lie at 0, 0.2, ..., 1.
MODES = ((1.0, "paper"), (0.4, "paper"), (0.45, "paper"), (0.45, "code"))


def published_shapes(config):
    """Names and shapes of all tensors in the published weights of this size."""
    return {name: tensor.shape for name, tensor in published_layout(config).items()}


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        return {name: stored[name] for name in stored}


@pytest.fixture(scope="module")
def tiny_weights(golden):
    return {k.removeprefix("w/"): v for k, v in golden.items() if k.startswith("w/")}


@pytest.fixture(scope="module")
def tiny_params(tiny_weights):
    return from_torch(tiny_weights, TINY)


# --- the generator ----------------------------------------------------------------------------


def torch_images(net, latents, labels, truncation, fidelity):
    import torch

    with torch.no_grad():
        signed = net(torch.tensor(latents), torch.tensor(labels), truncation, fidelity == "code")
    return from_signed(signed.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("mode", MODES)
def test_images_match_stored_ones(mode, golden, tiny_params):
    truncation, fidelity = mode
    prior = biggan_deep(TINY, truncation=truncation, fidelity=fidelity)
    images = jax.jit(prior.apply)(tiny_params, golden["latents"], golden["labels"])
    expected = golden[f"images/{truncation}/{fidelity}"]
    assert images.shape == (4, *prior.image_shape) == expected.shape
    assert relative_error(images, expected) < 1e-5
    for other in MODES:
        if other != mode:
            assert relative_error(images, golden["images/{}/{}".format(*other)]) > 1e-3


def test_the_256_layout_matches_torch():
    pytest.importorskip("torch")
    from torch_biggan import random_biggan

    net = random_biggan(dataclasses.asdict(NARROW))
    state = net.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == published_shapes(NARROW)
    prior = biggan_deep(NARROW, truncation=0.43, image_size=224)
    latents = np.asarray(prior.sample_latent(jax.random.key(0), 2))
    labels = np.array([3, 9])
    params = from_torch(state, NARROW)
    images = jax.jit(prior.apply)(params, latents, labels)
    assert images.shape == (2, 224, 224, 3)
    full = torch_images(net, latents, labels, 0.43, "paper")
    assert np.std(full) > 0.1
    assert relative_error(images, torch_area(full, 224, 224)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 256, 512])
def test_the_published_sizes_match_torch(size):
    pytest.importorskip("torch")
    from torch_biggan import random_biggan

    config = BIGGAN_DEEP[size]
    net = random_biggan(dataclasses.asdict(config))
    latents = np.random.default_rng(0).normal(size=(1, 128)).astype(np.float32)
    expected = torch_images(net, latents, [207], 1.0, "paper")
    params = from_torch(net.state_dict(), config)
    images = jax.jit(biggan_deep(config).apply)(params, latents, np.array([207]))
    assert images.shape == (1, size, size, 3)
    assert relative_error(images, expected) < 1e-4


def test_images_match_the_published_package():
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("pytorch_pretrained_biggan", exc_type=ImportError)
    from torch_biggan import random_biggan

    # The package takes the class's embedding to be as long as the latent, and gives the first
    # layer 16 channel units.
    units = [
        (False, 16, 16),
        (True, 16, 16),
        (True, 16, 8),
        (True, 8, 4),
        (True, 4, 2),
        (True, 2, 1),
    ]
    fields = {**dataclasses.asdict(TINY), "class_embed_dim": 4, "layers": units, "output_dim": 128}
    config = BigGANConfig.of(fields)
    state = random_biggan(fields).state_dict()
    theirs = package.BigGAN(package.BigGANConfig.from_dict(fields)).eval()
    theirs.load_state_dict(state)
    latents = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    labels = np.array([4, 0, 2])
    with torch.no_grad():
        signed = theirs(torch.as_tensor(latents), torch.eye(5)[labels], 0.45).numpy()
    prior = biggan_deep(config, truncation=0.45, fidelity="code")
    images = jax.jit(prior.apply)(from_torch(state, config), latents, labels)
    assert relative_error(images, from_signed(signed.transpose(0, 2, 3, 1))) < 1e-4


def test_an_image_follows_from_its_own_latent_and_label(golden, tiny_params):
    apply = jax.jit(biggan_deep(TINY).apply)
    latents, labels = golden["latents"], golden["labels"]
    images = apply(tiny_params, latents, labels)
    others = apply(tiny_params, latents.copy() * [[1], [0], [0], [0]], labels)
    np.testing.assert_allclose(images[0], others[0], atol=1e-6)
    assert relative_error(others[1], images[1]) > 1e-3
    others = apply(tiny_params, latents, np.array([0, 4, 4, 1]))
    np.testing.assert_allclose(images[0], others[0], atol=1e-6)
    assert relative_error(others[1], images[1]) > 1e-3


def test_an_unknown_label_gives_no_image(golden, tiny_params):
    images = jax.jit(biggan_deep(TINY).apply)(tiny_params, golden["latents"], [-1, 0, 4, 5])
    assert np.isnan(images[0]).all()
    assert np.isfinite(images[1:3]).all()
    assert np.isnan(images[3]).all()


def test_latents_are_truncated_normal():
    prior = biggan_deep(TINY, truncation=0.5)
    latents = np.asarray(prior.sample_latent(jax.random.key(0), 5000))
    assert latents.shape == (5000, prior.latent_dim)
    assert stats.kstest(latents.ravel(), stats.truncnorm(-2, 2, scale=0.5).cdf).pvalue > 1e-3


def test_derivative_by_finite_differences(golden, tiny_params):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tiny_params)
        prior = biggan_deep(TINY, truncation=0.45, image_size=7)
        latents, labels = jnp.asarray(golden["latents"], jnp.float64), golden["labels"]
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(4, *prior.image_shape))
        loss = jax.jit(lambda z: jnp.sum(weights * prior.apply(params, z, labels)))
        gradient = np.asarray(jax.jit(jax.grad(loss))(latents))
        step = 1e-6
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(numeric.shape):
            ahead, behind = latents.at[index].add(step), latents.at[index].add(-step)
            numeric[index] = (loss(ahead) - loss(behind)) / (2 * step)
    assert (np.abs(numeric) > 1e-4).all()
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6)


def test_bad_arguments():
    for options, words in (
        ({"truncation": 0.0}, "truncation=0.0 must be in (0, 1]"),
        ({"truncation": 1.2}, "truncation=1.2"),
        ({"image_size": 0}, "image_size: got 0"),
        ({"fidelity": "exact"}, "fidelity: got 'exact'"),
    ):
        with pytest.raises(GGLError) as error:
            biggan_deep(TINY, **options)
        one_line(error, words)
    for change, words in (
        ({"channel_width": 2}, "channel_width=2"),
        ({"output_dim": 16}, "output_dim=16"),
        ({"layers": [[0, 2, 2], [1, 1, 1]]}, "layers"),
        ({"layers": [[0, 2]]}, "[up_sample, in, out]"),
        ({"layers": [[0, 1, 2], [1, 2, 1]]}, "in [1, its input's]"),
        ({"attention_layer_position": 2}, "attention_layer_position: got 2"),
        ({"n_stats": 1}, "n_stats: got 1"),
        ({"eps": 0}, "eps: got 0"),
        ({"colour": 1}, "unknown colour"),
    ):
        with pytest.raises(GGLError) as error:
            BigGANConfig.of({**dataclasses.asdict(TINY), **change})
        one_line(error, words)


# --- the published weights --------------------------------------------------------------------


def test_published_shapes():
    """Against facts of the published files."""
    shapes = published_shapes(BIGGAN_DEEP[256])
    assert shapes["embeddings.weight"] == (128, 1000)
    assert shapes["generator.gen_z.weight_orig"] == (32768, 256)
    assert shapes["generator.layers.8.snconv1x1_theta.weight_orig"] == (64, 512, 1, 1)
    assert shapes["generator.layers.8.snconv1x1_o_conv.weight_v"] == (256,)
    assert shapes["generator.layers.12.conv_2.weight_orig"] == (64, 64, 3, 3)
    assert shapes["generator.layers.12.bn_3.running_means"] == (51, 64)
    assert shapes["generator.conv_to_rgb.weight_orig"] == (128, 128, 3, 3)


def test_from_torch_names_what_is_wrong(tiny_weights):
    weight = "generator.layers.0.conv_1.weight_orig"
    changed = {k: v for k, v in tiny_weights.items() if k != "generator.bn.running_vars"}
    with pytest.raises(GGLError) as error:
        from_torch({**changed, "extra": np.zeros(3), weight: np.zeros((4, 4, 1, 1))}, TINY)
    one_line(error, "missing: generator.bn.running_vars;", "unknown: extra;")
    one_line(error, f"misshapen: {weight} [4, 4, 1, 1] instead of [4, 4, 3, 3]")
    bias = "generator.layers.0.conv_1.bias"
    with pytest.raises(GGLError, match=r"layers\.0\.conv_1\.bias of .* is not of finite real"):
        from_torch({**tiny_weights, bias: np.full(4, np.nan)}, TINY)
    with pytest.raises(GGLError, match=r"layers\.0\.conv_1: its spectral norm .* is 0"):
        from_torch({**tiny_weights, weight: np.zeros((4, 4, 3, 3))}, TINY)


# --- area resize ------------------------------------------------------------------------------


def torch_area(images, height, width):
    import torch

    planes = torch.as_tensor(np.array(images).transpose(0, 3, 1, 2))
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="area")
    return resized.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("size", "target"), [((256, 256), (224, 224)), ((9, 12), (5, 4)), ((5, 7), (8, 7))]
)
def test_area_resize_is_that_of_torch(size, target):
    pytest.importorskip("torch")
    images = np.random.default_rng(0).random((2, *size, 3), np.float32)
    resized = area_resize(jnp.asarray(images), *target)
    np.testing.assert_allclose(resized, torch_area(images, *target), atol=3e-7)


def test_area_resize_by_hand():
    row = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]).reshape(1, 1, 5, 1)
    # windows [0, 2), [1, 4), [3, 5)
    np.testing.assert_allclose(area_resize(row, 1, 3).ravel(), [1.5, 14 / 3, 12], rtol=1e-6)
    np.testing.assert_allclose(area_resize(row, 2, 5)[0, 1].ravel(), row.ravel())


# --- declared layers --------------------------------------------------------------------------

#: Every kind of layer, with kernels, strides and paddings that differ.
LAYERS = (
    {"kind": "dense", "name": "fc", "features": 24},
    {"kind": "batch_norm", "name": "bn0", "activation": "relu", "eps": 0.1},
    {"kind": "reshape", "shape": [6, 2, 2]},
    {"kind": "conv_transpose", "name": "up", "features": 5, "kernel": 5, "stride": 3, "padding": 1},
    {"kind": "batch_norm", "name": "bn1", "activation": "leaky_relu", "slope": 0.3},
    {"kind": "upsample"},
    {"kind": "conv", "name": "out.0", "features": 3, "kernel": 3, "stride": 2, "bias": False}
    | {"activation": "sigmoid"},
)


def torch_layers(torch):
    """The network that `LAYERS` declares."""
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(7, 24),
        nn.BatchNorm1d(24, eps=0.1),
        nn.ReLU(),
        nn.Unflatten(1, (6, 2, 2)),
        nn.ConvTranspose2d(6, 5, 5, stride=3, padding=1),
        nn.BatchNorm2d(5),
        nn.LeakyReLU(0.3),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(5, 3, 3, stride=2, bias=False),
        nn.Sigmoid(),
    )


def test_declared_layers_match_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch_layers(torch)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.dtype.is_floating_point:
                value.uniform_(0.5, 2.0) if name.endswith("var") else value.normal_(0.0, 0.5)
        latents = torch.randn(3, 7)
        expected = net.eval()(latents).numpy().transpose(0, 2, 3, 1)
    names = {"0": "fc", "1": "bn0", "4": "up", "5": "bn1", "8": "out.0"}
    state = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value
        for name, value in net.state_dict().items()
    }
    prior = convolutional(LAYERS, latent_dim=7)
    params = convolutional_from_torch(state, LAYERS, latent_dim=7)
    images = jax.jit(prior.apply)(params, latents.numpy(), None)
    assert images.shape == (3, *prior.image_shape) == expected.shape
    np.testing.assert_allclose(images, expected, atol=1e-5)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(prior.init, jax.random.key(0)))
    assert shapes == jax.tree.map(jnp.shape, params)


CELEBA32 = {
    "latent_dim": 100,
    "latents": "uniform",
    "layers": (
        Layer("conv_transpose", "generator_deconv.0.0", 256, 4, bias=False),
        Layer("batch_norm", "generator_deconv.0.1"),
        Layer("conv", "generator_deconv.1.0", 128, 3, 1, 1, bias=False),
        Layer("batch_norm", "generator_deconv.1.1", activation="leaky_relu"),
        Layer("conv_transpose", "generator_deconv.2.0", 64, 4, 2, 1, bias=False),
        Layer("batch_norm", "generator_deconv.2.1", activation="leaky_relu"),
        Layer("conv_transpose", "generator_deconv.3.0", 32, 4, 2, 1, bias=False),
        Layer("batch_norm", "generator_deconv.3.1", activation="leaky_relu"),
        Layer("conv_transpose", "generator_deconv.4.0", 3, 4, 2, 1, activation="tanh"),
    ),
}


def test_the_celeba_generator():
    """The Apache-2.0 example: images as torch's, latents as in its training."""
    torch = pytest.importorskip("torch")
    if not CELEBA32_FILE.is_file():
        pytest.skip("no shared assets here")
    prior = convolutional(**CELEBA32)
    params = convolutional_from_torch(
        CELEBA32_FILE, CELEBA32["layers"], latent_dim=CELEBA32["latent_dim"]
    )
    assert prior.image_shape == (32, 32, 3)
    latents = np.asarray(prior.sample_latent(jax.random.key(0), 300))
    assert latents.shape == (300, 100)
    assert -1 <= latents.min() < -0.99 < 0.99 < latents.max() <= 1
    state = torch.load(CELEBA32_FILE, map_location="cpu", weights_only=True)
    state = {name.removeprefix("generator_deconv."): value for name, value in state.items()}
    functional = torch.nn.functional
    x = torch.tensor(latents)[:, :, None, None]
    for i in range(5):
        weight, bias = state[f"{i}.0.weight"], state.get(f"{i}.0.bias")
        if i == 1:
            x = functional.conv2d(x, weight, padding=1)
        else:
            x = functional.conv_transpose2d(x, weight, bias, 1 + (i > 1), int(i > 1))
        if i < 4:
            stored = [state[f"{i}.1.{entry}"] for entry in ("running_mean", "running_var")]
            # Samples have the statistics that training stored, which holds for no other order of
            # activations and no other law of the latents.
            assert relative_error(x.var((0, 2, 3)), stored[1]) < 0.1
            x = functional.batch_norm(x, *stored, state[f"{i}.1.weight"], state[f"{i}.1.bias"])
            x = functional.leaky_relu(x, 0.2) if i else x
    expected = from_signed(torch.tanh(x[:8]).numpy().transpose(0, 2, 3, 1))
    images = jax.jit(prior.apply)(params, latents[:8], None)
    assert relative_error(images, expected) < 1e-5


def test_bad_layers():
    fc, out = {"kind": "dense", "name": "a", "features": 12}, {"activation": "tanh"}
    image = {"kind": "reshape", "shape": [3, 2, 2]}
    for layers, words in (
        ([], "at least one layer"),
        ([fc | {"colour": 1}], "unknown colour"),
        ([{"name": "a"}], "with a kind"),
        ([fc | {"kind": "pool"}], "kind: got 'pool', allowed: dense"),
        ([fc | {"features": 0}], "features: got 0"),
        ([fc | {"activation": "gelu"}], "activation: got 'gelu'"),
        ([fc | {"name": ""}, image | out], "name: got ''"),
        ([fc, image], "last activation is ''"),
        ([fc, image | {"shape": [3, 2, 3]} | out], "do not fill"),
        ([fc | out], "shape [12]"),
        ([fc, {"kind": "upsample"} | out], "needs a reshape"),
        ([fc, fc, image | out], "given twice"),
        ([fc, image, {"kind": "conv", "name": "b", "features": 3, "kernel": 5} | out], "no pixels"),
    ):
        with pytest.raises(GGLError) as error:
            convolutional(layers, latent_dim=4)
        one_line(error, words)
    with pytest.raises(GGLError, match="latents: got 'cauchy'"):
        convolutional([fc, image | out], latent_dim=4, latents="cauchy")
    with pytest.raises(GGLError, match="latent_dim: got 0"):
        convolutional([fc, image | out], latent_dim=0)
    with pytest.raises(GGLError, match=r"missing: a\.bias; misshapen: a\.weight \[4, 12\]"):
        convolutional_from_torch({"a.weight": np.zeros((4, 12))}, [fc, image | out], latent_dim=4)


# --- the command ------------------------------------------------------------------------------


def test_import_biggan(tmp_path, monkeypatch, tiny_weights, golden, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    # The command takes published sizes: 128 with the channels of the tiny one.
    config = dataclasses.replace(TINY, output_dim=128, layers=((True, 1, 1),) * 5)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in published_shapes(config).items()
    }
    weights.update({k: np.abs(v) for k, v in weights.items() if k.endswith("vars")})
    np.savez(tmp_path / "weights.npz", **weights)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))

    def call(*extra):
        return run(
            [
                *("import-prior", "biggan-deep-128", "--from", str(tmp_path / "weights.npz")),
                *("--out", str(tmp_path / "prior"), "--num-samples", "2", *extra),
            ]
        )

    good = ("--config", str(tmp_path / "config.json"), "--truncation", "0.4", "--image-size", "24")
    assert call(*good) == 0
    prior, params, card = load_prior(tmp_path / "prior")
    assert prior.image_shape == (24, 24, 3)
    assert card["trained_on"] == ["imagenet"]
    assert card["source"]["file"] == "weights.npz"
    assert "import-prior biggan-deep-128" in card["command"]
    latents = prior.sample_latent(jax.random.key(0), 2)
    assert abs(latents).max() <= 0.8
    direct = biggan_deep(config, truncation=0.4, image_size=24)
    images = jax.jit(prior.apply)(params, latents, jnp.array([0, 4]))
    expected = jax.jit(direct.apply)(from_torch(weights, config), latents, jnp.array([0, 4]))
    np.testing.assert_array_equal(images, expected)
    assert (tmp_path / "prior" / "samples.png").is_file()

    capsys.readouterr()
    assert call(*good) == 2
    assert "prior exists" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "prior")
    assert call() == 2  # the published config has more layers
    assert "missing: generator.layers." in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(NARROW)))
    assert call(*good) == 2
    assert "as BigGAN-deep-256" in capsys.readouterr().err.replace("is of", "as")
    (tmp_path / "config.json").write_text("[")
    assert call(*good) == 2
    assert "config.json: cannot be read" in capsys.readouterr().err


def test_import_dcgan(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))

    def call(source, out, *extra):
        return run(
            [
                *("import-prior", "dcgan", "--from", str(source), "--out", str(out)),
                *("--num-samples", "0", *extra),
            ]
        )

    with np.load(GOLDEN.parent / "dcgan.npz") as stored:
        weights = {k.removeprefix("w/"): stored[k] for k in stored if k.startswith("w/")}
        latents, expected = stored["latents"], stored["evaluated"]
    np.savez(tmp_path / "a.npz", **weights)
    assert call(tmp_path / "a.npz", tmp_path / "a", "--trained-on", "celeba") == 0
    prior, params, card = load_prior(tmp_path / "a")
    assert card["kind"] == "dcgan"
    assert card["trained_on"] == ["celeba"]
    images = jax.jit(prior.apply)(params, latents, None)
    np.testing.assert_allclose(images, from_signed(expected.transpose(0, 2, 3, 1)), atol=2e-6)

    layers = [
        {"kind": "dense", "name": "a", "features": 12},
        dataclasses.asdict(Layer("reshape", shape=(3, 2, 2), activation="tanh")),
    ]
    (tmp_path / "b.json").write_text(
        json.dumps({"latent_dim": 4, "latents": "uniform", "layers": layers})
    )
    kernel, bias = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32).T[:4], 0
    np.savez(tmp_path / "b.npz", **{"a.weight": kernel.T, "a.bias": np.full(12, bias)})
    assert call(tmp_path / "b.npz", tmp_path / "b", "--config", str(tmp_path / "b.json")) == 0
    prior, params, card = load_prior(tmp_path / "b")
    assert checkpoint.load_card(tmp_path / "b")["kind"] == card["kind"] == "convolutional"
    assert load_prior(tmp_path / "b")[0] == prior  # programs compiled for it are found again
    latents = np.asarray(prior.sample_latent(jax.random.key(0), 3))
    expected = np.tanh(latents @ kernel).reshape(3, 3, 2, 2).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(prior.apply(params, latents, None), (expected + 1) / 2, atol=1e-6)
    assert call(tmp_path / "b.npz", tmp_path / "c", "--truncation", "0.5") == 2
    (tmp_path / "b.json").write_text(json.dumps({"layers": layers}))
    assert call(tmp_path / "b.npz", tmp_path / "c", "--config", str(tmp_path / "b.json")) == 2
    assert not (tmp_path / "c").exists()
