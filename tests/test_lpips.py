"""LPIPS against the published networks' golden values, and against torch on random weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ggl_jax as gx
from ggl_jax.audit import lpips as L
from ggl_jax.audit import metrics, tables, weights
from ggl_jax.audit.run import audit
from ggl_jax.client.models import get_model
from ggl_jax.errors import GGLError
from ggl_jax.priors import dcgan

SHARED = Path(__file__).parents[2] / "shared" / "assets" / "lpips"


def random_tensors(backbone, seed=0):
    """Weights in torch's layout that keep the features' scale from layer to layer."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (shape, *_) in L.torch_layout(backbone).items():
        if name.startswith("lin"):
            tensors[name] = rng.random(shape, np.float32) * 4
        elif name.endswith("bias"):
            tensors[name] = 0.1 * rng.standard_normal(shape, np.float32)
        else:
            gain = np.float32(np.sqrt(2 / np.prod(shape[1:])))
            tensors[name] = gain * rng.standard_normal(shape, np.float32)
    return tensors


@pytest.fixture(scope="module")
def random_weights():
    return {name: random_tensors(name) for name in L.BACKBONES}


def images(seed, *shape):
    return np.random.default_rng(seed).random(shape, np.float32)


# --- torch, written from the networks' definitions ----------------------------------------------


def torch_lpips(tensors, backbone, a, b):
    """LPIPS of two NHWC batches in [0, 1], by torch; per layer."""
    torch = pytest.importorskip("torch")
    nn = torch.nn.functional
    weights = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}

    def conv(name, x, **options):
        weight, bias = weights[f"features.{name}.weight"], weights[f"features.{name}.bias"]
        return nn.relu(nn.conv2d(x, weight, bias, **options))

    def fire(name, x):
        x = conv(f"{name}.squeeze", x)
        wide = conv(f"{name}.expand3x3", x, padding=1)
        return torch.cat([conv(f"{name}.expand1x1", x), wide], 1)

    def vgg(x):
        for first, *rest in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            if first:
                x = nn.max_pool2d(x, 2, 2)
            for number in (first, *rest):
                x = conv(str(number), x, padding=1)
            yield x

    def alex(x):
        yield (x := conv("0", x, stride=4, padding=2))
        yield (x := conv("3", nn.max_pool2d(x, 3, 2), padding=2))
        yield (x := conv("6", nn.max_pool2d(x, 3, 2), padding=1))
        yield (x := conv("8", x, padding=1))
        yield conv("10", x, padding=1)

    def squeeze(x):
        yield (x := conv("0", x, stride=2))
        yield (x := fire("4", fire("3", nn.max_pool2d(x, 3, 2, ceil_mode=True))))
        yield (x := fire("7", fire("6", nn.max_pool2d(x, 3, 2, ceil_mode=True))))
        yield (x := fire("9", nn.max_pool2d(x, 3, 2, ceil_mode=True)))
        for number in ("10", "11", "12"):
            yield (x := fire(number, x))

    def unit(x):
        return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)

    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    network = {"vgg": vgg, "alex": alex, "squeeze": squeeze}[backbone]
    a, b = ((torch.from_numpy(x).movedim(-1, 1) * 2 - 1 - shift) / scale for x in (a, b))
    distances = []
    with torch.no_grad():
        for index, (x, y) in enumerate(zip(network(a), network(b), strict=True)):
            weighted = nn.conv2d((unit(x) - unit(y)) ** 2, weights[f"lin{index}.model.1.weight"])
            distances.append(weighted.mean((1, 2, 3)))
    return torch.stack(distances, -1).numpy()


@pytest.mark.parametrize("backbone", L.BACKBONES)
@pytest.mark.parametrize("size", [(32, 32), (39, 50)])
def test_torch_agrees(backbone, size, random_weights):
    tensors = random_weights[backbone]
    ramp = np.linspace(0, 1, size[1], dtype=np.float32)[:, None]
    a, b = images(1, 2, *size, 3), 0.3 * images(2, 2, *size, 3) * ramp
    expected = torch_lpips(tensors, backbone, a, b)
    assert expected.min() > 0.005  # so that 1e-4 says something
    ours = L.layer_distances(L.from_torch(tensors, backbone), a, b, backbone=backbone)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    # kernels read as [w h in out] would be seen: the check above has power in every layer
    turned = {k: v.swapaxes(2, 3) if v.ndim == 4 else v for k, v in tensors.items()}
    wrong = L.layer_distances(L.from_torch(turned, backbone), a, b, backbone=backbone)
    assert np.abs(wrong - expected).max(axis=0).min() > 1e-3


@pytest.mark.parametrize(("backbone", "smallest"), [("vgg", 16), ("alex", 31), ("squeeze", 17)])
def test_small_images_work_where_torchs_do(backbone, smallest, random_weights):
    tensors = random_weights[backbone]
    params = L.from_torch(tensors, backbone)
    assert L.get_backbone(backbone).smallest == smallest
    a, b = images(1, 1, smallest, smallest + 3, 3), images(2, 1, smallest, smallest + 3, 3)
    expected = torch_lpips(tensors, backbone, a, b)
    np.testing.assert_allclose(
        L.layer_distances(params, a, b, backbone=backbone), expected, atol=1e-4
    )
    with pytest.raises(GGLError, match=f"at least {smallest} x {smallest} for backbone"):
        L.lpips(params, a[:, 1:], b[:, 1:], backbone=backbone)
    with pytest.raises(RuntimeError, match=r"too small|can't be greater"):
        torch_lpips(tensors, backbone, a[:, 1:], b[:, 1:])


# --- the published weights ----------------------------------------------------------------------


FILES = {"alex": "alexnet", "squeeze": "squeezenet1_1"}


@pytest.mark.parametrize("backbone", FILES)
@pytest.mark.parametrize("other", ["ex_p0", "ex_p1"])
def test_golden_values_of_the_published_weights(backbone, other):
    if not SHARED.is_dir():
        pytest.skip("the published weights are not here")
    tensors = dict(np.load(SHARED / f"{FILES[backbone]}_features_torch_layout.npz"))
    for name, weight in np.load(SHARED / "lpips_lin_v0.1.npz").items():
        if name.startswith(backbone):
            tensors[f"{name.split('.')[1]}.model.1.weight"] = weight
    golden = json.loads((SHARED / "lpips_golden.json").read_text())["computed"]
    golden = golden[f"ex_ref|{other}"][backbone]
    a, b = (
        np.asarray(Image.open(SHARED / f"{n}.png"), np.float32) / 255 for n in ("ex_ref", other)
    )
    params = L.from_torch(tensors, backbone)
    layers = L.layer_distances(params, a, b, backbone=backbone)
    np.testing.assert_allclose(layers, golden["per_layer"], atol=1e-5)
    np.testing.assert_allclose(L.lpips(params, a, b, backbone=backbone), golden["total"], atol=1e-5)


# --- the function's contract --------------------------------------------------------------------


@pytest.fixture(scope="module")
def squeeze(random_weights):
    return L.from_torch(random_weights["squeeze"], "squeeze")


def test_batches_identity_and_nan(squeeze):
    def distance(a, b):
        return L.lpips(squeeze, a, b, backbone="squeeze")

    a, b = images(1, 2, 3, 17, 17, 3), images(2, 17, 17, 3)
    both = distance(a, b)  # one image meets many
    assert both.shape == (2, 3)
    np.testing.assert_allclose(both[1, 2], distance(a[1, 2], b), rtol=1e-5)
    np.testing.assert_allclose(both, distance(b, a), rtol=1e-5)
    np.testing.assert_array_equal(distance(a, a), 0)
    a[1, 0, 8, 8, 0] = np.nan
    expected = [[False] * 3, [True, False, False]]
    np.testing.assert_array_equal(np.isnan(distance(a, b)), expected)
    grey = images(3, 17, 17, 1)
    np.testing.assert_array_equal(distance(grey, b), distance(np.repeat(grey, 3, -1), b))
    gradient = jax.grad(lambda x: distance(x, b))(jnp.asarray(a[0, 0]))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("a", "b"), [((17, 17, 2), (17, 17, 2)), ((17, 17, 3), (18, 17, 3)), ((17, 17), (17, 17, 3))]
)
def test_unusable_images(squeeze, a, b):
    with pytest.raises(GGLError, match=r"lpips: got images of shapes .*, allowed"):
        L.lpips(squeeze, jnp.zeros(a), jnp.zeros(b), backbone="squeeze")


def test_unknown_backbone(squeeze):
    with pytest.raises(GGLError, match="'vgg19', allowed: vgg, alex, squeeze"):
        L.lpips(squeeze, jnp.zeros((32, 32, 3)), jnp.zeros((32, 32, 3)), backbone="vgg19")


# --- conversion: every tensor is accounted for --------------------------------------------------


def test_kernels_are_height_width_in_out(random_weights):
    tensors = dict(random_weights["alex"])
    kernel = np.zeros((192, 64, 5, 5), np.float32)
    kernel[7, 3, 1, 4] = 2.0
    tensors["features.3.weight"] = kernel
    converted = L.from_torch(tensors, "alex")["features"]["3"]["kernel"]
    assert converted.shape == (5, 5, 64, 192)
    assert np.argwhere(converted).tolist() == [[1, 4, 3, 7]]
    assert converted.dtype == np.float32


def test_parameters_are_as_many_as_published(random_weights):
    # convolutions of torchvision's networks, counted by hand, and LPIPS' linear layers
    expected = {"vgg": 14_714_688 + 1_472, "alex": 2_469_696 + 1_152, "squeeze": 722_496 + 2_240}
    for name, tensors in random_weights.items():
        leaves = jax.tree.leaves(L.from_torch(tensors, name))
        assert sum(leaf.size for leaf in leaves) == expected[name]


def test_a_torchvision_files_classifier_is_known(random_weights):
    tensors = random_weights["squeeze"]
    classifier = {"classifier.1.weight": np.zeros((1000, 512, 1, 1), np.float32)}
    converted = L.from_torch({**tensors, **classifier}, "squeeze")
    jax.tree.map(np.testing.assert_array_equal, converted, L.from_torch(tensors, "squeeze"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features.3.squeeze.bias": None}, r"missing: features\.3\.squeeze\.bias"),
        ({"lin6.model.1.weight": None}, r"missing: lin6\.model\.1\.weight"),
        ({"features.13.weight": np.zeros(3)}, r"unknown: features\.13\.weight"),
        ({"lin7.model.1.weight": np.zeros(3)}, r"unknown: lin7\.model\.1\.weight"),
        # the layout of JAX where torch's is meant
        (
            {"features.0.weight": np.zeros((3, 3, 3, 64), np.float32)},
            r"misshapen: features\.0\.weight \[3, 3, 3, 64\] instead of \[64, 3, 3, 3\]",
        ),
        (
            {"features.0.bias": np.full(64, np.nan, np.float32)},
            r"features\.0\.bias of lpips-squeeze is not of finite",
        ),
        (
            {"features.0.bias": np.ones(64, np.complex64)},
            r"features\.0\.bias of lpips-squeeze is not of finite real",
        ),
    ],
)
def test_wrong_tensors_are_named(random_weights, change, words):
    tensors = {**random_weights["squeeze"], **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(GGLError, match=words) as caught:
        L.from_torch(tensors, "squeeze")
    assert "\n" not in str(caught.value)


def test_another_networks_weights_are_refused(random_weights):
    with pytest.raises(GGLError, match="missing"):
        L.from_torch(random_weights["alex"], "vgg")


# --- in an audit --------------------------------------------------------------------------------


def test_perceptual_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("GGL_JAX_WEIGHTS", str(tmp_path))
    absent = metrics.perceptual("vgg", (32, 32, 3))
    assert absent.distance is None
    assert "ggl-jax weights lpips-vgg" in absent.note
    small = metrics.perceptual("alex", (30, 32, 3))
    assert small.distance is None
    assert "31 x 31" in small.note
    with pytest.raises(GGLError, match="'vgg19', allowed"):
        metrics.perceptual("vgg19", (32, 32, 3))


def test_audit_reports_lpips(random_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("GGL_JAX_WEIGHTS", str(tmp_path / "shelf"))
    absent = metrics.perceptual("squeeze", (32, 32, 3))
    np.savez(tmp_path / "w.npz", **random_weights["squeeze"])
    weights.install("lpips-squeeze", given=[tmp_path / "w.npz"])
    prior = dcgan(width=2, latent_dim=4)
    original = images(1, 1, 32, 32, 3)
    result = audit(
        original,
        [0],
        model=get_model("lenet", 2, (32, 32, 3)),
        defenses=["none"],
        prior=prior,
        prior_params=prior.init(jax.random.key(0)),
        search=gx.Search(optimizer="cma_es:4", steps=1),
        num_controls=4,
        ceiling_steps=2,
        lpips="squeeze",
    )
    row = result.rows[0]
    params = L.from_torch(random_weights["squeeze"], "squeeze")
    controls = result.controls["image-0"]
    pictures = {
        "lpips": result.reconstructions[0],
        "lpips_control_best": controls.best_sample,
        "lpips_mean_image": controls.mean_image,
        "lpips_ceiling": controls.ceiling,
    }
    for name, image in pictures.items():
        expected = L.lpips(params, image, original[0], backbone="squeeze")
        np.testing.assert_allclose(row[name], expected, rtol=1e-4)
    assert row["lpips"] > 0
    assert (row["lpips_backbone"], row["lpips_note"]) == ("squeeze", "")
    (group,) = tables.leakage([row])
    assert tables.score_text(group, "lpips") == f"{row['lpips']:.3f}"
    assert "LPIPS (" not in " ".join(tables.sentences([group]))

    missing = row | absent.row(result.reconstructions[0], original[0], controls.pictures())
    assert missing.keys() == row.keys()
    assert missing["lpips"] is None
    (group,) = tables.leakage([row, missing])
    assert tables.score_text(group, "lpips") == "–"
    text = " ".join(tables.sentences([group]))
    assert "LPIPS (squeeze) was not measured" in text
    assert "ggl-jax weights lpips-squeeze" in text
