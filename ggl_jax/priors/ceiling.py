"""The prior's ceiling: how close a prior can come to an image when shown the image itself.

Shown the private image, on the audit's side, it is what no attack that searches this prior's latent
space can be expected to pass, so leakage is judged against it. Shown what an attack found, it
leaves what the prior has images like (:func:`project`).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ggl_jax.errors import GGLError
from ggl_jax.grammar import at_least
from ggl_jax.priors.decoding import check_labels, decode_each, draw, images_at_once
from ggl_jax.spec import Positive, check
from ggl_jax.trees import losses_and_gradients
from ggl_jax.types import Prior


class _FitState(NamedTuple):
    latents: jax.Array  # [m z], one row for each image and restart
    optimizer: Any
    best_latents: jax.Array  # [m z]
    best_error: jax.Array  # [m]


@jax.jit
def _relative_errors(pool, flat):
    """Squared distances [n m] of images [n p] to samples, less the images' own norms.

    The norms do not change the order.
    """
    pool = pool.reshape(len(pool), -1)
    return jnp.sum(pool**2, axis=1)[None] - 2.0 * flat @ pool.T


def _start(prior: Prior, params, images, labels, key, *, num: int, restarts: int):
    """The ``restarts`` best of ``num`` random latents for each image, the same pool for all."""
    latents = draw(prior, key, num=num)
    flat = images.reshape(len(images), -1)

    def errors(flat, label):
        parts = decode_each(prior, params, latents, label, lambda x: _relative_errors(x, flat))
        return jnp.concatenate(parts, axis=1)

    if labels is None:
        ranked = errors(flat, 0)
    else:
        ranked = jnp.concatenate([errors(flat[i : i + 1], label) for i, label in enumerate(labels)])
    _, best = jax.lax.top_k(-ranked, restarts)
    return latents[best]


@partial(jax.jit, static_argnames=("prior", "steps", "num"), donate_argnames=("state",))
def _advance(prior: Prior, params, images, labels, state, *, learning_rate, steps: int, num: int):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def errors(latents):
        fitted = prior.apply(params, latents, labels)
        return jnp.mean((fitted - images) ** 2, axis=(1, 2, 3))

    def step(_, state):
        # Adam works entry by entry: no row feels another
        error, gradient = losses_and_gradients(errors, state.latents)
        better = error < state.best_error
        updates, inner = optimizer.update(gradient, state.optimizer)
        return _FitState(
            optax.apply_updates(state.latents, updates),
            inner,
            jnp.where(better[..., None], state.latents, state.best_latents),
            jnp.where(better, error, state.best_error),
        )

    return step(0, state) if num == 1 else jax.lax.fori_loop(0, num, step, state)


def _fit_rows(prior: Prior, params, images, labels, latents, *, learning_rate, steps: int):
    """The best latents [m z] on the way from ``latents`` [m z], and their errors [m]."""
    state = _FitState(
        latents=latents,
        optimizer=optax.adam(optax.cosine_decay_schedule(learning_rate, steps)).init(latents),
        best_latents=jnp.copy(latents),
        best_error=jnp.full(len(latents), jnp.inf),
    )
    # XLA's CPU backend runs a loop's body on one thread; on accelerators the loop saves dispatch.
    # The update after the last one is only there to score the last latents.
    num = 1 if jax.default_backend() == "cpu" else steps + 1
    for _ in range((steps + 1) // num):
        state = _advance(
            prior, params, images, labels, state, learning_rate=learning_rate, steps=steps, num=num
        )
    return state.best_latents, state.best_error


@jax.jit
def _psnr(fitted, images):
    return -10.0 * jnp.log10(jnp.mean((fitted - images) ** 2, axis=(1, 2, 3)))


def fit_latents(
    prior: Prior,
    params,
    images,
    key,
    *,
    restarts: int = 4,
    steps: int = 400,
    learning_rate: float = 0.1,
    num_candidates: int = 4096,
    labels=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fit the prior's latents to known images by Adam on the mean squared pixel error.

    Each image starts from its ``restarts`` nearest among ``num_candidates`` random samples and is
    fitted on its own, with the learning rate going down to zero on a half cosine; the best
    latent met on the way is kept. Latents are not held near the prior's mass: this is the
    reach of the generator, not the likely part of it. It is a local search, so the result is a
    lower bound on the true ceiling; more restarts can only raise it.

    Args:
        prior: any prior; latents are searched without bounds.
        params: its parameters.
        images: [n h w c], float32 in [0, 1], n >= 1.
        key: typed key for the random samples.
        restarts: starting points per image, at least 1.
        steps: Adam updates, at least 1.
        learning_rate: of the first update, above 0, in units of the latent.
        num_candidates: random samples to start from, at least ``restarts``.
        labels: int [n], the images' classes for a class-conditional prior.

    Returns:
        ``(latents [n z], fitted images [n h w c], psnr [n])``, PSNR in dB on the [0, 1] scale;
        infinite where the fit is exact. What a large generator needs too much memory for at once is
        done in parts (see :mod:`ggl_jax.priors.decoding`), with the same result but for rounding.

    Raises:
        GGLError: images of another shape than the prior's, a label that it does not know, or a
            setting out of its range.
    """
    found, errors, labels = _fits(
        prior, params, images, key, restarts, steps, learning_rate, num_candidates, labels
    )
    best = jnp.argmin(errors, axis=1)
    latents = jnp.take_along_axis(found, best[:, None, None], axis=1)[:, 0]
    fitted = jnp.concatenate(decode_each(prior, params, latents, labels))
    return latents, fitted, _psnr(fitted, jnp.asarray(images, jnp.float32))


def project(
    prior: Prior,
    params,
    images,
    key,
    *,
    restarts: int = 8,
    steps: int = 100,
    num_candidates: int = 1024,
    labels=None,
) -> jax.Array:
    """What of images looks like the prior: the mean image of several fits of its latents.

    Where an image is uncertain (an attack's, under noise), every fit leaves out what the generator
    cannot draw, and their mean what they do not agree on. Arguments and errors as for
    :func:`fit_latents`, which explains the fits.

    Returns:
        [n h w c], float32.
    """
    found, _, labels = _fits(
        prior, params, images, key, restarts, steps, 0.1, num_candidates, labels
    )
    rows = found.reshape(-1, found.shape[-1])
    fitted = decode_each(prior, params, rows, jnp.repeat(labels, restarts))
    return jnp.concatenate(fitted).reshape(found.shape[:2] + tuple(prior.image_shape)).mean(1)


def _fits(prior: Prior, params, images, key, restarts, steps, learning_rate, num, labels):
    """Every restart's latents [n r z] and errors [n r], and the labels [n] that they go by."""
    images = jnp.asarray(images, jnp.float32)
    if images.ndim != 4 or images.shape[1:] != tuple(prior.image_shape) or not len(images):
        raise GGLError(
            f"fit_latents: images of shape {list(images.shape)}; prior {prior.name} needs "
            f"{['n', *prior.image_shape]} with n at least 1"
        )
    at_least(1, restarts=restarts, steps=steps)
    at_least(restarts, num_candidates=num)
    check("learning_rate", learning_rate, Positive)
    if labels is not None:
        labels = jnp.asarray(labels, jnp.int32)
        check_labels(prior, labels)
    starts = _start(prior, params, images, labels, key, num=num, restarts=restarts)
    labels = jnp.zeros(len(images), jnp.int32) if labels is None else labels
    rows = starts.reshape(-1, starts.shape[-1])
    owners = jnp.repeat(jnp.arange(len(images)), restarts)
    # parts of equal size, so that one program serves them all; the last is filled up with copies
    num_parts = math.ceil(len(rows) / images_at_once(prior, params, derivatives=True))
    size = math.ceil(len(rows) / num_parts)
    parts = []
    for first in range(0, len(rows), size):
        chosen = jnp.minimum(jnp.arange(first, first + size), len(rows) - 1)
        own = owners[chosen]
        parts.append(
            _fit_rows(
                prior,
                params,
                images[own],
                labels[own],
                rows[chosen],
                learning_rate=learning_rate,
                steps=steps,
            )
        )
    found, errors = (
        jnp.concatenate(x)[: len(rows)].reshape(starts.shape[:2] + x[0].shape[1:])
        for x in zip(*parts, strict=True)
    )
    return found, errors, labels
