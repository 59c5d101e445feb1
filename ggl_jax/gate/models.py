"""Federated models: their contract, their variables, and what they make of two images."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.errors import GGLError
from ggl_jax.gate.arguments import as_image_shape, check_classes
from ggl_jax.gate.trying import (
    brief,
    check_array,
    check_floats,
    check_hashable,
    check_like,
    check_repeats,
    explained,
    found_shapes,
    shapes,
)
from ggl_jax.jaxprs import walk
from ggl_jax.types import Model, Path, PyTree

_LIBRARIES = {
    "flax.linen": "gx.from_flax(module, image_shape)",
    "flax.nnx": "gx.from_nnx(module, image_shape)",
    "equinox": "gx.from_function_model (see docs/extend.md)",
    "torch": "ggl-jax attack, which reads PyTorch's updates",
}


def check_model(given: Any) -> None:
    """Refuse a federated model that does not keep :class:`ggl_jax.types.Model`'s contract."""
    if not isinstance(given, Model):
        kinds = [base.__module__ for base in getattr(type(given), "__mro__", ())]
        ways = [
            way
            for start, way in _LIBRARIES.items()
            if any(kind == start or kind.startswith(start + ".") for kind in kinds)
        ]
        way = ways[0] if ways else "gx.from_flax, gx.from_nnx or gx.from_function_model"
        raise GGLError(f"model: got {brief(given)}, allowed: a ggl_jax.Model; make it by {way}")
    check_hashable(f"model {given.name}", given)
    if not isinstance(given.head, tuple) or not all(isinstance(n, str) for n in given.head):
        raise GGLError(
            f"model: head={given.head!r}, allowed: a tuple of names in variables['params'], such "
            "as ('fc',)"
        )
    as_image_shape("model: image_shape", given.image_shape)
    check_classes("model: num_classes", given.num_classes)
    _check_shapes(given)


def one_logit(what: str) -> str:
    """What is said of a model with a single output under cross-entropy."""
    return (
        f"{what} gives 1 logit, allowed: at least 2, since the cross-entropy of one class is 0 "
        "whatever the image; give it two outputs, or loss='binary_cross_entropy'"
    )


@functools.lru_cache(maxsize=64)
def variable_shapes(model: Model) -> Any:
    """The shapes of a model's variables."""
    return shapes(f"model {model.name}: init", model.init, jax.random.key(0))


def image_shapes(model: Model, num: int = 2) -> jax.ShapeDtypeStruct:
    """The shapes of so many images."""
    return jax.ShapeDtypeStruct((num, *model.image_shape), jnp.float32)


@functools.lru_cache(maxsize=64)
def _check_shapes(model: Model) -> None:
    what, images = f"model {model.name}", image_shapes(model)
    variables = variable_shapes(model)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise GGLError(
            f"{what}: init gave {found_shapes(variables)}, allowed: a dict with an entry 'params'; "
            "wrap the parameters: {'params': ...}"
        )
    if not jax.tree.leaves(variables["params"]):
        raise GGLError(f"{what}: init gave no parameters, allowed: at least those of a last layer")
    remedy = "keep other values outside variables['params']"
    check_floats(f"{what}: init", variables["params"], remedy)
    found = shapes(f"{what}: apply", model.apply, variables, images)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise GGLError(
            f"{what}: apply gave {found_shapes(found)}, allowed: (logits[b k], features[b d]), "
            "features the last layer's input; return both, or use gx.from_function_model, which "
            "finds them"
        )
    logits, features = found
    check_logits(what, logits)
    outputs = logits.shape[1]
    if model.loss is None and outputs == 1:
        raise GGLError(one_logit(what))
    if model.loss is None and outputs != model.num_classes:
        raise GGLError(
            f"{what}: apply gave {outputs} logits, allowed: num_classes={model.num_classes} of "
            "them; mend one of the two"
        )
    if model.loss is None or "cross_entropy" in getattr(model.loss, "__name__", ""):
        last = _last_primitive(lambda v, x: model.apply(v, x)[0], variables, images)
        if last == "logistic":
            raise GGLError(_probabilities(what, "sigmoids", "sigmoid"))
    kernel, _ = trees.head_parts(variables["params"], model.head)
    check_features(what, features, kernel, outputs, model.head)
    if model.loss is not None:
        labels = jax.ShapeDtypeStruct((2,), jnp.int32)
        value = shapes(f"{what}: loss", model.loss, logits, labels)
        check_array(f"{what}: loss(logits, labels)", value, (), "one number, the batch's mean loss")
    if model.statistics is not None:
        shapes(f"{what}: statistics", model.statistics, variables, images)
    check_repeats(f"{what}: apply", model.apply, variables, images)


def check_logits(what: str, found: Any) -> None:
    """Refuse what is not the logits [2 k] of two images."""
    num = found.shape[-1] if getattr(found, "ndim", 0) == 2 else 0
    check_array(f"{what}: logits for 2 images", found, (2, num), "[2 k]")


def check_features(what: str, found: Any, kernel: Any, num_logits: int, head: Path) -> None:
    """Refuse features that cannot be the input of the last layer."""
    if getattr(found, "ndim", 0) != 2 or tuple(kernel.shape) != (found.shape[-1], num_logits):
        raise GGLError(
            f"{what}: features for 2 images are {found_shapes(found)} and the kernel at "
            f"head={head!r} has shape {tuple(kernel.shape)}, allowed: [2 d] and [d {num_logits}]; "
            "return the input of the last layer, and name that layer"
        )


def _probabilities(what: str, why: str, function: str) -> str:
    return (
        f"{what}: its outputs are probabilities already ({why}), allowed: logits; leave out the "
        f"{function}, which is part of the loss"
    )


def _last_primitive(function: Callable, *arguments: Any) -> str | None:
    """What a function's result was computed by, but for its type and shape."""
    closed = jax.make_jaxpr(function)(*arguments)

    def visit(equation, inputs):
        name = equation.primitive.name
        shaped = name in ("convert_element_type", "copy", "reshape", "squeeze", "broadcast_in_dim")
        return [inputs[0] if shaped else name] * len(equation.outvars)

    given = [None] * len(closed.jaxpr.invars)
    return walk(closed.jaxpr, [None] * len(closed.consts), given, visit, lambda value: None)[0]


def check_variables(model: Model, given: PyTree) -> None:
    """Refuse variables that are not the model's: of other names or shapes, or not finite."""
    if not isinstance(given, Mapping) or "params" not in given:
        raise GGLError(
            f"variables: got {found_shapes(given)}, allowed: a dict with an entry 'params', as "
            f"init of model {model.name} gives it; wrap the parameters: {{'params': ...}}"
        )
    wanted = variable_shapes(model)
    for name in wanted:
        if name not in given:
            raise GGLError(f"variables: has no {name!r}, allowed: {', '.join(wanted)}")
    allowed = f"as in model {model.name}; give its own variables"
    plain = {name: given[name] for name in wanted}
    check_like("variables", plain, dict(wanted), allowed, exact=False)
    trees.check_finite(plain, "variables", "give weights from before the training broke down")


def check_values(model: Model, variables: PyTree | None) -> None:
    """Refuse a model by what it makes of two images: NaN, probabilities, or always the same.

    Args:
        model: passed :func:`check_model`.
        variables: its variables; None for those of a fresh initialisation.
    """
    what = f"model {model.name}"
    with explained(f"{what}: apply"):
        if variables is None:
            variables = jax.jit(model.init)(jax.random.key(0))
        two = jax.random.uniform(jax.random.key(1), (2, *model.image_shape))
        found = jax.jit(model.apply)(variables, two)
    logits, features = (np.asarray(x, np.float32) for x in found)
    if not (np.all(np.isfinite(logits)) and np.all(np.isfinite(features))):
        raise GGLError(
            f"{what}: gave NaN or infinity for images in [0, 1], allowed: finite logits; check "
            "its weights and its preprocessing"
        )
    if logits.shape[1] > 1 and logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise GGLError(_probabilities(what, "at least 0, with sum 1", "softmax"))
    if np.array_equal(logits[0], logits[1]) and np.array_equal(features[0], features[1]):
        raise GGLError(
            f"{what}: gave the same features and logits for two different images, so its update "
            "tells nothing of either; check its weights and its apply function"
        )
