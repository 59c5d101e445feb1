"""Models that are functions of their parameters: plain JAX, Equinox, Flax NNX."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from ggl_jax import trees
from ggl_jax.client.gradients import loss_named
from ggl_jax.client.models import check_images, count_classes
from ggl_jax.errors import GGLError
from ggl_jax.gate.arguments import as_image_shape
from ggl_jax.gate.trying import shapes
from ggl_jax.images import to_signed
from ggl_jax.jaxprs import evaluate, walk
from ggl_jax.types import Model, Path, PyTree


class _Param(NamedTuple):
    """A value that is a parameter, but for its type, its shape (of vectors), or a transposition."""

    leaf: int
    transposed: bool


class _Dense(NamedTuple):
    """A value that is what a matrix product with a parameter gave, but for a bias and its layout.

    Attributes:
        features: [b d], the product's other operand.
        leaf: the kernel's index among the parameters.
        transposed: whether it is stored as [k d].
        bias: index of the vector that was added, or None.
    """

    features: jax.Array
    leaf: int
    transposed: bool
    bias: int | None


class _Value(NamedTuple):
    array: Any
    origin: _Param | _Dense | None = None


#: Primitives that hand a value on, but for its type or shape.
_SAME = ("convert_element_type", "copy", "copy_p")
_SHAPED = ("reshape", "squeeze", "broadcast_in_dim", "expand_dims")


def _origin(eqn, inputs: list[_Value], num_images: int) -> _Param | _Dense | None:
    name, first = eqn.primitive.name, inputs[0].origin if inputs else None
    if name in _SAME:
        return first
    if name in _SHAPED:
        keeps = isinstance(first, _Dense) or (first is not None and inputs[0].array.ndim == 1)
        return first if keeps else None
    if name == "transpose":
        if isinstance(first, _Param):
            flips = tuple(eqn.params["permutation"]) == (1, 0)
            return first._replace(transposed=first.transposed != flips)
        return first
    if name in ("add", "add_any") and len(inputs) == 2:
        for one, other in (inputs, inputs[::-1]):
            if isinstance(one.origin, _Dense) and isinstance(other.origin, _Param):
                return one.origin._replace(bias=other.origin.leaf)
    if name == "dot_general":
        (left, right), (batch, _) = eqn.params["dimension_numbers"]
        for kernel, other, axis, rest in (
            (inputs[0], inputs[1], left, right),
            (inputs[1], inputs[0], right, left),
        ):
            own = kernel.origin
            if not isinstance(own, _Param) or other.origin is not None or batch:
                continue
            if kernel.array.ndim != 2 or len(axis) != 1:
                continue
            features = jnp.moveaxis(other.array, rest[0], -1)
            if features.size == num_images * features.shape[-1]:
                features = features.reshape(num_images, -1)
                return _Dense(features, own.leaf, (axis[0] == 1) != own.transposed, None)
    return None


def _followed(function: Callable, leaves: list, images: jax.Array) -> tuple[_Value, list[_Dense]]:
    """A function's first output, with its origin, and all products with parameters in it."""
    closed = jax.make_jaxpr(function)(leaves, images)
    seen: list[_Dense] = []

    def visit(eqn, inputs):
        outputs = evaluate(eqn, [value.array for value in inputs])
        origin = _origin(eqn, inputs, len(images)) if len(outputs) == 1 else None
        if isinstance(origin, _Dense):
            seen.append(origin)
        return [_Value(out, origin) for out in outputs]

    arguments = [_Value(leaf, _Param(i, False)) for i, leaf in enumerate(leaves)]
    consts = [_Value(const) for const in closed.consts]
    found = walk(closed.jaxpr, consts, [*arguments, _Value(images)], visit, _Value)
    return found[0], seen


def _head_places(
    paths: list[Path], kernel: int, bias: int | None, transposed: bool
) -> tuple[list[Path], Path]:
    """Where each parameter goes, so that the last layer's are "kernel" and "bias"; and its path."""
    layer = paths[kernel][:-1]
    others = [p for i, p in enumerate(paths) if i not in (kernel, bias)]
    taken = any(p[: len(layer) + 1] in ((*layer, "kernel"), (*layer, "bias")) for p in others)
    if not layer or taken or (bias is not None and paths[bias][:-1] != layer):
        name = "head"
        while any(p[0] == name for p in others):
            name += "_"
        layer = (name,)
    places = list(paths)
    places[kernel] = (*layer, "kernel")
    if bias is not None:
        places[bias] = (*layer, "bias")
    return places, layer


def _find_kernel(head: Any, paths: list[Path], leaves: list) -> int:
    """The index of the matrix that ``head`` names: its own path, or that of its layer."""
    wanted = tuple(head.split("/")) if isinstance(head, str) else tuple(str(n) for n in head)
    matrices = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf) == 2]
    own = [i for i in matrices if paths[i] == wanted or paths[i][:-1] == wanted]
    if len(own) != 1:
        known = ", ".join("/".join(paths[i]) for i in matrices) or "none"
        raise GGLError(
            f"from_function_model: head={head!r} names {len(own)} matrices among the parameters, "
            f"allowed: one of {known}"
        )
    return own[0]


def from_function_model(
    apply: Callable,
    params: PyTree,
    image_shape: Sequence[int],
    num_classes: int | None = None,
    head: Sequence[str] | str | None = None,
    *,
    state: PyTree = None,
    preprocess: Callable = to_signed,
    loss: str | Callable | None = None,
    init: Callable | None = None,
    name: str | None = None,
) -> Model:
    """Make a :class:`~ggl_jax.types.Model` of a function of parameters and images.

    The function is traced, and its last matrix product with a parameter found: the one that, but
    for a bias, gives the logits. Its input becomes ``features``. The parameters become nested
    dicts by the names of their paths, with that layer's as ``kernel`` [d k] and ``bias``.

    Args:
        apply: ``apply(params, images[b h w c]) -> logits[b k]`` (with ``state``:
            ``apply(params, state, images)``), or ``-> (logits, features[b d])`` where the last
            layer cannot be found; pure JAX. Of Equinox:
            ``params, static = eqx.partition(model, eqx.is_inexact_array)`` and
            ``lambda p, x: jax.vmap(eqx.combine(p, static))(x)``. Fix further inputs here, and
            choose one of several outputs.
        params: a pytree of float arrays: what the client shares updates of.
        image_shape: ``(h, w, c)``.
        num_classes: None for the number of outputs, and at least 2.
        head: path of the last layer, or of its matrix, inside ``params``, as names or text
            ("layers/2/weight"); needed where the logits are not the output of a matrix product
            (scaled or masked after it), or features are given.
        state: other arrays that ``apply`` needs, such as running statistics.
        preprocess: maps public images in [0, 1] to what the function expects; the default gives
            [-1, 1].
        loss: as for :func:`ggl_jax.from_flax`.
        init: ``init(key) -> params``; None: every seed has ``params``.
        name: shown in results; the function's own when None.

    Returns:
        A ``Model``. Its ``statistics`` is None: what enters BatchNorm layers is not found.

    Raises:
        GGLError: parameters that are no float arrays, a last layer that cannot be found, or an
            output that is not [b k].

    >>> params = {"w": jnp.ones((192, 10)), "b": jnp.zeros(10)}
    >>> model = from_function_model(
    ...     lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"], params, (8, 8, 3)
    ... )
    >>> model.head, model.num_classes
    (('head',), 10)
    """
    what = "from_function_model"
    shape = as_image_shape("image_shape", image_shape)
    loss = loss_named(loss)
    if not callable(apply):
        raise GGLError(f"{what}: apply is {type(apply).__name__}, allowed: apply(params, images)")
    name = name or getattr(apply, "__name__", type(apply).__name__).strip("<>")
    paths, leaves = _parameters(what, params)
    treedef: Any = jax.tree.structure(params)

    def called(leaves, state, images):
        own = jax.tree.unflatten(treedef, leaves)
        return apply(own, images) if state is None else apply(own, state, images)

    two = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    two = shapes(f"{what}: preprocess", preprocess, two)
    found = shapes(f"{what}: {name}", called, leaves, state, two)
    explicit = isinstance(found, tuple | list)
    outputs = found[0] if explicit else found
    if getattr(outputs, "ndim", 0) != 2 or outputs.shape[0] != 2 or (explicit and len(found) != 2):
        seen = [tuple(leaf.shape) for leaf in jax.tree.leaves(found)]
        raise GGLError(
            f"{what}: {name} gave {seen} for 2 images, allowed: logits [2 k], or a pair of those "
            "and the features [2 d]; of several outputs, return one"
        )
    if explicit and head is None:
        raise GGLError(f"{what}: {name} gives features, so name the last layer: head=...")
    if explicit:
        sizes = found[1].shape[-1], outputs.shape[1]
        kernel, bias, transposed = _named_layer(head, paths, leaves, sizes)
    else:
        kernel, bias, transposed = _last_layer(what, name, called, leaves, state, two, head, paths)
    places, layer = _head_places(paths, kernel, bias, transposed)

    def arranged(own):
        values = list(own)
        values[kernel] = values[kernel].T if transposed else values[kernel]
        return traverse_util.unflatten_dict(dict(zip(places, values, strict=True)))

    def flattened(tree):
        flat = traverse_util.flatten_dict(tree)
        values = [flat[place] for place in places]
        values[kernel] = values[kernel].T if transposed else values[kernel]
        return values

    def make(key):
        own = leaves if init is None else jax.tree.leaves(init(key))
        variables = {"params": arranged(own)}
        return variables if state is None else {**variables, "state": state}

    def model_apply(variables, images):
        check_images(images, shape, name)
        own, extra = flattened(variables["params"]), variables.get("state")
        images = preprocess(images)
        if explicit:
            logits, features = called(own, extra, images)
            return logits, features
        value, products = _followed(lambda o, x: called(o, extra, x), own, images)
        used = [p for p in products if p.leaf == kernel] if head is not None else [value.origin]
        last = used[-1]
        assert isinstance(last, _Dense)
        return value.array, last.features

    return Model(
        init=make,
        apply=model_apply,
        head=layer,
        image_shape=shape,
        num_classes=count_classes(what, name, outputs.shape[1], num_classes, loss),
        name=name,
        loss=loss,
    )


def _parameters(what: str, params: PyTree) -> tuple[list[Path], list[jax.Array]]:
    """The parameters' paths, and they themselves, in order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [tuple(trees.names_of_path(path)) or ("params",) for path, _ in flat]
    for path, (_, leaf) in zip(paths, flat, strict=True):
        array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        if not array or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise GGLError(
                f"{what}: params: {'/'.join(path)} is {getattr(leaf, 'dtype', type(leaf).__name__)}"
                ", allowed: float arrays; of Equinox, split them off: "
                "eqx.partition(model, eqx.is_inexact_array)"
            )
    if not flat:
        raise GGLError(f"{what}: params holds no array, allowed: a pytree of float arrays")
    return paths, [jnp.asarray(leaf) for _, leaf in flat]


def _named_layer(
    head: Any, paths: list[Path], leaves: list, sizes: tuple[int, int]
) -> tuple[int, int | None, bool]:
    """Kernel, bias and layout of the layer that ``head`` names; a square one is taken as [d k]."""
    kernel = _find_kernel(head, paths, leaves)
    layer = paths[kernel][:-1]
    beside = [
        i for i, leaf in enumerate(leaves) if paths[i][:-1] == layer and leaf.shape == sizes[1:]
    ]
    bias = beside[0] if layer and len(beside) == 1 else None
    return kernel, bias, tuple(leaves[kernel].shape) != sizes


def _last_layer(
    what: str, name: str, called: Callable, leaves: list, state, two, head, paths
) -> tuple[int, int | None, bool]:
    """Kernel, bias and layout of the layer that gives the logits, or that ``head`` names."""
    origins: list[Any] = []

    def traced(own, images):
        value, products = _followed(lambda o, x: called(o, state, x), own, images)
        origins.extend([value.origin, products])
        return value.array

    shapes(f"{what}: {name}", traced, leaves, two)
    origin, products = origins
    if head is not None:
        kernel = _find_kernel(head, paths, leaves)
        products = [product for product in products if product.leaf == kernel]
        origin = products[-1] if products else None
    if not isinstance(origin, _Dense):
        raise GGLError(
            f"{what}: the logits of {name} are not the output of a matrix product with one of its "
            "parameters; name the last layer's matrix, e.g. head='layers/2/weight', or return "
            "(logits, features)"
        )
    return origin.leaf, origin.bias, origin.transposed


def from_nnx(
    module: Any,
    image_shape: Sequence[int],
    num_classes: int | None = None,
    head: Sequence[str] | str | None = None,
    *,
    preprocess: Callable = to_signed,
    loss: str | Callable | None = None,
    call: Callable | None = None,
    name: str | None = None,
) -> Model:
    """Make a :class:`~ggl_jax.types.Model` of a Flax NNX module.

    Its ``nnx.Param`` are the parameters, its other variables (running statistics, keys) stay as
    they are: what a call changes in them is dropped. The weights are the module's own, whatever the
    seed.

    Args:
        module: an ``nnx.Module`` that maps images [b h w c] to logits [b k]. Switch dropout and
            batch statistics off by ``module.eval()``, if the client trains without.
        image_shape: ``(h, w, c)``.
        num_classes: as for :func:`from_function_model`, like the others.
        head: path of the last layer, e.g. ``("classifier",)``.
        preprocess: maps public images in [0, 1] to what the module expects.
        loss: as for :func:`ggl_jax.from_flax`.
        call: ``call(module, images) -> logits`` where the module takes more than images, or gives
            several outputs; None for ``module(images)``.
        name: shown in results; the class name in lower case when None.

    Returns:
        A ``Model``; see :func:`from_function_model`.

    Raises:
        GGLError: no NNX module, and as :func:`from_function_model`.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        way = "; for a Linen module use gx.from_flax" if "linen" in str(type(module).mro()) else ""
        raise GGLError(f"from_nnx: module is {type(module).__name__}, allowed: an nnx.Module{way}")
    split: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
    graph, own, keys, arrays = split

    def apply(params, state, images):
        filled = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(params))
        whole = nnx.merge(graph, filled, state, keys, copy=True)
        return whole(images) if call is None else call(whole, images)

    def alone(params, images):
        return apply(params, arrays, images)

    stateful = bool(jax.tree.leaves(arrays))
    return from_function_model(
        apply if stateful else alone,
        nnx.to_pure_dict(own),
        image_shape,
        num_classes,
        head,
        state=arrays if stateful else None,
        preprocess=preprocess,
        loss=loss,
        name=name or type(module).__name__.lower(),
    )
