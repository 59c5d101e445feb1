"""Static facts about a defense's functions, which ``chain`` must know before anything runs."""

from collections.abc import Callable


def mark(function: Callable, **traits: bool) -> Callable:
    """Attach traits to a function and return it.

    In use: ``replaces_update`` on ``apply`` (ignores the update it is given), ``masks`` and
    ``scales`` on ``factor`` (what the Factored that it returns holds).
    """
    function.__dict__.update(traits)
    return function


def has(function: Callable, trait: str, default: bool) -> bool:
    """A trait, or ``default`` for a function that was never marked."""
    return getattr(function, trait, default)
