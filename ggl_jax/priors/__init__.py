"""Public knowledge of what images look like: generators, their training, and their reach."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ggl_jax import checkpoint, grammar
from ggl_jax.errors import GGLError, check_known, explaining
from ggl_jax.priors.biggan import BIGGAN_DEEP, BigGANConfig, biggan_deep
from ggl_jax.priors.ceiling import fit_latents, project
from ggl_jax.priors.convolutional import convolutional
from ggl_jax.priors.dcgan import Critic, Generator, dcgan
from ggl_jax.priors.denoiser import DENOISER, with_denoiser
from ggl_jax.priors.importing import GENERATORS, import_prior
from ggl_jax.priors.pixels import pixels
from ggl_jax.priors.samples import image_grid, samples, save_grid
from ggl_jax.types import Prior

#: Priors by the name that a checkpoint's card gives as its `kind`.
PRIORS: dict[str, Callable[..., Prior]] = grammar.named(biggan_deep, convolutional, dcgan, pixels)


@functools.lru_cache(maxsize=64)
def _built(factory: Callable[..., Prior], arguments: str) -> Prior:
    """One prior for the same arguments (as JSON), so that programs compiled for it are kept."""
    return factory(**json.loads(arguments))


def load_prior(path_or_name) -> tuple[Prior, Any, dict[str, Any]]:
    """Load a trained prior.

    Args:
        path_or_name: a checkpoint's folder, or the name of one shipped with the project.

    Returns:
        ``(prior, params, card)``. The card's ``trained_on`` lists the public data sets behind the
        weights: private images from one of those were seen in training and prove nothing.

    Raises:
        GGLError: no such checkpoint, a damaged one, one that does not match its card (see
            :func:`ggl_jax.checkpoint.load`), or a card of an unknown kind of prior.
    """
    path = checkpoint.find(path_or_name)
    tree, card = checkpoint.load(path)
    kind = str(card.get("kind"))
    check_known(f"checkpoint {path}: kind", kind, PRIORS)
    with explaining(f"checkpoint {path}: its card's arguments do not fit {kind}", "fetch it again"):
        prior = _built(PRIORS[kind], json.dumps(card["arguments"], sort_keys=True))
        if DENOISER in card:
            prior = with_denoiser(prior, tuple(card[DENOISER]["arguments"]["widths"]))
        expected = jax.eval_shape(prior.init, jax.random.key(0))
    if jax.tree.map(jnp.shape, tree) != jax.tree.map(jnp.shape, expected):
        beside = f" with denoiser {card[DENOISER]['arguments']}" if DENOISER in card else ""
        raise GGLError(
            f"checkpoint {path}: its arrays are not those of {kind} {card['arguments']}{beside}; "
            "fetch it again"
        )
    return prior, jax.tree.map(jnp.asarray, tree), card
