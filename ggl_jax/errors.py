"""The one exception type that users are meant to see, and what its messages share."""

import difflib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class GGLError(Exception):
    """A problem that the user can mend.

    The message is one line that names the argument, the value it had, what is allowed and the
    remedy. The command line prints it without a traceback and exits with code 2.
    """


class StorageError(GGLError):
    """The results could not be written; what was finished before is kept."""


def did_you_mean(name: str, known: Iterable[str], *, before: str = "", after: str = "") -> str:
    """``did you mean 'x'?``, between ``before`` and ``after``; "" where no known name is near.

    >>> did_you_mean("cma-es", ["adam", "cma_es"])
    "did you mean 'cma_es'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"{before}did you mean {near[0]!r}?{after}" if near else ""


def check_known(what: str, name: str, known: Collection[str], *, given: str = "") -> None:
    """Refuse a name that is none of the known ones.

    Args:
        what: the argument that names it.
        name: as given, or taken out of ``given``, which errors then show.
        known: the names.

    Raises:
        GGLError: it names those that are known, and the nearest.
    """
    if name not in known:
        hint = did_you_mean(name, known, before="; ")
        raise GGLError(f"{what}: got {given or repr(name)}, allowed: {', '.join(known)}{hint}")


def printable(text: str) -> str:
    r"""Text with control characters, and bytes that are no UTF-8, as escapes.

    >>> printable("a\nb\udcff")
    'a\\nb\\udcff'
    """
    odd = {c for c in text if unicodedata.category(c) in ("Cc", "Cs")}
    return "".join(c.encode("unicode_escape").decode() if c in odd else c for c in text)


def check_once(what: str, items: Sequence[Any], remedy: str = "name each once") -> None:
    """Refuse items of which one is there twice.

    Raises:
        GGLError: it names that one.
    """
    twice = next((item for place, item in enumerate(items) if item in items[:place]), None)
    if twice is not None:
        raise GGLError(f"{what}: {twice!r} is there twice; {remedy}")


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line; its type if it says nothing.

    >>> first_line(ValueError("no header\\nin the file")), first_line(EOFError())
    ('no header', 'EOFError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]


@contextmanager
def explaining(
    what: str, remedy: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Turn exceptions of another library into ``what (its first line); remedy``.

    Of any kind only around the few lines that call the library, since a fault of ours would be
    explained away as well.

    Raises:
        GGLError: in place of whatever was raised; a :class:`GGLError` passes as it is.
    """
    try:
        yield
    except GGLError:
        raise
    except kinds as error:
        raise GGLError(f"{what} ({first_line(error)}); {remedy}") from error


@contextmanager
def about(what: str) -> Iterator[None]:
    """Put ``what: `` before the message of a :class:`GGLError`."""
    try:
        yield
    except GGLError as error:
        raise type(error)(f"{what}: {error}") from error
