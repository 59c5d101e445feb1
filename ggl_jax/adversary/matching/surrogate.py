"""The derivative that ReLU's masks lack, put into a traced program.

A ReLU network's gradient jumps where a mask flips, and automatic differentiation sees none of that:
the slope of a matching loss misses the masks' share. Here ReLU and its derivative keep their
values, so the loss stays what it is, but the mask ``1[x > 0]`` gets the slope of a sigmoid.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ggl_jax.jaxprs import evaluate, walk, wrapped
from ggl_jax.types import Model


@jax.custom_jvp
def _mask(x, width):
    del width
    return (x > 0).astype(x.dtype)


@_mask.defjvp
def _(primals, tangents):
    x, width = primals
    s = jax.nn.sigmoid(x / width)
    return _mask(x, width), s * (1.0 - s) / width * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _relu(x, width):
    del width
    return jnp.maximum(x, 0.0)


@_relu.defjvp
def _(width, primals, tangents):
    (x,), (t,) = primals, tangents
    rms = jnp.sqrt(jnp.mean(jax.lax.stop_gradient(x) ** 2))
    return jnp.maximum(x, 0.0), _mask(x, width * rms + 1e-12) * t


@functools.lru_cache(maxsize=16)
def smoothed(model: Model, width: float) -> Model:
    """The model whose ReLU masks have a derivative.

    Args:
        model: any model; its program is searched for ReLUs (``max(x, 0)``, ``jax.nn.relu``). Other
            kinks (max-pooling, leaky ReLU) stay as they are.
        width: of the sigmoid, relative to the root mean square of what enters the ReLU; > 0.

    Returns:
        A model of the same values and first derivatives, whose second derivatives have the term
        ``sigmoid'(x / w) / w`` where ReLU's are 0.
    """

    def apply(variables, images):
        closed, shapes = jax.make_jaxpr(model.apply, return_shape=True)(variables, images)

        def visit(eqn, values):
            x = _rectified(eqn, values)
            return evaluate(eqn, values) if x is None else [_relu(x, width)]

        arguments = jax.tree.leaves((variables, images))
        outputs = walk(closed.jaxpr, closed.consts, arguments, visit, lambda value: value)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return model._replace(apply=apply)


def _rectified(eqn, values) -> Any:
    """What a ReLU's equation rectifies; None for any other equation."""
    if eqn.primitive.name == "custom_jvp_call":  # jax.nn.relu: max(x, 0) with a rule of its own
        body = eqn.params["call_jaxpr"].jaxpr
        while len(body.eqns) == 1 and (inner := wrapped(body.eqns[0])) is not None:
            body = inner[0]
        if len(values) > 1 or len(body.eqns) != 1:
            return None
        (eqn,) = body.eqns
    if eqn.primitive.name != "max":
        return None
    x = [number for number, atom in enumerate(eqn.invars) if not _is_zero(atom)]
    return values[x[0] if len(values) > 1 else 0] if len(x) == 1 else None


def _is_zero(atom) -> bool:
    return isinstance(atom, core.Literal) and not np.any(atom.val)
