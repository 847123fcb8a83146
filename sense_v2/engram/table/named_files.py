"""Open files -> whether their paths still name them: what is made beside a table later goes by its path.

A folder may be renamed under an open table, and another model's take its name; a file may be replaced or removed.
"""

from __future__ import annotations

import errno
from pathlib import Path

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table import disk, platform


class NamedFiles:
    """Files that are open, and the paths that they were opened by, which what is made beside them later goes by."""

    def __init__(self) -> None:
        self._identities: dict[Path, tuple[int, int] | None] = {}

    def add(self, path: Path) -> None:
        self._identities[path] = disk.identity(path)

    def open_beside(self, path: Path) -> int:
        """Opens a file of the first one's table, or makes it, once it is sure that it comes to lie beside it."""
        self.refuse_moved()
        fd = disk.open_own(path)
        platform.take_mode(fd, next(iter(self._identities)))
        return fd

    def refuse_moved(self) -> None:
        """Raises `OSError` where a path names another file by now, or none."""
        for path, opened in self._identities.items():
            if disk.identity(path) != opened:
                raise with_way_out(
                    OSError(
                        errno.ESTALE,
                        f"{path} isn't the file that was opened there: it or its folder was renamed, removed or "
                        "replaced. Nothing was committed or copied",
                    ),
                    "Put it back there, and call again",
                )
