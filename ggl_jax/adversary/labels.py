"""Label inference: which classes the client's images have, from the last layer's gradient."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.client.defenses.noise import estimate_sigma
from ggl_jax.client.gradients import is_binary
from ggl_jax.errors import GGLError
from ggl_jax.grammar import at_least
from ggl_jax.priors.decoding import images_at_once
from ggl_jax.spec import AtLeast, check
from ggl_jax.types import Model, Path, Prior, PyTree


def infer_labels(
    update: PyTree,
    head: Path,
    batch_size: int = 1,
    *,
    num_steps: float = 1,
    probabilities: jax.Array | None = None,
    features: jax.Array | None = None,
    noise: jax.Array | float | None = None,
) -> jax.Array:
    """Infer the labels of the client's images from the observed update alone.

    For one image the negative row, as far as both ``dW`` and ``db`` show it; for batches a count of
    each class.

    The last layer's gradient is ``dW = mean_b f_b (p_b - y_b)^T`` and ``db = mean_b (p_b - y_b)``.
    Features f are mostly >= 0 (after a ReLU) and probabilities are positive, so for one image the
    row of its class, and no other, is negative.

    Args:
        update: the observed update, a pytree like ``variables["params"]``.
        head: ``Model.head``.
        batch_size: number of images b that the update comes from, at least 1.
        num_steps: number of gradients that are summed in the update, at least 1: local steps, or
            with momentum :func:`ggl_jax.client.local.gradients_summed`. Of Adam's update only one
            image's label can be read, by the sign.
        probabilities: [k] the model's mean output probabilities on public images (for instance
            samples of the prior), used where b > 1. None takes 1/k, which is off by the model's
            own preference among the classes.
        features: [d] the model's mean representation on public images. Optional; under noise it
            gives the scale of ``dW``, which the noisy bias gradient alone tells poorly.
        noise: standard deviation of the noise in the update; None estimates it.

    Returns:
        [b] int32 class indices, sorted, repeated as often as the class occurs.

    Raises:
        GGLError: batch_size is no positive integer, num_steps is below 1, or the update has no such
            layer.

    Accuracy: one image: right unless the noise exceeds the signal by far, since ``dW`` sums d
    entries (untrained ResNet-18s, 2 classes: all of 60 images at sigma 0.3, 59 at sigma 1).
    Batches: counts are real numbers ``b (q_c - db_c)``, with q the mean probability of class c,
    rounded so that they sum to b; they are right when q is known to better than 1/(2b). Measured on
    the same models, all b labels right: without noise every batch of 1 to 4, and of 8 images 45 %
    with 1/k, all with ``probabilities``; at sigma 0.1 95 % of batches of 4, and of 8 images 45 %,
    65 % with ``probabilities``, 85 % with ``features`` too. Clipping of the whole update scales
    ``db`` unknown to the server; the scale is then read from classes that do not occur, which needs
    more classes than images.

    Edge cases: entries that are exactly zero in a row of ``dW`` that is not zero as a whole
    (sparsification) are filled so that classes sum to zero, as they do in the true gradient; such
    entries of ``db`` are taken from ``dW``. Where all of one is zero, the other serves. NaN gives
    arbitrary labels; check with ``estimation.check_finite``. Ties go to the lower class.

    Reference: paper, label inference ("index of the negative row"). Counting repeated labels is
    akin to Ma et al. 2023 (Instance-wise Batch Label Restoration), in a simpler form.
    """
    at_least(1, batch_size=batch_size)
    check("num_steps", num_steps, Annotated[float, AtLeast(1)])
    kernel, bias = trees.head_parts(update, head)
    num_classes = kernel.shape[1]
    if noise is None:
        noise, _ = estimate_sigma(update, head)
    noise = jnp.asarray(noise, kernel.dtype)
    if probabilities is None:
        probabilities = jnp.full((num_classes,), 1 / num_classes, kernel.dtype)
    residual = class_residuals(kernel, bias, features, noise, batch_size)
    if batch_size == 1:
        return jnp.argmin(residual)[None].astype(jnp.int32)
    residual = residual / num_steps
    residual = residual / _overall_scale(residual, probabilities, batch_size)
    return _round_counts(batch_size * (probabilities - residual), batch_size)


def softmax_form(model: Model, update: PyTree) -> tuple[PyTree, Path]:
    """What :func:`infer_labels` takes: an update, and the path of its last layer.

    The binary cross-entropy of one logit is that of the softmax over (0, logit), whose gradient in
    the first is minus that in the second. Any other model's update is taken as it is.
    """
    kernel, bias = trees.head_parts(update, model.head)
    if not is_binary(model, kernel.shape[1]):
        return update, model.head
    layer = {"kernel": jnp.concatenate([-kernel, kernel], axis=1)}
    if bias is not None:
        layer["bias"] = jnp.concatenate([-bias, bias])
    return {"head": layer}, ("head",)


@jax.jit
def _squared_norm(update: PyTree) -> jax.Array:
    return trees.total(trees.sq_norms(update))


def check_told(model: Model, update: PyTree, *, searched: bool) -> None:
    """Refuse an update that tells nothing, or not the labels although they are to be inferred."""
    squares = float(_squared_norm(update))
    if squares == 0:
        raise GGLError(
            "update: zero in every entry, or nearly, so it tells nothing of the images behind it"
        )
    if squares == float("inf"):
        raise GGLError(
            "update: too large for float32, which cannot hold its squared norm; divide it by what "
            "the loss was multiplied by"
        )
    kernel, bias = trees.head_parts(update, model.head)
    if not (searched or np.any(kernel) or (bias is not None and np.any(bias))):
        raise GGLError(
            f"labels: the update of the last layer {'/'.join(model.head)} is zero, so the label "
            "cannot be told; search it: labels='searched', refine='none' (as attack dlg)"
        )


def smallest_labels(update: PyTree, head: Path, batch_size: int = 1) -> jax.Array:
    """The classes with the smallest row sums of ``dW``, each at most once, as published code does.

    Args and returns as for :func:`infer_labels`. Ties go to the lower class.

    Raises:
        GGLError: more labels than classes are asked for.
    """
    kernel, _ = trees.head_parts(update, head)
    if batch_size > kernel.shape[1]:
        raise GGLError(
            f"labels: {batch_size} of them by smallest sums need as many classes, the model has "
            f"{kernel.shape[1]}; use labels='inferred', which counts repeats"
        )
    smallest = jnp.argsort(jnp.sum(kernel, axis=0), stable=True)[:batch_size]
    return jnp.sort(smallest).astype(jnp.int32)


def public_expectations(
    model: Model, variables: PyTree, prior: Prior, prior_params: PyTree, key: jax.Array
) -> dict[str, jax.Array]:
    """The model's mean output probabilities and representation on samples of the prior.

    What :func:`infer_labels` takes as ``probabilities`` [k] and ``features`` [d], from public
    knowledge alone: 256 samples, of classes drawn uniformly.
    """
    key_latents, key_labels = jax.random.split(key)
    latents = prior.sample_latent(key_latents, 256)
    labels = jax.random.randint(key_labels, (256,), 0, model.num_classes)

    def seen(latents, labels):
        logits, features = model.apply(variables, prior.apply(prior_params, latents, labels))
        if is_binary(model, logits.shape[1]):
            logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)
        return jax.nn.softmax(logits), features

    at_once = images_at_once(prior, prior_params)
    probabilities, features = trees.in_chunks(seen, at_once, latents, labels)
    return {
        "probabilities": jnp.mean(probabilities, axis=0),
        "features": jnp.mean(features, axis=0),
    }


def class_residuals(
    kernel: jax.Array,
    bias: jax.Array | None,
    features: jax.Array | None,
    noise: jax.Array | float,
    batch_size: int,
) -> jax.Array:
    """Estimate ``mean_b (p_b - y_b)`` [k] from the last layer's gradient, noise allowed for.

    Args:
        kernel: [d k] observed gradient.
        bias: [k], or None.
        features: [d] public mean representation, or None.
        noise: standard deviation of the noise.
        batch_size: number of images b. For one, the scale does not matter, and ``dW`` serves even
            where it has none.

    Returns:
        [k], summing to zero. Without a bias gradient and ``features`` the scale is not known; the
        negative entries are then made to sum to -1/2.
    """
    kernel = _fill_pruned(kernel)
    # Noise breaks the zero sum over the classes, signal does not.
    kernel = kernel - jnp.mean(kernel, axis=1, keepdims=True)
    weights = jnp.ones(kernel.shape[0], kernel.dtype) if features is None else features
    weights = jnp.where(jnp.any(kernel != 0, axis=1), weights, 0)
    energy = jnp.sum(jnp.square(weights))
    # dW = f g^T: projected on the features' direction; g times an unknown scale s.
    projected = weights @ kernel / jnp.maximum(jnp.sqrt(energy), 1e-30)
    own = jnp.sqrt(energy) if features is not None else None
    if bias is None:
        if own is not None:
            return projected / jnp.maximum(own, 1e-30)
        return _normalised(projected)

    pruned = (bias == 0) & jnp.any(bias != 0)
    bias = _fill_pruned(bias[None])[0]
    bias = bias - jnp.mean(bias)
    # s by regression of the one on the other, the noise's own energy taken off.
    degrees = max(bias.size - 1, 1)
    bias_energy = jnp.sum(jnp.where(pruned, 0, jnp.square(bias))) - degrees * jnp.square(noise)
    trusted = bias_energy > 4 * degrees**0.5 * jnp.square(noise)
    scale = jnp.where(
        trusted,
        jnp.sum(jnp.where(pruned, 0, bias * projected)) / jnp.where(trusted, bias_energy, 1),
        0.0,
    )
    if own is not None:
        # Only clipping changes the public scale, and only downwards; believe it where it shows.
        stderr = noise * own / jnp.sqrt(jnp.where(trusted, bias_energy, 1))
        rescaled = trusted & (scale + 2 * stderr < 0.8 * own)
        scale = jnp.where(rescaled, scale, own)
    # Average of the two, weighted by inverse variances: noise, and for dW the spread of features
    # among images, which makes it proportional to the residual only on average.
    usable = scale > 0
    from_kernel = projected / jnp.where(usable, scale, 1)
    spread = _FEATURE_SPREAD**2 * (1 - 1 / bias.size) / bias.size / batch_size
    kernel_variance = jnp.square(noise) / jnp.where(usable, jnp.square(scale), 1) + spread
    bias_share = kernel_variance / (kernel_variance + jnp.square(noise) + 1e-30)
    both = bias_share * bias + (1 - bias_share) * from_kernel
    # Of a pruned entry the bias says only that it was small. What dW says is shifted so that the
    # classes sum to zero.
    both = jnp.where(pruned, from_kernel, both)
    both -= jnp.where(pruned, jnp.sum(both) / jnp.maximum(jnp.sum(pruned), 1), 0)
    both = jnp.where(usable, both, bias)
    if batch_size == 1 and own is None:
        # Where the bias is lost in noise, d sums of features still say more than it does.
        lost = ~trusted & jnp.any(kernel != 0)
        return jnp.where(lost, _normalised(projected), both)
    return both


#: Relative spread of the features' projections among images: 20 to 26 % in untrained ResNet-18s.
_FEATURE_SPREAD = 0.25


def _normalised(residual: jax.Array) -> jax.Array:
    negative = -jnp.sum(jnp.minimum(residual, 0))
    return 0.5 * residual / jnp.maximum(negative, 1e-30)


def _fill_pruned(rows: jax.Array) -> jax.Array:
    """Replace exact zeros in rows that are not all zero, so that each row sums to zero."""
    zero = (rows == 0) & jnp.any(rows != 0, axis=1, keepdims=True)
    missing = jnp.sum(zero, axis=1, keepdims=True)
    fill = -jnp.sum(rows, axis=1, keepdims=True) / jnp.maximum(missing, 1)
    return jnp.where(zero, fill, rows)


def _overall_scale(residual, probabilities, batch_size):
    """How far the update was scaled down, from the classes that cannot have occurred.

    A class with q_c < 1/b and a positive residual has a count of 0, so its residual should be q_c.
    """
    absent = (residual > 0) & (probabilities < 1 / batch_size)
    share = jnp.sum(jnp.where(absent, probabilities, 0))
    seen = jnp.sum(jnp.where(absent, residual, 0)) / jnp.where(share > 0, share, 1)
    # Few such classes say more of the model's preferences than of any scale.
    return jnp.where(share > 0.5, jnp.clip(seen, 1e-6, 1.0), 1.0)


def _round_counts(counts: jax.Array, batch_size: int) -> jax.Array:
    """Labels with counts nearest to the real-valued ``counts`` [k], largest remainder first."""

    def assign(left, _):
        label = jnp.argmax(left)
        return left.at[label].add(-1), label

    _, labels = jax.lax.scan(assign, counts, None, length=batch_size)
    return jnp.sort(labels).astype(jnp.int32)
