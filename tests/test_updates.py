"""Updates from elsewhere: names and layouts of tensor files, and the attack on one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ggl_jax as gx
from ggl_jax import checkpoint, trees
from ggl_jax.cli import run
from ggl_jax.client.gradients import gradient
from ggl_jax.client.updates import read_update, read_variables
from ggl_jax.priors import dcgan


def to_torch(params):
    """Our ResNet-18's parameters under torchvision's names and layout, written out by hand."""
    named = {}
    for path, leaf in zip(trees.names(params), jax.tree.leaves(params), strict=True):
        *parts, last = path.split("/")
        module = ".".join(parts)
        module = module.replace("shortcut_conv", "downsample.0").replace(
            "shortcut_bn", "downsample.1"
        )
        for stage in "1234":
            for block in "01":
                module = module.replace(f"layer{stage}_{block}", f"layer{stage}.{block}")
        array = np.asarray(leaf)
        if last == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        named[f"{module}.{ {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}[last] }"] = array
    return named


def fake_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("shape", [(32, 32, 3), (224, 224, 3)])
def test_a_torch_update_is_mapped_by_name(tmp_path, shape):
    model = gx.resnet18(5, shape)
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    update = fake_like(params)
    named = to_torch(update)
    assert named["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert_equal(read_update(named, params), update)
    np.savez(tmp_path / "update.npz", **named)
    assert_equal(read_update(tmp_path / "update.npz", params), update)
    with_buffers = named | {"bn1.running_mean": np.ones(64), "bn1.num_batches_tracked": 3}
    assert_equal(read_update(with_buffers, params), update)
    cifar = {
        k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in named.items()
    }
    assert_equal(read_update(cifar, params), update)
    named.pop("layer1.0.conv2.weight")
    with pytest.raises(gx.GGLError, match=r"missing: layer1\.0\.conv2\.weight"):
        read_update(named, params)


@pytest.mark.parametrize("form", ["{}", "params/{}", "params.{}"])
def test_a_flax_update_is_mapped_by_path(tmp_path, tiny_variables, form):
    safetensors = pytest.importorskip("safetensors.numpy")
    update = fake_like(tiny_variables["params"])
    leaves = jax.tree.leaves(update)
    named = {
        form.format(name).replace("/", "." if "." in form else "/"): leaf
        for name, leaf in zip(trees.names(update), leaves, strict=True)
    }
    assert_equal(read_update(named, tiny_variables["params"]), update)
    safetensors.save_file(named, tmp_path / "update.safetensors")
    assert_equal(read_update(tmp_path / "update.safetensors", tiny_variables["params"]), update)
    name = next(iter(named))
    with pytest.raises(gx.GGLError, match="unknown: extra"):
        read_update(named | {"extra": np.zeros(1)}, tiny_variables["params"])
    with pytest.raises(gx.GGLError, match="instead of"):
        read_update(named | {name: np.zeros(1)}, tiny_variables["params"])
    with pytest.raises(gx.GGLError, match="NaN"):
        read_update(named | {name: named[name] * np.nan}, tiny_variables["params"])


def test_torch_weights_make_a_model():
    model = gx.resnet18(3, (32, 32, 3))
    variables = fake_like(jax.eval_shape(model.init, jax.random.key(0)))
    named = to_torch(variables["params"])
    for path, leaf in zip(
        trees.names(variables["batch_stats"]),
        jax.tree.leaves(variables["batch_stats"]),
        strict=True,
    ):
        # The buffers of a batch normalisation go where its weights do.
        (weight,) = to_torch({**_nest(path.rsplit("/", 1)[0] + "/scale", leaf)})
        kind = {"mean": "running_mean", "var": "running_var"}[path.rsplit("/", 1)[1]]
        named[weight.removesuffix("weight") + kind] = leaf
    found, read = read_variables(named, "resnet18", (32, 32, 3))
    assert found.num_classes == 3
    assert_equal(read, variables)


def _nest(path, leaf):
    for part in reversed(path.split("/")):
        leaf = {part: leaf}
    return leaf


@pytest.fixture
def server(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    """The tiny server: ``server(update, defense, **settings)``; it searches by Adam."""

    public = gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)

    def attack(update, defense, **settings):
        return gx.reconstruct(
            jax.random.key(0)[None],
            public,
            [gx.Shared(update)],
            view=gx.parse(defense).view,
            search=gx.Search(optimizer="adam", start="prior", **settings),
        )[0]

    return attack


def test_the_server_alone_gets_the_image_back(server, tiny_model, tiny_variables, tiny_images):
    update = gradient(tiny_model, tiny_variables, tiny_images[:1], jnp.asarray([2]))
    clipped, _ = gx.clip(bound=0.5).apply(jax.random.key(0), update, None)
    # The kind is known; the bound is estimated.
    found = server(clipped, "clip:9", steps=150, restarts=4, regularizer="none")
    assert found.labels.tolist() == [2]
    assert float(gx.psnr(jnp.asarray(found.images[0]), tiny_images[0])) > 25
    assert found.history.shape == (150,)


def test_the_server_averages_restarts_where_it_was_asked_to(
    server, tiny_model, tiny_variables, tiny_images
):
    update = gradient(tiny_model, tiny_variables, tiny_images[:1], jnp.asarray([2]))
    found = {
        combine: server(update, "noise:0.1", steps=2, restarts=3, combine=combine).images
        for combine in ("best", "mean", "auto")
    }
    np.testing.assert_array_equal(found["auto"], found["mean"])
    assert np.max(np.abs(found["best"] - found["mean"])) > 0.05


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    prior = dcgan(width=2, latent_dim=4)
    card = {
        "name": "tiny",
        "kind": "dcgan",
        "arguments": {"width": 2, "latent_dim": 4},
        "trained_on": [],
        "data": [],
    }
    checkpoint.save(tmp_path / "prior", prior.init(jax.random.key(0)), card)
    model = gx.lenet(3, (32, 32, 3))
    variables = model.init(jax.random.key(1))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "private.png")
    update = gradient(model, variables, jnp.asarray(image[None] / 255.0), jnp.asarray([2]))
    for name, tree in (("update", update), ("weights", variables["params"])):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        np.savez(tmp_path / f"{name}.npz", **dict(zip(trees.names(tree), leaves, strict=True)))
    options = {
        "gradient": "update.npz",
        "weights": "weights.npz",
        "out": "out",
        "prior": "prior",
    }
    command = ["attack", "--model", "lenet", "--steps", "2", "--num-controls", "4"]
    command += ["--ceiling-steps", "2", "--optimizer", "cma_es"]
    for name, value in options.items():
        command += [f"--{name}", str(tmp_path / value)]
    assert run(command) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["labels"] == [2]
    assert "judged" not in result
    assert "cannot be told without it" in capsys.readouterr().out
    assert (tmp_path / "out" / "reconstruction-0.png").is_file()
    assert run([*command, "--image", str(tmp_path / "private.png"), "--label", "2"]) == 0
    judged = json.loads((tmp_path / "out" / "result.json").read_text())["judged"]
    shown = np.asarray(Image.open(tmp_path / "out" / "reconstruction-0.png")) / 255.0
    error = np.mean((shown - image / 255.0) ** 2)
    assert judged["psnr"] == pytest.approx(-10 * np.log10(error), abs=0.05)
    assert judged["psnr_ceiling"] >= judged["psnr_control_mean"]
    capsys.readouterr()
    assert run([*command, "--weights", str(tmp_path / "none.npz")]) == 2
    assert run([*command, "--image", "no.png", "--out", str(tmp_path / "other")]) == 2
    assert "image: no.png does not exist" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()  # found out before the search
    assert run([*command, "--model", "resnet18"]) == 2
    assert "not those of a resnet18" in capsys.readouterr().err
