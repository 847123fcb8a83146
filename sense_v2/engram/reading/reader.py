"""Reads rows of one mapped file, small warm batches in one call of the extension.

`sense_v2.engram.reading.cold_policy` tells warm batches from cold ones, `sense_v2.engram.reading.gather` copies the
rows, `sense_v2.engram.reading.pages` asks the kernel. A budget, where there is one, bounds what of the file stays
mapped into this process's memory.

N rows, D row width.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.reading import devices
from sense_v2.engram.reading.block_rows import blocks_of
from sense_v2.engram.reading.cold_policy import (
    ASKED_BATCHES,
    SLOW_NS,
    SLOW_NS_PER_ROW,
    ColdPolicy,
    NoSmallReads,
    SmallReads,
)
from sense_v2.engram.reading.gather import OutOfRangeError, gather_of, lookup_of
from sense_v2.engram.reading.pages import Pages, RowPages, read_no_others
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.table import platform
from sense_v2.engram.table.format import RowDtype

# What one fault maps at most: the kernel may keep a file in pages of 2 MiB, and maps one whole whatever the advice.
FAULT_BYTES = 2 << 20
MIN_RESIDENT_BYTES = 4 * FAULT_BYTES


class RowReader:
    """Reads the rows of a mapped file. Any number of threads and of processes may; they share one copy.

    Args:
        rows_ND: The mapping, [N, D]; of compact rows [N, bytes of a row].
        dtype: Of the rows.
        path: The mapped file.
        width: Values of a row; needed for compact rows.
        max_resident_bytes: Bounds what stays mapped into this process's memory.

    Raises:
        ValueError: For a bound that is too small.
    """

    def __init__(
        self,
        rows_ND: np.memmap[Any, Any],
        dtype: RowDtype,
        path: Path,
        *,
        width: int | None = None,
        max_resident_bytes: int | None = None,
    ) -> None:
        if max_resident_bytes is not None and max_resident_bytes < MIN_RESIDENT_BYTES:
            raise ValueError(
                f"max_resident_bytes = {max_resident_bytes}: must be None, or at least {MIN_RESIDENT_BYTES}"
            )
        self.path = path
        self._dtype = dtype
        self._gather = gather_of(rows_ND, dtype, width)
        self._mapping: mmap.mmap = rows_ND._mmap  # type: ignore[attr-defined]  # NumPy's own name for the mapping
        tells = platform.tells_what_is_in_memory(path)
        self._pages = Pages(self._mapping, self._gather.address, rows_ND.nbytes, tells=tells)
        self._row_pages = RowPages(self._pages, path, len(rows_ND), self._gather.row_bytes)
        self._fd = platform.open_file(path, platform.READ)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self.small: SmallReads = NoSmallReads()
        """Reads small batches of a warm table, and has None for all others: the first to be asked."""
        blocks = blocks_of(dtype)
        if max_resident_bytes is None and (blocks is not None or not dtype.is_compact):
            file: dict[str, Any] = {"fd": self._fd, "file_bytes": rows_ND.nbytes}
            slow: dict[str, Any] = {"slow_ns": SLOW_NS, "slow_ns_per_row": SLOW_NS_PER_ROW}
            of_rows: dict[str, Any] = {"width": self._gather.width, "blocks": blocks}
            self.small = lookup_of(rows_ND, dtype.torch, **of_rows, **file, **slow) or self.small
        self.small.batches_after_cold = ASKED_BATCHES if tells and self._pages.can_ask else 0
        self._cold = ColdPolicy([self._row_pages], self.small, tells=tells)
        self._budget = None if max_resident_bytes is None else _Budget(max_resident_bytes, self._pages)

    def read(self, row_ids: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """row_ids [...] of int64 or int32, on the CPU -> rows [..., D] on the CPU; see `RowGather`.

        Raises `IndexError` for an id outside 0 … N - 1, `OSError` where the file was cut since it was opened.
        """
        rows = self.small.read(row_ids) if out is None else None
        return self._read_any(row_ids, out) if rows is None else rows

    def _read_any(self, row_ids: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        self._refuse_cut_file()
        try:
            return self._cold.read(row_ids, lambda: self._gather_rows(row_ids, out))
        except OutOfRangeError as error:
            raise self._out_of_range(error.row_id) from None

    def read_to(self, row_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        """As `read`, with the rows on `device`."""
        shape = (*row_ids.shape, self._gather.width)
        return devices.move(self.read(row_ids, out=devices.staging(shape, self._dtype.torch, device)), device)

    @property
    def reads_the_disk(self) -> bool:
        """True if batches came from the disk lately, so that asking ahead pays. At first that isn't known: True."""
        return self._cold.reads_the_disk

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begins to read these rows' pages and returns at once; does nothing where reads find them in memory.

        row_ids [...] of int64 or int32, on the CPU. Raises `IndexError` as `read`.
        """
        self._refuse_cut_file()
        ids = row_ids.reshape(-1).numpy()
        outside = (ids < 0) | (ids >= self._gather.num_rows)
        if outside.any():
            raise self._out_of_range(int(ids[np.argmax(outside)]))
        self._cold.prefetch(row_ids)

    def stats(self) -> ReadStats:
        """What was read since the table was opened."""
        return self._cold.stats(self._gather.row_bytes)

    def trim(self) -> None:
        """Lets go of the mapping's pages where they are more than the budget allows; after stores."""
        if self._budget is not None:
            self._budget.keep()

    def close(self) -> None:
        """Ends the thread. Rows that were read stay valid."""
        self._cold.close()
        self._close_fd()

    def _gather_rows(self, row_ids: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if self._budget is None:
            return self._gather(row_ids, out=out)
        # In parts that can't map more than the budget has left.
        if out is None:
            out = torch.empty((*row_ids.shape, self._gather.width), dtype=self._dtype.torch, device="cpu")
        ids, rows = row_ids.reshape(-1), out.view(-1, self._gather.width)
        part = max(1, self._budget.part_bytes // (FAULT_BYTES + self._gather.row_bytes))
        for start in range(0, len(ids), part):
            self._gather(ids[start : start + part], out=rows[start : start + part])
            self._budget.keep()
        return out

    def _refuse_cut_file(self) -> None:
        self._row_pages.refuse_cut_file("Put a copy back and open it again")

    def _out_of_range(self, row_id: int) -> IndexError:
        return IndexError(f"row id {row_id}: {self.path} has rows 0 to {self._gather.num_rows - 1}")


class _Budget:
    """Keeps a mapping's share of this process's memory under `max_bytes`."""

    def __init__(self, max_bytes: int, pages: Pages) -> None:
        self.part_bytes = max_bytes // 4
        self._drop_at_bytes = max_bytes // 2
        self._pages = pages
        self._others_bytes = platform.file_backed_bytes()
        self._since_drop = 0

    def keep(self) -> None:
        """Lets go of everything where it is half of the budget. What other files of this process grow by in the
        meantime counts as well, until the next time."""
        found_bytes = platform.file_backed_bytes()
        if found_bytes is None:  # not Linux: at worst each part mapped all that it could
            self._since_drop += self.part_bytes
            if self._since_drop >= self._drop_at_bytes:
                self._pages.drop()
                self._since_drop = 0
        elif found_bytes - (self._others_bytes or 0) > self._drop_at_bytes:
            self._pages.drop()
            self._others_bytes = platform.file_backed_bytes()


def map_rows(
    path: Path, dtype: np.dtype[Any], mode: Any, shape: tuple[int, int], *, has_holes: bool
) -> np.memmap[Any, Any]:
    """The file's rows, [N, D]; `mode` is np.memmap's. Raises `OSError` where it can't be mapped."""
    rows_ND = np.memmap(path, dtype=dtype, mode=mode, shape=shape)
    read_no_others(rows_ND._mmap, has_holes)  # type: ignore[attr-defined]  # NumPy's own name for the mapping
    return rows_ND
