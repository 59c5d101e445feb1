"""``ggl-jax score-prior``: a prior's ceiling and controls on given images."""

import dataclasses
from pathlib import Path

from ggl_jax.commands._shared import console


@dataclasses.dataclass(frozen=True)
class ScorePriorCommand:
    """Measure how near a prior can come to images: its ceiling, mean image and random samples.

    No gradient is involved. An audit that uses this prior cannot be expected to score above its
    ceiling.
    """

    data: str
    """Images, as for ggl-jax audit."""
    prior: str = "dcgan32_faces"
    """Name of a shipped prior, or a checkpoint folder."""
    indices: str = "held-out"
    """Which images: as for audit, or held-out for those that were kept out of the prior's training
    (--data must then be its first training file)."""
    restarts: int = 4
    """Starting points of each fit."""
    steps: int = 400
    """Steps of each fit."""
    seed: int = 0
    """Seed of the starting points and samples."""


def run(command: ScorePriorCommand, argv: list[str]) -> int:
    """``ggl-jax score-prior``."""
    del argv
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ggl_jax.audit import metrics
    from ggl_jax.audit.data import load
    from ggl_jax.priors import fit_latents, load_prior, samples
    from ggl_jax.priors.wgan_gp import held_out_indices

    prior, params, card = load_prior(command.prior)
    size = prior.image_shape[0]
    if command.indices == "held-out":
        indices = held_out_indices(card, Path(command.data))
        dataset = load(command.data, image_size=size, indices=indices)
    else:
        dataset = load(command.data, image_size=size, indices=command.indices)
    images = jnp.asarray(dataset.images)
    key_fit, key_samples = jax.random.split(jax.random.key(command.seed))
    drawn = samples(prior, params, key_samples, 2048)
    mean_image = drawn.mean(axis=0)
    ceilings = []
    part = 64  # bounds memory; all parts but the last have one shape
    for first in range(0, len(images), part):
        _, _, psnr = fit_latents(
            prior,
            params,
            images[first : first + part],
            jax.random.fold_in(key_fit, first),
            restarts=command.restarts,
            steps=command.steps,
        )
        ceilings.extend(np.asarray(psnr).tolist())
        console.print(f"{len(ceilings)} of {len(images)} images fitted", markup=False)
    scores = {
        "ceiling": ceilings,
        "mean image": [float(metrics.psnr(mean_image, image)) for image in images],
        "random sample": [
            float(jnp.mean(metrics.psnr(drawn[:64], image[None]))) for image in images
        ],
    }
    for name, values in scores.items():
        low, high = metrics.confidence_interval(values)
        console.print(
            f"{name}: {np.mean(values):.2f} dB PSNR, 95 % interval [{low:.2f}, {high:.2f}], lowest "
            f"{min(values):.2f}, {len(values)} images",
            markup=False,
        )
    return 0
