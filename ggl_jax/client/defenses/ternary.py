"""TernGrad: every entry becomes -s, 0 or s, at random and right on average."""

from typing import Annotated

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses._views import root_mean
from ggl_jax.client.defenses.qsgd import round_at_random, rounding_noise
from ggl_jax.spec import AtLeast, ranged
from ggl_jax.types import Defense, Facts, View


@ranged
def ternary(*, clip: Annotated[float, AtLeast(0.0)] = 2.5) -> Defense:
    """Clip every tensor's entries at ``clip`` of its standard deviations, then round to -s, 0, s.

    s is the largest magnitude after clipping. An entry g becomes ``s sign(g)`` with probability
    ``|g| / s``, else 0; so the result is unbiased for the clipped update, and an entry's variance
    is ``|g| (s - |g|)``.

    What the adversary learns: each tensor's s, which is its only magnitude. Candidates are clipped
    at it, which is what the client's result is on average.

    Args:
        clip: c, in standard deviations, finite and at least 0; 0 clips nothing.

    Returns:
        A Defense without factored form. Record: ``clip``, and ``sigma``, the root mean square of
        the rounding's standard deviation over all entries. Estimate: ``sigma`` (see
        :func:`ggl_jax.client.defenses.qsgd.rounding_noise`) and ``bounds``, a pytree of each
        tensor's s. Under noise of a later stage s is not seen: nothing is clipped, sigma is 0.

    Edge cases: a tensor of zeros, or all of whose entries came out 0, has the bound 0 and is not
    clipped in candidates. The standard deviation is about the tensor's mean, as numpy's.

    Reference: Wen et al. 2017, "TernGrad: Ternary Gradients to Reduce Communication in Distributed
    Deep Learning", equations 2 and 3, and 14 for the clipping with c = 2.5; scales by layer.
    """

    def apply(key, update, context):
        del context
        if clip:
            update = jax.tree.map(lambda g: clip_entries(g, clip * jnp.std(g)), update)
        largest = jax.tree.map(lambda g: jnp.max(jnp.abs(g)), update)
        rounded, sigma = round_at_random(key, update, largest)
        return rounded, {"clip": jnp.float32(clip), "sigma": sigma}

    return Defense(f"ternary:{clip:g}", apply, ternary_view(), Facts(processes=True))


def clip_entries(g: jax.Array, bound: jax.Array) -> jax.Array:
    """Every entry to at most ``bound`` in magnitude; a bound of 0 (a flat tensor) clips nothing."""
    return jnp.where(bound > 0, jnp.clip(g, -bound, bound), g)


def ternary_view() -> View:
    """The server's side of :func:`ternary`."""

    def estimate(update, head, noise=0.0):
        del head
        seen = jnp.asarray(noise) <= 0
        bounds = jax.tree.map(lambda y: jnp.where(seen, jnp.max(jnp.abs(y)), 0), update)
        squares = jax.tree.map(lambda y, s: y.size * rounding_noise(y, s), update, bounds)
        return {"sigma": root_mean(squares, update), "bounds": bounds}

    def simulate(estimated, update):
        return jax.tree.map(clip_entries, update, estimated["bounds"])

    return View(
        "ternary",
        estimate,
        simulate,
        adds_noise=True,
        noise_std=lambda estimated: estimated["sigma"],
        rounds="each",
    )
