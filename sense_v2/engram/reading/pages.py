"""Row ids -> pages of a mapped file -> what the kernel is asked about them.

A page that isn't in memory is read when it is touched, and who touched it waits: one read at a time is the slowest
way to use a disk. `will_need` asks for all pages of a batch first, each once and in order, so that many reads are in
flight. It changes no byte: whatever it can't do, the touch does.

Nothing here is needed for right rows. Where the system lacks a call (madvise on Windows), it says so once
(`UserWarning`) and goes on without.

Around a page that isn't in memory the kernel by default reads others, up to 8 MiB with some disks. That brings a
table which fits into memory in with a few large reads. Where it doesn't fit, it reads, and throws out again, a
thousand times what a batch needs; in a sparse table it fills memory with the zeros of holes. So those are mapped with
MADV_RANDOM (benchmarks/LOG.md has what that gains).

R runs of pages.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading import gather
from sense_v2.engram.table import platform

# The kernel cuts what it reads for one call at its own limit of read-ahead, 128 KiB by default.
MAX_RUN_BYTES = 128 << 10
# A call that lets go of pages keeps page faults of other threads waiting.
DROP_BYTES = 64 << 20
# A table that fits leaves room for the model, and for other tables.
SHARE_THAT_FITS = 0.5


def read_no_others(mapping: mmap.mmap, has_holes: bool) -> None:
    """Tells the kernel to read no pages around those that are touched, where the file has holes or is large."""
    if hasattr(mmap, "MADV_RANDOM") and (
        has_holes or len(mapping) > SHARE_THAT_FITS * platform.usable_memory_bytes()
    ):
        with contextlib.suppress(OSError):  # it is advice; a file system may not take it
            mapping.madvise(mmap.MADV_RANDOM)


def page_runs(
    row_ids: np.ndarray[Any, Any],
    row_bytes: int,
    page_bytes: int = mmap.PAGESIZE,
    max_run_bytes: int = MAX_RUN_BYTES,
    *,
    first_byte: int = 0,
) -> np.ndarray[Any, Any]:
    """[R, 2] of int64: (offset, length) in bytes of the pages that these rows lie on, each once, ascending;
    neighbours together up to a boundary of `max_run_bytes`. Row 0 begins at `first_byte` of the mapping.

    >>> page_runs(np.array([0, 1, 900, 63]), row_bytes=64, page_bytes=4096).tolist()
    [[0, 4096], [57344, 4096]]
    """
    starts = row_ids.astype(np.int64) * row_bytes + first_byte
    firsts = starts // page_bytes
    # Rows that divide a page, or are whole pages, cross no border; unless the first one begins between two.
    crosses = (page_bytes % row_bytes and row_bytes % page_bytes) or first_byte % min(row_bytes, page_bytes)
    spans = int(-(-row_bytes // page_bytes)) + (1 if crosses else 0)
    if spans > 1:
        lasts = (starts + (row_bytes - 1)) // page_bytes
        firsts = np.minimum(firsts[:, None] + np.arange(spans), lasts[:, None]).reshape(-1)
    pages = np.unique(firsts)
    max_pages = max(1, max_run_bytes // page_bytes)
    begins = np.ones(len(pages), dtype=bool)
    begins[1:] = (np.diff(pages) != 1) | (pages[1:] % max_pages == 0)
    at = np.flatnonzero(begins)
    lengths = np.diff(np.append(at, len(pages)))
    return np.stack([pages[at], lengths], axis=1) * page_bytes


class Pages:
    """What the kernel is asked about one mapping, which begins at `address`."""

    def __init__(self, mapping: mmap.mmap, address: int, num_bytes: int, *, tells: bool = True) -> None:
        self.mapping, self.address, self.num_bytes, self.tells = mapping, address, num_bytes, tells
        self.can_ask = hasattr(mmap, "MADV_WILLNEED")

    def will_need(self, runs_R2: np.ndarray[Any, Any]) -> None:
        """Begins to read these runs; returns before they are read."""
        if not self.can_ask:
            _warn_once("this platform has no madvise(WILLNEED): rows that aren't in memory are read one at a time")
            return
        try:
            if gather.compiled is not None:
                error = gather.compiled.will_need(self.address, np.ascontiguousarray(runs_R2))
                if error:
                    raise OSError(error, "madvise")
            else:
                advise, advice = self.mapping.madvise, mmap.MADV_WILLNEED
                for offset, length in runs_R2.tolist():
                    advise(advice, offset, length)
        except OSError as error:
            # EINVAL for an address between two pages would pass unseen otherwise, and so would all that it costs.
            self.can_ask = False
            _warn_once(
                f"madvise(WILLNEED) failed ({error}): rows that aren't in memory are read one at a time from here on"
            )

    def in_memory(self, offsets: list[int]) -> bool | None:
        """Whether the pages at all of these offsets are in memory; None where the kernel can't be asked."""
        for offset in offsets:
            found = platform.page_is_in_memory(self.address + offset) if self.tells else None
            if not found:
                return found
        return True

    def drop(self) -> None:
        """Takes all pages out of this process's memory, a slice at a time. Nothing is lost: what was stored to them
        is the file's, and the kernel keeps it until it is on the disk."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            _warn_once("this platform has no madvise(DONTNEED): max_resident_bytes has no effect")
            return
        for offset in range(0, self.num_bytes, DROP_BYTES):
            self.mapping.madvise(mmap.MADV_DONTNEED, offset, min(DROP_BYTES, self.num_bytes - offset))


class RowPages:
    """The pages of `num_rows` rows that lie one after the other in a mapped file, from `first_byte` on."""

    def __init__(self, pages: Pages, path: Path, num_rows: int, row_bytes: int, *, first_byte: int = 0) -> None:
        self.pages, self.path = pages, path
        self._num_rows, self._row_bytes, self._first_byte = num_rows, row_bytes, first_byte
        self._end = first_byte + num_rows * row_bytes

    def ask(self, row_ids: np.ndarray[Any, Any]) -> int:
        """Begins to read the pages of these rows; returns in how many runs. Asks nothing for a row id outside."""
        if not len(row_ids) or int(row_ids.min()) < 0 or int(row_ids.max()) >= self._num_rows:
            return 0  # the gather says so
        runs_R2 = page_runs(row_ids, self._row_bytes, first_byte=self._first_byte)
        self.pages.will_need(runs_R2)
        return len(runs_R2)

    def in_memory(self, row_ids: np.ndarray[Any, Any]) -> bool | None:
        """True if the first pages of these rows are in memory; None where that can't be known."""
        inside = (row_id for row_id in row_ids.tolist() if 0 <= row_id < self._num_rows)
        return self.pages.in_memory([self._first_byte + row_id * self._row_bytes for row_id in inside])

    def refuse_cut_file(self, way_out: str) -> None:
        """Raises `OSError` for a file that was cut: a touch of a page behind its end is a SIGBUS, which nobody could
        explain."""
        found = self.pages.mapping.size()
        if found < self._end:
            raise with_way_out(
                OSError(
                    f"{self.path}: expected at least {self._end} bytes, found {found}: the file was cut while it "
                    "was open"
                ),
                way_out,
            )


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
