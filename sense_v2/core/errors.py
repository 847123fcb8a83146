"""The library's errors that carry what is wrong and the way out."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system's errors of a full disk are numbered."""


class CommandError(Exception):
    """The library's error that carries what is wrong and the way out: two sentences without their full stops."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(f"{what}. {way_out}")
        self.what, self.way_out = what, way_out


class MissingPackageError(CommandError, ModuleNotFoundError):
    """A package isn't installed: what needs it, and how to install it."""


def one_line(text: str) -> str:
    """Put a text of several lines into one."""
    return " ".join(text.split())
