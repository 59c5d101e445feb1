"""Parts that a registry names: optimisers and attacks, by one step in shapes, and metrics."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.errors import GGLError
from ggl_jax.gate.models import variable_shapes
from ggl_jax.gate.trying import (
    brief,
    check_array,
    check_like,
    check_repeats,
    explained,
    found_shapes,
    shapes,
)
from ggl_jax.grammar import at_least
from ggl_jax.types import (
    Attack,
    Candidates,
    Info,
    Loss,
    Model,
    Optimizer,
    Problem,
    Products,
    PyTree,
    View,
)


def _check_step(what: str, found: Any, state: Any) -> Info:
    """What a step reports, once it is a state like the one before and an ``Info``."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise GGLError(f"{what}: step gave {found_shapes(found)}, allowed: (state, ggl_jax.Info)")
    check_like(f"{what}: the state after a step", found[0], state, "a state like the one before")
    if not isinstance(found[1], Info):
        raise GGLError(
            f"{what}: step gave {found_shapes(found[1])} beside its state, allowed: ggl_jax.Info"
        )
    return found[1]


def least_squares(residuals: Callable) -> Loss:
    """The loss |r|^2 of ``residuals(latents[n z]) -> r[n m]``."""

    def losses(latents):
        return jnp.sum(residuals(latents) ** 2, axis=-1)

    def products(points):
        found = residuals(points.reshape(-1, points.shape[-1])).reshape(*points.shape[:2], -1)
        inner = jnp.matmul(found, found.swapaxes(1, 2), precision="highest")
        return Products(jnp.sum(found**2, axis=-1), inner, jnp.zeros(len(points)))

    return Loss(losses, products)


def check_optimizer(given: Any, name: str) -> None:
    """Refuse an optimiser that does not keep :class:`ggl_jax.types.Optimizer`'s contract."""
    what = f"optimizer {name}"
    if not isinstance(given, Optimizer):
        raise GGLError(f"{what}: its factory gave {brief(given)}, allowed: a ggl_jax.Optimizer")
    restarts, key = 2, jax.random.key(0)
    start = jax.ShapeDtypeStruct((restarts, 3), jnp.float32)
    state = shapes(f"{what}: init", given.init, key, start)

    def step(key, state):
        return given.step(key, state, least_squares(lambda latents: latents))

    info = _check_step(what, shapes(f"{what}: step", step, key, state), state)
    num = info.latents.shape[0] if getattr(info.latents, "ndim", 0) == 2 else 0
    if not num or num % restarts:
        raise GGLError(
            f"{what}: step gave latents of {found_shapes(info.latents)}, allowed: [n z], as many "
            f"for each of the {restarts} restarts"
        )
    check_array(f"{what}: the losses of a step", info.losses, (num,), f"[{num}], one a candidate")
    for part in ("evaluations", "status"):
        value = getattr(info, part)
        if jnp.shape(value) != ():
            raise GGLError(f"{what}: {part} is {found_shapes(value)}, allowed: one integer")
    with explained(f"{what}: evaluations_per_step"):
        evaluations = given.evaluations_per_step(restarts)
    at_least(0, **{f"{what}: evaluations_per_step(2)": evaluations})
    check_repeats(what, step, key, state)


def check_attack(
    given: Any, name: str, model: Model, params: PyTree, view: View, size: int
) -> None:
    """Refuse an attack of the user's that does not keep :class:`ggl_jax.types.Attack`'s contract.

    Args:
        given: what its builder gave.
        name: its name in the registry.
        model: the model.
        params: the prior's parameters.
        view: of the defense.
        size: images of an update.
    """
    what = f"attack {name}"
    if not isinstance(given, Attack):
        raise GGLError(f"{what}: its builder gave {brief(given)}, allowed: a ggl_jax.Attack")
    key, problem = jax.random.key(0), problem_shapes(model, params, view, size)
    state = shapes(f"{what}: init", given.init, key, problem)
    _check_step(what, shapes(f"{what}: step", given.step, key, problem, state), state)
    best = shapes(f"{what}: candidates", given.candidates, problem, state)
    if not isinstance(best, Candidates):
        raise GGLError(
            f"{what}: candidates gave {found_shapes(best)}, allowed: ggl_jax.types.Candidates"
        )
    restarts = best.points.shape[0] if getattr(best.points, "ndim", 0) == 2 else 0
    images = (restarts, size, *model.image_shape)
    if not restarts:
        raise GGLError(f"{what}: points are {found_shapes(best.points)}, allowed: [r p]")
    check_array(f"{what}: the images of its candidates", best.images, images, f"{list(images)}")
    for part in ("losses", "distances"):
        check_array(f"{what}: {part}", getattr(best, part), (restarts,), f"[{restarts}]")
    if jnp.shape(best.labels) != (restarts, size):
        found = found_shapes(best.labels)
        raise GGLError(f"{what}: labels are {found}, allowed: [{restarts} {size}]")
    for part in ("evaluations_per_step", "evaluations_at_start"):
        at_least(0, **{f"{what}: {part}": getattr(given, part)})


def problem_shapes(model: Model, params: PyTree, view: View, size: int) -> Problem:
    """The shapes of what an attack on an update of ``size`` images works on."""
    variables = variable_shapes(model)
    update = variables["params"]
    estimated = jax.eval_shape(functools.partial(view.estimate, head=model.head), update)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    labels: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    return Problem(update, variables, params, labels, estimated)


def check_metric(function: Any, name: str, model: Model, variables: PyTree | None) -> None:
    """Refuse a metric that gives anything but a number for two images.

    Args:
        function: the metric.
        name: its name in the registry.
        model: the federated model.
        variables: its variables; None for those of a fresh initialisation.
    """
    what = f"metric {name}"
    if not callable(function):
        raise GGLError(f"{what}: got {brief(function)}, allowed: a function")
    if variables is None:
        variables = jax.jit(model.init)(jax.random.key(0))
    one, two = jax.random.uniform(jax.random.key(0), (2, *model.image_shape))
    with explained(what):
        found = function(one, two, model, variables)
    try:
        number = np.asarray(found)
        fits = number.shape == () and np.issubdtype(number.dtype, np.number)
        fits &= not np.iscomplexobj(number)
    except Exception:
        fits = False
    if not fits:
        raise GGLError(
            f"{what}: gave {brief(found)} for two images [h w c], allowed: one real number; take "
            "the mean over axes (-3, -2, -1)"
        )
