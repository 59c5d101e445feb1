"""CENSOR: share, in place of the gradient, a random direction orthogonal to it."""

import jax
import jax.numpy as jnp

from ggl_jax import trees
from ggl_jax.client.defenses._views import add_draw, root_mean
from ggl_jax.client.gradients import loss_of
from ggl_jax.spec import Count, ranged
from ggl_jax.types import Defense, Facts, View

#: The released code tries its draws with this step.
_STEP = 1e-4

#: Mean of the largest of 20 standard normals: how far the released code's choice among 20 draws
#: goes, in standard deviations.
_BEST_OF_20 = 1.867


@ranged
def censor(*, trials: Count = 20, exact: bool = True) -> Defense:
    """Draw directions orthogonal to each tensor's gradient; share the one that trains best.

    For each trial and tensor: a random direction r of length 1, less its projection on the gradient
    g, scaled to the length of g. Of the trials the one is shared after whose step (of 1e-4) the
    batch's loss is lowest.

    What the adversary learns: each tensor's length, which the defense keeps, and that the gradient
    lies orthogonal to what was shared: two numbers of each tensor. It puts every candidate through
    the defense with the observed update for the random direction: what comes out has the
    candidate's lengths and lies orthogonal to it, and is the observed update itself if the
    candidate is the private image.

    Args:
        trials: a whole number of at least 1. The released configurations have 20.
        exact: the projection is ``(r.g / |g|^2) g``, so the result is orthogonal. False: as
            released, divided by ``|g|`` once. A part ``(r.g)(1 - |g|)`` along the gradient is left,
            and of several trials the lowest loss picks one that points along it; so the update
            tells its direction. And where no trial lowers the loss, the released code shares the
            gradient as it is; so does this form.

    Returns:
        A Defense without factored form. Record: ``trials``. Estimate: ``directions``,
        the observed update; if not exact, ``weights``, a pytree of scalars, from the observed
        lengths: the part of the gradient that the update holds on average over 20 trials; and
        ``sigma``, the root mean square of all entries, since nearly all of the update is random.
        (With a standard deviation s_l of the product of gradient and trial in tensor l, and S of
        their sum, it is ``1.867 s_l^2 / (S |g_l|^2)``, to first order.)

    Edge cases: a tensor of zeros stays as it is. Of a tensor with one entry nothing is orthogonal:
    the exact form gives 0, or what rounding leaves, scaled.

    Reference: Zhang et al. 2025 (NDSS), "CENSOR: Defense Against Gradient Inversion via Orthogonal
    Subspace Bayesian Sampling"; not exact: its repository's ``defense.py``, which applies the
    defense in the first ten epochs and shares plain gradients later.
    """

    def draw(key, update):
        drawn = add_draw(
            jax.tree.map(jnp.zeros_like, update), lambda num: jax.random.normal(key, (num,))
        )

        def one(r, g):
            return orthogonal(r / jnp.linalg.norm(r.ravel()), g, exact)

        return jax.tree.map(one, drawn, update)

    def apply(key, update, context):
        params = context.variables["params"]

        def loss(step):
            moved = jax.tree.map(lambda w, g: w - _STEP * g, params, step)
            logits, _ = context.model.apply({**context.variables, "params": moved}, context.images)
            return loss_of(context.model)(logits, context.labels)

        def trial(best, key):
            drawn = draw(key, update)
            lowest, kept = best
            value = loss(drawn)
            better = value < lowest
            kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), drawn, kept)
            return (jnp.where(better, value, lowest), kept), None

        first = jnp.inf if exact else loss(jax.tree.map(jnp.zeros_like, update))
        keys = jax.random.split(key, trials)
        (_, shared), _ = jax.lax.scan(trial, (jnp.float32(first), update), keys)
        return shared, {"trials": jnp.float32(trials)}

    name = f"censor:{trials}" + ("" if exact else ",exact=False")
    return Defense(name, apply, censor_view(exact), Facts())


def orthogonal(direction: jax.Array, g: jax.Array, exact: bool) -> jax.Array:
    """``direction`` less its projection on g, as long as g; not ``exact``: divided by |g| once."""
    square = jnp.sum(jnp.square(g))
    divisor = square if exact else trees.safe_sqrt(square)
    inner = jnp.vdot(direction, g)
    rest = direction - inner / jnp.where(divisor > 0, divisor, 1) * g
    length = trees.safe_sqrt(jnp.sum(jnp.square(rest)))
    return rest * (trees.safe_sqrt(square) / jnp.where(length > 0, length, 1))


def censor_view(exact: bool) -> View:
    """The server's side of :func:`censor`, exact or as released."""

    def estimate(update, head, noise=0.0):
        del head, noise
        if exact:
            return {"directions": update}
        lengths = jax.tree.map(trees.safe_sqrt, trees.sq_norms(update))
        spreads = jax.tree.map(
            lambda n, y: n**2 * jnp.abs(1 - n) / jnp.sqrt(y.size), lengths, update
        )
        total = trees.safe_sqrt(trees.total(trees.sq_norms(spreads)))

        def weight(n, s):
            return _BEST_OF_20 * s**2 / jnp.where(total * n > 0, total * n**2, 1)

        return {
            "weights": jax.tree.map(weight, lengths, spreads),
            "sigma": root_mean(trees.sq_norms(update), update),
        }

    def simulate(estimated, update):
        if exact:
            return jax.tree.map(
                lambda y, g: orthogonal(y, g, True), estimated["directions"], update
            )
        return jax.tree.map(jnp.multiply, estimated["weights"], update)

    if exact:
        return View("censor", estimate, simulate, rounds=None)
    return View(
        "censor",
        estimate,
        simulate,
        adds_noise=True,
        noise_std=lambda estimated: estimated["sigma"],
        rounds=None,
    )
