"""Inverting gradients (IG)."""

from ggl_jax.adversary.attacks.search_attack import search_attack
from ggl_jax.priors.pixels import pixels
from ggl_jax.types import Attack, Model, Optimizer, Prior


def inverting_gradients(
    model: Model,
    prior: Prior | None,
    optimizer: Optimizer,
    *,
    start: str = "normal",
    distance: str = "cosine",
    regularizer: str = "total_variation:0.01",
    **options,
) -> Attack:
    """Inverting gradients: pixels whose gradient has the same direction, kept smooth.

    Args:
        model: the federated model.
        prior: unused; pixels are searched.
        optimizer: published: Adam on the gradient's sign, learning rate 0.1, x 0.1 at 3/8, 5/8,
            7/8 of 8,000 steps (24,000 at 224x224), pixels clamped to their box.
        start: published: normal noise.
        distance: published: cosine.
        regularizer: published: total variation. The published code's default weight, 0.1, is far
            too much for 32x32 faces and this network; 0.01 is the best of those tried on public
            images that no prior was trained on.
        **options: see :func:`search_attack`.

    Returns:
        An :class:`ggl_jax.types.Attack`.

    Reference:
        Geiping et al. (2020), "Inverting Gradients: How easy is it to break privacy in federated
        learning?"; paper, section 4 (baselines).
    """
    del prior
    return search_attack(
        "ig",
        model,
        pixels(model.image_shape),
        optimizer,
        start=start,
        distance=distance,
        regularizer=regularizer,
        **options,
    )
