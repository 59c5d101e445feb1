"""Updates that came from elsewhere, as pytrees of the model's parameters."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import checkpoint, foreign, grammar, trees
from ggl_jax.client import networks
from ggl_jax.client.models import MODELS, get_model
from ggl_jax.errors import GGLError, about
from ggl_jax.gate.models import variable_shapes
from ggl_jax.types import Factored, Model, Path, PyTree, View

#: Torch's buffers: they have no gradient, but belong to a state dict.
_BUFFERS = ("running_mean", "running_var", foreign.COUNTER)

Source = Mapping[str, Any] | str | os.PathLike


def read_update(source: Source, params: PyTree) -> PyTree:
    """An update as a pytree like the model's parameters, from named tensors; see :func:`read_part`.

    Raises:
        GGLError: as :func:`read_part`, or a tensor is missing.
    """
    return whole(read_part(source, params, complete=True), params)


def read_part(source: Source, params: PyTree, *, complete: bool = False) -> dict[str, np.ndarray]:
    """Those of an update's tensors that were shared.

    Two namings are understood:

    - the parameters' own paths, joined by ``/`` or ``.`` (``fc/kernel``, ``params.fc.kernel``), in
      the layout of Flax;
    - torch's names and layout of a built-in model (``conv1.weight``, ``fc.bias``); of a ResNet-18
      (``layer1.0.conv1.weight``) torchvision's or those of the CIFAR network. Buffers may be there
      and are ignored.

    Args:
        source: name -> array, or a ``.npz``, ``.safetensors``, ``.pt`` or ``.pth`` file, or the
            folder of a checkpoint (:mod:`ggl_jax.checkpoint`). Flax's running statistics
            (``batch_stats/...``) are ignored, as torch's buffers.
        params: ``variables["params"]`` of the model that the update belongs to.
        complete: ask for all of them.

    Returns:
        Float32 arrays by the parameters' names (``fc/kernel``) and in their layout.

    Raises:
        GGLError: unreadable file; no tensor of the model, an unknown one, or one of another shape
            (named); NaN or infinity.
    """
    tensors = _read(source)
    with about(str(source) if isinstance(source, str | os.PathLike) else "update"):
        if _is_torchs(tensors):
            tensors = {k: v for k, v in tensors.items() if not k.endswith(_BUFFERS)}
        tensors = {k: v for k, v in tensors.items() if not k.startswith("batch_stats")}
        return _named(tensors, {"params": params}, "the model's parameters", complete)


def _read(source: Source) -> dict[str, Any]:
    """Named tensors of any source."""
    if isinstance(source, str | os.PathLike) and FilePath(source).is_dir():
        return trees.named(checkpoint.load(source)[0])
    return foreign.read_or_take(source)


def _told(source: Source) -> str:
    """What a checkpoint's card says the model is, for errors."""
    if isinstance(source, str | os.PathLike) and FilePath(source).is_dir():
        model = checkpoint.load_card(source).get("model")
        return f" (the model of {source} is {model})" if model else f" ({source} holds no model)"
    return ""


def whole(part: Mapping[str, np.ndarray], params: PyTree) -> PyTree:
    """A pytree like ``params`` of tensors by name; those that are not there are 0."""
    leaves = [
        jnp.asarray(part.get(name, np.zeros(leaf.shape, np.float32)))
        for name, leaf in trees.named(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _is_torchs(tensors: Mapping[str, Any]) -> bool:
    return any(name.endswith(".weight") for name in tensors)


def _named(
    tensors: Mapping[str, Any], variables: PyTree, what: str, complete: bool
) -> dict[str, np.ndarray]:
    """Foreign tensors by our names, without the collection's where that is ``params``."""
    if _is_torchs(tensors):
        tensors, layout = networks.torchvision_names(tensors), networks.torch_layout(variables)
    else:
        tensors = foreign.unprefixed({_plain(name): value for name, value in tensors.items()})
        named = trees.named(variables).items()
        layout = {_plain(k): foreign.Tensor(v.shape, (k,), lambda x: x) for k, v in named}
        layout = foreign.unprefixed(layout)
    if not complete and set(tensors) & set(layout):
        layout = {name: tensor for name, tensor in layout.items() if name in tensors}
    found = foreign.convert(tensors, layout, what=what)
    return {name.removeprefix("params/"): leaf for name, leaf in trees.named(found).items()}


def _plain(name: str) -> str:
    """A path joined by dots, without the collection's name."""
    return name.replace("/", ".").removeprefix("params.")


def read_variables(
    source: Source, name: str, image_shape: tuple[int, int, int]
) -> tuple[Model, PyTree]:
    """A built-in model and its weights, from named tensors.

    Args:
        source: as for :func:`read_part`. Flax's names start with the collection where the model has
            several (``params/fc/kernel``, ``batch_stats/bn1/mean``). Of torch, a whole state dict.
        name: of the model with its options, see :func:`ggl_jax.client.models.get_model`. A
            ResNet-18's stem is that of the weights.
        image_shape: (h, w, c) of its images.

    Returns:
        ``(model, variables)``; the number of classes is that of the last layer.

    Raises:
        GGLError: unknown model; tensors missing, unknown or of another shape (named).
    """
    tensors = _read(source)
    kind, options = grammar.read(MODELS, name, what="model", offered=("num_classes", "image_shape"))
    head = ".".join(get_model(name, 2, image_shape).head)
    if _is_torchs(tensors):
        tensors = networks.torchvision_names(tensors)
        matrix, classes = f"{head}.weight", 0
    else:
        tensors = foreign.unprefixed({_plain(key): value for key, value in tensors.items()})
        matrix, classes = f"{head}.kernel", 1
    if np.ndim(tensors.get(matrix, 0)) != 2:
        raise GGLError(
            f"weights: there is no matrix {matrix}; give the weights of a {kind}{_told(source)}"
        )
    if kind == "resnet18" and np.ndim(first := tensors.get("conv1.weight", 0)) == 4:
        options = {"stem": "cifar" if np.shape(first)[-1] == 3 else "imagenet"} | options
    model = MODELS[kind](np.shape(tensors[matrix])[classes], image_shape, **options)
    return model, _variables(tensors, model, f"{name}{_told(source)}")


def variables_of(source: Source, model: Model) -> PyTree:
    """Weights of a given model, read as by :func:`read_variables`.

    Raises:
        GGLError: tensors missing, unknown or of another shape (named).
    """
    return _variables(_read(source), model, f"{model.name}{_told(source)}")


def _variables(tensors: Mapping[str, Any], model: Model, what: str) -> PyTree:
    shapes = variable_shapes(model)
    with about("weights"):
        found = _named(tensors, shapes, f"model {what}", True)
    leaves = [jnp.asarray(found[name.removeprefix("params/")]) for name in trees.names(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def normalised(model: Model, mean: Sequence[float], std: Sequence[float]) -> Model:
    """The model behind another normalisation of its images: ``(image - mean) / std``.

    Args:
        model: one that maps images in [0, 1] to [-1, 1], as all built-in ones do.
        mean: of the images' channels, or one number for all.
        std: likewise, above 0.

    Raises:
        GGLError: another number of values than channels, or values out of range.

    >>> from ggl_jax import lenet
    >>> normalised(lenet(), [0.5], [0.0])
    Traceback (most recent call last):
    ggl_jax.errors.GGLError: std: got 0, allowed: 1 or 3 numbers above 0
    """
    channels = model.image_shape[-1]
    for name, given in (("mean", mean), ("std", std)):
        values = np.asarray(given, np.float32)
        fits = values.shape in ((1,), (channels,)) and np.isfinite(values).all()
        if not fits or (name == "std" and (values <= 0).any()):
            shown = " ".join(f"{value:g}" for value in values.reshape(-1))
            limit = "numbers above 0" if name == "std" else "finite numbers"
            raise GGLError(f"{name}: got {shown}, allowed: 1 or {channels} {limit}")
    shift, scale = (np.asarray(values, np.float32) for values in (mean, std))

    def behind(function: Callable | None) -> Callable | None:
        if function is None:
            return None
        # The model itself doubles and subtracts 1.
        return lambda variables, images: function(variables, 0.5 * (images - shift) / scale + 0.5)

    apply: Any = behind(model.apply)
    return model._replace(apply=apply, statistics=behind(model.statistics))


def shared_part(view: View, params: PyTree, part: Sequence[str], head: Path) -> View:
    """A server's view of a client that shares some tensors of its update only.

    Estimates are made of these; of candidates' updates the others are left out of the distance.

    Args:
        view: of the defense, which the client applied to what it shares.
        params: ``variables["params"]``.
        part: the names of what is shared (``fc/kernel``).
        head: ``Model.head``.

    Raises:
        GGLError: Soteria, which defends the last layer, without it.
    """
    names, treedef = trees.names(params), jax.tree.structure(params)
    kernel = "/".join((*head, "kernel"))
    if set(names) <= set(part):
        return view
    if kernel not in part and "soteria" in view.name:
        raise GGLError(
            f"defense: {view.name} defends the last layer, and the update has no {kernel}; give "
            "the defense of what was shared"
        )

    def taken(tree: PyTree) -> dict[str, Any]:
        own = {name: leaf for name, leaf in trees.named(tree).items() if name in part}
        # Without the last layer, estimates that sum over its classes find one of a single class.
        return own if kernel in own else {**own, kernel: jnp.zeros((1, 1))}

    def put_back(some: Mapping[str, Any], otherwise: Callable) -> PyTree:
        leaves = [some[n] if n in part else otherwise(x) for n, x in trees.named(params).items()]
        return jax.tree.unflatten(treedef, leaves)

    def estimate(update, head, noise=0.0):
        return view.estimate(taken(update), head, noise)

    def simulate(estimated, update):
        return put_back(view.simulate(estimated, taken(update)), jnp.zeros_like)

    def factor(estimated):
        assert view.factor is not None
        inner = view.factor(estimated)
        if inner is None:
            return None
        mask = dict.fromkeys(part, 1.0) if inner.mask is None else inner.mask

        def scale(sq_norms):
            own = taken(sq_norms)
            own |= {kernel: jnp.sum(own[kernel])}  # of the one that stands in for it, too
            assert inner.scale is not None
            return put_back(inner.scale(own), lambda leaf: jnp.ones(()))

        return Factored(put_back(mask, lambda leaf: 0.0), None if inner.scale is None else scale)

    return view._replace(
        estimate=estimate,
        simulate=simulate,
        factor=None if view.factor is None else factor,
        on_support=view.on_support and shared_part(view.on_support, params, part, head),
    )
