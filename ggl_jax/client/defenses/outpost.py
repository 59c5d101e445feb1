"""OUTPOST: prune each tensor, and add noise where the Fisher information is largest."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ggl_jax.client.defenses._views import masking, nonzero, split_keys
from ggl_jax.client.defenses.soteria import percentile
from ggl_jax.spec import AtLeast, ranged
from ggl_jax.types import Defense, Facts

#: Below 100, so that something is left.
Percent = Annotated[float, AtLeast(0.0, below=100.0)]


@ranged
def outpost(
    *,
    noise: Annotated[float, AtLeast(0.0)] = 0.8,
    phi: Percent = 40.0,
    prune: Percent = 80.0,
) -> Defense:
    """Zero small entries of each tensor; add Gaussian noise, more in tensors of spread-out weights.

    - Entries below a tensor's ``prune`` percentile of magnitudes become 0.
    - The risk of a tensor is the variance of its weights, at most 1. Noise of standard deviation
      ``noise * risk`` is added to the entries whose Fisher information is among the largest ``phi``
      per cent: the squared gradient, averaged over the tensor's output units.

    What the adversary learns: which entries are zero, pruned and without noise. Candidates are
    masked alike. The noise differs from tensor to tensor and is not estimated.

    Args:
        noise: scale of the noise, finite and >= 0.
        phi: share of entries that get noise, in per cent, at least 0 and below 100.
        prune: share of each tensor that is zeroed, in per cent, at least 0 and below 100.

    Returns:
        A Defense with factored form. Record: ``rate``, the pruned share. Estimate: ``support``.

    The defense is applied at iteration i with probability ``1 / (1 + beta i)``; the update audited
    is that of iteration 0, which is always defended.

    Edge cases: a single entry has no variance, so no noise. Under noise of a later stage all
    entries count as shared.

    Reference: Wang et al. 2023 (INFOCOM), "More than Enough is Too Much: Adaptive Defenses against
    Gradient Leakage in Production Federated Learning", written here from its released code (with
    its documented values), since the paper's text was not at hand. The copy of that code in the
    framework Plato (commit 14dfc1a) binds its result to a local name and returns the gradients
    without any defense; what is here is the earlier release, which does return it. In torch the
    variance has n - 1 in its denominator, and the output unit is a tensor's first axis, here the
    last.
    """

    def apply(key, update, context):
        fisher = jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=-1, keepdims=True), update)
        threshold = percentile(ravel_pytree(fisher)[0], 1 - phi / 100)

        def one(g, information, weights, key):
            small = percentile(jnp.abs(g).ravel(), prune / 100)
            pruned = jnp.where(jnp.abs(g) < small, 0, g)
            variance = jnp.var(weights, ddof=1) if weights.size > 1 else 0.0
            drawn = noise * jnp.minimum(variance, 1) * jax.random.normal(key, g.shape)
            return pruned + jnp.where(information >= threshold, drawn, 0).astype(g.dtype)

        params = context.variables["params"]
        shared = jax.tree.map(one, update, fisher, params, split_keys(key, update))
        return shared, {"rate": jnp.float32(prune / 100)}

    def estimate(update, head, noise=0.0):
        del head
        return {"support": nonzero(update, noise)}

    view = masking("outpost", estimate, "support", adds_noise=True)
    return Defense(f"outpost:{noise:g},phi={phi:g},prune={prune:g}", apply, view, Facts())
