"""Gradient sparsification: only the largest entries of each tensor are shared."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.client.defenses._views import masking
from ggl_jax.selection import zero_smallest
from ggl_jax.spec import Share, ranged
from ggl_jax.types import Defense, Facts, PyTree, View

#: Tensors with fewer entries say too little about the rate: floor(0.9 * 2) / 2 is 0.5.
_MIN_ENTRIES = 1000

#: P(|N(0, 1)| < 1)
_WITHIN_ONE = 0.6826894921370859


@ranged
def sparsify(*, rate: Share = 0.9, percentile: bool = False) -> Defense:
    """Zero the entries of smallest magnitude in every tensor.

    What the adversary learns: the rate, from the share of zeros, and which entries were the
    largest. As published, candidates are pruned by their own largest entries at that rate.

    Args:
        rate: share of entries that become zero, 0 <= rate < 1. The default of the published code's
            32x32 script is 0.2.
        percentile: the published code's form: of a tensor's n entries as many become zero as lie
            below its ``rate`` percentile with linear interpolation (numpy, torch) where no two are
            equal, ``ceil(rate * (n - 1))``. Else ``floor(rate * n)``, so that no tensor vanishes.

    Returns:
        A Defense. Its ``view.on_support`` compares candidates on the entries that were shared,
        whatever the candidates' own largest ones are: a smoother loss that needs no selection, and
        has a factored form. Record: ``rate``. Estimate: ``rate`` (see :func:`estimate_rates`; of
        the percentile form, the share of zeros in all tensors together), ``support``, a pytree of
        booleans, and ``layer_counts``, a pytree of integers. The published code prunes
        candidates in every layer by the one rate, and so the private image's own update by other
        counts than the client, a few entries of each tensor or, where ReLUs were silent, many;
        here each layer's own count is taken in both forms.

    Edge cases: entries that are zero anyway count among the smallest, so a tensor with more zeros
    than the rate is left as it is. Ties: among magnitudes that agree to 1e-4 places decide, the
    same ones in every program; and of those of a candidate that agree to 0.1 %, the entries that
    were shared are kept. So the client's own images are pruned as the client did it, whatever
    rounding does. Rate 0 changes nothing. NaN counts as the largest magnitude and stays. The
    simulation is differentiable in the entries that it keeps.

    Reference: paper, gradient sparsification with 90 %.
    """

    # In double precision: in float32 rate * n is off by an entry for n of some millions.
    def count(size):
        return zero_count(rate, size - 1, up=True) if percentile else zero_count(rate, size)

    def apply(key, update, context):
        del key, context
        sparse = trees.map_flat(lambda g: zero_smallest(g, count(g.size)), update)
        return sparse, {"rate": jnp.float32(rate)}

    name = f"sparsify:{rate:g}" + (",percentile=True" if percentile else "")
    return Defense(name, apply, sparsify_view(percentile), Facts(shrinks=True, processes=True))


def sparsify_view(percentile: bool) -> View:
    """The server's side of :func:`sparsify`, in that form."""

    def estimate(update, head, noise=0.0):
        del head
        overall, counts = estimate_rates(update, noise)
        support = jax.tree.map(lambda g: g != 0, update)
        if percentile:
            size = sum(g.size for g in jax.tree.leaves(update))
            # With noise on top there are no zeros to count.
            zeros = trees.total(jax.tree.map(lambda g: jnp.sum(g == 0), update))
            overall = jnp.where(jnp.asarray(noise) > 0, overall, zeros / size)
        return {"rate": overall, "support": support, "layer_counts": counts}

    def simulate(estimated, update):
        return jax.tree.map(
            lambda g, zeros, kept: zero_smallest(g.ravel(), zeros, kept.ravel()).reshape(g.shape),
            update,
            estimated["layer_counts"],
            estimated["support"],
        )

    on_support = masking("sparsify", estimate, "support")
    return View("sparsify", estimate, simulate, on_support=on_support)


def zero_count(rate: float, size: int, *, up: bool = False) -> int:
    """``floor(rate * size)``, with 0.29 * 100 = 28.999999999999996 taken for 29; or rounded up."""
    if up:
        return math.ceil(rate * size * (1 - 1e-12) - 1e-9)
    return math.floor(rate * size * (1 + 1e-12) + 1e-9)


def estimate_rates(update: PyTree, noise: jax.Array | float = 0.0) -> tuple[jax.Array, PyTree]:
    """What a client zeroed: the share of entries overall, and their number in each layer.

    Every layer has at least its share of zeros, and more where ReLUs were silent. So the overall
    rate is the smallest share among the layers of at least 1,000 entries, to within 0.001.

    Under noise no entry is zero. A zeroed entry then lies within one standard deviation with
    probability 0.683, and so the share of entries there, divided by 0.683, takes the place of the
    share of zeros, and each layer's count is that share of it. Kept entries that are not several
    times larger than the noise count as zeroed: at sigma 0.1 nearly all entries of a ResNet-18's
    gradient are, and the rate is not identifiable (the estimate tends to 1).

    Args:
        update: the observed update.
        noise: standard deviation of noise added after the sparsification.

    Returns:
        ``(rate, layer_counts)``: a scalar in [0, 1] and a pytree of int32 scalars.
    """
    noise = jnp.asarray(noise, jnp.float32)
    noisy = noise > 0
    leaves, treedef = jax.tree.flatten(update)
    sizes = np.array([g.size for g in leaves])
    counted = jnp.stack([jnp.mean(jnp.abs(g) <= noise, dtype=jnp.float32) for g in leaves])
    share = jnp.where(noisy, counted / _WITHIN_ONE, counted)
    share = jnp.clip(share, 0, 1)
    stderr = jnp.where(noisy, jnp.sqrt(jnp.maximum(counted * (1 - counted), 0) / sizes), 0)
    telling = sizes >= min(_MIN_ENTRIES, sizes.max())
    # As for the noise level: an upper bound from every layer, the tightest with its scatter
    # allowed for.
    penalised = jnp.where(telling, share + 3 * stderr / _WITHIN_ONE, jnp.inf)
    overall = share[jnp.argmin(penalised)]
    zeros = jnp.stack([jnp.sum(g == 0, dtype=jnp.int32) for g in leaves])
    pruned = jnp.where(noisy, jnp.round(overall * sizes).astype(jnp.int32), zeros)
    return overall, jax.tree.unflatten(treedef, list(pruned))
