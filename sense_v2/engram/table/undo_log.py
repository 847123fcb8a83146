"""Puts the old bytes of rows about to change into the journal, once between two commits.

`protect_soon` is called with a batch's rows when they are looked up, and lets a thread copy, hash, append and sync
while the batch computes; `protect` is called before a store and usually finds everything done. A set of row ids says
whose old bytes are in the journal already; files whose rows are always protected together share it.

The old bytes' hashes leave the block sums when they are journaled, the new ones enter them at the commit: a commit
rereads the rows that changed, never the table.

The thread runs where the GIL is released: `index_select`, the hashes, `pwrite`, `fsync`.

U row ids, N rows.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from sense_v2.engram.table import platform
from sense_v2.engram.table.checksums import HASH_VERSION, PART_BYTES, add_rows, add_to_blocks, num_blocks, row_hashes
from sense_v2.engram.table.format import Manifest
from sense_v2.engram.table.journal import Journal, Record

THREAD_NAME = "sense-v2-journal"
LEAST_SLOTS = 1024


class RowSet:
    """A set of row ids below `num_rows`, in memory that follows how many there are, not the table.

    Few ids are a hash table (open addressing, each id plus one in a slot, 0 in a free one). Once that would take more
    than a bit for every row of the table, it is those bits.
    """

    def __init__(self, num_rows: int) -> None:
        self.is_empty = True
        self._num_rows = num_rows
        self._count = 0
        """Ids in the slots, at most."""
        self._slots: np.ndarray[Any, Any] = np.zeros(LEAST_SLOTS, np.uint32 if num_rows < 2**32 else np.int64)
        self._bits: np.ndarray[Any, Any] | None = None

    def missing(self, row_ids_U: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Those of the ids that aren't in the set."""
        if self.is_empty:
            return row_ids_U
        found = self.holds(row_ids_U)
        return row_ids_U[~found] if found.any() else row_ids_U

    def holds(self, row_ids_U: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each id, whether it is in the set."""
        if self._bits is None:
            return np.asarray(self._slots[self._places(row_ids_U)] != 0)
        shifts = (row_ids_U & 7).astype(np.uint8)
        return np.asarray(((self._bits[row_ids_U >> 3] >> shifts) & np.uint8(1)) != 0)

    def add(self, row_ids_U: np.ndarray[Any, Any]) -> None:
        self.is_empty = self.is_empty and not len(row_ids_U)
        self._make_room(len(row_ids_U))
        if self._bits is not None:
            np.bitwise_or.at(self._bits, row_ids_U >> 3, np.uint8(1) << (row_ids_U & 7).astype(np.uint8))
            return
        while len(row_ids_U):
            places_U = self._places(row_ids_U)
            self._slots[places_U] = row_ids_U + 1
            # Of several that found the same slot free, one has it now.
            row_ids_U = row_ids_U[self._slots[places_U] != row_ids_U + 1]

    def copy(self) -> RowSet:
        """A set of its own."""
        copied = RowSet(self._num_rows)
        copied.is_empty, copied._count, copied._slots = self.is_empty, self._count, self._slots.copy()
        if self._bits is not None:
            copied._bits = _zero_bits(self._num_rows)
            copied._bits[:] = self._bits
        return copied

    def _places(self, row_ids_U: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """For each id the slot that has it, or the free one where it belongs."""
        shift = np.uint64(65 - len(self._slots).bit_length())
        # Fibonacci hashing: the product's upper bits, as many as number the slots.
        places_U = ((row_ids_U.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> shift).astype(np.int64)
        searching = np.arange(len(row_ids_U))
        while len(searching):
            held = self._slots[places_U[searching]]
            searching = searching[(held != 0) & (held != row_ids_U[searching] + 1)]
            places_U[searching] = (places_U[searching] + 1) & (len(self._slots) - 1)
        return places_U

    def _make_room(self, more: int) -> None:
        self._count += more
        if self._bits is not None or 2 * self._count <= len(self._slots):
            return
        row_ids = self._slots[self._slots != 0].astype(np.int64) - 1
        num_slots = 1 << (3 * self._count - 1).bit_length()
        if num_slots * self._slots.itemsize > self._num_rows // 8:
            self._slots, self._bits = self._slots[:0], _zero_bits(self._num_rows)
        else:
            self._slots = np.zeros(num_slots, self._slots.dtype)
        self._count = more
        self.add(row_ids)


def _zero_bits(num_rows: int) -> np.ndarray[Any, Any]:
    """One bit a row, in pages that take memory when they are first set."""
    # Not np.zeros: the C library clears what it hands out again, and NumPy asks for pages of 2 MiB.
    return np.frombuffer(platform.private_pages(-(-num_rows // 8)), dtype=np.uint8)


class TrackedFile:
    """What changed in one file since the last commit."""

    def __init__(
        self,
        name: str,
        values_ND: torch.Tensor,
        sums: np.ndarray[Any, Any] | None,
        committed: bool,
        version: int = HASH_VERSION,
    ) -> None:
        self.name, self.values_ND, self.sums, self.committed = name, values_ND, sums, committed
        self._version = version
        self._delta = np.zeros(num_blocks(len(values_ND)), dtype=np.uint64)
        self.forget(RowSet(len(values_ND)))

    def forget(self, nothing: RowSet) -> None:
        """Nothing has changed yet; `nothing` may be shared with other files."""
        self.kept = nothing
        self._delta = np.zeros_like(self._delta)
        self.changed: list[np.ndarray[Any, Any]] = []

    def old_record(self, row_ids_U: np.ndarray[Any, Any]) -> tuple[Record, np.ndarray[Any, Any]]:
        """The rows as they are now, and their hashes."""
        record = Record(self.name, row_ids_U, self._raw(row_ids_U))
        return record, row_hashes(row_ids_U, record.rows_UB, self._version)

    def mark(self, row_ids_U: np.ndarray[Any, Any], hashes_U: np.ndarray[Any, Any]) -> None:
        """These rows are in the journal; who calls it adds them to `kept`, which other files may share."""
        add_to_blocks(self._delta, row_ids_U, np.uint64(0) - hashes_U, len(self.values_ND))
        self.changed.append(row_ids_U)

    def new_sums(self) -> np.ndarray[Any, Any] | None:
        """Block sums with the rows as they are now; None where they weren't known before."""
        if self.sums is None:
            return None
        sums = self.sums + self._delta
        part_rows = max(1, PART_BYTES // self._raw(np.zeros(1, dtype=np.int64)).shape[1])
        for row_ids_U in self.changed:
            for start in range(0, len(row_ids_U), part_rows):
                part = row_ids_U[start : start + part_rows]
                add_rows(sums, part, self._raw(part), len(self.values_ND), self._version)
        return sums

    def _raw(self, row_ids_U: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        rows = torch.index_select(self.values_ND, 0, torch.from_numpy(row_ids_U))
        return np.asarray(rows.view(torch.uint8).numpy())


class UndoLog:
    """Keeps old bytes of the rows of several files, by name, in one journal.

    With `durable`, bytes are synced before `protect` returns. What fails in the thread is raised by the next call of
    `protect`, `protect_soon` or `wait`.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.durable = False
        self.failed = False
        """Whether a sync failed: from then on nothing can be promised."""
        self.stored = False
        """Whether anything may have been stored since the last commit: if not, there is nothing to undo."""
        self.files: dict[str, TrackedFile] = {}
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []
        self._process = os.getpid()

    def track(self, file: TrackedFile) -> None:
        """From here on rows of this file are kept, too."""
        # The thread may be about to add rows to a set that is still empty: rows that this file doesn't keep.
        with self._lock:
            unused = next((other.kept for other in self.files.values() if other.kept.is_empty), None)
            file.kept = unused or file.kept
            self.files[file.name] = file

    def protect_soon(self, row_ids_U: torch.Tensor) -> None:
        """Begins to keep these rows of all files. Ids are unique, int64, on the CPU."""
        with self._starting:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, THREAD_NAME)
            future = self._pool.submit(self._protect, list(self.files), row_ids_U.numpy())
            running = [one for one in self._running if not one.done() or one.exception()]
            self._running = [*running, future]

    def protect(self, names: list[str], row_ids_U: torch.Tensor) -> None:
        """Returns when these rows of those files may be stored to."""
        self.wait()
        self._protect(names, row_ids_U.numpy())

    def _protect(self, names: list[str], row_ids_U: np.ndarray[Any, Any]) -> None:
        # A row is in the journal at most once, also where a caller hands it over twice. Those of a batch are sorted.
        if not (np.diff(row_ids_U) > 0).all():
            row_ids_U = np.unique(row_ids_U)
        with self._lock:
            files = [self.files[name] for name in names]
            while files:
                together = [file for file in files if file.kept is files[0].kept]
                files = [file for file in files if file not in together]
                self._keep(together, row_ids_U)
            if self.durable:
                try:
                    self.journal.sync()
                except OSError:
                    self.failed = True
                    raise

    def _keep(self, files: list[TrackedFile], row_ids_U: np.ndarray[Any, Any]) -> None:
        """The rows' old bytes to the journal, for files that share their set."""
        kept = files[0].kept
        new = kept.missing(row_ids_U)
        if not len(new):
            return
        if any(other.kept is kept and other not in files for other in self.files.values()):
            kept = kept.copy()
            for file in files:
                file.kept = kept
        done: list[TrackedFile] = []
        try:
            for file in files:
                record, hashes_U = file.old_record(new)
                if file.committed:
                    self.journal.append(record, int(hashes_U.sum()))
                file.mark(new, hashes_U)
                done.append(file)
        except BaseException:
            if done:
                # A row is in the journal at most once: these files have it, the others don't.
                own = kept.copy()
                own.add(new)
                for file in done:
                    file.kept = own
            raise
        kept.add(new)

    def wait(self) -> None:
        """Until the thread is done with everything; raises the first thing that it ran into."""
        running, self._running = self._running, []
        wait(running)
        for future in running:
            future.result()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """While the block runs nothing is protected: what is, is in the journal and marked, or neither. Rows that the
        thread couldn't protect weren't stored to, so that is no loss."""
        with contextlib.suppress(OSError):
            self.wait()
        with self._lock:
            yield

    def new_sums(self) -> dict[str, np.ndarray[Any, Any] | None]:
        """Each file's block sums with the rows as they are now; None where they weren't known before."""
        return {name: file.new_sums() for name, file in self.files.items()}

    def committed(self, sums: dict[str, np.ndarray[Any, Any] | None], manifest: Manifest) -> None:
        """All is as `sums` says, and committed: begins anew from there."""
        nothing: RowSet | None = None
        for name, file in self.files.items():
            nothing = nothing or RowSet(len(file.values_ND))
            file.sums, file.committed = sums[name], True
            file.forget(nothing)
        self.stored = False
        self.journal.begin(manifest.generation, manifest.commit_number, manifest.format_version)

    def close(self) -> None:
        """Ends the thread and lets go of the files. The journal stays where something was stored: it undoes that."""
        if self._process == os.getpid():
            if self._pool is not None:
                self._pool.shutdown()
            if not self.stored:
                self.journal.empty()
            self.journal.close()
        self._running, self.files = [], {}
