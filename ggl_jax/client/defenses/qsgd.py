"""QSGD: stochastic rounding of every tensor to a few levels, right on average."""

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses._views import in_expectation, root_mean, split_keys
from ggl_jax.spec import Count, ranged
from ggl_jax.types import Defense, Facts, View

#: Magnitudes closer than this share of a tensor's largest one count as equal.
_EQUAL = 1e-5


@ranged
def qsgd(*, levels: Count = 4) -> Defense:
    """Round ``|g_i| / |g|`` of every tensor up or down to a multiple of ``1 / levels``, at random.

    Up with the probability that makes the mean right, so the result is unbiased; the variance of an
    entry is ``q^2 p (1 - p)`` with the quantum ``q = |g| / levels`` and p its place between two
    multiples.

    What the adversary learns: each tensor's quantum, the least distance between two magnitudes that
    it sees (of a small tensor it can be a multiple of it), and from it the noise's level, see
    :func:`rounding_noise`. The draw is unknown, so candidates are compared as they are.

    Args:
        levels: s, a whole number of at least 1. 1 leaves only 0 and the tensor's norm.

    Returns:
        A Defense. Record: ``levels``, and ``sigma``, the root mean square of the rounding's
        standard deviation over all entries. Estimate: ``sigma`` and ``quanta``, a pytree of
        scalars. Under noise of a later stage the quanta cannot be seen, and both are 0.

    Edge cases: a tensor of zeros stays as it is.

    Reference: Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization
    and Encoding", section 3.1, with a tensor for a bucket.
    """

    def apply(key, update, context):
        del context
        quanta = jax.tree.map(lambda g: jnp.linalg.norm(g.ravel()) / levels, update)
        rounded, sigma = round_at_random(key, update, quanta)
        return rounded, {"levels": jnp.float32(levels), "sigma": sigma}

    return Defense(f"qsgd:{levels}", apply, rounding_view("qsgd"), Facts(processes=True))


def round_at_random(key, update, quanta):
    """Every entry to one of the two multiples of its tensor's quantum beside it; and the std."""

    def one(g, quantum, key):
        units = jnp.abs(g) / jnp.where(quantum > 0, quantum, 1)
        below = jnp.floor(units)
        share = units - below
        up = jax.random.uniform(key, g.shape) < share
        return jnp.sign(g) * quantum * (below + up), quantum**2 * jnp.sum(share * (1 - share))

    both = jax.tree.map(one, update, quanta, split_keys(key, update))
    rounded, squares = jax.tree.transpose(jax.tree.structure(update), None, both)
    return rounded, root_mean(squares, update)


def rounding_view(name: str) -> View:
    """The server's side of :func:`qsgd`."""

    def estimate(update, head, noise=0.0):
        del head
        seen = jnp.asarray(noise) <= 0
        quanta = jax.tree.map(lambda y: jnp.where(seen, least_step(y), 0), update)
        squares = jax.tree.map(lambda y, q: y.size * rounding_noise(y, q), update, quanta)
        return {"sigma": root_mean(squares, update), "quanta": quanta}

    return in_expectation(name, estimate, lambda estimated: estimated["sigma"], rounds="each")


def least_step(values: jax.Array) -> jax.Array:
    """The least distance between two magnitudes that differ, zero among them; 0 if there is none.

    Exact where each of some two neighbouring levels has an entry.
    """
    ordered = jnp.sort(jnp.abs(values.ravel()))
    steps = jnp.diff(ordered, prepend=0)
    step = jnp.min(jnp.where(steps > _EQUAL * ordered[-1], steps, jnp.inf))
    return jnp.where(jnp.isfinite(step), step, 0)


def rounding_noise(values: jax.Array, quantum: jax.Array) -> jax.Array:
    """Mean variance of what was rounded at random to the multiples ``values`` of ``quantum``.

    The mean magnitude is known, for rounding keeps it on average, but where entries lay between two
    multiples is not. Taken are magnitudes with an exponential law of that mean m (in quanta), as
    gradients have them, roughly. Their place p between two multiples has the density
    ``exp(-p / m)`` on [0, 1), cut off and normalised, and so ``E p (1 - p) = m (1 + w) - 2 m^2``
    with ``w = 2 / (exp(1 / m) - 1)``. It tends to 1/6 for large m.
    """
    safe = jnp.where(quantum > 0, quantum, 1)
    rate = 1 / jnp.maximum(jnp.mean(jnp.abs(values)) / safe, 1e-6)
    # coth(rate / 2) = 1 + 2 / (exp(rate) - 1); below 0.1 the difference has no digits left.
    closed = (1 / jnp.tanh(rate / 2) - 2 / rate) / rate
    series = 1 / 6 - rate**2 / 360
    return quantum**2 * jnp.where(rate < 0.1, series, closed)
