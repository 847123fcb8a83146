"""Rows as they were at a moment, for the readers of a process that goes on storing to their file.

A copy of a table maps the same file. Before this process stores to rows, `put_aside` copies them, for each moment
that somebody still reads, into a sparse file without a name beside the table: it takes room for the rows that change
and is gone with its readers. Rows that are read are then corrected by `put_back`.

What another process stores is seen at once, as by any reader.

N rows, D row width, U row ids of a call.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.table import disk
from sense_v2.engram.table.undo_log import RowSet

FileId = tuple[int, int]
"""Device and inode: a file under whatever name."""

_moments: dict[FileId, weakref.WeakSet[EarlierRows]] = {}
_registering = threading.Lock()


def file_id(path: Path) -> FileId:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def put_aside(file: FileId, row_ids_U: torch.Tensor) -> None:
    """These rows of the file are about to be stored to. Raises `OSError` if there is no room to keep them."""
    if file in _moments:
        with _registering:
            moments = list(_moments[file])
        for moment in moments:
            moment.keep(row_ids_U.numpy())


class EarlierRows:
    """The rows of `path` as they are now, whatever this process stores to it later; `rows_ND` is a mapping of it."""

    def __init__(self, path: Path, rows_ND: torch.Tensor) -> None:
        self.row_ids: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        """Of the rows that have changed, in parts."""
        self.tell: list[weakref.WeakMethod[Callable[[], None]]] = []
        """Called before the first row changes."""
        self._path, self._now_ND = path, rows_ND
        self._then_ND: torch.Tensor | None = None
        self._changed = RowSet(len(rows_ND))
        self._lock = threading.Lock()
        with _registering:
            _moments.setdefault(file_id(path), weakref.WeakSet()).add(self)

    def keep(self, row_ids_U: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        with self._lock:
            new_U = np.unique(self._changed.missing(row_ids_U))
            if not len(new_U):
                return
            num_rows, width = self._now_ND.shape
            row_bytes = width * self._now_ND.element_size()
            disk.refuse_full_disk(self._path, len(new_U), [row_bytes])
            if self._then_ND is None:
                kept = disk.nameless(self._path.parent, num_rows * row_bytes)
                self._then_ND = torch.frombuffer(kept, dtype=self._now_ND.dtype).view(num_rows, width)
                for method in self.tell:
                    call = method()
                    if call is not None:
                        call()
            ids_U = torch.from_numpy(new_U)
            disk.store(self._then_ND, ids_U, self._now_ND.index_select(0, ids_U))
            self._changed.add(new_U)
            self.row_ids.append(new_U)

    def write_to(self, path: Path) -> np.ndarray[Any, Any]:
        """Corrects a copy that was made of the file; returns its bytes [N, bytes of a row]."""
        raw = np.memmap(path, dtype=np.uint8, mode="r+")
        raw_NB = raw.reshape(len(self._now_ND), -1)
        rows_ND = torch.from_numpy(raw_NB).view(self._now_ND.dtype)
        for ids_U in map(torch.from_numpy, self.row_ids):
            disk.store(rows_ND, ids_U, self.put_back(ids_U, rows_ND.index_select(0, ids_U)))
        disk.sync_mapping(raw, path)
        return raw_NB

    def put_back(self, row_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Corrects rows [..., D] that were read for `row_ids` [...], in place; returns them."""
        with self._lock:
            if self._then_ND is not None:
                ids_U = row_ids.reshape(-1).to(torch.int64)
                at = torch.from_numpy(np.flatnonzero(self._changed.holds(ids_U.numpy())))
                rows.view(len(ids_U), -1)[at] = self._then_ND.index_select(0, ids_U[at])
        return rows
