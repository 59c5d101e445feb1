"""Tries a user's functions, looks at what they give, and says in one line what is wrong with it."""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ggl_jax import trees
from ggl_jax.errors import GGLError, explaining, first_line
from ggl_jax.files import digest

#: What exceptions of JAX and Flax mean here, by the exception's (or a base class's) name.
_MEANINGS = {
    "TracerArrayConversionError": "it gives traced arrays to NumPy; write it in JAX (jax.numpy), "
    "or wrap it in jax.pure_callback",
    "TracerBoolConversionError": "it branches on values in Python; use jnp.where or jax.lax.cond",
    "TracerIntegerConversionError": "it uses a traced value as a Python integer; write it in JAX",
    "ConcretizationTypeError": "it needs values where only shapes are known; write it in JAX",
    "NonConcreteBooleanIndexError": "it selects entries by a mask; use jnp.where",
    "UnexpectedTracerError": "it keeps a traced value of an earlier call; make it a pure function",
    "InvalidRngError": "it draws random numbers (dropout?) without a key; switch that off, e.g. "
    "apply_kwargs={'train': False}, or give apply_kwargs={'rngs': {'dropout': jax.random.key(0)}}",
    "ModifyScopeVariableError": "it updates statistics of the batch; give "
    "apply_kwargs={'mutable': ['batch_stats']}, or switch to the running ones",
    "ScopeParamShapeError": "the variables have another shape than the module's",
    "ScopeParamNotFoundError": "the variables lack a parameter of the module",
    "ScopeCollectionNotFound": "the variables lack a collection of the module",
}

_NUMPY_RANDOM = (
    "it differs from call to call (random numbers of NumPy or Python, a state of its own), which "
    "is fixed when it is compiled, then the same for every image; use jax.random with the key"
)


def reason(error: BaseException) -> str:
    """One line of what went wrong inside a user's function: its meaning, or the exception's own."""
    for kind in type(error).__mro__:
        if kind.__name__ in _MEANINGS:
            return _MEANINGS[kind.__name__]
    text = first_line(error)
    if isinstance(error, TypeError) and "valid JAX type" in text:
        return f"it returned something that is no array ({text})"
    missing = re.search(r"missing \d+ required \S+(?: \S+)? arguments?: (.*)", text)
    if isinstance(error, TypeError) and missing:
        return (
            f"it needs more arguments ({missing[1]}); fix them in a function around it, or by "
            "apply_kwargs"
        )
    return text if isinstance(error, GGLError) else f"{type(error).__name__}: {text}"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what a user's function raises into one line.

    Raises:
        GGLError: in place of whatever was raised; one of ours passes as it is.
    """
    try:
        yield
    except GGLError:
        raise
    except Exception as error:
        raise GGLError(f"{what}: {reason(error)}") from error


def shapes(what: str, function: Callable, *arguments: Any) -> Any:
    """The shapes of a function's result.

    Args:
        what: named in errors.
        function: a user's; pure JAX.
        *arguments: pytrees of arrays or shapes.

    Raises:
        GGLError: it is no function, fails, or returns something that is no array.
    """
    if not callable(function):
        raise GGLError(f"{what}: got {brief(function)}, allowed: a function")
    with explained(what):
        return jax.eval_shape(function, *arguments)


def program(function: Callable, *arguments: Any) -> tuple[str, list[Any], Any]:
    """A function's program as text, its constants, and its result's shapes."""
    # Through a fresh wrapper, since JAX keeps what it has traced.
    traced, result = jax.make_jaxpr(lambda *given: function(*given), return_shape=True)(*arguments)
    return re.sub(r" at 0x[0-9a-f]+", "", str(traced)), list(_constants(traced)), result


def calls_back(text: str) -> bool:
    """Whether a program's text calls back into Python, so that it does not tell what it does."""
    return re.search(r"\b(pure|io)_callback\[", text) is not None


def _constants(traced: Any) -> Iterator[Any]:
    """The arrays that a traced program holds, those of its inner programs as well."""
    if isinstance(traced, ClosedJaxpr):
        yield from traced.consts
        traced = traced.jaxpr
    if isinstance(traced, Jaxpr):
        for equation in traced.eqns:
            for variable in equation.invars:
                if isinstance(variable, Literal):
                    yield np.asarray(variable.val)
            for value in equation.params.values():
                yield from _constants(value)
    elif isinstance(traced, list | tuple):
        for one in traced:
            yield from _constants(one)
    elif isinstance(traced, np.ndarray | jax.Array):
        yield traced


def check_repeats(what: str, function: Callable, *arguments: Any) -> None:
    """Refuse a function whose program is another one each time that it is traced."""
    with explained(what):
        first, second = (digest(*program(function, *arguments)[:2]) for _ in range(2))
    if first != second:
        raise GGLError(f"{what}: {_NUMPY_RANDOM}")


def ships(function: Callable, home: str) -> bool:
    """Whether a function was written in one of a package's modules (not in the package itself)."""
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").startswith(home + ".")


# --------------------------------------------------------------------------------------------------
# What they gave
# --------------------------------------------------------------------------------------------------


def brief(value: Any) -> str:
    """An argument, in few words."""
    shape = getattr(value, "shape", None)
    if shape is not None and not callable(shape):
        return f"{type(value).__name__} {tuple(shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def found_shapes(tree: Any) -> str:
    """A result's shapes, in few words."""
    if tree is None:
        return "None"
    if hasattr(tree, "shape"):
        return f"an array {tuple(tree.shape)}"
    leaves = jax.tree.leaves(tree)
    return f"a {type(tree).__name__} of {len(leaves)} array{'s' * (len(leaves) != 1)}"


def check_array(what: str, found: Any, shape: tuple, allowed: str) -> None:
    """Refuse what is no float array of a shape."""
    if not hasattr(found, "shape") or tuple(found.shape) != shape:
        raise GGLError(f"{what}: gave {found_shapes(found)}, allowed: {allowed}")
    check_floats(what, found, "cast them")


def check_floats(what: str, tree: Any, remedy: str) -> None:
    """Refuse a tree with an array of anything but floats."""
    for name, leaf in trees.named(tree).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            of = f" for {name}" if name else ""
            raise GGLError(f"{what}: gave {leaf.dtype}{of}, allowed: floats; {remedy}")


def check_like(what: str, found: Any, wanted: Any, allowed: str, *, exact: bool = True) -> None:
    """Refuse a tree of other names or shapes than the wanted one's, or, if exact, other nodes."""
    names, known = trees.named(found), trees.named(wanted)
    for name in [*(n for n in known if n not in names), *(n for n in names if n not in known)]:
        there = "has no" if name in known else "has an unknown"
        raise GGLError(f"{what}: {there} {name or 'array'}, allowed: {allowed}")
    for name, leaf in known.items():
        if jnp.shape(names[name]) != jnp.shape(leaf):
            raise GGLError(
                f"{what}: {name} has shape {jnp.shape(names[name])}, allowed: {jnp.shape(leaf)}, "
                f"{allowed}"
            )
    structures: list[Any] = [jax.tree.structure(tree) for tree in (found, wanted)]
    if exact and structures[0] != structures[1]:
        raise GGLError(
            f"{what}: is arranged otherwise ({brief(structures[0])}), allowed: {allowed}"
        )


def check_hashable(what: str, given: Any) -> None:
    """Refuse a named tuple that holds what cannot be hashed, by which programs are cached."""
    remedy = (
        "use tuples for lists, and functions that hold arrays by a closure or functools.partial"
    )
    for name, value in given._asdict().items():
        said = f"{what}: {name} is {brief(value)}, which cannot be hashed"
        with explaining(said, remedy, TypeError):
            hash(value)
