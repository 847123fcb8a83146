"""The library's error that carries what is wrong and the way out."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system's errors of a full disk are numbered."""


class CommandError(Exception):
    """The library's error that carries what is wrong and the way out: two sentences without their full stops."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(f"{what}. {way_out}")
        self.what, self.way_out = what, way_out


def one_line(text: str) -> str:
    """Put a text of several lines into one."""
    return " ".join(text.split())
