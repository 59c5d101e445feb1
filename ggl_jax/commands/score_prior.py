"""``ggl-jax score-prior``: a prior's ceiling and controls on given images."""

import dataclasses
from pathlib import Path

from ggl_jax.commands._shared import console
from ggl_jax.errors import GGLError


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
    num_controls: int = 400
    """Random samples of each image's class, for a class-conditional prior; see ggl-jax audit."""
    seed: int = 0
    """Seed of the starting points and samples."""


def run(command: ScorePriorCommand, argv: list[str]) -> int:
    """``ggl-jax score-prior``."""
    del argv
    import jax.numpy as jnp
    import numpy as np

    from ggl_jax.audit import metrics
    from ggl_jax.audit.data import load
    from ggl_jax.priors import load_prior
    from ggl_jax.priors.holdout import held_out_indices

    prior, params, card = load_prior(command.prior)
    size = prior.image_shape[0]
    if command.indices == "held-out":
        indices = held_out_indices(card, Path(command.data))
        dataset = load(command.data, image_size=size, indices=indices)
    else:
        dataset = load(command.data, image_size=size, indices=command.indices)
    if prior.num_classes is None:
        scores = _scores(prior, params, jnp.asarray(dataset.images), command)
    else:
        scores = _class_scores(prior, params, dataset, command)
    for name, values in scores.items():
        low, high = metrics.confidence_interval(values)
        console.print(
            f"{name}: {np.mean(values):.2f} dB PSNR, 95 % interval [{low:.2f}, {high:.2f}], lowest "
            f"{min(values):.2f}, {len(values)} images",
            markup=False,
        )
    return 0


def _scores(prior, params, images, command: ScorePriorCommand) -> dict[str, list[float]]:
    """PSNR of each image, from samples that all images share."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ggl_jax.audit import metrics
    from ggl_jax.priors import fit_latents, samples

    key_fit, key_samples = jax.random.split(jax.random.key(command.seed))
    drawn = samples(prior, params, key_samples, 2048)
    mean_image = drawn.mean(axis=0)
    ceilings: list[float] = []
    part = 64  # all parts but the last have one shape
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
    return {
        "ceiling": ceilings,
        "mean image": [float(metrics.psnr(mean_image, image)) for image in images],
        "random sample": [
            float(jnp.mean(metrics.psnr(drawn[:64], image[None]))) for image in images
        ],
    }


def _class_scores(prior, params, dataset, command: ScorePriorCommand) -> dict[str, list[float]]:
    """PSNR of each image, from samples of its own class."""
    import jax

    from ggl_jax.audit.controls import prior_controls

    if dataset.labels is None:
        raise GGLError(
            f"data: {command.data} has no labels, but prior {prior.name} makes images of a class; "
            "add a labels.csv (file,label)"
        )
    found: list[dict[str, float]] = []
    for number, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
        key = jax.random.fold_in(jax.random.key(command.seed), number)
        controls = prior_controls(
            prior,
            params,
            image,
            int(label),
            key,
            num_samples=command.num_controls,
            ceiling_restarts=command.restarts,
            ceiling_steps=command.steps,
        )
        found.append(controls.scores)
        console.print(f"{len(found)} of {len(dataset.images)} images fitted", markup=False)
    columns = {
        "ceiling": "psnr_ceiling",
        "mean image": "psnr_mean_image",
        "random sample": "psnr_control_mean",
    }
    return {name: [scores[column] for scores in found] for name, column in columns.items()}
