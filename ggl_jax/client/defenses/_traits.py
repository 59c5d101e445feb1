"""Static facts about a defense's functions, which ``chain`` must know before anything runs."""

from collections.abc import Callable
from typing import Any


def mark(function: Callable, **traits: Any) -> Callable:
    """Attach traits to a function and return it.

    In use, on ``factor``: ``masks`` and ``scales`` (what the Factored that it returns holds). On
    ``apply``: ``replaces_update`` (ignores the update it is given), ``stages`` (of a chain), and
    what an accountant of differential privacy asks: ``l2_bound`` (number of tensors -> largest l2
    norm of the result), ``gaussian`` (standard deviation of the noise that is added to every
    entry), ``shrinks`` (the result's norm is at most the update's) and ``processes`` (the result
    depends on the private data through the update alone).
    """
    function.__dict__.update(traits)
    return function


def has(function: Callable, trait: str, default: Any) -> Any:
    """A trait, or ``default`` for a function that was never marked."""
    return getattr(function, trait, default)
