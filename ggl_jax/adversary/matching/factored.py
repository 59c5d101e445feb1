"""Defenses in factored form as data, so that one compiled search serves many of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ggl_jax import trees
from ggl_jax.client.defenses.clip import layer_scales
from ggl_jax.types import Factored, Path, PyTree, View


class Form(NamedTuple):
    """What :data:`FACTORED` has for its estimate.

    Attributes:
        factored: mask and scale, of arrays alone.
        kernel: [d k] of the last Dense layer, at which candidates' gradients are taken.
    """

    factored: Factored
    kernel: jax.Array


def _simulate(form: Form, update: PyTree) -> PyTree:
    mask, scale = form.factored
    if mask is not None:
        update = jax.tree.map(lambda m, g: m * g, mask, update)
    if scale is None:
        return update
    return jax.tree.map(lambda s, g: s * g, scale(trees.sq_norms(update)), update)


def _rewire(form: Form, variables: PyTree, head: Path) -> PyTree:
    params = trees.map_head_kernel(
        lambda _: form.kernel, lambda leaf: leaf, variables["params"], head
    )
    return {**variables, "params": params}


#: The view of any defense whose ``estimated`` is a :class:`Form`.
FACTORED = View(
    "factored",
    lambda update, head, noise=0.0: Form(Factored(), trees.head_parts(update, head)[0]),
    _simulate,
    lambda form: form.factored,
    _rewire,
)


def as_data(view: View, estimated: PyTree, variables: PyTree, head: Path) -> Form | None:
    """A defense's factored form in one shape for all that have the same kind of mask.

    Args:
        view: the server's side of the defense.
        estimated: its parameters.
        variables: the model's, with ``"params"``.
        head: ``Model.head``.

    Returns:
        Arrays alone for :data:`FACTORED`: no mask is a mask of ones, one for each feature at the
        last kernel (Soteria's), and no scale a clip at infinity. None where the view has no such
        form, changes more of the variables than the last kernel, or where its scale is a plain
        function (those of the built-in defenses are ``jax.tree_util.Partial``).
    """
    found = None if view.factor is None else view.factor(estimated)
    if found is None:
        return None
    kernel, _ = trees.head_parts(variables["params"], head)
    if view.rewire is not None:
        rewired = view.rewire(estimated, variables, head)
        kernel, own = trees.head_parts(rewired["params"], head)[0], kernel
        pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(rewired), strict=True)
        if any(old is not new for old, new in pairs if old is not own):
            return None
    mask, scale = found
    if mask is None:
        mask = jax.tree.map(lambda _: 1.0, variables["params"])
    features = (len(kernel), 1)
    mask = trees.map_head_kernel(
        lambda m: jnp.broadcast_to(m, features) if jnp.size(m) == 1 else m,
        lambda m: m,
        mask,
        head,
    )
    if scale is None:
        scale = Partial(layer_scales, jax.tree.map(lambda _: jnp.inf, variables["params"]))

    def array(x):
        # Not of a weak type, or programs would differ.
        return None if callable(x) else jnp.asarray(x, jnp.result_type(x, jnp.float32))

    arrays = jax.tree.map(array, (mask, scale))
    if jax.tree.structure(arrays) != jax.tree.structure((mask, scale)):
        return None
    return Form(Factored(*arrays), kernel)
