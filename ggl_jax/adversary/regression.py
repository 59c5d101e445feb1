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
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from scipy.linalg import helmert, qr

from ggl_jax import cache, machine
from ggl_jax.adversary.matching import fused, layers
from ggl_jax.adversary.matching.program import trace
from ggl_jax.client.local import shares_gradient
from ggl_jax.files import digest
from ggl_jax.gate.trying import calls_back, program
from ggl_jax.priors.samples import samples
from ggl_jax.spec import Client
from ggl_jax.types import Factored, Guess, Model, Prior, Problem, Public, PyTree, View

#: Memory for a bank's gradients; the smallest tensors come first, and those that do not fit are
#: left out of the regression. ResNet-18: 1,000 samples keep all tensors of at most 147,456 entries.
BANK_BYTES = 2**31
#: Candidates of the ridge, relative to the kernel's mean eigenvalue.
_RIDGES = np.logspace(-6, 0.5, 14)
#: Random sums of pixels by which ridges are compared, where there are more pixels than these.
_SKETCH = 256
#: Standard deviation of a pixel that no sample speaks of.
_FLOOR = 0.01
#: Entries of an image up to which its covariance is kept whole, not only the samples' span.
_WHOLE = 4096


class Bank(NamedTuple):
    """Samples of the prior, and their gradients at one label.

    Attributes:
        images: [n p] float32.
        kept: numbers of the tensors whose gradients are kept.
        gradients: of each kept tensor [n size], bfloat16.
        kernels: of each kept tensor <g_i, g_j>, [n n] float32.
        sq_norms: [n t], of every tensor.
    """

    images: np.ndarray
    kept: tuple[int, ...]
    gradients: list[np.ndarray]
    kernels: list[np.ndarray]
    sq_norms: np.ndarray


def make_bank(
    public: Public,
    label: int,
    num: int,
    key: jax.Array,
    progress: Callable[[float], None] | None = None,
    *,
    simulate: Callable | None = None,
    estimated: PyTree = None,
) -> Bank:
    """Draw ``num`` samples of the prior and compute their gradients at a label.

    Args:
        public: what the server has.
        label: the inferred class.
        num: samples, at least 2.
        key: typed key of the samples.
        progress: called with the share that is done.
        simulate: what each gradient goes through, as :attr:`ggl_jax.types.View.simulate`; None
            for nothing.
        estimated: its first argument.
    """
    model, variables, prior, prior_params, _ = public
    images = np.asarray(samples(prior, prior_params, key, num, labels=label)).clip(0.0, 1.0)
    sizes, kept = _kept(variables, num)
    of = _gradients(model, kept, simulate)
    # As bits: NumPy copies types that it does not know entry by entry.
    bits = [np.empty((num, sizes[leaf]), np.uint16) for leaf in kept]
    norms = np.empty((num, len(sizes)), np.float32)
    at_once = _at_once()
    labels = np.full((at_once, 1), label, np.int32)

    def keep(chosen, found):
        for all_of, some in zip(bits, found[0], strict=True):
            all_of[chosen] = np.asarray(some).view(np.uint16)
        norms[chosen] = found[1]
        if progress is not None:
            progress((chosen[-1] + 1) / num)

    pending = None  # what is computed while the samples before it are copied
    for first in range(0, num, at_once):
        chosen = np.arange(first, first + at_once).clip(max=num - 1)
        found = of(variables, images[chosen], labels, estimated)
        if pending is not None:
            keep(*pending)
        pending = chosen, found
    assert pending is not None
    keep(*pending)
    gradients = [x.view(ml_dtypes.bfloat16) for x in bits]
    kernels = [_product(g, g) for g in gradients]
    return Bank(images.reshape(num, -1), kept, gradients, kernels, norms)


def _kept(variables: PyTree, num: int) -> tuple[list[int], tuple[int, ...]]:
    """Entries of each tensor, and the numbers of those whose gradients fit into memory."""
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(variables["params"])]
    kept: list[int] = []
    left = BANK_BYTES / (2 * num)
    for leaf in sorted(range(len(sizes)), key=lambda leaf: sizes[leaf]):
        if sizes[leaf] <= left:
            kept.append(leaf)
            left -= sizes[leaf]
    return sizes, tuple(sorted(kept))


def _at_once() -> int:
    """Samples whose gradients are computed in one program."""
    return 1 if jax.default_backend() == "cpu" else 32


@functools.lru_cache(maxsize=8)
def _gradients(model: Model, kept: tuple[int, ...], simulate: Callable | None) -> Callable:
    @jax.jit
    def of(variables, images, labels, estimated):
        """Kept gradients [n size] and all squared norms [n t] of images [n h w c]."""
        images = images[:, None]
        program = trace(model, variables, jax.ShapeDtypeStruct(images.shape[1:], images.dtype))
        arrays = fused.passes(
            program, variables, fused.prepare_convolutions(program, variables), images, labels
        )
        layer_of = {site.leaf: site.layer for site in program.sites}
        gradients: list = [None] * len(arrays)
        norms: list = [None] * len(arrays)
        for leaf, own in enumerate(arrays):
            layer = layer_of.get(leaf)
            if layer is None:
                gradients[leaf] = own[0]
            elif simulate is not None or leaf in kept:
                formed = layers.form(layer, *own)
                gradients[leaf] = layers.kernel_as_stored(layer, formed)
            else:
                norms[leaf] = layers.sq_norm(layer, *own)
        if simulate is not None:
            treedef: Any = jax.tree.structure(variables["params"])
            through = jax.vmap(functools.partial(simulate, estimated))
            gradients = jax.tree.leaves(through(treedef.unflatten(gradients)))
        for leaf, g in enumerate(gradients):
            if g is not None:
                norms[leaf] = jnp.sum(g**2, axis=range(1, g.ndim))
        found = [gradients[leaf].reshape(len(images), -1).astype(jnp.bfloat16) for leaf in kept]
        return found, jnp.stack(norms, axis=1)

    return of


#: Columns of gradients that are multiplied at once: two shapes for tensors of all sizes.
_WIDTHS = (2**9, 2**15)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left [n p] times right^T [p m], in float32, without a program for each p."""
    total = np.zeros((len(left), len(right)), np.float32)
    width = next((w for w in _WIDTHS if left.shape[1] <= w), _WIDTHS[-1])
    for start in range(0, left.shape[1], width):
        parts = [x[:, start : start + width] for x in (left, right)]
        if missing := width - parts[0].shape[1]:
            parts = [np.pad(x, ((0, 0), (0, missing))) for x in parts]
        total += _multiplied(*parts)
    return total


@jax.jit
def _multiplied(left, right):
    return left.astype(jnp.float32) @ right.astype(jnp.float32).T


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
    leaves = [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(observed)]
    shapes = [x.shape for x in jax.tree.leaves(observed)]
    treedef: Any = jax.tree.structure(observed)
    masks: list = [None] * len(leaves)
    if factored.mask is not None:
        masks = [np.asarray(m) for m in treedef.flatten_up_to(factored.mask)]
    num, norms = len(bank.images), bank.sq_norms.copy()
    kernels, inner = [], []
    for leaf, g, kernel in zip(bank.kept, bank.gradients, bank.kernels, strict=True):
        mask, y = masks[leaf], leaves[leaf]
        if mask is not None and mask.size > 1:
            mask = np.broadcast_to(mask, shapes[leaf]).ravel().astype(np.float32)
            where = np.flatnonzero(mask)
            g = np.asarray(g[:, where], np.float32) * mask[where]
            kernel, y = _product(g, g), y[where]
        elif mask is not None:
            g, kernel = g * mask.astype(g.dtype), kernel * float(mask) ** 2
        kernels.append(np.asarray(kernel))
        norms[:, leaf] = np.diagonal(kernel)
        inner.append(_product(g, y[None])[:, 0])
    scales = np.ones_like(norms)
    if factored.scale is not None:
        found = jax.vmap(factored.scale)(treedef.unflatten(list(jnp.asarray(norms.T))))
        scales = np.stack([np.broadcast_to(x, num) for x in jax.tree.leaves(found)], axis=1)
    for index, leaf in enumerate(bank.kept):
        s = scales[:, leaf].astype(np.float32)
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
        bank = make_bank(public, label, num, jax.random.key(num), progress, **through)
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


#: Banks of this process, the latest last; a bank takes up to :data:`BANK_BYTES` and its kernels.
_BANKS: dict[tuple, tuple[Public, Bank]] = {}
_MOST_BANKS = 2


def bank_of(
    public: Public, label: int, num: int, progress: Callable[[float], None] | None = None
) -> Bank:
    """The bank of a model and label; the same one for every update, and for other processes, too,
    where :mod:`ggl_jax.cache` keeps it.
    """
    parts = (public.variables, public.prior_params)
    name = (public.model, public.prior, *map(id, parts), label, num)
    if name not in _BANKS:
        while len(_BANKS) >= _MOST_BANKS:
            del _BANKS[next(iter(_BANKS))]
        content, bank = _content(public, label, num), None
        if content is not None:
            bank = cache.load(content, _shapes(public, num))
        if bank is None:
            bank = make_bank(public, label, num, jax.random.key(num), progress)
            if content is not None:
                cache.keep(content, bank._replace(kept=()))
        # What is public stays alive beside it, so that no other gets its identity.
        _BANKS[name] = public, bank._replace(kept=_kept(public.variables, num)[1])
    return _BANKS[name][1]


def _content(public: Public, label: int, num: int) -> str | None:
    """A digest of all that a bank depends on; None where nothing is kept, or nothing can tell."""
    if cache.folder() is None:
        return None
    model, variables, prior, prior_params, _ = public
    images = jax.ShapeDtypeStruct((_at_once(), *model.image_shape), np.float32)
    labels = jax.ShapeDtypeStruct((_at_once(), 1), np.int32)
    compute = _gradients(model, _kept(variables, num)[1], None)
    draw = functools.partial(samples, prior, num=num, labels=label)
    programs = [
        program(compute, variables, images, labels, None)[:2],
        program(draw, prior_params, jax.random.key(num))[:2],
    ]
    if any(calls_back(text) for text, _ in programs):
        return None
    device = machine.cpu_name(), jax.devices()[0].device_kind
    made_by = [jax.__version__, machine.settings(), device, Path(__file__).read_bytes()]
    return digest(programs, variables, prior_params, label, num, made_by)


def _shapes(public: Public, num: int) -> Bank:
    """A bank's shapes and types, without the tensors' numbers."""
    sizes, kept = _kept(public.variables, num)

    def array(columns, dtype=np.float32):
        return jax.ShapeDtypeStruct((num, columns), dtype)

    return Bank(
        images=array(math.prod(public.model.image_shape)),
        kept=(),
        gradients=[array(sizes[leaf], ml_dtypes.bfloat16) for leaf in kept],
        kernels=[array(num) for _ in kept],
        sq_norms=array(len(sizes)),
    )


def rank_of(prior: Prior, num: int) -> int:
    """Columns of :func:`guess_of`'s factor for a bank of ``num`` samples."""
    size = math.prod(prior.image_shape)
    return size if size <= _WHOLE else num
