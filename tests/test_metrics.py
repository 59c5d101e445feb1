"""Metrics against scikit-image, SciPy and closed forms."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ggl_jax.audit import metrics
from ggl_jax.client import models


def pair(seed, shape, spread=0.2):
    """An image and a noisy copy, both in [0, 1]."""
    rng = np.random.default_rng(seed)
    original = rng.random(shape, np.float32)
    noisy = original + spread * rng.standard_normal(shape, np.float32)
    return np.clip(noisy, 0, 1).astype(np.float32), original


def reference_ssim(x, y):
    return structural_similarity(
        x.astype(np.float64),
        y.astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=-1,
    )


@pytest.mark.parametrize("offset", [0.5, 0.1, 0.003])
def test_a_constant_offset_has_a_closed_form(offset):
    original = jnp.full((6, 7, 3), 0.25)
    shifted = original + offset
    np.testing.assert_allclose(metrics.mse(shifted, original), offset**2, rtol=1e-4)
    np.testing.assert_allclose(metrics.psnr(shifted, original), -20 * math.log10(offset), atol=1e-3)
    np.testing.assert_allclose(metrics.mse_i(shifted, original), 4 * offset**2, rtol=1e-4)
    np.testing.assert_allclose(
        metrics.psnr_paper(shifted, original), -20 * math.log10(2 * offset), atol=1e-3
    )


def test_psnr_is_scikit_images_and_the_papers_is_6_db_lower():
    x, y = pair(0, (16, 20, 3))
    expected = peak_signal_noise_ratio(y.astype(np.float64), x.astype(np.float64), data_range=1.0)
    np.testing.assert_allclose(metrics.psnr(x, y), expected, atol=1e-4)
    # the paper's scale, by hand: images on [-1, 1], peak 1
    signed = np.mean(((2.0 * x - 1.0) - (2.0 * y - 1.0)) ** 2, dtype=np.float64)
    np.testing.assert_allclose(metrics.mse_i(x, y), signed, rtol=1e-5)
    np.testing.assert_allclose(metrics.psnr_paper(x, y), -10 * np.log10(signed), atol=1e-4)
    np.testing.assert_allclose(metrics.psnr(x, y) - metrics.psnr_paper(x, y), 6.0206, atol=1e-3)


@pytest.mark.parametrize("shape", [(11, 11, 3), (32, 32, 3), (40, 17, 3), (32, 32, 1)])
@pytest.mark.parametrize("spread", [0.01, 0.3])
def test_ssim_is_scikit_images(shape, spread):
    x, y = pair(1, shape, spread)
    # float32 against float64: 9e-7 as users run it, 1.1e-6 in the tests' less optimised programs
    np.testing.assert_allclose(metrics.ssim(x, y), reference_ssim(x, y), atol=3e-6)


def test_ssim_of_flat_and_smooth_images():
    # where the variances vanish, float32 cancellation would show
    ramp = np.linspace(0.9, 1.0, 32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)
    flat = np.full((32, 32, 3), 0.95, np.float32)
    for x, y in ((flat, flat), (ramp, flat), (ramp, ramp[::-1]), (flat, np.zeros_like(flat))):
        np.testing.assert_allclose(metrics.ssim(x, y), reference_ssim(x, y), atol=1e-5)
    # constants a and b: only the luminance term is left
    a, b, c1 = 0.25, 0.75, 1e-4
    constants = metrics.ssim(jnp.full((16, 16, 3), a), jnp.full((16, 16, 3), b))
    np.testing.assert_allclose(constants, (2 * a * b + c1) / (a * a + b * b + c1), rtol=1e-5)


def test_ssim_needs_room_for_its_window():
    x, y = pair(2, (10, 32, 3))
    assert np.isnan(metrics.ssim(x, y))
    assert np.isnan(metrics.ssim(x[None], y[None])).all()


def test_identical_images():
    x = jnp.asarray(pair(3, (16, 16, 3))[0])
    assert metrics.mse(x, x) == 0
    assert metrics.psnr(x, x) == math.inf
    assert metrics.psnr_paper(x, x) == math.inf
    np.testing.assert_allclose(metrics.ssim(x, x), 1, atol=1e-6)


FULL = ("mse", "psnr", "mse_i", "psnr_paper", "ssim")


@pytest.mark.parametrize("name", FULL)
def test_batches_jit_and_nan(name):
    metric = getattr(metrics, name)
    x, y = pair(4, (3, 2, 16, 16, 3))
    scores = metric(x, y)
    assert scores.shape == (3, 2)
    single = np.array([[metric(x[i, j], y[i, j]) for j in range(2)] for i in range(3)])
    np.testing.assert_allclose(scores, single, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(metric)(x, y), scores, rtol=1e-4)
    # one reconstruction against many
    np.testing.assert_allclose(metric(x[0], y[0, 0]), metric(x[0], y[:1, 0]), rtol=1e-5)
    np.testing.assert_allclose(metric(x, y), metric(y, x), rtol=1e-5)
    x[1, 0, 8, 8, 0] = np.nan
    np.testing.assert_array_equal(
        np.isnan(metric(x, y)), [[False, False], [True, False], [False, False]]
    )


def test_mse_r_compares_the_input_of_the_last_layer(tiny_model, tiny_variables, tiny_images):
    original, other = tiny_images[0], tiny_images[1]
    score = metrics.mse_r(other, original, tiny_model, tiny_variables)
    assert score.shape == ()
    # the features by another way: they are what the last layer's kernel is applied to
    head = tiny_variables["params"]
    for name in tiny_model.head:
        head = head[name]
    logits, features = tiny_model.apply(tiny_variables, jnp.stack([original, other]))
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, rtol=1e-4)
    np.testing.assert_allclose(score, np.mean((features[0] - features[1]) ** 2), rtol=1e-5)
    assert score > 0
    batch = metrics.mse_r(tiny_images[::-1], tiny_images, tiny_model, tiny_variables)
    np.testing.assert_allclose(batch, [score, score], rtol=1e-5)
    assert metrics.mse_r(original, original, tiny_model, tiny_variables) == 0


@pytest.mark.parametrize(
    ("inferred", "true", "expected"),
    [
        ([1], [1], 1),
        ([0], [1], 0),
        (3, 3, 1),
        ([2, 0, 1], [0, 1, 2], 1),  # order does not count
        ([1, 1, 1, 1], [1, 1, 0, 0], 0.5),  # repetitions do
        ([0, 0, 1], [0, 1, 1], 2 / 3),
        ([5, 5], [5, 5], 1),
        ([5], [5, 5], 0.5),
        ([5, 5, 5], [5], 1),
    ],
)
def test_label_accuracy(inferred, true, expected):
    inferred, true = jnp.asarray(inferred), jnp.asarray(true)
    np.testing.assert_allclose(metrics.label_accuracy(inferred, true), expected)
    np.testing.assert_allclose(jax.jit(metrics.label_accuracy)(inferred, true), expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=6), st.integers(0, 2**31))
def test_label_accuracy_is_the_multisets_intersection(true, seed):
    inferred = np.random.default_rng(seed).integers(0, 5, 6)
    left = list(inferred)
    hits = 0
    for label in true:
        if label in left:
            left.remove(label)
            hits += 1
    np.testing.assert_allclose(
        metrics.label_accuracy(jnp.asarray(inferred), jnp.asarray(true)), hits / 6, rtol=1e-6
    )


def test_registry_gives_one_score_per_image(tiny_model, tiny_variables, tiny_images):
    assert {"psnr", "ssim", "mse_i", "mse_r"} <= set(metrics.METRICS)
    noisy = jnp.clip(tiny_images + 0.1, 0, 1)
    for name, metric in metrics.METRICS.items():
        one = metric(noisy[0], tiny_images[0], tiny_model, tiny_variables)
        both = metric(noisy, tiny_images, tiny_model, tiny_variables)
        assert one.shape == (), name
        assert both.shape == (2,), name
        np.testing.assert_allclose(one, both[0], rtol=1e-5)
    np.testing.assert_allclose(
        metrics.METRICS["psnr"](noisy, tiny_images, tiny_model, tiny_variables),
        metrics.psnr(noisy, tiny_images),
    )


def test_confidence_interval_is_students():
    values = [1.0, 2.5, 0.3, 4.1, 2.2]
    expected = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
    np.testing.assert_allclose(metrics.confidence_interval(values), expected, rtol=1e-9)
    assert metrics.confidence_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_confidence_interval_covers_the_mean_as_often_as_it_says():
    # 2,000 samples of 4 normal values: the share that covers 0 has a standard error of 0.5 %
    samples = np.random.default_rng(0).standard_normal((2000, 4))
    intervals = np.array([metrics.confidence_interval(sample) for sample in samples])
    covered = np.mean((intervals[:, 0] < 0) & (intervals[:, 1] > 0))
    assert abs(covered - 0.95) < 0.02


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval(values):
    assert all(math.isnan(bound) for bound in metrics.confidence_interval(values))


def test_an_image_is_told_by_its_own_batch_statistics():
    # Of ever less contrast: one by one they have the same features, as a batch they have not.
    model = models.get_model("convnet:width=4,batch_norm=train", 2, (8, 8, 3))
    variables = model.init(jax.random.key(0))
    original, *others = jax.random.uniform(jax.random.key(1), (6, 8, 8, 3))
    others = 0.5 + 0.02 * (jnp.stack(others) - 0.5)
    found = metrics.identification_ranks(original, original, others, model, variables)
    assert found == {"rank_pixels": 1, "rank_features": 1}


def test_identification_ranks(tiny_model, tiny_variables):
    images = jax.random.uniform(jax.random.key(0), (6, 8, 8, 3))
    truth, others = images[0], images[1:]
    ranks = partial(
        metrics.identification_ranks, others=others, model=tiny_model, variables=tiny_variables
    )
    assert ranks(truth, truth) == {"rank_pixels": 1, "rank_features": 1}
    # A reconstruction that is another suspect.
    ranked = ranks(others[2], truth)
    assert ranked["rank_pixels"] >= 2
    assert ranked["rank_features"] >= 2
    # Further from the truth than from any other: last.
    copies = jnp.broadcast_to(others[0], others.shape)
    last = metrics.identification_ranks(others[0], truth, copies, tiny_model, tiny_variables)
    assert last == {"rank_pixels": 6, "rank_features": 6}
    assert ranks(truth * jnp.nan, truth) == {"rank_pixels": 6, "rank_features": 6}
    # Ties count against the attack.
    twins = jnp.broadcast_to(truth, others.shape)
    assert metrics.identification_ranks(truth, truth, twins, tiny_model, tiny_variables) == {
        "rank_pixels": 6,
        "rank_features": 6,
    }
