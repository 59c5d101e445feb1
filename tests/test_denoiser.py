"""The denoiser beside a prior: its noise, network, training, and its place in searches."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE

import ggl_jax as gx
from ggl_jax import checkpoint
from ggl_jax.adversary import stages
from ggl_jax.cli import run
from ggl_jax.priors import denoiser, with_denoiser
from ggl_jax.priors.holdout import holdout_split
from ggl_jax.types import Candidates, Guess, Problem


@pytest.fixture(scope="module")
def denoising(tiny_prior):
    return with_denoiser(tiny_prior, (4, 4, 4))


@pytest.fixture(scope="module")
def trained(denoising):
    """Parameters whose denoiser does something: those of a fresh one are nearly the identity."""
    params = denoising.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))

    def turn(x):
        return x + 0.2 * jax.random.normal(next(keys), x.shape)

    return {**params, "denoiser": jax.tree.map(turn, params["denoiser"])}


def test_noise_has_the_strength_that_it_says():
    found, strengths = denoiser.noise(jax.random.key(0), 600, (16, 16, 3))
    assert found.shape == (600, 16, 16, 3)
    relative = np.asarray(found / strengths)
    np.testing.assert_allclose(np.mean(relative**2), 1.0, atol=0.02)
    low, high = denoiser.STRENGTHS
    assert low <= strengths.min() < 1.2 * low
    assert 0.85 * high < strengths.max() <= high
    logs = np.log(np.asarray(strengths))
    np.testing.assert_allclose(logs.mean(), np.log(low * high) / 2, atol=4 * logs.std() / 600**0.5)
    # Of neighbours: half white, 0.3 of kind (white + blurred) / sqrt 2, 0.2 blurred, all grey or
    # not; a blurred one has 6 of its 9 squares in common with the next.
    neighbours = np.mean(relative[:, 1:] * relative[:, :-1])
    expected = (1 - 0.25) * (0.3 * 0.5 + 0.2) * 6 / 9
    np.testing.assert_allclose(neighbours, expected, atol=0.03)
    np.testing.assert_allclose(np.mean(relative[..., 0] * relative[..., 1]), 0.25, atol=0.04)


@pytest.mark.parametrize("shape", [(8, 8, 3), (7, 5, 1)])
def test_network_is_blind_to_the_scale_and_fits_every_size(shape):
    network = denoiser.Denoiser((4, 6, 8))
    images = jax.random.uniform(jax.random.key(0), (2, *shape))
    params = network.init(jax.random.key(1), images)
    cleaned = network.apply(params, images)
    assert cleaned.shape == images.shape
    assert float(jnp.abs(cleaned - images).max()) > 1e-3
    halved = network.apply(params, 0.5 + 0.5 * (images - 0.5))
    np.testing.assert_allclose(halved - 0.5, 0.5 * (cleaned - 0.5), atol=1e-5)


def test_prior_with_a_denoiser(tiny_prior, denoising, trained):
    assert denoising is with_denoiser(tiny_prior, (4, 4, 4))
    latents = tiny_prior.sample_latent(jax.random.key(2), 3)
    labels = jnp.zeros(3, jnp.int32)
    own = {k: v for k, v in trained.items() if k != "denoiser"}
    np.testing.assert_array_equal(
        denoising.apply(trained, latents, labels), tiny_prior.apply(own, latents, labels)
    )
    assert denoising.denoise(trained, jnp.zeros((2, *TINY_SHAPE))).shape == (2, *TINY_SHAPE)


def test_penalty_pulls_towards_the_denoised_image(
    tiny_model, tiny_variables, tiny_images, denoising, trained
):
    """Its derivative is x - D(x): D is held constant."""
    label = jnp.asarray([1])
    update = gx.gradient(tiny_model, tiny_variables, tiny_images[:1], label)
    problem = Problem(update, tiny_variables, trained, label, {})
    options = {"space": "pixels", "restarts": 1, "steps": 1, "optimizer": "adam"}

    def attack(regularizer):
        search = gx.Search(**options, regularizer=regularizer)
        return gx.search_attack(tiny_model, denoising, search)

    points = jax.random.uniform(jax.random.key(4), (1, int(np.prod(TINY_SHAPE)))) - 0.5

    def loss(regularizer, points):
        one = attack(regularizer)
        state = one.init(jax.random.key(0), problem, points)
        return one.candidates(problem, state._replace(losses=jnp.zeros(1))).distances[0]

    def penalty(points):  # candidates' distances are losses, here 0, less the penalties
        return loss("none", points) - loss("denoised:3", points)

    images = 0.5 * (points.reshape(1, *TINY_SHAPE) + 1)
    apart = images - denoising.denoise(trained, images)
    np.testing.assert_allclose(penalty(points), 1.5 * jnp.sum(apart**2), rtol=1e-4)
    gradient = jax.grad(penalty)(points).reshape(apart.shape)
    np.testing.assert_allclose(gradient, 0.5 * 3 * apart, rtol=1e-3, atol=1e-5)


def test_a_prior_without_a_denoiser_is_told(tiny_model, tiny_prior):
    search = gx.Search(space="pixels", regularizer="denoised:1")
    with pytest.raises(gx.GGLError, match="train-denoiser"):
        gx.search_attack(tiny_model, tiny_prior, search)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_map_goes_by_the_denoiser(noise, denoising, tiny_prior, tiny_model):
    """Where there is one it takes the total variation's place, and stands beside a likelihood."""
    size = int(np.prod(TINY_SHAPE))
    guess = Guess(jnp.zeros(size), jnp.eye(size))
    image = jnp.full((1, *TINY_SHAPE), 0.5)
    one = Candidates(jnp.zeros((1, size)), image, jnp.zeros((1, 1)), jnp.ones(1), jnp.full(1, 0.5))
    problem = Problem({}, {}, {}, jnp.zeros(1), {}, noise=np.float32(noise), guess=guess)
    search = gx.search_of("quick", "map", bank=300)
    view = gx.parse("none" if not noise else "noise:0.1").view
    weights = {}
    for prior in (tiny_prior, denoising):
        made = stages.make_stages(search, tiny_model, prior, view)
        revised = made[1].revise(problem, one)
        under_noise = float(revised.guess.denoised)
        assert (under_noise > 0) == (noise > 0)
        if noise:
            assert len(made) == 2  # pixels would fit it
            continue
        free = made[2].revise(revised, one).guess
        assert float(free.weight) == 0
        weights[prior.denoise is None] = float(free.smooth), float(free.denoised)
    if not noise:
        assert weights[True][0] > 0 == weights[True][1]
        assert weights[False][1] > 0 == weights[False][0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of one colour each, and a prior's checkpoint."""
    folder = tmp_path_factory.mktemp("denoiser")
    colours = np.random.default_rng(0).integers(0, 256, (24, 1, 1, 3), np.uint8)
    for size in (8, 32):
        flat = np.broadcast_to(colours, (24, size, size, 3))
        np.savez(folder / f"flat{size}.npz", images=flat)
    arguments = {"width": 1, "latent_dim": 2}
    params = gx.dcgan(**arguments).init(jax.random.key(0))
    card = {"name": "own", "kind": "dcgan", "arguments": arguments, "trained_on": ["mine"]}
    checkpoint.save(folder / "own", params, card)
    return folder


CONFIG = denoiser.Config(steps=6, batch_size=4, holdout=8)


def test_interrupted_training_ends_with_the_same_weights(files, denoising, tmp_path):
    prior, data, losses = denoising, [files / "flat8.npz"], []

    def stop(step, loss):
        raise KeyboardInterrupt

    whole = denoiser.train(
        CONFIG, prior, data, tmp_path / "a", every=2, progress=lambda *x: losses.append(x), log=1
    )
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    part = denoiser.train(CONFIG, prior, data, tmp_path / "b", every=2, progress=stop, log=3)
    assert int(part.step) == 3
    resumed = denoiser.train(CONFIG, prior, data, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, whole.ema, resumed.ema)
    other = denoiser.Config(steps=6, batch_size=4, holdout=8, learning_rate=1e-3)
    with pytest.raises(gx.GGLError, match="learning_rate"):
        denoiser.train(other, prior, data, tmp_path / "a")


def test_training_takes_noise_off(files, tiny_prior, tmp_path):
    config = denoiser.Config(steps=200, batch_size=16, holdout=8, learning_rate=1e-2)
    prior = with_denoiser(tiny_prior, (8, 8, 8))
    state = denoiser.train(config, prior, [files / "flat8.npz"], tmp_path)
    clean = np.full((16, *TINY_SHAPE), 0.3, np.float32)
    noisy = clean + 0.1 * np.random.default_rng(1).standard_normal(clean.shape).astype(np.float32)
    cleaned = prior.denoise({"denoiser": state.ema}, noisy)
    assert np.mean((cleaned - clean) ** 2) < 0.5 * np.mean((noisy - clean) ** 2)
    base = tiny_prior.init(jax.random.key(0)), {"name": "tiny"}
    rest = prior, base, [files / "flat8.npz"], tmp_path / "new"

    def exported(state, config=config):
        return denoiser.export(state, config, *rest, trained_on=[], command="")["denoiser"]

    for known in (config, denoiser.Config(holdout=0)):  # on training images where none are left out
        with pytest.raises(gx.GGLError, match=r"after 0 steps it leaves images no nearer than.*dB"):
            exported(denoiser.init_state(config, prior), known)
    assert not (tmp_path / "new").exists()
    card = exported(state)
    assert card["gain"]["0.1"] > 3
    noise = 0.1 * np.random.default_rng(0).standard_normal((8, *TINY_SHAPE)).astype(np.float32)
    flat = np.load(files / "flat8.npz")["images"] / 255.0
    held_out = flat[holdout_split(24, 8, config.seed)[1]]
    errors = np.mean((np.clip(held_out + noise, 0, 1) - held_out) ** 2, axis=(1, 2, 3))
    before = np.mean(-10 * np.log10(errors))
    assert card["psnr_held_out"]["0.1"] - card["gain"]["0.1"] == pytest.approx(before, abs=0.02)


def test_command_puts_it_beside_a_prior(files, tmp_path, capsys, monkeypatch):
    options = ["--prior", str(files / "own"), "--data", str(files / "flat32.npz"), "--holdout", "8"]
    options += ["--steps", "2", "--batch-size", "2", "--trained-on", "more"]
    options += ["--out", str(tmp_path / "run"), "--export", str(tmp_path / "new")]
    assert run(["train-denoiser", *options]) == 2
    assert "train on, with more steps" in capsys.readouterr().err
    measured = iter([26, 25.5, 20, 21, 15, 17])  # noisy and cleaned: two steps teach it nothing
    monkeypatch.setattr(denoiser, "_psnr", lambda found, images: float(next(measured)))
    assert run(["train-denoiser", *options]) == 0
    out = capsys.readouterr().out
    assert "noise 0.05: 25.5 dB, from 26.00; noise 0.1: 21.0 dB, from 20.00" in out
    assert "Warning: at noise 0.05 it does no better than no denoising" in out
    prior, params, card = gx.load_prior(tmp_path / "new")
    assert prior.denoise(params, jnp.zeros((1, 32, 32, 3))).shape == (1, 32, 32, 3)
    assert card["trained_on"] == ["mine", "more"]
    assert card["denoiser"]["config"]["steps"] == 2
    assert (tmp_path / "new" / "denoiser.png").stat().st_size > 0
    old = gx.load_prior(files / "own")[1]
    kept = {k: v for k, v in params.items() if k != "denoiser"}
    jax.tree.map(np.testing.assert_array_equal, kept, old)
    assert run(["train-denoiser", *options[:-2]]) == 0
    assert "--export FOLDER" in capsys.readouterr().out
    assert run(["train-denoiser", *options, "--learning-rate", "0"]) == 2
    assert "learning_rate" in capsys.readouterr().err.replace("-", "_")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data flat8.npz", "must be [n, 32, 32, 3]"),
        ("--data flat32.npz*0", "weight 0.0 of flat32.npz"),
        ("--data flat32.npz", "holdout=256 must lie in [0, 24]"),
        ("--data flat32.npz --holdout 24", "holdout=24 leaves no image to train on; lower it"),
        ("--data flat32.npz --holdout 8 --steps 0 --export taken", "taken exists and is no check"),
    ],
)
@pytest.mark.parametrize("command", ["train-denoiser --prior own", "train-prior"])
def test_what_cannot_be_trained_is_told_before(
    command, options, said, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(files)
    (files / "taken").mkdir(exist_ok=True)
    assert run([*command.split(), *options.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("ggl-jax: ")
    assert "train-prior" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("widths", "said"),
    [([1, 2], "expected 3"), ([0, 1, 2], "zero"), ("abc", "'a'"), ([2, 2, 2], "[2, 2, 2]")],
)
def test_a_card_of_another_denoiser_is_refused(widths, said, files, tmp_path):
    prior, params, card = gx.load_prior(files / "own")
    one = with_denoiser(prior, (1, 1, 1)).init(jax.random.key(0))
    folder = tmp_path / "own"
    card = {**card, "denoiser": {"arguments": {"widths": widths}}}
    checkpoint.save(folder, {**params, "denoiser": one["denoiser"]}, card)
    with pytest.raises(gx.GGLError) as error:
        gx.load_prior(folder)
    assert said in str(error.value)
    assert "fetch it again" in str(error.value)


def test_the_denoiser_has_the_last_word_on_coarse_images(tiny_prior):
    """Only after a refinement of whitened pixels, and on images that it changes."""
    fine = tiny_prior._replace(denoise=lambda params, x: x + jnp.where(x > 0.5, 0.001, 0.1))
    found = np.stack([np.full((1, *TINY_SHAPE), level, np.float32) for level in (0.25, 0.75)])
    outcome = SimpleNamespace(images=found, candidates=None, labels=None)
    view = gx.parse("none").view

    def result(prior, **changes):
        search = gx.search_of("standard", "map", **changes)
        return stages.result_images(search, view, outcome, gx.Public(None, None, prior, {}))

    np.testing.assert_allclose(result(fine)[0], 0.35, atol=1e-6)
    np.testing.assert_array_equal(result(fine)[1], found[1])
    np.testing.assert_array_equal(result(fine, refine="none"), found)
    np.testing.assert_array_equal(result(tiny_prior), found)
    ggl = gx.search_of("standard", "ggl", combine="best")
    kept = stages.result_images(ggl, view, outcome, gx.Public(None, None, fine, {}))
    np.testing.assert_array_equal(kept, found)
