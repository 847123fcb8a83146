"""Row ids -> bytes of rows that lie in parts, anywhere in files of somebody else's.

A table of our own is one file that begins with row 0 (`sense_v2.engram.reading.reader`). Rows of a released
checkpoint begin at any byte of a file, with other tensors around them, and their codes, their scales and the rows'
first and last thousand may be in different files. Each file is mapped once, read-only, and nothing is copied or
converted: a gather takes the rows' bytes from where they are.

Warm and cold are told apart as the reader does it, by its own limits and counters: by how long a gather took and
whether the disk was read meanwhile, and by a look at a few pages of a large batch. All pages of a cold batch, in all
parts, are asked for before the first is touched.

N rows of the table, U row ids of a call.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.reading.gather import RowGather
from sense_v2.engram.reading.pages import Pages, page_runs
from sense_v2.engram.reading.reader import (
    ASKED_BATCHES,
    INLINE_IDS,
    NUM_SAMPLES,
    SAMPLED_IDS,
    SHARE_THAT_FITS,
    SLOW_NS,
    SLOW_NS_PER_ROW,
    disk_reads,
    may_be_told,
    usable_memory_bytes,
)
from sense_v2.engram.reading.safetensors_headers import TensorSpan
from sense_v2.engram.table.disk import has_holes
from sense_v2.engram.table.format import RAW_BYTES


class MappedFiles:
    """Files, each mapped once, read-only, however many tensors are read from it."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[mmap.mmap, np.ndarray[Any, Any], Pages]] = {}

    def map(self, path: Path) -> tuple[mmap.mmap, np.ndarray[Any, Any], Pages]:
        """The mapping, its bytes and its pages. Raises `OSError` where it can't be mapped."""
        if path not in self._files:
            with open(path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM") and (
                has_holes(path) or len(mapping) > SHARE_THAT_FITS * usable_memory_bytes()
            ):
                with contextlib.suppress(OSError):  # it is advice; a file system may not take it
                    mapping.madvise(mmap.MADV_RANDOM)
            whole = np.frombuffer(mapping, dtype=np.uint8)
            pages = Pages(mapping, int(whole.ctypes.data), len(mapping), tells=may_be_told(path))
            self._files[path] = mapping, whole, pages
        return self._files[path]


class _Part:
    """The rows of one span: row `first` of the table and those behind it."""

    def __init__(self, span: TensorSpan, first: int, row_bytes: int, files: MappedFiles) -> None:
        self.first, self.num_rows, self.path = first, span.shape[0], span.path
        self.row_bytes, self.offset = row_bytes, span.offset
        self._end = span.offset + span.num_bytes
        self.mapping, whole, self.pages = files.map(span.path)
        rows_NB = whole[span.offset : self._end].reshape(self.num_rows, row_bytes)
        self._gather = RowGather(rows_NB, RAW_BYTES)

    def gather(self, ids_U: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        # A touch of a page behind the file's end is a SIGBUS, which nobody could explain.
        if self.mapping.size() < self._end:
            raise OSError(
                f"{self.path}: expected at least {self._end} bytes, found {self.mapping.size()}: the file was cut "
                "while it was open. Fetch it again and open the table again"
            )
        return self._gather(ids_U, out=out)

    def ask(self, ids_U: np.ndarray[Any, Any]) -> int:
        runs_R2 = page_runs(ids_U, self.row_bytes, first_byte=self.offset)
        self.pages.will_need(runs_R2)
        return len(runs_R2)


class RowParts:
    """One tensor [N, …] of `spans` in their order, read as rows of bytes."""

    def __init__(self, spans: Sequence[TensorSpan], row_bytes: int, files: MappedFiles) -> None:
        self.row_bytes = row_bytes
        spans = [span for span in spans if span.shape[0]]
        firsts = np.concatenate([[0], np.cumsum([span.shape[0] for span in spans])])
        self.num_rows = int(firsts[-1])
        self._parts = [
            _Part(span, int(first), row_bytes, files) for span, first in zip(spans, firsts[:-1], strict=True)
        ]
        self._starts = firsts[1:-1]

    def gather(self, ids_U: torch.Tensor) -> torch.Tensor:
        """ids_U, int64, all of them from 0 to N - 1 -> [U, row_bytes] of uint8."""
        if len(self._parts) == 1:
            return self._parts[0].gather(ids_U)
        order_U = torch.argsort(ids_U)
        sorted_U = ids_U[order_U]
        sorted_UB = torch.empty(len(ids_U), self.row_bytes, dtype=torch.uint8, device="cpu")
        for part, start, end in self._runs(sorted_U.numpy()):
            part.gather(sorted_U[start:end] - part.first, out=sorted_UB[start:end])
        return torch.empty_like(sorted_UB).index_copy_(0, order_U, sorted_UB)

    def ask(self, ids_U: np.ndarray[Any, Any]) -> int:
        """Begins to read these rows' pages; returns in how many runs."""
        sorted_U = np.sort(ids_U)
        return sum(part.ask(sorted_U[start:end] - part.first) for part, start, end in self._runs(sorted_U))

    def in_memory(self, ids: np.ndarray[Any, Any]) -> bool | None:
        """Whether these rows' first pages are in memory; None where that can't be known."""
        for part, start, end in self._runs(np.sort(ids)):
            rows = np.sort(ids)[start:end] - part.first
            found = part.pages.in_memory([int(row) * self.row_bytes + part.offset for row in rows])
            if not found:
                return found
        return True

    def _runs(self, sorted_U: np.ndarray[Any, Any]) -> list[tuple[_Part, int, int]]:
        cuts = [0, *np.searchsorted(sorted_U, self._starts).tolist(), len(sorted_U)]
        bounds = zip(self._parts, cuts[:-1], cuts[1:], strict=True)
        return [(part, start, end) for part, start, end in bounds if start < end]


class PartsReader:
    """Reads several tensors of the same N rows together: a row's codes and its scales."""

    def __init__(self, tensors: Sequence[RowParts]) -> None:
        self.tensors = list(tensors)
        self._batches_to_ask = 1
        self._disk_reads = disk_reads() or 0
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def read(self, ids_U: torch.Tensor) -> list[torch.Tensor]:
        """ids_U, int64, all of them from 0 to N - 1 -> [U, bytes of a row] of each tensor."""
        num_ids = len(ids_U)
        asks = False
        if num_ids and (self._batches_to_ask or num_ids >= SAMPLED_IDS):
            self._batches_to_ask = max(0, self._batches_to_ask - 1)
            asks = self._is_cold(ids_U.numpy())
            if asks:
                self._ask(ids_U.numpy())
        started = time.perf_counter_ns()
        rows = [tensor.gather(ids_U) for tensor in self.tensors]
        if time.perf_counter_ns() - started > SLOW_NS + num_ids * SLOW_NS_PER_ROW:
            self._look_after_slow(asks)
        return rows

    def prefetch(self, ids_U: torch.Tensor) -> None:
        """Begins to read these rows' pages and returns at once; does nothing where reads find them in memory."""
        if not len(ids_U) or not (self._batches_to_ask or len(ids_U) >= SAMPLED_IDS):
            return
        if not self._is_cold(ids_U.numpy()):
            return
        if len(ids_U) <= INLINE_IDS:
            self._ask(ids_U.numpy())
        else:
            # The caller may change its ids afterwards.
            self._thread().submit(self._ask, ids_U.clone().numpy())

    @property
    def reads_the_disk(self) -> bool:
        """Whether batches came from the disk lately. At first that isn't known: True."""
        return self._batches_to_ask > 0

    def close(self) -> None:
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _look_after_slow(self, asked: bool) -> None:
        """As `RowReader`'s: was it the disk, or other work on the machine?"""
        reads = disk_reads()
        if asked or reads is None or reads > self._disk_reads:
            self._batches_to_ask = ASKED_BATCHES
        self._disk_reads = reads or 0

    def _is_cold(self, ids_U: np.ndarray[Any, Any]) -> bool:
        sample = ids_U[:: max(1, len(ids_U) // NUM_SAMPLES)][:NUM_SAMPLES]
        return not all(tensor.in_memory(sample) for tensor in self.tensors)

    def _ask(self, ids_U: np.ndarray[Any, Any]) -> None:
        started = time.perf_counter_ns()
        num_runs = sum(tensor.ask(ids_U) for tensor in self.tensors)
        # Pages in memory take 1 us each.
        if time.perf_counter_ns() - started > SLOW_NS + num_runs * SLOW_NS_PER_ROW:
            self._batches_to_ask = ASKED_BATCHES

    def _thread(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():  # a forked child has no threads
            self._pool, self._process = ThreadPoolExecutor(1, "sense-v2-prefetch"), os.getpid()
        return self._pool
