"""Optax's transformations of gradients as defenses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses import from_function
from ggl_jax.errors import GGLError
from ggl_jax.types import Defense, PyTree

#: What the fields of states are called that hold a key, in optax and beside it.
_KEY_FIELDS = ("key", "rng", "rng_key", "prng_key")


def as_defense(given: Any) -> Any:
    """:func:`from_optax` of a transformation; anything else as it is."""
    return _made(given) if _is_transformation(given) else given


def _is_transformation(given: Any) -> bool:
    return all(callable(getattr(given, name, None)) for name in ("init", "update"))


def from_optax(transformation: Any, *, name: str | None = None, **options: Any) -> Defense:
    """Make a defense of an optax transformation of gradients, such as clipping or noise.

    What is shared is what the transformation makes of the client's update in its first call, with
    the state that its ``init`` gives for the model's parameters: momentum is empty, a count is 0.
    What later rounds would share is another question. A key in the state (as of
    ``optax.add_noise``) is replaced by one of the audit's for each update, or every image would
    get the same noise.

    Args:
        transformation: an ``optax.GradientTransformation``, or anything with its ``init`` and
            ``update``. Audits and sweeps take it as it is among their defenses, too.
        name: shown in results; None for that of the function that made it.
        **options: of :func:`ggl_jax.from_function`: ``simulate``, ``estimate`` and the others.
            Without ``simulate`` the attack is not adaptive. ``adds_noise`` is True by default
            where the state has a key.

    Returns:
        A :class:`Defense`.

    Raises:
        GGLError: it is no transformation. One that shares zeros in its first call (an accumulation
            over several rounds, a warm-up from 0) or wants more than the update, its state and the
            parameters is refused by the audit.

    >>> import optax
    >>> from_optax(optax.clip_by_global_norm(1.0)).name
    'clip_by_global_norm'
    """
    if not _is_transformation(transformation):
        raise GGLError(
            f"from_optax: got {type(transformation).__name__}, allowed: an optax transformation, "
            "with init and update"
        )
    made_by = getattr(transformation.update, "__qualname__", "").partition(".")[0]
    if hasattr(transformation.update, "__self__"):
        made_by = type(transformation.update.__self__).__name__
    name = name or made_by or "optax"

    def fn(key, update, context):
        params = context.variables["params"]
        state = _with_key(transformation.init(params), key)
        return transformation.update(update, state, params)[0]

    options = {"adds_noise": _holds_key(transformation), **options}
    return from_function(fn, name=name, **options)


# One defense for one object, so that programs compiled for it are found again.
@functools.lru_cache(maxsize=64)
def _made(transformation: Any) -> Defense:
    return from_optax(transformation)


def _key_places(state: PyTree) -> list[bool]:
    """Which leaves of a state are keys."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        last = path[-1] if path else None
        named = str(getattr(last, "name", getattr(last, "key", ""))) in _KEY_FIELDS
        typed = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        found.append(typed or (named and jnp.result_type(leaf) == jnp.uint32))
    return found


def _holds_key(transformation: Any) -> bool:
    try:
        return any(_key_places(transformation.init({"w": jnp.zeros((2, 2))})))
    except Exception:  # made for parameters of certain names
        return False


def _with_key(state: PyTree, key: jax.Array) -> PyTree:
    leaves, treedef = jax.tree.flatten(state)
    for number, is_key in enumerate(_key_places(state)):
        if is_key:
            own = jax.random.fold_in(key, number)
            typed = jnp.issubdtype(leaves[number].dtype, jax.dtypes.prng_key)
            leaves[number] = own if typed else jax.random.key_data(own)
    return jax.tree.unflatten(treedef, leaves)
