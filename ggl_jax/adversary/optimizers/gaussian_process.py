"""A Gaussian process on padded arrays: fitting and sampling without recompilation, in float32.

Inputs lie in the unit cube, targets are standardised (mean 0, variance 1) and to be minimised or
maximised by the caller. Arrays have a fixed number of rows ``n``, of which ``mask`` marks the used
ones; a padded row changes no result.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_solve

#: Ranges of the hyper-parameters (TuRBO's, for unit-cube inputs and standardised targets), and
#: where their fit starts.
LENGTHSCALE, SIGNAL, NOISE = (0.005, 2.0), (0.05, 20.0), (5e-4, 0.2)
START = (0.5, 1.0, 5e-3)
#: Added to the noise, as a share of the signal variance: what float32 can factorise.
JITTER = 1e-5
#: Step size of Adam on the (logistic) coordinates of the hyper-parameters.
LEARNING_RATE = 0.1


class Hyperparameters(NamedTuple):
    """Hyper-parameters of the process.

    Attributes:
        lengthscale: [z], one for each input (ARD), in units of the cube's side.
        signal: variance of the function, scalar.
        noise: variance of the observations, scalar.
    """

    lengthscale: jax.Array
    signal: jax.Array
    noise: jax.Array


def _squared_distances(a, b):
    """[n m] squared distances of the rows of [n z] and [m z], never negative."""
    products = jnp.matmul(a, b.T, precision="highest")
    squares = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None]
    return jnp.maximum(squares - 2 * products, 0.0)


def _matern(squared_distances):
    # The floor keeps the derivative of the root finite at 0.
    r = jnp.sqrt(jnp.maximum(5 * squared_distances, 1e-10))
    return (1 + r + r**2 / 3) * jnp.exp(-r)


def cross_covariance(hyper: Hyperparameters, a: jax.Array, b: jax.Array) -> jax.Array:
    """Matérn-5/2 covariances [n m] of the function at the rows of ``a`` [n z] and ``b`` [m z]."""
    # Distances are differences of squares: centring the cube halves what cancels.
    a, b = ((x - 0.5) / hyper.lengthscale for x in (a, b))
    return hyper.signal * _matern(_squared_distances(a, b))


def covariance(
    hyper: Hyperparameters, points: jax.Array, mask: jax.Array, jitter: float | jax.Array = JITTER
) -> jax.Array:
    """Covariance [n n] of the observations at ``points`` [n z]; padded rows are unit vectors."""
    n = points.shape[0]
    both = mask[:, None] & mask[None]
    diagonal = jnp.eye(n, dtype=bool)
    matrix = jnp.where(both & ~diagonal, cross_covariance(hyper, points, points), 0.0)
    own = hyper.signal * (1 + jitter) + hyper.noise
    return matrix + jnp.where(diagonal, jnp.where(mask, own, 1.0), 0.0)


@jax.custom_vjp
def _log_density(matrix, targets):
    """log N(targets; 0, matrix), without the constant."""
    return _log_density_forward(matrix, targets)[0]


def _log_density_forward(matrix, targets):
    factor = jnp.linalg.cholesky(matrix)
    weights = cho_solve((factor, True), targets)
    value = -0.5 * targets @ weights - jnp.sum(jnp.log(jnp.diagonal(factor)))
    return value, (factor, weights)


def _log_density_backward(residuals, cotangent):
    # One inverse instead of the derivative of a Cholesky factor: quicker, and stable.
    factor, weights = residuals
    inverse = cho_solve((factor, True), jnp.eye(factor.shape[0], dtype=factor.dtype))
    slope = 0.5 * (jnp.outer(weights, weights) - inverse)
    return cotangent * slope, -cotangent * weights


_log_density.defvjp(_log_density_forward, _log_density_backward)


def log_marginal_likelihood(
    hyper: Hyperparameters, points: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    """Log marginal likelihood of the targets, scalar.

    Args:
        hyper: see :class:`Hyperparameters`.
        points: [n z] in the unit cube; padded rows may hold any finite number.
        targets: [n] standardised; padded rows likewise.
        mask: [n], True for the rows that count.

    Returns:
        A float32 scalar; NaN where float32 cannot factorise the covariance.
    """
    targets = jnp.where(mask, targets, 0.0)
    constant = 0.5 * jnp.log(2 * jnp.pi) * jnp.sum(mask)
    return _log_density(covariance(hyper, points, mask), targets) - constant


def fit(points: jax.Array, targets: jax.Array, mask: jax.Array, *, steps: int) -> Hyperparameters:
    """Fit the hyper-parameters by Adam on the marginal likelihood.

    Each stays in its range: its logarithm is a logistic function of a free coordinate.

    Args:
        points: [n z]; as for :func:`log_marginal_likelihood`, as are the two others.
        targets: [n].
        mask: [n].
        steps: Adam steps, at least 1; the most likely hyper-parameters on the way are returned.

    Edge cases:
        With no data at all the start is returned. Hyper-parameters whose covariance float32 cannot
        factorise are never returned, except the start.
    """
    low, high = jnp.log(jnp.asarray([LENGTHSCALE, SIGNAL, NOISE])).T

    def constrained(coordinates):
        ranges = zip(coordinates, low, high, strict=True)
        return Hyperparameters(*(jnp.exp(a + (b - a) * jax.nn.sigmoid(x)) for x, a, b in ranges))

    def objective(coordinates):
        likelihood = log_marginal_likelihood(constrained(coordinates), points, targets, mask)
        return -likelihood / jnp.maximum(jnp.sum(mask), 1)

    share = (jnp.log(jnp.asarray(START)) - low) / (high - low)
    lengthscale, signal, noise = jnp.log(share) - jnp.log1p(-share)
    start = (jnp.full(points.shape[1], lengthscale, points.dtype), signal, noise)
    adam = optax.adam(LEARNING_RATE)

    def body(carry, _):
        coordinates, moments, best, best_value = carry
        value, gradient = jax.value_and_grad(objective)(coordinates)
        better = value < best_value
        best = jax.tree.map(lambda x, y: jnp.where(better, x, y), coordinates, best)
        finite = jnp.isfinite(optax.tree.norm(gradient))
        gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), gradient)
        updates, moments = adam.update(gradient, moments)
        coordinates = optax.apply_updates(coordinates, updates)
        return (coordinates, moments, best, jnp.where(better, value, best_value)), None

    carry = (start, adam.init(start), start, jnp.asarray(jnp.inf, points.dtype))
    (_, _, best, _), _ = jax.lax.scan(body, carry, length=steps)
    return constrained(best)


def sample_posterior(
    key: jax.Array,
    hyper: Hyperparameters,
    points: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    queries: jax.Array,
    *,
    num: int,
    num_frequencies: int = 1024,
) -> jax.Array:
    """Draw functions from the posterior and evaluate them at the queries.

    A draw is one of the prior, made of random Fourier features, plus the exact correction by the
    data (Matheron's rule). So no [m m] matrix of the queries is formed. Mean and covariance over
    keys are exactly the posterior's; the draws of one key share their frequencies.

    Args:
        key: a typed key.
        hyper: see :class:`Hyperparameters`.
        points: [n z] in the unit cube.
        targets: [n] standardised.
        mask: [n], True for the rows that count.
        queries: [m z] in the unit cube.
        num: number of functions, at least 1.
        num_frequencies: random frequencies of the prior's draws, at least 1.

    Returns:
        [num m] values without observation noise.

    Edge cases:
        Without data the draws are the prior's. Where float32 cannot factorise the covariance, the
        jitter grows tenfold until it can.

    Reference:
        Wilson et al. (2020), "Efficiently Sampling Functions from Gaussian Process Posteriors",
        equation 13.
    """
    key_normal, key_gamma, key_weight, key_noise = jax.random.split(key, 4)
    num_dims = points.shape[1]
    # The spectral density of a Matérn-5/2 kernel is a multivariate t with 5 degrees of freedom.
    frequencies = jax.random.normal(key_normal, (num_frequencies, num_dims), points.dtype)
    chi_square = 2 * jax.random.gamma(key_gamma, 2.5, (num_frequencies, 1), points.dtype)
    frequencies *= jnp.sqrt(5 / chi_square) / hyper.lengthscale
    weights = jax.random.normal(key_weight, (2 * num_frequencies, num), points.dtype)
    weights *= jnp.sqrt(hyper.signal / num_frequencies)

    def prior(x):
        phases = jnp.matmul(x - 0.5, frequencies.T, precision="highest")
        features = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=1)
        return jnp.matmul(features, weights, precision="highest")

    def factorise(jitter):
        return jnp.linalg.cholesky(covariance(hyper, points, mask, jitter))

    def fails(carry):
        jitter, factor = carry
        return ~jnp.all(jnp.isfinite(factor)) & (jitter < 1.0)

    def again(carry):
        jitter = 10 * carry[0]
        return jitter, factorise(jitter)

    jitter = jnp.asarray(JITTER, points.dtype)
    jitter, factor = jax.lax.while_loop(fails, again, (jitter, factorise(jitter)))
    spread = jnp.sqrt(hyper.noise + jitter * hyper.signal)
    noise = spread * jax.random.normal(key_noise, (points.shape[0], num), points.dtype)
    gap = jnp.where(mask[:, None], targets[:, None] - prior(points) - noise, 0.0)
    correction = cho_solve((factor, True), gap)
    cross = jnp.where(mask, cross_covariance(hyper, queries, points), 0.0)
    return (prior(queries) + jnp.matmul(cross, correction, precision="highest")).T
