"""Latents to images within bounded memory, however large the generator.

A 32x32 generator takes thousands of latents at once; BigGAN-deep at 256x256 needs about 150 MB for
each. How many go at once follows from the largest arrays of the generator's own program.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ggl_jax.errors import GGLError
from ggl_jax.trees import in_chunks
from ggl_jax.types import Prior, PyTree

#: Memory for the images that are decoded at once, on a CPU; an eighth of an accelerator's.
DECODING_BYTES = 2**31
#: Arrays as large as the largest that are alive at once: a layer's input and output, and what the
#: compiler keeps beside them.
_ALIVE = 4


def _sizes(jaxpr) -> Iterator[int]:
    """Entries that each equation puts out, those of sub-programs in place."""
    for eqn in jaxpr.eqns:
        values = [x for v in eqn.params.values() for x in (v if isinstance(v, tuple) else (v,))]
        inner = [getattr(x, "jaxpr", x) for x in values]
        inner = [x for x in inner if isinstance(x, core.Jaxpr)]
        if inner:
            for body in inner:
                yield from _sizes(body)
        else:
            yield sum(math.prod(v.aval.shape) for v in eqn.outvars)


@functools.lru_cache(maxsize=64)
def _footprint(prior: Prior, treedef, shapes: tuple) -> tuple[int, int]:
    """Entries per image of the generator's largest array, and of all its arrays together."""
    params = treedef.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes])

    def sizes(num):
        latents = jax.ShapeDtypeStruct((num, prior.latent_dim), jnp.float32)
        labels = jax.ShapeDtypeStruct((num,), jnp.int32)
        return list(_sizes(jax.make_jaxpr(prior.apply)(params, latents, labels).jaxpr))

    # What does not grow with the number of images (kernels, say) cancels.
    grown = [two - one for one, two in zip(sizes(1), sizes(2), strict=True)]
    image = math.prod(prior.image_shape)
    return max([image, *grown]), max(image, sum(grown))


def images_at_once(prior: Prior, params: PyTree, *, derivatives: bool = False) -> int:
    """How many images fit into the memory for it (:data:`DECODING_BYTES`), at least 1.

    Args:
        prior: the generator.
        params: its parameters, of which only the shapes matter.
        derivatives: whether they are decoded to be differentiated, so that the arrays of all layers
            stay alive, and not only those of one.
    """
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    largest, total = _footprint(prior, treedef, shapes)
    # Fusion leaves less than a half of all arrays for the backward pass (measured: a fifth of
    # DCGAN's, 46 % of BigGAN-deep's).
    entries = max(_ALIVE * largest, total // 2) if derivatives else _ALIVE * largest
    budget = DECODING_BYTES
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        budget = stats.get("bytes_limit", 8 * budget) // 8
    return max(1, budget // (4 * entries))


def decode(prior: Prior, params: PyTree, latents: jax.Array, labels: jax.Array) -> jax.Array:
    """The generator's images, for use inside a compiled program; differentiable.

    ``prior.apply`` itself wherever all images fit into the memory set aside; else in chunks, one
    after the other, whose arrays are computed again for derivatives.

    Args:
        prior: the generator.
        params: its parameters.
        latents: [n z].
        labels: int [n].

    Returns:
        [n h w c].
    """
    at_once = images_at_once(prior, params, derivatives=True)
    if len(latents) <= at_once:
        return prior.apply(params, latents, labels)
    function = jax.checkpoint(lambda z, c: prior.apply(params, z, c))
    return in_chunks(function, at_once, latents, labels)


@functools.partial(jax.jit, static_argnames=("prior", "num"))
def draw(prior: Prior, key: jax.Array, *, num: int) -> jax.Array:
    """So many random latents [num z], compiled."""
    return prior.sample_latent(key, num)


@functools.partial(jax.jit, static_argnames=("prior",))
def _apply(prior: Prior, params: PyTree, latents: jax.Array, labels: jax.Array):
    return prior.apply(params, latents, labels)


def decode_each(
    prior: Prior,
    params: PyTree,
    latents: jax.Array,
    labels: jax.Array | int,
    use: Callable = lambda images: images,
) -> list:
    """``use(images[m h w c])`` for all images, as many at once as memory allows.

    Driven from the host: XLA's CPU backend runs a compiled loop's body on one thread.

    Args:
        prior: the generator.
        params: its parameters.
        latents: [n z], n >= 1.
        labels: int [n], or a scalar for all.
        use: called with each part of the images; by default they are returned.

    Returns:
        What ``use`` returned, in order.
    """
    num = len(latents)
    labels = jnp.broadcast_to(jnp.asarray(labels, jnp.int32), (num,))
    size = min(num, images_at_once(prior, params))
    results = []
    for start in range(0, num, size):
        part = latents, labels
        if size < num:  # the last is filled up with copies, whose images are dropped
            chosen = jnp.minimum(jnp.arange(start, start + size), num - 1)
            part = latents[chosen], labels[chosen]
        images = _apply(prior, params, *part)
        results.append(use(images[: num - start]))
    return results


def check_labels(prior: Prior, labels) -> None:
    """Refuse labels that a class-conditional prior does not know; others take any.

    Raises:
        GGLError: a label outside [0, prior.num_classes).
    """
    if prior.num_classes is None:
        return
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= prior.num_classes:
        raise GGLError(
            f"labels: got {low} to {high}, allowed: 0 to {prior.num_classes - 1}, the classes of "
            f"prior {prior.name}; use images with its class numbers"
        )
