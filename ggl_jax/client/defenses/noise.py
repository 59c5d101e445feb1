"""Additive Gaussian noise, and how the server finds its level."""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.client.defenses._views import add_draw, in_expectation
from ggl_jax.selection import kth_smallest
from ggl_jax.spec import AtLeast, ranged
from ggl_jax.types import Defense, Facts, Path, PyTree, View

#: Tensors with fewer entries are not used alone: their estimates scatter too much to take a
#: minimum over.
_MIN_ENTRIES = 4096

#: Tensors are thinned to about this many entries; 0.23 % standard error is all that is needed.
_MAX_ENTRIES = 1 << 18

#: A class-sum spread below this share of the head gradient's root mean square is rounding.
_ROUNDING = 3e-6


@ranged
def noise(*, sigma: Annotated[float, AtLeast(0.0)] = 0.1) -> Defense:
    """Add independent Gaussian noise N(0, sigma^2) to every entry of the update.

    What the adversary learns: the noise level, see :func:`estimate_sigma`. It leaves candidates'
    gradients as they are, because the noise's expectation is zero and its draw is unknown. (The
    published 32x32 script adds a fresh draw to every candidate, at the client's own sigma; its code
    for 224x224 does not. Left out: it shifts every loss by the same amount on
    average, makes them random, and needs the parameter.)

    Args:
        sigma: standard deviation, in units of the gradient, finite and >= 0. The published code's
            own default is 0.01.

    Returns:
        A Defense. Parameters in its record: ``sigma``; in its estimate: ``sigma`` and
        ``sigma_stderr``, the sampling error (not the upward bias that signal can add).

    Edge cases: sigma 0 returns the update unchanged. NaN stays NaN. The noise is drawn in float32
    (float64 in JAX's x64 mode) and rounded to its tensor's type. Noise that a later stage of a
    chain rescales (clip) or zeroes (sparsify) is not identifiable; the estimate is then the level
    seen in the final update.

    Reference: paper, Gaussian noise with sigma 0.1.
    """

    def apply(key, update, context):
        del context
        noisy = add_draw(update, lambda num: sigma * jax.random.normal(key, (num,)))
        return noisy, {"sigma": jnp.float32(sigma)}

    return Defense(f"noise:{sigma:g}", apply, noise_view(), Facts(gaussian=sigma, processes=True))


def noise_view() -> View:
    """The server's side of :func:`noise`."""

    def estimate(update, head, noise=0.0):
        found, stderr = estimate_sigma(update, head)
        # A later stage's noise adds in variance.
        own = trees.safe_sqrt(jnp.square(found) - jnp.square(noise))
        return {"sigma": own, "sigma_stderr": stderr}

    return in_expectation("noise", estimate, lambda estimated: estimated["sigma"])


def estimate_sigma(update: PyTree, head: Path) -> tuple[jax.Array, jax.Array]:
    """Find the standard deviation of the noise in an update, from the update alone.

    Two kinds of evidence, each of which signal can only push upwards:

    * *Class sums.* For softmax cross-entropy the last layer's weight gradient is a sum of
      features times (probabilities - labels), and the latter add up to zero over the classes:
      for any batch, any number of local steps, and after clipping or a Soteria mask. So the sums
      over classes of the observed gradient are noise of standard deviation sigma * sqrt(k): d + 1
      samples, a standard error of 3 % at d = 512. (Sparsification breaks it for k > 2.)
    * *Each large tensor's core.* Under noise, the histogram of a tensor near zero is that of the
      noise unless its signal entries are dense below sigma; the spread is fitted to the entries
      within two standard deviations, see :func:`core_spread`.

    The lowest of them, after a penalty of three standard errors each, is taken. Hence an error of
    some 3 % where signal is as large as the noise everywhere, and under 1 % where one large tensor
    has small or sparse gradients.

    Args:
        update: the observed update.
        head: ``Model.head``.

    Returns:
        ``(sigma, stderr)``, float32 scalars; (0, 0) where the class sums vanish to rounding or
        most of a large tensor is exactly zero.

    Raises:
        GGLError: the update has no such layer.

    Edge cases: a single NaN makes the result NaN. Heads with one class (k = 1) have no class sums;
    then only tensors count.
    """
    kernel, bias = trees.head_parts(update, head)
    rows = kernel if bias is None else jnp.concatenate([kernel, bias[None]])
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    num_rows, num_classes = rows.shape
    found, errors = [], []
    if num_classes > 1:
        sums = jnp.sum(rows, axis=1) / np.sqrt(num_classes)
        spread = core_spread(sums, cut=3.0)
        rms = jnp.sqrt(jnp.mean(jnp.square(rows)))
        found.append(jnp.where(spread < _ROUNDING * rms, 0.0, spread)[None])
        errors.append([_STDERR[3.0] / np.sqrt(num_rows)])
    leaves = jax.tree.leaves(update)
    smallest = (
        min(_MIN_ENTRIES, max(leaf.size for leaf in leaves)) if num_classes == 1 else _MIN_ENTRIES
    )
    large = [leaf.reshape(-1) for leaf in leaves if leaf.size >= smallest]
    if large:
        large = [values[:: -(-values.size // _MAX_ENTRIES)] for values in large]
        found.append(_core_spreads(large, cut=2.0))
        errors.append([_STDERR[2.0] / np.sqrt(values.size) for values in large])
    spreads = jnp.concatenate(found)
    relative = jnp.asarray(np.concatenate(errors), spreads.dtype)
    best = jnp.argmin(spreads * (1 + 3 * relative))
    # argmin returns the place of a NaN, so that a broken update does not pass for a clean one.
    return spreads[best].astype(jnp.float32), (spreads * relative)[best].astype(jnp.float32)


#: Variance of a standard normal that is cut off at +-c.
_CUT_VARIANCE = {2.0: 0.7737413035499232, 3.0: 0.9733369246625415}

#: Standard error of core_spread for n normal samples, times sqrt(n) / sigma. Measured; the plain
#: standard deviation has 0.707.
_STDERR = {2.0: 1.2, 3.0: 0.82}


def core_spread(values: jax.Array, *, cut: float) -> jax.Array:
    """Spread of the Gaussian core of a sample whose other entries lie further out.

    Solves ``mean(x^2 | |x| < cut * s) = v(cut) * s^2``, with v the variance of a standard normal
    cut off there, by fixed-point iteration from below. Unlike the median absolute deviation it
    does not shift when 10 % of the entries are large (as after sparsification, where it reads
    13 % too much). If ``x = signal + N(0, sigma^2)`` with the two independent, then the density
    of |x| divided by that of the noise alone is a mixture of cosh(signal x / sigma^2), which grows
    with |x|; so every fixed point lies at or above sigma, and the smallest is the tightest.

    Args:
        values: [n] floats.
        cut: 2.0 or 3.0.

    Returns:
        Scalar; 0 where at least a tenth of the values are exactly zero.
    """
    return _core_spreads([values], cut=cut)[0]


@functools.partial(jax.jit, static_argnames="cut")
def _core_spreads(samples: list[jax.Array], *, cut: float) -> jax.Array:
    """:func:`core_spread` of several samples, padded to one size so that the loop compiles once."""
    size = max(values.size for values in samples)
    dtype = jnp.result_type(jnp.float32, *samples)
    padded = [
        # Infinite entries lie outside every cut.
        jnp.pad(jnp.abs(v.astype(dtype)), (0, size - v.size), constant_values=jnp.inf)
        for v in samples
    ]
    tenths = jnp.asarray([max(1, round(0.1 * v.size)) for v in samples])
    spreads = jax.vmap(lambda m, tenth: _fit_core(m, tenth, cut))(jnp.stack(padded), tenths)
    finite = jnp.stack([jnp.all(jnp.isfinite(v)) for v in samples])
    return jnp.where(finite, spreads, jnp.nan)


def _fit_core(magnitudes, tenth, cut):
    squares = jnp.square(magnitudes)
    # 0.1257 is the 10 % quantile of |N(0, 1)|; quantiles, too, are pushed upwards only.
    start = 0.6 * kth_smallest(magnitudes, tenth) / 0.1257

    def iterate(_, spread):
        inside = magnitudes < cut * spread
        count = jnp.maximum(jnp.sum(inside), 1)
        return jnp.sqrt(jnp.sum(jnp.where(inside, squares, 0)) / count / _CUT_VARIANCE[cut])

    return jax.lax.fori_loop(0, 40, iterate, start)
