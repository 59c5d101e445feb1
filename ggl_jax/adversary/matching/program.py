"""Find the linear layers inside a model's traced program, and run it with taps at their outputs.

A convolution or matrix product whose kernel is one of the model's parameters, and which is that
parameter's only use, has a gradient that follows from two small arrays: the layer's input and the
cotangent of its output. Adding a zero (the tap) to the layer's output and differentiating with
respect to it gives that cotangent. Both are found in the jaxpr, so any JAX model will do: Linen,
or plain functions; padding modes, dilation, groups, nested ``jax.jit`` and ``nn.remat`` included.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from ggl_jax.client.gradients import loss_of
from ggl_jax.jaxprs import evaluate, walk
from ggl_jax.types import Model, PyTree


class Layer(NamedTuple):
    """A convolution in normal form (a matrix product is one without spatial dimensions).

    Attributes:
        batch: rows of the input that share the kernel (a candidate's images, or its tokens).
        in_spatial: spatial shape of the input; empty for a matrix product.
        out_spatial: spatial shape of the output.
        kernel_spatial: spatial shape of the kernel.
        in_channels: channels of the input, all groups together.
        out_channels: channels of the output, all groups together.
        strides: one per spatial dimension.
        padding: (low, high) per spatial dimension, possibly negative.
        in_dilation: dilation of the input (transposed convolutions).
        kernel_dilation: dilation of the kernel.
        groups: feature groups.
        in_order: axes of the input in the order batch, spatial, channels.
        out_order: axes of the output in the same order.
        kernel_order: axes of the kernel in the order spatial, in, out.
        plain_input: whether the kernel has one axis of input channels, all groups together.
        plain_output: whether it has one axis of output channels.
        kernel_shape: the parameter's own shape.
    """

    batch: int
    in_spatial: tuple[int, ...]
    out_spatial: tuple[int, ...]
    kernel_spatial: tuple[int, ...]
    in_channels: int
    out_channels: int
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    in_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    in_order: tuple[int, ...]
    out_order: tuple[int, ...]
    kernel_order: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    plain_input: bool
    plain_output: bool

    @property
    def positions(self) -> int:
        """T: output positions of one candidate."""
        return self.batch * math.prod(self.out_spatial)

    @property
    def offsets(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel_spatial)


class Site(NamedTuple):
    """Where a tappable layer stands in the program.

    Attributes:
        equation: its number in the order of visiting.
        leaf: index of its kernel among the flattened parameters.
        layer: its normal form.
        output: shape and dtype of its output.
    """

    equation: int
    leaf: int
    layer: Layer
    output: jax.ShapeDtypeStruct


class Program(NamedTuple):
    """A model's forward pass on one candidate, as a jaxpr, and its tappable layers.

    Attributes:
        jaxpr: takes the flattened parameters, the flattened other variables and the images.
        sites: tappable layers in the order of execution.
        activations: entries of all intermediate arrays together.
        loss: ``loss(logits, labels) -> scalar``, the model's.
    """

    jaxpr: core.ClosedJaxpr
    sites: tuple[Site, ...]
    activations: int
    loss: Callable


def trace(model: Model, variables: PyTree, images: jax.ShapeDtypeStruct) -> Program:
    """Trace ``model`` on one candidate's images [b h w c] and find its tappable layers."""
    params, others = split_variables(variables)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    other_shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), others
    )

    def logits_of(params, others, images):
        return model.apply({**others, "params": params}, images)[0]

    closed = jax.make_jaxpr(logits_of)(shapes, other_shapes, images)
    leaves = len(jax.tree.leaves(params))
    found: list[Site] = []
    uses = [0] * leaves
    count = 0
    activations = 0

    def visit(eqn, marks):
        nonlocal count, activations
        for leaf in marks:
            if leaf is not None:
                uses[leaf] += 1
        kernel = marks[1] if len(marks) == 2 else None
        if kernel is not None:
            layer = _layer_of(eqn)
            if layer is not None:
                aval = eqn.outvars[0].aval
                output = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
                found.append(Site(count, kernel, layer, output))
        count += 1
        activations += sum(math.prod(v.aval.shape) for v in eqn.outvars)
        return [None] * len(eqn.outvars)

    marks = [*range(leaves), *([None] * (len(closed.jaxpr.invars) - leaves))]
    outputs = walk(closed.jaxpr, [None] * len(closed.consts), marks, visit, lambda value: None)
    for leaf in outputs:
        if leaf is not None:
            uses[leaf] += 1
    sites = tuple(site for site in found if uses[site.leaf] == 1)
    return Program(closed, sites, activations, loss_of(model))


def split_variables(variables: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters, and everything else (running statistics and the like)."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return variables["params"], others


def run(program: Program, params, others, images, taps, replace=None):
    """Run the program with each site's tap added to its output.

    Args:
        program: from :func:`trace`.
        params: the flattened parameters.
        others: the other variables, a pytree.
        images: [b h w c].
        taps: one array per site, shaped like its output.
        replace: ``{site number: f(input) -> output}`` in place of the site's own equation.

    Returns:
        The logits, and each site's input.
    """
    by_equation = {site.equation: number for number, site in enumerate(program.sites)}
    inputs: list = [None] * len(program.sites)
    count = 0

    def visit(eqn, values):
        nonlocal count
        number = by_equation.get(count)
        count += 1
        if number is None:
            return evaluate(eqn, values)
        inputs[number] = values[0]
        if replace and number in replace:
            output = replace[number](values[0])
        else:
            (output,) = evaluate(eqn, values)
        return [output + taps[number]]

    arguments = [*params, *jax.tree.leaves(others), images]
    closed = program.jaxpr
    outputs = walk(closed.jaxpr, closed.consts, arguments, visit, lambda value: value)
    return outputs[0], inputs


def _layer_of(eqn) -> Layer | None:
    """The normal form of an equation whose second operand is a parameter, or None."""
    lhs, rhs = (atom.aval for atom in eqn.invars)
    out = eqn.outvars[0].aval
    if not (lhs.dtype == rhs.dtype == out.dtype):
        return None  # mixed precision rounds the gradient in ways that only the model knows
    if eqn.primitive.name == "conv_general_dilated":
        return _convolution(eqn.params, lhs.shape, rhs.shape, out.shape)
    if eqn.primitive.name == "dot_general":
        return _product(eqn.params, lhs.shape, rhs.shape, out.shape)
    return None


def _convolution(params, lhs, rhs, out) -> Layer | None:
    if params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    in_order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    out_order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    kernel_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    return Layer(
        batch=lhs[in_order[0]],
        in_spatial=tuple(lhs[axis] for axis in in_order[1:-1]),
        out_spatial=tuple(out[axis] for axis in out_order[1:-1]),
        kernel_spatial=tuple(rhs[axis] for axis in kernel_order[:-2]),
        in_channels=lhs[in_order[-1]],
        out_channels=out[out_order[-1]],
        strides=tuple(params["window_strides"]),
        padding=tuple(tuple(pair) for pair in params["padding"]),
        in_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
        in_order=in_order,
        out_order=out_order,
        kernel_order=kernel_order,
        kernel_shape=tuple(rhs),
        plain_input=params["feature_group_count"] == 1,
        plain_output=True,
    )


def _product(params, lhs, rhs, out) -> Layer | None:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    if lhs_batch or rhs_batch:
        return None
    lhs_free = tuple(axis for axis in range(len(lhs)) if axis not in lhs_contract)
    rhs_free = tuple(axis for axis in range(len(rhs)) if axis not in rhs_contract)
    return Layer(
        batch=math.prod(lhs[axis] for axis in lhs_free),
        in_spatial=(),
        out_spatial=(),
        kernel_spatial=(),
        in_channels=math.prod(lhs[axis] for axis in lhs_contract),
        out_channels=math.prod(rhs[axis] for axis in rhs_free),
        strides=(),
        padding=(),
        in_dilation=(),
        kernel_dilation=(),
        groups=1,
        in_order=(*lhs_free, *lhs_contract),
        out_order=tuple(range(len(out))),
        kernel_order=(*rhs_contract, *rhs_free),
        kernel_shape=tuple(rhs),
        plain_input=len(rhs_contract) == 1,
        plain_output=len(rhs_free) == 1,
    )
