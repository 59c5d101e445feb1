"""Traced programs, walked through equation by equation."""

import warnings

import jax
from jax.extend import core

#: Calls that only wrap a sub-program: their equations are visited in place.
WRAPPERS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


def walk(jaxpr, consts, arguments, visit, constant):
    """Visit a jaxpr's equations in order, those of wrapped sub-programs in place.

    Args:
        jaxpr: the program.
        consts: its constants, as ``constant`` would give them.
        arguments: its arguments, of any type that ``visit`` understands.
        visit: ``visit(equation, inputs) -> outputs``.
        constant: what stands for a constant array of the program.

    Returns:
        Its outputs.
    """
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        inner = wrapped(eqn)
        if inner is None:
            outputs = visit(eqn, values)
        else:
            body, constants = inner
            outputs = walk(body, [constant(c) for c in constants], values, visit, constant)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def wrapped(eqn):
    """The sub-program of an equation that only wraps one, and its constants; else None."""
    if eqn.primitive.name not in WRAPPERS:
        return None
    for body in (eqn.params.get("jaxpr"), eqn.params.get("call_jaxpr")):
        if isinstance(body, core.ClosedJaxpr):
            return body.jaxpr, body.consts
        if isinstance(body, core.Jaxpr):
            return body, ()
    return None


def evaluate(eqn, values) -> list:
    """The outputs of one equation, through a program of one line (the public way to do it)."""
    inputs = {
        atom: value
        for atom, value in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, core.Literal)
    }
    with warnings.catch_warnings():
        # Debug information would have to come from a private module.
        warnings.simplefilter("ignore", DeprecationWarning)
        program = core.Jaxpr((), tuple(inputs), eqn.outvars, [eqn], eqn.effects)
    return jax.core.eval_jaxpr(program, (), *inputs.values())
