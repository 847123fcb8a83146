"""Folders made on the way to a file, and removed again if nothing came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """If the block fails, remove the folders that it made on the way to `folder`, as far as they are empty."""
    made = missing_folders(folder)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def missing_folders(folder: Path) -> list[Path]:
    """Return `folder` and the folders above it that don't exist, the innermost first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, until one isn't empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
