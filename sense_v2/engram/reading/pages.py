"""Row ids -> pages of a mapped file -> what the kernel is asked about them: to read them, to let go of them.

A page that isn't in memory is read when it is touched, and who touched it waits: one read at a time is the slowest
way to use a disk. `will_need` asks for all pages of a batch first, each once and in order, so that many reads are in
flight. It changes no byte: whatever it can't do, the touch does.

Nothing here is needed for right rows. Where the platform lacks a call (no madvise on Windows, no mincore without the
C library's), it says so once (`UserWarning`) and goes on without.

R runs of pages.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import warnings
from typing import Any

import numpy as np

from sense_v2.engram.reading import gather

# The kernel cuts what it reads for one call at its own limit of read-ahead, 128 KiB by default.
MAX_RUN_BYTES = 128 << 10
# A call that lets go of pages keeps page faults of other threads waiting.
DROP_BYTES = 64 << 20


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
        mincore = _mincore()
        if mincore is None or not self.tells:
            return None
        found = ctypes.c_ubyte()
        for offset in offsets:
            address = self.address + offset // mmap.PAGESIZE * mmap.PAGESIZE
            if mincore(address, 1, ctypes.byref(found)) != 0:
                return None
            if not found.value & 1:
                return False
        return True

    def drop(self) -> None:
        """Takes all pages out of this process's memory, a slice at a time. Nothing is lost: what was stored to them
        is the file's, and the kernel keeps it until it is on the disk."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            _warn_once("this platform has no madvise(DONTNEED): max_resident_bytes has no effect")
            return
        for offset in range(0, self.num_bytes, DROP_BYTES):
            self.mapping.madvise(mmap.MADV_DONTNEED, offset, min(DROP_BYTES, self.num_bytes - offset))


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


@functools.cache
def _mincore() -> Any:
    try:
        function = ctypes.CDLL(None).mincore
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function
