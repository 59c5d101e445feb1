"""Priors: architecture against torch, WGAN-GP training, the ceiling fit."""

import csv
import json
import os
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ggl_jax import checkpoint
from ggl_jax.errors import GGLError
from ggl_jax.images import to_signed
from ggl_jax.priors import (
    PRIORS,
    dcgan,
    fit_latents,
    load_prior,
    pixels,
    project,
    samples,
    training,
    wgan_gp,
)
from ggl_jax.priors.dcgan import Critic, Generator, StridedConv, from_torch
from ggl_jax.priors.gaussian import gaussian
from ggl_jax.priors.holdout import holdout_split
from ggl_jax.priors.pixels import pixels_of
from ggl_jax.priors.wgan_gp import Config

GOLDEN = Path(__file__).parent / "golden" / "dcgan.npz"
# One configuration wherever possible: compiling a step takes longer than all its tests' steps.
TINY = Config(
    width=2, latent_dim=4, batch_size=4, critic_steps=1, learning_rate=0.02, steps=6, holdout=3
)


def torch_generator(torch, width, latent_dim):
    """The network of the paper's code, written with torch's layers."""
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(latent_dim, 16 * 4 * width),
        nn.BatchNorm1d(16 * 4 * width),
        nn.ReLU(),
        nn.Unflatten(1, (4 * width, 4, 4)),
        nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 2, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 3, 2, stride=2),
        nn.Tanh(),
    )


def torch_arrays(torch, width, latent_dim):
    """Weights with every entry random, latents, and the images in both modes of batch norm."""
    torch.manual_seed(0)
    net = torch_generator(torch, width, latent_dim)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.dtype.is_floating_point:
                value.normal_(0.0, 0.5)
        latents = torch.randn(5, latent_dim)
        weights = {name: value.numpy().copy() for name, value in net.state_dict().items()}
        evaluated = net.eval()(latents).numpy()
        trained = net.train()(latents).numpy()
    return weights, latents.numpy(), evaluated, trained


def check_parity(width, weights, latents, evaluated, trained):
    params = from_torch({k: v for k, v in weights.items() if "num_batches" not in k})
    net = Generator(width, latents.shape[1])
    ours = jax.jit(net.apply)(params, latents)
    np.testing.assert_allclose(ours, evaluated.transpose(0, 2, 3, 1), atol=2e-6)
    ours, _ = jax.jit(partial(net.apply, train=True, mutable="batch_stats"))(params, latents)
    np.testing.assert_allclose(ours, trained.transpose(0, 2, 3, 1), atol=2e-5)


def test_generator_matches_torch_on_stored_arrays():
    with np.load(GOLDEN) as stored:
        weights = {k.removeprefix("w/"): stored[k] for k in stored if k.startswith("w/")}
        check_parity(3, weights, stored["latents"], stored["evaluated"], stored["trained"])


def test_generator_matches_torch_live():
    torch = pytest.importorskip("torch")
    check_parity(5, *torch_arrays(torch, 5, 7))


def test_from_torch_refuses_another_network():
    with pytest.raises(GGLError, match="needs 7"):
        from_torch({"0.weight": np.zeros((2, 2)), "0.bias": np.zeros(2)})
    with np.load(GOLDEN) as stored:
        weights = {k.removeprefix("w/"): stored[k] for k in stored if k.startswith("w/")}
    with pytest.raises(GGLError, match=r"missing: 4\.bias; unknown: 4\.other"):
        from_torch({"4.other" if k == "4.bias" else k: v for k, v in weights.items()})
    with pytest.raises(GGLError, match=r"misshapen: 7\.weight \[6, 3, 3, 3\] instead of"):
        from_torch({**weights, "7.weight": np.zeros((6, 3, 3, 3))})


def test_strided_conv_is_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))
    layer = StridedConv(5)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    expected = jax.lax.conv_general_dilated(
        x,
        params["params"]["kernel"],
        (2, 2),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=1e-5)


def test_critic_scores_each_image_alone():
    x = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    critic = Critic(2)
    params = jax.jit(critic.init)(jax.random.key(1), x)
    apply = jax.jit(critic.apply)
    scores = apply(params, x)
    assert scores.shape == (3,)
    others = apply(params, x.at[::2].set(0.5))
    assert scores[0] != others[0]
    np.testing.assert_allclose(scores[1], others[1], rtol=1e-6)


def test_dcgan_prior():
    prior = dcgan(width=2, latent_dim=4)
    params = jax.jit(prior.init)(jax.random.key(0))
    latents = prior.sample_latent(jax.random.key(1), 500)
    assert latents.shape == (500, 4)
    assert abs(latents.mean()) < 0.1
    assert abs(latents.std() - 1) < 0.1
    apply = jax.jit(prior.apply)
    images = apply(params, latents[:3], jnp.zeros(3, jnp.int32))
    assert images.shape == (3, *prior.image_shape)
    assert images.dtype == jnp.float32
    assert 0 <= images.min() < images.max() <= 1
    # evaluation mode: an image does not depend on its batch
    others = apply(params, latents[:3].at[1:].set(0.5), jnp.ones(3, jnp.int32))
    assert (images[1] != others[1]).any()
    np.testing.assert_allclose(images[0], others[0], atol=1e-6)
    with pytest.raises(GGLError, match="width: got 0"):
        dcgan(width=0)


def test_pixels_is_the_identity():
    prior = pixels((4, 5, 3))
    images = 2 * jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    points = pixels_of(images[:, None])
    np.testing.assert_allclose(prior.apply({}, points, None), images, atol=1e-6)
    np.testing.assert_allclose(prior.apply({}, jnp.full((1, 60), -1.0)), 0.0)
    # gradients reach values outside the box too
    gradient = jax.grad(lambda z: prior.apply({}, z, None).sum())(points)
    np.testing.assert_array_equal(gradient, 0.5)
    latents = prior.sample_latent(jax.random.key(0), 100)
    assert latents.shape == (100, prior.latent_dim)
    assert -1 <= latents.min() < -0.98 < 0.98 < latents.max() <= 1
    with pytest.raises(GGLError, match="image_shape"):
        pixels((4, 4))


# --- gradient penalty -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.0, 1.0, 3.0])
def test_penalty_of_a_linear_critic(norm):
    weight = jax.random.normal(jax.random.key(0), (4, 4, 3))
    weight *= norm / jnp.linalg.norm(weight)
    real, fake = jax.random.normal(jax.random.key(1), (2, 6, 4, 4, 3))
    mix = jax.random.uniform(jax.random.key(2), (6, 1, 1, 1))

    def penalty(weight):
        return wgan_gp.gradient_penalty(
            lambda x: jnp.einsum("bhwc,hwc->b", x, weight), real, fake, mix
        )

    value, gradient = jax.value_and_grad(penalty)(weight)
    np.testing.assert_allclose(value, (norm - 1) ** 2, atol=1e-5)
    assert np.isfinite(gradient).all()


def test_penalty_against_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=4)}
        real, fake = rng.normal(size=(2, 3, 5, 1, 1))
        mix = rng.uniform(size=(3, 1, 1, 1))

        def score(params, x):
            return jnp.tanh(x.reshape(len(x), 5) @ params["a"]) @ params["b"]

        def penalty(params):
            return wgan_gp.gradient_penalty(lambda x: score(params, x), real, fake, mix)

        points, step = real + mix * (fake - real), 1e-6
        shifts = step * np.eye(5).reshape(5, 1, 5, 1, 1)
        numeric = np.stack(
            [(score(params, points + s) - score(params, points - s)) / (2 * step) for s in shifts]
        )
        expected = np.mean((np.linalg.norm(numeric, axis=0) - 1) ** 2)
        np.testing.assert_allclose(penalty(params), expected, rtol=1e-6)

        direction = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=4)}

        def at(t):
            return penalty({k: params[k] + t * direction[k] for k in params})

        gradient = jax.grad(penalty)(params)
        slope = sum(np.vdot(gradient[k], direction[k]) for k in params)
        np.testing.assert_allclose(slope, (at(step) - at(-step)) / (2 * step), rtol=1e-6)


# --- data -------------------------------------------------------------------------------------


def write_images(path, num, *, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images)
    return images


def test_holdout_split():
    train, held_out = holdout_split(20, 5, 3)
    assert len(held_out) == 5
    assert sorted([*train, *held_out]) == list(range(20))
    np.testing.assert_array_equal(held_out, holdout_split(20, 5, 3)[1])
    assert list(held_out) != list(holdout_split(20, 5, 4)[1])
    # a smaller hold-out is a part of the larger one
    np.testing.assert_array_equal(held_out[:2], holdout_split(20, 2, 3)[1])
    # numpy promises this stream; a card's rule must keep its meaning
    np.testing.assert_array_equal(
        holdout_split(3562, 4, 0)[1], np.random.default_rng(0).permutation(3562)[:4]
    )
    for bad in (-1, 21):
        with pytest.raises(GGLError, match=r"\[0, 20\]"):
            holdout_split(20, bad, 0)


def test_held_out_images_never_train(tmp_path):
    first = write_images(tmp_path / "first.npz", 20)
    write_images(tmp_path / "second.npz", 10, seed=1)
    # the first file again, under another spelling of its path
    again = tmp_path / "sub" / ".." / "first.npz"
    (tmp_path / "sub").mkdir()
    config = Config(holdout=7, seed=2)
    data = [tmp_path / "first.npz", (tmp_path / "second.npz", 2.0), again]
    dataset = training.load_data(data, config)
    assert len(dataset.images) == 13 + 10 + 13
    _, held_out = holdout_split(20, 7, 2)
    seen = {image.tobytes() for image in dataset.images}
    assert not seen & {image.tobytes() for image in first[held_out]}
    assert [s["num_held_out"] for s in dataset.sources] == [7, 0, 7]


def test_weights_and_flips_of_batches(tmp_path):
    np.savez(tmp_path / "black.npz", images=np.zeros((8, 32, 32, 3), np.uint8))
    half = np.zeros((4, 32, 32, 3), np.uint8)
    half[:, :, :16] = 255  # the left half is white
    np.savez(tmp_path / "half.npz", images=half)
    data = [tmp_path / "black.npz", (tmp_path / "half.npz", 3.0)]
    dataset = training.load_data(data, Config(holdout=0))
    images, cumulative = jnp.asarray(dataset.images), jnp.asarray(dataset.cumulative)
    batch = wgan_gp.draw_batch(jax.random.key(0), images, cumulative, num=2000, flips=True)
    assert batch.dtype == jnp.float32
    assert (batch.min(), batch.max()) == (-1, 1)
    left, right = batch[:, 0, 0, 0] > 0, batch[:, 0, -1, 0] > 0
    # 4 images of weight 3 against 8 of weight 1: drawn 3 times in 5, mirrored half the time
    assert abs((left | right).mean() - 0.6) < 0.04
    assert abs(left.mean() - 0.3) < 0.04
    batch = wgan_gp.draw_batch(jax.random.key(0), images, cumulative, num=200, flips=False)
    assert not (batch[:, 0, -1, 0] > 0).any()


def test_bad_training_data(tmp_path):
    def refused(match, path, weight=1.0):
        with pytest.raises(GGLError, match=match):
            training.load_data([(path, weight)], TINY)

    refused("does not exist", tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not a zip file")
    refused("not a readable", tmp_path / "text.npz")
    np.savez(tmp_path / "key.npz", pictures=np.zeros(3))
    refused("no array `images`", tmp_path / "key.npz")
    np.savez(tmp_path / "float.npz", images=np.zeros((5, 32, 32, 3)))
    refused("float64", tmp_path / "float.npz")
    np.savez(tmp_path / "few.npz", images=np.zeros((2, 32, 32, 3), np.uint8))
    refused("holdout=3", tmp_path / "few.npz")
    np.savez(tmp_path / "good.npz", images=np.zeros((9, 32, 32, 3), np.uint8))
    refused("weight -1", tmp_path / "good.npz", -1.0)
    with pytest.raises(GGLError, match="empty"):
        training.load_data([], TINY)
    with pytest.raises(GGLError, match="batch_size: got 1"):
        Config(batch_size=1)


# --- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "faces.npz"
    write_images(path, 12)
    return [path]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    return training.train(TINY, data, out, log_every=2, sample_every=4), out


def rows(out):
    with (out / "losses.csv").open() as file:
        return [row[:4] for row in csv.reader(file)]  # less the time


def test_training_writes_what_it_promises(uninterrupted):
    state, out = uninterrupted
    assert int(state.step) == 6
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "checkpoints", "losses.csv", "losses.png"} <= names
    assert {"samples_000004.png", "samples_000006.png"} <= names
    assert [row[0] for row in rows(out)] == ["step", "2", "4", "6"]
    assert json.loads((out / "config.json").read_text())["config"]["width"] == 2
    start = wgan_gp.init_state(TINY)
    for name in ("generator", "critic", "ema"):
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), getattr(start, name), getattr(state, name)
        )
        # the bias of the score cancels in the critic's loss
        moved.pop("score", None)
        # and those before a norm cancel in it
        assert all(m["kernel"] for layer, m in moved.items() if not layer.startswith("norm")), name


def test_interrupted_and_resumed_is_uninterrupted(data, uninterrupted, tmp_path):
    expected, whole = uninterrupted

    def interrupt(step, metrics):
        assert np.isfinite(metrics["wasserstein"])
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    arguments = {"log_every": 2, "sample_every": 4}
    stopped = training.train(TINY, data, tmp_path, progress=interrupt, **arguments)
    assert int(stopped.step) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "checkpoints" / "2").is_dir()
    # a row from beyond the checkpoint, as a killed run would leave
    with (tmp_path / "losses.csv").open("a") as file:
        file.write("4,0,0,0,0\n")
    resumed = training.train(TINY, data, tmp_path, **arguments)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    assert rows(tmp_path) == rows(whole)
    images = [np.asarray(Image.open(out / "samples_000006.png")) for out in (tmp_path, whole)]
    np.testing.assert_array_equal(*images)


def test_another_configuration_is_refused(data, uninterrupted, tmp_path):
    _, out = uninterrupted
    other = Config(**{**vars(TINY), "learning_rate": 0.5, "steps": 9})
    with pytest.raises(GGLError, match=r"learning_rate: 0\.02 -> 0\.5"):
        training.train(other, data, out)
    write_images(tmp_path / "other.npz", 12, seed=5)
    with pytest.raises(GGLError, match=r"data: 'faces\.npz.*' -> 'other\.npz"):
        training.train(TINY, [tmp_path / "other.npz"], out)
    # nothing left to do: the same state comes back, and steps may have changed
    state = training.train(Config(**{**vars(TINY), "steps": 5}), data, out)
    assert int(state.step) == 6


def test_training_moves_samples_towards_the_data(tmp_path):
    np.savez(tmp_path / "white.npz", images=np.full((12, 32, 32, 3), 255, np.uint8))
    config = Config(**{**vars(TINY), "steps": 60})
    prior = dcgan(width=2, latent_dim=4)

    def brightness(state):
        params = wgan_gp.standing_statistics(TINY, state.generator, jax.random.key(0), num=64)
        return samples(prior, params, jax.random.key(1), 64).mean()

    before = brightness(wgan_gp.init_state(TINY))
    state = training.train(config, [tmp_path / "white.npz"], tmp_path / "run")
    assert brightness(state) > before + 0.2


def test_standing_statistics_are_those_of_the_latents():
    key = jax.random.key(3)
    generator = wgan_gp.init_state(TINY).generator
    params = wgan_gp.standing_statistics(TINY, generator, key, num=64)
    latents = jax.random.normal(key, (64, 4))
    net = Generator(2, 4)
    in_training = jax.jit(partial(net.apply, train=True, mutable="batch_stats"))
    expected, _ = in_training({"params": generator}, latents)
    np.testing.assert_allclose(jax.jit(net.apply)(params, latents), expected, atol=1e-5)


def test_export_and_load(uninterrupted, tmp_path):
    state, out = uninterrupted
    before = rows(out)
    card = training.export(
        out, tmp_path / "tiny", trained_on=("noise",), command="a command", num_statistics=64
    )
    assert rows(out) == before
    prior, params, loaded = load_prior(tmp_path / "tiny")
    assert loaded == card
    assert card["name"] == "tiny"
    assert card["steps"] == 6
    assert card["trained_on"] == ["noise"]
    assert card["data"][0]["num_held_out"] == 3
    jax.tree.map(np.testing.assert_array_equal, params["params"], state.ema)
    grid = np.asarray(Image.open(tmp_path / "tiny" / "samples.png"))
    assert grid.std() > 0
    assert prior.latent_dim == 4

    with pytest.raises(GGLError, match="no training run"):
        training.export(tmp_path, tmp_path / "x", trained_on=(), command="")
    path = tmp_path / "tiny" / "card.json"
    path.write_text(json.dumps({**card, "kind": "diffusion"}))
    with pytest.raises(GGLError, match="kind: got 'diffusion'"):
        load_prior(tmp_path / "tiny")
    path.write_text(json.dumps({**card, "arguments": {"width": 3, "latent_dim": 4}}))
    with pytest.raises(GGLError, match="arrays are not those"):
        load_prior(tmp_path / "tiny")


def test_class_conditional_critic_and_generator():
    critic, images = Critic(2, 3), jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    params = jax.jit(critic.init)(jax.random.key(1), images, jnp.zeros(2, jnp.int32))["params"]
    table = params["embeddings"]
    score = jax.jit(lambda params, labels: critic.apply({"params": params}, images, labels))
    scores = [score(params, jnp.full(2, c)) for c in range(3)]
    # what the label adds is linear in its embedding: the difference of two classes does not
    # change when the same is added to both
    shifted = {**params, "embeddings": table + 0.1}
    again = [score(shifted, jnp.full(2, c)) for c in range(3)]
    np.testing.assert_allclose(scores[2] - scores[0], again[2] - again[0], atol=1e-4)
    assert jnp.abs(scores[2] - scores[0]).min() > 1e-4
    # without embeddings it is the unconditional critic
    plain = {name: value for name, value in params.items() if name != "embeddings"}
    expected = jax.jit(Critic(2).apply)({"params": plain}, images)
    found = score({**params, "embeddings": 0 * table}, jnp.array([0, 2]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    prior = dcgan(width=2, latent_dim=4, num_classes=3)
    params = jax.jit(prior.init)(jax.random.key(0))
    latents = jnp.zeros((5, 4))
    images = jax.jit(prior.apply)(params, latents, jnp.array([0, 1, 1, 3, -1]))
    assert jnp.abs(images[0] - images[1]).max() > 1e-3
    np.testing.assert_array_equal(images[1], images[2])
    assert jnp.isnan(images[3:]).all()
    with pytest.raises(GGLError, match="num_classes: got 0"):
        dcgan(num_classes=0)


def test_class_conditional_training_and_export(tmp_path):
    # class 0 is black, class 1 white
    labels = np.arange(12) % 2
    images = np.broadcast_to(np.uint8(255 * labels)[:, None, None, None], (12, 32, 32, 3))
    np.savez(tmp_path / "two.npz", images=images, labels=labels)
    assert training.count_classes([tmp_path / "two.npz"]) == 2
    config = Config(**{**vars(TINY), "steps": 40, "num_classes": 2})
    dataset = training.load_data([tmp_path / "two.npz"], config, num_classes=config.num_classes)
    # the held-out ones are out of both
    np.testing.assert_array_equal(dataset.images[:, 0, 0, 0] / 255, dataset.labels)
    batch = {"num": 50}
    key = jax.random.key(0)
    drawn = wgan_gp.draw_batch(key, dataset.images, dataset.cumulative, flips=True, **batch)
    classes = wgan_gp.draw_labels(key, jnp.asarray(dataset.labels), dataset.cumulative, **batch)
    np.testing.assert_array_equal(drawn[:, 0, 0, 0], 2 * classes - 1)

    training.train(config, [tmp_path / "two.npz"], tmp_path / "run")
    card = training.export(
        tmp_path / "run", tmp_path / "two", trained_on=(), command="", num_statistics=64
    )
    prior, params, loaded = load_prior(tmp_path / "two")
    assert prior.num_classes == card["arguments"]["num_classes"] == loaded["config"]["num_classes"]
    images = samples(prior, params, jax.random.key(0), 64)
    assert images[32:].mean() > images[:32].mean() + 0.2

    with pytest.raises(GGLError, match="label 1 is beyond num_classes=1"):
        training.load_data([tmp_path / "two.npz"], Config(holdout=0), num_classes=1)
    np.savez(tmp_path / "short.npz", images=np.zeros((2, 32, 32, 3), np.uint8), labels=[0])
    np.savez(tmp_path / "plain.npz", images=np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(GGLError, match=r"must be whole numbers \[2\]"):
        training.count_classes([tmp_path / "short.npz"])
    with pytest.raises(GGLError, match="no array `labels`"):
        training.count_classes([(tmp_path / "plain.npz", 2.0)])


def test_damaged_training_checkpoint(data, tmp_path):
    config = Config(**{**vars(TINY), "steps": 1})
    training.train(config, data, tmp_path)
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"damaged")
    with pytest.raises(GGLError, match="delete that folder"):
        training.train(config, data, tmp_path)


# --- the ceiling, samples, shipped weights ----------------------------------------------------


def test_fit_recovers_images_in_the_range():
    prior = dcgan(width=2, latent_dim=4)
    generator = wgan_gp.init_state(TINY).generator
    params = wgan_gp.standing_statistics(TINY, generator, jax.random.key(3), num=64)
    images = samples(prior, params, jax.random.key(7), 3)
    # the last is far outside the range
    checkerboard = jnp.indices((32, 32)).sum(0)[None, :, :, None] % 2 * jnp.ones(3)
    images = jnp.concatenate([images, checkerboard])
    settings = {"restarts": 3, "steps": 150, "num_candidates": 64}
    latents, fitted, psnr = fit_latents(prior, params, images, jax.random.key(0), **settings)
    assert latents.shape == (4, 4)
    assert psnr[:3].min() > 30
    assert psnr[3] < 15
    expected = jax.jit(prior.apply)(params, latents, None)
    np.testing.assert_allclose(fitted, expected, atol=1e-6)
    error = jnp.mean((fitted - images) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(psnr, -10 * jnp.log10(error), rtol=1e-4)


def test_fit_treats_images_alone_and_keeps_the_best():
    prior = pixels((4, 4, 1))
    images = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1))
    settings = {"restarts": 2, "steps": 100, "num_candidates": 8, "learning_rate": 0.2}
    together = fit_latents(prior, {}, images, jax.random.key(1), **settings)
    alone = fit_latents(prior, {}, images[1:2], jax.random.key(1), **settings)
    assert together[2].min() > 40
    np.testing.assert_allclose(together[0][1], alone[0][0], atol=1e-5)
    # one step far too long: the start is kept, which is the nearest sample
    pool = prior.apply({}, prior.sample_latent(jax.random.key(1), 8))
    nearest = jnp.mean((pool[None] - images[:, None]) ** 2, axis=(2, 3, 4)).min(1)
    wild = {**settings, "steps": 1, "learning_rate": 100.0}
    _, _, psnr = fit_latents(prior, {}, images, jax.random.key(1), **wild)
    np.testing.assert_allclose(psnr, -10 * jnp.log10(nearest), rtol=1e-5)


def test_projection_is_the_nearest_image_of_a_linear_prior():
    """Least squares, in closed form, with every restart at the same place; rows apart."""
    prior = gaussian((4, 4, 1), 3)
    columns = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)) * 0.05, jnp.float32)
    linear = prior._replace(
        apply=lambda params, z, labels: (0.5 + z @ columns).reshape(-1, 4, 4, 1),
        sample_latent=lambda key, num: jax.random.normal(key, (num, 3)),
    )
    images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 1))
    found = project(linear, {}, images, jax.random.key(1), steps=300, num_candidates=64)
    flat = np.asarray(images).reshape(2, 16) - 0.5
    weights = np.linalg.lstsq(columns.T, flat.T, rcond=None)[0]
    np.testing.assert_allclose(found.reshape(2, 16), 0.5 + weights.T @ columns, atol=2e-3)
    # A single step: the mean over the restarts of the samples nearest to the image.
    start = project(linear, {}, images, jax.random.key(1), restarts=4, steps=1, num_candidates=64)
    pool = linear.apply({}, linear.sample_latent(jax.random.key(1), 64), None)
    distances = jnp.sum((pool[None] - images[:, None]) ** 2, axis=(2, 3, 4))
    nearest = pool[jnp.argsort(distances, axis=1)[:, :4]].mean(1)
    np.testing.assert_allclose(start, nearest, atol=0.02)


def test_fit_refuses_bad_arguments():
    prior, key = pixels((4, 4, 1)), jax.random.key(0)
    images = jnp.zeros((1, 4, 4, 1))
    with pytest.raises(GGLError, match="shape"):
        fit_latents(prior, {}, images[0], key)
    for name, value in {"restarts": 0, "steps": 0, "learning_rate": 0, "num_candidates": 1}.items():
        with pytest.raises(GGLError, match=f"{name}: got {value}"):
            fit_latents(prior, {}, images, key, **{name: value})


def test_samples_grid(tmp_path):
    prior = pixels((4, 4, 3))
    path = tmp_path / "new" / "grid.png"
    images = samples(prior, {}, jax.random.key(0), 6, path=path, num_columns=3)
    assert images.shape == (6, 4, 4, 3)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (2 * (2 * 4 + 2), 2 * (3 * 4 + 2 * 2), 3)
    np.testing.assert_array_equal(grid[0:8:2, 12:20:2], np.rint(images[1] * 255))
    with pytest.raises(GGLError, match="num: got 0"):
        samples(prior, {}, jax.random.key(0), 0)
    with pytest.raises(GGLError, match="cannot write"):
        samples(prior, {}, jax.random.key(0), 1, path=path / "below_a_file.png")


def test_shipped_prior():
    prior, params, card = load_prior("dcgan32_faces")
    assert prior.name in PRIORS
    assert set(card["trained_on"]) == {"celeba", "lfw"}
    assert card["data"][0]["num_held_out"] == 256
    assert card["licence_note"]
    assert (checkpoint.find("dcgan32_faces") / "samples.png").is_file()
    images = samples(prior, params, jax.random.key(0), 128)
    assert np.isfinite(images).all()
    # faces are near grey on average, differ from each other, and mirror about their middle more
    # closely than about their waist
    assert 0.3 < images.mean() < 0.6
    assert images.std(0).mean() > 0.15
    mean = to_signed(images).mean(0)
    assert jnp.abs(mean - mean[:, ::-1]).mean() < 0.5 * jnp.abs(mean - mean[::-1]).mean()


if __name__ == "__main__":  # makes the stored arrays anew; needs torch
    import torch as torch_module

    arrays = torch_arrays(torch_module, 3, 6)
    stored_weights = {f"w/{k}": v for k, v in arrays[0].items()}
    names = ("latents", "evaluated", "trained")
    np.savez_compressed(GOLDEN, **stored_weights, **dict(zip(names, arrays[1:], strict=True)))


def test_equal_priors_are_one_object():
    """Programs are kept by the prior that they were compiled for, so it has to be found again."""
    assert load_prior("dcgan32_faces")[0] == load_prior("dcgan32_faces")[0]
    assert dcgan(width=3, latent_dim=4) == dcgan(width=3, latent_dim=4)
    assert dcgan(width=3, latent_dim=4) != dcgan(width=3, latent_dim=5)
    assert pixels((4, 4, 3)) == pixels([4, 4, 3])
    assert pixels((4, 4, 3)) != pixels((4, 4, 1))
