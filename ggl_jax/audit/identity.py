"""Tells models, defenses and generators apart by what they compute, not by their names."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from ggl_jax.client.gradients import local_update
from ggl_jax.errors import GGLError
from ggl_jax.files import digest
from ggl_jax.types import Context, Defense, Model, Prior

#: Digits of a digest that are kept: 48 bits.
_DIGITS = 12


def traced(what: str, function: Callable, *arguments: Any) -> tuple[str, Any]:
    """A digest of the program that a function is, with its constants, and its result's shapes.

    Args:
        what: named in errors.
        function: pure JAX.
        *arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        GGLError: it cannot be traced, or calls back into Python, where nothing can be told.
    """
    try:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GGLError(
            f"{what}: cannot be traced ({reason}), so a folder of results could not tell it from "
            "another one; write it in JAX, or leave out the folder"
        ) from error
    text = re.sub(r" at 0x[0-9a-f]+", "", str(program))
    if re.search(r"\b(pure|io)_callback\[", text):
        raise GGLError(
            f"{what}: calls back into Python, so a folder of results could not tell it from "
            "another one; write it in JAX, or leave out the folder"
        )
    return digest(text, list(_constants(program)))[:_DIGITS], shapes


def _constants(program: Any) -> Iterator[Any]:
    """The arrays that a traced program holds, those of its inner programs as well."""
    if isinstance(program, jax.extend.core.ClosedJaxpr):
        yield from program.consts
        program = program.jaxpr
    if isinstance(program, jax.extend.core.Jaxpr):
        for equation in program.eqns:
            for variable in equation.invars:
                if isinstance(variable, jax.extend.core.Literal):
                    yield np.asarray(variable.val)
            for value in equation.params.values():
                yield from _constants(value)
    elif isinstance(program, list | tuple):
        for one in program:
            yield from _constants(one)
    elif isinstance(program, np.ndarray | jax.Array):
        yield program


def _shapes(model: Model) -> tuple[Any, Any, Any, Any]:
    """A key, and the shapes of a model's variables, one image and its label."""
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    return key, jax.eval_shape(model.init, key), image, jax.ShapeDtypeStruct((1,), jnp.int32)


@functools.lru_cache(maxsize=64)
def model_digest(model: Model) -> str:
    """A digest of a model's initialisation, gradient and statistics."""
    what = f"model {model.name}"
    key, variables, image, label = _shapes(model)
    parts = [
        traced(what, model.init, key)[0],
        traced(what, functools.partial(local_update, model), variables, image, label)[0],
    ]
    if model.statistics is not None:
        parts.append(traced(what, model.statistics, variables, image)[0])
    return digest(parts, list(model.head), model.num_classes)[:_DIGITS]


@functools.lru_cache(maxsize=64)
def prior_digest(prior: Prior) -> str:
    """A digest of a generator and of its latents' law, without its parameters."""
    what, key = f"prior {prior.name}", jax.random.key(0)
    params = jax.eval_shape(prior.init, key)
    latent = jax.ShapeDtypeStruct((1, prior.latent_dim), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    parts = [
        traced(what, prior.apply, params, latent, label)[0],
        traced(what, functools.partial(prior.sample_latent, num=1), key)[0],
    ]
    return digest(parts, prior.num_classes)[:_DIGITS]


@functools.lru_cache(maxsize=64)
def defense_digest(defense: Defense, model: Model) -> str:
    """A digest of a defense from both sides, as it treats this model's updates."""
    what = f"defense {defense.name}"
    key, variables, image, label = _shapes(model)
    update = variables["params"]

    def apply(key, update, variables, images, labels):
        context = Context(model, variables, images, labels)
        return defense.apply(key, update, context), defense.record(key, update, context)

    parts = [traced(what, apply, key, update, variables, image, label)[0]]

    def add(function, *arguments):
        found, shapes = traced(what, function, *arguments)
        parts.append(found)
        return shapes

    estimated = add(functools.partial(defense.estimate, head=model.head), update)
    add(defense.simulate, estimated, update)
    if defense.observe is not None:
        add(defense.observe, estimated, update)
    if defense.rewire is not None:
        add(lambda e, v: defense.rewire(e, v, model.head), estimated, variables)
    return digest(parts)[:_DIGITS]
