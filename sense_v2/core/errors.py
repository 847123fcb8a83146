"""Errors that carry what is wrong and the way out: two sentences without their full stops.

Their message says both, one behind the other; the command line and the play page show them apart. A `CommandError` is
the library's own; `with_way_out` gives one to an exception of any other type.
"""

from __future__ import annotations

import errno
from typing import Any, TypeVar

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system's errors of a full disk are numbered."""

_Error = TypeVar("_Error", bound=BaseException)


class CommandError(Exception):
    """The library's error that carries what is wrong and the way out."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(_sentences(what, way_out))
        self.what, self.way_out = what, way_out

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process sends its errors
        return type(self), (self.what, self.way_out)


class MissingPackageError(CommandError, ModuleNotFoundError):
    """A package isn't installed: what needs it, and how to install it."""


def with_way_out(error: _Error, way_out: str | None) -> _Error:
    """Give an exception, whose last argument is its message, the way out, and return it. None leaves it as it is.

    >>> error = with_way_out(ValueError("the text has 3 tokens"), "take more text")
    >>> print(error)
    the text has 3 tokens; take more text
    >>> what_and_way_out(error)
    ('the text has 3 tokens', 'take more text')
    """
    if way_out is None:
        return error
    *numbers, what = error.args
    message = _sentences(what, way_out)
    error.args = (*numbers, message)
    if isinstance(error, OSError) and numbers:
        error.strerror = message
    vars(error).update(what=what, way_out=way_out)
    return error


def what_and_way_out(error: BaseException) -> tuple[str, str | None]:
    """Return what an error says is wrong, and the way out that it carries, if any."""
    return getattr(error, "what", str(error)), getattr(error, "way_out", None)


def number_of(number: int, noun: str) -> str:
    """
    >>> number_of(1, "token"), number_of(2000, "token")
    ('1 token', '2000 tokens')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def are(number: int) -> str:
    """
    >>> are(1), are(2)
    ('is', 'are')
    """
    return "is" if number == 1 else "are"


def one_line(text: str) -> str:
    """Put a text of several lines into one."""
    return " ".join(text.split())


def _sentences(what: str, way_out: str) -> str:
    return f"{what}{'. ' if way_out[:1].isupper() else '; '}{way_out}"
