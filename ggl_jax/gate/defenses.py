"""Defenses: the client's part, the server's view, and what they make of two updates."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.errors import GGLError, printable
from ggl_jax.gate.models import image_shapes, variable_shapes
from ggl_jax.gate.trying import (
    brief,
    check_floats,
    check_hashable,
    check_like,
    check_repeats,
    explained,
    found_shapes,
    shapes,
    ships,
)
from ggl_jax.types import Context, Defense, Factored, Model, PyTree, View


def check_defense(given: Any, model: Model) -> None:
    """Refuse a defense that does not keep :class:`ggl_jax.types.Defense`'s contract."""
    if not isinstance(given, Defense):
        way = "gx.from_function(fn, name=...)" if callable(given) else "a specification's text"
        raise GGLError(
            f"defenses: got {brief(given)}, allowed: text such as 'clip:4', a ggl_jax.Defense, or "
            f"an optax transformation; make it by {way}"
        )
    if not isinstance(given.name, str) or not given.name or printable(given.name) != given.name:
        raise GGLError(f"defenses: name={given.name!r}, allowed: text of one line, not empty")
    if not isinstance(given.view, View):
        raise GGLError(
            f"defense {given.name}: view={brief(given.view)}, allowed: a ggl_jax.View; "
            "gx.from_function makes one"
        )
    check_hashable(f"defense {given.name}", given)
    for one in given.facts.stages or (given,):
        if not ships(one.apply, "ggl_jax.client.defenses"):
            _check_one(one, model)


@functools.lru_cache(maxsize=64)
def _check_one(given: Defense, model: Model) -> None:
    what = f"defense {given.name}"
    known = variable_shapes(model)
    update, label = known["params"], jax.ShapeDtypeStruct((1,), jnp.int32)

    def apply(key, update, variables, images, labels):
        return given.apply(key, update, Context(model, variables, images, labels))

    arguments = jax.random.key(0), update, known, image_shapes(model, 1), label
    found = shapes(what, apply, *arguments)
    if not isinstance(found, tuple) or len(found) != 2:
        raise GGLError(f"{what}: apply gave {found_shapes(found)}, allowed: (update, record)")
    shared, record = found
    _check_tables(f"{what}: its record", record)
    _check_update(f"{what}: the update that it gave", shared, update)
    check_floats(what, shared, "cast it back")
    _check_view(what, given.view, model, known)
    check_repeats(what, apply, *arguments)
    _check_values(given, model, apply)


def _check_update(what: str, found: Any, update: PyTree) -> None:
    check_like(what, found, update, "an update like the one it is given")


def _check_tables(what: str, found: Any) -> None:
    """Refuse what is neither a dict of arrays nor a tuple of such."""
    parts = found if isinstance(found, tuple) else (found,)
    if not all(isinstance(part, Mapping | tuple) for part in parts):
        raise GGLError(f"{what}: {found_shapes(found)}, allowed: a dict of arrays, such as {{}}")


def _check_view(what: str, view: View, model: Model, known: PyTree) -> None:
    update = known["params"]
    estimated = shapes(
        f"{what}: estimate", lambda update: view.estimate(update, model.head, noise=0.0), update
    )
    _check_tables(f"{what}: estimate gave", estimated)
    simulated = shapes(f"{what}: simulate", view.simulate, estimated, update)
    _check_update(f"{what}: simulate's result", simulated, update)
    if view.on_support is not None:
        _check_view(f"{what}: on_support", view.on_support, model, known)
    if view.noise_std is not None:
        level = shapes(f"{what}: noise_std", view.noise_std, estimated)
        if jnp.shape(level) != ():
            raise GGLError(f"{what}: noise_std gave {found_shapes(level)}, allowed: one number")
    rewire = view.rewire
    if rewire is not None:
        rewired = shapes(f"{what}: rewire", lambda e, v: rewire(e, v, model.head), estimated, known)
        check_like(f"{what}: rewire's result", rewired, known, "variables like the model's")
    factor = view.factor
    if factor is not None:
        with explained(f"{what}: factor"):
            kinds: list[Any] = []
            jax.eval_shape(lambda e: kinds.append(factor(e)), estimated)
        if not (kinds[0] is None or isinstance(kinds[0], Factored)):
            raise GGLError(
                f"{what}: factor gave {found_shapes(kinds[0])}, allowed: ggl_jax.Factored"
            )


def _check_values(given: Defense, model: Model, apply: Callable) -> None:
    """What it makes of two updates, and of two keys."""
    what = f"defense {given.name}"
    weights = jax.jit(model.init)(jax.random.key(0))
    label = jnp.zeros((1,), jnp.int32)
    run = jax.jit(lambda *arguments: apply(*arguments)[0])

    def updates(number):
        # Of many orders of magnitude, since defenses round, clip and cut off at their own.
        rng = np.random.default_rng(number)
        leaves, treedef = jax.tree.flatten(weights["params"])
        sizes = [10 ** rng.uniform(-4, 2, x.shape) * rng.choice([-1, 1], x.shape) for x in leaves]
        cast = [size.astype(x.dtype) for size, x in zip(sizes, leaves, strict=True)]
        return jax.tree.unflatten(treedef, cast)

    def shared(key, number):
        image = jax.random.uniform(jax.random.key(number), (1, *model.image_shape))
        found = run(jax.random.key(key), updates(number), weights, image, label)
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(found)]

    def same(a, b):
        return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))

    with explained(what):
        first, again, other_key, other = shared(0, 0), shared(0, 0), shared(1, 0), shared(0, 1)
    if any(np.isnan(leaf).any() for leaf in first):
        return  # a finding about these values: its cells will fail, and say so
    if not same(first, again):
        raise GGLError(f"{what}: gave two results for one key; use jax.random with the key")
    if not any(leaf.any() for leaf in first):
        raise GGLError(
            f"{what}: gave an update of zero for one that is not, so there is nothing to audit; "
            "allowed: an update that depends on the client's (one that accumulates over several "
            "rounds cannot be shown by one)"
        )
    if same(first, other):
        raise GGLError(
            f"{what}: gave the same update for two different ones, so there is nothing to audit; "
            "allowed: an update that depends on the client's"
        )
    if given.view.adds_noise and same(first, other_key):
        raise GGLError(
            f"{what}: is said to add noise, which was the same for two keys; use jax.random with "
            "the key"
        )
