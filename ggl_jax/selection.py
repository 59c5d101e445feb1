"""Exact selection by magnitude in large tensors, in a few counting passes.

Sorting millions of entries takes a hundred times as long as reading them. A threshold that has
exactly k entries below it is found by counting: a subsample says where to look, and the secant
method on the count of entries below a trial threshold needs some six passes from there.
"""

import jax
import jax.numpy as jnp
import numpy as np

#: Entries of the subsample that the search starts from.
_SAMPLE = 2**15

#: Slices that are added to each other before a count is reduced.
_SLICES = 8

#: Of so many secant steps in a row, one is a bisection, which bounds their total number.
_PERIOD = 8


@jax.jit
def split(values: jax.Array, count: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """A threshold with ``count`` entries of smaller magnitude.

    Args:
        values: [n] floats, n at least 1. NaN counts as larger than any number.
        count: 0 to n, may be traced; outside, the nearest end is taken.

    Returns:
        ``(threshold, below)`` with ``below`` the number of magnitudes under the threshold, int32.
        It equals ``count`` unless equal entries stand in the way; then it is the largest possible
        number under ``count``, and the threshold is the magnitude of those equal entries. Neither
        is differentiable.
    """
    values = jax.lax.stop_gradient(values)
    dtype, size = values.dtype, values.size
    count = jnp.clip(jnp.asarray(count), 0, size).astype(jnp.int32)
    if size <= _SAMPLE:
        last = jnp.where(count < size, _bisect(jnp.abs(values), count + 1), jnp.inf)
        return last, _count_below(values, last)
    first, slope = _first_guess(values, count)

    def refine(state):
        step, trial, low, below_low, high, last, below_last, slope, _ = state
        below = _count_below(values, trial)
        fits = below <= count
        low, below_low = jnp.where(fits, trial, low), jnp.where(fits, below, below_low)
        high = jnp.where(fits, high, trial)
        moved = below != below_last
        rise = jnp.where(moved, below - below_last, 1).astype(dtype)
        slope = jnp.where((step > 0) & moved, (trial - last) / rise, slope)
        # Half an entry further: between the last entry that belongs below and the next.
        secant = trial + ((count - below).astype(dtype) + 0.5) * slope
        usable = (secant > low) & (secant < high) & (step % _PERIOD != _PERIOD - 1)
        following = jnp.where(usable, secant, _between(low, high))
        done = (below_low == count) | (following <= low) | (following >= high)
        return step + 1, following, low, below_low, high, trial, below, slope, done

    none = jnp.zeros((), jnp.int32)
    start = (
        none,
        first,
        jnp.zeros((), dtype),
        none,
        jnp.full((), jnp.inf, dtype),
        first,
        none,
        slope,
        count == 0,
    )
    final = jax.lax.while_loop(lambda state: ~state[-1], refine, start)
    return final[2], final[3]


def kth_smallest(magnitudes: jax.Array, k: jax.Array | int) -> jax.Array:
    """The k-th smallest (from 1) of non-negative floats, exactly; ``k`` may be traced.

    Args:
        magnitudes: [n] floats >= 0. NaN counts as larger than any number.
        k: 1 to n. Outside, the nearest end is taken.

    Returns:
        Scalar of the same dtype, not differentiable.
    """
    threshold, _ = split(magnitudes, jnp.clip(jnp.asarray(k), 1, magnitudes.size) - 1)
    # The entries below number k - 1, or fewer and then those at the threshold are equal.
    values = jax.lax.stop_gradient(magnitudes)
    return jnp.min(jnp.where(values >= threshold, values, jnp.inf))


def zero_smallest(
    values: jax.Array, count: jax.Array | int, kept: jax.Array | None = None
) -> jax.Array:
    """Zero exactly ``count`` entries of smallest magnitude.

    Magnitudes that agree to 1e-4 count as equal, and places decide. For some entries are equal but
    for rounding (with two classes the last layer's gradient is such pairs), and the order of two
    such would differ from program to program.

    Args:
        values: [n] floats.
        count: 0 to n, may be traced.
        kept: [n] booleans: entries that stay where they are smaller than others by up to 0.1 %.
            With the entries that another program kept of the same values, computed there with
            other rounding, the result has the same zeros.

    Returns:
        Like ``values``. Its derivative is one at the kept entries and zero at the others.
    """
    keys = _keys(jax.lax.stop_gradient(values), kept)
    threshold, below = split(keys, count)
    excess = count - below

    def last_to_go(excess):
        numbers = jnp.cumsum(keys == threshold)
        return jnp.sum(numbers < excess, dtype=jnp.int32)

    # Numbering the equal keys, which are zeros as a rule, takes longer than all the rest.
    last = jax.lax.cond(any_of(excess > 0), last_to_go, lambda _: jnp.zeros((), jnp.int32), excess)
    early = (excess > 0) & (jnp.arange(values.size, dtype=jnp.int32) <= last)
    zeroed = (keys < threshold) | ((keys == threshold) & early)
    return jnp.where(zeroed, 0, values)


#: Magnitudes that agree to so much relatively are put in order by their places.
_TIE = 1e-4

#: How much larger an entry to be kept counts. More than rounding does to the same entry anywhere
#: (TF32 included), too little to matter among entries that differ.
_HOLD = 1e-3


def _keys(values, kept):
    """[n] magnitudes, tilted so that no two are equal but for rounding; zeros stay equal."""
    magnitudes = jnp.abs(values).astype(jnp.promote_types(values.dtype, jnp.float32))
    # Multiples of the golden ratio, modulo 1: of all sequences, the one whose neighbours stay
    # furthest apart, however many of them are looked at: 100 equals are told apart in float32.
    place = jnp.arange(values.size, dtype=jnp.uint32) * np.uint32(2654435769)
    place = (place >> 8).astype(magnitudes.dtype) * 2.0**-24
    keys = magnitudes * (1 + _TIE * place)
    return keys if kept is None else keys * (1 + _HOLD * kept)


@jax.custom_batching.custom_vmap
def any_of(flags: jax.Array) -> jax.Array:
    """Whether any flag is set; under ``vmap``, in any of the batch (one answer for all).

    For the predicate of a ``cond`` whose branches both give a right answer: with one predicate for
    each of the batch, ``vmap`` would compute both branches always.
    """
    return jnp.any(flags)


@any_of.def_vmap
def _any_of_batch(axis_size, in_batched, flags):
    del axis_size, in_batched
    return any_of(flags), False


def _count_below(values, threshold):
    # XLA's CPU code adds up one entry a cycle in a reduction, but many where arrays are added: so
    # slices are added first, and what is left to reduce is short. Three times as fast. Magnitudes
    # are taken anew in each pass, which costs less than another array to read.
    length = values.size // _SLICES
    flags = (jnp.abs(values) < threshold).astype(jnp.int32)
    slices = flags[: length * _SLICES].reshape(_SLICES, length)
    return jnp.sum(sum(slices)) + jnp.sum(flags[length * _SLICES :])


def _first_guess(values, count):
    """A trial threshold and the change of threshold per entry, from a subsample."""
    size, dtype = values.size, values.dtype
    sample = jnp.abs(values[:: size // _SAMPLE])
    scale = sample.size / size
    rank = jnp.round(count.astype(jnp.float32) * scale).astype(jnp.int32)
    guess = _bisect(sample, rank, passes=20)
    near = _count_below(sample, guess * 1.02) - _count_below(sample, guess * 0.98)
    # 0 where the sample says nothing (equal entries, NaN): then the search bisects.
    slope = jnp.where(near > 0, 0.04 * guess * scale / jnp.maximum(near, 1).astype(dtype), 0.0)
    usable = jnp.isfinite(guess) & jnp.isfinite(slope)
    return jnp.where(usable, guess, 0.0).astype(dtype), jnp.where(usable, slope, 0.0).astype(dtype)


def _bisect(magnitudes, k, passes=None):
    """The k-th smallest by bisection of the bit pattern, which is ordered as the floats are.

    With fewer passes than bits, a little below it.
    """
    bits = _pattern(magnitudes.dtype)
    patterns = jax.lax.bitcast_convert_type(magnitudes, bits)
    k = jnp.clip(k, 1, magnitudes.size)
    width = magnitudes.dtype.itemsize * 8 - 1

    def build(step, prefix):
        trial = prefix | jnp.left_shift(jnp.ones((), bits), (width - 1 - step).astype(bits))
        return jnp.where(jnp.sum(patterns < trial) < k, trial, prefix)

    prefix = jax.lax.fori_loop(0, passes or width, build, jnp.zeros((), bits))
    return jax.lax.bitcast_convert_type(prefix, magnitudes.dtype)


def _between(low, high):
    """A float halfway between two in the order of bit patterns; ``low`` where there is none."""
    bits = _pattern(low.dtype)
    a, b = (jax.lax.bitcast_convert_type(x, bits) for x in (low, high))
    return jax.lax.bitcast_convert_type(a + (b - a) // 2, low.dtype)


def _pattern(dtype):
    return {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[jnp.dtype(dtype).itemsize]
