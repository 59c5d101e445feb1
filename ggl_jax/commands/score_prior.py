"""``ggl-jax score-prior``: a prior's ceiling and controls on given images."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from ggl_jax.audit import metrics
from ggl_jax.audit.controls import prior_controls
from ggl_jax.audit.data import load
from ggl_jax.commands._shared import say
from ggl_jax.errors import GGLError
from ggl_jax.priors import load_prior
from ggl_jax.priors.holdout import held_out_indices
from ggl_jax.spec import Count, Seed

#: What is measured, and where it is among an audit's controls.
COLUMNS = {
    "ceiling": "psnr_ceiling",
    "mean image": "psnr_mean_image",
    "random sample": "psnr_control_mean",
}


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
    restarts: Count = 4
    """Starting points of each fit."""
    steps: Count = 400
    """Steps of each fit."""
    num_controls: Count = 400
    """Random samples for each image, as for ggl-jax audit."""
    seed: Seed = 0
    """Seed of the starting points and samples."""


def run(command: ScorePriorCommand, argv: list[str]) -> int:
    """``ggl-jax score-prior``."""
    prior, params, card = load_prior(command.prior)
    indices: str | list[int] = command.indices
    if indices == "held-out":
        indices = held_out_indices(card, Path(command.data))
    dataset = load(command.data, image_size=prior.image_shape[0], indices=indices)
    labels = dataset.labels
    if labels is None:
        if prior.num_classes is not None:
            raise GGLError(
                f"data: {command.data} has no labels, but prior {prior.name} makes images of a "
                "class; add a labels.csv (file,label)"
            )
        labels = np.zeros(len(dataset.images), np.int32)
    scores: list[dict[str, float]] = []
    for number, (image, label) in enumerate(zip(dataset.images, labels, strict=True)):
        controls = prior_controls(
            prior,
            params,
            image,
            int(label),
            jax.random.fold_in(jax.random.key(command.seed), number),
            num_samples=command.num_controls,
            ceiling_restarts=command.restarts,
            ceiling_steps=command.steps,
        )
        scores.append(controls.scores)
        if len(scores) % 16 == 0 or len(scores) == len(labels):
            say(f"{len(scores)} of {len(labels)} images fitted")
    for name, column in COLUMNS.items():
        values = [found[column] for found in scores]
        low, high = metrics.confidence_interval(values)
        say(
            f"{name}: {np.mean(values):.2f} dB PSNR, 95 % interval [{low:.2f}, {high:.2f}], lowest "
            f"{min(values):.2f}, {len(values)} images"
        )
    return 0
