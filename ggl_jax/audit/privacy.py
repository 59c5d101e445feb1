"""Differential privacy of a defense: the epsilon of a clip followed by Gaussian noise.

What is protected is a client, in the local model: the server sees each client's defended update in
each round, as in an audit, and not the mean alone. Epsilon bounds what *any* attack can learn from
all of these updates; the audit's leakage is what one attack did learn from one of them, or from as
many as its clients' ``rounds``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ggl_jax.client.defenses import stages_of
from ggl_jax.errors import GGLError, check_known
from ggl_jax.grammar import at_least
from ggl_jax.spec import Positive, Proper, check
from ggl_jax.types import Defense, Facts

#: Two neighbouring inputs differ in a client's contribution: "add_remove": the update is there, or
#: is zero (its l2 sensitivity is the norm's bound); "replace": it is another one (twice that).
ADJACENCIES = {"add_remove": 1.0, "replace": 2.0}

#: How the accountant is had.
REMEDY = "pip install 'ggl-jax[privacy]'"


class Mechanism(NamedTuple):
    """A defense as a Gaussian mechanism.

    Attributes:
        bound: largest l2 norm of a client's whole update before the noise; infinite where none is
            known.
        sigma: standard deviation of the Gaussian noise on every entry of a client's update; 0
            without.
        reason: why there is no finite epsilon, in a few words; empty where there is one.
    """

    bound: float
    sigma: float
    reason: str


def mechanism(defense: Defense, num_tensors: int) -> Mechanism:
    """Read a defense as a clip, then Gaussian noise.

    ``clip`` layer by layer bounds each of the update's L tensors by S, so the whole update by
    ``S sqrt(L)``; of the whole update, that by S. Of several clips the
    tightest bound counts. Sparsification and Soteria's masks between clip and noise do not raise
    the norm. What follows the noise is free if it looks at the noisy update alone (clip,
    sparsification, more noise); noise that follows noise directly adds to it in variance.

    Args:
        defense: of :mod:`ggl_jax.client.defenses`, or your own.
        num_tensors: L, the number of tensors in an update.

    Returns:
        A :class:`Mechanism`. Without a finite epsilon are: no Gaussian noise at all; noise without
        a clip before it, whose sensitivity is unbounded; Soteria after the noise, whose mask comes
        from the private image; a stage of your own between the clip and the noise or after it, of
        which its :class:`ggl_jax.types.Facts` say nothing.
    """
    bound, unknown, noise_seen = math.inf, "", False
    stages = tuple(stages_of(defense))
    for number, stage in enumerate(stages):
        facts = stage.facts
        noise_seen |= bool(facts.gaussian)
        if facts.gaussian and math.isfinite(bound):
            sigma, again = noise_from(stages[number:])
            if again:
                why = f"{again} after the noise may look at the private image again"
                return Mechanism(math.inf, sigma, why)
            return Mechanism(bound, sigma, "")
        if facts.gaussian is not None:
            continue
        if facts.l2_bound is not None:
            bound = min(bound, float(facts.l2_bound(num_tensors)))
        elif not facts.shrinks:
            bound = math.inf
            if not facts.replaces_update:
                unknown = f"{stage.name} is neither a clip nor Gaussian noise that is known"
    if unknown:
        return Mechanism(bound, 0.0, unknown)
    if noise_seen and math.isinf(bound):
        return Mechanism(bound, 0.0, "noise without a clip before it")
    return Mechanism(bound, 0.0, "no Gaussian noise after a clip" if noise_seen else "no noise")


def noise_from(stages: Sequence[Defense]) -> tuple[float, str]:
    """The Gaussian noise of stages of which the first adds some.

    Returns:
        Its standard deviation (noise that follows noise directly adds to it in variance), and the
        name of a stage after it that may look at the private image again; empty for none.
    """
    sigma, last = 0.0, Facts(gaussian=0.0)
    for stage in stages:
        facts = stage.facts
        if facts.gaussian is not None and last.gaussian is not None:
            sigma = math.hypot(sigma, facts.gaussian)
        elif not facts.processes:
            return sigma, stage.name
        last = facts
    return sigma, ""


def epsilon(
    bound: float, sigma: float, *, rounds: int, delta: float, adjacency: str = "add_remove"
) -> float:
    """Epsilon of a Gaussian mechanism that a client takes part in ``rounds`` times.

    Gaussian mechanisms compose to a Gaussian mechanism, of ``sqrt(rounds)`` times the sensitivity,
    whose epsilon is known exactly; there is no subsampling to gain from, for the server knows who
    takes part. Computed by Google's dp-accounting.

    Args:
        bound: largest l2 norm of the update, > 0 (:attr:`Mechanism.bound`).
        sigma: standard deviation of the noise on each entry, > 0.
        rounds: at least 1; the updates may depend on earlier rounds.
        delta: the probability with which the bound may fail, in (0, 1).
        adjacency: a key of :data:`ADJACENCIES`.

    Returns:
        Epsilon >= 0, by natural logarithm.

    Raises:
        GGLError: an argument is out of range, or dp-accounting is not installed.

    Reference: Balle and Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy",
    theorem 8; composition: Dong, Roth and Su 2019, "Gaussian Differential Privacy", corollary 2.
    """
    check("bound", bound, Positive)
    check("sigma", sigma, Positive)
    at_least(1, rounds=rounds)
    check("delta", delta, Proper)
    check_known("adjacency", adjacency, ADJACENCIES)
    if not accountant_installed():
        raise GGLError(f"epsilon needs the package dp-accounting: {REMEDY}")
    from dp_accounting import get_epsilon_gaussian

    multiplier = sigma / (ADJACENCIES[adjacency] * bound * math.sqrt(rounds))
    return float(get_epsilon_gaussian(multiplier, delta))


def accountant_installed() -> bool:
    """Whether dp-accounting is there."""
    import importlib.util

    return importlib.util.find_spec("dp_accounting") is not None
