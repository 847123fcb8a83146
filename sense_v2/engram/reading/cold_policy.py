"""Decides whether a batch is warm or cold, and when to ask the kernel for its pages.

**Warm** rows, whose pages are in memory, are gathered and nothing else. **Cold** rows are asked for first: the kernel
begins to read all pages of a batch, then the gather finds them. To ask costs several times a warm gather, so which of
the two a batch is has to be known without asking. It is measured: a gather that took longer than rows in memory can
take, and for which the kernel counted a read from the disk, is followed by batches that look at a few of their pages
first (mincore) and ask, until none is slow any more. A large batch is always worth that look.

**Prefetch** is the same question ahead of time, from another thread where it takes long; that thread works where the
GIL is released. Nothing that is asked changes what is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from sense_v2.engram.reading.read_stats import NUM_BUCKETS, ReadStats
from sense_v2.engram.table.platform import disk_reads

# Rows in memory take well under 2 us each; a page from the disk takes 50 or more, or 10 with many in flight.
SLOW_NS, SLOW_NS_PER_ROW = 20_000, 4_000
# So many batches look and ask after a slow one: what that costs if they are warm is less than one more slow one.
ASKED_BATCHES = 64
# From here on a look at a few pages costs little beside the gather, and faults one at a time would cost 0.1 s.
SAMPLED_IDS, NUM_SAMPLES = 1024, 4
# Asking for more than these takes longer than to hand them to a thread.
INLINE_IDS = 64

_Rows = TypeVar("_Rows")


class AskedRows(Protocol):
    """Rows whose pages the kernel can be asked about."""

    def ask(self, row_ids: np.ndarray[Any, Any]) -> int:
        """Begins to read their pages; returns in how many runs."""

    def in_memory(self, row_ids: np.ndarray[Any, Any]) -> bool | None:
        """True if they are in memory; None where that can't be known."""


class SmallReads(Protocol):
    """What reads small batches by itself, and counts for them: `_gather.c`'s Lookup, or `NoSmallReads`."""

    batches_to_ask: int
    """How many further batches look, and ask where they are cold."""
    batches_after_cold: int
    slow: bool
    slow_ns: int

    def read(self, row_ids: torch.Tensor, /) -> torch.Tensor | None: ...

    def prefetch(self, row_ids: torch.Tensor, /) -> bool: ...

    def looks_cold(self, row_ids: torch.Tensor, /) -> bool | None: ...

    def counts(self) -> tuple[int, int, int, Sequence[int], int]:
        """Lookups, rows, lookups that asked, slow ones by how long they took, and their nanoseconds; see
        `ReadStats`."""


class NoSmallReads:
    """Where small batches have no way of their own: without the extension, of rows of 8 bits, within a budget."""

    batches_to_ask = 0
    batches_after_cold = 0
    slow = False
    slow_ns = 0

    def read(self, row_ids: torch.Tensor) -> None:
        return None

    def prefetch(self, row_ids: torch.Tensor) -> bool:
        return False

    def looks_cold(self, row_ids: torch.Tensor) -> None:
        return None

    def counts(self) -> tuple[int, int, int, Sequence[int], int]:
        return 0, 0, 0, [0] * NUM_BUCKETS, 0


class ColdPolicy:
    """Decides for batches of rows that lie in one place or, as codes and scales do, in several.

    Args:
        places: What is asked about each batch. A row is in memory if it is in all of them.
        small: What reads small batches, and keeps the counter.
        tells: False if the kernel doesn't tell which pages are in memory.
    """

    def __init__(
        self,
        places: Sequence[AskedRows],
        small: SmallReads | None = None,
        *,
        tells: bool = True,
    ) -> None:
        self.small = small or NoSmallReads()
        self.small.batches_to_ask = 1
        self.disk_reads = disk_reads() or 0
        self._places, self.tells = places, tells
        self._stats = ReadStats()
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def read(self, row_ids: torch.Tensor, gather: Callable[[], _Rows]) -> _Rows:
        """What `gather` returns, which reads these rows; asks for their pages first where they seem cold."""
        num_ids, asked = row_ids.numel(), False
        if self.reads_the_disk or num_ids >= SAMPLED_IDS:
            asked = self._ask_where_cold(row_ids)
            self.small.batches_to_ask = max(0, self.small.batches_to_ask - 1)
        started = time.perf_counter_ns()
        rows = gather()
        took = time.perf_counter_ns() - started
        is_slow = took > SLOW_NS + num_ids * SLOW_NS_PER_ROW
        if is_slow:
            self._look_after_slow(asked)
        self._stats.note(num_ids, took, asked=asked, slow=is_slow)
        return rows

    def stats(self, row_bytes: int) -> ReadStats:
        """What was read so far, small batches too."""
        return self._stats.plus(self.small.counts(), row_bytes)

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begins to read these rows' pages and returns at once; does nothing where reads find them in memory."""
        num_ids = row_ids.numel()
        if not num_ids or not (self.reads_the_disk or num_ids >= SAMPLED_IDS):
            return
        if num_ids <= INLINE_IDS:
            self._ask_where_cold(row_ids)
        elif self._is_cold(row_ids):
            # The caller may change its ids afterwards.
            self._thread().submit(self._ask, row_ids.clone())

    @property
    def reads_the_disk(self) -> bool:
        """True if batches came from the disk lately, so that asking ahead pays. At first that isn't known: True."""
        if self.small.slow:
            self.small.slow = False
            self._look_after_slow(False)
        return self.small.batches_to_ask > 0

    def close(self) -> None:
        """Ends the thread."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _ask_where_cold(self, row_ids: torch.Tensor) -> bool:
        """Asks for these rows' pages where they aren't in memory; True if it did."""
        if self.small.prefetch(row_ids):
            return self.small.batches_to_ask == ASKED_BATCHES
        if not self._is_cold(row_ids):
            return False
        self._ask(row_ids)
        return True

    def _ask(self, row_ids: torch.Tensor) -> None:
        started = time.perf_counter_ns()
        num_runs = sum(place.ask(row_ids.reshape(-1).numpy()) for place in self._places)
        # Pages in memory take 1 us. What was read ahead makes the gather itself fast: it has to be seen here.
        if time.perf_counter_ns() - started > SLOW_NS + num_runs * SLOW_NS_PER_ROW:
            self.small.batches_to_ask = ASKED_BATCHES

    def _look_after_slow(self, asked: bool) -> None:
        """After a gather that took long: was it the disk, or other work on the machine? A page that was asked for
        and isn't there yet doesn't count as a read by who touches it."""
        reads = disk_reads()
        if asked or reads is None or reads > self.disk_reads:
            self.small.batches_to_ask = ASKED_BATCHES
        self.disk_reads = reads or 0

    def _is_cold(self, row_ids: torch.Tensor) -> bool:
        """True if one of a few rows isn't in memory, or that can't be known."""
        cold = self.small.looks_cold(row_ids) if self.tells else None
        if cold is not None:
            return cold
        ids = row_ids.reshape(-1)
        sample = ids[:: max(1, len(ids) // NUM_SAMPLES)][:NUM_SAMPLES].numpy()
        return not all(place.in_memory(sample) for place in self._places)

    def _thread(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():  # a forked child has no threads
            self._pool, self._process = ThreadPoolExecutor(1, "sense-v2-prefetch"), os.getpid()
        return self._pool
