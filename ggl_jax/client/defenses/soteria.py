"""Soteria: hide the image by pruning the representation that enters the last layer."""

import math

import jax
import jax.numpy as jnp

from ggl_jax import trees
from ggl_jax.client.defenses._views import masking
from ggl_jax.client.defenses.sparsify import zero_count
from ggl_jax.client.gradients import loss_of
from ggl_jax.spec import Count, Share, ranged
from ggl_jax.types import Defense, Facts, Model, Path, PyTree, View


@ranged
def soteria(
    *, rate: Share = 0.8, representation: bool = True, chunk_size: Count | None = None
) -> Defense:
    """Prune the entries of the representation r (the input of the last Dense layer) that tell most.

    What the adversary learns: which features were pruned, since their rows of the last layer's
    weight gradient are zero. The other layers still carry the image.

    Args:
        rate: share p of the d features that is pruned, 0 <= rate < 1. The published code's default
            is 0.1.
        representation:
            True, the paper's form: for each image, prune the ``floor(p d)`` features with the
            largest ``|r_i (dr_i/dx)^-1| = |r_i| / |dr_i/dx|`` (the pseudo-inverse of a row vector),
            then take the gradient of *all* layers with the pruned representation ``r' = m r``. The
            mask m is a constant, so nothing flows back through a pruned feature. It replaces the
            update, so it must be the first stage of a chain, on a single gradient step.
            False, the published code's: ``score_i = |dr_i/dx| / (r_i + 1e-10)``, averaged over the
            batch; zero the rows of the last layer's weight gradient whose absolute score is below
            the p-th percentile of the scores themselves. So fewer than a share p are pruned where
            features can be negative, and none where the percentile is. All other tensors keep the
            plain gradient. It masks any update.
        chunk_size: derivatives that are computed together; memory grows with it. None takes 16 at
            224x224 and as many more as the images are smaller.

    Returns:
        A Defense. Record: ``rate``, the share of features that were pruned (of each image), and
        ``mask``, a pytree like the update with [d 1] at the last kernel and 1.0 elsewhere: 0 where
        the feature is zero after pruning in all images, be it by itself. Estimate: the same
        mask, as seen, and ``rate``, its share of zeros, which is too high by the features that are
        zero by themselves.

    The simulation multiplies the last kernel's gradient by the mask, which is exact for the
    published code's form. In the paper's form pruning also changed the probabilities, and so every
    tensor, by a changed forward pass that no map of the plain gradient gives; ``rewire`` takes
    candidates' gradients at :func:`pruned_variables`, which is exact for one image, or where all
    images of a batch have one mask.

    Edge cases: batches: in the paper's form each image has its own mask, and a row is zero only
    where all images pruned it. Features that do not depend on the image: r_i = 0 is kept, another
    value is pruned first; where a share of 1 - p or more is silent (r_i = 0), all others are
    pruned and nothing of the last kernel's gradient is left. The code's form gives silent features
    huge scores, unless their derivative is 0 too; then their score, 0, is the lowest. Ties: the
    first in order are pruned, in the code's form those at the percentile are kept. With train-mode
    BatchNorm, images of a batch depend on each other, and the derivative of the batch's sum stands
    for that of the image, as in the published code.

    Reference: Sun et al. 2021, "Soteria: Provable Defense Against Privacy Leakage in Federated
    Learning From Representation Perspective" (its l0 form); the paper prunes 80 %. The paper's
    published code leaves the forward pass unperturbed.
    """

    def masks(context):
        """Masks, [b d] in the paper's form, [1 d] in the code's; and the features [b d]."""
        features, norms = jacobian_norms(
            context.model, context.variables, context.images, chunk_size=chunk_size
        )
        if representation:
            return jax.vmap(lambda r, n: _largest_pruned(r, n, rate))(features, norms), features
        scores = jnp.mean(norms / (features + 1e-10), axis=0)
        kept = jnp.abs(scores) >= percentile(scores, rate)
        return kept.astype(features.dtype)[None], features

    def apply(key, update, context):
        del key
        kept, features = masks(context)
        # What the mask comes to: a row of the gradient is left where some image has a feature.
        left = jnp.any((kept * features) != 0, axis=0)
        record = {
            "rate": jnp.mean(1 - kept, dtype=jnp.float32),
            "mask": mask_tree(context.variables["params"], context.model.head, left),
        }
        if representation:
            pruned = pruned_gradient(
                context.model, context.variables, context.images, context.labels, kept
            )
            return pruned, record
        mask = mask_tree(update, context.model.head, kept[0])
        return jax.tree.map(jnp.multiply, mask, update), record

    name = f"soteria:{rate:g}" + ("" if representation else ",representation=False")
    facts = Facts(replaces_update=representation, shrinks=not representation)
    return Defense(name, apply, soteria_view(representation), facts)


def soteria_view(representation: bool) -> View:
    """The server's side of :func:`soteria`, in that form."""

    def estimate(update, head, noise=0.0):
        kept = estimate_mask(update, head, noise, first_class_only=not representation)
        rate = jnp.mean(1 - kept, dtype=jnp.float32)
        return {"rate": rate, "mask": mask_tree(update, head, kept)}

    def rewire(estimated, variables, head):
        return pruned_variables(variables, head, estimated)

    return masking("soteria", estimate, "mask", rewire=rewire if representation else None)


def jacobian_norms(
    model: Model, variables: PyTree, images: jax.Array, *, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Each feature and the l2 norm of its derivative with respect to the image.

    Runs backward passes for ``chunk_size`` features at a time, on the residuals of one forward
    pass; no Jacobian is ever held. Where ``model.reach`` is known, pixels so far apart have no
    feature in common, and one forward derivative serves all of them: those are then computed
    instead, if they are fewer.

    Args:
        model: any model whose last layer is Dense.
        variables: its variables.
        images: [b h w c] in [0, 1].
        chunk_size: derivatives per pass, at least 1; None as for :func:`soteria`.

    Returns:
        ``(features[b d], norms[b d])``.
    """
    chunk_size = derivatives_at_once(images) if chunk_size is None else chunk_size

    def features_of(x):
        return model.apply(variables, x)[1]

    if model.reach is not None:
        _, height, width, channels = images.shape
        period = (min(model.reach, height), min(model.reach, width), channels)
        if math.prod(period) < jax.eval_shape(features_of, images).shape[1]:
            return _norms_by_pixels(features_of, images, period, chunk_size)
    features, pull_back = jax.vjp(features_of, images)

    def norms_of(i):
        # Images are independent, so one cotangent serves the whole batch.
        one_hot = jnp.zeros_like(features).at[:, i].set(1)
        (derivative,) = pull_back(one_hot)
        return jnp.sqrt(jnp.sum(jnp.square(derivative), axis=(1, 2, 3)))

    return features, in_chunks(norms_of, jnp.arange(features.shape[1]), chunk_size).T


def _norms_by_pixels(features_of, images, period, chunk_size) -> tuple[jax.Array, jax.Array]:
    """:func:`jacobian_norms`; pixels ``period`` (rows, columns, channels) apart share nothing."""
    rows, columns, channels = period
    features, along = jax.linearize(features_of, images)

    def squares(i):
        row, column, channel = i // (columns * channels), i // channels % columns, i % channels
        _, height, width, _ = images.shape
        here = (jnp.arange(height) % rows == row)[:, None, None]
        here &= (jnp.arange(width) % columns == column)[None, :, None]
        here &= jnp.arange(channels) == channel
        return jnp.square(along(jnp.broadcast_to(here, images.shape).astype(images.dtype)))

    def add(total, chunk):
        return total + jnp.sum(jax.vmap(squares)(chunk), axis=0), None

    turns = -(-math.prod(period) // chunk_size)
    # What is too many at the end is beyond the last row: no pixel, so it adds nothing.
    chunks = jnp.arange(turns * chunk_size).reshape(turns, chunk_size)
    total, _ = jax.lax.scan(add, jnp.zeros_like(features), chunks)
    return features, jnp.sqrt(total)


def derivatives_at_once(images: jax.Array) -> int:
    """How many derivatives of a batch [b h w c] fit into memory: 16 of one 224x224 image."""
    return max(1, 16 * 224 * 224 * 3 // images.size)


def in_chunks(function, items: jax.Array, size: int) -> jax.Array:
    """The function of every item, ``size`` of them at a time."""
    if size >= len(items):
        # Not a loop of one turn: XLA runs convolutions inside loops on one thread on CPUs.
        return jax.vmap(function)(items)
    return jax.lax.map(function, items, batch_size=size)


def _largest_pruned(features: jax.Array, norms: jax.Array, rate: float) -> jax.Array:
    """[d] mask: 0 at the floor(rate d) features with the largest |r_i| / |dr_i/dx|."""
    size = jnp.abs(features)
    moves = norms > 0
    key = jnp.where(moves, size / jnp.where(moves, norms, 1), jnp.where(size > 0, jnp.inf, 0.0))
    order = jnp.argsort(-key, stable=True)
    count = zero_count(rate, features.size)
    return jnp.ones_like(features).at[order[:count]].set(0)


def percentile(values: jax.Array, rate: float) -> jax.Array:
    """Linearly interpolated quantile, as numpy's and torch's default; the place in float64."""
    place = rate * (values.size - 1)
    low, share = math.floor(place), place - math.floor(place)
    ordered = jnp.sort(values)
    first, second = ordered[low], ordered[min(low + 1, values.size - 1)]
    return first + (second - first) * share


def pruned_gradient(
    model: Model, variables: PyTree, images: jax.Array, labels: jax.Array, mask: jax.Array
) -> PyTree:
    """Gradient of the mean loss with the representation multiplied by ``mask`` [b d]."""

    def loss(params):
        _, features = model.apply({**variables, "params": params}, images)
        kernel, bias = trees.head_parts(params, model.head)
        logits = (mask * features) @ kernel
        return loss_of(model)(logits if bias is None else logits + bias, labels)

    return jax.grad(loss)(variables["params"])


def pruned_variables(variables: PyTree, head: Path, estimated: dict) -> PyTree:
    """Variables at which a candidate's plain gradient is that of its pruned representation.

    ``(m r) W = r (m W)``: rows of the last kernel that belong to pruned features are zeroed. With
    the mask on the last kernel's gradient (``simulate``), a candidate's gradient at these variables
    is exactly what Soteria in the paper's form does to it with that mask.

    Args:
        variables: the model's variables.
        head: ``Model.head``.
        estimated: a soteria estimate (or record).
    """
    mask = estimated["mask"]
    params = trees.map_head_kernel(
        lambda kernel: kernel * trees.head_parts(mask, head)[0],
        lambda leaf: leaf,
        variables["params"],
        head,
    )
    return {**variables, "params": params}


def mask_tree(update: PyTree, head: Path, kept: jax.Array) -> PyTree:
    """A pytree like ``update``: [d 1] at the last kernel, the scalar 1.0 elsewhere."""
    trees.head_parts(update, head)  # raises where there is no such layer
    return trees.map_head_kernel(
        lambda kernel: kept[:, None].astype(kernel.dtype),
        lambda leaf: jnp.ones((), leaf.dtype),
        update,
        head,
    )


def estimate_mask(
    update: PyTree, head: Path, noise: jax.Array | float = 0.0, *, first_class_only: bool = False
) -> jax.Array:
    """Which features were kept, from the rows of the last layer's weight gradient.

    Without noise a row of zeros was pruned. Under noise, each row is projected on the direction
    over the classes that explains the most energy (for one image the gradient has rank one, so
    nothing is lost), and rows within 2.5 standard deviations of zero are taken for pruned: one
    pruned row in 80 is missed, and kept features below that size look pruned. Soteria keeps small
    features: of an untrained ResNet-18's at rate 0.8, 93 % of the mask is right at sigma 0.01, and
    at sigma 0.1 hardly a row stands out (the rate then reads 0.97).

    Args:
        update: the observed update.
        head: ``Model.head``.
        noise: standard deviation of noise added afterwards.
        first_class_only: look at the entries of class 0 only, as the published code.

    Returns:
        [d], 1.0 where kept, 0.0 where pruned.
    """
    kernel, _ = trees.head_parts(update, head)
    noise = jnp.asarray(noise, kernel.dtype)
    nonzero = kernel[:, 0] != 0 if first_class_only else jnp.any(kernel != 0, axis=1)
    # Signal sums to zero over the classes, noise does not: less noise without the mean.
    contrast = kernel - jnp.mean(kernel, axis=1, keepdims=True)

    def power_step(_, direction):
        moved = contrast.T @ (contrast @ direction)
        return moved / (jnp.linalg.norm(moved) + 1e-30)

    loudest = jnp.argmax(jnp.sum(jnp.square(contrast), axis=0))
    start = jnp.zeros(kernel.shape[1], kernel.dtype).at[loudest].set(1)
    direction = jax.lax.fori_loop(0, 30, power_step, start)
    clear = jnp.abs(contrast @ direction) > 2.5 * noise
    return jnp.where(noise > 0, clear, nonzero).astype(kernel.dtype)
