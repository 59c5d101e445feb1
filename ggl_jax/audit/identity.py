"""Tells models, defenses and generators apart by what they compute, not by their names."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ggl_jax.adversary.attacks import ATTACKS
from ggl_jax.adversary.losses import DISTANCES, REGULARIZERS
from ggl_jax.adversary.optimizers import OPTIMIZERS
from ggl_jax.adversary.reconstruct import Prepared
from ggl_jax.client.defenses import DEFENSES
from ggl_jax.client.gradients import local_update
from ggl_jax.errors import GGLError
from ggl_jax.files import digest
from ggl_jax.gate.parts import problem_shapes
from ggl_jax.gate.trying import calls_back, program, reason, ships
from ggl_jax.types import Context, Defense, Model, Prior, PyTree, View

_REGISTRIES: tuple[Any, ...] = (ATTACKS, DEFENSES, DISTANCES, OPTIMIZERS, REGULARIZERS)
_SHIPPED = [dict(registry) for registry in _REGISTRIES]

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

    def refused(why: str) -> GGLError:
        return GGLError(
            f"{what}: {why}, so a folder of results could not tell it from another one; write it "
            "in JAX, or leave out the folder"
        )

    try:
        text, constants, found = program(function, *arguments)
    except Exception as error:
        raise refused(f"cannot be traced ({reason(error)})") from error
    if calls_back(text):
        raise refused("calls back into Python")
    return digest(text, constants)[:_DIGITS], found


def _shapes(model: Model) -> tuple[Any, Any, Any, Any]:
    """A key, and the shapes of a model's variables, one image and its label."""
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    return key, jax.eval_shape(model.init, key), image, jax.ShapeDtypeStruct((1,), jnp.int32)


def _digest(what: str, calls: Sequence[tuple], *more: Any) -> str:
    """A digest of functions with their arguments, those that there are, and of plain values."""
    parts = [traced(what, *call)[0] for call in calls if call[0] is not None]
    return digest(parts, *more)[:_DIGITS]


@functools.lru_cache(maxsize=64)
def model_digest(model: Model) -> str:
    """A digest of a model's initialisation, gradient and statistics."""
    key, variables, image, label = _shapes(model)
    calls = [
        (model.init, key),
        (functools.partial(local_update, model), variables, image, label),
        (model.statistics, variables, image),
    ]
    return _digest(f"model {model.name}", calls, list(model.head), model.num_classes)


@functools.lru_cache(maxsize=64)
def prior_digest(prior: Prior) -> str:
    """A digest of a generator and of its latents' law, without its parameters."""
    params = jax.eval_shape(prior.init, jax.random.key(0))
    latent = jax.ShapeDtypeStruct((1, prior.latent_dim), jnp.float32)
    image = jax.ShapeDtypeStruct((1, *prior.image_shape), jnp.float32)
    # of ours the weights tell, which are among the parameters
    own = prior.denoise is not None and not ships(prior.denoise, "ggl_jax.priors")
    calls = [
        (prior.apply, params, latent, jax.ShapeDtypeStruct((1,), jnp.int32)),
        (functools.partial(prior.sample_latent, num=1), jax.random.key(0)),
        (prior.denoise if own else None, params, image),
    ]
    return _digest(f"prior {prior.name}", calls, prior.num_classes)


@functools.lru_cache(maxsize=64)
def defense_digest(defense: Defense, model: Model) -> str:
    """A digest of a defense from both sides, as it treats this model's updates."""
    what = f"defense {defense.name}"
    key, variables, image, label = _shapes(model)
    update = variables["params"]

    def apply(key, update, variables, images, labels):
        context = Context(model, variables, images, labels)
        return defense.apply(key, update, context)

    parts = [traced(what, apply, key, update, variables, image, label)[0]]

    def add(function, *arguments):
        found, shapes = traced(what, function, *arguments)
        parts.append(found)
        return shapes

    for view in filter(None, (defense.view, defense.view.on_support)):
        estimated = add(functools.partial(view.estimate, head=model.head), update)
        add(view.simulate, estimated, update)
        if view.noise_std is not None:
            add(view.noise_std, estimated)
        rewire = view.rewire
        if rewire is not None:
            add(lambda e, v, rewire=rewire: rewire(e, v, model.head), estimated, variables)
    rounds = defense.view.rounds
    return digest(parts, defense.view.adds_noise, *([] if rounds == "mean" else [rounds]))[:_DIGITS]


def names_own(*specifications: Any) -> bool:
    """Whether a specification names a part that the user put into a registry, or a file."""
    own = {
        name
        for registry, shipped in zip(_REGISTRIES, _SHIPPED, strict=True)
        for name, part in registry.items()
        if shipped.get(name) is not part
    }
    return any(
        ".npz" in one or not own.isdisjoint(re.split(r"\W+", one))
        for one in specifications
        if isinstance(one, str)
    )


def search_digest(
    search: Prepared, model: Model, prior_params: PyTree, view: View, batch_size: int
) -> str:
    """A digest of a step of a search, with the attack, optimiser and penalties that are in it."""
    attack, key = search.stages[0].attack, jax.random.key(0)
    problem = problem_shapes(model, prior_params, view, batch_size)
    state = jax.eval_shape(attack.init, key, problem)
    return traced(f"attack {attack.name}", attack.step, key, problem, state)[0]
