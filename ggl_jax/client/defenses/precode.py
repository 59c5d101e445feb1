"""PRECODE: noise in a variational bottleneck of the model, drawn anew in each forward pass."""

import jax
import jax.numpy as jnp

from ggl_jax.client.bottleneck import NAME, size_of, with_noise
from ggl_jax.client.defenses._views import unchanged
from ggl_jax.client.gradients import gradient
from ggl_jax.errors import GGLError
from ggl_jax.spec import ranged
from ggl_jax.types import Defense, Factored, Facts, PyTree, View

#: An encoder's gradient is taken for that of one image if it has rank one up to this share of its
#: squares: float32's rounding is far below, a second image far above.
_RANK_ONE = 1e-6


@ranged
def precode() -> Defense:
    """Draw the noise of the model's variational bottleneck, for each image (``precode:resnet18``).

    What the adversary learns: of a single image, the noise itself. The encoder is a dense layer, so
    its gradient is the outer product of the features r that enter it and the slopes at its outputs:
    r is read off as the quotient of the kernel's gradient and the bias'. The slopes of the mean m
    and of s are ``g`` and ``g n softplus'(s)``, and s follows from r and the public weights, so
    their quotient tells n. Candidates' gradients are taken with that noise (``rewire``), so the
    private image's own update is met exactly. Where the encoder's gradient has not rank one
    (several images, or noise of a later stage), candidates are compared at the bottleneck's mean,
    n = 0.

    Returns:
        A Defense with factored form and an empty record. It computes the gradient anew, so it must
        be the first stage of a chain, on a single gradient step. Estimate: ``features`` r [d],
        ``slopes`` [2 size], and ``single``, 1 where both were read off, else 0.

    Raises:
        GGLError: the model has no bottleneck.

    Edge cases: where a slope of the mean is 0, so is that of s, and the noise there makes no
    difference: 0 is taken. A later stage that scales kernel and bias apart (clipping by layers)
    scales r.

    Reference: see :func:`ggl_jax.client.bottleneck.precode`; that it does not withstand an attack
    which knows it: Balunović et al. 2022, "Bayesian Framework for Gradient Leakage".
    """

    def apply(key, update, context):
        del update
        noise = jax.random.normal(key, (len(context.images), size_of(context.variables)))
        variables = with_noise(context.variables, noise)
        return gradient(context.model, variables, context.images, context.labels), {}

    return Defense("precode", apply, precode_view(), Facts(replaces_update=True))


def precode_view() -> View:
    """The server's side of :func:`precode`."""

    def estimate(update, head, noise=0.0):
        del head
        if NAME not in update:
            raise GGLError(
                "precode: the update has no bottleneck; give the model one, such as --model "
                "precode:resnet18"
            )
        kernel, slopes = (update[NAME]["encoder"][part] for part in ("kernel", "bias"))
        square = jnp.sum(jnp.square(slopes))
        features = kernel @ slopes / jnp.where(square > 0, square, 1)
        rest = jnp.sum(jnp.square(kernel - jnp.outer(features, slopes)))
        fits = rest <= _RANK_ONE * jnp.sum(jnp.square(kernel))
        single = fits & (square > 0) & (jnp.asarray(noise) <= 0)
        return {"features": features, "slopes": slopes, "single": single.astype(jnp.float32)}

    def rewire(estimated, variables, head):
        del head
        return with_noise(variables, noise_of(estimated, variables))

    return View("precode", estimate, unchanged, lambda estimated: Factored(), rewire, rounds=None)


def noise_of(estimated: dict, variables: PyTree) -> jax.Array:
    """The bottleneck's noise [1 size] behind an update, by its estimate; 0 where it is not told."""
    encoder = variables["params"][NAME]["encoder"]
    size = encoder["bias"].size // 2
    law = estimated["features"] @ encoder["kernel"][:, size:] + encoder["bias"][size:]
    of_mean, of_spread = estimated["slopes"][:size], estimated["slopes"][size:]
    slope = of_mean * jax.nn.sigmoid(law)
    told = (slope != 0) & (estimated["single"] > 0)
    return jnp.where(told, of_spread / jnp.where(slope != 0, slope, 1), 0)[None]
