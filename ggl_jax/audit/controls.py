"""Controls: what an adversary who never saw the gradient would have scored.

A generator returns a plausible face whatever the gradient says, so a score alone proves nothing.
Leakage is what exceeds the prior-only controls; the ceiling says how much could be seen at all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import files
from ggl_jax.audit import metrics
from ggl_jax.errors import GGLError, explaining
from ggl_jax.grammar import at_least
from ggl_jax.images import assign
from ggl_jax.priors.ceiling import fit_latents
from ggl_jax.priors.decoding import check_labels, decode_each, draw
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
        label: the class that the prior was asked for.
    """

    scores: dict[str, float]
    best_sample: np.ndarray
    mean_image: np.ndarray
    ceiling: np.ndarray
    label: int

    def pictures(self) -> dict[str, np.ndarray]:
        """The images, by the names that their scores have in the results."""
        return {
            "control_best": self.best_sample,
            "mean_image": self.mean_image,
            "ceiling": self.ceiling,
        }


_psnr = jax.jit(metrics.psnr)


def batch_controls(
    prior: Prior,
    params: PyTree,
    images: jax.Array,
    labels: Sequence[int] | jax.Array,
    key: jax.Array,
    *,
    num_samples: int = 400,
    num_mean_samples: int | None = None,
    ceiling_restarts: int = 4,
    ceiling_steps: int = 400,
    chunk_size: int = 64,
) -> list[Controls]:
    """Score the prior alone against the private images of one update.

    Audit side only. The result depends on no defense and no attack but for the labels of a
    class-conditional prior: compute it once for each batch, and each choice of labels.

    - random samples of the prior: what a plausible guess scores. An update does not tell the order
      of its images, so a reconstructed batch is put in order by the private images; each random
      batch gets the same help (`ggl_jax.images.assign`), and then gains nothing on average;
    - the mean image, the average of many samples: the best blind guess in squared error. Those of
      several classes are put in order, too;
    - the ceiling, the prior fitted to each private image itself (see `fit_latents`; a local
      search, so a lower bound on what the prior can show).

    Args:
        prior: the prior that the attack uses.
        params: its parameters.
        images: private images [b h w c], float32 in [0, 1], b >= 1.
        labels: int [b], the labels that the attack used; unconditional priors ignore them.
        key: typed key.
        num_samples: random batches scored, at least 1.
        num_mean_samples: samples averaged into the mean image, at least 1; the scored ones are
            the first of them. By default 8 * num_samples, at most 2,048.
        ceiling_restarts: starting points of the ceiling's fit, at least 1: the nearest of
            16 * num_samples random samples, at most 4,096.
        ceiling_steps: Adam updates of the ceiling's fit, at least 1.
        chunk_size: samples drawn at a time, at least 1 (rounded up to whole batches); of a large
            generator, fewer are decoded at a time.

    Returns:
        `Controls` of each image. With NaN in a single image all PSNR are NaN.

    Raises:
        GGLError: images of another shape than the prior's, a label that it does not know, or a
            setting out of its range.
    """
    images = jnp.asarray(images, jnp.float32)
    classes = np.broadcast_to(np.asarray(labels, np.int32), images.shape[:1])
    check_labels(prior, classes)
    if images.shape[1:] != tuple(prior.image_shape):
        raise GGLError(
            f"controls: image of shape {list(images.shape[1:])}; prior {prior.name} needs "
            f"{list(prior.image_shape)}"
        )
    if num_mean_samples is None:
        num_mean_samples = min(2048, 8 * num_samples)
    at_least(1, num_samples=num_samples, num_mean_samples=num_mean_samples, chunk_size=chunk_size)
    size = len(images)
    # Places of one class share their mean image.
    alike = (classes[:, None] == classes) | (prior.num_classes is None)
    mean_rounds = -(-num_mean_samples // alike.sum(axis=1).min())
    sample_key, fit_key = jax.random.split(key)
    chunk = size * -(-chunk_size // size)
    psnrs, best, totals = _guesses(
        prior, params, images, classes, sample_key, chunk, num_samples, mean_rounds
    )
    means = np.tensordot(alike / alike.sum(axis=1, keepdims=True), totals / mean_rounds, 1)
    means = means.astype(np.float32)
    if not alike.all():
        means = _in_order(means, images)
    _, fitted, _ = fit_latents(
        prior,
        params,
        images,
        fit_key,
        restarts=ceiling_restarts,
        steps=ceiling_steps,
        num_candidates=max(ceiling_restarts, min(4096, 16 * num_samples)),
        labels=jnp.asarray(classes),
    )
    ceilings = np.clip(fitted, 0.0, 1.0)
    # no interpolation: a PSNR may be infinite
    low, high = np.percentile(psnrs, [2.5, 97.5], axis=0, method="nearest")
    scores = {
        "psnr_control_mean": psnrs.mean(axis=0),
        "psnr_control_best": psnrs.max(axis=0),
        "psnr_control_low": low,
        "psnr_control_high": high,
        "psnr_mean_image": metrics.psnr(jnp.asarray(means), images),
        "ssim_mean_image": metrics.ssim(jnp.asarray(means), images),
        "psnr_ceiling": metrics.psnr(jnp.asarray(ceilings), images),
        "ssim_ceiling": metrics.ssim(jnp.asarray(ceilings), images),
    }
    controls = []
    for place, sample in enumerate(best):
        own = {name: float(values[place]) for name, values in scores.items()}
        controls.append(Controls(own, sample, means[place], ceilings[place], int(classes[place])))
    return controls


def _guesses(prior, params, images, classes, key, chunk, num_samples, mean_rounds):
    """Of random batches [b h w c]: PSNRs [n b], the best of each place, the sum of the first ones.

    ``n`` is ``num_samples``, and ``mean_rounds`` batches are added up.
    """
    size = len(images)
    num = size * max(num_samples, mean_rounds)
    psnrs = np.empty((num_samples, size), np.float32)
    best, totals = np.empty(images.shape, np.float32), np.zeros(images.shape, np.float64)
    places = np.arange(size)
    for first in range(0, num, chunk):
        latents = draw(prior, jax.random.fold_in(key, first), num=chunk)[: num - first]
        labels = jnp.asarray(np.resize(classes, len(latents)))
        drawn = np.concatenate(
            decode_each(prior, params, latents, labels, lambda x: np.clip(x, 0.0, 1.0))
        ).reshape(-1, *images.shape)
        done = first // size
        totals += drawn[: max(0, mean_rounds - done)].sum(axis=0, dtype=np.float64)
        drawn = drawn[: max(0, num_samples - done)]
        if not len(drawn):
            continue
        ordered = np.stack([_in_order(batch, images) for batch in drawn])
        found = np.asarray(_psnr(ordered, images))
        at = found.argmax(axis=0)
        better = found[at, places] > psnrs[:done].max(axis=0, initial=-np.inf)
        better |= not done  # so that NaN has a picture, too
        best[better] = ordered[at, places][better]
        psnrs[done : done + len(found)] = found
    return psnrs, best, totals


def _in_order(batch: np.ndarray, images: jax.Array) -> np.ndarray:
    """A batch [b h w c] in the order of the private images, as the audit orders an attack's."""
    return batch if len(batch) == 1 else batch[assign(jnp.asarray(batch), images)]


def prior_controls(
    prior: Prior,
    params: PyTree,
    image: jax.Array,
    label: int | jax.Array,
    key: jax.Array,
    **options,
) -> Controls:
    """:func:`batch_controls` of a single image [h w c] with its label."""
    image = jnp.asarray(image, jnp.float32)
    return batch_controls(prior, params, image[None], jnp.reshape(label, (1,)), key, **options)[0]


def write_controls(path: Path, controls: Controls, original: np.ndarray) -> None:
    """Keep an image's controls, and the private image [h w c], in one ``.npz`` file.

    Raises:
        StorageError: the disk is full or not writable.
    """
    content: dict[str, Any] = controls._asdict() | {"original": original}
    content["scores"] = np.asarray(json.dumps(controls.scores))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_by(path, lambda file: np.savez_compressed(file, **content))


def read_controls(path: Path) -> tuple[Controls, np.ndarray]:
    """What :func:`write_controls` kept.

    Raises:
        GGLError: the file is missing or damaged.
    """
    damaged = explaining(f"{path} is missing or damaged", "remove it; only pictures are lost")
    with damaged, np.load(path, allow_pickle=False) as stored:
        best, mean, ceiling = (stored[name] for name in ("best_sample", "mean_image", "ceiling"))
        scores, label = json.loads(str(stored["scores"])), int(stored["label"])
        return Controls(scores, best, mean, ceiling, label), stored["original"]
