"""GradInversion (GI)."""

from ggl_jax.adversary.attacks.search_attack import search_attack
from ggl_jax.priors.pixels import pixels
from ggl_jax.types import Attack, Model, Optimizer, Prior


def grad_inversion(
    model: Model,
    prior: Prior | None,
    optimizer: Optimizer,
    *,
    start: str = "normal",
    regularizer: str = "total_variation:0.1+l2:1e-5+group:1e-4",
    **options,
) -> Attack:
    """GradInversion: pixels by squared l2, kept smooth, small and close to the other restarts.

    Without BatchNorm statistics, as in the paper: its clients do not share them. Where they do, add
    ``batch_norm`` to the regulariser; see :func:`search_attack`.

    Args:
        model: the federated model.
        prior: unused; pixels are searched.
        optimizer: published: Adam, learning rate 0.1, 8,000 steps (24,000 at 224x224).
        start: published: normal noise.
        regularizer: published: total variation, l2 and group consistency. Their published weights
            belong to another scale of the loss; these keep their order.
        **options: see :func:`search_attack`.

    Returns:
        An :class:`ggl_jax.types.Attack`.

    Reference:
        Yin et al. (2021), "See through Gradients: Image Batch Recovery via GradInversion"; paper,
        section 4 (baselines).
    """
    del prior
    return search_attack(
        "gi",
        model,
        pixels(model.image_shape),
        optimizer,
        start=start,
        regularizer=regularizer,
        **options,
    )
