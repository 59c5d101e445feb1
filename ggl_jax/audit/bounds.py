"""What no attack can pass: bounds beside what an attack did, where a defense adds Gaussian noise.

Two of them, of an update ``y = f(x) + sigma N(0, I)`` of one image x, whatever is computed from y:

- :func:`identification`: how often the private image can be told among n (reconstruction
  robustness of Gaussian mechanisms);
- :func:`squared_error`: how near any reconstruction can come, on average over images drawn from a
  Gaussian. It is the bound of van Trees (the Bayesian Cramer-Rao bound) where f is smooth, and that
  of Weiss and Weinstein everywhere. Updates of ReLU networks jump where a unit switches: their
  Fisher information is infinite, and a formula that sees derivatives alone claims too much (of
  ``convnet``, updates differ ten times as much and more as they say: docs/results.md).

Both are the audit's: they look at the defense's parameters and at the private image's label, which
an adversary would have to find out.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import special

from ggl_jax import trees
from ggl_jax.audit import privacy
from ggl_jax.client.defenses import chain, stages_of
from ggl_jax.client.gradients import client_update
from ggl_jax.errors import GGLError
from ggl_jax.files import digest
from ggl_jax.grammar import at_least
from ggl_jax.priors.samples import samples
from ggl_jax.spec import Client
from ggl_jax.types import Context, Defense, Model, Public

#: Principal directions of the prior in which errors are counted; what lies beside them counts as
#: known. 32 hold 86 % of the variance of the shipped prior.
DIRECTIONS = 32
#: Samples of the prior from which its mean and covariance come.
PRIOR_SAMPLES = 512
#: Images on which derivatives are taken, to choose directions and step sizes by.
SKETCHES = 2
#: Steps along a direction, in units of the error that derivatives predict there; the bound takes
#: a step and its double, so the last one is no candidate.
STEPS = (0.125, 0.25, 0.5, 1.0)
#: With this probability a bound of squared error fails, for it rests on samples.
FAILURE = 0.05


# --- identification -----------------------------------------------------------------------------


def identification(num: int, mu: float) -> float:
    """Largest probability with which any attack names the private one of ``num`` images.

    ``Phi(Phi^-1(1 / num) + mu)``: the blow-up function ``sup {P(E): Q(E) <= kappa}`` of two
    Gaussians whose means are ``mu`` standard deviations apart, at ``kappa = 1 / num``, the best
    guess without the update. The blow-up function is concave in kappa, so the mean over the images
    is at most its value at the mean of kappa.

    Assumes: each of the images is as likely to be the private one; given the image, the update is
    a Gaussian of known standard deviation sigma on every entry; and the means of these Gaussians
    all lie within ``mu sigma`` of one point: of zero for a clip to the norm ``mu sigma``
    (:func:`ggl_jax.audit.privacy.mechanism`). The adversary may know all else: the model, the
    label, the images to choose from. It is exact for two images that lie opposite each other.

    Args:
        num: at least 1.
        mu: at least 0; infinite gives 1.

    Returns:
        In [1 / num, 1].

    Raises:
        GGLError: an argument is out of range.

    Reference: Hayes, Mahloujifar and Balle 2023, "Bounding Training Data Reconstruction in DP-SGD"
    (blow-up functions); in closed form for Gaussians: Kaissis et al. 2023, "Bounding Data
    Reconstruction Attacks with the Hypothesis Testing Interpretation of Differential Privacy".

    >>> identification(2, 0.0), round(identification(100, 2.0), 3)
    (0.5, 0.372)
    """
    at_least(1, num=num)
    if not mu >= 0:
        raise GGLError(f"mu={mu!r}: give a number of at least 0")
    return float(special.ndtr(special.ndtri(1 / num) + mu))


# --- squared error ------------------------------------------------------------------------------


class Normal(NamedTuple):
    """A Gaussian over images, of the mean and covariance of samples.

    Attributes:
        mean: [p].
        factor: [n p]; factor^T factor is the covariance.
        directions: [r p] orthonormal, the leading principal ones.
        variances: [r] along them, > 0.
    """

    mean: np.ndarray
    factor: np.ndarray
    directions: np.ndarray
    variances: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, directions: int = DIRECTIONS) -> "Normal":
        """The Gaussian of samples [n ...], n >= 2, with at most so many directions."""
        flat = np.asarray(images, np.float64).reshape(len(images), -1)
        mean = flat.mean(axis=0)
        factor = (flat - mean) / math.sqrt(len(flat))
        _, scales, own = np.linalg.svd(factor, full_matrices=False)
        chosen = np.flatnonzero(scales**2 > 1e-9 * scales[0] ** 2)[:directions]
        return cls(mean, factor, own[chosen], scales[chosen] ** 2)

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Images [num p]; they are not clipped."""
        return self.mean + rng.normal(size=(num, len(self.factor))) @ self.factor

    def precision(self, steps: np.ndarray) -> np.ndarray:
        """``h^T C^-1 h`` of steps [... p] within the span of the directions."""
        return np.sum((steps @ self.directions.T) ** 2 / self.variances, axis=-1)


class ErrorBound(NamedTuple):
    """A bound of the mean squared error.

    Attributes:
        mse: no attack has a smaller mean squared error of a pixel; with probability 1 - FAILURE.
        estimate: the same bound without the allowance for the samples that it rests on.
        prior: mean squared error of a pixel of the best blind guess, the Gaussian's mean.
    """

    mse: float
    estimate: float
    prior: float


def squared_error(
    secants: Callable[[np.ndarray, np.ndarray], np.ndarray],
    information: np.ndarray,
    normal: Normal,
    sigma: float,
    *,
    num: int = 128,
    seed: int = 0,
) -> ErrorBound:
    """No reconstruction from ``y = f(x) + sigma N(0, I)`` has a smaller mean squared error.

    Along orthonormal directions v_i with steps h_i, the errors of any estimate of x obey (Weiss and
    Weinstein's bound at s = 1/2, for an x of a Gaussian law of covariance C, m its mean)

        E (v_i . error)^2 >= h_i^2 rho_i(1)^2 / (2 (1 - rho_i(2))),
        rho_i(k) = exp(-k^2 h_i^2 v_i^T C^-1 v_i / 8)
                   E_x exp(-|f(x + k h_i v_i / 2) - f(x - k h_i v_i / 2)|^2 / (8 sigma^2)),

    with x drawn from the same Gaussian. For a differentiable f and h to 0 the right side is
    ``1 / (v_i^T (E[J^T J] / sigma^2 + C^-1) v_i)``, whose sum over the eigenvectors v_i is van
    Trees' ``trace((E[J^T J] / sigma^2 + C^-1)^-1)``. Directions and steps only make it tight; they
    are chosen by products with J^T J on a few images, so that no Jacobian is ever formed.

    Assumes: x is drawn from this Gaussian (of real images, or of a generator's, it is an
    idealisation: who knows more of them than mean and covariance may pass it), and the adversary
    knows f. Nothing is assumed of f, nor of the attack.

    On the safe side by construction: errors outside the directions count as 0; the sum over the
    directions is replaced by ``(sum w_i h_i rho_i(1))^2 / (2 sum w_i^2 (1 - rho_i(2)))``, at most
    the sum by Cauchy and Schwarz, in which expectations stand alone, so that sample means do not
    bias it upwards (those within an inverse, as in van Trees' trace, do: it is convex); and of
    these a lower confidence limit is taken, by the delta method, at a level that allows for the
    choice among the steps.

    Args:
        secants: ``(x [m p], h [m p]) -> [m len(STEPS)]``, the squared norms of
            ``f(x + t h / 2) - f(x - t h / 2)`` for t in 1, 2, 4, ...
        information: [r r], ``V^T E[J^T J] V`` for the directions V, or near it.
        normal: of x.
        sigma: standard deviation of the noise on every entry, > 0.
        num: pairs of images; rounded up to at least two for each direction.
        seed: of the images.

    Returns:
        An :class:`ErrorBound`, with ``mse`` and ``estimate`` in [0, ``prior``] but for rounding.

    Reference: Weiss and Weinstein 1985, "A lower bound on the mean-square error in random parameter
    estimation"; van Trees 1968, "Detection, Estimation, and Modulation Theory", part I, 2.4.3.
    """
    rng = np.random.default_rng(seed)
    values, turn = np.linalg.eigh(information / sigma**2 + np.diag(1 / normal.variances))
    predicted = np.maximum(values, 1e-30) ** -0.5
    directions = turn.T @ normal.directions
    rank, each = len(directions), max(2, -(-num // len(directions)))
    steps = STEPS[0] * predicted[:, None] * directions
    seen = secants(normal.draw(rng, each * rank), np.tile(steps, (each, 1)))
    seen = np.asarray(seen, np.float64).reshape(each, rank, len(STEPS))
    scale = np.asarray(STEPS) / STEPS[0]
    prior = normal.precision(steps)[:, None] * scale**2
    rho = np.exp(-prior / 8 - seen / (8 * sigma**2))
    size = len(normal.mean)
    found = [
        _limit(rho[:, :, k], rho[:, :, k + 1], STEPS[k] * predicted, predicted)
        for k in range(len(STEPS) - 1)
    ]
    lower, estimate = (float(max(one) / size) for one in zip(*found, strict=True))
    return ErrorBound(lower, estimate, float(np.sum(normal.factor**2) / size))


def _limit(near: np.ndarray, far: np.ndarray, step: np.ndarray, weight: np.ndarray):
    """Lower confidence limit and value of the bound's sum, from rho of a step and its double.

    Args:
        near, far: [e r], e draws for each of r directions.
        step, weight: [r].
    """
    each, rank = near.shape
    above, below = weight * step * near, weight**2 * (1 - far)
    mean_above, mean_below = above.mean(), below.mean()
    if not (mean_above > 0 and mean_below > 0):
        return 0.0, 0.0
    value = rank * mean_above**2 / (2 * mean_below)
    influence = 2 * above / mean_above - below / mean_below
    error = math.sqrt(np.sum(influence.var(axis=0, ddof=1)) / each) / rank
    level = special.ndtri(1 - FAILURE / (len(STEPS) - 1))
    return value * math.exp(-level * error), value


# --- of an audit --------------------------------------------------------------------------------


class Noisy(NamedTuple):
    """A defense as what comes before Gaussian noise, and its standard deviation.

    Attributes:
        before: stages of which the image's update is the last word before the noise.
        sigma: > 0 where there is a bound.
        reason: why there is none; else empty.
    """

    before: tuple[Defense, ...]
    sigma: float
    reason: str


def noisy(defense: Defense, rounds: int = 1) -> Noisy:
    """Read a defense as ``y = f(x) + sigma N(0, I)``, and what is made of y.

    Of several rounds at the same weights, with noise drawn anew, f is the same in each, so that
    their mean tells all that they tell: sigma is that of the mean. Where what comes before the
    noise is drawn anew as well, it is not the same, and there is no bound.

    Any stages before the noise make f, clips among them as the client does them (what the server
    simulates with estimates differs). Noise that follows noise adds to it in variance; what follows
    may look at the noisy update alone.
    """
    stages = tuple(stages_of(defense))
    for number, stage in enumerate(stages):
        if stage.facts.gaussian:
            sigma, again = privacy.noise_from(stages[number:])
            if again:
                return Noisy((), 0.0, f"{again} after the noise may look at the image again")
            before = stages[:number]
            for one in before if rounds > 1 else ():
                if one.view.adds_noise or one.view.rounds != "mean":
                    return Noisy((), 0.0, f"{one.name} before the noise differs between rounds")
            return Noisy(before, sigma / math.sqrt(rounds), "")
        if stage.facts.replaces_update:
            return Noisy((), 0.0, f"not computed for {stage.name}, whose update is costly")
    return Noisy((), 0.0, "no Gaussian noise")


class _Programs(NamedTuple):
    """Compiled functions of ``(variables, key, label, x, ...)``; see :func:`_programs`.

    Each is of one image or pair: XLA's convolutions within loops use one core of a CPU.
    """

    update: Callable
    product: Callable
    secant: Callable


@functools.lru_cache(maxsize=8)
def _programs(model: Model, client: Client, before: tuple[Defense, ...]) -> _Programs:
    def update(variables, key, label, x):
        images, labels = x.reshape(1, *model.image_shape), jnp.reshape(label, (1,))
        found = client_update(client, model, variables, images, labels)
        return chain(*before).apply(key, found, Context(model, variables, images, labels))[0]

    def product(variables, key, label, x, direction):
        _, forward = jax.linearize(lambda one: update(variables, key, label, one), x)
        return jax.linear_transpose(forward, x)(forward(direction))[0]

    def secant(variables, key, label, x, step):
        # One key for both ends: who knows the draws of a random stage can do no worse.
        ends = (update(variables, key, label, x + sign * step / 2) for sign in (1, -1))
        return trees.sq_distance(*ends)

    return _Programs(jax.jit(update), jax.jit(product), jax.jit(secant))


class Bounds:
    """The bounds of an audit's cells, each computed once.

    Args:
        public: what both sides have. The Gaussian is that of :data:`PRIOR_SAMPLES` samples of the
            prior at the private image's label.
        key: typed key of the samples.
        num: pairs of images behind a bound of squared error; 0 leaves out what costs updates.
    """

    def __init__(self, public: Public, key: jax.Array, num: int):
        self.public, self.variables, self.key, self.num = public, public.variables, key, num
        # Each is computed once for the same arguments, as long as this object lives.
        self.gaussian = functools.cache(self._gaussian)
        self.sketch = functools.cache(self._sketch)
        self.error = functools.cache(self._error)
        self._radii: dict[tuple, float] = {}

    def normal(self, label: int) -> Normal:
        """The Gaussian over images of a class."""
        return self.gaussian(None if self.public.prior.num_classes is None else label)

    def _gaussian(self, label: int | None) -> Normal:
        labels = None if label is None else np.full(PRIOR_SAMPLES, label)
        of = self.public.prior, self.public.prior_params, self.key
        return Normal.of(np.asarray(samples(*of, PRIOR_SAMPLES, labels=labels)))

    def _error(self, defense: Defense, client: Client, label: int) -> ErrorBound:
        """:func:`squared_error` of an image of that label; the defense must be :func:`noisy`."""
        before, sigma, _ = noisy(defense, client.rounds)
        secant, variables = _programs(self.public.model, client, before).secant, self.variables

        def one(number, x, step):
            key = jax.random.fold_in(jax.random.fold_in(self.key, 1), number)
            ends = (_floats(2.0**k * step) for k in range(len(STEPS)))
            return [float(secant(variables, key, label, _floats(x), end)) for end in ends]

        def secants(points, steps):
            return np.asarray([*map(one, range(len(points)), points, steps)])

        sketch = self.sketch(before, client, label)
        return squared_error(secants, sketch, self.normal(label), sigma, num=self.num)

    def _sketch(self, before: tuple[Defense, ...], client: Client, label: int) -> np.ndarray:
        """``V^T E[J^T J] V`` by :data:`SKETCHES` images: directions and steps are chosen by it."""
        product = _programs(self.public.model, client, before).product
        of = self.variables, jax.random.fold_in(self.key, 2), label
        normal = self.normal(label)
        basis, rng = normal.directions, np.random.default_rng(1)
        found = [
            [np.asarray(product(*of, _floats(x), _floats(v)), np.float64) for v in basis]
            for x in normal.draw(rng, SKETCHES)
        ]
        mean = np.mean(found, axis=0) @ basis.T
        return (mean + mean.T) / 2

    def reach(
        self, defense: Defense, client: Client, label: int, images: Sequence[np.ndarray]
    ) -> float:
        """Mu of :func:`identification` for these images: their updates' radius over sigma.

        The centre is the mean of their updates, all at one label.
        """
        before, sigma, _ = noisy(defense, client.rounds)
        points = [_floats(np.ravel(image)) for image in images]
        name = (tuple(stage.name for stage in before), client, label, digest(*points))
        if name not in self._radii:
            update = _programs(self.public.model, client, before).update
            keys = jax.random.split(jax.random.fold_in(self.key, 3), len(points))

            def updates():  # one after the other: together they may not fit into memory
                pairs = zip(keys, points, strict=True)
                return (update(self.variables, key, label, x) for key, x in pairs)

            total = functools.reduce(functools.partial(jax.tree.map, jnp.add), updates())
            centre = jax.tree.map(lambda x: x / len(points), total)
            squares = (trees.sq_distance(one, centre) for one in updates())
            self._radii[name] = math.sqrt(max(map(float, squares)))
        return self._radii[name] / sigma

    def row(
        self,
        defense: Defense,
        client: Client,
        images: ArrayLike,
        labels: ArrayLike,
        others: np.ndarray | None,
    ) -> dict[str, Any]:
        """The bounds of one result, as columns; empty where there are none.

        Args:
            defense: of the client.
            client: as it is.
            images: [b h w c], the update's. Of several there are no bounds, for reconstructions are
                put in order by the private images, which no attack could do.
            labels: [b] their classes.
            others: [m h w c], the other suspects; None for none.

        Returns:
            ``bound_mse`` (and ``bound_mse_estimate``, ``bound_mse_prior``): of
            :func:`squared_error`. ``bound_identified``: of :func:`identification` among these
            suspects; ``bound_identified_any``: among as many of any images, by the clip.
        """
        found = noisy(defense, client.rounds)
        if found.reason or len(jnp.asarray(images)) > 1 or client.share_statistics:
            return {}
        (image,), label = np.asarray(images), int(jnp.asarray(labels)[0])
        row: dict[str, Any] = {}
        if self.num:
            error = self.error(defense, client, label)
            row |= {"bound_mse": error.mse, "bound_mse_estimate": error.estimate}
            row["bound_mse_prior"] = error.prior
        if others is None:
            return row
        num = len(others) + 1
        if self.num:
            mu = self.reach(defense, client, label, [image, *others])
            row["bound_identified"] = identification(num, mu)
        known = privacy.mechanism(defense, len(jax.tree.leaves(self.public.variables["params"])))
        if not known.reason:
            mu = math.sqrt(client.rounds) * known.bound / known.sigma
            row["bound_identified_any"] = identification(num, mu)
        return row


def _floats(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.float32)
