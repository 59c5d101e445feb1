"""What the server finds out about the client's defense, and how close that comes to the truth.

The estimators themselves belong to the defenses (``View.estimate``); they see the observed
update and nothing else. :func:`compare` is for the audit, which knows both sides.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses import merged
from ggl_jax.trees import check_finite, head_parts, names
from ggl_jax.types import Path, PyTree, View

__all__ = ["check_finite", "compare", "estimate", "noise_level"]


def estimate(view: View, update: PyTree, head: Path) -> PyTree:
    """Estimate a defense's parameters from the observed update alone.

    The adversary knows which kind of defense is in use (the paper's threat model), not its
    parameters.

    Args:
        view: the server's side of the defense, which has no parameters of the client's.
        update: the observed update, a pytree like ``variables["params"]``.
        head: ``Model.head``.

    Returns:
        A dict of arrays, or a tuple of them for a chain, ready for ``view.simulate``.

    Raises:
        GGLError: the update holds NaN or infinity, or has no such layer. For use inside compiled
            programs call ``view.estimate``.

    Reference: paper (estimated clipping bound, sparsification rate, Soteria mask).
    """
    head_parts(update, head)
    check_finite(update)
    return jax.jit(view.estimate, static_argnums=1)(update, tuple(head))


def noise_level(view: View, estimated: PyTree) -> jax.Array:
    """Estimated standard deviation of noise on every entry of the update; 0 for none."""
    level = 0.0 if view.noise_std is None else view.noise_std(estimated)
    return jnp.asarray(level, jnp.float32)


def compare(record: Mapping | tuple, estimated: Mapping | tuple) -> dict[str, float]:
    """Errors of the estimated parameters, for reports.

    Args:
        record: what the client used, from ``defense.apply``.
        estimated: from :func:`estimate`.

    Returns:
        For every scalar in both: ``"<name>_error"``, ``|estimated - true| / |true|`` (the absolute
        error where the true value is 0). For every mask: ``"mask_agreement"``, the share of its
        entries that are equal. Stages of a chain are merged; where two share a name, their keys
        carry the stage's number.
    """
    if isinstance(record, tuple):
        return merged([compare(*own) for own in zip(record, estimated, strict=True)])
    result: dict[str, float] = {}
    for key, true in record.items():
        if key not in estimated:
            continue
        found = estimated[key]
        if key == "mask":
            result["mask_agreement"] = _agreement(true, found)
        elif jnp.ndim(true) == 0:
            true, found = float(true), float(found)
            error = abs(found - true)
            result[f"{key}_error"] = error / abs(true) if true else error
    return result


def _agreement(true: PyTree, found: PyTree) -> float:
    """Share of equal entries in the leaves that mask anything (the rest are scalars)."""
    if names(true) != names(found):
        raise ValueError("masks of different updates cannot be compared")
    equal = count = 0
    for a, b in zip(jax.tree.leaves(true), jax.tree.leaves(found), strict=True):
        if jnp.ndim(a):
            equal += int(jnp.sum((a != 0) == (b != 0)))
            count += jnp.size(a)
    return equal / count if count else 1.0
