"""A convolution whose backward pass is spelled out as plain convolutions.

XLA's CPU backend has fast code for convolutions with channels last and a kernel in the order
spatial, in, out. The derivative that JAX gives a convolution has its kernel reversed and with in
and out exchanged, and dilates the cotangent where the convolution is strided. XLA brings the
exchanged kernel in order, but only outside of loops and conditionals, and dilated inputs not at
all; what is left runs some three times slower. Here both are written as plain convolutions of
plain kernels: the kernel is reordered once, outside of the loop over chunks, and a strided
convolution's cotangent is handled as one convolution for each residue of the positions.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from ggl_jax.adversary.matching.program import Layer


def supported(layer: Layer) -> bool:
    """Whether :func:`convolve` handles the layer (else JAX's own rules do)."""
    rank = len(layer.kernel_spatial)
    return (
        rank > 0
        and layer.groups == 1
        and all(d == 1 for d in (*layer.in_dilation, *layer.kernel_dilation))
        and all(low >= 0 and high >= 0 for low, high in layer.padding)
        and layer.in_order == layer.out_order == tuple(range(rank + 2))
        and layer.kernel_order == tuple(range(rank + 2))
    )


def prepare(layer: Layer, kernel: jax.Array) -> tuple:
    """The kernel, and its reversed and exchanged parts for the backward pass.

    There is one part for each residue of the input's positions modulo the strides.
    """
    rank = len(layer.kernel_spatial)
    backward = []
    for residue in itertools.product(*(range(stride) for stride in layer.strides)):
        window = tuple(
            slice((position + low) % stride, None, stride)
            for position, (low, _), stride in zip(
                residue, layer.padding, layer.strides, strict=True
            )
        )
        part = jnp.flip(kernel[window], axis=tuple(range(rank)))
        backward.append(jnp.swapaxes(part, -1, -2))
    return kernel, tuple(backward)


def convolve(layer: Layer, inputs: jax.Array, prepared: tuple) -> jax.Array:
    """The layer's output for inputs [batch *in_spatial in_channels].

    Args:
        layer: a layer that is :func:`supported`.
        inputs: its inputs.
        prepared: from :func:`prepare`.

    Returns:
        [batch *out_spatial out_channels]. It can be differentiated in reverse mode, any number of
        times, with respect to ``inputs`` alone.
    """
    return _apply(layer, False, inputs, prepared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(layer, transposed, x, prepared):
    kernel, backward = prepared
    if transposed:
        return _transposed(layer, x, backward)
    return _plain(x, kernel, layer.strides, layer.padding)


def _apply_fwd(layer, transposed, x, prepared):
    return _apply(layer, transposed, x, prepared), prepared


def _apply_bwd(layer, transposed, prepared, cotangent):
    return _apply(layer, not transposed, cotangent, prepared), None


_apply.defvjp(_apply_fwd, _apply_bwd)


def _plain(x, kernel, strides, padding):
    rank = len(strides)
    numbers = jax.lax.ConvDimensionNumbers(
        lhs_spec=(0, rank + 1, *range(1, rank + 1)),
        rhs_spec=(rank + 1, rank, *range(rank)),
        out_spec=(0, rank + 1, *range(1, rank + 1)),
    )
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def _transposed(layer, d, backward):
    """Cotangent of the inputs.

    Input position x meets output position o at the kernel's position x + low - stride * o. So the
    positions x of one residue modulo the stride meet every stride-th position of the kernel, and
    a plain convolution of d with those gives their cotangents. Where the stride divides the input's
    size, its output is no larger than d, which XLA's fast code requires.
    """
    batch, rank = d.shape[0], len(layer.strides)
    counts = [
        math.ceil(size / stride)
        for size, stride in zip(layer.in_spatial, layer.strides, strict=True)
    ]
    residues = itertools.product(*(range(stride) for stride in layer.strides))
    parts = []
    for residue, part in zip(residues, backward, strict=True):
        if 0 in part.shape:
            parts.append(jnp.zeros((batch, *counts, layer.in_channels), d.dtype))
            continue
        padding = []
        for axis in range(rank):
            shift = (residue[axis] + layer.padding[axis][0]) // layer.strides[axis]
            low = part.shape[axis] - 1 - shift
            padding.append((low, counts[axis] + shift - d.shape[axis + 1]))
        start = (0, *(max(0, -low) for low, _ in padding), 0)
        stop = [size - max(0, -high) for size, (_, high) in zip(d.shape[1:], padding, strict=False)]
        padding = [(max(0, low), max(0, high)) for low, high in padding]
        trimmed = jax.lax.slice(d, start, (batch, *stop, d.shape[-1]))
        parts.append(_plain(trimmed, part, (1,) * rank, padding))
    if len(parts) == 1:
        return parts[0]
    # Interleave: [*strides, batch, *counts, channels] -> [batch, *(count x stride), channels].
    stacked = jnp.stack(parts).reshape(*layer.strides, batch, *counts, layer.in_channels)
    order = [rank]
    for axis in range(rank):
        order += [rank + 1 + axis, axis]
    full = [count * stride for count, stride in zip(counts, layer.strides, strict=True)]
    whole = jnp.transpose(stacked, (*order, 2 * rank + 1)).reshape(batch, *full, -1)
    limits = (batch, *layer.in_spatial, layer.in_channels)
    return jax.lax.slice(whole, (0,) * len(limits), limits)
