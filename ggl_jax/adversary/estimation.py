"""What the server finds out about the client's defense, and how close that comes to the truth.

The estimators themselves belong to the defenses (``Defense.estimate``); they see the observed
update and nothing else. :func:`compare` is for the audit, which knows both sides.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ggl_jax.trees import check_finite, head_parts, names
from ggl_jax.types import Defense, Path, PyTree

__all__ = ["check_finite", "compare", "estimate", "noise_variance"]


def estimate(defense: Defense, update: PyTree, head: Path) -> dict:
    """Estimate a defense's parameters from the observed update alone.

    The adversary knows which kind of defense is in use (the paper's threat model), not its
    parameters.

    Args:
        defense: the defense; its own hyper-parameters are not looked at.
        update: the observed update, a pytree like ``variables["params"]``.
        head: ``Model.head``.

    Returns:
        The defense's dict of arrays, ready for ``defense.simulate`` and ``defense.factor``.

    Raises:
        GGLError: the update holds NaN or infinity, or has no such layer. For use inside compiled
            programs call ``defense.estimate``.

    Reference: paper (estimated clipping bound, sparsification rate, Soteria mask).
    """
    head_parts(update, head)
    check_finite(update)
    return jax.jit(defense.estimate, static_argnums=1)(update, tuple(head))


def compare(record: Mapping, estimated: Mapping) -> dict[str, float]:
    """Errors of the estimated parameters, for reports.

    Args:
        record: what the client used, from ``defense.record``.
        estimated: from ``defense.estimate``.

    Returns:
        For every scalar in both: ``"<name>_error"``, ``|estimated - true| / |true|`` (the absolute
        error where the true value is 0). For every mask: ``"mask_agreement"``, the share of its
        entries that are equal. Stages of a chain are merged; where two share a name, their keys
        carry the stage.
    """
    result: dict[str, float] = {}
    stages = {}
    for key, true in record.items():
        if key not in estimated:
            continue
        found = estimated[key]
        if key == "mask":
            result["mask_agreement"] = _agreement(true, found)
        elif isinstance(true, Mapping):
            stages[key] = compare(true, found)
        elif jnp.ndim(true) == 0:
            true, found = float(true), float(found)
            error = abs(found - true)
            result[f"{key}_error"] = error / abs(true) if true else error
    everything = [k for own in stages.values() for k in own]
    for stage, own in stages.items():
        for key, value in own.items():
            result[f"{stage}.{key}" if everything.count(key) > 1 else key] = value
    return result


def noise_variance(estimated: Mapping) -> jax.Array:
    """Variance of the noise on every entry that a defense's estimate speaks of; 0 for none.

    Args:
        estimated: from :func:`estimate`, of one defense or of a chain (its stages add up; what a
            later stage does to an earlier one's noise is not considered).
    """
    total = jnp.zeros((), jnp.float32)
    for key, value in estimated.items():
        if key == "sigma":
            total += jnp.square(value)
        elif isinstance(value, Mapping):
            total += noise_variance(value)
    return total


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
