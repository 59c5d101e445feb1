"""Split a simulation into one function per tensor, where its program allows it.

Top-k sparsification treats every tensor by itself. Seeing that in its traced program (instead of
asking each defense to declare it) lets the matching loss form, sparsify and discard one layer at a
time, for a user's own defense just as for ours.
"""

from collections.abc import Callable

import jax

from ggl_jax.jaxprs import evaluate, walk
from ggl_jax.types import PyTree


def separate(simulate: Callable, update: PyTree) -> list[Callable] | None:
    """One function per tensor that together equal ``simulate``, or None.

    Args:
        simulate: ``simulate(update) -> update``.
        update: an update (only its shapes matter).

    Returns:
        For each leaf ``f(leaf) -> leaf``; None where a tensor's result depends on another tensor
        (global clipping, say) or on a random effect.
    """
    leaves, treedef = jax.tree.flatten(update)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    closed = jax.make_jaxpr(lambda *args: jax.tree.leaves(simulate(treedef.unflatten(args))))(
        *shapes
    )
    if closed.jaxpr.effects or len(closed.jaxpr.outvars) != len(leaves):
        return None

    # Replace every value by a node: ("input", leaf), ("const", value), or an equation's output.
    order: list[tuple] = []

    def visit(eqn, nodes):
        order.append((eqn, nodes))
        return [("output", len(order) - 1, number) for number in range(len(eqn.outvars))]

    inputs = [("input", index) for index in range(len(leaves))]
    consts = [("const", value) for value in closed.consts]
    outputs = walk(closed.jaxpr, consts, inputs, visit, lambda value: ("const", value))

    programs = []
    for leaf, root in enumerate(outputs):
        needed: set[int] = set()
        pending = [root]
        while pending:
            node = pending.pop()
            if node[0] == "input" and node[1] != leaf:
                return None
            if node[0] == "output" and node[1] not in needed:
                needed.add(node[1])
                pending.extend(order[node[1]][1])
        programs.append(_program(order, sorted(needed), root))
    return programs


def _program(order, needed, root) -> Callable:
    def apply(leaf: jax.Array) -> jax.Array:
        values: dict = {}

        def value_of(node):
            if node[0] == "input":
                return leaf
            if node[0] == "const":
                return node[1]
            return values[node[1]][node[2]]

        for number in needed:
            eqn, nodes = order[number]
            values[number] = evaluate(eqn, [value_of(node) for node in nodes])
        return value_of(root)

    return apply
