"""Generators: whether their images fit the model, and what they make of two latents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.errors import GGLError
from ggl_jax.gate.trying import (
    brief,
    check_array,
    check_hashable,
    check_like,
    check_repeats,
    explained,
    shapes,
    ships,
)
from ggl_jax.grammar import at_least
from ggl_jax.types import Model, Prior, PyTree


def check_prior(given: Any, params: PyTree, model: Model) -> None:
    """Refuse a generator that is none, or whose images do not fit the model."""
    if not isinstance(given, Prior):
        raise GGLError(
            f"prior: got {brief(given)}, allowed: a name, a checkpoint's folder, or a ggl_jax.Prior"
        )
    what = f"prior {given.name}"
    check_hashable(what, given)
    if given.image_shape != model.image_shape:
        raise GGLError(
            f"prior: {given.name!r} makes images of shape {given.image_shape}, but model "
            f"{model.name!r} takes {model.image_shape}; choose a prior of that size, or attack "
            f"pixels, which needs none: prior=ggl_jax.pixels({model.image_shape})"
        )
    at_least(1, **{f"{what}: latent_dim": given.latent_dim})
    wanted = shapes(f"{what}: init", given.init, jax.random.key(0))
    if params is None and jax.tree.leaves(wanted):
        raise GGLError(
            f"prior_params: got None, allowed: the parameters of {given.name} "
            f"({len(jax.tree.leaves(wanted))} arrays, as its init gives them); give "
            "prior_params=..., or a checkpoint's folder as prior"
        )
    key, latent = jax.random.key(0), (3, given.latent_dim)
    drawn = shapes(f"{what}: sample_latent", lambda key: given.sample_latent(key, 3), key)
    check_array(f"{what}: sample_latent(key, 3)", drawn, latent, f"[3 latent_dim], {list(latent)}")
    labels = jax.ShapeDtypeStruct((3,), jnp.int32)
    latents = jax.ShapeDtypeStruct(latent, drawn.dtype)
    try:
        found = shapes(f"{what}: apply", given.apply, params, latents, labels)
    except GGLError as error:
        allowed = f"as the init of {given.name} gives them"
        check_like("prior_params", params, wanted, allowed, exact=False)
        raise error
    size = (3, *given.image_shape)
    check_array(f"{what}: apply", found, size, f"images {list(size)} for 3 latents")
    images = jax.ShapeDtypeStruct(size, jnp.float32)
    if given.denoise is not None:
        cleaned = shapes(f"{what}: denoise", given.denoise, params, images)
        check_array(f"{what}: denoise", cleaned, size, f"images {list(size)}, as it was given")
    if not ships(given.apply, "ggl_jax.priors"):
        check_repeats(f"{what}: apply", given.apply, params, latents, labels)
        _check_values(given, params)
    if given.denoise is not None and not ships(given.denoise, "ggl_jax.priors"):
        check_repeats(f"{what}: denoise", given.denoise, params, images)
        _check_cleaned(given, params)


def _check_values(given: Prior, params: PyTree) -> None:
    what = f"prior {given.name}"
    with explained(what):
        latents, again, other = (given.sample_latent(jax.random.key(n), 4) for n in (0, 0, 1))
        made = np.asarray(given.apply(params, latents, jnp.zeros((4,), jnp.int32)))
    if not np.array_equal(latents, again):
        raise GGLError(f"{what}: sample_latent gave two results for one key; use jax.random")
    if np.array_equal(latents, other) or np.array_equal(latents[0], latents[1]):
        raise GGLError(
            f"{what}: sample_latent gave the same latents twice, allowed: other ones for each key; "
            "use jax.random with the key"
        )
    if not np.all(np.isfinite(made)):
        raise GGLError(f"{what}: made NaN or infinity, allowed: [0, 1]; check prior_params")
    low, high = float(made.min()), float(made.max())
    if low < -1e-3 or high > 1 + 1e-3:
        remedy = "divide them by 255" if high > 2 else "of a tanh output return (x + 1) / 2"
        raise GGLError(
            f"{what}: made images from {low:.3g} to {high:.3g}, allowed: [0, 1]; {remedy}"
        )
    if np.array_equal(made[0], made[1]):
        raise GGLError(
            f"{what}: made the same image of two latents, so there is nothing to search; use the "
            "latents, and check prior_params"
        )


def _check_cleaned(given: Prior, params: PyTree) -> None:
    what = f"prior {given.name}: denoise"
    with explained(what):
        assert given.denoise is not None
        noisy = jax.random.uniform(jax.random.key(0), (3, *given.image_shape))
        cleaned = np.asarray(given.denoise(params, noisy))
    low, high = float(cleaned.min()), float(cleaned.max())
    # what it takes off may overshoot a little; NaN is refused, too
    if not (low >= -0.5 and high <= 1.5):
        raise GGLError(
            f"{what}: gave values from {low:.3g} to {high:.3g} for images in [0, 1], allowed: "
            "cleaner images in that range, not the noise; convert from and to the network's own"
        )
