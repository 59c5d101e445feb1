"""Inner products between the residuals of candidates: what a Gauss-Newton step needs of updates.

The residual of a candidate is b y - a g, as the distance compares the two. Its update g has
millions of entries; a search of p candidates works with their p x p products alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import Distance
from ggl_jax.adversary.matching.fused import (
    Comparison,
    Tensor,
    passes,
    prepare_convolutions,
    tensors_of,
)
from ggl_jax.adversary.matching.program import Program
from ggl_jax.client.gradients import client_update
from ggl_jax.spec import Client
from ggl_jax.trees import in_chunks
from ggl_jax.types import Factored, Model, Products, PyTree


def differences_of(
    program: Program,
    variables: PyTree,
    observed: PyTree,
    *,
    simulate: Callable,
    factored: Factored | None,
    size: int,
) -> Callable | None:
    """``of(images[n b h w c], labels)``: for each tensor y, a function, and what it makes y - g of.

    None where the defense mixes tensors. ``size``: candidates that pass at once.
    """
    tensors = tensors_of(program, observed, simulate, factored)
    if tensors is None:
        return None
    prepared = prepare_convolutions(program, variables)

    def of(images, labels):
        def pass_through(images, labels):
            return passes(program, variables, prepared, images, labels)

        arrays = in_chunks(pass_through, size, images, labels)
        return [
            (tensor.target, functools.partial(_formed, tensor), own)
            for tensor, own in zip(tensors, arrays, strict=True)
        ]

    return of


def _formed(tensor: Tensor, arrays: tuple) -> jax.Array:
    """y - g of all candidates, [n ...]."""
    return in_chunks(lambda own: tensor.target - tensor.gradients(own), tensor.at_once, arrays)


def direct_differences(
    model: Model,
    variables: PyTree,
    observed: PyTree,
    *,
    simulate: Callable,
    client: Client,
    size: int,
) -> Callable:
    """The same by one update for each candidate, all of which are held at once."""

    def difference(images, labels):
        update = client_update(client, model, variables, images, labels, simulate)
        return jax.tree.map(jnp.subtract, observed, update)

    def of(images, labels):
        found = jax.tree.leaves(in_chunks(jax.vmap(difference), size, images, labels))
        pairs = zip(jax.tree.leaves(observed), found, strict=True)
        return [(target, lambda own: own, own) for target, own in pairs]

    return of


def residual_products(
    tensors: list, observed: PyTree, distance: Distance, factored: Factored | None, restarts: int
) -> Products:
    """Of what one of the functions above gives for r p candidates; noise as of variance 1."""
    rescale = None if factored is None else factored.scale
    norms = [jnp.sum(y**2) for y, *_ in tensors]
    comparison = Comparison(distance, rescale, jax.tree.structure(observed), norms)
    inner, grams, wait = [], [], jnp.zeros(())
    with jax.default_matmul_precision("highest"):
        for target, form, arrays in tensors:
            arrays = jax.tree.map(lambda x, wait=wait: x + wait.astype(x.dtype), arrays)
            d = form(arrays).reshape(restarts, -1, target.size)
            inner.append(d @ target.reshape(-1))
            grams.append(d @ d.swapaxes(1, 2))
            # Always 0, but XLA has to wait for it: else the gradients of all tensors are held.
            wait = 1.0 * (jnp.sum(grams[-1] ** 2) + jnp.sum(inner[-1] ** 2) < 0)

    def loss_of(squares):
        return distance.from_squares(comparison.treedef.unflatten(squares))

    def one(inner, grams):
        squares = [jnp.diagonal(gram) for gram in grams]
        a, b = jax.vmap(comparison.factors)(
            [y - x for y, x in zip(norms, inner, strict=True)],
            [jnp.maximum(y - 2 * x + s, 0) for y, x, s in zip(norms, inner, squares, strict=True)],
        )
        found = []
        for y, x, gram, scale, known in zip(norms, inner, grams, a, b, strict=True):
            # b y - a g = (b - a) y + a (y - g), exact where a candidate fits
            rest = known - scale
            cross = jnp.outer(rest, scale * x)
            found.append(
                y * jnp.outer(rest, rest) + cross + cross.T + jnp.outer(scale, scale) * gram
            )
        squares = [jnp.maximum(jnp.diagonal(gram), 0) for gram in found]
        weights = jax.grad(loss_of)([jnp.mean(s) for s in squares])
        total = sum(w * gram for w, gram in zip(weights, found, strict=True))
        return jax.vmap(loss_of)(squares), total

    losses, products = jax.vmap(one)(inner, grams)
    zero = [0.0 * y for y in norms]
    at_zero = comparison.expanded(zero, zero)[1]
    noise = at_zero / jnp.maximum(sum(norms), 1e-30)
    return Products(losses, products, jnp.full(restarts, noise))
