"""signSGD: only the signs of the update's entries are shared."""

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses._views import nothing_estimated, with_slope_of
from ggl_jax.spec import ranged
from ggl_jax.types import Defense, Facts, View


@ranged
def sign(*, scaled: bool = False, straight_through: bool = True) -> Defense:
    """Share the sign of every entry, one bit each.

    What the adversary learns: there is no parameter to find. Candidates' own signs are compared,
    scaled: times their own mean magnitude.

    Args:
        scaled: times the mean magnitude of the tensor (the scaled sign of error feedback; of one
            update the residual is zero). Else +1 and -1 (signSGD).
        straight_through: the simulation's derivative. A sign's own is 0, so that a search by
            derivatives does not move; True takes that of the update itself in its place, with the
            same values. False leaves 0, for derivative-free searches.

    Returns:
        A Defense with an empty record and estimate and no factored form.

    Edge cases: entries that are zero stay zero. An entry so near to zero that rounding decides its
    sign may be simulated with the other one.

    Reference: Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems";
    scaled: Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes".
    """

    def apply(key, update, context):
        del key, context
        return jax.tree.map(lambda g: _signs(g, scaled), update), {}

    facts = Facts(processes=True)
    view = sign_view(scaled, straight_through)
    return Defense("sign:scaled=True" if scaled else "sign", apply, view, facts)


def sign_view(scaled: bool, straight: bool) -> View:
    """The server's side of :func:`sign`."""

    def simulate(estimated, update):
        del estimated

        def one(g):
            signs = _signs(g, scaled)
            return with_slope_of(g, signs) if straight else jax.lax.stop_gradient(signs)

        return jax.tree.map(one, update)

    return View("sign", nothing_estimated, simulate)


def _signs(g, scaled):
    return jnp.sign(g) * jnp.mean(jnp.abs(g)) if scaled else jnp.sign(g)
