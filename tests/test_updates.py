"""Updates from elsewhere: names and layouts of tensor files, and the attack on one."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE, TinyNet, write_tiny_prior
from PIL import Image

import ggl_jax as gx
from ggl_jax import checkpoint, trees
from ggl_jax.adversary.losses import resolve_distance
from ggl_jax.adversary.scale import read_scale
from ggl_jax.cli import run
from ggl_jax.client.gradients import gradient
from ggl_jax.client.updates import (
    normalised,
    read_part,
    read_update,
    read_variables,
    shared_part,
    whole,
)
from ggl_jax.commands.attack import AttackCommand, _scaled


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
    with pytest.raises(gx.GGLError, match="finite"):
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


def test_weights_of_a_checkpoint_folder(tmp_path):
    model = gx.convnet(3, TINY_SHAPE, width=2)
    variables = fake_like(jax.eval_shape(model.init, jax.random.key(0)))
    folder = tmp_path / "round-5"
    checkpoint.save(folder, variables, {"model": "convnet:width=2"})
    found, read = read_variables(folder, "convnet:width=2,batch_norm=train", TINY_SHAPE)
    assert found.num_classes == 3
    assert_equal(read, variables)
    # As an update, it has parameters alone.
    assert_equal(read_update(folder, variables["params"]), variables["params"])
    for wrong in ("convnet:width=4", "resnet18", "convnet:width=2,norm=group"):
        with pytest.raises(gx.GGLError, match=r"weights: .*round-5 is convnet:width=2\)"):
            read_variables(folder, wrong, TINY_SHAPE)


def _nest(path, leaf):
    for part in reversed(path.split("/")):
        leaf = {part: leaf}
    return leaf


@pytest.fixture(scope="module")
def leaked(tiny_model, tiny_variables, tiny_images):
    """The gradient of the first tiny image, of class 2."""
    own = jax.jit(gradient, static_argnums=0)
    return own(tiny_model, tiny_variables, tiny_images[:1], jnp.asarray([2]))


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


def test_the_server_alone_gets_the_image_back(server, leaked, tiny_images):
    clipped, _ = gx.clip(bound=0.5).apply(jax.random.key(0), leaked, None)
    # The kind is known; the bound is estimated.
    found = server(clipped, "clip:9", steps=150, restarts=4, regularizer="none")
    assert found.labels.tolist() == [2]
    assert float(gx.psnr(jnp.asarray(found.images[0]), tiny_images[0])) > 25
    assert found.history.shape == (150,)


def test_the_server_averages_restarts_where_it_was_asked_to(server, leaked):
    found = {
        combine: server(leaked, "noise:0.1", steps=2, restarts=3, combine=combine).images
        for combine in ("best", "mean", "auto")
    }
    np.testing.assert_array_equal(found["auto"], found["mean"])
    assert np.max(np.abs(found["best"] - found["mean"])) > 0.05


@pytest.fixture
def scale_of(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    def read(update, **options):
        client = gx.Client(**options)
        public = gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)
        return read_scale(jax.random.key(3), public, update, client=client, undefended=True)

    return read


@pytest.mark.parametrize("factor", [1.0, 0.5, 128.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_last_layer_tells_scale_and_sign(scale_of, leaked, factor, sign):
    found = scale_of(jax.tree.map(lambda g: sign * factor * g, leaked))
    assert found.factor == pytest.approx(factor, rel=1e-3)
    assert found.source == "the last layer"
    assert found.negated == (sign < 0)
    assert found.is_off == (factor != 1.0)


def test_the_sign_of_two_classes(tiny_prior, tiny_prior_params):
    model = gx.from_flax(TinyNet(2), TINY_SHAPE)
    public = gx.Public(model, model.init(jax.random.key(0)), tiny_prior, tiny_prior_params)
    image = np.full((1, *TINY_SHAPE), 0.3, np.float32)
    update = jax.jit(gradient, static_argnums=0)(model, public.variables, image, np.asarray([1]))
    for sign in (1, -1):
        own = jax.tree.map(lambda g, sign=sign: sign * g, update)
        settings = {"client": gx.Client(), "undefended": True}
        found = read_scale(jax.random.key(0), public, own, **settings)
        assert (found.negated, round(found.factor, 3)) == (sign < 0, 1.0)


def test_samples_tell_the_scale_of_batches_and_of_a_backbone(scale_of, tiny_model, leaked):
    summed = jax.tree.map(lambda g: 100 * g, leaked)
    found = scale_of(summed, batch_size=2)
    assert found.source == "samples of the prior"
    assert 30 < found.factor < 300
    assert found.is_off
    assert not scale_of(leaked, batch_size=2).is_off


@pytest.mark.parametrize(
    ("shared", "defense", "support"),
    [
        ("head", "none", False),
        ("backbone", "clip:0.2", False),
        ("head", "sparsify:0.5", False),
        ("backbone", "sparsify:0.5", True),
        ("head", "soteria:0.5,representation=False", False),
        ("backbone", "soteria:0.5,representation=False", False),
    ],
)
def test_what_was_not_shared_is_left_out(
    tiny_model, tiny_variables, tiny_images, leaked, shared, defense, support
):
    params, head = tiny_variables["params"], tiny_model.head
    part = [n for n in trees.names(params) if n.startswith("Dense") == (shared == "head")]
    made = gx.parse(defense)
    if "soteria" in defense and shared == "backbone":
        with pytest.raises(gx.GGLError, match="defends the last layer"):
            shared_part(made.view, params, part, head)
        return
    own = dict(zip(trees.names(leaked), jax.tree.leaves(leaked), strict=True))
    own = {name: own[name] for name in part}
    context = gx.Context(tiny_model, tiny_variables, tiny_images[:1], jnp.asarray([2]))
    sent, _ = jax.jit(lambda own: made.apply(jax.random.key(0), own, context))(own)
    observed = whole(sent, params)
    view = shared_part(made.view, params, part, head).comparing(support)
    estimated = gx.estimate(view, observed, head)
    images = jnp.stack([tiny_images[:1], tiny_images[1:]])
    found = []
    for method in ("direct", "auto"):
        loss = gx.matching_loss(
            tiny_model,
            tiny_variables,
            observed,
            view=view,
            estimated=estimated,
            speed=gx.Speed(method=method),
        )
        found.append(np.asarray(jax.jit(loss)(images, jnp.asarray([2]))))
        size = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(sent))
        assert found[-1][0] < 1e-4 * size
        assert found[-1][1] > 1e-3 * size
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-3)


def test_noise_is_estimated_on_what_was_shared():
    big = {"a": {"kernel": jnp.zeros((80, 80))}, "Dense_0": {"kernel": jnp.zeros((8, 3))}}
    noisy, _ = gx.noise(sigma=0.2).apply(jax.random.key(0), {"a/kernel": big["a"]["kernel"]}, None)
    view = shared_part(gx.noise(sigma=1.0).view, big, ["a/kernel"], ("Dense_0",))
    found = gx.estimate(view, whole(noisy, big), ("Dense_0",))
    assert float(found["sigma"]) == pytest.approx(0.2, rel=0.05)


def test_the_scaled_distance_is_that_of_the_best_multiple(
    tiny_model, tiny_variables, tiny_images, leaked
):
    rng = np.random.default_rng(0)
    y, g = ({"a": rng.normal(size=9), "b": rng.normal(size=4)} for _ in range(2))
    g = jax.tree.map(lambda g, y: g + y, g, y)
    chosen = resolve_distance("scaled_l2")
    tries = [sum(np.sum((y[n] - s * g[n]) ** 2) for n in y) for s in np.linspace(0, 2, 20001)]
    assert float(chosen.between(g, y)) == pytest.approx(min(tries), rel=1e-5)
    away = jax.tree.map(lambda y: -y, y)
    assert float(chosen.between(away, y)) == pytest.approx(sum(np.sum(v**2) for v in y.values()))
    # Through the fused loss: any multiple of the private image's update is at distance 0.
    scaled = jax.tree.map(lambda g: 7.0 * g, leaked)
    loss = jax.jit(gx.matching_loss(tiny_model, tiny_variables, scaled, distance="scaled_l2"))
    near, far = loss(jnp.stack([tiny_images[:1], tiny_images[1:]]), jnp.asarray([2]))
    assert near < 1e-6 * far


def test_other_normalisations(tiny_model, tiny_variables, tiny_images):
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.4])
    own = normalised(tiny_model, mean, std)
    seen = (tiny_images - mean) / std
    expected, _ = tiny_model.apply(tiny_variables, (seen + 1) / 2)  # which it maps to [-1, 1]
    np.testing.assert_allclose(own.apply(tiny_variables, tiny_images)[0], expected, rtol=1e-5)
    with pytest.raises(gx.GGLError, match=r"mean: got 0\.1 0\.2, allowed: 1 or 3"):
        normalised(tiny_model, [0.1, 0.2], [1.0])


def test_usual_wrappings(tiny_variables):
    params = tiny_variables["params"]
    named = dict(zip(trees.names(params), jax.tree.leaves(params), strict=True))
    dotted = {name.replace("/", "."): np.asarray(leaf) for name, leaf in named.items()}
    for prefix in ("module.", "model.", "_orig_mod.", "_orig_mod.module.", "params."):
        for key in ("state_dict", "model_state_dict", "model"):
            wrapped = {key: {prefix + name: leaf for name, leaf in dotted.items()}, "epoch": 3}
            assert_equal(read_update(wrapped, params), params)


def torch_client():
    """A ConvNet of width 4 as a torch user writes it, in training mode."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for i, (inputs, outputs) in enumerate(((3, 4), (4, 8), (8, 16)), start=1):
                setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
                setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
            self.fc = nn.Linear(16 * 8 * 8, 3)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
            x = torch.max_pool2d(torch.relu(self.bn3(self.conv3(x))), 2)
            return self.fc(x.flatten(1))

    torch.manual_seed(0)
    return torch, Net()


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_torch_training_loop(tmp_path, monkeypatch, capsys, prior_folder, steps):
    """The recipe of docs/scale.md, run as it stands there, and what attack makes of its files."""
    torch, model = torch_client()
    document = (Path(__file__).parent.parent / "docs/scale.md").read_text()
    recipe = next(b for b in re.findall(r"```python\n(.*?)```", document, re.S) if "backward" in b)
    assert len(recipe.splitlines()) <= 10
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "private.png")
    seen = torch.tensor((pixels / 255.0 - MEAN) / STD).float().permute(2, 0, 1)[None]
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.05)}
    exec(recipe, {**names, "loader": [(seen, torch.tensor([2]))] * steps})

    net, variables = read_variables("before.pt", "convnet:width=4,batch_norm=train", (32, 32, 3))
    net = normalised(net, MEAN, STD)
    before, after = (read_part(file, variables["params"]) for file in ("before.pt", "after.pt"))
    update = whole({n: (before[n] - after[n]) / 0.05 for n in before}, variables["params"])
    image = jnp.asarray(pixels[None] / 255.0, jnp.float32)
    client = gx.Client(local_steps=steps, local_learning_rate=0.05)
    loss = jax.jit(gx.matching_loss(net, variables, update, client=client))
    squares = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(update))
    assert float(loss(image[None], jnp.asarray([2]))[0]) < 1e-5 * squares
    if steps > 1:
        return
    command = (
        f"attack --before before.pt --after after.pt --learning-rate 0.05 --prior {prior_folder}"
    )
    command += " --model convnet:width=4,batch_norm=train --steps 2 --restarts 1 --pool 0"
    command += f" --refine none --mean {' '.join(map(str, MEAN))} --std {' '.join(map(str, STD))}"
    # A wrong scale is found.
    options = ["--loss-scale", "auto", "--out", "out"]
    assert run([*command.replace("0.05", "0.1").split(), *options]) == 0
    assert "Loss scale: 0.5, from the last layer." in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["labels"], result["notes"]) == ([2], [])


def test_a_wrong_scale_or_sign_is_said(
    tiny_model, tiny_variables, tiny_prior, tiny_prior_params, leaked
):
    public = gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)
    part = dict(zip(trees.names(leaked), map(np.asarray, jax.tree.leaves(leaked)), strict=True))
    some = {name: tensor for name, tensor in part.items() if name.startswith("Dense")}

    def notes(part, **options):
        command = AttackCommand(Path(), Path(), **options)
        return " ".join(_scaled(command, jax.random.key(0), public, part)[2])

    assert notes(part) == notes(part, defense="clip:4") == ""
    negated = {name: -tensor for name, tensor in part.items()}
    assert "minus a gradient" in notes(negated)
    assert "minus a gradient" in notes(negated, defense="clip:4")  # where sizes tell nothing
    halved = {name: 0.5 * tensor for name, tensor in part.items()}
    assert "multiplied by some 0.5, not 1" in notes(halved)
    assert notes(halved, loss_scale=0.5) == notes(halved, loss_scale="auto") == ""
    assert notes(some).startswith("2 of the model's 6 tensors were shared")


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory):
    return write_tiny_prior(tmp_path_factory.mktemp("weights") / "prior")


def test_the_command(tmp_path, monkeypatch, capsys, prior_folder):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
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
        "prior": prior_folder,
    }
    stored = dict(np.load(tmp_path / "update.npz"))
    frozen = {name: x for name, x in stored.items() if not name.startswith("fc")}
    np.savez(tmp_path / "frozen.npz", **frozen)
    command = ["attack", "--model", "lenet", "--steps", "2", "--num-controls", "4"]
    command += ["--ceiling-steps", "2", "--optimizer", "cma_es"]
    for name, value in options.items():
        command += [f"--{name}", str(tmp_path / value)]
    # A frozen last layer: the labels are unknown, and searched.
    other = ["--gradient", str(tmp_path / "frozen.npz")]
    assert run([*command, *other]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not result["labels_known"]
    assert "judged" not in result
    said = capsys.readouterr().out
    assert "cannot be told without it" in said
    assert "6 of the model's 8 tensors were shared" in said
    assert "the labels are unknown" in said
    assert (tmp_path / "out" / "reconstruction-0.png").is_file()
    judged_too = [*command, "--image", str(tmp_path / "private.png"), "--label", "2"]
    assert run([*judged_too, *other]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert run([*judged_too, "--out", str(tmp_path / "judged")]) == 0
    result = json.loads((tmp_path / "judged" / "result.json").read_text())
    assert result["labels"] == [2]
    judged = result["judged"]
    shown = np.asarray(Image.open(tmp_path / "judged" / "reconstruction-0.png")) / 255.0
    error = np.mean((shown - image / 255.0) ** 2)
    assert judged["psnr"] == pytest.approx(-10 * np.log10(error), abs=0.05)
    assert judged["psnr_ceiling"] >= judged["psnr_control_mean"]
    capsys.readouterr()
    assert run([*command, "--weights", str(tmp_path / "none.npz")]) == 2
    assert run([*command, "--image", "no.png", "--out", str(tmp_path / "other")]) == 2
    assert "image: no.png does not exist" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()  # found out before the search
    assert run([*command, "--model", "resnet18"]) == 2
    assert "not those of model resnet18" in capsys.readouterr().err
    without = ["--gradient", str(tmp_path / "nothing.npz"), "--out", str(tmp_path / "other")]
    for tensors, words in (({}, "no entries"), ({"fc/kernel": np.zeros((768, 3))}, "is zero")):
        np.savez(tmp_path / "nothing.npz", **tensors)
        assert run([*command, *without]) == 2
        assert words in capsys.readouterr().err
    after = [*command[: command.index("--gradient")], "--out", str(tmp_path / "other")]
    after += ["--weights", str(tmp_path / "weights.npz")]
    assert run(after) == 2
    assert "--after with --learning-rate" in capsys.readouterr().err
    assert run([*after, "--after", str(tmp_path / "weights.npz")]) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
