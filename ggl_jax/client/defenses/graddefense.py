"""GradDefense: noise on some slices of the update, which are cut by sensitivity to the image."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.client.defenses._images import EMBEDDED, check_source, public_set
from ggl_jax.client.defenses._views import add_draw, masking
from ggl_jax.client.defenses.soteria import derivatives_at_once, in_chunks
from ggl_jax.client.gradients import loss_of
from ggl_jax.errors import GGLError, about
from ggl_jax.spec import Count, Positive, ranged
from ggl_jax.types import Defense, Facts, Model, PyTree, View

#: The server looks at so many neighbouring entries at once.
_BLOCK = 256
#: Of normal noise, the median of magnitudes over the root mean square; and how far a block's own
#: quotient may be off (3.5 standard errors).
_NORMAL, _OFF = 0.6745, 0.15
#: Logarithms of blocks' levels are counted in bins of this width, from exp of the lowest on.
_BIN, _LOWEST, _BINS = 0.1, -23.0, 300


@ranged
def graddefense(
    *,
    scale: Positive = 0.1,
    slices: Count = 10,
    perturbed: Count = 5,
    public: str = EMBEDDED,
    roots: Count = 16,
) -> Defense:
    """Cut the update into slices of equal sensitivity; add Gaussian noise to some of them.

    - A tensor's sensitivity is measured on a public root set: the norm of the derivative, with
      respect to an image, of the sum of the tensor's gradient, the mean over the root images.
    - It is shared out evenly to the tensor's entries; the whole update, one tensor after the other,
      is cut into ``slices`` stretches of the same sum.
    - ``perturbed`` of them, drawn at random, get noise of standard deviation ``scale``.

    What the adversary learns: which entries have the noise. Blocks of neighbouring entries that
    look normal and have one level in common are taken for noise, and candidates are compared on the
    others. It does not need the root set.

    Args:
        scale: of the noise, finite and > 0.
        slices: M, at least 1.
        perturbed: k, from 1 to M.
        public: the root set: "faces" (100 grey faces of LFW, from scikit-image) or an .npz file.
            Root images without labels of the model's classes get these in turn.
        roots: how many of them, the first ones; each costs some gradients for every tensor.

    Returns:
        A Defense with factored form. Record: ``scale``, and ``rate``, the share of entries with
        noise. Estimate: ``scale``, ``rate`` and ``mask``, 0 where noise was seen. Under noise of a
        later stage nothing is seen, and candidates are compared on all entries.

    Raises:
        GGLError: more slices to perturb than there are, or no public images.

    Edge cases: noise that is not above the gradient's own level is not seen. Tensors of fewer than
    64 entries are judged by their level alone. Where nearly all entries look like noise (99.9 %),
    candidates are compared on all of them.

    Reference: Wang et al. 2022 (INFOCOM), "Protect Privacy from Gradient Leakage Attack in
    Federated Learning", and its released code, whose demonstration has 5 of 10 slices and 0.1.
    There, slices end at multiples of the greatest common divisor of the tensors' sizes (and share
    an entry with their neighbour). Tensors stand in Flax's order here. The paper's compensation,
    which takes noise off the aggregate by the law of its eigenvalues, is the server's own work on
    what it has; it is no part of what a client shares.
    """
    with about("graddefense"):
        check_source(public)
        if perturbed > slices:
            raise GGLError(f"perturbed: got {perturbed}, allowed: 1 to slices, {slices}")

    def apply(key, update, context):
        images, labels = public_set(public, context.model.image_shape)
        classes = context.model.num_classes
        if labels is None or labels.max() >= classes:
            labels = np.arange(len(images)) % classes
        root = jnp.asarray(images[:roots]), jnp.asarray(labels[:roots])
        found = _sensitivities(context.model, context.variables, *root)
        of_choice, of_noise = jax.random.split(key)
        chosen = jax.random.permutation(of_choice, slices) < perturbed
        noisy = jax.tree.map(lambda at: chosen[at], slices_of(update, found, slices))
        flags = jnp.concatenate([one.ravel() for one in jax.tree.leaves(noisy)])

        def draw(num):
            return scale * flags * jax.random.normal(of_noise, (num,))

        rate = jnp.mean(flags, dtype=jnp.float32)
        return add_draw(update, draw), {"scale": jnp.float32(scale), "rate": rate}

    defaults = {"slices": (slices, 10), "perturbed": (perturbed, 5), "public": (public, EMBEDDED)}
    defaults["roots"] = (roots, 16)
    more = "".join(f",{k}={v}" for k, (v, usual) in defaults.items() if v != usual)
    return Defense(f"graddefense:{scale:g}{more}", apply, graddefense_view(), Facts(processes=True))


def sensitivities(model: Model, variables: PyTree, images: jax.Array, labels: jax.Array) -> PyTree:
    """Each tensor's sensitivity, a pytree of scalars like ``variables["params"]``.

    The derivative of the sum of a tensor's gradient with respect to the image is that of the loss'
    derivative with respect to the image, along a step of the whole tensor by 1: one forward pass
    over the derivative for each tensor.

    Args:
        model: the model.
        variables: its variables.
        images: [n h w c], the root images.
        labels: [n], their classes.
    """
    params, treedef = jax.tree.flatten(variables["params"])

    def slope(steps):
        moved = [w + steps[i] for i, w in enumerate(params)]
        own = {**variables, "params": jax.tree.unflatten(treedef, moved)}
        return jax.grad(lambda x: loss_of(model)(model.apply(own, x)[0], labels))(images)

    _, along = jax.linearize(slope, jnp.zeros(len(params)))

    def norm(direction):
        each = jnp.sum(jnp.square(along(direction)), axis=(1, 2, 3))
        return jnp.mean(jnp.sqrt(each))

    norms = in_chunks(norm, jnp.eye(len(params)), derivatives_at_once(images))
    return jax.tree.unflatten(treedef, list(norms))


# Compiled also where its caller is not: it has thousands of operations.
_sensitivities = jax.jit(sensitivities, static_argnums=0)


def slices_of(update: PyTree, sensitivity: PyTree, num: int) -> PyTree:
    """The slice of every entry, 0 to ``num - 1``: equal shares of the sensitivity, in order."""
    leaves, treedef = jax.tree.flatten(update)
    levels = jnp.stack(jax.tree.leaves(sensitivity))
    ends = jnp.cumsum(levels)
    starts = ends - levels

    def places(leaf, start, level):
        # the middle of each entry's own part
        own = (jnp.arange(leaf.size, dtype=jnp.float32) + 0.5) / leaf.size
        share = (start + level * own) / jnp.where(ends[-1] > 0, ends[-1], 1)
        return jnp.clip(jnp.floor(num * share), 0, num - 1).astype(jnp.int32).reshape(leaf.shape)

    found = [places(*one) for one in zip(leaves, starts, levels, strict=True)]
    return jax.tree.unflatten(treedef, found)


def graddefense_view() -> View:
    """The server's side of :func:`graddefense`."""

    def estimate(update, head, noise=0.0):
        del head
        leaves, treedef = jax.tree.flatten(update)
        blocks = [_blocks(leaf) for leaf in leaves]
        level, common = _common_level(blocks)
        seen = (jnp.asarray(noise) <= 0) & (common > 0)
        marks = [seen & _marked(leaf, own, level) for leaf, own in zip(leaves, blocks, strict=True)]
        rate = sum(jnp.sum(mark) for mark in marks) / sum(leaf.size for leaf in leaves)
        some = rate < 0.999
        kept = [
            (~(mark & some)).astype(leaf.dtype) for mark, leaf in zip(marks, leaves, strict=True)
        ]
        return {
            "scale": jnp.where(seen, level, 0).astype(jnp.float32),
            "rate": rate.astype(jnp.float32),
            "mask": jax.tree.unflatten(treedef, kept),
        }

    return masking("graddefense", estimate, "mask", rounds=None)


def _blocks(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Level (root mean square) [m] of a tensor's blocks, and whether each looks normal [m]."""
    size = min(_BLOCK, leaf.size)
    num = leaf.size // size
    rows = leaf.reshape(-1)[: num * size].reshape(num, size)
    level = jnp.sqrt(jnp.mean(jnp.square(rows), axis=1))
    quotient = jnp.median(jnp.abs(rows), axis=1) / jnp.where(level > 0, level, 1)
    return level, (jnp.abs(quotient - _NORMAL) < _OFF) & (level > 0) & (size >= 64)


def _common_level(blocks: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The level that most blocks that look normal have in common, and how many they are."""
    levels = jnp.concatenate([level for level, _ in blocks])
    normal = jnp.concatenate([looks for _, looks in blocks])
    logs = jnp.log(jnp.where(levels > 0, levels, 1))
    places = jnp.clip(((logs - _LOWEST) / _BIN).astype(jnp.int32), 0, _BINS - 1)
    counts = jnp.zeros(_BINS).at[places].add(normal)
    several = counts[:-2] + counts[1:-1] + counts[2:]
    first = jnp.argmax(several)
    own = normal & (places >= first) & (places <= first + 2)
    number = jnp.sum(own)
    square = jnp.sum(jnp.where(own, jnp.square(levels), 0)) / jnp.maximum(number, 1)
    return jnp.sqrt(square), number


def _marked(leaf: jax.Array, blocks: tuple[jax.Array, jax.Array], level: jax.Array) -> jax.Array:
    """Which entries of a tensor lie in blocks of that level."""
    own, normal = blocks
    small = leaf.size < 64
    reach = math.log(2.0) if small else 0.25
    near = jnp.abs(jnp.log(jnp.where(own > 0, own, 1) / jnp.where(level > 0, level, 1))) < reach
    found = near & (own > 0) & (normal | small)
    each = min(_BLOCK, leaf.size)
    # What is left over at the end goes with the last block.
    marks = jnp.repeat(found, each)
    marks = jnp.concatenate([marks, jnp.broadcast_to(found[-1], (leaf.size - marks.size,))])
    return marks.reshape(leaf.shape)
