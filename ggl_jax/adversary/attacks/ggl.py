"""Generative gradient leakage, the paper's attack."""

from ggl_jax.adversary.attacks.search_attack import search_attack
from ggl_jax.types import Attack, Model, Optimizer, Prior


def ggl(
    model: Model,
    prior: Prior,
    optimizer: Optimizer,
    *,
    regularizer: str = "kld:0.1",
    **options,
) -> Attack:
    """Generative gradient leakage: search the prior's latents for the matching gradient.

    The estimated defense is applied to every candidate's own gradient before it is compared, and a
    regulariser keeps the latent plausible.

    Args:
        model: the federated model.
        prior: the generator.
        optimizer: the search; published: CMA-ES, TuRBO and Adam.
        regularizer: published: "kld:0.1" or a norm term at 32x32, "none" at 224x224.
        **options: see :func:`search_attack`; ``view`` makes the attack adaptive, as published.
            ``start="zeros"`` is published at 32x32; ``start="uniform", bound="tanh"`` at 224x224.

    Returns:
        An :class:`ggl_jax.types.Attack`.

    Reference:
        Paper, section 3 (the transformation-aware search).
    """
    return search_attack("ggl", model, prior, optimizer, regularizer=regularizer, **options)
