"""Updates that came from elsewhere, as pytrees of the model's parameters."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import foreign, trees
from ggl_jax.client.models import get_model, resnet18
from ggl_jax.client.networks import resnet18_from_torch
from ggl_jax.errors import GGLError, about
from ggl_jax.types import Model, PyTree

#: Torch's buffers: they have no gradient, but belong to a state dict.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def read_update(source: Mapping[str, Any] | str | os.PathLike, params: PyTree) -> PyTree:
    """An update as a pytree like the model's parameters, from named tensors.

    Two namings are understood:

    - the parameters' own paths, joined by ``/`` or ``.`` (``fc/kernel``, ``params.fc.kernel``), in
      the layout of Flax;
    - torch's names and layout of a ResNet-18 (``layer1.0.conv1.weight``, ``fc.bias``), of
      torchvision or of the CIFAR network, for a model from :func:`ggl_jax.resnet18`. Buffers may be
      there and are ignored.

    Args:
        source: name -> array, or a ``.npz``, ``.safetensors``, ``.pt`` or ``.pth`` file.
        params: ``variables["params"]`` of the model that the update belongs to.

    Returns:
        float32 arrays in the structure of ``params``.

    Raises:
        GGLError: unreadable file; tensors missing, unknown or of another shape (named); NaN or
            infinity.
    """
    tensors = {_plain(name): value for name, value in foreign.read_or_take(source).items()}
    what = "the model's parameters"
    if "fc.weight" in tensors or "linear.weight" in tensors:
        update = _from_torch(tensors)
        named = dict(zip(trees.names(update), jax.tree.leaves(update), strict=True))
        update = _by_path({_plain(name): leaf for name, leaf in named.items()}, params, what)
    else:
        update = _by_path(tensors, params, what)
    trees.check_finite(update, str(source) if isinstance(source, str | os.PathLike) else "update")
    return update


def _by_path(tensors: Mapping[str, Any], tree: PyTree, what: str) -> PyTree:
    """Tensors, by their paths in ``tree`` with dots, in its structure."""
    names = [_plain(name) for name in trees.names(tree)]
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    foreign.check_shapes(tensors, dict(zip(names, shapes, strict=True)), what=what)
    leaves = [jnp.asarray(tensors[name], jnp.float32) for name in names]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _plain(name: str) -> str:
    """A path joined by dots, without the collection's name."""
    return name.replace("/", ".").removeprefix("params.")


def _from_torch(tensors: Mapping[str, np.ndarray]) -> PyTree:
    gradients = {name: value for name, value in tensors.items() if not name.endswith(_BUFFERS)}
    # A gradient has no buffers; the reader of weights wants them.
    filled = dict(gradients)
    for name, value in gradients.items():
        is_norm = name.endswith(".weight") and np.ndim(value) == 1
        if is_norm:
            base = name.removesuffix("weight")
            filled[f"{base}running_mean"] = filled[f"{base}running_var"] = np.zeros_like(value)
    with about("update"):
        return resnet18_from_torch(filled)["params"]


def read_variables(
    source: Mapping[str, Any] | str | os.PathLike, name: str, image_shape: tuple[int, int, int]
) -> tuple[Model, PyTree]:
    """A built-in model and its weights, from named tensors.

    Args:
        source: name -> array, or a file, as for :func:`read_update`. Flax's names start with the
            collection where the model has several (``params/fc/kernel``, ``batch_stats/bn1/mean``).
            Of torch, a whole state dict.
        name: of the model, see :data:`ggl_jax.MODELS`.
        image_shape: (h, w, c) of its images.

    Returns:
        ``(model, variables)``; the number of classes is that of the last layer.

    Raises:
        GGLError: unknown model; tensors missing, unknown or of another shape (named).
    """
    tensors = foreign.read_or_take(source)
    own = {key.replace("/", "."): value for key, value in tensors.items()}
    if "fc.weight" in own or "linear.weight" in own:
        variables = resnet18_from_torch(own)
        num_classes = variables["params"]["fc"]["kernel"].shape[1]
        stem = "cifar" if variables["params"]["conv1"]["kernel"].shape[0] == 3 else "imagenet"
        return resnet18(num_classes, image_shape, stem=stem), variables
    own = {_plain(key): value for key, value in own.items()}
    head = ".".join((*get_model(name, 2, image_shape).head, "kernel"))
    if head not in own or np.ndim(own[head]) != 2:
        raise GGLError(f"weights: there is no matrix params.{head}; give the weights of a {name}")
    model = get_model(name, own[head].shape[1], image_shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, _by_path(own, shapes, f"a {name}")
