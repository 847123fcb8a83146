"""Folders made on the way to a file, and removed again if nothing came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """Removes the folders that the block has made on the way to `folder`, if it fails and they are empty."""
    made = missing_folders(folder)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and the folders above it that aren't there, the innermost first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, the innermost first, as far as nothing is in them."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
