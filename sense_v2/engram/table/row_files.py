"""A table's rows, read and written front to back, wherever their bytes lie.

A table of our own is one column: a file of whole rows. A released one has its codes in one tensor and its scales in
another, each in one file or cut into several, behind a header. Both are `Column`s, and `RowFiles` reads and writes
parts of rows across them: a row's bytes are those of its columns, one behind the other. (So a row of DeepSeek-V4.1's
two tensors has the bytes that a row of our float8_e4m3fn has.)

U rows of a part, B bytes of a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sense_v2.engram.table import disk, platform
from sense_v2.engram.table.disk import has_holes, open_own
from sense_v2.engram.table.row_scan import next_data, read_into


@dataclass(frozen=True)
class Piece:
    """Rows that lie one behind the other in one file."""

    path: Path
    offset: int
    """Of the first row's first byte."""
    num_rows: int


@dataclass(frozen=True)
class Column:
    """`row_bytes` bytes of every row, in pieces, in the rows' order."""

    row_bytes: int
    pieces: tuple[Piece, ...]


class RowFiles:
    """Rows of `columns`, open to read, or, with `write`, to write as well. A context manager."""

    def __init__(self, columns: Sequence[Column], *, write: bool = False) -> None:
        self.columns = tuple(columns)
        self.row_bytes = sum(column.row_bytes for column in columns)
        self.num_rows = sum(piece.num_rows for piece in columns[0].pieces)
        self._fds: dict[Path, int] = {}
        self._data_from: dict[Piece, int] = {}
        try:
            for path in paths_of(columns):
                self._fds[path] = open_own(path) if write else platform.open_file(path, platform.READ)
                if not write:
                    platform.advise(self._fds[path], "SEQUENTIAL")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RowFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read(self, start: int, rows_UB: np.ndarray[Any, Any]) -> None:
        """Fills rows_UB, uint8, C-contiguous, with the rows from `start` on. Raises `OSError` where a file ends."""
        at = 0
        for column in self.columns:
            whole = column.row_bytes == self.row_bytes
            part_UB = rows_UB if whole else np.empty((len(rows_UB), column.row_bytes), dtype=np.uint8)
            for piece, offset, rows in _ranges(column, start, len(rows_UB)):
                with disk.naming(piece.path):
                    read_into(self._fds[piece.path], part_UB[rows], offset)
            if not whole:
                rows_UB[:, at : at + column.row_bytes] = part_UB
            at += column.row_bytes

    def write(self, start: int, rows_UB: np.ndarray[Any, Any]) -> None:
        """Stores rows from `start` on. Raises `OSError`."""
        at = 0
        for column in self.columns:
            part_UB = np.ascontiguousarray(rows_UB[:, at : at + column.row_bytes])
            for piece, offset, rows in _ranges(column, start, len(rows_UB)):
                with disk.naming(piece.path):
                    disk.write_at(self._fds[piece.path], part_UB[rows], offset)
            at += column.row_bytes

    def hold_data(self, start: int, num_rows: int) -> bool:
        """Whether any of these rows is not in a hole. Asked front to back."""
        for column in self.columns:
            for piece, offset, rows in _ranges(column, start, num_rows):
                end = offset + (rows.stop - rows.start) * column.row_bytes
                data_from = self._data_from.get(piece, 0)
                if data_from < end:
                    data_from = next_data(self._fds[piece.path], max(data_from, offset))
                    self._data_from[piece] = data_from
                if data_from < end:
                    return True
        return False

    def sync(self) -> None:
        for path, fd in self._fds.items():
            disk.sync_fd(fd, path)


def paths_of(columns: Sequence[Column]) -> list[Path]:
    """Each file of the columns, once."""
    return list(dict.fromkeys(piece.path for column in columns for piece in column.pieces))


def are_sparse(columns: Sequence[Column]) -> bool:
    """Whether one of the files has holes."""
    return any(has_holes(path) for path in paths_of(columns))


def _ranges(column: Column, start: int, num_rows: int) -> Iterator[tuple[Piece, int, slice]]:
    """(piece, offset in its file, which of the rows asked for) of each piece that has some of them."""
    first = 0
    for piece in column.pieces:
        low, high = max(start, first), min(start + num_rows, first + piece.num_rows)
        if low < high:
            yield piece, piece.offset + (low - first) * column.row_bytes, slice(low - start, high - start)
        first += piece.num_rows
