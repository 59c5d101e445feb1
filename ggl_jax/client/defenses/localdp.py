"""Clipping and Gaussian noise as frameworks of differential privacy put them together."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses.clip import clip
from ggl_jax.client.defenses.noise import noise
from ggl_jax.client.gradients import gradient
from ggl_jax.spec import AtLeast, Positive, Proper, ranged
from ggl_jax.types import Defense, Facts, View


def dpsgd_stages(bound: float, sigma: float) -> tuple[Defense, Defense]:
    """A clip of the whole update and noise, whose views and facts the two defenses here share."""
    return clip(bound=bound, layerwise=False), noise(sigma=sigma)


@ranged
def dpsgd(*, bound: Positive = 1.0, multiplier: Annotated[float, AtLeast(0.0)] = 1.0) -> Defense:
    """DP-SGD: clip every image's gradient, add up, add noise, divide by the number of images.

    ``(sum_i g_i min(1, C / |g_i|) + N(0, (m C)^2)) / b`` for b images: as
    ``optax.contrib.differentially_private_aggregate`` and, with ``normalize_by=b``, jax_privacy's
    ``clipped_grad`` followed by its Gaussian noise define it. The norm is that of a whole gradient.

    What the adversary learns: the noise's level and the norm that is left, as under ``clip`` (whole
    update) and ``noise``. It clips a candidate's update as a whole, which is exact for one image;
    of several the client clipped each, which no map of their mean gradient gives.

    Args:
        bound: C, finite and > 0.
        multiplier: m, the noise's standard deviation in units of C, finite and >= 0.

    Returns:
        A Defense, with factored form. It computes the gradient anew, so it must be the first stage
        of a chain, on a single gradient step. Record and estimate: a tuple of clip's and noise's.
        Its facts are those of one image: sensitivity C and noise m C, before the division by b. The
        epsilon is then that of one image of the batch, which for one image is that of the client.

    Edge cases: as clip's and noise's.

    Reference: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1; optax;
    jax_privacy. (jax_privacy also counts NaN as 0; here it stays.)
    """
    stages = dpsgd_stages(bound, bound * multiplier)

    def apply(key, update, context):
        del update

        def clipped(image, label):
            own = gradient(context.model, context.variables, image[None], label[None])
            return stages[0].apply(None, own, None)[0]

        num = len(context.images)
        each = jax.vmap(clipped)(context.images, jnp.asarray(context.labels))
        total = jax.tree.map(lambda g: jnp.sum(g, axis=0), each)
        total, _ = stages[1].apply(key, total, None)
        # What the mean of b gradients can reach, and the noise on it.
        record = {"bound": jnp.float32(bound)}, {"sigma": jnp.float32(bound * multiplier / num)}
        return jax.tree.map(lambda g: g / num, total), record

    facts = Facts(replaces_update=True, stages=stages)
    return Defense(f"dpsgd:{bound:g},multiplier={multiplier:g}", apply, dp_view("dpsgd"), facts)


def dp_view(name: str) -> View:
    """The server's side: that of a clip of the whole update, then noise."""
    from ggl_jax.client.defenses import chain  # which imports this module

    return chain(*dpsgd_stages(1.0, 1.0)).view._replace(name=name)


@ranged
def flower(
    *,
    epsilon: Positive = 1.0,
    delta: Proper = 1e-5,
    clipping_norm: Positive = 1.0,
    sensitivity: Annotated[float, AtLeast(0.0)] = 1.0,
) -> Defense:
    """Flower's local differential privacy: clip the update, add noise by the classical formula.

    ``u min(1, C / |u|) + N(0, sigma^2)`` with ``sigma = s sqrt(2 ln(1.25 / delta)) / epsilon``.
    Flower clips the difference of the weights, here the update as it is shared.

    What the adversary learns, and how it simulates it: as under ``clip`` of the whole update, then
    ``noise``.

    Args:
        epsilon: what the formula is given, finite and > 0.
        delta: 0 < delta < 1.
        clipping_norm: C, finite and > 0.
        sensitivity: s, finite and >= 0. Flower leaves it to the user; with ``s < C`` the noise is
            less than the formula needs, and the update is not (epsilon, delta)-private. The
            accountant reads C and sigma, whatever was asked for.

    Returns:
        A Defense, with factored form. Record and estimate: a tuple of clip's and noise's.

    Edge cases: the formula is proven for epsilon < 1 (Dwork and Roth 2014, theorem A.1); above, the
    accountant's epsilon may be the larger one.

    Reference: Flower (flwr), ``LocalDpMod`` and ``add_localdp_gaussian_noise_to_params``.
    """
    from ggl_jax.client.defenses import chain  # which imports this module

    sigma = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    own = chain(*dpsgd_stages(clipping_norm, sigma))
    name = f"flower:{epsilon:g},delta={delta:g},clipping_norm={clipping_norm:g}"
    name += f",sensitivity={sensitivity:g}"
    return own._replace(name=name, view=dp_view("flower"))
