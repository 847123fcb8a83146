"""Folders made on the way to a file, and removed again if nothing came of it; names that can be written down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sense_v2.core.errors import CommandError


def refuse_other_encodings(*paths: str | Path | None) -> None:
    """Raise `CommandError` for a path that isn't UTF-8: the files that name it couldn't be written later."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise CommandError(
                f"{path}: the name isn't UTF-8, and files there would have to say it", "rename it, or choose another"
            ) from error


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
