"""Convolutions and their derivatives spelled out for XLA's CPU backend.

Its fast code wants channels last, a kernel in the order spatial, in, out, no dilated input and an
output no larger than the input. JAX's own derivatives of a convolution are not like that: the one
for the input has a kernel with in and out exchanged (which XLA mends, but outside of loops and
conditionals only) and, behind a stride, a dilated input; the one for the kernel under ``vmap`` is a
grouped convolution. Such programs run three to five times slower. Here every derivative is written
as plain convolutions of that form, which take no longer than the layer itself.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax.adversary.matching import winograd
from ggl_jax.adversary.matching.program import Layer
from ggl_jax.trees import in_chunks


def supported(layer: Layer) -> bool:
    """Whether this module handles the layer (else JAX's own rules do)."""
    rank = len(layer.kernel_spatial)
    plain = tuple(range(rank + 2))
    return (
        rank > 0
        and layer.groups == 1
        and all(d == 1 for d in (*layer.in_dilation, *layer.kernel_dilation))
        and all(low >= 0 and high >= 0 for low, high in layer.padding)
        and layer.in_order == layer.out_order == layer.kernel_order == plain
    )


class Prepared(NamedTuple):
    """A layer's kernel in the forms that its convolutions take.

    Attributes:
        kernel: [*kernel_spatial, in_channels, out_channels].
        backward: its reversed and exchanged parts for the backward pass, one for each residue of
            the input's positions modulo the strides.
        transformed: from :func:`winograd.prepare`; None where that does not serve the layer.
    """

    kernel: jax.Array
    backward: tuple[jax.Array, ...]
    transformed: jax.Array | None


def prepare(layer: Layer, kernel: jax.Array) -> Prepared:
    """The kernel [*kernel_spatial, in_channels, out_channels] of a supported layer, prepared."""
    transformed = winograd.prepare(kernel) if _by_winograd(layer, kernel.dtype) else None
    return Prepared(kernel, _backward(layer, kernel), transformed)


def _by_winograd(layer: Layer, dtype) -> bool:
    shape = (*layer.kernel_spatial, layer.in_channels, layer.out_channels)
    return winograd.supported(shape, layer.strides, dtype)


def _backward(layer: Layer, kernel: jax.Array) -> tuple[jax.Array, ...]:
    parts = []
    for residue in itertools.product(*(range(stride) for stride in layer.strides)):
        kept = [
            range((position + low) % stride, size, stride)
            for position, (low, _), stride, size in zip(
                residue, layer.padding, layer.strides, layer.kernel_spatial, strict=True
            )
        ]
        shape = (*map(len, kept), *kernel.shape[-2:])
        blocks = [kernel[at] for at in itertools.product(*(reversed(k) for k in kept))]
        part = jnp.stack(blocks).reshape(shape) if blocks else jnp.zeros(shape, kernel.dtype)
        # Apart, copying blocks and transposing them are fast; XLA's one loop for both is not.
        parts.append(jnp.swapaxes(jax.lax.optimization_barrier(part), -1, -2))
    return tuple(parts)


def convolve(layer: Layer, inputs: jax.Array, prepared: Prepared) -> jax.Array:
    """The layer's output.

    Args:
        layer: a layer that is :func:`supported`.
        inputs: [batch *in_spatial in_channels].
        prepared: from :func:`prepare`.

    Returns:
        [batch *out_spatial out_channels]. It can be differentiated in reverse mode, any number of
        times, with respect to ``inputs`` alone.
    """
    return _linear(layer, False, inputs, prepared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(layer, transposed, x, prepared):
    if transposed:
        return _transposed(layer, x, prepared.backward, prepared.transformed)
    return _plain(layer.strides, layer.padding, None, x, prepared.kernel, prepared.transformed)


def _linear_fwd(layer, transposed, x, prepared):
    return _linear(layer, transposed, x, prepared), prepared


def _linear_bwd(layer, transposed, prepared, cotangent):
    return _linear(layer, not transposed, cotangent, prepared), None


_linear.defvjp(_linear_fwd, _linear_bwd)


def gradients_at_once(layer: Layer, dtype) -> int:
    """For how many candidates :func:`kernel_gradients` should be called at once."""
    inputs = (layer.batch, *layer.in_spatial, layer.in_channels)
    if not _gradients_by_winograd(layer, dtype):
        return 1
    channels = layer.in_channels + layer.out_channels
    return winograd.gradients_at_once(inputs, layer.padding, channels, dtype)


def _gradients_by_winograd(layer: Layer, dtype) -> bool:
    inputs = (layer.batch, *layer.in_spatial, layer.in_channels)
    return _by_winograd(layer, dtype) and winograd.prefers_gradients(inputs, layer.padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kernel_gradients(layer: Layer, a: jax.Array, d: jax.Array) -> jax.Array:
    """Every candidate's gradient with respect to the kernel.

    Without :mod:`.winograd`, a candidate's is a convolution whose batch is the layer's input
    channels, whose input channels are the layer's batch, and whose kernel is the cotangent.

    Args:
        layer: a layer that is :func:`supported`.
        a: its inputs [n batch *in_spatial in_channels].
        d: the cotangents of its outputs [n batch *out_spatial out_channels].

    Returns:
        [n in_channels *kernel_spatial out_channels]. It can be differentiated once in reverse mode.
    """
    if _gradients_by_winograd(layer, a.dtype):
        g = winograd.kernel_gradients(a, d, layer.padding)
        return jnp.moveaxis(g, -2, 1)
    rank = len(layer.strides)
    # A stride that does not divide leaves rows that belong to no kernel position.
    window = (slice(None), *(slice(0, size) for size in layer.kernel_spatial))

    def one(a, d):
        a = jnp.transpose(a[0], (rank + 1, *range(1, rank + 1), 0))
        d = jnp.transpose(d[0], (*range(1, rank + 1), 0, rank + 1))
        return _plain((1,) * rank, layer.padding, layer.strides, a, d)[window][None]

    return in_chunks(one, 1, a, d)


def _kernel_gradients_fwd(layer, a, d):
    return kernel_gradients(layer, a, d), (a, d)


def _kernel_gradients_bwd(layer, saved, cotangent):
    def one(a, d, kernel):
        prepared = prepare(layer, jnp.moveaxis(kernel[0], 0, -2))
        ours = _linear(layer, True, d[0], prepared), _linear(layer, False, a[0], prepared)
        return ours[0][None], ours[1][None]

    return in_chunks(one, 1, *saved, cotangent)


kernel_gradients.defvjp(_kernel_gradients_fwd, _kernel_gradients_bwd)


def _plain(strides, padding, kernel_dilation, x, kernel, transformed=None, exchanged=False):
    """A convolution in the order that XLA likes, also under ``vmap``.

    Where the kernel's transformed form is given, and pays, with fewer multiplications. It is that
    of the kernel reversed and exchanged where ``exchanged`` says so.
    """
    rank = len(strides)
    numbers = jax.lax.ConvDimensionNumbers(
        lhs_spec=(0, rank + 1, *range(1, rank + 1)),
        rhs_spec=(rank + 1, rank, *range(rank)),
        out_spec=(0, rank + 1, *range(1, rank + 1)),
    )

    @jax.custom_batching.custom_vmap
    def apply(x, kernel, transformed):
        if transformed is not None and winograd.pays(x.shape, padding):
            return winograd.convolve(x, transformed, padding, exchanged)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=kernel_dilation,
            dimension_numbers=numbers,
        )

    @apply.def_vmap
    def _(axis_size, in_batched, x, kernel, transformed):
        x_batched, kernel_batched, _ = in_batched
        if not kernel_batched:
            merged = apply(x.reshape(-1, *x.shape[2:]), kernel, transformed)
            return merged.reshape(axis_size, -1, *merged.shape[1:]), True
        # A kernel for each would become a grouped convolution.
        if x_batched:
            return jax.lax.map(lambda own: apply(*own), (x, kernel, transformed)), True
        return jax.lax.map(lambda own: apply(x, *own), (kernel, transformed)), True

    return apply(x, kernel, transformed)


def _transposed(layer, d, backward, transformed=None):
    """Cotangent of the inputs.

    Input position x meets output position o at the kernel's position x + low - stride * o. So the
    positions x of one residue modulo the stride meet every stride-th position of the kernel, and
    a plain convolution of d with those gives their cotangents. Where the stride divides the input's
    size, its output is no larger than d.
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
        padding = tuple((max(0, low), max(0, high)) for low, high in padding)
        trimmed = jax.lax.slice(d, start, (batch, *stop, d.shape[-1]))
        parts.append(_plain((1,) * rank, padding, None, trimmed, part, transformed, True))
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
