"""Puts a function of the test around every call that changes a table's files: to count, to kill, to fail, to record.

`around(name, call, *arguments)` stands for `call(*arguments)` and makes that call itself, or doesn't. The names are
those of `os`, and two more: "msync" (of a mapping) and "store" (of rows into a mapping).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sense_v2.engram.table import disk

CHANGING = ("open", "pwrite", "fsync", "ftruncate", "replace", "unlink", "posix_fallocate")

Around = Callable[..., Any]


class _WatchedOs:
    """The `os` module, of which the calls that change something go through `around`."""

    def __init__(self, around: Around) -> None:
        self._around = around

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        return partial(self._around, name, value) if name in CHANGING else value


@contextlib.contextmanager
def watched(around: Around) -> Iterator[None]:
    """Until the block ends, what the library does to its files goes through `around`."""
    flush = np.memmap.flush
    with (
        mock.patch.object(disk, "os", _WatchedOs(around)),
        mock.patch.object(disk, "store", partial(around, "store", disk.store)),
        mock.patch.object(np.memmap, "flush", lambda mapping: around("msync", flush, mapping)),
    ):
        yield


def file_of(name: str, arguments: tuple[Any, ...]) -> str:
    """The name of the file, or of the folder, that a call is about; "" for rows that are stored into a mapping."""
    if name == "store":
        return ""
    if name == "msync":
        return Path(arguments[0].filename).name
    target = arguments[0]
    return Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target).name


def half(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Half of a write or of a store, which ends within a row; of what has no half, all."""
    if name == "pwrite":
        fd, data, offset = arguments
        return call(fd, memoryview(data)[: max(1, len(data) // 2)], offset)
    if name == "store":
        table_ND, ids, rows_UD = arguments
        count, width = max(1, len(ids) // 2), rows_UD.shape[1] // 2
        call(table_ND, ids[: count - 1], rows_UD[: count - 1])
        last = table_ND[ids[count - 1]].clone()
        last[:width] = rows_UD[count - 1, :width]
        return call(table_ND, ids[count - 1 : count], last[None])
    return call(*arguments)
