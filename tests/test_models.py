"""Models: parity with torch, the way in for users' modules, and what they refuse."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from torch_resnet import evaluate, hashed_uniform, is_parameter, shapes, state_dict

from ggl_jax.client import models, networks
from ggl_jax.client.gradients import cross_entropy, gradient
from ggl_jax.client.updates import read_update, read_variables
from ggl_jax.errors import GGLError

GOLDEN = Path(__file__).parent / "golden"
CASES = {  # golden file -> resnet18(...) that must reproduce it
    "cifar_b1": {"num_classes": 2},
    "cifar_b3": {"num_classes": 2},
    "cifar_b2_train": {"num_classes": 2, "batch_norm": "train"},
    "imagenet_b1": {"num_classes": 1000, "image_shape": (224, 224, 3)},
}
TOLERANCE = 1e-4


def some_images(shape) -> np.ndarray:
    """Noise in [0, 1), without the seconds that XLA takes to compile a random draw."""
    u = hashed_uniform("images", int(np.prod(shape)))
    return ((u + 1) / 2).reshape(shape).astype(np.float32)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@functools.cache
def torch_variables(stem: str, num_classes: int):
    return read_variables(state_dict(stem, num_classes), "resnet18", (32, 32, 3))[1]


def in_torch_layout(grads, stem: str, num_classes: int) -> dict[str, np.ndarray]:
    """Our gradients under torch's names and axes, by a mapping written for this test."""
    classifier = "linear" if stem == "cifar" else "fc"
    shortcut = "shortcut" if stem == "cifar" else "downsample"
    out = {}
    for name in filter(is_parameter, shapes(stem, num_classes)):
        parts = name.replace(f"{shortcut}.0", "shortcut_conv").replace(
            f"{shortcut}.1", "shortcut_bn"
        )
        *path, entry = parts.replace(classifier, "fc").split(".")
        if path[0].startswith("layer"):
            path = [f"{path[0]}_{path[1]}", *path[2:]]
        node = grads
        for part in path:
            node = node[part]
        if entry == "bias":
            g = node["bias"]
        else:
            g = node.get("kernel", node.get("scale"))
        g = np.asarray(g, np.float64)
        out[name] = np.transpose(g, (3, 2, 0, 1)) if g.ndim == 4 else g.T
    return out


def ours(model, variables, images, labels):
    """Logits, features and gradients in one compiled program, in full float32 everywhere."""

    @jax.jit
    def run(variables, images):
        def loss(params):
            logits, features = model.apply({**variables, "params": params}, images)
            return cross_entropy(logits, labels), (logits, features)

        return jax.grad(loss, has_aux=True)(variables["params"])

    with jax.default_matmul_precision("highest"):  # else TF32 on recent GPUs
        grads, (logits, features) = run(variables, images)
    return logits, features, grads


@pytest.mark.parametrize("case", CASES)
def test_resnet18_matches_the_golden_arrays_of_torch(case):
    golden = np.load(GOLDEN / f"resnet18_{case}.npz")
    options = CASES[case]
    stem = case.split("_")[0]
    num_classes = options["num_classes"]
    images = golden["images"].astype(np.float32) / 255
    logits, features, grads = ours(
        models.resnet18(**options), torch_variables(stem, num_classes), images, golden["labels"]
    )

    assert relative_error(logits, golden["logits"]) < TOLERANCE
    assert relative_error(features, golden["features"]) < TOLERANCE
    names = {key.removeprefix("norm/") for key in golden.files if key.startswith("norm/")}
    grads = in_torch_layout(grads, stem, num_classes)
    assert set(grads) == names
    assert len(names) == 62
    for name, g in grads.items():
        flat = g.reshape(-1)
        norm, entries = golden[f"norm/{name}"], golden[f"entries/{name}"]
        step = 1 if entries.size == flat.size else (flat.size // 600) | 1
        assert norm > 1e-6, f"{name}: a zero gradient checks nothing"
        assert relative_error(flat[::step], entries) < TOLERANCE, name
        assert abs(np.linalg.norm(flat) - norm) < TOLERANCE * norm, name
        # The sum can cancel; by Cauchy-Schwarz its error is at most sqrt(size) times the l2 error.
        assert abs(flat.sum() - golden[f"sum/{name}"]) < TOLERANCE * norm * flat.size**0.5, name


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 64)])
def test_resnet18_matches_live_torch(stem, side):
    """In float64: images not chosen for it may have a ReLU that float32 switches the other way."""
    pytest.importorskip("torch")
    images = some_images((2, side, side, 3))
    labels = np.array([3, 0])
    expected = evaluate(images, labels, stem, 5, train=False, dtype="float64")
    with jax.enable_x64(True):
        model = models.resnet18(5, (side, side, 3), stem=stem)
        variables = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), torch_variables(stem, 5))
        logits, features, grads = ours(model, variables, images.astype(np.float64), labels)
    assert logits.dtype == np.float64
    assert relative_error(logits, expected[0]) < 1e-10
    assert relative_error(features, expected[1]) < 1e-10
    for name, g in in_torch_layout(grads, stem, 5).items():
        assert relative_error(g, expected[2][name]) < 1e-10, name


def test_the_golden_file_is_what_the_rule_gives():
    """The weights' rule is exact: these bits were written when the golden files were made."""
    u = hashed_uniform("conv1.weight", 4)
    np.testing.assert_array_equal(u * 2**23, HASHED_CONV1)


HASHED_CONV1 = [-4645798, -6875364, 3153444, -5170491]


def parameters_of(*args, **options) -> list:
    init = models.resnet18(*args, **options).init
    return jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))["params"])


def test_resnet18_size():
    leaves = parameters_of()
    assert len(leaves) == 62
    assert sum(leaf.size for leaf in leaves) == 11_169_858
    # torchvision.models.resnet18() has 11,689,512 parameters.
    assert sum(leaf.size for leaf in parameters_of(1000, (224, 224, 3))) == 11_689_512


def test_stem_follows_the_image_size_and_can_be_chosen():
    def kernel(**options):
        init = models.resnet18(**options).init
        return jax.eval_shape(init, jax.random.key(0))["params"]["conv1"]["kernel"].shape

    assert kernel(image_shape=(64, 64, 3)) == (3, 3, 3, 64)
    assert kernel(image_shape=(96, 96, 3)) == (7, 7, 3, 64)
    assert kernel(image_shape=(32, 32, 1), stem="imagenet") == (7, 7, 1, 64)


def initial(pick, **options):
    """What ``pick`` takes from fresh variables; the rest is not computed."""
    model = models.resnet18(**options)
    return jax.jit(lambda key: pick(model.init(key)))(jax.random.key(0))


def test_torchs_initialisation():
    """Uniform within 1/sqrt(fan_in), Dense bias as well; BatchNorm is the identity in eval mode."""
    kernels, fc_bias, scale, bias, stats = initial(
        lambda v: (
            [
                v["params"]["layer3_0"]["conv1"]["kernel"],
                v["params"]["layer2_0"]["shortcut_conv"]["kernel"],
                v["params"]["fc"]["kernel"],
            ],
            v["params"]["fc"]["bias"],
            v["params"]["layer4_1"]["bn2"]["scale"],
            v["params"]["layer4_1"]["bn2"]["bias"],
            v["batch_stats"],
        ),
        weight_init="torch",
    )
    for kernel, fan_in in zip(kernels, (9 * 128, 64, 512), strict=True):
        bound = fan_in**-0.5
        assert np.abs(kernel).max() <= bound
        assert np.abs(kernel).max() > 0.98 * bound
        assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert 0 < np.abs(fc_bias).max() <= 512**-0.5
    assert (scale == 1).all()
    assert (bias == 0).all()
    assert len(jax.tree.leaves(stats)) == 40
    for layer in (stats["bn1"], stats["layer4_1"]["bn2"]):
        assert (layer["mean"] == 0).all()
        assert (layer["var"] == 1).all()


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_torchvisions_initialisation_is_the_default(stem):
    kernel, fc = initial(
        lambda v: (v["params"]["layer3_0"]["conv1"]["kernel"], v["params"]["fc"]["kernel"]),
        stem=stem,
    )
    assert np.std(kernel) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert np.abs(kernel).max() > 4 * np.std(kernel)  # a normal, not a uniform distribution
    assert np.abs(fc).max() <= 512**-0.5


# --- LeNet, ConvNet ------------------------------------------------------------------------------


def test_lenet_is_that_of_dlg():
    model = models.lenet(10)
    variables = model.init(jax.random.key(0))
    params = variables["params"]
    assert params["conv1"]["kernel"].shape == (5, 5, 3, 12)
    assert params["fc"]["kernel"].shape == (768, 10)
    for leaf in jax.tree.leaves(params):
        assert np.abs(leaf).max() <= 0.5
    assert np.std(params["fc"]["kernel"]) == pytest.approx(1 / 12**0.5, rel=0.05)
    _, features = jax.jit(model.apply)(variables, jnp.zeros((2, 32, 32, 3)))
    assert features.shape == (2, 768)
    assert ((features > 0) & (features < 1)).all()  # sigmoids


def test_lenet_matches_live_torch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    model = models.lenet(4, (16, 16, 3))
    variables = model.init(jax.random.key(1))
    images = some_images((2, 16, 16, 3))
    x = torch.tensor(2 * images - 1).permute(0, 3, 1, 2)
    for i, stride in ((1, 2), (2, 2), (3, 1)):
        layer = variables["params"][f"conv{i}"]
        weight = torch.tensor(np.asarray(layer["kernel"]).transpose(3, 2, 0, 1))
        bias = torch.tensor(np.asarray(layer["bias"]))
        x = torch.sigmoid(F.conv2d(x, weight, bias, stride=stride, padding=2))
    _, features = jax.jit(model.apply)(variables, images)
    expected = x.permute(0, 2, 3, 1).reshape(2, -1)
    assert relative_error(features, expected.numpy()) < TOLERANCE


def torch_twin(name):
    """The same network in torch, written for this test, with our names; flattened as torch does."""
    torch = pytest.importorskip("torch")
    F, Linear, Norm = torch.nn.functional, torch.nn.Linear, torch.nn.LayerNorm
    torch.manual_seed(0)

    class ConvNet(torch.nn.Module):
        def __init__(self, groups):
            super().__init__()
            for i, (a, b) in enumerate(((3, 6), (6, 12), (12, 24)), start=1):
                setattr(self, f"conv{i}", torch.nn.Conv2d(a, b, 3, padding=1, bias=False))
                setattr(self, f"bn{i}", torch.nn.GroupNorm(groups[i - 1], b))
            self.fc = Linear(96, 3)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
            return self.fc(F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2).flatten(1))

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc = Linear(192, 9), Linear(9, 9), Linear(9, 3)

        def forward(self, x):
            return self.fc(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Norm(12, eps=1e-6), Norm(12, eps=1e-6)
            self.qkv, self.proj = Linear(12, 36), Linear(12, 12)
            self.mlp1, self.mlp2 = Linear(12, 48), Linear(48, 12)

        def forward(self, x):
            # torch's own attention, whose layers hold the same weights.
            own = torch.nn.functional.multi_head_attention_forward
            y = self.norm1(x).transpose(0, 1)
            rest = (None, None, False, 0.0, self.proj.weight, self.proj.bias)
            y, _ = own(y, y, y, 12, 3, self.qkv.weight, self.qkv.bias, *rest, need_weights=False)
            x = x + y.transpose(0, 1)
            return x + self.mlp2(F.gelu(self.mlp1(self.norm2(x))))

    class ViT(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = torch.nn.Conv2d(3, 12, 4, stride=4), Norm(12, eps=1e-6)
            self.positions = torch.nn.Parameter(torch.randn(4, 12))
            self.block1, self.block2, self.fc = Block(), Block(), Linear(12, 3)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
            return self.fc(self.norm(self.block2(self.block1(x))).mean(1))

    made = {
        "convnet:6,norm=group": lambda: ConvNet((2, 4, 8)),
        "convnet:6,norm=layer": lambda: ConvNet((1, 1, 1)),
        "mlp:9": MLP,
        "vit:width=12,depth=2": ViT,
    }[name]()
    with torch.no_grad():  # or the first scales are 1, and say nothing
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return torch, made


@pytest.mark.parametrize(
    "name", ["convnet:6,norm=group", "convnet:6,norm=layer", "mlp:9", "vit:width=12,depth=2"]
)
def test_networks_and_their_weights_agree_with_torch(name):
    """Logits, features and the whole gradient, of weights read from torch's state dict."""
    torch, twin = torch_twin(name)
    model, variables = read_variables(twin.state_dict(), name, (8, 8, 3))
    images, labels = some_images((2, 8, 8, 3)), np.array([2, 0])
    logits, features, grads = ours(model, variables, images, labels)
    seen = torch.tensor(2 * images - 1).permute(0, 3, 1, 2)
    expected = twin(seen)
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels)).backward()
    assert relative_error(logits, expected.detach().numpy()) < 1e-5
    head = variables["params"]["fc"]
    assert relative_error(features @ head["kernel"] + head["bias"], logits) < 1e-5
    found = read_update({k: p.grad for k, p in twin.named_parameters()}, variables["params"])
    for ours_, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=1e-5 * np.abs(theirs).max())
    assert model.statistics is None


def test_group_norm_takes_as_many_groups_as_divide_the_channels():
    """Eight, or four of twelve channels: those of a group are scaled alike, others are not."""
    for channels, groups in ((16, 8), (12, 4), (5, 1)):
        group, layer = (networks._norm(kind, channels, "norm") for kind in ("group", "layer"))
        assert (group.num_groups, layer.num_groups) == (groups, 1)


def test_every_registered_model_keeps_the_contract_of_its_shapes():
    for name, factory in models.MODELS.items():
        model = models.get_model(name, 3, (16, 16, 1))
        assert (model.name, model.image_shape, model.num_classes) == (name, (16, 16, 1), 3)
        assert factory is getattr(models, name)
        variables = jax.eval_shape(model.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((5, 16, 16, 1), jnp.float32)
        logits, features = jax.eval_shape(model.apply, variables, images)
        kernel = variables["params"][model.head[0]]["kernel"]
        assert logits.shape == (5, 3)
        assert (*features.shape, 3) == (5, *kernel.shape)


@pytest.mark.parametrize("factory", [models.lenet, models.convnet])
def test_features_jit_vmap_and_grad(factory):
    """Features are the head's input; vmap changes nothing; images may be differentiated."""
    model = factory(3, (8, 8, 3))
    variables = model.init(jax.random.key(0))
    images = some_images((2, 8, 8, 3))
    apply = jax.jit(model.apply)
    logits, features = apply(variables, images)
    head = variables["params"][model.head[0]]
    assert features.dtype == logits.dtype == jnp.float32
    assert relative_error(features @ head["kernel"] + head["bias"], logits) < 1e-5

    one_by_one = jax.jit(jax.vmap(model.apply, (None, 0)))(variables, images[:, None])
    assert relative_error(one_by_one[0][:, 0], logits) < 1e-5
    grad = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0][0, 0]))(images)
    assert np.abs(grad[0]).max() > 0
    assert (grad[1] == 0).all()  # eval-mode BatchNorm: images do not mix


def test_train_mode_uses_the_statistics_of_the_batch():
    """ResNet-18's train mode is checked by its golden arrays."""
    model = models.convnet(3, (8, 8, 3), batch_norm="train")
    variables = model.init(jax.random.key(0))
    images = some_images((2, 8, 8, 3))
    apply = jax.jit(model.apply)
    moved = jax.tree.map(lambda s: s + 1, variables["batch_stats"])
    with_moved = apply({**variables, "batch_stats": moved}, images)[0]
    np.testing.assert_array_equal(apply(variables, images)[0], with_moved)
    mixed = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0][0, 0]))(images)
    assert np.abs(mixed[1]).max() > 0


@pytest.mark.slow
def test_max_pooling_can_be_differentiated_twice():
    """Gradient matching differentiates a gradient; the large stem's max-pooling must allow it."""
    model = models.resnet18(2, (16, 16, 3), stem="imagenet")
    variables = torch_variables("imagenet", 2)
    image = some_images((1, 16, 16, 3))

    @jax.jit
    @jax.grad
    def meta(x):
        return jnp.sum(gradient(model, variables, x, jnp.array([1]))["conv1"]["kernel"] ** 2)

    g = meta(image)
    assert np.isfinite(g).all()
    assert np.abs(g).max() > 0


# --- from_flax -----------------------------------------------------------------------------------


class Nested(nn.Module):
    """Two Dense layers inside a submodule, the last one called first in definition order."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        last = nn.Dense(3, name="a_last")
        x = nn.relu(nn.Dense(7, name="z_first")(x))
        return last(x)


class UserNet(nn.Module):
    """Returns logits only and wants to be told whether it trains."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = Nested(name="classifier")(x)
        return jnp.asarray(x, jnp.float32)


class Wrapped(nn.Module):
    """Some arithmetic around a Dense layer; ``wrap`` says which."""

    wrap: str

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        if self.wrap == "extra output":
            return nn.Dense(3)(x), x
        if self.wrap == "half precision":
            return nn.Dense(3, dtype=jnp.bfloat16)(x).astype(jnp.float32)
        if self.wrap == "remat":
            return nn.remat(nn.Dense)(3, name="last")(x)
        if self.wrap == "temperature":
            return nn.Dense(3)(nn.Dense(5)(x)) / 2.0
        if self.wrap == "no dense":
            return x[:, :3] + self.param("shift", nn.initializers.ones, (3,))
        if self.wrap == "a map of logits":
            return nn.Dense(3)(x[:, None])
        raise AssertionError(self.wrap)


SHAPE = (4, 4, 2)


def test_from_flax_on_a_module_that_returns_only_logits():
    module = UserNet()
    model = models.from_flax(module, SHAPE, apply_kwargs={"train": False})
    assert model.head == ("classifier", "a_last")
    assert (model.num_classes, model.image_shape, model.name) == (3, SHAPE, "usernet")
    variables = model.init(jax.random.key(0))
    images = some_images((2, *SHAPE))
    logits, features = jax.jit(model.apply)(variables, images)
    # The user's module sees [-1, 1].
    expected = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, 2 * images - 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    head = variables["params"]["classifier"]["a_last"]
    assert features.shape == (2, 7)
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-5)


def test_from_flax_in_train_mode_with_dropout():
    kwargs = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(5)}}
    model = models.from_flax(UserNet(), SHAPE, 3, apply_kwargs=kwargs)
    variables = model.init(jax.random.key(0))
    images = some_images((2, *SHAPE))
    logits, _ = jax.jit(model.apply)(variables, images)
    run = jax.jit(lambda variables, x: UserNet().apply(variables, x, **kwargs))
    expected, _ = run(variables, 2 * images - 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_from_flax_preprocess():
    model = models.from_flax(UserNet(), SHAPE, apply_kwargs={"train": False}, preprocess=jnp.exp)
    variables = model.init(jax.random.key(0))
    images = some_images((2, *SHAPE))
    run = jax.jit(lambda variables, x: UserNet().apply(variables, x, train=False))
    expected = run(variables, jnp.exp(images))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images)[0], expected, atol=1e-6)


@pytest.mark.parametrize("wrap", ["extra output", "half precision"])
def test_from_flax_finds_the_head_through(wrap):
    model = models.from_flax(Wrapped(wrap), SHAPE)
    assert model.head == ("Dense_0",)
    logits, features = jax.eval_shape(
        lambda key: model.apply(model.init(key), jnp.ones((2, *SHAPE))), jax.random.key(0)
    )
    assert (logits.shape, features.shape) == ((2, 3), (2, 32))


@pytest.mark.parametrize(
    ("wrap", "head", "width"), [("temperature", ["Dense_0"], 5), ("remat", ["last"], 32)]
)
def test_from_flax_takes_a_named_head(wrap, head, width):
    with pytest.raises(GGLError, match=rf"{head[0]}.*head="):
        models.from_flax(Wrapped(wrap), SHAPE)
    model = models.from_flax(Wrapped(wrap), SHAPE, head=head)
    assert model.head == tuple(head)
    variables = model.init(jax.random.key(0))
    images = jnp.ones((2, *SHAPE))
    assert model.apply(variables, images)[1].shape == (2, width)
    update = jax.jit(lambda x: gradient(model, variables, x, jnp.array([0, 2])))(images)
    assert jax.tree.structure(update) == jax.tree.structure(variables["params"])


def test_from_flax_under_an_outer_interceptor():
    """Fused gradient matching wraps apply in an interceptor of its own that taps every layer."""
    model = models.convnet(3, (8, 8, 3), width=2)
    variables = model.init(jax.random.key(0))
    images = some_images((1, 8, 8, 3))

    def loss(taps):
        inputs = {}

        def interceptor(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            if isinstance(context.module, nn.Conv | nn.Dense | nn.BatchNorm):
                inputs[context.module.name] = args[0]
                out = out + taps.get(context.module.name, 0.0)
            return out

        with nn.intercept_methods(interceptor):
            logits, features = model.apply(variables, images)
        return cross_entropy(logits, jnp.array([2])), (inputs, features)

    @jax.jit
    def cotangents():
        return jax.grad(loss, has_aux=True)({"fc": jnp.zeros((1, 3)), "conv1": jnp.zeros(())})

    d, (inputs, features) = cotangents()
    assert set(inputs) == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc"}
    np.testing.assert_array_equal(inputs["fc"], features)
    g = jax.jit(lambda: gradient(model, variables, images, jnp.array([2])))()
    np.testing.assert_allclose(inputs["fc"].T @ d["fc"], g["fc"]["kernel"], atol=1e-6)


def test_init_computes_no_forward_pass():
    """At 224x224 the forward pass costs gigaflops; only the parameters may be computed."""
    model = models.convnet(2, (64, 64, 3))
    compiled = jax.jit(model.init).lower(jax.random.key(0)).compile()
    assert "convolution" not in compiled.as_text()


class HoldsAnArray(nn.Module):
    offset: jax.Array

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.reshape(x.shape[0], -1) + self.offset)


def test_a_module_that_cannot_be_hashed():
    model = models.from_flax(HoldsAnArray(jnp.ones(())), SHAPE)
    variables = model.init(jax.random.key(0))
    _, features = model.apply(variables, jnp.full((1, *SHAPE), 0.5))
    np.testing.assert_array_equal(features, np.ones((1, 32)))


def test_equal_modules_share_the_compiled_init():
    before = models._compiled_init._cache_size()
    for _ in range(2):
        models.lenet(3, (9, 9, 1)).init(jax.random.key(0))
    assert models._compiled_init._cache_size() == before + 1


def test_init_is_a_function_of_the_key():
    model = models.lenet(3, (8, 8, 3))
    a, b, c = (model.init(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(a["params"]["fc"]["kernel"], b["params"]["fc"]["kernel"])
    assert not np.array_equal(a["params"]["fc"]["kernel"], c["params"]["fc"]["kernel"])


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.get_model("vgg"), "model: got 'vgg'.*resnet18, lenet, convnet"),
        (lambda: models.resnet18(1), "num_classes: got 1.*at least 2"),
        (lambda: models.resnet18(2, (32, 32)), r"image_shape=\(32, 32\)"),
        (lambda: models.resnet18(2, (32, 0, 3)), r"image_shape=\(32, 0, 3\)"),
        (lambda: models.resnet18(stem="tiny"), "stem: got 'tiny'.*cifar, imagenet"),
        (lambda: models.resnet18(batch_norm="test"), "batch_norm: got 'test'.*eval, train"),
        (lambda: models.resnet18(weight_init="he"), "weight_init: got 'he'.*torch, torchvision"),
        (lambda: models.convnet(2, (2, 8, 3)), "at least 4 pixels"),
        (lambda: models.convnet(width=0), "width: got 0"),
        (lambda: models.convnet(norm="instance"), "norm: got 'instance'.*batch, group, layer"),
        (lambda: models.resnet18(norm="group", batch_norm="train"), "batch_norm='train'.*leave"),
        (lambda: models.mlp(depth=0), "depth: got 0.*at least 1"),
        (lambda: models.vit(2, (30, 32, 3)), "patch=4.*30 32.*divisor"),
        (lambda: models.vit(width=16), "heads=3.*width=16.*divisor"),
        (lambda: models.from_flax(Nested, SHAPE), "not a flax.linen.Module instance"),
        (lambda: models.from_flax(Nested(), SHAPE, 4), "num_classes=4.*3 logits"),
        (lambda: models.from_flax(Nested(), SHAPE, head=("b",)), r"\['a_last', 'z_first'\]"),
        (lambda: models.from_flax(Nested(), SHAPE, head=("z_first",)), r"shape \(32, 7\)"),
        (lambda: models.from_flax(Wrapped("no dense"), SHAPE), "seen: none.*head="),
        (lambda: models.from_flax(Wrapped("a map of logits"), SHAPE), r"array \(2, 1, 3\)"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(GGLError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_wrong_images():
    model = models.convnet(2, (8, 8, 3), width=1)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    for shape in [(1, 32, 32, 3), (8, 8, 3), (1, 3, 8, 8)]:
        with pytest.raises(GGLError, match=r"\[b 8 8 3\]"):
            jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises(GGLError, match=r"uint8.*/ 255"):
        jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8))


def test_a_resnet18_of_torch_names_what_is_wrong():
    def read(state):
        return read_variables(state, "resnet18", (32, 32, 3))[1]

    state = state_dict("cifar", 2)
    missing = {k: v for k, v in state.items() if k != "layer2.0.shortcut.0.weight"}
    with pytest.raises(GGLError, match=r"missing: layer2\.0\.downsample\.0\.weight$"):
        read(missing)
    with pytest.raises(GGLError, match=r"unknown: layer5\.weight$"):
        read({**state, "layer5.weight": state["linear.bias"]})
    with pytest.raises(GGLError, match=r"fc\.bias is there twice"):
        read({**state, "fc.bias": state["linear.bias"]})
    for name, bad, words in [
        ("conv1.weight", np.zeros((64, 3, 5, 5)), "conv1.weight"),
        ("bn1.running_var", np.zeros(32), r"bn1.running_var.*\[64\]"),
    ]:
        with pytest.raises(GGLError, match=words):
            read({**state, name: bad})
    counted = {**state, "bn1.num_batches_tracked": np.array(3)}
    assert set(read(counted)) == {"params", "batch_stats"}
