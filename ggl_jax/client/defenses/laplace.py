"""Additive Laplace noise, and how the server finds its scale."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.client.defenses._views import add_draw, in_expectation
from ggl_jax.spec import AtLeast, ranged
from ggl_jax.types import Defense, Facts, Path, PyTree, View

#: Tensors with fewer entries are not used alone, as for Gaussian noise.
_MIN_ENTRIES = 4096


@ranged
def laplace(*, scale: Annotated[float, AtLeast(0.0)] = 0.1) -> Defense:
    """Add independent Laplace noise of density ``exp(-|x| / b) / 2 b`` to every entry.

    What the adversary learns: the scale b, see :func:`estimate_scale`. The draw is unknown, so
    candidates are compared as they are, by squared distance; the distance "likelihood"
    is that of Gaussian noise of the same standard deviation, ``b sqrt(2)``.

    Args:
        scale: b, in units of the gradient, finite and >= 0.

    Returns:
        A Defense. Record: ``scale``. Estimate: ``scale`` and ``scale_stderr``.

    Edge cases: scale 0 returns the update unchanged. The accountant of this package is that of
    Gaussian noise and gives Laplace noise no epsilon: an l1 bound on the update is needed for that.

    Reference: Dwork et al. 2006, "Calibrating Noise to Sensitivity in Private Data Analysis"; Zhu
    et al. 2019, "Deep Leakage from Gradients", tries it as a defense (section 5.1).
    """

    def apply(key, update, context):
        del context
        noisy = add_draw(update, lambda num: scale * jax.random.laplace(key, (num,)))
        return noisy, {"scale": jnp.float32(scale)}

    return Defense(f"laplace:{scale:g}", apply, laplace_view(), Facts(processes=True))


def laplace_view() -> View:
    """The server's side of :func:`laplace`."""

    def estimate(update, head, noise=0.0):
        found, stderr = estimate_scale(update, head)
        # Variances add: 2 b^2 and that of a later stage.
        own = trees.safe_sqrt(jnp.square(found) - 0.5 * jnp.square(noise))
        return {"scale": own, "scale_stderr": stderr}

    return in_expectation("laplace", estimate, lambda found: jnp.sqrt(2.0) * found["scale"])


def estimate_scale(update: PyTree, head: Path) -> tuple[jax.Array, jax.Array]:
    """The scale b of Laplace noise in an update, from the update alone.

    The same two kinds of evidence as for Gaussian noise
    (:func:`ggl_jax.client.defenses.noise.estimate_sigma`), with Laplace's law in place of the core
    of a Gaussian: the sums over classes of the last layer's gradient hold noise alone, of variance
    ``2 b^2 k``; and the median magnitude of a large tensor is ``b ln 2``, or more where signal is
    added. The lowest, after three standard errors each, is taken.

    Returns:
        ``(scale, stderr)``, float32 scalars; 0 where the class sums vanish to rounding.

    Raises:
        GGLError: the update has no such layer.
    """
    kernel, bias = trees.head_parts(update, head)
    rows = kernel if bias is None else jnp.concatenate([kernel, bias[None]])
    num_rows, num_classes = rows.shape
    found, errors = [], []
    if num_classes > 1:
        sums = jnp.sum(rows, axis=1) / np.sqrt(2 * num_classes)
        spread = jnp.sqrt(jnp.mean(jnp.square(sums)))
        rounding = 3e-6 * jnp.sqrt(jnp.mean(jnp.square(rows)))
        found.append(jnp.where(spread < rounding, 0.0, spread))
        # A sum of k has excess kurtosis 3 / k.
        errors.append(np.sqrt((2 + 3 / num_classes) / num_rows) / 2)
    for leaf in jax.tree.leaves(update):
        if leaf.size >= _MIN_ENTRIES or num_classes == 1:
            found.append(jnp.median(jnp.abs(leaf)) / np.log(2))
            errors.append(1 / (np.log(2) * np.sqrt(leaf.size)))
    spreads, relative = jnp.stack(found), jnp.asarray(errors, jnp.float32)
    best = jnp.argmin(spreads * (1 + 3 * relative))
    return spreads[best].astype(jnp.float32), (spreads * relative)[best].astype(jnp.float32)
