"""Controls: what an adversary who never saw the gradient would have scored.

A generator returns a plausible face whatever the gradient says, so a score alone proves nothing.
Leakage is what exceeds the prior-only controls; the ceiling says how much could be seen at all.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.audit import metrics
from ggl_jax.errors import GGLError
from ggl_jax.priors.ceiling import fit_latents
from ggl_jax.priors.decoding import check_labels, decode_each
from ggl_jax.types import Prior, PyTree


class Controls(NamedTuple):
    """The controls of one private image.

    Attributes:
        scores: {column of the results: float}, PSNR in dB on the [0, 1] scale.

            - `psnr_control_mean`, `psnr_control_best`: mean and highest PSNR of the random samples;
            - `psnr_control_low`, `psnr_control_high`: the central 95 % of the samples' PSNR;
            - `psnr_mean_image`, `ssim_mean_image`: of the prior's mean image;
            - `psnr_ceiling`, `ssim_ceiling`: of the prior's fit to the private image.
        best_sample: [h w c] in [0, 1], the random sample with the highest PSNR. Picking it takes
            the private image, so it flatters a blind guess.
        mean_image: [h w c] in [0, 1].
        ceiling: [h w c] in [0, 1].
    """

    scores: dict[str, float]
    best_sample: np.ndarray
    mean_image: np.ndarray
    ceiling: np.ndarray

    def pictures(self) -> dict[str, np.ndarray]:
        """The images, by the names that their scores have in the results."""
        return {
            "control_best": self.best_sample,
            "mean_image": self.mean_image,
            "ceiling": self.ceiling,
        }


@partial(jax.jit, static_argnames=("prior", "num"))
def _sample(prior: Prior, key, *, num: int):
    return prior.sample_latent(key, num)


@jax.jit
def _score_samples(samples, image):
    """Samples [n h w c] as a reconstruction would be, and their PSNR [n]."""
    samples = jnp.clip(samples, 0.0, 1.0)
    return samples, metrics.psnr(samples, image)


def prior_controls(
    prior: Prior,
    params: PyTree,
    image: jax.Array,
    label: int | jax.Array,
    key: jax.Array,
    *,
    num_samples: int = 400,
    num_mean_samples: int | None = None,
    ceiling_restarts: int = 4,
    ceiling_steps: int = 400,
    ceiling_learning_rate: float = 0.1,
    chunk_size: int = 64,
) -> Controls:
    """Score the prior alone against a private image.

    Audit side only. The result depends on no defense and no attack: compute it once per image.

    - random samples of the prior with the inferred label: what a plausible guess scores;
    - the mean image, the average of many samples: the best blind guess in squared error;
    - the ceiling, the prior fitted to the private image itself (see `fit_latents`; a local search,
      so a lower bound on what the prior can show).

    Args:
        prior: the prior that the attack uses.
        params: its parameters.
        image: private image [h w c], float32 in [0, 1].
        label: its inferred label; unconditional priors ignore it.
        key: typed key.
        num_samples: random samples scored, at least 1.
        num_mean_samples: samples averaged into the mean image, at least 1; the scored ones are
            the first of them. By default 8 * num_samples, at most 2,048.
        ceiling_restarts: starting points of the ceiling's fit, at least 1: the nearest of
            16 * num_samples random samples, at most 4,096.
        ceiling_steps: Adam updates of the ceiling's fit, at least 1.
        ceiling_learning_rate: of the ceiling's fit, above 0.
        chunk_size: samples drawn at a time, at least 1; of a large generator, fewer are decoded
            at a time.

    Returns:
        `Controls`. With NaN in the image all PSNR are NaN.

    Raises:
        GGLError: an image of another shape than the prior's, a label that it does not know, or a
            setting out of its range.
    """
    check_labels(prior, label)
    image = jnp.asarray(image, jnp.float32)
    if image.shape != tuple(prior.image_shape):
        raise GGLError(
            f"controls: image of shape {list(image.shape)}; prior {prior.name} needs "
            f"{list(prior.image_shape)}"
        )
    if num_mean_samples is None:
        num_mean_samples = min(2048, 8 * num_samples)
    for name, value in (
        ("num_samples", num_samples),
        ("num_mean_samples", num_mean_samples),
        ("chunk_size", chunk_size),
    ):
        if value < 1:
            raise GGLError(f"controls: {name}={value} must be at least 1")

    sample_key, fit_key = jax.random.split(key)
    psnrs = np.empty(num_samples, np.float32)
    best, best_sample = -np.inf, None
    total = np.zeros(image.shape, np.float64)
    num = max(num_samples, num_mean_samples)
    for first in range(0, num, chunk_size):
        latents = _sample(prior, jax.random.fold_in(sample_key, first), num=chunk_size)

        def score(samples, start, first=first):
            samples, found = _score_samples(samples, image)
            return first + start, np.asarray(samples), np.asarray(found)

        for start, samples, found in decode_each(
            prior, params, latents[: num - first], label, score
        ):
            averaged = samples[: max(0, num_mean_samples - start)]
            total += averaged.sum(axis=0, dtype=np.float64)
            found = found[: max(0, num_samples - start)]
            psnrs[start : start + len(found)] = found
            if best_sample is None or found.max(initial=-np.inf) > best:
                best, best_sample = found.max(), samples[found.argmax()]
    mean_image = (total / num_mean_samples).astype(np.float32)
    _, fitted, _ = fit_latents(
        prior,
        params,
        image[None],
        fit_key,
        restarts=ceiling_restarts,
        steps=ceiling_steps,
        learning_rate=ceiling_learning_rate,
        num_candidates=max(ceiling_restarts, min(4096, 16 * num_samples)),
        labels=jnp.reshape(label, (1,)),
    )
    ceiling = np.clip(fitted[0], 0.0, 1.0)
    # no interpolation: a PSNR may be infinite
    low, high = np.percentile(psnrs, [2.5, 97.5], method="nearest")
    scores = {
        "psnr_control_mean": psnrs.mean(),
        "psnr_control_best": psnrs.max(),
        "psnr_control_low": low,
        "psnr_control_high": high,
        "psnr_mean_image": metrics.psnr(jnp.asarray(mean_image), image),
        "ssim_mean_image": metrics.ssim(jnp.asarray(mean_image), image),
        "psnr_ceiling": metrics.psnr(jnp.asarray(ceiling), image),
        "ssim_ceiling": metrics.ssim(jnp.asarray(ceiling), image),
    }
    assert best_sample is not None
    return Controls(
        {name: float(value) for name, value in scores.items()}, best_sample, mean_image, ceiling
    )
