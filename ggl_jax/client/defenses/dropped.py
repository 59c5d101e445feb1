"""Entries left out at random, the others scaled up: random-k and dropout of gradients."""

from typing import Annotated

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses._views import masking, nonzero, split_keys
from ggl_jax.client.defenses.sparsify import zero_count
from ggl_jax.spec import AtLeast, Share, ranged
from ggl_jax.types import Defense, Facts, PyTree, View


@ranged
def randomk(*, ratio: Annotated[float, AtLeast(1e-6, below=1.0)] = 0.1) -> Defense:
    """Share k entries of every tensor, drawn at random, times n / k.

    k is ``n - floor((1 - ratio) n)`` of a tensor's n entries, so no tensor is left empty, and the
    result is unbiased: an entry's variance is ``g^2 (n / k - 1)``.

    What the adversary learns: which entries were shared, and k, their number (where ReLUs left
    entries at zero, from the other layers' share). Candidates are masked and scaled alike, so the
    private image's own update is met, but for the scale of layers with silent entries, where k may
    be off by one.

    Args:
        ratio: at least 1e-6 and below 1.

    Returns:
        A Defense with factored form. Record: ``rate``, the share that is left out. Estimate:
        ``rate`` and ``mask``, a pytree of the factors that entries were multiplied by. Under noise
        of a later stage no entry is zero and the mask is 1, which is its mean.

    Reference: Konečný et al. 2016, "Federated Learning: Strategies for Improving Communication
    Efficiency" (random mask); Stich et al. 2018, "Sparsified SGD with Memory" (rand_k); scaled to
    be unbiased as in Wangni et al. 2018, "Gradient Sparsification".
    """

    def factors(key, g):
        kept = g.size - zero_count(1 - ratio, g.size)
        chosen = jax.random.permutation(key, g.size) < kept
        return (chosen * (g.size / kept)).reshape(g.shape)

    return _dropping("randomk", f"randomk:{ratio:g}", factors, 1 - ratio, True)


@ranged
def dropout(*, rate: Share = 0.5) -> Defense:
    """Leave every entry out with probability ``rate``, independently; scale the others up.

    Entries that stay are divided by ``1 - rate``, so the result is unbiased; an entry's variance is
    ``g^2 rate / (1 - rate)``.

    What the adversary learns: which entries stayed, and the rate, from the share of zeros in the
    layers with the fewest. Candidates are masked and scaled alike; a rate that is a little off
    scales all of them alike.

    Args:
        rate: 0 <= rate < 1.

    Returns:
        A Defense with factored form; record and estimate as :func:`randomk`'s.

    Reference: Srivastava et al. 2014, "Dropout" (its inverted form), applied to the shared
    gradient; the same as the random sparsification of Wangni et al. 2018 with equal probabilities.
    """

    def factors(key, g):
        return jax.random.bernoulli(key, 1 - rate, g.shape) / (1 - rate)

    return _dropping("dropout", f"dropout:{rate:g}", factors, rate, False)


def _dropping(kind, name, factors, rate, by_count):
    def apply(key, update, context):
        del context
        kept = jax.tree.map(factors, split_keys(key, update), update)
        return jax.tree.map(jnp.multiply, kept, update), {"rate": jnp.float32(rate)}

    return Defense(name, apply, dropping_view(kind, by_count), Facts(processes=True))


def dropping_view(name: str, by_count: bool) -> View:
    """The server's side of :func:`randomk` (``by_count``) and of :func:`dropout`."""

    def estimate(update, head, noise=0.0):
        del head
        noisy = jnp.asarray(noise) > 0
        rate = dropped_share(update, pooled=not by_count)

        def mask(y, shared):
            kept = y.size - jnp.floor(rate * y.size * (1 + 1e-6) + 1e-6) if by_count else 0
            seen = jnp.sum(shared)
            # Its own number where no entry was silent; rounding moves the other by one.
            kept = jnp.where(jnp.abs(seen - kept) <= 1, seen, kept)
            factor = y.size / jnp.maximum(kept, 1) if by_count else 1 / jnp.maximum(1 - rate, 1e-6)
            return jnp.where(noisy, 1.0, shared * factor).astype(y.dtype)

        return {
            "rate": jnp.where(noisy, 0.0, rate),
            "mask": jax.tree.map(mask, update, nonzero(update, noise)),
        }

    return masking(name, estimate, "mask", rounds="each")


def dropped_share(update: PyTree, *, pooled: bool) -> jax.Array:
    """Share of entries that were dropped at random: of zeros, where no entry was silent before.

    The tensor whose share is lowest for certain (with three standard errors) has no silent entries;
    the share is its own, or that of all tensors that agree with it (``pooled``).
    """
    zeros = jnp.stack([jnp.sum(y == 0) for y in jax.tree.leaves(update)])
    sizes = jnp.array([y.size for y in jax.tree.leaves(update)])
    shares = zeros / sizes
    # One more of each kind, so that a small tensor without zeros is not certain.
    stderr = jnp.sqrt((shares + 1 / sizes) * (1 - shares + 1 / sizes) / sizes)
    lowest = jnp.argmin(shares + 3 * stderr)
    if not pooled:
        return shares[lowest]
    agree = jnp.abs(shares - shares[lowest]) <= 4 * (stderr + stderr[lowest])
    return jnp.sum(jnp.where(agree, zeros, 0)) / jnp.sum(jnp.where(agree, sizes, 0))
