"""Gradient sparsification: only the largest entries of each tensor are shared."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.client.defenses import _checks, _traits
from ggl_jax.selection import kth_smallest, zero_smallest
from ggl_jax.types import Defense, Factored, PyTree

#: Tensors with fewer entries say too little about the rate: floor(0.9 * 2) / 2 is 0.5.
_MIN_ENTRIES = 1000

#: P(|N(0, 1)| < 1)
_WITHIN_ONE = 0.6826894921370859


def sparsify(*, rate: float = 0.9, fidelity: str = "paper", compare: str = "published") -> Defense:
    """Zero the entries of smallest magnitude in every tensor.

    What the adversary learns: the rate, from the share of zeros, and which entries were the
    largest. As published, candidates are pruned by their own largest entries at that rate.

    Args:
        rate: share of entries that become zero, 0 <= rate < 1.
        fidelity: ``"paper"`` zeroes exactly ``floor(rate * n)`` of a tensor's n entries, so that
            no tensor vanishes; the rate is estimated for each layer. ``"code"`` zeroes the entries
            below the tensor's ``rate`` percentile with linear interpolation (numpy, torch), which
            is ``ceil(rate * (n - 1))`` entries if no two are equal; one rate is estimated for all.
        compare: how the adversary simulates it. ``"support"`` compares candidates on the entries
            that were shared, whatever the candidates' own largest ones are: a smoother loss that
            needs no selection. It takes an update without noise on top. Any other value is as
            published.

    Returns:
        A Defense, with factored form only for ``compare="support"``. Record: ``rate``. Estimate:
        ``rate`` (see :func:`estimate_rates`) and, in the paper's form, ``layer_rates``, a pytree of
        scalars; for ``compare="support"``, ``support``, a pytree of booleans.

    Edge cases: entries that are zero anyway count among the smallest, so a tensor with more zeros
    than the rate is left as it is. Ties: ``"paper"`` zeroes the first in memory order among equals
    to meet its count; ``"code"`` keeps all entries equal to the threshold. Rate 0 changes nothing.
    NaN counts as the largest magnitude and stays. The simulation is differentiable in the entries
    that it keeps.

    Reference: paper, gradient sparsification with 90 %.
    """
    _checks.fidelity("sparsify", fidelity)
    rate = _checks.number("sparsify", "rate", rate, low=0, high=1, default=0.9)
    on_support = _checks.comparison("sparsify", compare) == "support"
    by_count = fidelity == "paper"

    def apply(key, update, context):
        del key, context
        # Positions are computed here in double precision: in float32 rate * n is off by an entry
        # for n of some millions.
        if by_count:
            return trees.map_flat(lambda g: zero_smallest(g, zero_count(rate, g.size)), update)
        return trees.map_flat(lambda g: zero_below_percentile(g, rate), update)

    def record(key, update, context):
        del key, update, context
        return {"rate": jnp.float32(rate)}

    def estimate(update, head, noise=0.0):
        del head
        overall, layers = estimate_rates(update, noise)
        if on_support:
            return {"rate": overall, "support": jax.tree.map(lambda g: g != 0, update)}
        if by_count:
            return {"rate": overall, "layer_rates": layers}
        # The published code counts the zeros of all tensors together. With noise on top there are
        # none to count.
        size = sum(g.size for g in jax.tree.leaves(update))
        zeros = trees.total(jax.tree.map(lambda g: jnp.sum(g == 0), update))
        return {"rate": jnp.where(jnp.asarray(noise) > 0, overall, zeros / size)}

    def simulate(estimated, update):
        if on_support:
            return jax.tree.map(jnp.multiply, estimated["support"], update)
        if by_count:
            return trees.map_flat(
                lambda g, r: zero_smallest(g, jnp.round(r * g.size).astype(jnp.int32)),
                update,
                estimated["layer_rates"],
            )
        found = estimated["rate"]
        return trees.map_flat(lambda g: zero_below_percentile(g, found), update)

    def factor(estimated):
        return Factored(mask=estimated["support"])

    _traits.mark(apply, shrinks=True, processes=True)
    _traits.mark(factor, masks=True, scales=False)
    return Defense(
        f"sparsify:{rate:g}", apply, record, estimate, simulate, factor if on_support else None
    )


def zero_count(rate: float, size: int) -> int:
    """``floor(rate * size)``, with 0.29 * 100 = 28.999999999999996 taken for 29."""
    return math.floor(rate * size * (1 + 1e-12) + 1e-9)


def zero_below_percentile(g: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Zero the entries whose magnitude is below the ``rate`` quantile, linearly interpolated.

    Args:
        g: [n], a flattened tensor.
        rate: 0 to 1, may be traced (then in float32: the position may be off by one entry in
            tensors of millions).
    """
    magnitudes = jnp.abs(g)
    return jnp.where(magnitudes < percentile(magnitudes, rate), 0, g)


def percentile(magnitudes: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Linearly interpolated quantile of non-negative values, as numpy's and torch's default."""
    if isinstance(rate, float):
        # In double precision, as numpy.
        exact = rate * (magnitudes.size - 1)
        low, share = jnp.asarray(math.floor(exact)), jnp.asarray(exact - math.floor(exact))
    else:
        position = rate * (magnitudes.size - 1)
        low = jnp.floor(position).astype(jnp.int32)
        share = position - low
    first = kth_smallest(magnitudes, low + 1)
    second = kth_smallest(magnitudes, low + 2)
    return first + (second - first) * share.astype(magnitudes.dtype)


def estimate_rates(update: PyTree, noise: jax.Array | float = 0.0) -> tuple[jax.Array, PyTree]:
    """Share of entries that a client zeroed: overall, and for each layer.

    Every layer has at least its share of zeros, and more where ReLUs were silent. So the overall
    rate is the smallest share among the layers of at least 1,000 entries, to within 0.001.

    Under noise no entry is zero. A zeroed entry then lies within one standard deviation with
    probability 0.683, and so the share of entries there, divided by 0.683, takes the place of the
    share of zeros, in every layer the overall one. Kept entries that are not several times larger
    than the noise count as zeroed: at sigma 0.1 nearly all entries of a ResNet-18's gradient are,
    and the rate is not identifiable (the estimate tends to 1).

    Args:
        update: the observed update.
        noise: standard deviation of noise added after the sparsification.

    Returns:
        ``(rate, layer_rates)``: a scalar and a pytree of scalars, in [0, 1).
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
    return overall, jax.tree.unflatten(treedef, list(jnp.where(noisy, overall, share)))
