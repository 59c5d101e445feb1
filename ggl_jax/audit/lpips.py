"""LPIPS v0.1: how far apart two images look to a network trained on photographs.

Both images go through a classification network. At a few of its layers the features are scaled to
unit length at each position, and their squared differences are weighted by channel, averaged over
positions and summed over layers. The weights were fitted to human judgements.

Parameters are a tree of nested dicts (see :func:`from_torch`), kept apart from the code: none ship
with the project, ``ggl-jax weights lpips-vgg`` fetches them.

Reference: Zhang, Isola, Efros, Shechtman and Wang, "The unreasonable effectiveness of deep features
as a perceptual metric", CVPR 2018, and the weights of its published code, version 0.1.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from ggl_jax import foreign
from ggl_jax.errors import GGLError, check_known
from ggl_jax.images import to_signed
from ggl_jax.types import PyTree

# ImageNet's mean and deviation, in the published code's roundings for [-1, 1] images.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_EPSILON = 1e-10


def _conv(channels: int, kernel: int, stride: int = 1, padding: int = 0, name: str | None = None):
    # A metric should not depend on the device's default precision (TF32).
    highest = jax.lax.Precision.HIGHEST
    return nn.Conv(channels, (kernel, kernel), stride, padding, precision=highest, name=name)


class _Fire(nn.Module):
    """SqueezeNet's module: a 1x1 convolution and a ReLU, then 1x1 and 3x3 ones side by side."""

    squeeze: int
    expand: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(_conv(self.squeeze, 1, name="squeeze")(x))
        wide = _conv(self.expand, 3, padding=1, name="expand3x3")(x)
        return jnp.concatenate([_conv(self.expand, 1, name="expand1x1")(x), wide], axis=-1)


class _Pool(nn.Module):
    """Max-pooling; ``ceil`` lets the last window reach over the edge, as in torch."""

    size: int
    stride: int
    ceil: bool = False

    def __call__(self, x):
        over = [(self.size - n) % self.stride if self.ceil else 0 for n in x.shape[-3:-1]]
        window, strides = (self.size, self.size), (self.stride, self.stride)
        return nn.max_pool(x, window, strides, [(0, n) for n in over])


class Backbone(NamedTuple):
    """A network in torchvision's numbering.

    Attributes:
        layers: {number in torchvision's ``features``: layer}, in order; a ReLU follows each (pools
            have positive inputs, on which it does nothing).
        taps: numbers of the layers whose outputs are compared.
        smallest: height and width of the smallest images, in pixels; below it a convolution or
            pooling window is larger than what is left of the image.
    """

    layers: dict[str, nn.Module]
    taps: tuple[str, ...]
    smallest: int


#: Kinds of layers in ``lpips.json``, which has their arguments behind the kind.
_KINDS: dict[str, Any] = {"conv": _conv, "fire": _Fire, "pool": _Pool}


def _recorded(smallest: int, taps: list[str], layers: dict[str, list]) -> Backbone:
    made = {number: _KINDS[kind](*sizes) for number, (kind, *sizes) in layers.items()}
    return Backbone(made, tuple(taps), smallest)


#: Backbones by name. "vgg" is the paper's; "alex" is the one that LPIPS' authors recommend.
BACKBONES: dict[str, Backbone] = {
    name: _recorded(**one)
    for name, one in json.loads((Path(__file__).parent / "lpips.json").read_text()).items()
}


def get_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        GGLError: there is none.
    """
    check_known("lpips", name, BACKBONES)
    return BACKBONES[name]


class _Features(nn.Module):
    """Unit-length features [b h w c] at each tap, of images [b h w 3] in [0, 1]."""

    backbone: str

    @nn.compact
    def __call__(self, images):
        network, x = BACKBONES[self.backbone], (to_signed(images) - _SHIFT) / _SCALE
        found = []
        for number, layer in network.layers.items():
            x = nn.relu(layer.copy(name=number)(x))
            if number in network.taps:
                length = jnp.linalg.norm(x, axis=-1, keepdims=True)
                found.append(x / (length + _EPSILON))
        return found


# --- parameters -------------------------------------------------------------------------------


def torch_layout(backbone: str) -> dict[str, foreign.Tensor]:
    """The tensors that :func:`from_torch` needs, in torch's layout.

    Args:
        backbone: "vgg", "alex" or "squeeze".

    Returns:
        ``features.*`` as in torchvision's state dict of the network, convolutions as
        [out in h w]; ``lin*.model.1.weight`` [1 channels 1 1] as in LPIPS' own files.
    """
    images = jnp.zeros((1, *[get_backbone(backbone).smallest] * 2, 3))
    init = _Features(backbone).init_with_output
    taps, variables = jax.eval_shape(init, jax.random.key(0), images)
    arrays = flatten_dict(variables["params"])
    layout: dict[str, foreign.Tensor] = {}
    for path in sorted(arrays, key=lambda path: int(path[0])):
        name = ".".join(("features", *path[:-1], foreign.NAMES[path[-1]]))
        shape = foreign.channels_first(arrays[path].shape)
        layout[name] = foreign.Tensor(shape, ("features", *path))
    for index, tap in enumerate(taps):
        shape = (1, tap.shape[-1], 1, 1)
        layout[f"lin{index}.model.1.weight"] = foreign.Tensor(shape, ("lin", str(index)), np.ravel)
    return layout


def from_torch(tensors: Mapping[str, np.ndarray], backbone: str) -> PyTree:
    """Parameters from tensors with torch's names and layout; every tensor is accounted for.

    Args:
        tensors: those of :func:`torch_layout`. A torchvision file's ``classifier.*``, for which
            LPIPS has no use, is left out.
        backbone: "vgg", "alex" or "squeeze".

    Returns:
        float32 numpy arrays: ``features/<number>[/<part of a Fire module>]/kernel`` [h w in out]
        and ``bias`` [out], numbered as in torchvision; ``lin/<index>`` [channels].

    Raises:
        GGLError: see :func:`ggl_jax.foreign.convert`.
    """
    used = {name: x for name, x in tensors.items() if not name.startswith("classifier.")}
    return foreign.convert(used, torch_layout(backbone), what=f"lpips-{backbone}")


# --- the distance -----------------------------------------------------------------------------


@partial(jax.jit, static_argnames="backbone")
def layer_distances(params: PyTree, a: jax.Array, b: jax.Array, *, backbone: str) -> jax.Array:
    """The share of each compared layer in :func:`lpips`.

    Args, errors and edge cases as for :func:`lpips`.

    Returns:
        [... layers]: 5 for vgg and alex, 7 for squeeze.
    """
    smallest = get_backbone(backbone).smallest
    a, b = jnp.asarray(a), jnp.asarray(b)
    usable = all(x.ndim >= 3 and x.shape[-1] in (1, 3) for x in (a, b))
    if not usable or a.shape[-3:-1] != b.shape[-3:-1]:
        raise GGLError(
            f"lpips: got images of shapes {list(a.shape)} and {list(b.shape)}, allowed: "
            "[... h w 3] or [... h w 1] of one height and width"
        )
    if min(a.shape[-3:-1]) < smallest:
        raise GGLError(
            f"lpips: got images of {a.shape[-3]} x {a.shape[-2]} pixels, allowed: at least "
            f"{smallest} x {smallest} for backbone {backbone!r}; choose another backbone or larger "
            "images"
        )

    def features(images):
        images = jnp.broadcast_to(images, (*images.shape[:-1], 3)).astype(jnp.float32)
        flat = images.reshape(-1, *images.shape[-3:])
        taps: Any = _Features(backbone).apply({"params": params["features"]}, flat)
        return [tap.reshape(*images.shape[:-3], *tap.shape[1:]) for tap in taps]

    shares = []
    for index, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        weighted = (x - y) ** 2 * params["lin"][str(index)]
        shares.append(weighted.sum(axis=-1).mean(axis=(-2, -1)))
    return jnp.stack(shares, axis=-1)


def lpips(params: PyTree, a: jax.Array, b: jax.Array, *, backbone: str = "vgg") -> jax.Array:
    """Learned perceptual image patch similarity, version 0.1; lower is more alike.

    Args:
        params: of the backbone, from :func:`from_torch` or
            :func:`ggl_jax.audit.weights.load_lpips`.
        a: [... h w 3] in [0, 1]. One channel counts as three equal ones.
        b: as ``a``; leading dimensions are broadcast, so one image may meet many.
        backbone: "vgg" (the paper's), "alex" or "squeeze".

    Returns:
        [...], at least 0; 0 for identical images, mostly below 1. NaN in an image gives NaN.
        Images are not resized: the network sees them as they are, as in the published code, which
        at 32x32 leaves its last layers one or two positions. Not differentiable where all features
        of a position are zero.

    Raises:
        GGLError: an unknown backbone, other shapes, or images smaller than the backbone takes.
    """
    return layer_distances(params, a, b, backbone=backbone).sum(axis=-1)
