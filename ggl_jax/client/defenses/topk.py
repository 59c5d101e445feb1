"""Top-k with error feedback (Deep Gradient Compression)."""

from typing import Annotated

from ggl_jax.client.defenses.sparsify import sparsify
from ggl_jax.spec import AtLeast, ranged
from ggl_jax.types import Defense


@ranged
def topk(*, ratio: Annotated[float, AtLeast(1e-6, below=1.0)] = 0.001) -> Defense:
    """Share the entries of largest magnitude in every tensor, and keep the rest for later rounds.

    What is kept back is added to the next round's gradient (error feedback). One update is audited,
    that of a client that takes part for the first time: its residual is zero, and so it is
    :func:`ggl_jax.client.defenses.sparsify.sparsify` of rate ``1 - ratio`` by number of entries.
    Later rounds of one client, whose updates hold what earlier ones kept back, are not modelled.

    What the adversary learns: the ratio and the shared entries, as under sparsification.

    Args:
        ratio: share of each tensor's entries that is shared, at least 1e-6 and below 1.

    Returns:
        A Defense. Record and estimate: ``rate``, the share that is not shared, and as sparsify's.

    Reference: Lin et al. 2018, "Deep Gradient Compression" (ratio 0.1 % after its warm-up; a
    threshold for each layer). Its momentum correction and gradient clipping concern training: of a
    first update the momentum is the gradient, and clipping is a stage of its own, as in
    ``clip:4+topk:0.001``.
    """
    own = sparsify(rate=1 - ratio)
    support = own.view.on_support
    assert support is not None
    view = own.view._replace(name="topk", on_support=support._replace(name="topk"))
    return own._replace(name=f"topk:{ratio:g}", view=view)
