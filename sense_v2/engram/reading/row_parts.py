"""Row ids -> rows that lie in parts, anywhere in files of somebody else's: bytes, or the values of their blocks.

A table of our own is one file that begins with row 0 (`sense_v2.engram.reading.reader`). Rows of a released
checkpoint begin at any byte of a file, with other tensors around them, and their codes, their scales and the rows'
first and last thousand may be in different files. Each file is mapped once, read-only, and nothing is copied or
converted: a gather takes the rows' bytes from where they are, and decodes those of blocks at once.

All pages of a cold batch, in all parts, are asked for before the first is touched
(`sense_v2.engram.reading.cold_policy`).

N rows of the table, U row ids of a call.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.reading.block_rows import BlockFormat
from sense_v2.engram.reading.cold_policy import ColdPolicy
from sense_v2.engram.reading.gather import BlockGather, RowGather
from sense_v2.engram.reading.pages import Pages, RowPages, read_no_others
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.reading.safetensors_headers import TensorSpan
from sense_v2.engram.table.disk import has_holes
from sense_v2.engram.table.format import RAW_BYTES
from sense_v2.engram.table.platform import tells_what_is_in_memory


class MappedFiles:
    """Files, each mapped once, read-only, however many tensors are read from it."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[np.ndarray[Any, Any], Pages]] = {}

    def map(self, path: Path) -> tuple[np.ndarray[Any, Any], Pages]:
        """The file's bytes and its pages. Raises `OSError` where it can't be mapped."""
        if path not in self._files:
            with open(path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            read_no_others(mapping, has_holes(path))
            whole = np.frombuffer(mapping, dtype=np.uint8)
            tells = tells_what_is_in_memory(path)
            self._files[path] = whole, Pages(mapping, int(whole.ctypes.data), len(mapping), tells=tells)
        return self._files[path]


class _Part:
    """The rows of one span: row `first` of the table and those behind it."""

    def __init__(
        self, span: TensorSpan, first: int, row_bytes: int, files: MappedFiles, blocks: BlockFormat | None
    ) -> None:
        self.first = first
        whole, pages = files.map(span.path)
        self.pages = RowPages(pages, span.path, span.shape[0], row_bytes, first_byte=span.offset)
        rows_NB = whole[span.offset : span.offset + span.num_bytes].reshape(span.shape[0], row_bytes)
        self._gather = BlockGather(rows_NB, blocks) if blocks else RowGather(rows_NB, RAW_BYTES)

    def gather(self, ids_U: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self.pages.refuse_cut_file("Fetch it again and open the table again")
        return self._gather(ids_U, out=out)


class RowParts:
    """One tensor [N, …] of `spans` in their order, read as rows of bytes; with `blocks`, as the values of these."""

    def __init__(
        self, spans: Sequence[TensorSpan], row_bytes: int, files: MappedFiles, blocks: BlockFormat | None = None
    ) -> None:
        self.row_bytes = row_bytes
        self._width, self._dtype = (blocks.width(row_bytes), torch.float32) if blocks else (row_bytes, torch.uint8)
        spans = [span for span in spans if span.shape[0]]
        firsts = np.concatenate([[0], np.cumsum([span.shape[0] for span in spans])])
        self.num_rows = int(firsts[-1])
        self._parts = [
            _Part(span, int(first), row_bytes, files, blocks) for span, first in zip(spans, firsts[:-1], strict=True)
        ]
        self._starts = firsts[1:-1]

    def gather(self, ids_U: torch.Tensor) -> torch.Tensor:
        """ids_U, int64, all of them from 0 to N - 1 -> [U, row_bytes] of uint8, or [U, width] of float32."""
        if len(self._parts) == 1:
            return self._parts[0].gather(ids_U)
        order_U = torch.argsort(ids_U)
        sorted_U = ids_U[order_U]
        sorted_UB = torch.empty(len(ids_U), self._width, dtype=self._dtype, device="cpu")
        for part, start, end in self._runs(sorted_U.numpy()):
            part.gather(sorted_U[start:end] - part.first, out=sorted_UB[start:end])
        return torch.empty_like(sorted_UB).index_copy_(0, order_U, sorted_UB)

    def ask(self, ids_U: np.ndarray[Any, Any]) -> int:
        """Begins to read these rows' pages; returns in how many runs."""
        sorted_U = np.sort(ids_U)
        return sum(part.pages.ask(sorted_U[start:end] - part.first) for part, start, end in self._runs(sorted_U))

    def in_memory(self, ids: np.ndarray[Any, Any]) -> bool | None:
        """Whether these rows' first pages are in memory; None where that can't be known."""
        sorted_ids = np.sort(ids)
        for part, start, end in self._runs(sorted_ids):
            found = part.pages.in_memory(sorted_ids[start:end] - part.first)
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
        self._cold = ColdPolicy(self.tensors)

    def read(self, ids_U: torch.Tensor) -> list[torch.Tensor]:
        """ids_U, int64, all of them from 0 to N - 1 -> the rows of each tensor, as `RowParts.gather`."""
        return self._cold.read(ids_U, lambda: [tensor.gather(ids_U) for tensor in self.tensors])

    def prefetch(self, ids_U: torch.Tensor) -> None:
        """Begins to read these rows' pages and returns at once; does nothing where reads find them in memory."""
        self._cold.prefetch(ids_U)

    @property
    def reads_the_disk(self) -> bool:
        """True if batches came from the disk lately. At first that isn't known: True."""
        return self._cold.reads_the_disk

    def stats(self) -> ReadStats:
        """What was read since the table was opened."""
        return self._cold.stats(sum(tensor.row_bytes for tensor in self.tensors))

    def close(self) -> None:
        """Ends the thread. Rows that were read stay valid."""
        self._cold.close()
