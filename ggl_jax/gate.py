"""One gate for what users bring: tried before any work, refused in one line.

Each object is tried on abstract shapes (``jax.eval_shape``) and, where values matter, on two small
ones. A refusal is a :class:`GGLError` that names the argument, what it gave, what is allowed and
the remedy. What ships with the project is tested by the tests, and not tried on values again.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ggl_jax import trees
from ggl_jax.errors import GGLError, first_line
from ggl_jax.files import digest
from ggl_jax.jaxprs import walk
from ggl_jax.types import (
    Attack,
    Candidates,
    Context,
    Defense,
    Factored,
    Info,
    Model,
    Optimizer,
    Prior,
    Problem,
    PyTree,
    View,
)

#: Most classes of a model: a larger label is an identifier, and its last layer fills the memory.
MAX_CLASSES = 2**18

#: What exceptions of JAX and Flax mean here, by the exception's (or a base class's) name.
_MEANINGS = {
    "TracerArrayConversionError": "it gives traced arrays to NumPy; write it in JAX (jax.numpy), "
    "or wrap it in jax.pure_callback",
    "TracerBoolConversionError": "it branches on values in Python; use jnp.where or jax.lax.cond",
    "TracerIntegerConversionError": "it uses a traced value as a Python integer; write it in JAX",
    "ConcretizationTypeError": "it needs values where only shapes are known; write it in JAX",
    "NonConcreteBooleanIndexError": "it selects entries by a mask; use jnp.where",
    "UnexpectedTracerError": "it keeps a traced value of an earlier call; make it a pure function",
    "InvalidRngError": "it draws random numbers (dropout?) without a key; switch that off, e.g. "
    "apply_kwargs={'train': False}, or give apply_kwargs={'rngs': {'dropout': jax.random.key(0)}}",
    "ModifyScopeVariableError": "it updates statistics of the batch; give "
    "apply_kwargs={'mutable': ['batch_stats']}, or switch to the running ones",
    "ScopeParamShapeError": "the variables have another shape than the module's",
    "ScopeParamNotFoundError": "the variables lack a parameter of the module",
    "ScopeCollectionNotFound": "the variables lack a collection of the module",
}

_NUMPY_RANDOM = (
    "it draws random numbers of NumPy or Python, which are fixed when it is compiled and then the "
    "same for every image; use jax.random with the key"
)


def reason(error: BaseException) -> str:
    """One line of what went wrong inside a user's function: its meaning, or the exception's own."""
    for kind in type(error).__mro__:
        if kind.__name__ in _MEANINGS:
            return _MEANINGS[kind.__name__]
    text = first_line(error)
    if isinstance(error, TypeError) and "valid JAX type" in text:
        return f"it returned something that is no array ({text})"
    missing = re.search(r"missing \d+ required \S+(?: \S+)? arguments?: (.*)", text)
    if isinstance(error, TypeError) and missing:
        return (
            f"it needs more arguments ({missing[1]}); fix them in a function around it, or by "
            "apply_kwargs"
        )
    return text if isinstance(error, GGLError) else f"{type(error).__name__}: {text}"


def shapes(what: str, function: Callable, *arguments: Any) -> Any:
    """The shapes of a function's result.

    Args:
        what: named in errors.
        function: a user's; pure JAX.
        *arguments: pytrees of arrays or shapes.

    Raises:
        GGLError: it is no function, fails, or returns something that is no array.
    """
    if not callable(function):
        raise GGLError(f"{what}: got {_short(function)}, allowed: a function")
    try:
        return jax.eval_shape(function, *arguments)
    except GGLError:
        raise
    except Exception as error:
        raise GGLError(f"{what}: {reason(error)}") from error


def program(function: Callable, *arguments: Any) -> tuple[str, list[Any], Any]:
    """A function's program as text, its constants, and its result's shapes."""
    # Through a fresh wrapper, since JAX keeps what it has traced.
    traced, result = jax.make_jaxpr(lambda *given: function(*given), return_shape=True)(*arguments)
    return re.sub(r" at 0x[0-9a-f]+", "", str(traced)), list(_constants(traced)), result


def _constants(traced: Any) -> Iterator[Any]:
    """The arrays that a traced program holds, those of its inner programs as well."""
    if isinstance(traced, ClosedJaxpr):
        yield from traced.consts
        traced = traced.jaxpr
    if isinstance(traced, Jaxpr):
        for equation in traced.eqns:
            for variable in equation.invars:
                if isinstance(variable, Literal):
                    yield np.asarray(variable.val)
            for value in equation.params.values():
                yield from _constants(value)
    elif isinstance(traced, list | tuple):
        for one in traced:
            yield from _constants(one)
    elif isinstance(traced, np.ndarray | jax.Array):
        yield traced


def _repeats(what: str, function: Callable, *arguments: Any) -> None:
    """Refuse a function whose program is another one each time that it is traced."""
    try:
        first, second = (digest(*program(function, *arguments)[:2]) for _ in range(2))
    except Exception as error:
        raise GGLError(f"{what}: {reason(error)}") from error
    if first != second:
        raise GGLError(f"{what}: {_NUMPY_RANDOM}")


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None and not callable(shape):
        return f"{type(value).__name__} {tuple(shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _show(tree: Any) -> str:
    """A result's shapes, in few words."""
    if tree is None:
        return "None"
    if hasattr(tree, "shape"):
        return f"an array {tuple(tree.shape)}"
    leaves = jax.tree.leaves(tree)
    return f"a {type(tree).__name__} of {len(leaves)} array{'s' * (len(leaves) != 1)}"


def _array(what: str, found: Any, shape: tuple, allowed: str) -> None:
    """Refuse what is no float array of a shape."""
    if not hasattr(found, "shape") or tuple(found.shape) != shape:
        raise GGLError(f"{what}: gave {_show(found)}, allowed: {allowed}")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise GGLError(f"{what}: gave {found.dtype}, allowed: floats; cast them")


def _like(what: str, found: Any, wanted: Any, allowed: str, *, exact: bool = True) -> None:
    """Refuse a tree of other names or shapes than the wanted one's, or, if exact, other nodes."""
    names, known = (
        dict(zip(trees.names(tree), jax.tree.leaves(tree), strict=True)) for tree in (found, wanted)
    )
    for name in [*(n for n in known if n not in names), *(n for n in names if n not in known)]:
        there = "has no" if name in known else "has an unknown"
        raise GGLError(f"{what}: {there} {name or 'array'}, allowed: {allowed}")
    for name, leaf in known.items():
        if jnp.shape(names[name]) != jnp.shape(leaf):
            raise GGLError(
                f"{what}: {name} has shape {jnp.shape(names[name])}, allowed: {jnp.shape(leaf)}, "
                f"{allowed}"
            )
    structures: list[Any] = [jax.tree.structure(tree) for tree in (found, wanted)]
    if exact and structures[0] != structures[1]:
        raise GGLError(
            f"{what}: is arranged otherwise ({_short(structures[0])}), allowed: {allowed}"
        )


def image_shape(what: str, given: Any) -> tuple[int, int, int]:
    """``(h, w, c)``, three positive whole numbers."""
    try:
        shape = tuple(given)
    except TypeError:
        shape = ()
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in shape)
    if len(shape) != 3 or not whole or min(shape) < 1:
        raise GGLError(
            f"{what}={given!r}: give (height, width, channels), three positive integers, e.g. "
            "(32, 32, 3)"
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def count_of_classes(what: str, given: Any, least: int = 2) -> None:
    """A number of classes, from ``least`` to :data:`MAX_CLASSES`."""
    whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if not whole or given < least:
        raise GGLError(f"{what}={given!r}: give an integer of at least {least}")
    if given > MAX_CLASSES:
        raise GGLError(
            f"{what}={given!r}: give an integer of at most {MAX_CLASSES:,}; labels count from 0, "
            "so number the classes if they are identifiers"
        )


def _hashable(what: str, given: Any) -> None:
    try:
        hash(given)
    except TypeError as error:
        raise GGLError(
            f"{what}: holds something that cannot be hashed ({first_line(error)}); use tuples for "
            "lists, and functions that hold arrays by a closure or functools.partial"
        ) from error


def options(name: str, given: Any, kind: type) -> Any:
    """Options of a kind; None for its defaults.

    Raises:
        GGLError: they are of another kind.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        way = f"; gx.search_of({given!r}) makes one" if isinstance(given, str) else ""
        raise GGLError(f"{name}: got {_short(given)}, allowed: gx.{kind.__name__}(...){way}")
    return given


# --------------------------------------------------------------------------------------------------
# Images and labels
# --------------------------------------------------------------------------------------------------


def images(given: Any) -> np.ndarray:
    """Private images as a float32 array.

    Raises:
        GGLError: they are no array of numbers.
    """
    try:
        return np.asarray(given, np.float32)
    except Exception as error:
        raise GGLError(
            f"images: got {_short(given)}, which is no array of numbers ({first_line(error)}); "
            "give floats in [0, 1] of shape (n, h, w, c)"
        ) from error


def suspects(given: Any, model: Model) -> np.ndarray:
    """Other images [m h w c] as an array, once they fit the model."""
    try:
        found = np.asarray(given, np.float32)
    except Exception as error:
        raise GGLError(f"others: got {_short(given)}, which is no array of numbers") from error
    if found.ndim != 4 or not len(found) or found.shape[1:] != model.image_shape:
        raise GGLError(
            f"others: got shape {found.shape}, allowed: (m, *{model.image_shape}), at least one "
            "image; None for no test"
        )
    return found


def labels(given: Any) -> np.ndarray:
    """Labels as an array, whatever is in it.

    Raises:
        GGLError: they are no array.
    """
    try:
        return np.asarray(given)
    except Exception as error:
        raise GGLError(
            f"labels: got {_short(given)}, which is no array ({first_line(error)}); give one "
            "integer for each image"
        ) from error


def data(model: Model, images: np.ndarray, labels: np.ndarray) -> None:
    """Refuse images [n h w c] or labels [n] that do not fit the model."""
    if images.ndim and not len(images):
        raise GGLError("images: got none; give at least one")
    if images.ndim != 4 or images.shape[1:] != model.image_shape:
        raise GGLError(
            f"images: got shape {images.shape}, allowed: (n, *{model.image_shape}), as model "
            f"{model.name!r} takes them"
        )
    if not np.all(np.isfinite(images)) or images.min() < 0.0 or images.max() > 1.0:
        raise GGLError("images: values must be finite and lie in [0, 1]; divide uint8 by 255")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise GGLError(
            f"labels: got {labels.dtype} {labels.shape}, allowed: integers ({len(images)},), one "
            "per image; number classes that have names"
        )
    if labels.min() < 0 or labels.max() >= model.num_classes:
        raise GGLError(
            f"labels: got {labels.min()} to {labels.max()}, allowed: 0 to {model.num_classes - 1}; "
            "raise the model's number of classes"
        )


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------

_LIBRARIES = {
    "flax.linen": "gx.from_flax(module, image_shape)",
    "flax.nnx": "gx.from_nnx(module, image_shape)",
    "equinox": "gx.from_function_model (see docs/extend.md)",
    "torch": "ggl-jax attack, which reads PyTorch's updates",
}


def model(given: Any) -> None:
    """Refuse a federated model that does not keep :class:`ggl_jax.types.Model`'s contract."""
    if not isinstance(given, Model):
        kinds = [base.__module__ for base in getattr(type(given), "__mro__", ())]
        ways = [
            way
            for start, way in _LIBRARIES.items()
            if any(kind == start or kind.startswith(start + ".") for kind in kinds)
        ]
        way = ways[0] if ways else "gx.from_flax, gx.from_nnx or gx.from_function_model"
        raise GGLError(f"model: got {_short(given)}, allowed: a ggl_jax.Model; make it by {way}")
    if not isinstance(given.head, tuple) or not all(isinstance(n, str) for n in given.head):
        raise GGLError(
            f"model: head={given.head!r}, allowed: a tuple of names in variables['params'], such "
            "as ('fc',)"
        )
    if not isinstance(given.image_shape, tuple):
        raise GGLError(f"model: image_shape={given.image_shape!r}, allowed: a tuple (h, w, c)")
    image_shape("model: image_shape", given.image_shape)
    if given.loss is None and given.num_classes == 1:
        raise GGLError(one_logit(f"model: {given.name}"))
    count_of_classes("model: num_classes", given.num_classes)
    _hashable(f"model {given.name}", given)
    _model_shapes(given)


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


def _batch(model: Model, num: int = 2) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num, *model.image_shape), jnp.float32)


_LABELS = jax.ShapeDtypeStruct((2,), jnp.int32)


@functools.lru_cache(maxsize=64)
def _model_shapes(model: Model) -> None:
    what = f"model {model.name}"
    variables = variable_shapes(model)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise GGLError(
            f"{what}: init gave {_show(variables)}, allowed: a dict with an entry 'params'; "
            "wrap the parameters: {'params': ...}"
        )
    if not jax.tree.leaves(variables["params"]):
        raise GGLError(f"{what}: init gave no parameters, allowed: at least those of a last layer")
    for name, leaf in zip(
        trees.names(variables["params"]), jax.tree.leaves(variables["params"]), strict=True
    ):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise GGLError(
                f"{what}: its parameter {name} is {leaf.dtype}, allowed: floats; keep other values "
                "outside variables['params']"
            )
    found = shapes(f"{what}: apply", model.apply, variables, _batch(model))
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise GGLError(
            f"{what}: apply gave {_show(found)}, allowed: (logits[b k], features[b d]), features "
            "the last layer's input; return both, or use gx.from_function_model, which finds them"
        )
    logits, features = found
    if getattr(logits, "ndim", 0) != 2 or logits.shape[0] != 2:
        raise GGLError(f"{what}: apply gave logits of {_show(logits)} for 2 images, allowed: [2 k]")
    outputs = logits.shape[1]
    _array(f"{what}: logits", logits, (2, outputs), "[2 k]")
    if model.loss is None and outputs == 1:
        raise GGLError(one_logit(what))
    if model.loss is None and outputs != model.num_classes:
        raise GGLError(
            f"{what}: apply gave {outputs} logits, allowed: num_classes={model.num_classes} of "
            "them; mend one of the two"
        )
    if model.loss is None or "cross_entropy" in getattr(model.loss, "__name__", ""):
        last = _last_primitive(lambda v, x: model.apply(v, x)[0], variables, _batch(model))
        if last == "logistic":
            raise GGLError(
                f"{what}: its outputs are probabilities already (sigmoids), allowed: logits; leave "
                "out the sigmoid, which is part of the loss"
            )
    kernel, _ = trees.head_parts(variables["params"], model.head)
    if getattr(features, "ndim", 0) != 2 or kernel.shape != (features.shape[-1], outputs):
        raise GGLError(
            f"{what}: apply gave features of {_show(features)} for 2 images and the kernel at "
            f"head={model.head!r} has shape {tuple(kernel.shape)}, allowed: [2 d] and "
            f"[d {outputs}]; return the input of the last layer, and name that layer"
        )
    if model.loss is not None:
        value = shapes(f"{what}: loss", model.loss, logits, _LABELS)
        _array(f"{what}: loss(logits, labels)", value, (), "one number, the batch's mean loss")
    if model.statistics is not None:
        shapes(f"{what}: statistics", model.statistics, variables, _batch(model))
    _repeats(f"{what}: apply", model.apply, variables, _batch(model))


def _last_primitive(function: Callable, *arguments: Any) -> str | None:
    """What a function's result was computed by, but for its type and shape."""
    closed = jax.make_jaxpr(function)(*arguments)

    def visit(equation, inputs):
        name = equation.primitive.name
        shaped = name in ("convert_element_type", "copy", "reshape", "squeeze", "broadcast_in_dim")
        return [inputs[0] if shaped else name] * len(equation.outvars)

    given = [None] * len(closed.jaxpr.invars)
    return walk(closed.jaxpr, [None] * len(closed.consts), given, visit, lambda value: None)[0]


@functools.lru_cache(maxsize=64)
def initialise(model: Model) -> Callable:
    """A model's ``init``, compiled once."""
    return jax.jit(model.init)


def variables(model: Model, given: PyTree) -> None:
    """Refuse variables that are not the model's: of other names or shapes, or not finite."""
    if not isinstance(given, Mapping) or "params" not in given:
        raise GGLError(
            f"variables: got {_show(given)}, allowed: a dict with an entry 'params', as "
            f"init of model {model.name} gives it; wrap the parameters: {{'params': ...}}"
        )
    wanted = variable_shapes(model)
    for name in wanted:
        if name not in given:
            raise GGLError(f"variables: has no {name!r}, allowed: {', '.join(wanted)}")
    allowed = f"as in model {model.name}; give its own variables"
    plain = {name: given[name] for name in wanted}
    _like("variables", plain, dict(wanted), allowed, exact=False)
    for name, leaf in zip(trees.names(plain), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not bool(
            jnp.all(jnp.isfinite(leaf))
        ):
            raise GGLError(
                f"variables: {name} holds NaN or infinity, allowed: finite numbers; give weights "
                "from before the training broke down"
            )


def model_values(model: Model, variables: PyTree | None) -> None:
    """Refuse a model by what it makes of two images: NaN, probabilities, or always the same.

    Args:
        model: passed :func:`model`.
        variables: its variables; None for those of a fresh initialisation.
    """
    if variables is None:
        _fresh_values(model)
    else:
        _model_values(model, variables)


@functools.lru_cache(maxsize=64)
def _fresh_values(model: Model) -> None:
    _model_values(model, initialise(model)(jax.random.key(0)))


def _model_values(model: Model, variables: PyTree) -> None:
    what = f"model {model.name}"
    two = jax.random.uniform(jax.random.key(1), (2, *model.image_shape))
    with _explained(f"{what}: apply"):
        logits, features = (np.asarray(x, np.float32) for x in _applied(model)(variables, two))
    if not (np.all(np.isfinite(logits)) and np.all(np.isfinite(features))):
        raise GGLError(
            f"{what}: gave NaN or infinity for images in [0, 1], allowed: finite logits; check "
            "its weights and its preprocessing"
        )
    if logits.shape[1] > 1 and logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise GGLError(
            f"{what}: its outputs are probabilities already (at least 0, with sum 1), allowed: "
            "logits; leave out the softmax, which is part of the loss"
        )
    if np.array_equal(logits[0], logits[1]) and np.array_equal(features[0], features[1]):
        raise GGLError(
            f"{what}: gave the same features and logits for two different images, so its update "
            "tells nothing of either; check its weights and its apply function"
        )


@functools.lru_cache(maxsize=64)
def _applied(model: Model) -> Callable:
    return jax.jit(model.apply)


class _explained:
    """Turns what a user's function raises into one line."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, GGLError):
            raise GGLError(f"{self.what}: {reason(error)}") from error


# --------------------------------------------------------------------------------------------------
# Priors
# --------------------------------------------------------------------------------------------------


def prior(given: Any, params: PyTree, model: Model) -> None:
    """Refuse a generator that is none, or whose images do not fit the model."""
    if not isinstance(given, Prior):
        raise GGLError(
            f"prior: got {_short(given)}, allowed: a name, a checkpoint's folder, or a "
            "ggl_jax.Prior"
        )
    what = f"prior {given.name}"
    if tuple(given.image_shape) != model.image_shape:
        raise GGLError(
            f"prior: {given.name!r} makes images of shape {given.image_shape}, but model "
            f"{model.name!r} takes {model.image_shape}; choose a prior of that size, or attack "
            f"pixels, which needs none: prior=ggl_jax.pixels({model.image_shape})"
        )
    if isinstance(given.latent_dim, bool) or not isinstance(given.latent_dim, int | np.integer):
        raise GGLError(f"{what}: latent_dim={given.latent_dim!r}, allowed: whole numbers >= 1")
    if not isinstance(given.image_shape, tuple):
        raise GGLError(f"{what}: image_shape={given.image_shape!r}, allowed: a tuple (h, w, c)")
    _hashable(what, given)
    wanted = shapes(f"{what}: init", given.init, jax.random.key(0))
    if params is None and jax.tree.leaves(wanted):
        raise GGLError(
            f"prior_params: got None, allowed: the parameters of {given.name} "
            f"({len(jax.tree.leaves(wanted))} arrays, as its init gives them); give "
            "prior_params=..., or a checkpoint's folder as prior"
        )
    key, latent = jax.random.key(0), (3, given.latent_dim)
    drawn = shapes(f"{what}: sample_latent", lambda key: given.sample_latent(key, 3), key)
    _array(f"{what}: sample_latent(key, 3)", drawn, latent, f"[3 latent_dim], {list(latent)}")
    labels = jax.ShapeDtypeStruct((3,), jnp.int32)
    latents = jax.ShapeDtypeStruct(latent, drawn.dtype)
    try:
        found = shapes(f"{what}: apply", given.apply, params, latents, labels)
    except GGLError as error:
        allowed = f"as the init of {given.name} gives them"
        _like("prior_params", params, wanted, allowed, exact=False)
        raise error
    size = (3, *given.image_shape)
    _array(f"{what}: apply", found, size, f"images {list(size)} for 3 latents")
    if not _ships(given.apply, "ggl_jax.priors"):
        _repeats(f"{what}: apply", given.apply, params, latents, labels)
        _prior_values(given, params)


def _prior_values(given: Prior, params: PyTree) -> None:
    what = f"prior {given.name}"
    with _explained(what):
        latents = given.sample_latent(jax.random.key(0), 4)
        again = given.sample_latent(jax.random.key(0), 4)
        other = given.sample_latent(jax.random.key(1), 4)
        made = np.asarray(given.apply(params, latents, jnp.zeros((4,), jnp.int32)))
    if not np.array_equal(latents, again):
        raise GGLError(f"{what}: sample_latent gave two results for one key; use jax.random")
    if np.array_equal(latents, other) or np.array_equal(latents[0], latents[1]):
        raise GGLError(
            f"{what}: sample_latent gave the same latents twice, allowed: other ones for each key; "
            "use jax.random with the key"
        )
    if not np.all(np.isfinite(made)):
        raise GGLError(f"{what}: made NaN or infinity, allowed: [0, 1]; check prior_params")
    low, high = float(made.min()), float(made.max())
    if low < -1e-3 or high > 1 + 1e-3:
        remedy = "divide them by 255" if high > 2 else "of a tanh output return (x + 1) / 2"
        raise GGLError(
            f"{what}: made images from {low:.3g} to {high:.3g}, allowed: [0, 1]; {remedy}"
        )
    if np.array_equal(made[0], made[1]):
        raise GGLError(
            f"{what}: made the same image of two latents, so there is nothing to search; use the "
            "latents, and check prior_params"
        )


def _ships(function: Callable, home: str) -> bool:
    """Whether a function was written in one of a package's modules (not in the package itself)."""
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").startswith(home + ".")


# --------------------------------------------------------------------------------------------------
# Defenses
# --------------------------------------------------------------------------------------------------


def defense(given: Any, model: Model) -> None:
    """Refuse a defense that does not keep :class:`ggl_jax.types.Defense`'s contract."""
    if not isinstance(given, Defense):
        way = "gx.from_function(fn, name=...)" if callable(given) else "a specification's text"
        raise GGLError(
            f"defenses: got {_short(given)}, allowed: text such as 'clip:4', a ggl_jax.Defense, or "
            f"an optax transformation; make it by {way}"
        )
    if not isinstance(given.name, str) or not given.name:
        raise GGLError(f"defenses: name={given.name!r}, allowed: text that is not empty")
    if not isinstance(given.view, View):
        raise GGLError(
            f"defense {given.name}: view={_short(given.view)}, allowed: a ggl_jax.View; "
            "gx.from_function makes one"
        )
    _hashable(f"defense {given.name}", given)
    for one in given.facts.stages or (given,):
        if not _ships(one.apply, "ggl_jax.client.defenses"):
            _defense(one, model)


@functools.lru_cache(maxsize=64)
def _defense(given: Defense, model: Model) -> None:
    what = f"defense {given.name}"
    known = variable_shapes(model)
    update = known["params"]
    one, label = _batch(model, 1), jax.ShapeDtypeStruct((1,), jnp.int32)

    def apply(key, update, variables, images, labels):
        return given.apply(key, update, Context(model, variables, images, labels))

    key = jax.random.key(0)
    found = shapes(what, apply, key, update, known, one, label)
    if not isinstance(found, tuple) or len(found) != 2:
        raise GGLError(f"{what}: apply gave {_show(found)}, allowed: (update, record)")
    shared, record = found
    _tables(f"{what}: its record", record)
    _like(f"{what}: the update that it gave", shared, update, "an update like the one it is given")
    for name, leaf in zip(trees.names(shared), jax.tree.leaves(shared), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise GGLError(f"{what}: gave {name} as {leaf.dtype}, allowed: floats; cast it back")
    _view(what, given.view, model, update, known)
    _repeats(what, apply, key, update, known, one, label)
    _defense_values(given, model, apply)


def _tables(what: str, found: Any) -> None:
    """Refuse what is neither a dict of arrays nor a tuple of such."""
    parts = found if isinstance(found, tuple) else (found,)
    if not all(isinstance(part, Mapping | tuple) for part in parts):
        raise GGLError(f"{what}: {_show(found)}, allowed: a dict of arrays, such as {{}}")


def _view(what: str, view: View, model: Model, update: PyTree, known: PyTree) -> None:
    estimated = shapes(
        f"{what}: estimate", lambda update: view.estimate(update, model.head, noise=0.0), update
    )
    _tables(f"{what}: estimate gave", estimated)
    simulated = shapes(f"{what}: simulate", view.simulate, estimated, update)
    _like(f"{what}: simulate's result", simulated, update, "an update like the one it is given")
    if view.on_support is not None:
        _view(f"{what}: on_support", view.on_support, model, update, known)
    if view.noise_std is not None:
        level = shapes(f"{what}: noise_std", view.noise_std, estimated)
        if jnp.shape(level) != ():
            raise GGLError(f"{what}: noise_std gave {_show(level)}, allowed: one number")
    rewire = view.rewire
    if rewire is not None:
        rewired = shapes(f"{what}: rewire", lambda e, v: rewire(e, v, model.head), estimated, known)
        _like(f"{what}: rewire's result", rewired, known, "variables like the model's")
    factor = view.factor
    if factor is not None:
        with _explained(f"{what}: factor"):
            kinds: list[Any] = []
            jax.eval_shape(lambda e: kinds.append(factor(e)), estimated)
        if not (kinds[0] is None or isinstance(kinds[0], Factored)):
            raise GGLError(f"{what}: factor gave {_show(kinds[0])}, allowed: ggl_jax.Factored")


def _defense_values(given: Defense, model: Model, apply: Callable) -> None:
    """What it makes of two updates, and of two keys."""
    what = f"defense {given.name}"
    weights = initialise(model)(jax.random.key(0))
    label = jnp.zeros((1,), jnp.int32)
    run = jax.jit(lambda *arguments: apply(*arguments)[0])

    def updates(number):
        # Of many orders of magnitude, since defenses round, clip and cut off at their own.
        rng = np.random.default_rng(number)
        leaves, treedef = jax.tree.flatten(weights["params"])
        sizes = [10 ** rng.uniform(-4, 2, x.shape) * rng.choice([-1, 1], x.shape) for x in leaves]
        cast = [size.astype(x.dtype) for size, x in zip(sizes, leaves, strict=True)]
        return jax.tree.unflatten(treedef, cast)

    def shared(key, number):
        image = jax.random.uniform(jax.random.key(number), (1, *model.image_shape))
        found = run(jax.random.key(key), updates(number), weights, image, label)
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(found)]

    def same(a, b):
        return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))

    with _explained(what):
        first, again, other_key, other = shared(0, 0), shared(0, 0), shared(1, 0), shared(0, 1)
    if any(np.isnan(leaf).any() for leaf in first):
        return  # a finding about these values: its cells will fail, and say so
    if not same(first, again):
        raise GGLError(f"{what}: gave two results for one key; use jax.random with the key")
    if not any(leaf.any() for leaf in first):
        raise GGLError(
            f"{what}: gave an update of zero for one that is not, so there is nothing to audit; "
            "allowed: an update that depends on the client's (one that accumulates over several "
            "rounds cannot be shown by one)"
        )
    if same(first, other):
        raise GGLError(
            f"{what}: gave the same update for two different ones, so there is nothing to audit; "
            "allowed: an update that depends on the client's"
        )
    if given.view.adds_noise and same(first, other_key):
        raise GGLError(
            f"{what}: is said to add noise, which was the same for two keys; use jax.random with "
            "the key"
        )


# --------------------------------------------------------------------------------------------------
# Searches and metrics
# --------------------------------------------------------------------------------------------------


def _info(what: str, info: Any, restarts: int) -> None:
    if not isinstance(info, Info):
        raise GGLError(f"{what}: step gave {_show(info)} beside its state, allowed: ggl_jax.Info")
    num = info.latents.shape[0] if getattr(info.latents, "ndim", 0) == 2 else 0
    if not num or num % restarts:
        raise GGLError(
            f"{what}: step gave latents of {_show(info.latents)}, allowed: [n z], as many for each "
            f"of the {restarts} restarts"
        )
    _array(f"{what}: the losses of a step", info.losses, (num,), f"[{num}], one a candidate")
    for name in ("evaluations", "status"):
        if jnp.shape(getattr(info, name)) != ():
            raise GGLError(f"{what}: {name} is {_show(getattr(info, name))}, allowed: one integer")


def _steps(what: str, name: str, value: Any) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < 0:
        raise GGLError(f"{what}: {name} is {value!r}, allowed: whole numbers")


def optimizer(given: Any, name: str) -> None:
    """Refuse an optimiser that does not keep :class:`ggl_jax.types.Optimizer`'s contract."""
    what = f"optimizer {name}"
    if not isinstance(given, Optimizer):
        raise GGLError(f"{what}: its factory gave {_short(given)}, allowed: a ggl_jax.Optimizer")
    restarts, key = 2, jax.random.key(0)
    start = jax.ShapeDtypeStruct((restarts, 3), jnp.float32)
    state = shapes(f"{what}: init", given.init, key, start)

    def step(key, state):
        return given.step(key, state, lambda latents: jnp.sum(latents**2, axis=-1))

    found = shapes(f"{what}: step", step, key, state)
    if not isinstance(found, tuple) or len(found) != 2:
        raise GGLError(f"{what}: step gave {_show(found)}, allowed: (state, ggl_jax.Info)")
    _like(f"{what}: the state after a step", found[0], state, "a state like the one before")
    _info(what, found[1], restarts)
    with _explained(f"{what}: evaluations_per_step"):
        evaluations = given.evaluations_per_step(restarts)
    _steps(what, "evaluations_per_step(2)", evaluations)
    _repeats(what, step, key, state)


def attack(given: Any, name: str, model: Model, params: PyTree, view: View, size: int) -> None:
    """Refuse an attack of the user's that does not keep :class:`ggl_jax.types.Attack`'s contract.

    Args:
        given: what its builder gave.
        name: its name in the registry.
        model: the model.
        params: the prior's parameters.
        view: of the defense.
        size: images of an update.
    """
    what = f"attack {name}"
    if not isinstance(given, Attack):
        raise GGLError(f"{what}: its builder gave {_short(given)}, allowed: a ggl_jax.Attack")
    key, problem = jax.random.key(0), problem_shapes(model, params, view, size)
    state = shapes(f"{what}: init", given.init, key, problem)
    found = shapes(f"{what}: step", given.step, key, problem, state)
    if not isinstance(found, tuple) or len(found) != 2:
        raise GGLError(f"{what}: step gave {_show(found)}, allowed: (state, ggl_jax.Info)")
    _like(f"{what}: the state after a step", found[0], state, "a state like the one before")
    best = shapes(f"{what}: candidates", given.candidates, problem, state)
    if not isinstance(best, Candidates):
        raise GGLError(f"{what}: candidates gave {_show(best)}, allowed: ggl_jax.types.Candidates")
    restarts = best.points.shape[0] if getattr(best.points, "ndim", 0) == 2 else 0
    images = (restarts, size, *model.image_shape)
    if not restarts:
        raise GGLError(f"{what}: points are {_show(best.points)}, allowed: [r p]")
    _array(f"{what}: the images of its candidates", best.images, images, f"{list(images)}")
    for part in ("losses", "distances"):
        _array(f"{what}: {part}", getattr(best, part), (restarts,), f"[{restarts}]")
    if jnp.shape(best.labels) != (restarts, size):
        raise GGLError(f"{what}: labels are {_show(best.labels)}, allowed: [{restarts} {size}]")
    _steps(what, "evaluations_per_step", given.evaluations_per_step)
    _steps(what, "evaluations_at_start", given.evaluations_at_start)


def problem_shapes(model: Model, params: PyTree, view: View, size: int) -> Problem:
    """The shapes of what an attack on an update of ``size`` images works on."""
    variables = variable_shapes(model)
    update = variables["params"]
    estimated = jax.eval_shape(functools.partial(view.estimate, head=model.head), update)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    labels: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    return Problem(update, variables, params, labels, estimated)


def metric(function: Any, name: str, model: Model, variables: PyTree | None) -> None:
    """Refuse a metric that gives anything but a number for two images."""
    what = f"metric {name}"
    if not callable(function):
        raise GGLError(f"{what}: got {_short(function)}, allowed: a function")
    if variables is None:
        variables = initialise(model)(jax.random.key(0))
    one, two = jax.random.uniform(jax.random.key(0), (2, *model.image_shape))
    with _explained(what):
        found = function(one, two, model, variables)
    try:
        number = np.asarray(found)
        fits = number.shape == () and np.issubdtype(number.dtype, np.number)
        fits &= not np.iscomplexobj(number)
    except Exception:
        fits = False
    if not fits:
        raise GGLError(
            f"{what}: gave {_short(found)} for two images [h w c], allowed: one real number; take "
            "the mean over axes (-3, -2, -1)"
        )
