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
def _score_samples(prior: Prior, params, key, label, image, *, num: int):
    """`num` random samples [num h w c] and their PSNR [num]."""
    latents = prior.sample_latent(key, num)
    samples = prior.apply(params, latents, jnp.full((num,), label, jnp.int32))
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
    num_mean_samples: int = 2048,
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
            the first of them.
        ceiling_restarts: starting points of the ceiling's fit, at least 1.
        ceiling_steps: Adam updates of the ceiling's fit, at least 1.
        ceiling_learning_rate: of the ceiling's fit, above 0.
        chunk_size: samples decoded at a time, at least 1; bounds the memory.

    Returns:
        `Controls`. With NaN in the image all PSNR are NaN.

    Raises:
        GGLError: an image of another shape than the prior's, or a setting out of its range.
    """
    image = jnp.asarray(image, jnp.float32)
    if image.shape != tuple(prior.image_shape):
        raise GGLError(
            f"controls: image of shape {list(image.shape)}; prior {prior.name} needs "
            f"{list(prior.image_shape)}"
        )
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
    for start in range(0, max(num_samples, num_mean_samples), chunk_size):
        # whole chunks only, so that nothing is compiled twice; what is too much is dropped
        samples, chunk = _score_samples(
            prior, params, jax.random.fold_in(sample_key, start), label, image, num=chunk_size
        )
        averaged = np.asarray(samples[: max(0, num_mean_samples - start)], np.float64)
        total += averaged.sum(axis=0)
        chunk = np.asarray(chunk)[: max(0, num_samples - start)]
        psnrs[start : start + len(chunk)] = chunk
        if best_sample is None or chunk.max(initial=-np.inf) > best:
            best, best_sample = chunk.max(), np.asarray(samples[chunk.argmax()])
    mean_image = (total / num_mean_samples).astype(np.float32)
    _, fitted, _ = fit_latents(
        prior,
        params,
        image[None],
        fit_key,
        restarts=ceiling_restarts,
        steps=ceiling_steps,
        learning_rate=ceiling_learning_rate,
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
