"""What is kept in the journal, against a Python set and the journal's bytes, read as docs/format.md has them."""

import errno
import gc
import json
import os
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk, undo_log
from sense_v2.engram.table.checksums import block_sums
from sense_v2.engram.table.disk import WriterLock
from sense_v2.engram.table.undo_log import RowSet

ROWS, WIDTH = 64, 4
TABLE, STATE = "engram_table.dat", "engram_table.sums.dat"

# Few, so that a row is often met again.
row_ids = st.lists(st.integers(0, 4), unique=True, max_size=4)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def journaled(path: Path) -> list[tuple[str, int, bytes]]:
    """(file, row id, old bytes) of every record: a reader of its own, after docs/format.md."""
    data = path.read_bytes() if path.exists() else b""
    at, found = 48, []
    while at < len(data):
        name_bytes, _, row_bytes, count = struct.unpack_from("<HHII", data, at + 4)
        assert data[at : at + 4] == b"rows"
        at += 32
        name = data[at : at + name_bytes].decode()
        ids = struct.unpack_from(f"<{count}q", data, at + name_bytes)
        at += name_bytes + 8 * count
        found += [(name, row_id, data[at + n * row_bytes :][:row_bytes]) for n, row_id in enumerate(ids)]
        at += count * row_bytes
    return found


def tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


@given(st.data(), st.sampled_from([ROWS, 5_000, 2**20, 2**45]), st.sampled_from([2, 64, 1024]))
def test_a_row_set_is_a_set(data, num_rows, least_slots):
    """As slots that grow, as bits, and over the step from one to the other."""
    ids = st.lists(st.integers(0, num_rows - 1) | st.integers(max(0, num_rows - 99), num_rows - 1), max_size=60)
    batches = data.draw(st.lists(ids, max_size=6))
    with mock.patch.object(undo_log, "LEAST_SLOTS", least_slots):
        rows, expected = RowSet(num_rows), set()
        for batch in batches:
            new = rows.missing(np.array(batch, dtype=np.int64))
            assert new.tolist() == [row_id for row_id in batch if row_id not in expected]
            rows.add(new)
            expected |= set(batch)
        assert rows.is_empty == (not any(batches))
        asked = np.array(sorted({*expected, *range(min(num_rows, 200)), num_rows - 1}))
        assert set(asked) - set(rows.missing(asked)) == expected
        copied = rows.copy()
        assert copied.missing(asked).tolist() == rows.missing(asked).tolist()
        copied.add(asked)
        assert copied.missing(asked).tolist() == []
        assert set(asked) - set(rows.missing(asked)) == expected, "a copy is a set of its own"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("num_rows", "most_bytes"), [(2**40, 24 << 20), (2**20, 2 << 20)])
def test_the_memory_of_a_row_set_follows_its_rows_and_is_a_bit_a_row_at_most(num_rows, most_bytes):
    """Bits alone would take 1.6 GB, where each id has a page of them to itself; slots alone 4 MiB."""
    batches = np.random.default_rng(0).integers(0, num_rows, (40, 10_000))
    every = np.unique(batches)
    before = anonymous_bytes()
    rows = RowSet(num_rows)
    for batch in batches:
        rows.add(rows.missing(np.unique(batch)))
    assert anonymous_bytes() - before < most_bytes
    assert len(rows.missing(every)) == 0
    others = np.setdiff1d(every ^ 1, every)
    assert np.array_equal(rows.missing(others), others)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["protect", "write", "write_state", "write_later", "lookup"]), row_ids),
            st.tuples(st.just("commit"), st.just([])),
        ),
        max_size=15,
    )
)
@settings(max_examples=100, deadline=None)
def test_each_row_is_journaled_once_before_it_changes_and_counts_in_the_checksums(tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("table")
    storage = MMapEmbeddingStorage(ROWS, WIDTH, folder / TABLE).train()
    states = [storage.open_state("sums", 1)]
    storage.commit()
    committed = {name: (folder / name).read_bytes() for name in (TABLE, STATE)}
    generator = torch.Generator().manual_seed(0)
    for call, ids in calls:
        if call == "protect":
            storage.protect(tensor(ids))
        elif call == "write":
            storage.write(tensor(ids), torch.randn(len(ids), WIDTH, generator=generator))
        elif call == "write_state":
            storage.write_state(states[0], tensor(ids), torch.randn(len(ids), 1, generator=generator))
        elif call == "lookup":
            storage(tensor(ids))
        elif call == "write_later":
            later = storage.open_state("later", 2)
            storage.write_state(later, tensor(ids), torch.randn(len(ids), 2, generator=generator))
        else:
            storage.commit()
            committed = {path.name: path.read_bytes() for path in folder.glob("*.dat")}
    storage.protect(tensor([]))  # the thread is done
    found = journaled(folder / "engram_table.journal")
    assert len({(name, row_id) for name, row_id, _ in found}) == len(found), "a row at most once"
    kept = {(name, row_id): old for name, row_id, old in found}
    for name, before in committed.items():
        after, row_bytes = (folder / name).read_bytes(), len(before) // ROWS
        for row_id in range(ROWS):
            row = slice(row_id * row_bytes, (row_id + 1) * row_bytes)
            if (name, row_id) in kept:
                assert kept[name, row_id] == before[row]
            else:
                assert after[row] == before[row], "it changed, and nothing undoes it"
    storage.commit()
    manifest = json.loads((folder / "engram_table.json").read_text())
    entries = [(TABLE, manifest), *((entry["file"], entry) for entry in manifest["states"].values())]
    for name, entry in entries:
        rows_NB = np.fromfile(folder / name, dtype=np.uint8).reshape(ROWS, -1)
        assert [int(text, 16) for text in entry["checksums"]] == block_sums(rows_NB).tolist(), name
    storage.close()


def test_a_state_that_is_opened_while_the_thread_works_is_undone_and_counted_too(tmp_path, monkeypatch):
    """The thread is about to add a lookup's rows to a set that is still empty; they aren't the new state's."""
    storage = MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / TABLE).train()
    storage.open_state("later", 2)
    storage.commit()
    storage.close()
    storage = MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / TABLE).train()
    real, at_work = undo_log.TrackedFile.old_record, threading.Event()

    def slow(self, row_ids_U):
        at_work.set()
        time.sleep(0.2)
        return real(self, row_ids_U)

    monkeypatch.setattr(undo_log.TrackedFile, "old_record", slow)
    storage(tensor([3, 5]))
    assert at_work.wait(10)
    later = storage.open_state("later", 2)
    storage.write_state(later, tensor([3]), torch.ones(1, 2))
    found = [(name, row_id) for name, row_id, _ in journaled(tmp_path / "engram_table.journal")]
    assert ("engram_table.later.dat", 3) in found
    storage.commit()
    entry = json.loads((tmp_path / "engram_table.json").read_text())["states"]["later"]
    rows_NB = np.fromfile(tmp_path / entry["file"], dtype=np.uint8).reshape(ROWS, -1)
    assert [int(text, 16) for text in entry["checksums"]] == block_sums(rows_NB).tolist()
    storage.close()


class FailsAt:
    """The module `os`, whose nth `pwrite` finds a full disk."""

    def __init__(self, nth: int) -> None:
        self.nth, self.count = nth, 0

    def __getattr__(self, name: str):
        return getattr(os, name)

    def pwrite(self, fd: int, data, offset: int) -> int:
        self.count += 1
        if self.count == self.nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(fd, data, offset)


@pytest.mark.parametrize("nth", range(1, 10))
def test_a_record_that_fails_leaves_each_file_with_what_it_has(tmp_path, monkeypatch, nth):
    """Rows of one file are in the journal, those of the other aren't: the next call adds just those."""
    storage = MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / TABLE).train()
    storage.open_state("sums", 1)
    storage.commit()
    shim = FailsAt(nth)
    monkeypatch.setattr(disk, "os", shim)
    with pytest.raises(OSError, match="journal"):
        storage.protect(tensor([3, 5]))
    assert shim.count == nth
    storage.protect(tensor([3, 5, 7]))
    found = [(name, row_id) for name, row_id, _ in journaled(tmp_path / "engram_table.journal")]
    assert sorted(found) == sorted((name, row_id) for name in (TABLE, STATE) for row_id in (3, 5, 7))
    storage.commit()
    storage.close()


def test_what_fails_in_the_thread_is_raised_by_the_write(tmp_path, monkeypatch):
    storage = MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / TABLE).train()
    before = (tmp_path / TABLE).read_bytes()
    monkeypatch.setattr(disk, "os", FailsAt(2))
    rows = storage(tensor([3, 5]))
    wait(storage._undo._running)  # it has failed by now, and the forward goes on
    rows.sum().backward()
    for _ in range(2):  # the second one finds the failure of the first forgotten, and the disk still full
        with pytest.raises(OSError, match=r"can't write \d+ bytes to .*engram_table\.journal: No space left"):
            storage.write(tensor([3]), torch.ones(1, WIDTH))
        assert (tmp_path / TABLE).read_bytes() == before
        disk.os.count = 1
    disk.os.count = 100
    storage.write(tensor([3]), torch.ones(1, WIDTH))
    assert storage.gather(tensor([3])).tolist() == [[1.0] * WIDTH]
    storage.commit()
    storage.close()


# Letting go


def test_rows_that_were_only_looked_up_leave_nothing_to_undo(tmp_path):
    path, journal = tmp_path / TABLE, tmp_path / "engram_table.journal"
    storage = MMapEmbeddingStorage(ROWS, WIDTH, path).train()
    state = storage.open_state("sums", 1)
    storage.commit()
    storage(tensor([1, 2]))
    storage.protect(tensor([7]))
    assert journal.stat().st_size > 0
    storage.close()
    assert not journal.exists()
    # So it is after a commit, too, and what was stored counts again.
    for change in ("row", "state"):
        storage = MMapEmbeddingStorage(ROWS, WIDTH, path).train()
        state = storage.open_state("sums", 1)
        for committed in (True, False):
            if change == "row":
                storage.write(tensor([1]), torch.ones(1, WIDTH))
            else:
                storage.write_state(state, tensor([1]), torch.ones(1, 1))
            if committed:
                storage.commit()
        del storage, state
        assert {name for name, _, _ in journaled(journal)} == {TABLE if change == "row" else STATE}
        with pytest.warns(UserWarning, match="1 row was put back"):
            MMapEmbeddingStorage(ROWS, WIDTH, path).close()


@pytest.fixture
def held_up(monkeypatch):
    """Writes that have begun, and that go on when they are told to; each of them collects garbage."""
    begun, go_on = threading.Event(), threading.Event()

    class HeldUp:
        def __getattr__(self, name: str):
            return getattr(os, name)

        def pwrite(self, fd: int, data, offset: int) -> int:
            if threading.current_thread().name.startswith("sense-v2-journal"):
                begun.set()
                assert go_on.wait(30)
                gc.collect()
            return os.pwrite(fd, data, offset)

    monkeypatch.setattr(disk, "os", HeldUp())
    failures: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    yield begun, go_on
    assert failures == []


@pytest.mark.parametrize("is_cycle", [False, True])
def test_a_table_that_is_let_go_of_while_the_thread_writes(tmp_path, held_up, is_cycle):
    """Its journal is closed when that is done, also where it is that thread which finds the table to be garbage."""
    begun, go_on = held_up
    storage = MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / TABLE).train()
    if is_cycle:
        storage.itself = [storage]
    storage(tensor([1, 2, 3]))
    storage(tensor([4]))
    assert begun.wait(30)
    if is_cycle:
        del storage
        assert WriterLock.is_held(tmp_path / "engram_table.lock")
        go_on.set()
    else:
        threading.Timer(0.1, go_on.set).start()
        del storage
        assert not WriterLock.is_held(tmp_path / "engram_table.lock"), "del waits"
    ends = time.monotonic() + 30
    while WriterLock.is_held(tmp_path / "engram_table.lock") and time.monotonic() < ends:
        gc.collect()
        time.sleep(0.01)
    assert not WriterLock.is_held(tmp_path / "engram_table.lock")
    assert not (tmp_path / "engram_table.journal").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sense-v2")]
    MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / TABLE).close()


def test_one_thread_keeps_the_rows_that_many_look_up(tmp_path):
    storage = MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / TABLE).train()
    start = threading.Barrier(8)
    before = set(threading.enumerate())  # tables of other tests that nobody has collected yet

    def look_up(number):
        start.wait()
        for row_id in range(number, ROWS, 8):
            storage(tensor([row_id]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look_up, range(8)))
    new = set(threading.enumerate()) - before
    assert len([thread for thread in new if thread.name.startswith("sense-v2-journal")]) == 1
    storage.protect(tensor([]))
    assert {row_id for _, row_id, _ in journaled(tmp_path / "engram_table.journal")} == set(range(ROWS))
    storage.close()
