"""Small helpers for pytrees of gradients and candidates, shared by both sides of the door.

A gradient (an "update") is a pytree of arrays with the structure of ``variables["params"]``; its
leaves are called tensors or, as in the literature on clipping, layers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.errors import GGLError
from ggl_jax.types import Path, PyTree


def names_of_path(path) -> list[str]:
    """The names along a path of ``jax.tree_util``."""
    return [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path]


def _name(path) -> str:
    return "/".join(names_of_path(path))


def names(tree: PyTree) -> list[str]:
    """Names of the leaves in ``jax.tree.leaves`` order, e.g. ``"fc/kernel"``."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their :func:`names`."""
    return dict(zip(names(tree), jax.tree.leaves(tree), strict=True))


def head_parts(update: PyTree, head: Path) -> tuple[jax.Array, jax.Array | None]:
    """The last Dense layer's part of an update.

    Args:
        update: a pytree like ``variables["params"]``.
        head: ``Model.head``.

    Returns:
        ``(kernel[d k], bias[k])``; the bias is None where the layer has none.

    Raises:
        GGLError: there is no such layer, or its kernel is not a matrix.
    """
    leaves = named(update)
    base = "/".join(head)
    kernel = leaves.get(f"{base}/kernel")
    if kernel is None or jnp.ndim(kernel) != 2:
        found = ", ".join(n for n in leaves if n.endswith("kernel")) or "none"
        raise GGLError(
            f"head={tuple(head)!r}: the update has no matrix {base}/kernel (kernels found: "
            f"{found}); give the path of the last Dense layer, as in Model.head"
        )
    return kernel, leaves.get(f"{base}/bias")


def map_head_kernel(on_kernel: Callable, on_other: Callable, update: PyTree, head: Path) -> PyTree:
    """Apply one function to the last Dense layer's kernel and another to every other leaf."""
    target = "/".join((*head, "kernel"))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (on_kernel if _name(path) == target else on_other)(leaf), update
    )


def sq_norms(tree: PyTree) -> PyTree:
    """Squared l2 norm of every leaf, float32 or wider: a pytree of scalars."""
    return jax.tree.map(lambda x: jnp.sum(jnp.square(_wide(x))), tree)


def total(tree: PyTree) -> jax.Array:
    """Sum of a pytree of scalars."""
    return jnp.sum(jnp.stack(jax.tree.leaves(tree)))


def sq_distance(a: PyTree, b: PyTree) -> jax.Array:
    """Squared l2 distance of two pytrees of equal structure, a scalar."""
    return total(sq_norms(jax.tree.map(jnp.subtract, a, b)))


def map_flat(function: Callable, tree: PyTree, *scalars: PyTree) -> PyTree:
    """Map ``function(flat_leaf[n], *scalars)`` over the leaves; the result has their shapes."""
    return jax.tree.map(
        lambda leaf, *own: function(leaf.reshape(-1), *own).reshape(leaf.shape), tree, *scalars
    )


def in_chunks(function: Callable, chunk_size: int, *arrays: PyTree) -> PyTree:
    """Apply ``function`` to at most ``chunk_size`` items at once.

    The chunks have equal size, as few and as small as ``chunk_size`` allows; the last is filled up
    with copies of the first item, whose results are dropped.

    Args:
        function: maps pytrees of arrays [m, ...] to a pytree of arrays [m, ...].
        chunk_size: at least 1.
        arrays: pytrees of arrays [n, ...].

    Returns:
        A pytree of arrays [n, ...].
    """
    num = jax.tree.leaves(arrays)[0].shape[0]
    if num <= chunk_size:
        return function(*arrays)
    num_chunks = math.ceil(num / chunk_size)
    size = math.ceil(num / num_chunks)

    def split(array):
        fill = jnp.broadcast_to(array[:1], (num_chunks * size - num, *array.shape[1:]))
        return jnp.concatenate([array, fill]).reshape(num_chunks, size, *array.shape[1:])

    results = jax.lax.map(lambda chunk: function(*chunk), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], results)


def losses_and_gradients(loss_fn: Callable, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Losses [n] of candidates [n z], and the gradient [n z] of each one's own loss."""

    def total(points):
        losses = loss_fn(points)
        # Candidates are independent, so the gradient of the sum holds each one's own.
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(total, has_aux=True)(points)
    return losses, gradient


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root with value and derivative 0 at 0 (and below)."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def check_finite(
    tree: PyTree,
    what: str = "the observed update",
    remedy: str = "only finite gradients can be audited, check the client's loss, defense and "
    "images",
) -> None:
    """Raise :class:`GGLError` naming the first tensor that holds NaN or infinity. Host side."""
    for name, leaf in named(tree).items():
        bad = int(np.sum(~np.isfinite(np.asarray(leaf))))  # in numpy: nothing to compile
        if bad:
            raise GGLError(
                f"{what}: {name} holds {bad} NaN or infinite values out of {np.size(leaf)}; "
                f"{remedy}"
            )


def _wide(x: jax.Array) -> jax.Array:
    """Half-precision gradients are summed in float32: 2 million squares do not fit float16."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
