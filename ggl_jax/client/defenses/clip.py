"""Gradient clipping: an upper bound on the l2 norm of each layer, or of the whole update."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ggl_jax import trees
from ggl_jax.spec import Positive, ranged
from ggl_jax.types import Defense, Factored, Facts, PyTree, View


@ranged
def clip(*, bound: Positive = 4.0, layerwise: bool = True) -> Defense:
    """Scale gradients down to an l2 norm of at most ``bound``.

    What the adversary learns: the bound. A layer that was clipped has exactly the bound as its
    norm, so the largest observed layer norm is the bound whenever any layer was clipped at all.
    Candidates are clipped to what was observed. Note that an unclipped layer's estimate is that
    layer's own norm, which is no bound at all: the simulation then also fits the candidate's norm
    in that layer, from above, as the paper does.

    Args:
        bound: largest l2 norm S, in units of the gradient, finite and > 0.
        layerwise: clip every layer (tensor) by itself, ``g_l * min(1, S / |g_l|)``; else the update
            as a whole, ``g * min(1, S / (|g| + 1e-6))``, as the published code does.

    Returns:
        A Defense. Record: ``bound``. Estimate: ``bound`` (the largest layer's, or the global
        one), ``bound_stderr`` (0 without noise) and, layer by layer, ``layer_bounds``, a pytree
        of scalars.

    Noise that a later stage adds drowns the norms of large layers (in ResNet-18, sigma 0.1 has
    150 times the energy of a clipped layer), and the norms are then estimated as follows.
    Layer-wise: one bound for all layers, see :func:`pooled_bound`. Global: the observed energy
    less the noise's. With 11 million parameters that tells S = 4 only up to about sigma 1e-3; where
    the energy is not significant, its standard error is taken instead, because a bound of 0 would
    leave nothing to match. Standard errors assume a noise level known to 0.2 %.

    Edge cases: a layer of zeros stays zero, also in the derivative. NaN stays NaN in its layer,
    or everywhere where the whole is clipped. Squares that overflow float32 (norms beyond 1e19)
    give zeros.

    Reference: paper, layer-wise l2, S = 4. The published code clips globally.
    """

    def apply(key, update, context):
        del key, context
        same = jnp.float32(bound)
        bounds = jax.tree.map(lambda _: same, update) if layerwise else same
        return _clip_to(bounds, update, layerwise), {"bound": same}

    def l2_bound(num_tensors):
        return bound * np.sqrt(num_tensors) if layerwise else bound

    facts = Facts(l2_bound=l2_bound, shrinks=True, processes=True)
    name = f"clip:{bound:g}" + ("" if layerwise else ",layerwise=False")
    return Defense(name, apply, clip_view(layerwise), facts)


def clip_view(layerwise: bool) -> View:
    """The server's side of :func:`clip`, layer by layer or of the update as a whole."""

    def estimate(update, head, noise=0.0):
        del head
        squares = trees.sq_norms(update)
        sizes = jax.tree.map(jnp.size, update)
        noisy = jnp.asarray(noise) > 0
        if not layerwise:
            size = float(sum(jax.tree.leaves(sizes)))
            energy = trees.total(squares) - size * jnp.square(noise)
            stderr = jnp.sqrt(_energy_variance(noise, size, jnp.maximum(energy, 0)))
            found = trees.safe_sqrt(jnp.maximum(energy, stderr))
            return {"bound": found, "bound_stderr": _to_norm(stderr, found)}
        observed = jax.tree.map(trees.safe_sqrt, squares)
        pooled, stderr = pooled_bound(
            jnp.stack(jax.tree.leaves(squares)), np.array(jax.tree.leaves(sizes), float), noise
        )
        largest = jnp.max(jnp.stack(jax.tree.leaves(observed)))
        return {
            "bound": jnp.where(noisy, pooled, largest),
            "bound_stderr": jnp.where(noisy, stderr, 0.0),
            "layer_bounds": jax.tree.map(lambda n: jnp.where(noisy, pooled, n), observed),
        }

    def bounds_of(estimated):
        return estimated["layer_bounds" if layerwise else "bound"]

    def simulate(estimated, update):
        return _clip_to(bounds_of(estimated), update, layerwise)

    def factor(estimated):
        scales = layer_scales if layerwise else _global_scales
        return Factored(scale=Partial(scales, bounds_of(estimated)))

    return View("clip", estimate, simulate, factor)


def layer_scales(bounds: PyTree, squares: PyTree) -> PyTree:
    """The factor of each tensor that brings its norm to at most its bound (infinity: 1)."""
    return jax.tree.map(_layer_scale, bounds, squares)


def _global_scales(bound, squares):
    scale = _global_scale(bound, trees.total(squares))
    return jax.tree.map(lambda _: scale, squares)


def _clip_to(bounds, update, layerwise):
    scales = (layer_scales if layerwise else _global_scales)(bounds, trees.sq_norms(update))
    return jax.tree.map(lambda scale, g: scale.astype(g.dtype) * g, scales, update)


def _layer_scale(bound: jax.Array, square: jax.Array) -> jax.Array:
    over = square > jnp.square(bound)
    return jnp.where(over, bound / jnp.sqrt(jnp.where(over, square, 1)), 1)


def _global_scale(bound: jax.Array, square: jax.Array) -> jax.Array:
    # The 1e-6 is torch.nn.utils.clip_grad_norm_'s and so the published code's.
    return jnp.minimum(1, bound / (trees.safe_sqrt(square) + 1e-6))


def _to_norm(stderr, norm):
    """Standard error of a norm from that of its square (delta method)."""
    return jnp.where(norm > 0, stderr / jnp.where(norm > 0, 2 * norm, 1), 0)


#: Relative uncertainty of the noise level that is allowed for. Without it layers with millions of
#: entries, whose energy is nearly all noise, would be trusted too much.
_NOISE_UNCERTAINTY = 2e-3


def _energy_variance(noise, size, energy):
    """Variance of ``|g + n|^2 - size sigma^2`` as an estimate of ``|g|^2 = energy``."""
    noise = jnp.asarray(noise, jnp.float32)
    drawn = 2 * size * noise**4 + 4 * noise**2 * energy
    return drawn + jnp.square(2 * size * noise**2 * _NOISE_UNCERTAINTY)


def pooled_bound(
    squares: jax.Array, sizes: np.ndarray, noise: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """One clipping bound from the noisy norms of many layers.

    ``q_l = |y_l|^2 - size_l sigma^2`` is an unbiased estimate of layer l's energy with variance
    ``v_l = 2 size_l sigma^4 + 4 sigma^2 S^2``. A clipped layer's energy is S^2, every other's lies
    below. So start from the layer whose energy is largest for certain (largest
    ``q_l - 3 sqrt(v_l)``), then average, by inverse variances, over the layers that agree with it
    to three standard deviations. Layers that could not tell half the energy from the whole
    (``sqrt(v_l) > S^2 / 6``) are left out, for they agree with anything and would pull the mean
    down.

    Even a layer whose direction were known gives S only to sigma, so the relative error is at
    best ``sigma / S / sqrt(number of clipped layers)``: 2.5 % for one layer at sigma 0.1, S = 4.

    Args:
        squares: [l] squared norms of the observed layers.
        sizes: [l] their numbers of entries.
        noise: standard deviation of the noise.

    Returns:
        ``(bound, stderr)``. Where no layer was clipped, the bound is near the largest norm among
        those that can be measured. Where none can, it is the upper end of the smallest 3-sigma
        interval, and so is its standard error.
    """
    noise = jnp.asarray(noise, jnp.float32)
    num_entries = jnp.asarray(sizes, jnp.float32)
    energy = squares - num_entries * noise**2

    def variance(energy):
        return _energy_variance(noise, num_entries, energy)

    std = jnp.sqrt(variance(jnp.maximum(energy, 0)))
    certain = energy - 3 * std
    first = jnp.argmax(certain)
    start, start_variance = energy[first], jnp.square(std[first])

    def pool(_, state):
        pooled, _ = state
        variances = variance(pooled) + 1e-30
        agrees = jnp.abs(energy - pooled) < 3 * jnp.sqrt(variances)
        agrees &= jnp.sqrt(variances) < pooled / 6
        weights = jnp.where(agrees, 1 / variances, 0)
        weight = jnp.sum(weights)
        safe = jnp.where(weight > 0, weight, 1)
        mean = jnp.sum(weights * energy) / safe
        some = weight > 0
        return jnp.where(some, mean, pooled), jnp.where(some, 1 / safe, start_variance)

    pooled, pooled_variance = jax.lax.fori_loop(0, 8, pool, (start, start_variance))
    bound = trees.safe_sqrt(pooled)
    nothing = jnp.sqrt(jnp.min(jnp.maximum(energy, 0) + 3 * std))
    measurable = certain[first] > 0
    stderr = _to_norm(jnp.sqrt(pooled_variance), bound)
    return jnp.where(measurable, bound, nothing), jnp.where(measurable, stderr, nothing)
