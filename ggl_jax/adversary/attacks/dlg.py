"""Deep leakage from gradients, with searched (DLG) or inferred (iDLG) labels."""

from ggl_jax.adversary.attacks.search_attack import search_attack
from ggl_jax.priors.pixels import pixels
from ggl_jax.types import Attack, Model, Optimizer, Prior


def dlg(
    model: Model, prior: Prior | None, optimizer: Optimizer, *, start: str = "normal", **options
) -> Attack:
    """Deep leakage from gradients: search pixels and labels together.

    Args:
        model: the federated model.
        prior: unused; pixels are searched.
        optimizer: published: L-BFGS without a line search (:func:`ggl_jax.lbfgs`), 300 iterations
            of 20 evaluations at 32x32, 1,200 at 224x224.
        start: published: normal noise.
        **options: see :func:`search_attack`. Published: squared l2, no regulariser, no ``view``.

    Returns:
        An :class:`ggl_jax.types.Attack`.

    Reference:
        Zhu, Liu and Han (2019), "Deep Leakage from Gradients"; paper, section 4 (baselines).
    """
    del prior
    space = pixels(model.image_shape)
    return search_attack("dlg", model, space, optimizer, start=start, soft_labels=True, **options)


def idlg(
    model: Model, prior: Prior | None, optimizer: Optimizer, *, start: str = "normal", **options
) -> Attack:
    """Improved DLG: the same search over pixels, with the labels read off the update first.

    Args:
        model: the federated model.
        prior: unused; pixels are searched.
        optimizer: published: L-BFGS, as for :func:`dlg`.
        start: published: normal noise.
        **options: see :func:`search_attack`.

    Returns:
        An :class:`ggl_jax.types.Attack`.

    Reference:
        Zhao, Mopuri and Bilen (2020), "iDLG: Improved Deep Leakage from Gradients".
    """
    del prior
    return search_attack(
        "idlg", model, pixels(model.image_shape), optimizer, start=start, **options
    )
