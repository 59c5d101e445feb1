"""Foreign generators as priors: a declared list of layers, and torch's weights for it.

DCGANs differ in their layers' order, sizes and names, so the user states them, once, in values
that JSON holds:

    [{"kind": "conv_transpose", "name": "main.0", "features": 512, "kernel": 4, "bias": false},
     {"kind": "batch_norm", "name": "main.1", "activation": "relu"},
     ...
     {"kind": "conv_transpose", "name": "main.12", "features": 3, "kernel": 4, "stride": 2,
      "padding": 1, "activation": "tanh"}]
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from ggl_jax import foreign
from ggl_jax.errors import GGLError, about, check_known
from ggl_jax.grammar import at_least
from ggl_jax.images import from_signed
from ggl_jax.spec import AtLeast, Count, Number, check, check_fields, made
from ggl_jax.types import Prior

ACTIVATIONS = {
    "": lambda x, slope: x,
    "relu": lambda x, slope: jax.nn.relu(x),
    "leaky_relu": lambda x, slope: jax.nn.leaky_relu(x, slope),
    "tanh": lambda x, slope: jnp.tanh(x),
    "sigmoid": lambda x, slope: jax.nn.sigmoid(x),
}


#: Torch's names of a batch norm's arrays, and ours.
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a generator, after torch's layer of the same kind.

    Attributes:
        kind: "dense" (torch's Linear), "reshape" (to ``shape``), "upsample" (nearest neighbour,
            twice the size), "conv", "conv_transpose" or "batch_norm" (with the stored statistics).
        name: what precedes ``.weight`` in the torch weights' names; empty for layers without
            weights.
        features: output channels of dense, conv and conv_transpose.
        kernel: side of the kernel.
        stride: of conv and conv_transpose.
        padding: of conv and conv_transpose, on each side, in torch's sense.
        bias: whether there is one.
        shape: (channels, height, width) of a reshape, in torch's order.
        activation: applied after the layer: "", "relu", "leaky_relu", "tanh" or "sigmoid".
        slope: of leaky_relu below zero.
        eps: added to the variances of batch_norm.

    Raises:
        GGLError: a value out of its range.
    """

    kind: Literal["dense", "reshape", "upsample", "conv", "conv_transpose", "batch_norm"]
    name: str = ""
    features: Number = 0
    kernel: Count = 1
    stride: Count = 1
    padding: Number = 0
    bias: bool = True
    shape: tuple[Count, ...] = ()
    activation: Literal["", "relu", "leaky_relu", "tanh", "sigmoid"] = ""
    slope: Annotated[float, AtLeast(0.0)] = 0.2
    eps: Annotated[float, AtLeast(0.0)] = 1e-5

    def __post_init__(self):
        with about(f"layer {self.name or self.kind}"):
            check_fields(self, "")
            weights = self.kind not in ("reshape", "upsample")
            if bool(self.name) != weights:
                allowed = "the layer's name in the torch weights" if weights else "none"
                raise GGLError(f"name: got {self.name!r}, allowed: {allowed}")
            if self.kind in ("dense", "conv", "conv_transpose"):
                at_least(1, features=self.features)
            if self.kind == "conv_transpose":
                check("padding", self.padding, Annotated[int, AtLeast(0, below=self.kernel)])
            if self.kind == "reshape" and len(self.shape) != 3:
                raise GGLError(f"shape: got {self.shape}, allowed: [channels, height, width]")


def _as_layers(layers) -> tuple[Layer, ...]:
    if isinstance(layers, str | Mapping) or not isinstance(layers, Sequence) or not layers:
        raise GGLError(f"layers must be a list of at least one layer, not {type(layers).__name__}")
    found = tuple(
        one if isinstance(one, Layer) else made(Layer, one, f"layers[{number}]", "kind")
        for number, one in enumerate(layers)
    )
    names = [layer.name for layer in found if layer.name]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GGLError(f"layers: the name {', '.join(twice)} is given twice")
    if found[-1].activation not in ("tanh", "sigmoid"):
        raise GGLError(
            f"layers: the last activation is {found[-1].activation!r}; it must be tanh (images in "
            "[-1, 1]) or sigmoid (in [0, 1])"
        )
    return found


def _walk(layers: tuple[Layer, ...], latent_dim: int):
    """Yield each layer with its input's shape in torch's order, and the final shape with None."""
    at_least(1, latent_dim=latent_dim)
    spatial = {"upsample", "conv", "conv_transpose"}
    first = next((layer.kind for layer in layers if layer.kind != "batch_norm"), "")
    shape: tuple[int, ...] = (latent_dim, 1, 1) if first in spatial else (latent_dim,)
    for layer in layers:
        where = f"layer {layer.name or layer.kind}"
        if layer.kind in spatial and len(shape) != 3:
            raise GGLError(f"{where}: needs a reshape before it")
        if layer.kind in ("dense", "reshape") and len(shape) != 1:
            raise GGLError(f"{where}: must come before any image layer")
        yield layer, shape
        if layer.kind == "dense":
            shape = (layer.features,)
        elif layer.kind == "reshape":
            if math.prod(layer.shape) != shape[0]:
                raise GGLError(f"{where}: {shape[0]} features do not fill shape={layer.shape}")
            shape = layer.shape
        elif layer.kind == "upsample":
            shape = (shape[0], 2 * shape[1], 2 * shape[2])
        elif layer.kind == "conv":
            sides = [(s + 2 * layer.padding - layer.kernel) // layer.stride + 1 for s in shape[1:]]
            shape = (layer.features, *sides)
        elif layer.kind == "conv_transpose":
            sides = [(s - 1) * layer.stride - 2 * layer.padding + layer.kernel for s in shape[1:]]
            shape = (layer.features, *sides)
        if min(shape) < 1:
            raise GGLError(f"{where}: leaves no pixels")
    yield None, shape


def _torch_layout(layers: tuple[Layer, ...], latent_dim: int) -> dict[str, foreign.Tensor]:
    """The tensors of torch's weights, and where they go."""
    layout: dict[str, foreign.Tensor] = {}

    def flip(kernel):  # [in out h w] of a transposed convolution to [h w in out] of a plain one
        return kernel[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)

    for number, (layer, (channels, *_)) in enumerate(_walk(layers, latent_dim)):
        if layer is None or not layer.name:
            continue
        place, name, out = f"layer{number}", layer.name, layer.features
        if layer.kind == "batch_norm":
            for part, ours in _NORM.items():
                layout[f"{name}.{part}"] = foreign.Tensor((channels,), (place, ours))
            continue
        side, path = (layer.kernel, layer.kernel), (place, "kernel")
        if layer.kind == "conv_transpose":
            kernel = foreign.Tensor((channels, out, *side), path, flip)
        else:
            kernel = foreign.Tensor((out, channels, *(side if layer.kind == "conv" else ())), path)
        layout[f"{name}.weight"] = kernel
        if layer.bias:
            layout[f"{name}.bias"] = foreign.Tensor((out,), (place, "bias"))
    return layout


def _apply(layer: Layer, weights, x):
    """One layer on [b features], or [b h w c]."""
    if layer.kind == "dense":
        x = x @ weights["kernel"]
    elif layer.kind == "reshape":
        x = x.reshape(-1, *layer.shape).transpose(0, 2, 3, 1)
    elif layer.kind == "upsample":
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    elif layer.kind == "batch_norm":
        gain = weights["scale"] * jax.lax.rsqrt(weights["var"] + layer.eps)
        x = x * gain + (weights["bias"] - weights["mean"] * gain)
    else:
        # A transposed convolution is a plain one over the input spread out by the stride; its
        # kernel was turned around at import.
        transposed = layer.kind == "conv_transpose"
        stride, dilation = (1, layer.stride) if transposed else (layer.stride, 1)
        pad = layer.kernel - 1 - layer.padding if transposed else layer.padding
        x = jax.lax.conv_general_dilated(
            x,
            weights["kernel"],
            (stride, stride),
            ((pad, pad), (pad, pad)),
            lhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    if layer.kind != "batch_norm" and "bias" in weights:
        x = x + weights["bias"]
    return ACTIVATIONS[layer.activation](x, layer.slope)


def convolutional(
    layers: Sequence[Layer | Mapping[str, Any]], *, latent_dim: int, latents: str = "normal"
) -> Prior:
    """A generator given by its list of layers, as an unconditional prior.

    Batch norm uses its stored statistics, so an image depends on its own latent only. Labels are
    ignored. If the first layer is spatial, a latent is an image of 1x1 pixels.

    Args:
        layers: :class:`Layer`s, or mappings with their fields, such as those of a card. The last
            one's activation tells the range: tanh for [-1, 1], sigmoid for [0, 1].
        latent_dim: size of the latent, at least 1.
        latents: their law: "normal" for N(0, I), "uniform" for U(-1, 1) in each entry.

    Returns:
        A :class:`Prior` with ``params = {"layer<number>": {...}}`` for the layers with weights.
        ``init`` gives random weights (an untrained prior); see :func:`from_torch` for trained ones.

    Raises:
        GGLError: layers that do not fit together, or an argument out of its range.
    """
    known = _as_layers(layers)
    *_, (_, shape) = _walk(known, latent_dim)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise GGLError(
            f"layers: the output has the shape {list(shape)} (channels first); it must be an image "
            "with 1 or 3 channels"
        )
    check_known("convolutional: latents", latents, ("normal", "uniform"))
    layout = _torch_layout(known, latent_dim)
    first = next(s for _, s in _walk(known, latent_dim))

    def init(key):
        tree: dict[str, Any] = {}
        for number, (of, (layer, part), change) in enumerate(layout.values()):
            if part == "kernel":
                array = change(jax.random.normal(jax.random.fold_in(key, number), of))
                array = (array.size / array.shape[-1]) ** -0.5 * array
            else:
                array = jnp.full(of, float(part in ("scale", "var")))
            tree.setdefault(layer, {})[part] = array
        return tree

    def apply(params, z, labels=None):
        del labels
        x = z[:, None, None, :] if len(first) == 3 else z
        for number, layer in enumerate(known):
            x = _apply(layer, params.get(f"layer{number}", {}), x)
        return from_signed(x) if known[-1].activation == "tanh" else x

    def sample_latent(key, num):
        if latents == "uniform":
            return jax.random.uniform(key, (num, latent_dim), minval=-1.0)
        return jax.random.normal(key, (num, latent_dim))

    return Prior(
        init, apply, sample_latent, latent_dim, (shape[1], shape[2], shape[0]), "convolutional"
    )


def from_torch(
    state_dict_or_path, layers: Sequence[Layer | Mapping[str, Any]], *, latent_dim: int
) -> dict:
    """Convert the torch weights of a generator to the params of ``convolutional(layers)``.

    Args:
        state_dict_or_path: names to arrays or tensors, or a file (see
            :func:`ggl_jax.foreign.read`). The ``num_batches_tracked`` counters of the declared
            batch norms are ignored.
        layers: as for :func:`convolutional`.
        latent_dim: size of the latent.

    Returns:
        The params, float32.

    Raises:
        GGLError: the file cannot be read; layers that do not fit together; or tensors that are
            missing, unknown or of another shape. The message names them.
    """
    layout = _torch_layout(_as_layers(layers), latent_dim)
    tensors = foreign.read_or_take(state_dict_or_path)
    tree = foreign.convert(tensors, layout, what="the declared layers")
    return jax.tree.map(jnp.asarray, tree)
