"""disk.py: who may write, what is refused in the place of a table's own files, writes that are cut short."""

import contextlib
import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tables import D, in_a_fork, make, names, run_python

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table.disk import (
    MadeMeanwhileError,
    SyncError,
    WriterLock,
    allocate,
    new_file,
    open_own,
    sync_fd,
    write_at,
)


class Shim:
    """The `os` module with some of its functions replaced."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engram_table.dat"


@pytest.fixture
def lock_path(tmp_path: Path) -> Path:
    return tmp_path / "engram_table.lock"


HOLDER = """
import os, sys, time
from pathlib import Path
from sense_v2.engram.table.disk import WriterLock
path, kind = Path(sys.argv[1]), sys.argv[2]
lock = WriterLock(path, "table")
forked = os.fork() if kind == "forks" else None
# The forked child speaks for itself: when its parent has its id, it may not have run yet.
if not forked:
    print(os.getpid(), flush=True)
if forked == 0:
    os.close(1)
time.sleep(600)
"""


@contextlib.contextmanager
def held_elsewhere(lock_path: Path, kind: str = "plain") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the lock, and the id that it prints: its own, or that of its forked child."""
    child = run_python(HOLDER, lock_path, kind)
    assert child.stdout is not None
    printed = 0
    try:
        printed = int(child.stdout.readline())
        yield child, printed
    finally:
        child.kill()
        if kind == "forks":
            os.kill(printed, signal.SIGKILL)
        child.communicate()


# The writer's lock


def test_a_second_writer_in_another_process_is_refused_with_the_firsts_id(lock_path: Path) -> None:
    with held_elsewhere(lock_path) as (child, _):
        error = (
            rf"^\[Errno {errno.EAGAIN}\] table is being written to by process {child.pid}; wait for its end, or open"
        )
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=error):
                WriterLock(lock_path, "table")
        assert WriterLock.holder(lock_path) == str(child.pid)
        assert WriterLock.is_held(lock_path)
        # However it ends: the kernel drops the lock.
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (WriterLock.holder(lock_path), WriterLock.is_held(lock_path)) == (None, False)
        assert lock_path.read_text() == f"{child.pid}\n"
        lock = WriterLock(lock_path, "table")
        assert lock_path.read_text() == f"{os.getpid()}\n"
        lock.release()


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path, lock_path: Path) -> None:
    lock = WriterLock(lock_path, "table")
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (lock_path, tmp_path / "link" / lock_path.name):
        with pytest.raises(
            BlockingIOError, match="table is open for writing in this process already; close\\(\\) it"
        ):
            WriterLock(other, "table")
        # To look is not to let go.
        assert (WriterLock.holder(other), WriterLock.is_held(other)) == (None, True)
    assert in_a_fork(lambda: WriterLock.holder(lock_path)) == str(os.getpid())
    lock.release()
    lock.release()
    assert in_a_fork(lambda: WriterLock.holder(lock_path)) == "None"
    assert not WriterLock.is_held(lock_path)
    WriterLock(lock_path, "table").release()


def test_a_folder_that_is_renamed_under_its_writer(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    lock = WriterLock(tmp_path / "old" / "t.lock", "table")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(BlockingIOError, match="open for writing in this process already"):
        WriterLock(tmp_path / "new" / "t.lock", "table")
    # In the old place there may be another table by now.
    (tmp_path / "old").mkdir()
    WriterLock(tmp_path / "old" / "t.lock", "other").release()
    assert WriterLock.is_held(tmp_path / "new" / "t.lock")
    assert in_a_fork(lambda: WriterLock.holder(tmp_path / "new" / "t.lock")) == str(os.getpid())
    lock.release()


def test_a_forked_child_has_no_lock_and_takes_none_away(lock_path: Path) -> None:
    lock = WriterLock(lock_path, "table")

    def child() -> None:
        lock.release()
        WriterLock(lock_path, "table")

    assert in_a_fork(child).startswith(
        f"BlockingIOError: [Errno {errno.EAGAIN}] table is being written to by process {os.getpid()}"
    )
    assert in_a_fork(lambda: WriterLock.holder(lock_path)) == str(os.getpid())
    lock.release()


def test_a_forked_child_that_outlives_the_writer_does_not_hold_its_lock(lock_path: Path) -> None:
    with held_elsewhere(lock_path, "forks") as (child, forked):
        assert WriterLock.holder(lock_path) == str(child.pid)
        child.kill()
        child.wait()
        os.kill(forked, 0)  # it is there
        assert WriterLock.holder(lock_path) is None
        WriterLock(lock_path, "table").release()


def test_a_fork_while_another_thread_takes_a_lock(lock_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child must find neither a guard that nobody will give back nor a descriptor that it doesn't know of."""
    taking, real = threading.Event(), fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if not taking.is_set():
            taking.set()
            time.sleep(0.2)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    locks: list[WriterLock] = []
    thread = threading.Thread(target=lambda: locks.append(WriterLock(lock_path, "table")))
    thread.start()
    assert taking.wait(30)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # It outlives the lock.
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    thread.join(30)
    assert in_a_fork(lambda: WriterLock.holder(lock_path)) == str(os.getpid())
    locks[0].release()
    WriterLock(lock_path, "table").release()
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)


def test_a_lock_outlasts_a_copy_of_its_file(tmp_path: Path) -> None:
    """To read the folder's files, as a backup or an upload does, is to open and close the lock's too."""
    path = tmp_path / "tables" / "engram_table.dat"
    table = make(path)
    shutil.copytree(path.parent, tmp_path / "copy")
    lock_path = path.with_suffix(".lock")
    assert in_a_fork(lambda: WriterLock.holder(lock_path)) == str(os.getpid())
    assert in_a_fork(lambda: WriterLock(lock_path, "table")).startswith("BlockingIOError")
    table.close()
    assert in_a_fork(lambda: WriterLock.holder(lock_path)) == "None"


def test_nobody_holds_a_lock_whose_file_is_not_there_and_asking_makes_none(lock_path: Path) -> None:
    assert (WriterLock.holder(lock_path), WriterLock.is_held(lock_path)) == (None, False)
    assert names(lock_path.parent) == []


def test_a_holder_that_is_no_number_is_unknown(lock_path: Path) -> None:
    """Anybody may have written the file, and what it says goes to a terminal."""
    with held_elsewhere(lock_path):
        for text in ("", "\x1b[2J", "12 34\n", "-5\n", "a" * 5000):
            lock_path.write_text(text)
            assert WriterLock.holder(lock_path) == "unknown"
            with pytest.raises(BlockingIOError, match="written to by process unknown; wait"):
                WriterLock(lock_path, "table")


def test_a_long_old_id_leaves_nothing_behind_a_short_one(lock_path: Path) -> None:
    lock_path.write_text("9" * 30)
    WriterLock(lock_path, "table").release()
    assert lock_path.read_text() == f"{os.getpid()}\n"


def test_who_only_looks_for_a_moment_does_not_keep_a_writer_out(
    lock_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        tried.append(operation)
        if len(tried) < 3:
            raise BlockingIOError(errno.EAGAIN, "somebody looks")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = WriterLock(lock_path, "table")
    assert tried == [fcntl.LOCK_EX | fcntl.LOCK_NB] * 3
    assert lock_path.read_text() == f"{os.getpid()}\n"
    lock.release()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_system_without_locks_keeps_nobody_apart_and_other_errors_are_told(
    lock_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO):

        def flock(*_: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", flock)
            assert WriterLock.holder(lock_path) is None
            if number == errno.EIO:
                with pytest.raises(OSError, match="Input/output error"):
                    WriterLock(lock_path, "table")
                assert not WriterLock.is_held(lock_path)
            else:
                lock = WriterLock(lock_path, "table")
                # Within the process it still does.
                with pytest.raises(BlockingIOError, match="in this process already"):
                    WriterLock(lock_path, "table")
                lock.release()
    assert open_descriptors() == before


def test_a_lock_file_that_cannot_be_written_is_no_lock(lock_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(disk, "os", Shim(pwrite=full))
    with pytest.raises(OSError, match="no space"):
        WriterLock(lock_path, "table")
    monkeypatch.undo()
    assert open_descriptors() == before
    assert in_a_fork(lambda: WriterLock.holder(lock_path)) == "None"
    WriterLock(lock_path, "table").release()


def test_closing_or_collecting_a_table_gives_its_lock_back(path: Path) -> None:
    table: MMapEmbeddingStorage | None = make(path)
    for let_go in ("close", "references", "a cycle"):
        with pytest.raises(BlockingIOError, match="in this process already"):
            make(path)
        assert table is not None
        if let_go == "close":
            table.close()
        elif let_go == "a cycle":
            table.itself = [table]  # type: ignore[assignment]  # a module takes any attribute
        table = None
        gc.collect()
        table = make(path)
    with pytest.raises(ValueError, match="rows is 50, asked for 49"):
        MMapEmbeddingStorage(49, D, path, mode="r")
    table.close()
    # One that couldn't be opened holds nothing either.
    with pytest.raises(ValueError, match="rows is 50, asked for 49"):
        MMapEmbeddingStorage(49, D, path)
    make(path).close()


def test_a_collection_in_the_middle_of_taking_a_lock(
    tmp_path: Path, lock_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may give back another table's lock, in the same thread."""
    gc.collect()
    gc.disable()
    try:
        table = make(tmp_path / "other.dat")
        table.itself = [table]  # type: ignore[assignment]  # as above
        del table

        def collecting(*arguments: Any) -> int:
            gc.collect()
            return os.open(*arguments)

        monkeypatch.setattr(disk, "os", Shim(open=collecting))
        locks: list[WriterLock] = []
        thread = threading.Thread(target=lambda: locks.append(WriterLock(lock_path, "table")), daemon=True)
        thread.start()
        thread.join(30)
        assert len(locks) == 1, "it waits for itself"
    finally:
        gc.enable()
    locks[0].release()
    assert not WriterLock.is_held(tmp_path / "other.lock")


# What lies in the place of a table's own files


@pytest.mark.filterwarnings("ignore:.*(was|were) put back")
@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link", "folder", "pipe"])
@pytest.mark.parametrize("name", ["lock", "journal", "json.tmp", "dat.tmp", "adam.dat.tmp"])
def test_nothing_else_is_written_through_a_tables_own_names(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "tables" / "engram_table.dat"
    if name != "dat.tmp":
        make(path).close()
    else:
        path.parent.mkdir()
    victim, place = tmp_path / "victim", path.with_suffix(f".{name}")
    victim.write_bytes(b"somebody else's")
    before = victim.read_bytes(), victim.stat().st_mtime_ns, victim.stat().st_mode
    place.unlink(missing_ok=True)
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "hard link":
        place.hardlink_to(victim)
    else:
        place.symlink_to(victim if kind == "link" else tmp_path / "nothing")

    def use() -> None:
        table = make(path)
        try:
            table.write_state(table.open_state("adam", 2), torch.tensor([1]), torch.ones(1, 2))
            table.write(torch.tensor([1]), torch.ones(1, D))
            table.flush()
        finally:
            table._let_go()

    with pytest.raises(OSError, match=rf"engram_table\.{name}\b"):
        use()
    assert (victim.read_bytes(), victim.stat().st_mtime_ns, victim.stat().st_mode) == before
    assert not (tmp_path / "nothing").exists()
    (place.rmdir if kind == "folder" else place.unlink)()
    use()


def test_what_a_link_or_another_kind_of_file_is_told_as(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "hard").hardlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    for name, number, text in (
        ("link", errno.ELOOP, "is a link; a file of this name belongs to the table alone. Remove it"),
        ("hard", errno.EMLINK, "has another name as well"),
        ("pipe", errno.EINVAL, "isn't a regular file"),
    ):
        with pytest.raises(OSError, match=text) as caught:
            open_own(tmp_path / name)
        assert caught.value.errno == number
    # To read a file with two names does no harm.
    os.close(open_own(tmp_path / "hard", create=False, write=False))


# Writes


@pytest.mark.parametrize("most", [1, 3, 7, 1000])
def test_writes_that_are_cut_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    calls = []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        return os.pwrite(fd, data[:most], offset)

    monkeypatch.setattr(disk, "os", Shim(pwrite=pwrite))
    values = np.arange(12, dtype="<u4").reshape(3, 4)
    with open(tmp_path / "file", "w+b") as file:
        write_at(file.fileno(), b"head", 0)
        write_at(file.fileno(), values, 4)
        write_at(file.fileno(), b"", 2)
        assert file.read() == b"head" + values.tobytes()
    assert len(calls) == -(-4 // most) + -(-48 // most)


def test_a_write_that_writes_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "os", Shim(pwrite=lambda *_: 0))
    with (
        open(tmp_path / "file", "wb") as file,
        pytest.raises(OSError, match="a write of 5 bytes at 3 wrote nothing"),
    ):
        write_at(file.fileno(), b"12345", 3)


def test_allocated_space_is_there_and_zeros(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        allocate(file.fileno(), 100_000, tmp_path / "file")
        assert file.read() == bytes(100_000)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 100_000


def test_a_failed_sync_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    with open(tmp_path / "file", "wb") as file:
        sync_fd(file.fileno(), tmp_path / "file")
        monkeypatch.setattr(disk, "os", Shim(fsync=fail))
        with pytest.raises(SyncError, match=rf"can't sync {tmp_path}/file: input/output error") as caught:
            sync_fd(file.fileno(), tmp_path / "file")
    assert caught.value.errno == errno.EIO


def test_a_sync_goes_through_the_disks_own_cache_where_there_is_a_call_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS: fsync ends at the disk's cache."""
    calls: list[Any] = []
    monkeypatch.setattr(platform, "FULL_SYNC", 51)
    monkeypatch.setattr(fcntl, "fcntl", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(disk, "os", Shim(fsync=lambda _: calls.append("fsync")))
    with open(tmp_path / "file", "wb") as file:
        sync_fd(file.fileno(), tmp_path / "file")
        assert calls == [(file.fileno(), 51)]


# Files made whole


def test_a_new_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with new_file(path) as fd:
        write_at(fd, b"first", 0)
        assert names(path.parent) == ["file.tmp"]
    assert (path.read_bytes(), names(path.parent)) == (b"first", ["file"])
    with pytest.raises(MadeMeanwhileError), new_file(path):
        raise AssertionError("the block must not run")

    def fail() -> None:
        with new_file(path, replace=True) as fd:
            write_at(fd, b"second", 0)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert (path.read_bytes(), names(path.parent)) == (b"first", ["file"])
    # What a dead process left is taken over, whatever is in it.
    path.with_name("file.tmp").write_bytes(b"x" * 100)
    with new_file(path, replace=True) as fd:
        write_at(fd, b"second", 0)
    assert (path.read_bytes(), names(path.parent)) == (b"second", ["file"])


def test_makers_of_one_file_come_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    inside, seen = [0], []

    def work(number: int) -> None:
        with new_file(path, replace=True) as fd:
            inside[0] += 1
            seen.append(inside[0])
            time.sleep(0.005)
            write_at(fd, f"{number}".encode(), 0)
            inside[0] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [1] * 8
    assert names(tmp_path) == ["file"]
    assert path.read_text() in "01234567"
