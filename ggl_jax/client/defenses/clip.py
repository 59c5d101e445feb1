"""Gradient clipping: an upper bound on the l2 norm of each layer, or of the whole update."""

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.client.defenses import _checks, _traits
from ggl_jax.types import Defense, Factored


def clip(*, bound: float = 4.0, fidelity: str = "paper") -> Defense:
    """Scale gradients down to an l2 norm of at most ``bound``.

    What the adversary learns: the bound. A layer that was clipped has exactly the bound as its
    norm, so the largest observed layer norm is the bound whenever any layer was clipped at all.
    Candidates are clipped to what was observed. Note that an unclipped layer's estimate is that
    layer's own norm, which is no bound at all: the simulation then also fits the candidate's norm
    in that layer, from above, as the paper does.

    Args:
        bound: largest l2 norm S, in units of the gradient, finite and > 0.
        fidelity: ``"paper"`` clips every layer (tensor) by itself,
            ``g_l * min(1, S / |g_l|)``; ``"code"`` clips the update as a whole,
            ``g * min(1, S / (|g| + 1e-6))``.

    Returns:
        A Defense. Record: ``bound``. Estimate: ``bound`` (the largest layer's, or the global
        one), ``bound_stderr`` (0 without noise) and, in the paper's form, ``layer_bounds``, a
        pytree of scalars.

    Noise that a later stage adds drowns the norms of large layers (in ResNet-18, sigma 0.1 has
    150 times the energy of a clipped layer), and the norms are then estimated as follows.
    Layer-wise: one bound for all layers, see :func:`pooled_bound`. Global: the observed energy
    less the noise's; its standard error is large (at sigma 0.1 and 11 million parameters larger
    than S = 4 itself), and where the energy is not significant, its standard error is taken
    instead, because a bound of 0 would leave nothing to match.

    Edge cases: a layer of zeros stays zero, also in the derivative. NaN stays NaN in its layer
    (``"paper"``) or everywhere (``"code"``). Squares that overflow float32 (norms beyond 1e19)
    give zeros.

    Reference: paper, section 4.2, layer-wise l2, S = 4. The published code clips globally.
    """
    _checks.fidelity("clip", fidelity)
    bound = _checks.number("clip", "bound", bound, low=0, open_low=True, default=4)
    layerwise = fidelity == "paper"

    def scales(bounds, squares):
        if layerwise:
            return jax.tree.map(_layer_scale, bounds, squares)
        scale = _global_scale(bounds, trees.total(squares))
        return jax.tree.map(lambda _: scale, squares)

    def clip_to(bounds, update):
        return jax.tree.map(
            lambda scale, g: scale.astype(g.dtype) * g,
            scales(bounds, trees.sq_norms(update)),
            update,
        )

    def apply(key, update, context):
        del key, context
        same = jnp.float32(bound)
        return clip_to(jax.tree.map(lambda _: same, update) if layerwise else same, update)

    def record(key, update, context):
        del key, update, context
        return {"bound": jnp.float32(bound)}

    def estimate(update, head, noise=0.0):
        del head
        squares = trees.sq_norms(update)
        sizes = jax.tree.map(jnp.size, update)
        noisy = jnp.asarray(noise) > 0
        if not layerwise:
            size = float(sum(jax.tree.leaves(sizes)))
            energy = trees.total(squares) - size * jnp.square(noise)
            stderr = _energy_stderr(noise, size, jnp.maximum(energy, 0))
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

    def simulate(estimated, update):
        return clip_to(estimated["layer_bounds" if layerwise else "bound"], update)

    def factor(estimated):
        bounds = estimated["layer_bounds" if layerwise else "bound"]
        return Factored(scale=lambda squares: scales(bounds, squares))

    _traits.mark(factor, masks=False, scales=True)
    return Defense(f"clip:{bound:g}", apply, record, estimate, simulate, factor)


def _layer_scale(bound: jax.Array, square: jax.Array) -> jax.Array:
    over = square > jnp.square(bound)
    return jnp.where(over, bound / jnp.sqrt(jnp.where(over, square, 1)), 1)


def _global_scale(bound: jax.Array, square: jax.Array) -> jax.Array:
    # The 1e-6 is torch.nn.utils.clip_grad_norm_'s and so the published code's.
    return jnp.minimum(1, bound / (trees.safe_sqrt(square) + 1e-6))


def _energy_stderr(noise, size, energy):
    """Standard error of ``|g + n|^2 - size sigma^2`` as an estimate of ``|g|^2 = energy``."""
    noise = jnp.asarray(noise, jnp.float32)
    return jnp.sqrt(2 * size * noise**4 + 4 * noise**2 * energy)


def _to_norm(stderr, norm):
    """Standard error of a norm from that of its square (delta method)."""
    return jnp.where(norm > 0, stderr / jnp.where(norm > 0, 2 * norm, 1), 0)


#: Relative uncertainty of the noise level that the pooling allows for. Without it the layers with
#: millions of entries, whose energy is nearly all noise, would be trusted too much.
_NOISE_UNCERTAINTY = 2e-3


def pooled_bound(
    squares: jax.Array, sizes: np.ndarray, noise: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """One clipping bound from the noisy norms of many layers.

    ``q_l = |y_l|^2 - size_l sigma^2`` is an unbiased estimate of layer l's energy, with variance
    ``2 size_l sigma^4 + 4 sigma^2 S^2``; a clipped layer's energy is S^2, any other's lies below.
    The bound is the maximum of the likelihood of that mixture (even odds of clipped or not,
    unclipped energies uniform below S^2): a mean weighted by inverse variances which leaves out
    the layers that were not clipped.

    Args:
        squares: [l] squared norms of the observed layers.
        sizes: [l] their numbers of entries.
        noise: standard deviation of the noise.

    Returns:
        ``(bound, stderr)``. The standard error is that of the layers taken for clipped; infinite
        where none is. Where no layer was clipped, the estimate is near the largest norm among
        those that are measured well.
    """
    noise = jnp.asarray(noise, jnp.float32)
    sizes = jnp.asarray(sizes, jnp.float32)
    energy = squares - sizes * noise**2

    def variance(bound):
        own = 2 * sizes * noise**4 + 4 * noise**2 * bound**2
        return own + jnp.square(2 * sizes * noise**2 * _NOISE_UNCERTAINTY) + 1e-12 * bound**4

    def densities(bound):
        """Per layer, the densities of being clipped and of being below the bound."""
        std = jnp.sqrt(variance(bound))
        clipped = jnp.exp(-0.5 * jnp.square((energy - bound**2) / std)) / std / np.sqrt(2 * np.pi)
        cdf = jax.scipy.stats.norm.cdf
        below = (cdf(energy / std) - cdf((energy - bound**2) / std)) / bound**2
        return clipped, jnp.maximum(below, 0)

    def likelihood(bound):
        clipped, below = densities(bound)
        return jnp.sum(jnp.log(clipped + below + 1e-30))

    # Norms that the data can distinguish from 0, up to the largest that any layer allows.
    high = jnp.sqrt(jnp.max(squares)) * 1.01 + 1e-12
    coarse = high * jnp.logspace(-4, 0, 1024)
    ratio = float(10 ** (4 / 1023))
    best = coarse[jnp.argmax(jax.vmap(likelihood)(coarse))]
    fine = best * jnp.linspace(1 / ratio, ratio, 257)
    bound = fine[jnp.argmax(jax.vmap(likelihood)(fine))]
    clipped, below = densities(bound)
    information = jnp.sum(clipped / (clipped + below + 1e-30) / variance(bound))
    return bound, _to_norm(1 / jnp.sqrt(information), bound)
