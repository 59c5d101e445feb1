"""The scale and sign of an update, as far as it tells them itself.

Clients may share the gradient of a loss that was summed, scaled (mixed precision) or negated (a
difference of weights). For softmax cross-entropy the last layer tells: its bias gradient is
``db = s mean_b (p_b - y_b)`` and its kernel's ``dW = s mean_b f_b (p_b - y_b)^T``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.client.gradients import client_update
from ggl_jax.client.local import shares_gradient
from ggl_jax.spec import Client
from ggl_jax.types import Public, PyTree

#: Cosine of the bias gradient and the one that the weights imply, from which they are believed.
_FITS = 0.98
#: Relative error of the scale that the last layer tells, of weights in half precision, say.
_CLOSE = 0.05


class Scale(NamedTuple):
    """What was found.

    Attributes:
        factor: s > 0, by which the update is that of a mean loss; 1.0 where nothing tells.
        source: where it was read off: "the last layer", which tells it within some per cent,
            "samples of the prior", by their updates' size, within a factor of two or so, or "".
        negated: the update looks like minus a gradient.
    """

    factor: float
    source: str
    negated: bool

    @property
    def is_off(self) -> bool:
        """Whether the factor is none that 1 could be taken for."""
        if self.source == "the last layer":
            return abs(self.factor - 1) > _CLOSE
        return not 0.2 < self.factor < 5


def read_scale(
    key: jax.Array,
    public: Public,
    update: PyTree,
    *,
    client: Client,
    undefended: bool,
    part: frozenset[str] | None = None,
) -> Scale:
    """The scale and sign of an update, from it and what the server knows.

    Args:
        key: of the samples.
        public: model, weights and prior.
        update: a pytree like ``variables["params"]``, zeros where nothing was shared.
        client: images and local steps behind it.
        undefended: no defense changed the update. Else there is nothing to compare sizes with:
            clipping, say, scales each tensor by itself.
        part: names of the tensors that were shared; None for all.

    Method: of one image and step with a bias, f = dW db / |db|^2 is the image's representation
    whatever s, the weights then give p, and s follows. The sign: one image has one negative entry
    in db, b images at most b; where two classes make that no test, the sign that explains a scale
    of 1. Else the median size of updates of 8 random samples of the prior, with random labels, is
    compared.
    """
    head = public.model.head
    kernel, bias = (
        None if x is None else np.asarray(x, np.float64) for x in trees.head_parts(update, head)
    )
    negated = _negated(bias, client.batch_size)
    if undefended and client.batch_size == 1 and shares_gradient(client) and bias is not None:
        weights, offset = trees.head_parts(public.variables["params"], head)
        assert kernel is not None
        assert offset is not None
        known = (np.asarray(weights, np.float64), np.asarray(offset, np.float64))
        factor, fit = _from_head(kernel, bias, *known)
        against, fit_against = _from_head(-kernel, -bias, *known)
        if fit < _FITS <= fit_against or (
            len(bias) == 2 and abs(factor - 1) > _CLOSE > 2 * abs(against - 1)
        ):
            return Scale(against, "the last layer", True)
        if fit >= _FITS:
            return Scale(factor, "the last layer", negated)
    if not undefended:
        return Scale(1.0, "", negated)
    return Scale(_by_samples(key, public, update, client, part), "samples of the prior", negated)


def _negated(bias: np.ndarray | None, batch_size: int) -> bool:
    """Whether more classes lose probability than there are images, and as few gain it as may lose.

    Entries of a twentieth of the largest or less, which noise could have turned, do not count.
    """
    if bias is None:
        return False
    seen = np.abs(bias) > 0.05 * np.abs(bias).max(initial=0.0)
    gain, lose = int(np.sum(seen & (bias > 0))), int(np.sum(seen & (bias < 0)))
    return lose > batch_size >= gain > 0


def _from_head(kernel, bias, weights, offset) -> tuple[float, float]:
    """The scale of one image's update, and how well it fits: the cosine of db and its like."""
    energy = bias @ bias
    if not energy or not kernel.any():
        return 1.0, 0.0
    logits = (kernel @ bias / energy) @ weights + offset
    residual = np.exp(logits - logits.max())
    residual /= residual.sum()
    residual[np.argmin(bias)] -= 1
    norm = residual @ residual
    if norm < 1e-12:  # a model that is sure of it: rounding
        return 1.0, 0.0
    return float(bias @ residual / norm), float(bias @ residual / np.sqrt(norm * energy))


def _by_samples(key, public, update, client, part) -> float:
    prior, model, num = public.prior, public.model, 8
    key_latents, key_labels = jax.random.split(key)
    labels = jax.random.randint(key_labels, (num, client.batch_size), 0, model.num_classes)
    latents = prior.sample_latent(key_latents, labels.size)

    @jax.jit
    def sizes(public_, latents, labels):
        variables, params = public_

        def size(one):
            latents, labels = one
            images = prior.apply(params, latents, labels)
            found = client_update(client, model, variables, images, labels)
            squares = trees.named(trees.sq_norms(found)).items()
            return sum(square for name, square in squares if part is None or name in part)

        return jax.lax.map(size, (latents, labels))

    latents = latents.reshape(num, client.batch_size, -1)
    found = jnp.median(sizes((public.variables, public.prior_params), latents, labels))
    own = trees.total(trees.sq_norms(update))
    return float(jnp.sqrt(own / jnp.where(found > 0, found, 1.0)))
