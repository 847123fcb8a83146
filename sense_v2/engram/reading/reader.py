"""How rows are read: warm ones straight from the mapping, cold ones with many reads in flight, the next ones ahead.

**Warm** rows, whose pages are in memory, are gathered and nothing else (`sense_v2.engram.reading.gather`). **Cold**
rows are asked for first: the kernel begins to read all pages of a batch, then the gather finds them
(`sense_v2.engram.reading.pages`). To ask costs several times a warm gather, so which of the two a batch is has to be
known without asking. It is measured: a gather that took longer than rows in memory can take, and for which the kernel
counted a read from the disk, is followed by batches that look at a few of their pages first (mincore) and ask, until
none is slow any more. A large batch is always worth that look.

**Prefetch** is the same question ahead of time, from another thread where it takes long; that thread works where the
GIL is released. Nothing that is asked changes what is read.

Around a page that isn't in memory the kernel by default reads others, up to 8 MiB with some disks. That brings a
table which fits into memory in with a few large reads. Where it doesn't fit, it reads, and throws out again, a
thousand times what a batch needs; in a sparse table it fills memory with the zeros of holes. So those are mapped with
MADV_RANDOM (benchmarks/LOG.md has what that gains).

N rows, D row width.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.reading import devices
from sense_v2.engram.reading.gather import CompactGather, OutOfRangeError, RowGather, lookup_of
from sense_v2.engram.reading.pages import Pages, page_runs
from sense_v2.engram.table.format import RowDtype

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# A table that fits leaves room for the model, and for other tables.
SHARE_THAT_FITS = 0.5
# Rows in memory take well under 2 us each; a page from the disk takes 50 or more, or 10 with many in flight.
SLOW_NS, SLOW_NS_PER_ROW = 20_000, 4_000
# So many batches look and ask after a slow one: what that costs if they are warm is less than one more slow one.
ASKED_BATCHES = 64
# From here on a look at a few pages costs little beside the gather, and faults one at a time would cost 0.1 s.
SAMPLED_IDS, NUM_SAMPLES = 1024, 4
# Asking for more than these takes longer than to hand them to a thread.
INLINE_IDS = 64
# What one fault maps at most: the kernel may keep a file in pages of 2 MiB, and maps one whole whatever the advice.
FAULT_BYTES = 2 << 20
MIN_RESIDENT_BYTES = 4 * FAULT_BYTES


class RowReader:
    """Reads the rows of a mapped file, `rows_ND` [N, D]; of compact rows [N, bytes of a row], which hold `width`
    values each. `max_resident_bytes` bounds what of it stays mapped into this process's memory. Mappings are read by
    any number of threads and of processes, which share one copy."""

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
        assert not dtype.is_compact or width is not None, "bytes don't say how many values a compact row has"
        self._gather = CompactGather(rows_ND, dtype, width or 0) if dtype.is_compact else RowGather(rows_ND, dtype)
        self._mapping: mmap.mmap = rows_ND._mmap  # type: ignore[attr-defined]  # NumPy's own name for the mapping
        self._num_bytes = rows_ND.nbytes
        self._pages = Pages(self._mapping, self._gather.address, rows_ND.nbytes, tells=may_be_told(path))
        self._disk_reads = disk_reads() or 0
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        file = {"fd": self._fd, "file_bytes": self._num_bytes, "slow_ns": SLOW_NS, "slow_ns_per_row": SLOW_NS_PER_ROW}
        small = None
        if max_resident_bytes is None and not dtype.is_compact:
            small = lookup_of(rows_ND, dtype.torch, **file)
        self.small: Any = small or NoSmallReads()
        self.small.batches_after_cold = ASKED_BATCHES if self._pages.tells and self._pages.can_ask else 0
        self.small.batches_to_ask = 1
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._budget = None if max_resident_bytes is None else _Budget(max_resident_bytes, self._pages)

    def read(self, row_ids: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """row_ids [...] of int64 or int32, on the CPU -> rows [..., D] on the CPU; see `RowGather`.

        Raises `IndexError` for an id outside 0 … N - 1, `OSError` where the file was cut since it was opened.
        """
        if out is None:
            rows: torch.Tensor | None = self.small.read(row_ids)
            if rows is not None:
                return rows
        return self._read_any(row_ids, out)

    def _read_any(self, row_ids: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        # A touch of a page behind the file's end is a SIGBUS, which nobody could explain.
        if self._mapping.size() < self._num_bytes:
            self._refuse_cut_file()
        num_ids = row_ids.numel()
        asks = False
        if self.reads_the_disk or num_ids >= SAMPLED_IDS:
            asks = self._ask_where_cold(row_ids)
            self.small.batches_to_ask = max(0, self.small.batches_to_ask - 1)
        started = time.perf_counter_ns()
        try:
            if self._budget is None:
                rows = self._gather(row_ids, out=out)
            else:
                rows = self._read_within(self._budget, row_ids, out)
        except OutOfRangeError as error:
            raise self._out_of_range(error.row_id) from None
        if time.perf_counter_ns() - started > SLOW_NS + num_ids * SLOW_NS_PER_ROW:
            self._look_after_slow(asks)
        return rows

    def read_to(self, row_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        """As `read`, with the rows on `device`."""
        shape = (*row_ids.shape, self._gather.width)
        return devices.move(self.read(row_ids, out=devices.staging(shape, self._dtype.torch, device)), device)

    @property
    def reads_the_disk(self) -> bool:
        """Whether batches came from the disk lately, so that asking ahead pays. At first that isn't known: True."""
        if self.small.slow:
            self.small.slow = False
            self._look_after_slow(False)
        return self.small.batches_to_ask > 0

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begins to read these rows' pages and returns at once; does nothing where reads find them in memory.

        row_ids [...] of int64 or int32, on the CPU. Raises `IndexError` as `read`.
        """
        if self._mapping.size() < self._num_bytes:
            self._refuse_cut_file()
        ids = row_ids.reshape(-1).numpy()
        if not len(ids):
            return
        outside = (ids < 0) | (ids >= self._gather.num_rows)
        if outside.any():
            raise self._out_of_range(int(ids[np.argmax(outside)]))
        if not (self.reads_the_disk or len(ids) >= SAMPLED_IDS):
            return
        if len(ids) <= INLINE_IDS:
            self._ask_where_cold(row_ids)
        elif self._is_cold(row_ids):
            # The caller may change its ids afterwards.
            self._thread().submit(self._ask, row_ids.clone())

    def trim(self) -> None:
        """Lets go of the mapping's pages where they are more than the budget allows; after stores."""
        if self._budget is not None:
            self._budget.keep()

    def close(self) -> None:
        """Ends the thread. Rows that were read stay valid."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._close_fd()

    def _ask_where_cold(self, row_ids: torch.Tensor) -> bool:
        """Asks for these rows' pages where they aren't in memory; whether it did."""
        if self.small.prefetch(row_ids):
            return bool(self.small.batches_to_ask == ASKED_BATCHES)
        if not self._is_cold(row_ids):
            return False
        self._ask(row_ids)
        return True

    def _ask(self, row_ids: torch.Tensor) -> None:
        ids = row_ids.reshape(-1).numpy()
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= self._gather.num_rows:
            return  # the gather says so
        runs_R2 = page_runs(ids, self._gather.row_bytes)
        started = time.perf_counter_ns()
        self._pages.will_need(runs_R2)
        # Pages in memory take 1 us. What was read ahead makes the gather itself fast: it has to be seen here.
        if time.perf_counter_ns() - started > SLOW_NS + len(runs_R2) * SLOW_NS_PER_ROW:
            self.small.batches_to_ask = ASKED_BATCHES

    def _look_after_slow(self, asked: bool) -> None:
        """After a gather that took long: was it the disk, or other work on the machine? A page that was asked for
        and isn't there yet doesn't count as a read by who touches it."""
        reads = disk_reads()
        if asked or reads is None or reads > self._disk_reads:
            self.small.batches_to_ask = ASKED_BATCHES
        self._disk_reads = reads or 0

    def _is_cold(self, row_ids: torch.Tensor) -> bool:
        """Whether one of a few rows isn't in memory, or that can't be known."""
        cold: bool | None = self.small.looks_cold(row_ids) if self._pages.tells else None
        if cold is not None:
            return cold
        ids = row_ids.reshape(-1)
        sample = ids[:: max(1, len(ids) // NUM_SAMPLES)][:NUM_SAMPLES].tolist()
        offsets = [row_id * self._gather.row_bytes for row_id in sample if 0 <= row_id < self._gather.num_rows]
        return not self._pages.in_memory(offsets)

    def _read_within(self, budget: _Budget, row_ids: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """In parts that can't map more than the budget has left."""
        if out is None:
            out = torch.empty((*row_ids.shape, self._gather.width), dtype=self._dtype.torch, device="cpu")
        ids, rows = row_ids.reshape(-1), out.view(-1, self._gather.width)
        part = max(1, budget.part_bytes // (FAULT_BYTES + self._gather.row_bytes))
        for start in range(0, len(ids), part):
            self._gather(ids[start : start + part], out=rows[start : start + part])
            budget.keep()
        return out

    def _thread(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():  # a forked child has no threads
            self._pool, self._process = ThreadPoolExecutor(1, "sense-v2-prefetch"), os.getpid()
        return self._pool

    def _out_of_range(self, row_id: int) -> IndexError:
        return IndexError(f"row id {row_id}: {self.path} has rows 0 to {self._gather.num_rows - 1}")

    def _refuse_cut_file(self) -> None:
        raise OSError(
            f"{self.path}: expected {self._num_bytes} bytes, found {self._mapping.size()}: the file was cut while it "
            "was open. Put a copy back and open it again"
        )


class NoSmallReads:
    """Where small batches have no way of their own: without the extension, of compact rows, within a budget."""

    batches_to_ask: int
    batches_after_cold: int
    slow = False

    def read(self, row_ids: torch.Tensor) -> None:
        return None

    def prefetch(self, row_ids: torch.Tensor) -> bool:
        return False

    def looks_cold(self, row_ids: torch.Tensor) -> None:
        return None


class _Budget:
    """Keeps a mapping's share of this process's memory under `max_bytes`."""

    def __init__(self, max_bytes: int, pages: Pages) -> None:
        self.part_bytes = max_bytes // 4
        self._drop_at_bytes = max_bytes // 2
        self._pages = pages
        self._others_bytes = _shared_bytes()
        self._since_drop = 0

    def keep(self) -> None:
        """Lets go of everything where it is half of the budget. What other files of this process grow by in the
        meantime counts as well, until the next time."""
        shared_bytes = _shared_bytes()
        if shared_bytes is None:  # not Linux: at worst each part mapped all that it could
            self._since_drop += self.part_bytes
            if self._since_drop >= self._drop_at_bytes:
                self._pages.drop()
                self._since_drop = 0
        elif shared_bytes - (self._others_bytes or 0) > self._drop_at_bytes:
            self._pages.drop()
            self._others_bytes = _shared_bytes()


def may_be_told(path: Path) -> bool:
    """Whether Linux tells this process which pages of the file are in memory: of others' files it says all are."""
    try:
        return os.access(path, os.W_OK) or os.stat(path).st_uid == os.geteuid()
    except OSError:
        return False


def disk_reads() -> int | None:
    """Page faults of this process that had to wait for a disk."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _shared_bytes() -> int | None:
    """The memory of this process that files back, by Linux's count."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(256).split()[2]) * mmap.PAGESIZE
    except OSError:
        return None


def map_rows(
    path: Path, dtype: np.dtype[Any], mode: Any, shape: tuple[int, int], *, has_holes: bool
) -> np.memmap[Any, Any]:
    """The file's rows, [N, D]; `mode` is np.memmap's. Raises `OSError` where it can't be mapped."""
    rows_ND = np.memmap(path, dtype=dtype, mode=mode, shape=shape)
    if hasattr(mmap, "MADV_RANDOM") and (has_holes or rows_ND.nbytes > SHARE_THAT_FITS * usable_memory_bytes()):
        with contextlib.suppress(OSError):  # it is advice; a file system may not take it
            rows_ND._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]  # NumPy's own name for the mapping
    return rows_ND


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or less where a cgroup (a container) limits this process."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":  # version 2 has one tree, version 1 one for each resource
                limits += _limits(root / "sys/fs/cgroup", group, "memory.max")
            elif "memory" in controllers.split(","):
                limits += _limits(root / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes")
    return min(limits)


def _limits(tree: Path, group: str, name: str) -> list[int]:
    """The limits of a group and those that it lies in. In a container, `group` may be a path of the host's, and the
    container's own limit lies at the tree's root."""
    found = []
    folder = tree / group.strip("/")
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            found.append(int((place / name).read_text(encoding="ascii")))
        if place == tree:
            break
    return found
