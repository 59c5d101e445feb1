"""What the server finds out about the client's defense, and how close that comes to the truth.

The estimators themselves belong to the defenses (``View.estimate``); they see the observed
update and nothing else. :func:`compare` is for the audit, which knows both sides.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses import merged
from ggl_jax.errors import GGLError
from ggl_jax.trees import check_finite, head_parts, names
from ggl_jax.types import Path, PyTree, View


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


def check_rounds(view: View, rounds: int) -> None:
    """Raise :class:`GGLError` where several rounds' updates cannot be attacked together."""
    if rounds > 1 and view.rounds is None:
        raise GGLError(
            f"rounds: got {rounds}, allowed: 1 for {view.name}, which draws in each round what the "
            "mean of several updates does not keep; attack one round, or let noise come last"
        )


def pooled(
    view: View, update: PyTree, params: PyTree, head: Path, rounds: int
) -> tuple[PyTree, PyTree, jax.Array]:
    """What a client shared as one update, the defense's parameters, and the noise in it.

    Of several rounds at the same weights the one update is their mean. Under independent noise of
    level s nothing is lost by that: the squared distances of the R updates to any candidate's add
    up to R times that of their mean, and a constant. So what R rounds tell is what one round of
    noise ``s / sqrt(R)`` tells.

    Args:
        view: the server's side of the defense.
        update: as :class:`ggl_jax.types.Shared` has it.
        params: ``variables["params"]``.
        head: ``Model.head``.
        rounds: how many there were.

    Returns:
        ``(update, estimated, noise)``: the one update, parameters by which candidates are
        simulated (see :attr:`ggl_jax.types.View.rounds`), and :func:`noise_level` of the update.

    Raises:
        GGLError: the view has no such way, or the update is not of so many rounds.
    """
    if rounds == 1:
        estimated = estimate(view, update, head)
        return update, estimated, noise_level(view, estimated)
    check_rounds(view, rounds)
    wanted = [(rounds, *jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]
    if [jnp.shape(leaf) for leaf in jax.tree.leaves(update)] != wanted:
        raise GGLError(
            f"rounds: got {rounds}, but the update is not of so many: each leaf needs an axis of "
            "them in front; stack the rounds' updates, or give their mean and rounds=1"
        )
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), update)
    if view.rounds == "mean":
        estimated = estimate(view, mean, head)
        return mean, estimated, noise_level(view, estimated)
    each = [estimate(view, of_round(update, number), head) for number in range(rounds)]
    estimated = jax.tree.map(lambda *found: jnp.mean(jnp.stack(found), axis=0), *each)
    return mean, estimated, noise_level(view, estimated) / rounds**0.5


def of_round(update: PyTree, number: int) -> PyTree:
    """One round's update, of several."""
    return jax.tree.map(lambda leaf: leaf[number], update)


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
