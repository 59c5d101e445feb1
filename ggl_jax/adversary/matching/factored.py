"""Defenses in factored form as data, so that one compiled search serves many of them."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ggl_jax import trees
from ggl_jax.client.defenses.clip import layer_scales
from ggl_jax.types import Factored, PyTree, View


def _simulate(factored: Factored, update: PyTree) -> PyTree:
    if factored.mask is not None:
        update = jax.tree.map(lambda m, g: m * g, factored.mask, update)
    if factored.scale is None:
        return update
    return jax.tree.map(lambda s, g: s * g, factored.scale(trees.sq_norms(update)), update)


#: The view of any defense whose ``estimated`` is a :class:`ggl_jax.types.Factored`.
FACTORED = View("factored", lambda update, head, noise=0.0: Factored(), _simulate, lambda own: own)


def as_data(view: View, estimated: PyTree, params: PyTree) -> Factored | None:
    """A defense's factored form in one shape for all that have the same kind of mask.

    Args:
        view: the server's side of the defense.
        estimated: its parameters.
        params: ``variables["params"]``.

    Returns:
        A form of arrays alone for :data:`FACTORED`: no mask is a mask of ones, no scale a clip at
        infinity. None where the view has no such form, changes the variables, or where its scale
        is a plain function (those of the built-in defenses are ``jax.tree_util.Partial``).
    """
    found = None if view.factor is None or view.rewire is not None else view.factor(estimated)
    if found is None:
        return None
    mask, scale = found
    if mask is None:
        mask = jax.tree.map(lambda _: 1.0, params)
    if scale is None:
        scale = Partial(layer_scales, jax.tree.map(lambda _: jnp.inf, params))

    def array(x):
        # Not of a weak type, or programs would differ.
        return None if callable(x) else jnp.asarray(x, jnp.result_type(x, jnp.float32))

    arrays = jax.tree.map(array, (mask, scale))
    if jax.tree.structure(arrays) != jax.tree.structure((mask, scale)):
        return None
    return Factored(*arrays)
