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
    relative: bool = True,
    regularizer: str = "group:2+total_variation:1+l2:0.1",
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
        relative: divide the distance by that of an update of zero, so that the regulariser weighs
            as much under each defense; its weights are for that.
        regularizer: published: group consistency, total variation and l2, with weights in this
            order. There is no published code, and the weights belong to another loss (sums over
            224x224 images, with BatchNorm statistics), so only their order is kept. One restart has
            no group.
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
        relative=relative,
        regularizer=regularizer,
        **options,
    )
