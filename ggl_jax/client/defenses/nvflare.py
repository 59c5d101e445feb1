"""NVFlare's privacy filters: the largest percentile, and the sparse vector technique."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ggl_jax.client.defenses._views import nonzero, root_mean
from ggl_jax.client.defenses.soteria import percentile as percentile_of
from ggl_jax.client.defenses.ternary import clip_entries
from ggl_jax.spec import AtLeast, Positive, ranged
from ggl_jax.types import Defense, Facts, View

#: Below 100, so that something is left.
Percent = Annotated[float, AtLeast(0.0, below=100.0)]


@ranged
def percentile(*, percentile: Percent = 10.0, gamma: Positive = 0.01) -> Defense:
    """NVFlare's "largest percentile to share": drop small entries, cut large ones.

    Entries below the given percentile of all magnitudes of the update (numpy's, linear) become 0,
    the others are clipped to ``[-gamma, gamma]``. NVFlare does it to differences of weights divided
    by the number of local steps; here gamma is in units of the update.

    What the adversary learns: gamma, the largest magnitude, and which entries were shared.
    Candidates are clipped and masked alike, so the private image's own update is met exactly. (If
    nothing was as large as gamma, its estimate cuts nothing of the private image's either.)

    Args:
        percentile: in per cent, at least 0 and below 100.
        gamma: finite and > 0.

    Returns:
        A Defense without factored form. Record: ``gamma``, and ``rate``, the share below the
        percentile. Estimate: ``gamma``, ``rate``, the share of zeros, and ``support``. Under noise
        of a later stage neither is seen: candidates are then compared as they are.

    Edge cases: tensors with no axis are shared as they are, as in NVFlare. Entries that are zero by
    themselves count among the small ones, so the rate is then estimated too high.

    Reference: Shokri and Shmatikov 2015, "Privacy-Preserving Deep Learning"; NVFlare's
    ``PercentilePrivacy`` (with its defaults). The paper adds noise to what is shared; the filter
    does not.
    """

    def apply(key, update, context):
        del key, context
        flat = jnp.abs(ravel_pytree(update)[0])
        cutoff = percentile_of(flat, percentile / 100)

        def one(g):
            kept = jnp.where(jnp.abs(g) < cutoff, 0, jnp.clip(g, -gamma, gamma))
            return kept if g.ndim else g

        record = {"gamma": jnp.float32(gamma), "rate": jnp.float32(percentile / 100)}
        return jax.tree.map(one, update), record

    name = f"percentile:{percentile:g},gamma={gamma:g}"
    return Defense(name, apply, percentile_view(), Facts(shrinks=True, processes=True))


def percentile_view() -> View:
    """The server's side of :func:`percentile`."""

    def estimate(update, head, noise=0.0):
        del head
        seen = jnp.asarray(noise) <= 0
        flat = jnp.abs(ravel_pytree(update)[0])
        return {
            "gamma": jnp.where(seen, jnp.max(flat), 0),
            "rate": jnp.where(seen, jnp.mean(flat == 0, dtype=jnp.float32), 0),
            "support": nonzero(update, noise),
        }

    def simulate(estimated, update):
        return jax.tree.map(
            lambda g, kept: kept * (clip_entries(g, estimated["gamma"]) if g.ndim else g),
            update,
            estimated["support"],
        )

    return View("percentile", estimate, simulate)


@ranged
def svt(
    *,
    fraction: Annotated[float, AtLeast(1e-6, below=1.0)] = 0.1,
    epsilon: Positive = 0.1,
    noise_var: Positive = 0.1,
    gamma: Positive = 1e-5,
    tau: Annotated[float, AtLeast(0.0)] = 1e-6,
) -> Defense:
    """NVFlare's sparse vector technique: share entries that pass a noisy threshold, with noise.

    With n = ceil(fraction * size) entries to share: an entry is accepted when its magnitude, cut at
    gamma, plus Laplace noise of scale ``4 gamma n / epsilon_2`` reaches ``tau`` plus Laplace noise
    of scale ``2 gamma / epsilon``, with ``epsilon_2 = epsilon (2 n)^(2/3)``; those not accepted are
    asked again until there are n. n of the accepted are drawn at random, get Laplace noise of scale
    ``2 gamma / noise_var`` and are clipped to ``[-gamma, gamma]``; all others become 0.

    NVFlare's filter draws with replacement unless told otherwise, so fewer than n are shared; here,
    as the method says, without. Early versions of it set only those to 0 that were not accepted:
    entries accepted and not drawn were shared as they are. That form is not offered. Entries are
    asked once, and the best n taken where fewer pass, in place of asking them again.

    What the adversary learns: gamma, the largest magnitude, the noise's scale b, from the share of
    shared entries that were cut (``exp(-gamma / b)`` of small ones; b is estimated too large where
    entries are not small beside gamma), and the support. Candidates are put through the mean of
    what the noise and the cut do to an entry, a smooth function.

    Args:
        fraction: share of all entries that is shared, at least 1e-6 and below 1.
        epsilon: of the threshold, finite and > 0.
        noise_var: NVFlare's name of the budget of the shared values, finite and > 0.
        gamma: finite and > 0, in units of the update.
        tau: threshold, finite and >= 0.

    Returns:
        A Defense without factored form. Record: ``gamma``, ``scale`` (b). Estimate: these,
        ``sigma``, the noise's standard deviation over all entries, and ``support``. Under noise of
        a later stage they are not seen, and candidates are compared as they are.

    Reference: Li et al. 2019, "Privacy-Preserving Federated Brain Tumour Segmentation"; Lyu et al.
    2017, "Understanding the Sparse Vector Technique"; NVFlare's ``SVTPrivacy`` (with its defaults).
    """
    scale = 2 * gamma / noise_var

    def apply(key, update, context):
        del context
        flat, unravel = ravel_pytree(update)
        num = min(flat.size, -int(-fraction * flat.size // 1))
        second = epsilon * (2 * num) ** (2 / 3)
        of_threshold, of_query, of_draw, of_value = jax.random.split(key, 4)
        threshold = tau + 2 * gamma / epsilon * jax.random.laplace(of_threshold)
        asked = jax.random.laplace(of_query, flat.shape) * 4 * gamma * num / second
        asked += jnp.minimum(jnp.abs(flat), gamma)
        # Any n of those that pass, drawn at random; then the best of the others.
        order = jax.random.uniform(of_draw, flat.shape)
        passed = asked >= threshold
        asked = (asked - jnp.min(asked)) / (jnp.ptp(asked) + 1e-30)
        chosen = jax.lax.top_k(jnp.where(passed, 2 + order, asked), num)[1]
        values = flat[chosen] + scale * jax.random.laplace(of_value, (num,))
        shared = jnp.zeros_like(flat).at[chosen].set(jnp.clip(values, -gamma, gamma))
        return unravel(shared), {"gamma": jnp.float32(gamma), "scale": jnp.float32(scale)}

    name = (
        f"svt:{fraction:g},epsilon={epsilon:g},noise_var={noise_var:g},gamma={gamma:g},tau={tau:g}"
    )
    return Defense(name, apply, svt_view(), Facts(processes=True))


def svt_view() -> View:
    """The server's side of :func:`svt`."""

    def estimate(update, head, noise=0.0):
        del head
        seen = jnp.asarray(noise) <= 0
        flat = jnp.abs(ravel_pytree(update)[0])
        gamma = jnp.max(flat)
        cut = jnp.sum(flat >= gamma * (1 - 1e-6)) / jnp.maximum(jnp.sum(flat > 0), 1)
        scale = gamma / -jnp.log(jnp.clip(cut, 1e-6, 1 - 1e-6))
        ratio = gamma / jnp.maximum(scale, 1e-30)
        variance = 2 * scale**2 * (1 - jnp.exp(-ratio) * (1 + ratio))
        support = nonzero(update, noise)
        squares = jax.tree.map(lambda kept: jnp.sum(kept) * variance, support)
        return {
            "gamma": jnp.where(seen, gamma, 0),
            "scale": jnp.where(seen, scale, 0),
            "sigma": jnp.where(seen, root_mean(squares, update), 0),
            "support": support,
        }

    def simulate(estimated, update):
        gamma, scale = estimated["gamma"], estimated["scale"]

        def one(g, kept):
            return jnp.where(gamma > 0, kept * mean_of_cut(g, gamma, scale), g)

        return jax.tree.map(one, update, estimated["support"])

    return View(
        "svt",
        estimate,
        simulate,
        adds_noise=True,
        noise_std=lambda found: found["sigma"],
        rounds="each",
    )


def mean_of_cut(g: jax.Array, gamma: jax.Array, scale: jax.Array) -> jax.Array:
    """``E clip(g + X, -gamma, gamma)`` for Laplace noise X: odd, increasing, at most gamma."""
    scale = jnp.where(scale > 0, scale, 1)
    inside = jnp.clip(g, -gamma, gamma)
    # The mean over X of the part inside, and what is gained beyond the end.
    ends = jnp.exp((inside - gamma) / scale) - jnp.exp(-(inside + gamma) / scale)
    beyond = jnp.abs(g) - jnp.abs(inside)
    gained = -jnp.expm1(-beyond / scale) * -jnp.expm1(-2 * gamma / scale)
    return inside - 0.5 * scale * (ends - jnp.sign(g) * gained)
