"""3x3 convolutions with 2.25 times fewer multiplications, for XLA's CPU backend.

Four outputs of a 3x3 convolution, a 2x2 tile, take 36 multiplications for each pair of channels,
or 16 after the kernel and the 4x4 inputs under the tile are transformed, which costs additions
only. The 16 become matrix products, which XLA's CPU code, unlike its convolutions, always shares
out to all cores.

Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), F(2x2, 3x3).
"""

import math

import jax
import jax.numpy as jnp

from ggl_jax.trees import in_chunks

#: Fewer channels leave the transforms nothing to pay off with.
_MIN_CHANNELS = 32
#: With fewer tiles the kernel's transform takes longer than what it saves.
_MIN_TILES = 32
#: With fewer tiles the gradients' transform takes longer than what it saves.
_MIN_TILES_OF_GRADIENTS = 64
#: Of the transformed inputs alive at once: beyond the last cache level they cost more than they
#: save.
_BYTES = 12 * 2**20


def supported(kernel_shape: tuple[int, ...], strides: tuple[int, ...], dtype) -> bool:
    """Whether this module serves convolutions with a kernel [*spatial in out]."""
    return (
        kernel_shape[:-2] == (3, 3)
        and all(stride == 1 for stride in strides)
        and min(kernel_shape[-2:]) >= _MIN_CHANNELS
        and dtype in (jnp.float32, jnp.float64)
    )


def prepare(kernel: jax.Array) -> jax.Array:
    """A kernel [3 3 in out], transformed: [4 4 in out]."""
    columns = _of_kernel([kernel[:, i] for i in range(3)])
    return jnp.stack([jnp.stack(_of_kernel(column)) for column in columns], axis=1)


def prefers_gradients(shape: tuple[int, ...], padding) -> bool:
    """Whether :func:`kernel_gradients` is expected to be faster for one candidate's inputs."""
    return shape[0] * math.prod(_tiles(shape, padding)) >= _MIN_TILES_OF_GRADIENTS


def gradients_at_once(shape: tuple[int, ...], padding, channels: int, dtype) -> int:
    """Candidates for :func:`kernel_gradients` at once, given one's inputs and all channels."""
    tiles = shape[0] * math.prod(_tiles(shape, padding))
    return max(1, _BYTES // (16 * tiles * channels * jnp.dtype(dtype).itemsize))


def pays(shape: tuple[int, ...], padding) -> bool:
    """Whether :func:`convolve` is expected to be faster for inputs of this shape."""
    return shape[0] * math.prod(_tiles(shape, padding)) >= _MIN_TILES


def convolve(x: jax.Array, transformed: jax.Array, padding, exchanged: bool = False) -> jax.Array:
    """A 3x3 convolution without strides, as ``lax.conv_general_dilated``.

    Args:
        x: inputs [batch height width in].
        transformed: from :func:`prepare`, of the same dtype.
        padding: ((top, bottom), (left, right)), >= 0 each, that leaves at least one output.
        exchanged: whether the kernel is reversed in space, and its in and out exchanged, as in the
            derivative with respect to the inputs.

    Returns:
        [batch out_height out_width out]. In float32 its error is some 1e-6 of the largest output,
        about that of the plain sum.
    """
    tiles = _tiles(x.shape, padding)
    out = _out(x.shape, padding)
    kernels = transformed.reshape(16, *transformed.shape[2:])
    # Reversing a kernel exchanges the first and the last of its four transformed rows. Here the
    # inputs' rows and columns are exchanged instead, and with them the products'.
    order = (3, 1, 2, 0) if exchanged else (0, 1, 2, 3)
    product = "pmi,poi->pmo" if exchanged else "pmi,pio->pmo"

    def of_output(x):
        x = [x[i] for i in order]
        return [x[0] + x[1] + x[2], x[1] - x[2] - x[3]]

    def some(x):
        x = _of_inputs(x, padding, order)
        products = jnp.einsum(product, x.reshape(16, -1, x.shape[-1]), kernels)
        products = products.reshape(4, 4, *x.shape[2:-1], -1)
        rows = jnp.stack(of_output(products))
        both = jnp.stack(of_output([rows[:, i] for i in range(4)]), axis=4)
        # [2, batch, tiles, tiles, 2, channels]
        whole = jnp.moveaxis(both, 0, 2).reshape(-1, 2 * tiles[0], 2 * tiles[1], both.shape[-1])
        return whole[:, : out[0], : out[1]]

    size = 16 * math.prod(tiles) * x.shape[-1] * x.dtype.itemsize
    return in_chunks(some, max(1, _BYTES // size), x)


def kernel_gradients(a: jax.Array, d: jax.Array, padding) -> jax.Array:
    """Every candidate's gradient with respect to the kernel of such a convolution.

    It is the adjoint of the output as a function of the kernel, piece by piece.

    Args:
        a: inputs [n batch height width in].
        d: cotangents of the outputs [n batch out_height out_width out].
        padding: as for :func:`convolve`.

    Returns:
        [n 3 3 in out].
    """
    tiles, out = _tiles(a.shape[1:], padding), _out(a.shape[1:], padding)
    num, batch = a.shape[:2]
    positions = batch * math.prod(tiles)
    a = _of_inputs(a.reshape(-1, *a.shape[2:]), padding).reshape(16, num, positions, a.shape[-1])
    d = d.reshape(-1, *d.shape[2:])
    odd = [(0, 2 * count - size) for count, size in zip(tiles, out, strict=True)]
    d = jnp.pad(d, ((0, 0), *odd, (0, 0)))

    def of_cotangent(x):
        return jnp.stack([x[0], x[0] + x[1], x[0] - x[1], -x[1]])

    def to_kernel(x):
        half_sum, half_difference = (x[1] + x[2]) / 2, (x[1] - x[2]) / 2
        return jnp.stack([x[0] + half_sum, half_difference, half_sum + x[3]])

    rows = of_cotangent([d[:, i::2] for i in range(2)])
    columns = of_cotangent([rows[:, :, :, i::2] for i in range(2)])
    d = jnp.swapaxes(columns, 0, 1).reshape(16, num, positions, d.shape[-1])
    products = jnp.einsum("pnti,pnto->pnio", a, d)
    rows = to_kernel(products.reshape(4, 4, *products.shape[1:]))
    return jnp.moveaxis(to_kernel([rows[:, i] for i in range(4)]), (2, 1), (0, 1))


def _of_inputs(x, padding, order=(0, 1, 2, 3)):
    """Inputs [batch height width channels], transformed: [4 4 batch tiles_down tiles_across c]."""
    tiles, out = _tiles(x.shape, padding), _out(x.shape, padding)
    # Odd outputs get one row or column more, which their users drop again.
    extra = [2 * count - size for count, size in zip(tiles, out, strict=True)]
    wider = [(low, high + more) for (low, high), more in zip(padding, extra, strict=True)]
    x = jnp.pad(x, ((0, 0), *wider, (0, 0)))

    def transform(x):
        rows = [x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]]
        return [rows[i] for i in order]

    x = jnp.stack(transform([x[:, i : i + 2 * tiles[0] - 1 : 2] for i in range(4)]))
    columns = [x[:, :, :, i : i + 2 * tiles[1] - 1 : 2] for i in range(4)]
    return jnp.stack(transform(columns), axis=1)


def _out(shape, padding) -> list[int]:
    """Outputs down and across."""
    return [size + sum(pad) - 2 for size, pad in zip(shape[1:3], padding, strict=True)]


def _tiles(shape, padding) -> list[int]:
    """Tiles down and across."""
    return [(size + 1) // 2 for size in _out(shape, padding)]


def _of_kernel(k):
    return [k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]]
