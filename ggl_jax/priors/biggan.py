"""BigGAN-deep, the class-conditional ImageNet generator, and the way in for its published weights.

Architecture: Brock, Donahue and Simonyan, "Large Scale GAN Training for High Fidelity Natural
Image Synthesis", ICLR 2019, appendix B (BigGAN-deep). Names and numbers of the published weights
are those of their PyTorch conversion (pytorch-pretrained-BigGAN: ``pytorch_model.bin`` and
``config.json``).
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ggl_jax import foreign
from ggl_jax.errors import GGLError, about, check_known, explaining
from ggl_jax.images import area_resize, from_signed
from ggl_jax.spec import AtLeast, Count, Number, Proper, check, check_fields, made
from ggl_jax.types import Path as TreePath
from ggl_jax.types import Prior

#: A block's inner convolutions have a quarter of its input's channels (appendix B).
REDUCTION = 4


@dataclasses.dataclass(frozen=True)
class BigGANConfig:
    """The size of a BigGAN-deep generator; the fields are those of the published ``config.json``.

    ``dataclasses.replace(BIGGAN_DEEP[256], channel_width=8, num_classes=10)`` is a narrow one of
    the same layout.

    Attributes:
        output_dim: side of the images, 4 times two to the number of up-sampling blocks.
        z_dim: size of the latent.
        class_embed_dim: size of a class's embedding.
        channel_width: channels before the last convolution; all others are multiples.
        num_classes: classes.
        layers: one ``(up_sample, in, out)`` per residual block, channels in units of
            ``channel_width``; ``out`` is ``in`` or less, and 1 in the last block.
        attention_layer_position: the block before which the self-attention stands.
        eps: added to variances in batch norm, above 0.
        n_stats: truncations with stored batch norm statistics, evenly spaced from 0 to 1.

    Raises:
        GGLError: a field out of its range, or layers that do not fit together.
    """

    output_dim: int
    layers: tuple[tuple[bool, int, int], ...]
    z_dim: Count = 128
    class_embed_dim: Count = 128
    channel_width: Count = 128
    num_classes: Count = 1000
    attention_layer_position: Number = 8
    eps: Proper = 1e-4
    n_stats: Annotated[int, AtLeast(2)] = 51

    def __post_init__(self):
        check_fields(self, "BigGANConfig: ", but="layers")
        try:
            layers = tuple((bool(up), int(i), int(o)) for up, i, o in self.layers)
        except (TypeError, ValueError):
            raise GGLError(
                f"BigGANConfig: layers={self.layers!r} must be a list of [up_sample, in, out]"
            ) from None
        object.__setattr__(self, "layers", layers)
        ends = [layer[2] for layer in layers]
        starts = [layer[1] for layer in layers]
        if not layers or starts[1:] != ends[:-1] or ends[-1] != 1:
            raise GGLError(
                "BigGANConfig: layers must each take what the one before gives and end with 1 "
                f"channel unit, not {[list(layer) for layer in layers]}"
            )
        if any(not 1 <= o <= i for i, o in zip(starts, ends, strict=True)):
            raise GGLError("BigGANConfig: a layer's output channels must be in [1, its input's]")
        if self.output_dim != 4 * 2 ** sum(up for up, _, _ in layers):
            raise GGLError(
                f"BigGANConfig: output_dim={self.output_dim} does not fit "
                f"{sum(up for up, _, _ in layers)} up-sampling layers from 4x4"
            )
        position = self.attention_layer_position
        within = Annotated[int, AtLeast(0, below=len(layers))]
        check("BigGANConfig: attention_layer_position", position, within)
        narrow = min(i * self.channel_width / REDUCTION for i in starts)
        if narrow < 1 or starts[position] * self.channel_width < 8:
            raise GGLError(
                f"BigGANConfig: channel_width={self.channel_width} leaves a layer without "
                "channels; it must be at least 8 to fit any layout"
            )

    @classmethod
    def read(cls, path) -> "BigGANConfig":
        """A published ``config.json``.

        Raises:
            GGLError: no such file, no JSON, unknown or missing fields, or values out of range.
        """
        with about(f"config: {path}"):
            with explaining("cannot be read", "give the config.json beside the weights"):
                fields = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.of(fields)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "BigGANConfig":
        """A config from its fields, such as those of a card.

        Raises:
            GGLError: unknown or missing fields, or values out of range.
        """
        return made(cls, fields, "BigGANConfig", "output_dim", "layers")


_HEAD = ((False, 16, 16), (True, 16, 16), (False, 16, 16), (True, 16, 8))
_MIDDLE = ((False, 8, 8), (True, 8, 8))
_TAIL = ((False, 8, 8), (True, 8, 4), (False, 4, 4), (True, 4, 2), (False, 2, 2), (True, 2, 1))

#: The published layouts by image size (tables 7 to 9 of the paper).
BIGGAN_DEEP: dict[int, BigGANConfig] = {
    128: BigGANConfig(128, (*_HEAD, *_TAIL)),
    256: BigGANConfig(256, (*_HEAD, *_MIDDLE, *_TAIL)),
    512: BigGANConfig(512, (*_HEAD, *_MIDDLE, *_TAIL, (False, 1, 1), (True, 1, 1))),
}


class _Standing(NamedTuple):
    """The stored statistics to use: ``low_weight`` of row ``low``, the rest of ``high``."""

    num: int
    low: int
    high: int
    low_weight: float
    eps: float


def _standing(config: BigGANConfig, truncation: float, fidelity: str) -> _Standing:
    num = config.n_stats
    share, low = math.modf(truncation / (1.0 / (num - 1)))
    high = min(int(low) + 1, num - 1)
    # The published code gives the nearer row the smaller weight.
    swapped = fidelity == "code" and share > 0
    return _Standing(num, int(low), high, share if swapped else 1.0 - share, config.eps)


class _Norm(nn.Module):
    """Batch norm with stored statistics: [b h w c] -> [b h w c].

    With a ``condition`` [b, d] gain and bias are linear in it (gain 1 + scale(condition)), else
    they are learnt numbers.
    """

    standing: _Standing

    @nn.compact
    def __call__(self, x, condition=None):
        c, s = x.shape[-1], self.standing
        means = self.variable("batch_stats", "means", jnp.zeros, (s.num, c)).value
        variances = self.variable("batch_stats", "vars", jnp.ones, (s.num, c)).value
        mean = s.low_weight * means[s.low] + (1.0 - s.low_weight) * means[s.high]
        variance = s.low_weight * variances[s.low] + (1.0 - s.low_weight) * variances[s.high]
        if condition is None:
            gain = self.param("scale", nn.initializers.ones_init(), (c,))
            bias = self.param("bias", nn.initializers.zeros_init(), (c,))
        else:
            gain = 1.0 + nn.Dense(c, use_bias=False, name="scale")(condition)[:, None, None]
            bias = nn.Dense(c, use_bias=False, name="offset")(condition)[:, None, None]
        gain = gain * jax.lax.rsqrt(variance + s.eps)
        return x * gain + (bias - mean * gain)


def _upsample(x):
    """Nearest neighbour, twice the size."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class _Block(nn.Module):
    """The residual block of BigGAN-deep: 1x1, 3x3, 3x3, 1x1 convolutions, a quarter as wide.

    The shortcut has no weights: it drops the last channels where there are fewer at the output,
    and up-samples by repetition.
    """

    features: int
    up_sample: bool
    standing: _Standing

    @nn.compact
    def __call__(self, x, condition):
        middle = x.shape[-1] // REDUCTION
        widths = ((middle, 1), (middle, 3), (middle, 3), (self.features, 1))
        y = x
        for i, (features, kernel) in enumerate(widths):
            y = nn.relu(_Norm(self.standing, name=f"bn_{i}")(y, condition))
            if i == 1 and self.up_sample:
                y = _upsample(y)
            y = nn.Conv(features, (kernel, kernel), name=f"conv_{i}")(y)
        shortcut = x[..., : self.features]
        return y + (_upsample(shortcut) if self.up_sample else shortcut)


class _Attention(nn.Module):
    """Self-attention over positions; keys and values are max-pooled 2x2 (Zhang et al., 2019).

    The logits are not scaled. ``gamma`` is the learnt share of the attention in the output, 0 at
    the start of training.
    """

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape

        def project(features, name):
            return nn.Conv(features, (1, 1), use_bias=False, name=name)

        def pooled(y):
            return nn.max_pool(y, (2, 2), (2, 2)).reshape(b, -1, y.shape[-1])

        theta = project(c // 8, "theta")(x).reshape(b, h * w, -1)
        phi = pooled(project(c // 8, "phi")(x))
        g = pooled(project(c // 2, "g")(x))
        weights = nn.softmax(jnp.einsum("bqc,bkc->bqk", theta, phi))
        mixed = jnp.einsum("bqk,bkc->bqc", weights, g).reshape(b, h, w, -1)
        gamma = self.param("gamma", nn.initializers.zeros_init(), ())
        return x + gamma * project(c, "o_conv")(mixed)


class Generator(nn.Module):
    """Latents [b z] and labels [b] -> images [b s s 3] in [-1, 1], s = ``config.output_dim``.

    The latent is not split: each block sees all of it, beside the class's embedding (appendix B).
    A label outside [0, num_classes) gives an image of NaN.

    Attributes:
        config: the generator's size.
        truncation: in (0, 1]; which batch norm statistics are used.
        fidelity: "paper" or "code", see :func:`biggan_deep`.
    """

    config: BigGANConfig
    truncation: float = 1.0
    fidelity: str = "paper"

    @nn.compact
    def __call__(self, latents, labels):
        config, width = self.config, self.config.channel_width
        standing = _standing(config, self.truncation, self.fidelity)
        init = nn.initializers.normal(0.02)
        table = self.param("embeddings", init, (config.num_classes, config.class_embed_dim))
        known = (labels >= 0) & (labels < config.num_classes)
        embedded = jnp.where(known[:, None], table[labels], jnp.nan)
        condition = jnp.concatenate([latents, embedded], axis=-1)
        first = config.layers[0][1] * width
        x = nn.Dense(16 * first, name="gen_z")(condition).reshape(-1, 4, 4, first)
        # the published names count the attention among the layers
        names = iter(range(len(config.layers) + 1))
        for i, (up_sample, _, features) in enumerate(config.layers):
            if i == config.attention_layer_position:
                x = _Attention(name=f"layers_{next(names)}")(x)
            block = _Block(features * width, up_sample, standing, name=f"layers_{next(names)}")
            x = block(x, condition)
        x = nn.relu(_Norm(standing, name="bn")(x))
        return jnp.tanh(nn.Conv(3, (3, 3), name="conv_to_rgb")(x))


def biggan_deep(
    config: BigGANConfig | Mapping[str, Any] = BIGGAN_DEEP[256],
    *,
    truncation: float = 1.0,
    image_size: int | None = None,
    fidelity: str = "paper",
) -> Prior:
    """BigGAN-deep as a prior over the images of each ImageNet class.

    ``apply(params, latents[b z], labels[b])`` depends on the class through the label: an attack
    passes the labels that it inferred, so the federated model's classes must be the generator's
    (ImageNet's usual order, 0 to 999). A label outside [0, num_classes) gives NaN, not another
    class's image. An image does not depend on the others of its batch.

    Args:
        config: the generator's size: one of :data:`BIGGAN_DEEP`, or a mapping with a config's
            fields.
        truncation: in (0, 1]. Latents are ``truncation`` times a standard normal truncated to
            [-2, 2], and the batch norm statistics are those measured at this truncation,
            interpolated between the stored ones. The published code of the attack uses 1.
        image_size: side of the images, at least 1: the generator's are resized to it by
            averaging areas (224 for the ImageNet models, from 256); None for the generator's own.
        fidelity: statistics at a truncation between two stored ones: "paper" interpolates
            linearly; "code" swaps the two weights, as the published PyTorch conversion does. The
            same at the stored truncations, such as 1, up to that conversion's rounding.

    Returns:
        A :class:`Prior` with ``params = {"params": ..., "batch_stats": ...}``. ``init`` gives
        random weights (an untrained prior); see :func:`from_torch` for the published ones.

    Raises:
        GGLError: an argument out of its range.

    Reference: Brock et al., 2019, appendix B and section 3.1 (truncation).
    """
    if not isinstance(config, BigGANConfig):
        config = BigGANConfig.of(config)
    if not 0 < truncation <= 1:
        raise GGLError(f"biggan_deep: truncation={truncation} must be in (0, 1]")
    check("biggan_deep: image_size", image_size, Count | None)
    check_known("biggan_deep: fidelity", fidelity, ("paper", "code"))
    generator = Generator(config, truncation, fidelity)
    size = image_size or config.output_dim

    def init(key):
        return generator.init(key, jnp.zeros((1, config.z_dim)), jnp.zeros((1,), jnp.int32))

    def apply(params, latents, labels):
        images = cast(jax.Array, generator.apply(params, latents, jnp.asarray(labels)))
        return area_resize(from_signed(images), size, size)

    def sample_latent(key, num):
        return truncation * jax.random.truncated_normal(key, -2.0, 2.0, (num, config.z_dim))

    name = f"biggan-deep-{config.output_dim}"
    shape = (size, size, 3)
    return Prior(init, apply, sample_latent, config.z_dim, shape, name, config.num_classes)


# --------------------------------------------------------------------------------------------------
# From torch
# --------------------------------------------------------------------------------------------------


def _published_name(path: TreePath) -> str:
    """E.g. layers_3/theta -> generator.layers.3.snconv1x1_theta."""
    name = ".".join(("generator", *path)).replace("layers_", "layers.")
    return re.sub(r"(?<=\.)(theta|phi|g|o_conv)$", r"snconv1x1_\1", name)


def published_layout(
    config: BigGANConfig, arrays: Mapping[str, np.ndarray] | None = None
) -> dict[str, foreign.Tensor]:
    """The tensors of the published weights of this size, and what becomes of them.

    Args:
        config: the size.
        arrays: the weights, whose spectral norms are folded in when they are converted.
    """
    layout: dict[str, foreign.Tensor] = {}

    def folded(name: str, kept: int, matrix: np.ndarray) -> np.ndarray:
        assert arrays is not None
        matrix = matrix.astype(np.float64)
        u, v = (arrays[f"{name}.weight_{s}"].astype(np.float64) for s in "uv")
        sigma = u @ matrix.reshape(len(matrix), -1) @ v
        if not np.isfinite(sigma) or sigma == 0:
            raise GGLError(f"{name}: its spectral norm u^T W v is {sigma}; fetch the file again")
        return foreign.channels_last(matrix / sigma)[..., :kept]

    known = jax.eval_shape(biggan_deep(config).init, jax.random.key(0))
    for path, leaf in flatten_dict(known).items():
        name, part = _published_name(path[1:-1]), path[-1]
        shape, last = leaf.shape, "conv_to_rgb" in path
        if part == "embeddings":
            layout["embeddings.weight"] = foreign.Tensor(shape[::-1], path)
        elif part == "kernel":
            # As many output channels as input channels; all but the first three are thrown away.
            shape = foreign.channels_first((*shape[:-1], shape[-2]) if last else shape)
            fold = functools.partial(folded, name, leaf.shape[-1])
            layout[f"{name}.weight_orig"] = foreign.Tensor(shape, path, fold)
            layout[f"{name}.weight_u"] = foreign.Tensor(shape[:1])
            layout[f"{name}.weight_v"] = foreign.Tensor((math.prod(shape[1:]),))
        elif part == "bias" and last:
            layout[f"{name}.bias"] = foreign.Tensor((config.channel_width,), path, lambda b: b[:3])
        elif part == "gamma":
            layout[f"{name}.gamma"] = foreign.Tensor((1,), path, np.squeeze)
        elif part in foreign.NAMES:
            layout[f"{name}.{foreign.NAMES[part]}"] = foreign.Tensor(shape, path)
        else:
            layout[f"{name}.running_{part}"] = foreign.Tensor(shape, path, np.asarray)
    return layout


def from_torch(state_dict_or_path, config: BigGANConfig | Mapping[str, Any]) -> dict:
    """Convert published BigGAN-deep weights to the params of ``biggan_deep(config)``.

    Spectral norm is folded into the weights: each is divided by u^T W v, with the stored u and v,
    as torch does in evaluation. Of the last convolution only the three channels that become the
    image are kept.

    Args:
        state_dict_or_path: names to arrays or tensors, or a file (see
            :func:`ggl_jax.foreign.read`), with the names of pytorch-pretrained-BigGAN.
        config: the size of the weights (:data:`BIGGAN_DEEP`, :meth:`BigGANConfig.read`).

    Returns:
        ``{"params": ..., "batch_stats": ...}``, float32.

    Raises:
        GGLError: the file cannot be read; tensors are missing, unknown or of another shape; or a
            converted weight is not finite. The message names them.
    """
    if not isinstance(config, BigGANConfig):
        config = BigGANConfig.of(config)
    arrays = foreign.read_or_take(state_dict_or_path)
    what = f"BigGAN-deep-{config.output_dim} (this config)"
    return jax.tree.map(
        jnp.asarray, foreign.convert(arrays, published_layout(config, arrays), what=what)
    )
