"""Bounded memory for large priors: the same results in parts as at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import attack_of

from ggl_jax import checkpoint
from ggl_jax.audit.controls import prior_controls
from ggl_jax.cli import run
from ggl_jax.errors import GGLError
from ggl_jax.priors import BIGGAN_DEEP, biggan_deep, dcgan, decoding, fit_latents, samples
from ggl_jax.types import Prior

SHAPE = (8, 8, 3)
LAYER = 2 * 8 * 8 * 3  # entries per image of the test prior's largest array


def striped():
    """A class-conditional prior: its hidden layer is twice as wide as the image."""

    def init(key):
        return jax.random.normal(key, (5, LAYER))

    def apply(params, latents, labels):
        hidden = jnp.tanh(latents @ params)
        image = hidden[:, : LAYER // 2] * hidden[:, LAYER // 2 :]
        phase = jnp.where(labels == 2, jnp.nan, labels.astype(jnp.float32))
        return jax.nn.sigmoid(image + phase[:, None]).reshape(-1, *SHAPE)

    return Prior(
        init, apply, lambda key, num: jax.random.normal(key, (num, 5)), 5, SHAPE, "striped", 2
    )


STRIPED = striped()


@pytest.fixture(scope="module")
def params():
    return STRIPED.init(jax.random.key(0))


@pytest.fixture
def few(monkeypatch):
    """Memory for three images at once."""
    monkeypatch.setattr(decoding, "DECODING_BYTES", 3 * 4 * 4 * LAYER)


def test_what_fits_at_once(params, few):
    assert decoding.images_at_once(STRIPED, params) == 3
    assert decoding.images_at_once(STRIPED, params, derivatives=True) <= 3


def test_small_priors_are_not_split_and_large_ones_are():
    shapes = {width: dcgan(width=width) for width in (64, 128)}
    for prior in shapes.values():
        params = jax.eval_shape(prior.init, jax.random.key(0))
        # the pool that a ceiling starts from
        assert decoding.images_at_once(prior, params) >= 4096
    prior = biggan_deep(BIGGAN_DEEP[256], image_size=224)
    params = jax.eval_shape(prior.init, jax.random.key(0))
    # its last layers hold 128 channels at 256x256: 33.5 MB an array
    assert 8 <= decoding.images_at_once(prior, params) <= 64
    assert 1 <= decoding.images_at_once(prior, params, derivatives=True) <= 8


def test_decode_in_parts(params, few):
    latents = jax.random.normal(jax.random.key(1), (8, 5))
    labels = jnp.arange(8) % 2
    whole = STRIPED.apply(params, latents, labels)

    @jax.jit
    def in_parts(z):
        return decoding.decode(STRIPED, params, z, labels)

    assert "while" in in_parts.lower(latents).as_text()
    np.testing.assert_allclose(in_parts(latents), whole, atol=1e-6)
    weights = jax.random.normal(jax.random.key(2), whole.shape)
    slopes = [
        jax.grad(lambda z, f=f: jnp.vdot(weights, f(z)))(latents)
        for f in (in_parts, lambda z: STRIPED.apply(params, z, labels))
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-4, atol=1e-5)
    seen = decoding.decode_each(STRIPED, params, latents, labels)
    assert [len(part) for part in seen] == [3, 3, 2]
    np.testing.assert_allclose(np.concatenate(seen), whole, atol=1e-6)


def results(params):
    """All that decodes, for two images of different classes."""
    images = samples(STRIPED, params, jax.random.key(5), 2)
    fits = fit_latents(
        STRIPED,
        params,
        images,
        jax.random.key(3),
        restarts=2,
        steps=5,
        num_candidates=10,
        labels=[0, 1],
    )
    controls = prior_controls(
        STRIPED,
        params,
        images[0],
        1,
        jax.random.key(4),
        num_samples=7,
        ceiling_steps=2,
        ceiling_restarts=2,
        chunk_size=4,
    )
    return [images, *fits], controls


def test_parts_change_nothing(params, monkeypatch):
    arrays, controls = results(params)
    monkeypatch.setattr(decoding, "DECODING_BYTES", 3 * 4 * 4 * LAYER)
    again, in_parts = results(params)
    for one, other in zip(arrays, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for name, value in controls.scores.items():
        np.testing.assert_allclose(in_parts.scores[name], value, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(in_parts.mean_image, controls.mean_image, atol=1e-6)
    np.testing.assert_array_equal(in_parts.best_sample, controls.best_sample)


def test_samples_of_a_class_conditional_prior_show_all_classes(params):
    images = samples(STRIPED, params, jax.random.key(0), 4)
    latents = STRIPED.sample_latent(jax.random.key(0), 4)
    expected = STRIPED.apply(params, latents, jnp.array([0, 0, 1, 1]))
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_labels_that_the_prior_does_not_know(params):
    image = np.full(SHAPE, 0.5, np.float32)
    for bad in (2, -1):
        with pytest.raises(GGLError, match=rf"labels: got {bad} .*0 to 1, .*striped"):
            prior_controls(STRIPED, params, image, bad, jax.random.key(0))
        with pytest.raises(GGLError, match="allowed: 0 to 1"):
            fit_latents(STRIPED, params, image[None], jax.random.key(0), labels=[bad])
        with pytest.raises(GGLError, match="allowed: 0 to 1"):
            samples(STRIPED, params, jax.random.key(0), 1, labels=[bad])


def test_model_and_prior_must_count_the_same_classes(tiny_model):
    small = dataclasses.replace(BIGGAN_DEEP[128], channel_width=8, num_classes=10)
    assert biggan_deep(small).num_classes == 10
    with pytest.raises(GGLError, match=r"has 3 classes, prior striped 2; .*--num-classes"):
        attack_of("ggl", tiny_model, STRIPED)
    attack_of("ggl", tiny_model, STRIPED._replace(num_classes=3))
    attack_of("ggl", tiny_model, STRIPED._replace(num_classes=None))


def test_score_prior_scores_each_image_within_its_class(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    arguments = {"width": 2, "latent_dim": 4, "num_classes": 2}
    prior = dcgan(**arguments)
    params = prior.init(jax.random.key(0))
    card = {"name": "two", "kind": "dcgan", "arguments": arguments, "trained_on": [], "data": []}
    checkpoint.save(tmp_path / "two", params, card)
    images = np.asarray(samples(prior, params, jax.random.key(1), 2))
    labels = np.array([0, 1])
    np.savez(tmp_path / "data.npz", images=np.rint(255 * images).astype(np.uint8), labels=labels)
    command = ["score-prior", "--data", str(tmp_path / "data.npz"), "--indices", "0:2"]
    command += ["--prior", str(tmp_path / "two"), "--steps", "3", "--num-controls", "4"]
    assert run(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    expected = []
    for number in range(2):
        image = np.rint(255 * images[number]).astype(np.uint8) / np.float32(255)
        key = jax.random.fold_in(jax.random.key(0), number)
        found = prior_controls(prior, params, image, number, key, num_samples=4, ceiling_steps=3)
        expected.append(found.scores["psnr_mean_image"])
    assert f"mean image: {np.mean(expected):.2f} dB" in out
    np.savez(tmp_path / "plain.npz", images=np.rint(255 * images).astype(np.uint8))
    command[2] = str(tmp_path / "plain.npz")
    assert run(command) == 2
    assert "has no labels, but prior dcgan makes images of a class" in capsys.readouterr().err
