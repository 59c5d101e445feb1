"""Range checks whose one-line messages name argument, value, allowed range and remedy."""

import math

from ggl_jax.errors import GGLError

FIDELITIES = ("paper", "code")
#: What an adversary compares, of a candidate's update and the observed one. "published" follows
#: the paper; each of the others concerns one defense (sparsification, Soteria, noise).
COMPARISONS = ("published", "support", "undefended", "likelihood")


def number(
    defense: str,
    argument: str,
    value: float,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    default: float,
) -> float:
    """``value`` as a float in [low, high), or (low, high) with ``open_low``."""
    allowed = f"greater than {low:g}" if open_low else f"at least {low:g}"
    allowed += f" and below {high:g}" if math.isfinite(high) else " and finite"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    above = number > low if open_low else number >= low
    if not (above and number < high):
        raise GGLError(
            f"{defense}: {argument}={value!r} is out of range; give a number {allowed}, "
            f"e.g. {defense}:{default:g}"
        )
    return number


def fidelity(defense: str, value: str) -> str:
    """``value`` if it is one of the two fidelities."""
    if value not in FIDELITIES:
        raise GGLError(
            f"{defense}: fidelity={value!r} is unknown; give 'paper' (the paper's formulas) or "
            f"'code' (its published code's)"
        )
    return value


def comparison(defense: str, value: str) -> str:
    """``value`` if it is one of the comparisons."""
    if value not in COMPARISONS:
        raise GGLError(
            f"{defense}: compare={value!r} is unknown; give one of {', '.join(COMPARISONS)}"
        )
    return value


def positive_integer(defense: str, argument: str, value: int) -> int:
    """``value`` if it is an integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise GGLError(f"{defense}: {argument}={value!r} is out of range; give an integer >= 1")
    return int(value)
