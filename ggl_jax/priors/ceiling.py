"""The prior's ceiling: how close a prior can come to an image when shown the image itself.

Audit side only: it takes the private image. No attack that searches this prior's latent space
can be expected to do better, so leakage is judged against it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ggl_jax.errors import GGLError
from ggl_jax.types import Prior


class _FitState(NamedTuple):
    latents: jax.Array  # [n r z]
    optimizer: Any
    best_latents: jax.Array  # [n r z]
    best_error: jax.Array  # [n r]


@partial(jax.jit, static_argnames=("prior", "num", "restarts"))
def _start(prior: Prior, params, images, labels, key, *, num: int, restarts: int):
    """The `restarts` best of `num` random latents for each image, the same pool for all."""
    latents = prior.sample_latent(key, num)
    flat = images.reshape(len(images), -1)

    def errors(label):
        pool = prior.apply(params, latents, jnp.full((num,), label)).reshape(num, -1)
        # squared distance less the image's own norm, which does not change the order
        return jnp.sum(pool**2, axis=1)[None] - 2.0 * flat @ pool.T

    if labels is None:
        ranked = errors(0)
    else:
        ranked = jax.lax.map(lambda pair: errors(pair[1])[pair[0]], (jnp.arange(len(flat)), labels))
    _, best = jax.lax.top_k(-ranked, restarts)
    return latents[best]


@partial(jax.jit, static_argnames=("prior", "steps", "num"), donate_argnames=("state",))
def _advance(prior: Prior, params, images, labels, state, *, learning_rate, steps: int, num: int):
    n, r, z = state.latents.shape
    repeated = jnp.zeros((n * r,), jnp.int32) if labels is None else jnp.repeat(labels, r)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(latents):
        fitted = prior.apply(params, latents.reshape(n * r, z), repeated)
        fitted = fitted.reshape(n, r, *fitted.shape[1:])
        error = jnp.mean((fitted - images[:, None]) ** 2, axis=(2, 3, 4))
        # a sum, and Adam works entry by entry: no image or restart feels another
        return jnp.sum(error), error

    def step(_, state):
        gradient, error = jax.grad(loss, has_aux=True)(state.latents)
        better = error < state.best_error
        updates, inner = optimizer.update(gradient, state.optimizer)
        return _FitState(
            optax.apply_updates(state.latents, updates),
            inner,
            jnp.where(better[..., None], state.latents, state.best_latents),
            jnp.where(better, error, state.best_error),
        )

    return step(0, state) if num == 1 else jax.lax.fori_loop(0, num, step, state)


@partial(jax.jit, static_argnames=("prior",))
def _finish(prior: Prior, params, images, labels, state):
    """Each image's best restart, its picture and its PSNR."""
    index = jnp.argmin(state.best_error, axis=1)
    latents = jnp.take_along_axis(state.best_latents, index[:, None, None], axis=1)[:, 0]
    labels = jnp.zeros((len(images),), jnp.int32) if labels is None else labels
    fitted = prior.apply(params, latents, labels)
    psnr = -10.0 * jnp.log10(jnp.mean((fitted - images) ** 2, axis=(1, 2, 3)))
    return latents, fitted, psnr


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
    """Fits the prior's latents to known images by Adam on the mean squared pixel error.

    Each image starts from its `restarts` nearest among `num_candidates` random samples and is
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
      num_candidates: random samples to start from, at least `restarts`.
      labels: int [n], the images' classes for a class-conditional prior.

    Returns:
      `(latents [n z], fitted images [n h w c], psnr [n])`, PSNR in dB on the [0, 1] scale;
      infinite where the fit is exact. Memory grows with n * restarts and with num_candidates.

    Raises:
      GGLError: images of another shape than the prior's, or a setting out of its range.
    """
    images = jnp.asarray(images, jnp.float32)
    if images.ndim != 4 or images.shape[1:] != tuple(prior.image_shape) or not len(images):
        raise GGLError(
            f"fit_latents: images of shape {list(images.shape)}; prior {prior.name} needs "
            f"{['n', *prior.image_shape]} with n at least 1"
        )
    for name, value, low in (
        ("restarts", restarts, 1),
        ("steps", steps, 1),
        ("num_candidates", num_candidates, restarts),
    ):
        if value < low:
            raise GGLError(f"fit_latents: {name}={value} must be at least {low}")
    if not 0 < learning_rate < float("inf"):
        raise GGLError(f"fit_latents: learning_rate={learning_rate} must be above 0")
    if labels is not None:
        labels = jnp.asarray(labels, jnp.int32)
    latents = _start(prior, params, images, labels, key, num=num_candidates, restarts=restarts)
    state = _FitState(
        latents=latents,
        optimizer=optax.adam(optax.cosine_decay_schedule(learning_rate, steps)).init(latents),
        best_latents=jnp.copy(latents),
        best_error=jnp.full(latents.shape[:2], jnp.inf),
    )
    # XLA's CPU backend runs a loop's body on one thread; on accelerators the loop saves dispatch.
    # The update after the last one is only there to score the last latents.
    num = 1 if jax.default_backend() == "cpu" else steps + 1
    for _ in range((steps + 1) // num):
        state = _advance(
            prior, params, images, labels, state, learning_rate=learning_rate, steps=steps, num=num
        )
    return _finish(prior, params, images, labels, state)
