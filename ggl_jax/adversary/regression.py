"""Regression from updates to images: what a server reads off an update without any search.

The server knows the model, so it can compute as many pairs of image and gradient as it likes from
the prior's samples, and fit a linear map back. In dual form, with n samples x_i of gradients g_i
and the centred kernel K_ij = <g_i, g_j>, ridge regression is

    x_hat = mean + k(y)^T (K + r I)^-1 (X - mean),    k_i(y) = <y, g_i>.

Its errors are known without any private image, from leave-one-out residuals; noise of variance s^2
adds s^2 A^T K A, with A = (K + r I)^-1 (X - mean). The simplest form of learned inversion (Wu et
al., "Learning to Invert: Simple Adaptive Attacks for Gradient Inversion in Federated Learning", UAI
2023, who train a network on such pairs).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import helmert, qr

from ggl_jax.adversary.bank import Bank, bank_of, make_bank, products
from ggl_jax.client.local import shares_gradient
from ggl_jax.spec import Client
from ggl_jax.types import Factored, Guess, Prior, Problem, Public, PyTree, View

#: Candidates of the ridge, relative to the kernel's mean eigenvalue.
_RIDGES = np.logspace(-6, 0.5, 14)
#: Random sums of pixels by which ridges are compared, where there are more pixels than these.
_SKETCH = 256
#: Standard deviation of a pixel that no sample speaks of.
_FLOOR = 0.01
#: Entries of an image up to which its covariance is kept whole, not only the samples' span.
_WHOLE = 4096


def regress(
    bank: Bank, observed: PyTree, factored: Factored, noise: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """The image behind an update, as the regression sees it.

    Args:
        bank: of the model that the update was computed with, at the inferred label.
        observed: the update.
        factored: the defense's simulation.
        noise: standard deviation of the noise in every entry of the update.

    Returns:
        The estimate [p]; residuals [n p], as many as the bank has samples, whose second moment is
        that of the estimate's error; and the predicted mean squared error of a pixel. Tensors are
        weighted by one over their energy between samples, or all alike (as the noise's likelihood
        would), and the ridge is chosen, for the least predicted error.
    """
    leaves = [np.asarray(x, np.float32) for x in jax.tree.leaves(observed)]
    treedef: Any = jax.tree.structure(observed)
    masks: list = [None] * len(leaves)
    if factored.mask is not None:
        masks = [np.asarray(m) for m in treedef.flatten_up_to(factored.mask)]
    num, norms = len(bank.images), bank.sq_norms.copy()
    kernels, inner = [], []
    for place, one in enumerate(bank.held):
        kernel, own = products(*(bank, place, leaves[one.leaf], masks[one.leaf]), thin=noise == 0)
        kernels.append(kernel)
        inner.append(own)
        norms[:, one.leaf] = np.diagonal(kernel)
    scales = np.ones_like(norms)
    if factored.scale is not None:
        found = jax.vmap(factored.scale)(treedef.unflatten(list(jnp.asarray(norms.T))))
        scales = np.stack([np.broadcast_to(x, num) for x in jax.tree.leaves(found)], axis=1)
    for index, one in enumerate(bank.held):
        s = scales[:, one.leaf].astype(np.float32)
        kernels[index] = kernels[index] * (s[:, None] * s)
        inner[index] = inner[index] * s
    mean = bank.images.mean(0)
    differences = sketch = bank.images - mean
    if differences.shape[1] > _SKETCH:
        # Ridges are compared by random sums of pixels, whose mean squared error is the pixels'.
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (differences.shape[1], _SKETCH))
        sketch = differences @ signs.astype(np.float32) / math.sqrt(differences.shape[1])
    energies = np.array([max(np.trace(_centred(k)), 1e-30) for k in kernels])
    present = energies > 1e-12 * energies.sum()
    # Without the constant direction, which is the mean's own and would count as left out nowhere.
    basis = helmert(num).T
    best: tuple | None = None
    for weights in (present / energies, present / energies.sum()):
        kernel = sum(w * k for w, k in zip(weights, kernels, strict=True))
        noisy = sum(w * w * k for w, k in zip(weights, kernels, strict=True))
        k_y = sum(w * k for w, k in zip(weights, inner, strict=True))
        k_y = k_y - kernel.mean(0)
        values, vectors = np.linalg.eigh(basis.T @ kernel.astype(np.float64) @ basis)
        vectors = basis @ vectors
        noisy = noise**2 * (vectors.T @ noisy @ vectors)
        squares = vectors**2

        def fit(ridge, turned, values=values, vectors=vectors, noisy=noisy, squares=squares):
            """Dual coefficients and leave-one-out residuals [n t], and the mean squared error.

            ``turned``: the targets [n t] in the kernel's eigenvectors.
            """
            inverse = 1.0 / (values.clip(0) + ridge)
            own = inverse[:, None] * turned
            dual = vectors @ own
            residuals = dual / (squares @ inverse)[:, None]
            added = np.sum(own * (noisy @ own)) if noise > 0 else 0.0
            return dual, residuals, (np.sum(residuals**2) / num + added) / turned.shape[1]

        turned = vectors.T @ sketch
        for ridge in _RIDGES * max(values.sum() / num, 1e-30):
            error = fit(ridge, turned)[2]
            if best is None or error < best[0]:
                best = error, functools.partial(fit, ridge), vectors, k_y
    assert best is not None
    _, fitted, vectors, k_y = best
    dual, residuals, error = fitted(vectors.T @ differences)
    estimate = mean + k_y @ dual
    scale = math.sqrt(error / np.mean(residuals**2))
    return estimate.astype(np.float32), (scale * residuals).astype(np.float32), float(error)


def _centred(kernel: np.ndarray) -> np.ndarray:
    rows = kernel.mean(0)
    return kernel - rows[:, None] - rows + rows.mean()


def guess_of(mean: np.ndarray, residuals: np.ndarray) -> Guess:
    """A Gaussian around an estimate: its factor from residuals [n p], and a floor beside it."""
    num, size = residuals.shape
    if size > _WHOLE:
        return Guess(jnp.asarray(mean), jnp.asarray(residuals.T / math.sqrt(num)))
    # The covariance's eigenvectors: those of the samples' span, then any basis of what is left.
    basis, triangle = qr(residuals.T / math.sqrt(num), mode="full")
    rank = min(num, size)
    turn, values, _ = np.linalg.svd(triangle[:rank], full_matrices=True)
    basis[:, :rank] = basis[:, :rank] @ turn
    variances = np.zeros(size, np.float32)
    variances[: len(values)] = values**2
    factor = basis * np.sqrt(variances + _FLOOR**2)
    return Guess(jnp.asarray(mean), jnp.asarray(factor, jnp.float32))


class Reading(NamedTuple):
    """What was read off an update before any search.

    Attributes:
        guess: the estimate and its uncertainty.
        rmse: predicted root mean squared error of a pixel, in [0, 1].
    """

    guess: Guess
    rmse: float


def read(
    public: Public,
    problem: Problem,
    view: View | None,
    client: Client,
    num: int,
    progress: Callable[[float], None] | None = None,
) -> Reading:
    """Read an update by regression, with the defense's estimated parameters (None: undefended).

    A bank serves all defenses that are a mask and a scale of each tensor. Any other needs its own
    of each update: gradients that went through its simulation or, where it changed the variables
    (Soteria on the representation), gradients at those that the mask leaves.

    Not read, so that the guess is the samples' mean and covariance, are updates of several images
    or local steps, and of changed variables under noise, where the mask is not seen.

    Args:
        public: what the server has.
        problem: the update, its labels, and what was estimated of the defense.
        view: the server's side of the defense.
        client: images and local steps behind the update.
        num: samples of the bank, at least 2.
        progress: called with the share of the bank that is done.
    """
    label, noise = int(problem.labels[0]), float(problem.noise)
    factored: Factored | None = Factored()
    rewire = None if view is None else view.rewire
    if view is not None:
        forms = [one.factor for one in (view, view.comparing(True)) if one.factor is not None]
        found = (form(problem.estimated) for form in forms)
        factored = next((one for one in found if one is not None), None)
    single = client.batch_size == 1 and shares_gradient(client)
    readable = single and not (rewire is not None and noise > 0)
    through: dict[str, Any] = {}
    if factored is None and view is not None:
        through = {"simulate": view.simulate, "estimated": problem.estimated}
    if readable and (rewire is not None or through):
        if rewire is not None:
            variables = rewire(problem.estimated, public.variables, public.model.head)
            public = public._replace(variables=variables)
        key = jax.random.key(num)
        bank = make_bank(public, label, num, key, progress, once=True, **through)
    else:
        bank = bank_of(public, label, num, progress)
    mean = bank.images.mean(0)
    residuals = bank.images - mean
    error = float(np.mean(residuals**2))
    if readable:
        regressed = regress(bank, problem.observed, factored or Factored(), noise)
        # A regression that expects to do worse than the samples' mean has nothing to say.
        mean, residuals, error = regressed if regressed[2] < error else (mean, residuals, error)
    return Reading(guess_of(mean, residuals), math.sqrt(error))


def rank_of(prior: Prior, num: int) -> int:
    """Columns of :func:`guess_of`'s factor for a bank of ``num`` samples."""
    size = math.prod(prior.image_shape)
    return size if size <= _WHOLE else num
