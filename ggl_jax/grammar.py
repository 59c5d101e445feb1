"""One grammar for parts, on the command line, in TOML and in Python: ``name:value,key=value``.

Defenses, optimisers, penalties and models are written in it: ``clip:4``, ``adam:0.05,signed=True``,
``convnet:width=32,batch_norm=train``. The first value without a key is that of the factory's first
option. Parts that work together are joined by ``+``: ``clip:4+noise:0.1``.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from ggl_jax.errors import GGLError, check_known
from ggl_jax.spec import AtLeast, check

Factory = TypeVar("Factory", bound=Callable[..., Any])
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


def named(*factories: Factory) -> dict[str, Factory]:
    """A registry of parts, each factory by its own name."""
    return {one.__name__: one for one in factories}


def split(text: str) -> list[str]:
    """The parts that ``+`` joins; the one of an exponent (``1e+2``) joins nothing.

    >>> split("clip:4+noise:1e+2")
    ['clip:4', 'noise:1e+2']
    """
    return [part.strip() for part in re.split(r"(?<![0-9.][eE])\+", text)]


def number_of(text: str) -> Any:
    """A value as written: a whole number, a number, or else the text.

    >>> number_of("4"), number_of("1e-1"), number_of("none")
    (4, 0.1, 'none')
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def value_of(text: str) -> Any:
    """A value as written: a whole number, a number, True, False, None, or else the text.

    >>> value_of("4"), value_of("1e-1"), value_of("False"), value_of("ramp")
    (4, 0.1, False, 'ramp')
    """
    return _WORDS.get(text.lower(), number_of(text))


def text_of(value: Any) -> str:
    """A value in its canonical spelling: ``4.0`` is ``4``, ``1e-1`` is ``0.1``.

    >>> text_of(4.0), text_of(1e-1), text_of(True)
    ('4', '0.1', 'True')
    """
    return f"{value + 0.0:.12g}" if isinstance(value, float) else str(value)  # no -0


def read(
    registry: Mapping[str, Callable[..., Any]], text: str, *, what: str, offered: tuple = ()
) -> tuple[str, dict[str, Any]]:
    """A part's name and the options that its text gives.

    Args:
        registry: name -> factory.
        text: ``name``, ``name:value`` or ``name:key=value,key=value``.
        what: the argument it comes from, for errors.
        offered: options of the factories that the caller sets, so that no text may.

    Raises:
        GGLError: an unknown name or option, or one that is given twice.
    """
    name, _, values = text.strip().partition(":")
    check_known(what, name, registry, given=repr(text))
    known = [
        parameter
        for parameter, about in inspect.signature(registry[name]).parameters.items()
        if parameter not in offered and about.kind not in (about.VAR_KEYWORD, about.VAR_POSITIONAL)
    ]
    given: dict[str, Any] = {}
    for number, item in enumerate(values.split(",") if values else []):
        key, equals, written = (part.strip() for part in item.partition("="))
        if not equals:
            key, written = (known[0] if known and number == 0 else ""), key
        if key not in known or key in given:
            takes = f"takes {', '.join(known)}" if known else "has no options"
            raise GGLError(f"{what}: {item!r} in {text!r} is not understood; {name} {takes}")
        given[key] = value_of(written)
    return name, given


def write(
    registry: Mapping[str, Callable[..., Any]],
    name: str,
    given: Mapping[str, Any],
    *,
    offered: tuple = (),
) -> str:
    """The canonical spelling of a part: options in the factory's order, the first without its key.

    Options that have the factory's own default are left out.
    """
    about = inspect.signature(registry[name]).parameters
    known = [option for option in about if option not in offered]
    items = [
        text_of(given[key]) if key == known[0] else f"{key}={text_of(given[key])}"
        for key in known
        if key in given and given[key] != about[key].default
    ]
    return ":".join([name, ",".join(items)]) if items else name


def build(
    registry: Mapping[str, Callable[..., Any]], text: str, *, what: str, **offered: Any
) -> Any:
    """What a part's factory makes: ``build(OPTIMIZERS, "adam:0.05", what="optimizer", steps=60)``.

    Args:
        registry: name -> factory.
        text: see :func:`read`.
        what: the argument it comes from, for errors.
        **offered: options for those factories that take them.

    Raises:
        GGLError: as :func:`read`, or an option out of the factory's range.
    """
    name, given = read(registry, text, what=what, offered=tuple(offered))
    takes = inspect.signature(registry[name]).parameters
    return registry[name](**given, **{k: v for k, v in offered.items() if k in takes})


def at_least(low: float, **values: Any) -> None:
    """Refuse values that are no whole numbers of at least ``low``, by their names.

    Raises:
        GGLError: names the argument, its value and what is allowed.
    """
    for name, value in values.items():
        check(name, value, Annotated[int, AtLeast(low)])
