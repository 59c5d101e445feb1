"""One linear layer's share of every candidate's gradient, from its input and output cotangent.

With the layer's patches P [T, K] and cotangents D [T, C] of one candidate (T output positions,
K = kernel positions x input channels), its gradient is g = P^T D. What the distances need of it
can be had in two ways:

- *formed*: compute g, T K C multiplications and K C entries per candidate;
- *Gram*: ``<y, g> = sum(D * conv(a, y))``, one convolution with a kernel that all candidates share,
  and ``|g|^2 = sum((P P^T) * (D D^T))``, which needs T^2 entries in place of K C.

``P P^T`` needs no patches: it is the sum, over the kernel's positions, of shifted copies of the
input's own Gram matrix ``A A^T``, K / cin times cheaper.
"""

import itertools
import math

import jax
import jax.numpy as jnp

from ggl_jax.adversary.matching import convolve
from ggl_jax.adversary.matching.program import Layer

# Multiplications that take as long as handling one entry of a formed gradient, by backend. Two CPU
# cores: measured on ResNet-18's layers. Others: write + read over 4 TB/s against 200 TFLOP/s.
_WORK_PER_ENTRY = {"cpu": 8}
_WORK_PER_ENTRY_ELSEWHERE = 64


def input_in_order(layer: Layer, a: jax.Array) -> jax.Array:
    """A layer's inputs [n, ...] as [n, batch, *in_spatial, in_channels]."""
    a = jnp.transpose(a, (0, *(axis + 1 for axis in layer.in_order)))
    return a.reshape(a.shape[0], layer.batch, *layer.in_spatial, layer.in_channels)


def cotangent_in_order(layer: Layer, d: jax.Array) -> jax.Array:
    """Output cotangents [n, ...] as [n, batch, *out_spatial, out_channels]."""
    d = jnp.transpose(d, (0, *(axis + 1 for axis in layer.out_order)))
    return d.reshape(d.shape[0], layer.batch, *layer.out_spatial, layer.out_channels)


def kernel_in_order(layer: Layer, kernel: jax.Array) -> jax.Array:
    """An array like the kernel as [*kernel_spatial, in_channels / groups, out_channels]."""
    kernel = jnp.transpose(kernel, layer.kernel_order)
    inner = layer.in_channels // layer.groups
    return kernel.reshape(*layer.kernel_spatial, inner, layer.out_channels)


def kernel_as_stored(layer: Layer, gradient: jax.Array) -> jax.Array:
    """The inverse of :func:`kernel_in_order` for [n, *kernel_spatial, in / groups, out]."""
    shape = [layer.kernel_shape[axis] for axis in layer.kernel_order]
    gradient = gradient.reshape(gradient.shape[0], *shape)
    inverse = sorted(range(len(shape)), key=lambda axis: layer.kernel_order[axis])
    return jnp.transpose(gradient, (0, *(axis + 1 for axis in inverse)))


def _windows(layer: Layer, shape: tuple[int, ...], axes: tuple[int, ...]):
    """Slices of a padded array, one per kernel position, that lie under the outputs.

    Args:
        layer: the layer.
        shape: of the padded array.
        axes: its spatial axes, once or several times over (then all are sliced alike).
    """
    rank = len(layer.kernel_spatial)
    for offset in itertools.product(*(range(size) for size in layer.kernel_spatial)):
        window = [slice(None)] * len(shape)
        for number, axis in enumerate(axes):
            dim = number % rank
            start, stride = offset[dim] * layer.kernel_dilation[dim], layer.strides[dim]
            window[axis] = slice(start, start + (layer.out_spatial[dim] - 1) * stride + 1, stride)
        yield tuple(window)


def _padded(layer: Layer, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Pad and dilate an array's spatial axes as the layer does its input's."""
    config = [(0, 0, 0)] * x.ndim
    for number, axis in enumerate(axes):
        dim = number % len(layer.kernel_spatial)
        config[axis] = (*layer.padding[dim], layer.in_dilation[dim] - 1)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def _rows(layer: Layer, x: jax.Array) -> jax.Array:
    """[n, batch, *spatial, channels] as [n, positions, groups, channels / groups]."""
    return x.reshape(x.shape[0], -1, layer.groups, x.shape[-1] // layer.groups)


def _patches(layer: Layer, a: jax.Array) -> jax.Array:
    """P^T: [n, groups, kernel positions x in_channels / groups, positions].

    Positions come last, so that the copies run along memory and the product with the cotangents
    needs no transposition.
    """
    num, inner = a.shape[0], layer.in_channels // layer.groups
    a = a.reshape(*a.shape[:-1], layer.groups, inner)
    rank = len(layer.kernel_spatial)
    a = jnp.transpose(a, (0, rank + 2, rank + 3, *range(1, rank + 2)))
    axes = tuple(range(4, 4 + rank))
    a = _padded(layer, a, axes)
    views = [
        a[window].reshape(num, layer.groups, inner, layer.positions)
        for window in _windows(layer, a.shape, axes)
    ]
    return views[0] if len(views) == 1 else jnp.concatenate(views, axis=2)


def form(layer: Layer, a: jax.Array, d: jax.Array) -> jax.Array:
    """Every candidate's kernel gradient.

    Args:
        layer: the layer.
        a: its inputs [n, batch, *in_spatial, in_channels].
        d: its output cotangents [n, batch, *out_spatial, out_channels].

    Returns:
        [n, *kernel_spatial, in_channels / groups, out_channels].
    """
    if layer.groups == 1:
        patches = _patches(layer, a)[:, 0]
        g = jnp.einsum("nkt,nto->nko", patches, d.reshape(d.shape[0], -1, d.shape[-1]))
    else:
        g = jnp.einsum("ngkt,ntgo->nkgo", _patches(layer, a), _rows(layer, d))
    inner = layer.in_channels // layer.groups
    return g.reshape(a.shape[0], *layer.kernel_spatial, inner, layer.out_channels)


def inner_product(
    layer: Layer, a: jax.Array, d: jax.Array, y: jax.Array | convolve.Prepared
) -> jax.Array:
    """<y, g> for every candidate, without g.

    Args:
        layer: the layer.
        a: its inputs, as for :func:`form`.
        d: its output cotangents, as for :func:`form`.
        y: [*kernel_spatial, in_channels / groups, out_channels], or that from
            :func:`convolve.prepare`.

    Returns:
        [n].
    """
    merged = a.reshape(-1, *a.shape[2:])
    if isinstance(y, convolve.Prepared):
        output = convolve.convolve(layer, merged, y)
    elif layer.kernel_spatial:
        rank = len(layer.kernel_spatial)
        numbers = jax.lax.ConvDimensionNumbers(
            lhs_spec=(0, rank + 1, *range(1, rank + 1)),
            rhs_spec=(rank + 1, rank, *range(rank)),
            out_spec=(0, rank + 1, *range(1, rank + 1)),
        )
        output = jax.lax.conv_general_dilated(
            merged,
            y,
            window_strides=layer.strides,
            padding=layer.padding,
            lhs_dilation=layer.in_dilation,
            rhs_dilation=layer.kernel_dilation,
            dimension_numbers=numbers,
            feature_group_count=layer.groups,
        )
    else:
        output = merged @ y
    return jnp.sum((output.reshape(d.shape) * d).reshape(a.shape[0], -1), axis=1)


def sq_norm(layer: Layer, a: jax.Array, d: jax.Array) -> jax.Array:
    """|g|^2 for every candidate, without g, from Gram matrices [T, T].

    Args:
        layer: the layer.
        a: its inputs, as for :func:`form`.
        d: its output cotangents, as for :func:`form`.

    Returns:
        [n].
    """
    cotangents = _rows(layer, d)
    outer = jnp.einsum("ntgc,nsgc->ngts", cotangents, cotangents)
    if _shifts_grams(layer):
        rows = _rows(layer, a)
        inner = _shifted(layer, jnp.einsum("ntgi,nsgi->ngts", rows, rows))
    else:
        patches = _patches(layer, a)
        inner = jnp.einsum("ngkt,ngks->ngts", patches, patches)
    return jnp.sum((inner * outer).reshape(a.shape[0], -1), axis=1)


def pairs(layer: Layer, a: jax.Array, d: jax.Array, b: jax.Array, e: jax.Array) -> jax.Array:
    """<g, h> of every candidate's gradient g with each h of others, without either.

    Args:
        layer: the layer.
        a: the candidates' inputs, as for :func:`form`; m of them.
        d: their output cotangents, as for :func:`form`.
        b: the others' inputs; n of them.
        e: their output cotangents.

    Returns:
        [m n].
    """
    inner, outer = (
        jnp.einsum("mtgi,nsgi->mngts", _rows(layer, x), _rows(layer, y))
        for x, y in ((a, b), (d, e))
    )
    inner = _shifted(layer, inner.reshape(-1, *inner.shape[2:])).reshape(outer.shape)
    return jnp.sum(inner * outer, axis=(2, 3, 4))


def _shifted(layer: Layer, gram: jax.Array) -> jax.Array:
    """P Q^T [n, groups, T, T] as the sum of shifted copies of the inputs' products A B^T."""
    num, rank = len(gram), len(layer.kernel_spatial)
    sides = (layer.batch, *layer.in_spatial)
    gram = gram.reshape(num, layer.groups, *sides, *sides)
    axes = (*range(3, 3 + rank), *range(4 + rank, 4 + 2 * rank))
    gram = _padded(layer, gram, axes)
    total = sum(gram[window] for window in _windows(layer, gram.shape, axes))
    return total.reshape(num, layer.groups, layer.positions, layer.positions)


def _input_positions(layer: Layer) -> int:
    return layer.batch * math.prod(layer.in_spatial)


def _shifts_grams(layer: Layer) -> bool:
    """Whether P P^T is cheaper from the input's Gram matrix than from patches."""
    channels = layer.in_channels
    shifted = _input_positions(layer) ** 2 * channels
    shifted += layer.positions**2 * layer.offsets * layer.groups
    return shifted <= layer.positions**2 * layer.offsets * channels


def gram_work(layer: Layer) -> float:
    """Multiplications of :func:`sq_norm` for one candidate."""
    square = layer.positions**2
    patches = square * layer.offsets * layer.in_channels
    shifted = _input_positions(layer) ** 2 * layer.in_channels
    shifted += square * layer.offsets * layer.groups
    return min(patches, shifted) + square * layer.out_channels


def pair_work(layer: Layer) -> float:
    """Multiplications of :func:`pairs` for one pair, or what takes as long."""
    before, after = _input_positions(layer) ** 2, layer.positions**2
    moved = before + after * layer.offsets * layer.groups
    return before * layer.in_channels + after * layer.out_channels + _per_entry() * moved


def kernel_size(layer: Layer) -> int:
    """Entries of the layer's kernel."""
    return math.prod(layer.kernel_shape)


def form_bytes(layer: Layer, like: jax.Array) -> int:
    """Memory that :func:`form` takes for one candidate, shifted inputs included."""
    entries = kernel_size(layer) + layer.positions * (layer.offsets + 1) * layer.in_channels
    return entries * like.dtype.itemsize


def prefers_gram(layer: Layer) -> bool:
    """Whether the Gram form is expected to be faster than forming the gradient.

    Both multiply T K C times; the Gram form adds :func:`gram_work`, the other writes and reads
    K C entries per candidate.
    """
    return gram_work(layer) < _per_entry() * kernel_size(layer)


def _per_entry() -> int:
    return _WORK_PER_ENTRY.get(jax.default_backend(), _WORK_PER_ENTRY_ELSEWHERE)
