"""Metrics: one number for two images."""

from typing import Any

import jax
import numpy as np

from ggl_jax.errors import GGLError
from ggl_jax.gate.trying import brief, explained
from ggl_jax.types import Model, PyTree


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
