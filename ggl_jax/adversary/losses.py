"""Distances between updates, and regularisers of a candidate.

A distance is a function of each layer's inner product and squared norms, which the fused matching
loss knows without forming a candidate's gradient. New distances and regularisers go into
:data:`DISTANCES` and :data:`REGULARIZERS`.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax import grammar
from ggl_jax.errors import GGLError, check_known, did_you_mean
from ggl_jax.images import to_signed
from ggl_jax.types import PyTree

#: Share of the distance at g = 0 below which a distance is computed from squares.
EXACT_BELOW = 1e-3

# Squared norms below this count as zero, so that a vanishing gradient gives a finite cosine.
_TINY = 1e-30


class Statistics(NamedTuple):
    """What a distance needs to know of a candidate's update g and the observed update y.

    All three are pytrees with the update's structure and scalar leaves (one per tensor).

    Attributes:
        inner: <y, g>.
        candidate: |g|^2.
        observed: |y|^2.
    """

    inner: PyTree
    candidate: PyTree
    observed: PyTree


class Distance(NamedTuple):
    """How far a candidate's update g lies from the observed one y; 0 when they agree.

    It has two forms. From statistics it needs no gradient, but near 0 it is a small difference of
    large numbers (in float32 its error is some 1e-7 of the distance to a candidate with g = 0).
    From squares, the norms of scaled differences |b y - a g|^2, it is exact there.

    Attributes:
        from_statistics: ``from_statistics(statistics) -> scalar``.
        scales: ``scales(statistics) -> (a, b)``, pytrees of scalars, or None where both are 1.
        from_squares: ``from_squares(squares) -> scalar`` of each tensor's |b y - a g|^2.
        name: its registered name.
    """

    from_statistics: Callable
    scales: Callable | None
    from_squares: Callable
    name: str

    def between(self, update: PyTree, observed: PyTree) -> jax.Array:
        """The distance of two updates that are both at hand (pytrees of equal structure)."""
        if self.scales is None:
            squares = jax.tree.map(lambda g, y: jnp.sum((y - g) ** 2), update, observed)
            return self.from_squares(squares)
        statistics = tree_statistics(update, observed)
        a, b = self.scales(statistics)
        squares = jax.tree.map(
            lambda g, y, a, b: jnp.sum((b * y - a * g) ** 2), update, observed, a, b
        )
        expanded = self.from_statistics(statistics)
        near = expanded < EXACT_BELOW * self.at_zero(statistics)
        return jnp.where(near, self.from_squares(squares), expanded)

    def at_zero(self, statistics: Statistics) -> jax.Array:
        """The distance of a candidate whose update is 0: the scale of the rounding error."""
        zeros = jax.tree.map(jnp.zeros_like, statistics.candidate)
        return self.from_statistics(Statistics(zeros, zeros, statistics.observed))


def tree_statistics(update: PyTree, observed: PyTree) -> Statistics:
    """The :class:`Statistics` of two updates that are both at hand (pytrees of equal structure)."""
    return Statistics(
        inner=jax.tree.map(lambda g, y: jnp.sum(g * y), update, observed),
        candidate=jax.tree.map(lambda g: jnp.sum(g * g), update),
        observed=jax.tree.map(lambda y: jnp.sum(y * y), observed),
    )


def squared_l2() -> Distance:
    """Squared l2 distance (the paper's D1): sum over every entry of (y - g)^2.

    Reference:
        Paper, section 3 (gradient matching loss).
    """

    def from_squares(squares):
        return sum(jax.tree.leaves(squares))

    def from_statistics(statistics):
        return from_squares(
            jax.tree.map(
                lambda inner, candidate, observed: observed - 2.0 * inner + candidate,
                statistics.inner,
                statistics.candidate,
                statistics.observed,
            )
        )

    return Distance(from_statistics, None, from_squares, "squared_l2")


def likelihood() -> Distance:
    """:func:`squared_l2`, which an attack divides by twice the noise's estimated variance.

    That is minus the logarithm of the noise's density, up to a constant.
    """
    return squared_l2()._replace(name="likelihood")


def mean_squared_l2() -> Distance:
    """:func:`squared_l2` over the number of tensors in the update (62 for ResNet-18 at 32x32).

    The published code's D1 for CMA-ES and TuRBO, beside which its weight of the KLD stands; its
    Adam takes the plain sum.
    """
    total = squared_l2()

    def from_statistics(statistics):
        return total.from_statistics(statistics) / len(jax.tree.leaves(statistics.inner))

    def from_squares(squares):
        return total.from_squares(squares) / len(jax.tree.leaves(squares))

    return Distance(from_statistics, None, from_squares, "mean_squared_l2")


def cosine() -> Distance:
    """Cosine distance (the paper's D2): 1 - <y, g> / (|y| |g|) over the whole update, in [0, 2].

    Edge cases:
        1 where either update vanishes.

    Reference:
        Geiping et al. (2020), "Inverting Gradients"; the paper's D2.
    """

    def from_statistics(statistics):
        inner, candidate, observed = (sum(jax.tree.leaves(tree)) for tree in statistics)
        # Two factors: the product of two small squared norms would underflow.
        return 1.0 - inner * _inverse_norm(candidate) * _inverse_norm(observed)

    def scales(statistics):
        a = _inverse_norm(sum(jax.tree.leaves(statistics.candidate)))
        b = _inverse_norm(sum(jax.tree.leaves(statistics.observed)))
        same = statistics.candidate
        return jax.tree.map(lambda _: a, same), jax.tree.map(lambda _: b, same)

    def from_squares(squares):
        # |y/|y| - g/|g||^2 = 2 - 2 cos
        return 0.5 * sum(jax.tree.leaves(squares))

    return Distance(from_statistics, scales, from_squares, "cosine")


def scaled_l2() -> Distance:
    """Squared l2 distance to the nearest multiple of a candidate's update: min over s >= 0.

    For updates of unknown scale, such as those of a loss that was summed or scaled. In closed form
    s = <y, g> / |g|^2, and the distance is |y|^2 sin^2 of the angle between the two.

    Edge cases:
        |y|^2 where the candidate's update vanishes or points away.
    """

    def best(statistics):
        inner, candidate, _ = (sum(jax.tree.leaves(tree)) for tree in statistics)
        return jnp.maximum(inner, 0.0) / jnp.maximum(candidate, _TINY)

    def from_statistics(statistics):
        inner, _, observed = (sum(jax.tree.leaves(tree)) for tree in statistics)
        return observed - inner * best(statistics)

    def scales(statistics):
        factor = best(statistics)
        ones = jax.tree.map(jnp.ones_like, statistics.candidate)
        return jax.tree.map(lambda one: factor * one, ones), ones

    def from_squares(squares):
        return sum(jax.tree.leaves(squares))

    return Distance(from_statistics, scales, from_squares, "scaled_l2")


def posterior(variance: jax.Array | float = 0.0, sharpness: jax.Array | float = 1.0) -> Distance:
    """Minus the logarithm of the noise's density or, without noise, a multiple of the cosine.

    Args:
        variance: of the noise on each entry; 0 for none.
        sharpness: the cosine distance's factor where there is no noise.
    """
    variance = jnp.asarray(variance)
    noisy = variance > 0
    halved = 0.5 / jnp.where(noisy, variance, 1.0)
    squared, angle = squared_l2(), cosine()

    def from_statistics(statistics):
        return jnp.where(
            noisy,
            halved * squared.from_statistics(statistics),
            sharpness * angle.from_statistics(statistics),
        )

    def scales(statistics):
        assert angle.scales is not None
        return jax.tree.map(lambda x: jnp.where(noisy, 1.0, x), angle.scales(statistics))

    def from_squares(squares):
        return jnp.where(noisy, halved, 0.5 * sharpness) * sum(jax.tree.leaves(squares))

    return Distance(from_statistics, scales, from_squares, "posterior")


def _inverse_norm(square):
    return jax.lax.rsqrt(jnp.maximum(square, _TINY))


#: Distance factories by name.
DISTANCES: dict[str, Callable[[], Distance]] = grammar.named(
    squared_l2, mean_squared_l2, likelihood, cosine, scaled_l2, posterior
)


def resolve_distance(distance: str | Distance) -> Distance:
    """A :class:`Distance` from its name (or itself).

    Raises:
        GGLError: for an unknown name.
    """
    if isinstance(distance, Distance):
        return distance
    check_known("distance", distance, DISTANCES)
    return DISTANCES[distance]()


def kld(latents: jax.Array, images: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence from N(0, 1) of the law of a latent's entries (the paper's R1).

    With m and s the mean and (population) standard deviation over the k entries of one latent z,
    one entry's term is -(1/2)(1 + log s^2 - m^2 - s^2). The paper writes a sum over i = 1..k with
    m_i and s_i, of which a single z has only one pair, so we read the sum as k equal terms.

    Args:
        latents: [n b z].
        images: unused.

    Returns:
        [n], summed over the b latents of a candidate.

    Edge cases:
        1e-10 is added to s^2 in the logarithm (as published), so a constant latent such as z = 0
        has a large finite value and gradient 0.
    """
    return latents.shape[-1] * kld_mean(latents, images)


def kld_mean(latents: jax.Array, images: jax.Array) -> jax.Array:
    """:func:`kld` over the k entries: the one term that the published code takes."""
    del images
    mean = jnp.mean(latents, axis=-1)
    variance = jnp.mean((latents - mean[..., None]) ** 2, axis=-1)
    term = -0.5 * (1.0 + jnp.log(variance + 1e-10) - mean**2 - variance)
    return jnp.sum(term, axis=-1)


def norm(latents: jax.Array, images: jax.Array) -> jax.Array:
    """(|z|^2 - k)^2: keeps a latent on the sphere where a Gaussian's mass lies (the paper's R2).

    Args:
        latents: [n b z].
        images: unused.

    Returns:
        [n], summed over the b latents of a candidate.
    """
    del images
    return jnp.sum((jnp.sum(latents**2, axis=-1) - latents.shape[-1]) ** 2, axis=-1)


def norm_score(latents: jax.Array, images: jax.Array) -> jax.Array:
    """:func:`norm` as in the published code: (|z|^2 - 1)^2, without a derivative.

    The code reads ``ndim``, which is 1, where the length is meant, and scores finished searches
    only.
    """
    del images
    terms = jnp.sum((jnp.sum(latents**2, axis=-1) - 1) ** 2, axis=-1)
    return jax.lax.stop_gradient(terms)


def gaussian(latents: jax.Array, images: jax.Array) -> jax.Array:
    """|z|^2 / 2: minus the logarithm of a standard normal latent's density, up to a constant.

    With weight 1 beside the noise's likelihood as the distance, the search is for the most
    probable latent.

    Args:
        latents: [n b z].
        images: unused.

    Returns:
        [n], summed over the b latents of a candidate.
    """
    del images
    return 0.5 * jnp.sum(latents**2, axis=(1, 2))


def total_variation(latents: jax.Array, images: jax.Array) -> jax.Array:
    """Anisotropic total variation: mean |vertical difference| + mean |horizontal difference|.

    Both means run over all of a candidate's images, positions and channels, in the networks'
    [-1, 1] range, so that published weights keep their order of magnitude (there the images are
    normalised by the data set's standard deviation).

    Args:
        latents: unused.
        images: [n b h w c] in [0, 1].

    Returns:
        [n]. An image one pixel high or wide has no variation along that side.

    Reference:
        Geiping et al. (2020), "Inverting Gradients", and its code's ``total_variation``.
    """
    del latents
    images = to_signed(images)
    total = jnp.zeros(images.shape[0], images.dtype)
    for axis in (2, 3):
        if images.shape[axis] > 1:
            total += jnp.mean(jnp.abs(jnp.diff(images, axis=axis)), axis=(1, 2, 3, 4))
    return total


def l2(latents: jax.Array, images: jax.Array) -> jax.Array:
    """Mean square of the images' entries in the networks' [-1, 1] range (0 for mid-grey).

    A mean, as :func:`total_variation` and :func:`group_consistency` are, so that weights compare
    and mean the same for images of any size.

    Args:
        latents: unused.
        images: [n b h w c] in [0, 1].

    Returns:
        [n].

    Reference:
        Yin et al. (2021), "See through Gradients" (GradInversion), who take norms, not squares.
    """
    del latents
    return jnp.mean(to_signed(images) ** 2, axis=(1, 2, 3, 4))


def group_consistency(latents: jax.Array, images: jax.Array) -> jax.Array:
    """Mean squared difference, in [-1, 1], from the mean image of the candidates of one step.

    With an optimiser that evaluates every restart once a step (Adam), these are the restarts: they
    are drawn together. 0 for a single restart. The mean is held constant in derivatives.

    Args:
        latents: unused.
        images: [n b h w c] in [0, 1].

    Returns:
        [n].

    Reference:
        Yin et al. (2021), section 3.4, who register the images before they take the mean; we do
        not (restarts that start from one prior are aligned).
    """
    del latents
    images = to_signed(images)
    mean = jax.lax.stop_gradient(jnp.mean(images, axis=0, keepdims=True))
    return jnp.mean((images - mean) ** 2, axis=(1, 2, 3, 4))


def batch_norm_distance(found: PyTree, target: PyTree) -> jax.Array:
    """How far a batch's statistics are from known ones: GradInversion's fidelity term R_BN.

    The sum, over layers, of the l2 norms of the differences in mean and in variance.

    Args:
        found: a tree of layers, each with ``mean`` [c] and ``var`` [c], as ``model.statistics``
            returns it.
        target: the same layers' known ones; it may hold other layers, too.

    Returns:
        A scalar. Its derivative is 0 where a difference is.

    Raises:
        GGLError: a layer is missing from ``target``, or has another shape there.

    Reference:
        Yin et al. (2021), "See through Gradients", section 3.3.
    """
    total = jnp.zeros(())
    for path, value in jax.tree_util.tree_flatten_with_path(found)[0]:
        known = target
        for entry in path:
            known = known.get(entry.key) if isinstance(known, Mapping) else None
        if known is None or jnp.shape(known) != jnp.shape(value):
            name = "/".join(str(entry.key) for entry in path)
            raise GGLError(
                f"statistics: {name} must have shape {jnp.shape(value)}, got "
                f"{'nothing' if known is None else jnp.shape(known)}; give the mean and var of "
                "every BatchNorm layer"
            )
        square = jnp.sum((value - known) ** 2)
        # The square root's derivative is infinite at 0.
        total += jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return total


#: Regularisers by name: ``f(latents[n b z], images[n b h w c] in [0, 1]) -> [n]``.
REGULARIZERS = {
    "kld": kld,
    "kld_mean": kld_mean,
    "norm": norm,
    "norm_score": norm_score,
    "gaussian": gaussian,
    "total_variation": total_variation,
    "l2": l2,
    "group": group_consistency,
}


def parse_regularizer(
    specification: str, *, more: Mapping[str, Callable] | None = None
) -> Callable:
    """A weighted sum of regularisers from text such as ``"kld:0.1+norm:1e-4"``.

    Args:
        specification: ``name:weight`` terms joined by "+" (no weight means 1), or "none".
        more: regularisers beside :data:`REGULARIZERS`, such as those that need the problem at hand.

    Returns:
        ``regularize(latents[n b z], images[n b h w c] in [0, 1]) -> [n]``.

    Raises:
        GGLError: for an unknown name, or a weight that is negative, infinite or no number.
    """
    terms = []
    known = {**REGULARIZERS, **(more or {})}
    text = specification.strip()
    pieces = [] if text == "none" else grammar.split(text)
    for piece in pieces:
        name, _, number = piece.strip().partition(":")
        if name not in known:
            names, hint = ", ".join(known), did_you_mean(name, known, before="; ")
            raise GGLError(
                f"regularizer: got {name!r} in {specification!r}, allowed: none, {names}{hint}"
            )
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            weight = math.nan
        if not 0.0 <= weight < math.inf:
            raise GGLError(
                f"regularizer: weight of {name!r}: got {number!r}, allowed: numbers >= 0"
            )
        terms.append((weight, known[name]))

    def regularize(latents, images):
        total = jnp.zeros(latents.shape[0], latents.dtype)
        for weight, term in terms:
            total = total + weight * term(latents, images)
        return total

    return regularize
