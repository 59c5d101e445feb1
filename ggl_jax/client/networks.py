"""The built-in networks as Flax Linen modules, and ResNet-18's weights from torch.

Each maps images [b h w c] in [-1, 1] to logits [b k]; :mod:`ggl_jax.client.models` makes models of
them.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ggl_jax import foreign
from ggl_jax.errors import GGLError
from ggl_jax.types import PyTree

# --------------------------------------------------------------------------------------------------
# Initialisers
# --------------------------------------------------------------------------------------------------

# All draw flat and reshape: the values are the same, and XLA compiles a one-dimensional draw in a
# quarter of the time of a four-dimensional one (ResNet-18 on one CPU core: 3 instead of 7 s).


def _uniform(bound: float) -> Callable:
    """Initialiser: uniform on [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return init


def _torch_kernel(key, shape, dtype=jnp.float32):
    """torch's default for Conv2d and Linear weights, ``kaiming_uniform_(a=sqrt(5))``.

    Uniform on [-1/sqrt(fan_in), 1/sqrt(fan_in)].
    """
    fan_in = math.prod(shape[:-1])
    return _uniform(fan_in**-0.5)(key, shape, dtype)


def _torchvision_kernel(key, shape, dtype=jnp.float32):
    """torchvision's for the convolutions of its ResNets.

    ``kaiming_normal_(mode="fan_out", nonlinearity="relu")``: normal with variance 2 / fan_out.
    """
    fan_out = math.prod(shape[:-2]) * shape[-1]
    values = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
    return (2 / fan_out) ** 0.5 * values


def _torch_dense(features: int, fan_in: int, name: str) -> nn.Dense:
    """A Dense layer initialised as torch's Linear: weight and bias within 1/sqrt(fan_in)."""
    return nn.Dense(
        features, kernel_init=_torch_kernel, bias_init=_uniform(fan_in**-0.5), name=name
    )


# --------------------------------------------------------------------------------------------------
# Linen modules
# --------------------------------------------------------------------------------------------------


def _conv3x3(features: int, stride: int, kernel_init: Callable, name: str) -> nn.Conv:
    # Explicit padding: Flax's "SAME" pads (0, 1) where a stride of 2 meets an even size, torch
    # pads (1, 1); the outputs are then shifted against each other by one pixel.
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        use_bias=False,
        kernel_init=kernel_init,
        name=name,
    )


def _norm(kind: str, channels: int, name: str) -> nn.Module:
    """The normalisation of so many channels, in torch's arithmetic.

    Kinds: BatchNorm, by running statistics (``"eval"``) or by the batch's own (``"train"``);
    ``"group"``, GroupNorm; ``"layer"``, over positions and channels, which is GroupNorm of one
    group (Wu & He 2018, figure 2).

    The variance is torch's two-pass one; the one-pass form loses digits where the mean is large.
    """
    if kind in ("group", "layer"):
        groups = math.gcd(_GROUPS, channels) if kind == "group" else 1
        return nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, name=name)
    # Flax's momentum is the share that is kept, torch's (0.1) the share that is replaced.
    return nn.BatchNorm(
        use_running_average=kind == "eval",
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
        name=name,
    )


#: Groups of GroupNorm; fewer where they do not divide the channels.
_GROUPS = 8


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left).

    Attributes:
        features: output channels.
        stride: of the first convolution and of the shortcut.
        norm: as in :class:`ResNet18`.
        kernel_init: of the convolutions.
    """

    features: int
    stride: int
    norm: str
    kernel_init: Callable

    @nn.compact
    def __call__(self, x):
        y = _conv3x3(self.features, self.stride, self.kernel_init, "conv1")(x)
        y = nn.relu(_norm(self.norm, self.features, "bn1")(y))
        y = _conv3x3(self.features, 1, self.kernel_init, "conv2")(y)
        y = _norm(self.norm, self.features, "bn2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = nn.Conv(
                self.features,
                (1, 1),
                strides=self.stride,
                padding="VALID",
                use_bias=False,
                kernel_init=self.kernel_init,
                name="shortcut_conv",
            )(x)
            x = _norm(self.norm, self.features, "shortcut_bn")(x)
        return nn.relu(y + x)


class ResNet18(nn.Module):
    """ResNet-18 with torchvision's arithmetic, for small and for large images.

    Maps images [b h w c] in the network's range [-1, 1] to logits [b num_classes]. With the
    ``"cifar"`` stem, 3 input channels and 2 classes it has 11,169,858 parameters in 62 tensors.

    Attributes:
        num_classes: number of logits.
        stem: ``"cifar"``: one 3x3 convolution with stride 1, no max-pooling (32x32 images);
            ``"imagenet"``: a 7x7 convolution with stride 2 and a 3x3 max-pooling with stride 2
            (224x224 images, torchvision).
        norm: BatchNorm, ``"eval"`` with the running statistics, ``"train"`` with the statistics of
            the batch at hand, and then ``apply`` needs ``mutable=["batch_stats"]``; or ``"group"``
            (8 groups) or ``"layer"``, which have none.
        weight_init: ``"torch"``: every layer as torch initialises it by default, uniform within
            1/sqrt(fan_in); ``"torchvision"``: convolutions normal with variance 2/fan_out, as
            torchvision's ResNets. BatchNorm starts at scale 1, bias 0, mean 0, variance 1 and
            the Dense layer at torch's default in both (no zero-initialised last scale).
    """

    num_classes: int
    stem: str = "cifar"
    norm: str = "eval"
    weight_init: str = "torchvision"

    @nn.compact
    def __call__(self, x):
        kernel_init = _torch_kernel if self.weight_init == "torch" else _torchvision_kernel
        if self.stem == "cifar":
            x = _conv3x3(64, 1, kernel_init, "conv1")(x)
        else:
            x = nn.Conv(
                64,
                (7, 7),
                strides=2,
                padding=((3, 3), (3, 3)),
                use_bias=False,
                kernel_init=kernel_init,
                name="conv1",
            )(x)
        x = nn.relu(_norm(self.norm, 64, "bn1")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, features in enumerate((64, 128, 256, 512), start=1):
            for block in range(2):
                stride = 2 if stage > 1 and block == 0 else 1
                x = BasicBlock(
                    features,
                    stride,
                    self.norm,
                    kernel_init,
                    name=f"layer{stage}_{block}",
                )(x)
        x = jnp.mean(x, axis=(1, 2))
        return _torch_dense(self.num_classes, 512, "fc")(x)


class LeNet(nn.Module):
    """The LeNet variant of Deep Leakage from Gradients (Zhu et al. 2019).

    Three 5x5 convolutions of 12 channels with strides 2, 2, 1 and sigmoids, then a Dense layer
    named ``fc``; every weight and bias starts uniform on [-0.5, 0.5], as in that paper's code.
    The sigmoids make it twice differentiable, which L-BFGS gradient matching needs. Features are
    flattened in height, width, channel order (torch: channel, height, width).

    Attributes:
        num_classes: number of logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x):
        init = _uniform(0.5)
        for i, stride in enumerate((2, 2, 1), start=1):
            x = nn.Conv(
                12,
                (5, 5),
                strides=stride,
                padding=((2, 2), (2, 2)),
                kernel_init=init,
                bias_init=init,
                name=f"conv{i}",
            )(x)
            x = nn.sigmoid(x)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=init, name="fc")(x)


class ConvNet(nn.Module):
    """A small convolution - normalisation - ReLU network, for quick runs and tests.

    Three 3x3 convolutions of ``width``, ``2 width`` and ``4 width`` channels, 2x2 max-pooling
    after the second and third, then a Dense layer named ``fc``: the pattern of the ConvNet of
    Geiping et al. 2020 with fewer layers. Initialised as torch does by default.

    Attributes:
        num_classes: number of logits.
        width: channels of the first convolution.
        norm: as in :class:`ResNet18`.
    """

    num_classes: int
    width: int = 16
    norm: str = "eval"

    @nn.compact
    def __call__(self, x):
        for i, factor in enumerate((1, 2, 4), start=1):
            x = _conv3x3(factor * self.width, 1, _torch_kernel, f"conv{i}")(x)
            x = nn.relu(_norm(self.norm, factor * self.width, f"bn{i}")(x))
            if i > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return _torch_dense(self.num_classes, x.shape[-1], "fc")(x)


class MLP(nn.Module):
    """Dense layers and ReLUs on flattened images, ended by a Dense layer named ``fc``.

    Initialised as torch does by default. Images are flattened channels first, as in torch.

    Attributes:
        num_classes: number of logits.
        width: units of each hidden layer.
        depth: hidden layers.
    """

    num_classes: int
    width: int = 256
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
        for i in range(1, self.depth + 1):
            x = nn.relu(_torch_dense(self.width, x.shape[-1], f"fc{i}")(x))
        return _torch_dense(self.num_classes, x.shape[-1], "fc")(x)


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


class EncoderBlock(nn.Module):
    """Self-attention and a GELU network of four times the width, each after a LayerNorm.

    Attributes:
        heads: attention heads; they divide the width.
    """

    heads: int

    @nn.compact
    def __call__(self, x):
        b, t, width = x.shape
        y = _torch_dense(3 * width, width, "qkv")(_layer_norm("norm1")(x))
        q, k, v = jnp.moveaxis(y.reshape(b, t, 3, self.heads, width // self.heads), 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * (width // self.heads) ** -0.5
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(b, t, width)
        x = x + _torch_dense(width, width, "proj")(y)
        y = _torch_dense(4 * width, width, "mlp1")(_layer_norm("norm2")(x))
        return x + _torch_dense(width, 4 * width, "mlp2")(nn.gelu(y, approximate=False))


class ViT(nn.Module):
    """A small Vision Transformer, pre-normalised, with the mean of its tokens before the head.

    Patches are embedded by a convolution, learnt positions are added; there is no class token and
    no dropout. Dense layers are initialised as torch does by default, positions normal with 0.02.

    Attributes:
        num_classes: number of logits.
        patch: pixels of a patch's side.
        width: entries of a token.
        depth: blocks.
        heads: of each block's attention.

    Reference: Dosovitskiy et al. 2021; the mean in place of the class token as in Beyer et al. 2022
    ("Better plain ViT baselines for ImageNet-1k").
    """

    num_classes: int
    patch: int = 4
    width: int = 96
    depth: int = 4
    heads: int = 3

    @nn.compact
    def __call__(self, x):
        side = (self.patch, self.patch)
        x = nn.Conv(
            self.width,
            side,
            strides=side,
            padding="VALID",
            kernel_init=_torch_kernel,
            bias_init=_uniform((x.shape[-1] * self.patch**2) ** -0.5),
            name="embed",
        )(x)
        x = x.reshape(x.shape[0], -1, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        x = x + positions
        for i in range(1, self.depth + 1):
            x = EncoderBlock(self.heads, name=f"block{i}")(x)
        x = jnp.mean(_layer_norm("norm")(x), axis=1)
        return _torch_dense(self.num_classes, self.width, "fc")(x)


# --------------------------------------------------------------------------------------------------
# From torch
# --------------------------------------------------------------------------------------------------


def torch_layout(variables: PyTree) -> dict[str, foreign.Tensor]:
    """Torch's names and axes of a built-in network's arrays.

    Layers are called as here (``conv1``, ``bn1``, ``fc``), those of ResNet-18 as in torchvision
    (``layer2.0.downsample.0``).

    Args:
        variables: of the network, or its shapes.

    Returns:
        Name -> shape there, path in ``variables``, and how axes change. Where the last layer reads
        flattened images of features, its inputs are reordered: torch flattens channels first.
        Arrays of a module's own (a ViT's ``positions``) keep their names and axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    kernels = [leaf.shape for _, leaf in leaves if len(leaf.shape) == 4]
    channels = kernels[-1][-1] if kernels else 1

    def flattened(weight):
        num_classes, features = weight.shape
        return weight.reshape(num_classes, channels, -1).transpose(2, 1, 0).reshape(features, -1)

    layout: dict[str, foreign.Tensor] = {}
    for entries, leaf in leaves:
        path = tuple(str(getattr(entry, "key", entry)) for entry in entries)
        if path[-1] not in foreign.NAMES:
            layout[".".join(path[1:])] = foreign.Tensor(leaf.shape, path, lambda x: x)
            continue
        layer = re.sub(r"^layer(\d)_(\d)", r"layer\1.\2", ".".join(path[1:-1]))
        layer = layer.replace("shortcut_conv", "downsample.0").replace(
            "shortcut_bn", "downsample.1"
        )
        shape = foreign.channels_first(leaf.shape) if path[-1] == "kernel" else leaf.shape
        # Those of a block read tokens.
        reads_images = len(shape) == 2 and len(path) == 3 and shape[1] % channels == 0
        change = flattened if reads_images else foreign.channels_last
        layout[f"{layer}.{foreign.NAMES[path[-1]]}"] = foreign.Tensor(shape, path, change)
    return layout


def torchvision_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a CIFAR ResNet-18 (``shortcut``, ``linear``) under torchvision's names.

    Raises:
        GGLError: an array is there under both.
    """
    arrays: dict[str, Any] = {}
    for key, value in state_dict.items():
        name = key.replace(".shortcut.", ".downsample.")
        if name.startswith("linear."):
            name = "fc." + name.removeprefix("linear.")
        if name in arrays:
            raise GGLError(f"state_dict: {key} is there twice, under two names")
        arrays[name] = value
    return arrays
