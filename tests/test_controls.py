"""The controls on priors whose samples, mean and reach are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggl_jax.audit import controls as audit_controls
from ggl_jax.audit import metrics
from ggl_jax.audit.controls import batch_controls, prior_controls, read_controls, write_controls
from ggl_jax.errors import GGLError
from ggl_jax.images import assign
from ggl_jax.types import Prior

SHAPE = (12, 12, 3)
CHEAP = {"ceiling_steps": 20, "ceiling_restarts": 2}


def grey_prior():
    """A grey picture as bright as its latent; class 1 shows the negative, without red."""

    def apply(params, latents, labels):
        level = jnp.where(labels[:, None] == 1, 1.0 - latents, latents) * params
        red = jnp.where(labels == 1, 0.0, 1.0)
        tint = jnp.stack([red, jnp.ones_like(red), jnp.ones_like(red)], axis=-1)
        picture = jnp.broadcast_to(level[:, :, None, None], (len(latents), *SHAPE))
        return picture * tint[:, None, None]

    def sample_latent(key, num):
        # Beta(1, 3), of mean 1/4, by inverting its distribution function
        return 1.0 - jax.random.uniform(key, (num, 1)) ** (1 / 3)

    return Prior(lambda key: jnp.ones(()), apply, sample_latent, 1, SHAPE, "grey")


# one for all tests: compiled programs are kept by prior
GREY = grey_prior()


@pytest.fixture(scope="module")
def grey():
    # half dark, half light: the best grey is 0.6, at a PSNR of -20 log10(0.2)
    image = np.full(SHAPE, 0.4, np.float32)
    image[6:] = 0.8
    controls = {
        label: prior_controls(GREY, jnp.ones(()), image, label, jax.random.key(3), **CHEAP)
        for label in (0, 1)
    }
    return image, controls


def test_random_samples(grey):
    image, controls = grey
    # the same law, sampled by NumPy: levels from Beta(1, 3)
    level = np.random.default_rng(0).beta(1, 3, 200_000)
    psnr = -10 * np.log10(0.5 * (level - 0.4) ** 2 + 0.5 * (level - 0.8) ** 2)
    scores = controls[0].scores
    assert abs(scores["psnr_control_mean"] - psnr.mean()) < 4 * psnr.std() / 20
    low, high = np.percentile(psnr, [2.5, 97.5])
    assert abs(scores["psnr_control_low"] - low) < 0.3
    assert abs(scores["psnr_control_high"] - high) < 0.5
    # with 400 samples one comes near the best grey
    assert 13.7 < scores["psnr_control_best"] <= 13.98
    np.testing.assert_allclose(
        metrics.psnr(controls[0].best_sample, image), scores["psnr_control_best"], rtol=1e-5
    )


def test_mean_image_is_the_mean_of_the_class(grey):
    image, controls = grey
    error = np.sqrt(3 / 80 / 2048)  # of the mean of 2,048 draws from Beta(1, 3)
    for label, mean, red in ((0, 0.25, 0.25), (1, 0.75, 0.0)):
        found = controls[label].mean_image
        assert found.shape == SHAPE
        assert np.ptp(found[..., 1:]) < 1e-6
        assert abs(found[..., 1:].mean() - mean) < 4 * error
        assert np.abs(found[..., 0] - red).max() < 4 * error
        np.testing.assert_allclose(
            controls[label].scores["psnr_mean_image"], metrics.psnr(found, image), rtol=1e-5
        )
        np.testing.assert_allclose(
            controls[label].scores["ssim_mean_image"], metrics.ssim(found, image), atol=1e-6
        )


def test_ceiling_is_the_priors_reach(grey):
    image, controls = grey
    # class 0 comes to 0.6 everywhere; class 1 has no red, which costs (0.4**2 + 0.8**2) / 2
    for label, red, mse in ((0, 0.6, 0.04), (1, 0.0, (2 * 0.04 + 0.4) / 3)):
        found = controls[label]
        np.testing.assert_allclose(found.ceiling[..., 1:], 0.6, atol=0.01)
        np.testing.assert_allclose(found.ceiling[..., 0], red, atol=0.01)
        np.testing.assert_allclose(found.scores["psnr_ceiling"], -10 * np.log10(mse), atol=0.01)
        np.testing.assert_allclose(
            found.scores["ssim_ceiling"], metrics.ssim(found.ceiling, image), atol=1e-6
        )
        assert found.scores["psnr_ceiling"] >= found.scores["psnr_control_best"] - 1e-3


def test_columns_and_images(grey):
    image, controls = grey
    for found in controls.values():
        assert set(found.scores) == {
            "psnr_control_mean",
            "psnr_control_best",
            "psnr_control_low",
            "psnr_control_high",
            "psnr_mean_image",
            "ssim_mean_image",
            "psnr_ceiling",
            "ssim_ceiling",
        }
        assert all(type(value) is float for value in found.scores.values())
        for picture in (found.best_sample, found.mean_image, found.ceiling):
            assert picture.shape == image.shape
            assert isinstance(picture, np.ndarray)
            assert picture.min() >= 0
            assert picture.max() <= 1


def test_chunks_that_do_not_divide_and_single_samples():
    image = np.full(SHAPE, 0.5, np.float32)
    one = prior_controls(
        GREY,
        jnp.ones(()),
        image,
        0,
        jax.random.key(0),
        num_samples=1,
        num_mean_samples=1,
        chunk_size=3,
        **CHEAP,
    )
    # the mean of one sample is that sample
    np.testing.assert_allclose(one.mean_image, one.best_sample, rtol=1e-6)
    assert one.scores["psnr_control_mean"] == one.scores["psnr_control_best"]
    # 7 samples in chunks of 3: those of the first chunks are the same, none is counted twice
    several = [
        prior_controls(
            GREY,
            jnp.ones(()),
            image,
            0,
            jax.random.key(0),
            num_samples=num,
            num_mean_samples=num,
            chunk_size=3,
            **CHEAP,
        )
        for num in (6, 7)
    ]
    six, seven = (7 * c.mean_image if i else 6 * c.mean_image for i, c in enumerate(several))
    added = (seven - six)[0, 0, 0]
    psnr_added = -20 * np.log10(abs(added - 0.5))
    means = [c.scores["psnr_control_mean"] for c in several]
    np.testing.assert_allclose(7 * means[1] - 6 * means[0], psnr_added, rtol=1e-3)


def test_no_sample_is_drawn_twice():
    found = prior_controls(
        GREY,
        jnp.ones(()),
        np.zeros(SHAPE, np.float32),
        0,
        jax.random.key(0),
        num_samples=6,
        num_mean_samples=6,
        chunk_size=3,
        **CHEAP,
    )
    # against black, a grey's PSNR tells its level: were both chunks the same, the mean of six
    # levels would be the mean of the first three
    first = prior_controls(
        GREY,
        jnp.ones(()),
        np.zeros(SHAPE, np.float32),
        0,
        jax.random.key(0),
        num_samples=3,
        num_mean_samples=3,
        chunk_size=3,
        **CHEAP,
    )
    assert abs(found.mean_image.mean() - first.mean_image.mean()) > 1e-3
    assert abs(found.scores["psnr_control_mean"] - first.scores["psnr_control_mean"]) > 1e-3


def test_the_key_decides(grey):
    image = grey[0]
    again, other = (
        prior_controls(GREY, jnp.ones(()), image, 0, jax.random.key(seed), **CHEAP)
        for seed in (3, 4)
    )
    assert again.scores == grey[1][0].scores
    assert other.scores["psnr_control_mean"] != again.scores["psnr_control_mean"]


def test_samples_are_clipped_as_reconstructions_are():
    bright = prior_controls(
        GREY,
        jnp.full((), 100.0, jnp.float32),
        np.ones(SHAPE, np.float32),
        0,
        jax.random.key(0),
        num_samples=50,
        num_mean_samples=50,
        **CHEAP,
    )
    assert bright.best_sample.max() == 1
    assert bright.mean_image.max() <= 1
    # an exact match is infinite, and so is the range's upper end, not NaN
    assert bright.scores["psnr_control_best"] == np.inf
    assert bright.scores["psnr_control_high"] == np.inf


def test_nan_is_not_hidden():
    image = np.full(SHAPE, np.nan, np.float32)
    found = prior_controls(GREY, jnp.ones(()), image, 0, jax.random.key(0), **CHEAP)
    for name, value in found.scores.items():
        assert np.isnan(value), name


@pytest.mark.parametrize(
    ("options", "shape", "match"),
    [
        ({}, (8, 8, 3), r"image of shape \[8, 8, 3\]; prior grey needs \[12, 12, 3\]"),
        ({}, (1, *SHAPE), "image of shape"),
        ({"num_samples": 0}, SHAPE, "num_samples: got 0"),
        ({"num_mean_samples": 0}, SHAPE, "num_mean_samples: got 0"),
        ({"chunk_size": 0}, SHAPE, "chunk_size: got 0"),
        ({"ceiling_steps": 0}, SHAPE, "steps: got 0"),
    ],
)
def test_bad_settings(options, shape, match):
    with pytest.raises(GGLError, match=match):
        prior_controls(GREY, jnp.ones(()), np.zeros(shape), 0, jax.random.key(0), **options)


# --- batches ------------------------------------------------------------------------------------


def spotted_prior():
    """Three grey squares side by side; class 1 is darker, class 2 the darkest."""

    def apply(params, latents, labels):
        levels = jax.nn.sigmoid(latents) / (1.0 + labels[:, None])
        return jnp.broadcast_to(
            jnp.repeat(levels, 4, axis=1)[:, None, :, None], (len(latents), *SHAPE)
        )

    normal = jax.random.normal
    return Prior(
        lambda key: {}, apply, lambda key, num: normal(key, (num, 3)), 3, SHAPE, "spotted", 3
    )


SPOTTED = spotted_prior()


def draw_batch(key, labels):
    return SPOTTED.apply({}, SPOTTED.sample_latent(key, len(labels)), labels)


@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_random_samples_gain_nothing_at_any_batch_size(size, monkeypatch):
    """A pure guess, judged as the audit judges (in the private images' order), gains 0."""
    # The ceiling is not at stake here, and takes most of the time.
    fit = lambda prior, params, images, key, **_: (None, images, None)  # noqa: E731
    monkeypatch.setattr(audit_controls, "fit_latents", fit)
    options = {"num_samples": 60, "num_mean_samples": 60}
    labels = jnp.zeros(size, jnp.int32)
    gains, alone = [], []
    for number in range(10):
        keys = jax.random.split(jax.random.key(number), 3)
        images = np.asarray(draw_batch(keys[0], labels))
        controls = batch_controls(SPOTTED, {}, images, labels, keys[1], **options)
        single = prior_controls(SPOTTED, {}, images[0], 0, keys[1], **options).scores
        guesses = draw_batch(keys[2], jnp.zeros(60 * size, jnp.int32))
        guesses = np.asarray(guesses).reshape(60, size, *SHAPE)
        ordered = np.stack([guess[assign(guess, images)] for guess in guesses])
        found = np.asarray(metrics.psnr(ordered, images))
        gains.append(np.mean(found - [c.scores["psnr_control_mean"] for c in controls]))
        alone.append(np.mean(found[:, 0]) - single["psnr_control_mean"])
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    assert error < 0.25
    assert abs(np.mean(gains)) < 3.5 * error
    # Without the help, the order alone would count as a leak.
    biased = np.mean(alone) > 5 * np.std(alone, ddof=1) / np.sqrt(len(alone))
    assert biased == (size > 1)


def test_classes_of_a_batch_are_put_in_order_too():
    # The labels are right as multisets; their order is not known.
    labels = np.asarray([2, 0, 1, 0])
    images = draw_batch(jax.random.key(0), jnp.asarray([0, 0, 1, 2]))
    found = batch_controls(SPOTTED, {}, images, labels, jax.random.key(1), **CHEAP)
    assert [control.label for control in found] == [2, 0, 1, 0]
    means = np.asarray([control.mean_image.mean() for control in found])
    # sigmoid of a normal variable has mean 1/2; the two of class 0 share their mean image
    np.testing.assert_allclose(means, [1 / 2, 1 / 2, 1 / 4, 1 / 6], atol=0.02)
    np.testing.assert_array_equal(found[0].mean_image, found[1].mean_image)
    for image, control in zip(images, found, strict=True):
        for name, picture in control.pictures().items():
            known = control.scores[f"psnr_{name}"]
            np.testing.assert_allclose(metrics.psnr(picture, image), known, rtol=1e-4)


def test_controls_are_kept_whole(tmp_path, grey):
    image, controls = grey
    write_controls(tmp_path / "c.npz", controls[1], image)
    found, original = read_controls(tmp_path / "c.npz")
    np.testing.assert_array_equal(original, image)
    assert found.scores == controls[1].scores
    assert found.label == 1
    for name, picture in controls[1].pictures().items():
        np.testing.assert_array_equal(found.pictures()[name], picture)
