"""Refinement of an attack's result in pixels, beyond what its prior can show."""

from ggl_jax.adversary.attacks.search_attack import search_attack
from ggl_jax.adversary.optimizers import adam
from ggl_jax.priors.pixels import pixels
from ggl_jax.types import Attack, Model


def pixel_refinement(
    model: Model,
    *,
    steps: int = 300,
    learning_rate: float = 0.04,
    regularizer: str = "total_variation:0.03",
    **options,
) -> Attack:
    """Go on from given images with the same matching loss, free of the prior but kept smooth.

    A generator's range holds no face exactly; the update often tells the rest. Under noise the
    pixels would fit the noise: the loss falls, and the likeness does not rise.

    Args:
        model: the federated model.
        steps: Adam steps, at least 1.
        learning_rate: of Adam, in the networks' [-1, 1] range of pixels, > 0; warm-up over the
            first 5 % of the steps, cosine ramp-down over the last 25 %.
        regularizer: beside the distance relative to that of an update of zero; see
            :func:`ggl_jax.adversary.losses.parse_regularizer`.
        **options: see :func:`search_attack`.

    Returns:
        An :class:`ggl_jax.types.Attack` that has to be started from points: those of
        :func:`ggl_jax.priors.pixels.pixels_of`.
    """
    optimizer = adam(
        steps=steps, learning_rate=learning_rate, schedule="ramp", signed=False, box=1.0
    )
    return search_attack(
        "refine",
        model,
        pixels(model.image_shape),
        optimizer,
        regularizer=regularizer,
        relative=True,
        **options,
    )
