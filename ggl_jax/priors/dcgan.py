"""The 32x32 DCGAN generator and critic of the paper's CelebA experiments, and its prior.

The architecture is the CIFAR network of "Improved Training of Wasserstein GANs" (Gulrajani et
al., 2017) as the published code has it: width 128 (channels 512, 256, 128, 3). A width of 64
trains in hours on two CPU cores.
"""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ggl_jax import foreign
from ggl_jax.errors import GGLError
from ggl_jax.grammar import at_least
from ggl_jax.images import from_signed
from ggl_jax.spec import Count, check
from ggl_jax.types import Prior

IMAGE_SHAPE = (32, 32, 3)

#: The generator's layers with weights, in order.
_LAYERS = ("dense", "norm1", "up1", "norm2", "up2", "norm3", "up3")


#: Size of a class's embedding beside the latent, in a class-conditional generator.
CLASS_EMBEDDING = 32


class PixelUpsample(nn.Module):
    """A transposed convolution with a 2x2 kernel and stride 2: [b h w c] -> [b 2h 2w features].

    The kernel does not overlap itself, so every input pixel makes its own 2x2 block of output:
    one matrix product and a pixel shuffle. That is exact, and faster than a convolution on CPU.
    The kernel is stored as [c, 2, 2, features].
    """

    features: int

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", 0, (1, 2, 3))
        kernel = self.param("kernel", init, (c, 2, 2, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        blocks = (x.reshape(-1, c) @ kernel.reshape(c, -1)).reshape(b, h, w, 2, 2, self.features)
        return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.features) + bias


class StridedConv(nn.Module):
    """A 3x3 convolution with stride 2 and padding 1: [b h w c] -> [b h/2 w/2 features], h, w even.

    Written as nine strided slices and one matrix product: the second derivative that the
    gradient penalty needs is three times faster so on XLA's CPU backend than through
    ``lax.conv_general_dilated`` (65 against 200 ms per critic step, width 64, batch 64, 2 cores).
    The kernel has the usual layout [3, 3, c, features].
    """

    features: int

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [padded[:, i : i + h : 2, j : j + w : 2, :] for i in range(3) for j in range(3)]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, 9 * c)
        y = patches @ kernel.reshape(9 * c, self.features)
        return y.reshape(b, h // 2, w // 2, self.features) + bias


class Generator(nn.Module):
    """Latents [b, latent_dim] (and labels [b]) -> images [b, 32, 32, 3] in [-1, 1].

    Dense to 4x4x(4 width), batch norm over those features (one mean and variance per feature
    *and position*, as ``BatchNorm1d`` in the original), ReLU; then 2x2 stride-2 transposed
    convolutions to 2 width and width (batch norm, ReLU each) and to 3 channels with tanh. Batch
    norm follows the torch convention: epsilon 1e-5, momentum 0.1 (0.9 in Flax's terms).

    Attributes:
        width: channels before the last layer; the published code's is 128.
        latent_dim: size of the latent; the published code's is 128.
        momentum: share of the old running statistics kept at an update, in [0, 1).
        num_classes: None for an unconditional generator, which ignores labels. Else a learnt
            embedding of the label is joined to the latent (as in BigGAN); a label outside
            [0, num_classes) gives an image of NaN.
    """

    width: int = 64
    latent_dim: int = 128
    momentum: float = 0.9
    num_classes: int | None = None

    @nn.compact
    def __call__(self, latents, labels=None, train: bool = False):
        def norm(name):
            return nn.BatchNorm(
                use_running_average=not train, momentum=self.momentum, epsilon=1e-5, name=name
            )

        if self.num_classes is not None:
            init = nn.initializers.normal(1.0)
            table = self.param("embeddings", init, (self.num_classes, CLASS_EMBEDDING))
            labels = jnp.asarray(labels)
            known = (labels >= 0) & (labels < self.num_classes)
            embedded = jnp.where(known[:, None], table[labels], jnp.nan)
            latents = jnp.concatenate([latents, embedded], axis=-1)
        x = nn.Dense(16 * 4 * self.width, name="dense")(latents)
        x = nn.relu(norm("norm1")(x)).reshape(-1, 4, 4, 4 * self.width)
        x = nn.relu(norm("norm2")(PixelUpsample(2 * self.width, name="up1")(x)))
        x = nn.relu(norm("norm3")(PixelUpsample(self.width, name="up2")(x)))
        return jnp.tanh(PixelUpsample(3, name="up3")(x))


class Critic(nn.Module):
    """Images [b, 32, 32, 3] in [-1, 1] (and labels [b]) -> scores [b]; unbounded, no norm layers.

    No layer may mix the images of a batch: the gradient penalty is a property of the score of
    each image alone (Gulrajani et al., 2017, section 4).

    Attributes:
        width: channels of the first layer.
        num_classes: None for an unconditional critic. Else the score has, beside the usual term,
            the features' inner product with a learnt embedding of the label (Miyato and Koyama,
            "cGANs with Projection Discriminator", 2018).
    """

    width: int = 64
    num_classes: int | None = None

    @nn.compact
    def __call__(self, images, labels=None):
        x = images
        for i in range(3):
            x = StridedConv(self.width * 2**i, name=f"conv{i + 1}")(x)
            x = nn.leaky_relu(x, 0.2)
        features = x.reshape(x.shape[0], -1)
        score = nn.Dense(1, name="score")(features)[:, 0]
        if self.num_classes is None:
            return score
        # as large as the usual term's weights
        init = nn.initializers.normal(features.shape[1] ** -0.5)
        table = self.param("embeddings", init, (self.num_classes, features.shape[1]))
        return score + jnp.sum(table[labels] * features, axis=-1)


@functools.cache
def dcgan(*, width: int = 64, latent_dim: int = 128, num_classes: int | None = None) -> Prior:
    """The DCGAN generator as a prior over 32x32 RGB images; the same one for the same arguments.

    ``apply`` runs the generator in evaluation mode (stored batch norm statistics), so an image
    depends on its own latent only.

    Args:
        width: channels before the last layer, at least 1; the published code's is 128.
        latent_dim: size of the latent, at least 1; latents are distributed as N(0, I).
        num_classes: of a class-conditional generator, at least 1; None, as in the paper, for one
            that ignores labels.

    Returns:
        A :class:`Prior` with ``params = {"params": ..., "batch_stats": ...}``. ``init`` gives
        random weights (an untrained prior); for trained ones see :func:`load_prior`.

    Raises:
        GGLError: ``width``, ``latent_dim`` or ``num_classes`` below 1.

    Reference: the paper, section 5 (CelebA generator); Gulrajani et al., 2017.
    """
    at_least(1, width=width, latent_dim=latent_dim)
    check("num_classes", num_classes, Count | None)
    generator = Generator(width, latent_dim, num_classes=num_classes)

    def init(key):
        return generator.init(key, jnp.zeros((1, latent_dim)), jnp.zeros((1,), jnp.int32))

    def apply(params, latents, labels=None):
        images = cast(jax.Array, generator.apply(params, latents, labels))
        return from_signed(images)

    def sample_latent(key, num):
        return jax.random.normal(key, (num, latent_dim))

    return Prior(init, apply, sample_latent, latent_dim, IMAGE_SHAPE, "dcgan", num_classes)


def from_torch(state_dict_or_path) -> dict:
    """Convert the weights of the torch network of the same architecture to ``dcgan``'s params.

    For a DCGAN of another architecture see :mod:`ggl_jax.priors.convolutional`.

    Args:
        state_dict_or_path: name -> array (numpy arrays, or tensors that numpy can read), or a file
            (see :func:`ggl_jax.foreign.read`), with the entries ``<layer>.weight``, ``.bias`` and,
            for the norms, ``.running_mean``, ``.running_var``; the norms' ``num_batches_tracked``
            are ignored. Of its seven layers the first is taken as dense, the next as norm1, then
            up1, norm2, up2, norm3, up3.

    Returns:
        ``{"params": ..., "batch_stats": ...}``. Torch's (c, 4, 4) features are reordered to
        (4, 4, c), so the network's output is the same image with channels last.

    Raises:
        GGLError: not seven layers, or an entry or a shape that does not belong.
    """
    arrays = {
        name: array
        for name, array in foreign.read_or_take(state_dict_or_path).items()
        if not name.endswith(".num_batches_tracked")
    }
    found = list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))
    if len(found) != len(_LAYERS):
        raise GGLError(
            f"from_torch: found {len(found)} layers ({', '.join(found)}), needs {len(_LAYERS)}: "
            f"{', '.join(_LAYERS)}; give a generator of these, in their order"
        )
    layers = dict(zip(_LAYERS, found, strict=True))
    tree = foreign.convert(arrays, _torch_layout(arrays, layers), what="the DCGAN generator")
    return jax.tree.map(jnp.asarray, tree)


def _torch_layout(arrays, layers: dict[str, str]) -> dict[str, foreign.Tensor]:
    """Torch's tensors, with the width and latent size of these arrays, and where they go."""
    last, dense = arrays.get(f"{layers['up3']}.weight"), arrays.get(f"{layers['dense']}.weight")
    width = last.shape[0] if last is not None and last.ndim == 4 else 64
    latent_dim = dense.shape[1] if dense is not None and dense.ndim == 2 else 128
    layout: dict[str, foreign.Tensor] = {}

    def to_last(x):
        # (c, 4, 4) flattened -> (4, 4, c) flattened, along the first axis
        return np.moveaxis(x.reshape(-1, 4, 4, *x.shape[1:]), 0, 2).reshape(x.shape)

    known = jax.eval_shape(dcgan(width=width, latent_dim=latent_dim).init, jax.random.key(0))
    for path, leaf in flatten_dict(known).items():
        _, layer, part = path
        shape, change = leaf.shape, to_last if layer in ("dense", "norm1") else np.asarray
        if path[1:] == ("dense", "kernel"):
            shape, change = shape[::-1], lambda x: to_last(x).T
        elif part == "kernel":  # [in out h w] -> [in h w out]
            shape = (shape[0], shape[-1], *shape[1:-1])
            change = functools.partial(np.moveaxis, source=1, destination=-1)
        layout[f"{layers[layer]}.{foreign.NAMES[part]}"] = foreign.Tensor(shape, path, change)
    return layout
