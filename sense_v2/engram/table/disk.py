"""Every call that changes what is on disk: whole files, space, writes, syncs, locks.

A file appears under its final name complete or not at all: `new_file` gives a temporary in the same folder and
renames it when the block ends well. There is one temporary name per file, and its maker holds a lock on it: a second
process that wants the same file waits for the first one, and the leftover of a process that died, which nobody holds
a lock on, is taken over.

`allocate` reserves the space first, so that a full disk is an error now and no SIGBUS when the mapping is written.
`WriterLock` keeps a table to one writer.

Tests replace this module's `os` by one that fails, or records, or cuts writes short: what has to survive that goes
through here.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table import platform

TEMPORARY_SUFFIX = ".tmp"

_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the process (ulimit -f) or the file system allows no file of that size",
}


class MadeMeanwhileError(Exception):
    """Another process has made the file since the caller looked."""


class SyncError(OSError):
    """A sync failed. What of the file is on the disk isn't known, and the kernel reports it only once."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an error that doesn't name it: what the system says of a descriptor has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and str(path) not in str(error):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def new_file(
    path: Path, *, replace: bool = False, like: Path | None = None, keep: Callable[[], bool] = lambda: False
) -> Iterator[int]:
    """Gives the descriptor of an empty temporary; when the block ends well it is synced and renamed to `path`.

    It may be read and written by whom the file `like` may be. After an error it is removed, unless `keep()` says that
    `finish_new_file` will want it. Without `replace`, a `path` that exists once the lock is held is a
    `MadeMeanwhileError`. A folder that can't be made or written to is an `OSError` that names it and the way out.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _open_locked(temporary)
    except OSError as error:
        if error.filename is None:  # this module's own, which says it all
            raise
        raise with_way_out(
            OSError(error.errno, f"can't write {path}: {error.strerror} ({error.filename})"),
            "Make its folder writable, or choose another path",
        ) from error
    try:
        if path.exists() and not replace:
            raise MadeMeanwhileError(path)
        with naming(path):
            os.ftruncate(fd, 0)
            if like is not None:
                platform.take_mode(fd, like)
            yield fd
            sync_fd(fd, path)
            _replace(temporary, path)
        platform.unlock(fd)  # who holds a table's lock writes to it
        sync(path.parent)
    except BaseException:
        # After the rename there is none; until then nobody else can have made it anew, because of the lock. One that
        # can't be removed is taken over by who comes next: not worth hiding what happened.
        if not keep():
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
    finally:
        os.close(fd)


def write_file(path: Path, text: str, like: Path | None = None) -> None:
    """Puts a file of this text in the place of what is at `path`, whole or not at all. Raises as `new_file`."""
    with new_file(path, replace=True, like=like) as fd:
        write_at(fd, text.encode(), 0)


def rename(temporary: Path, path: Path) -> None:
    """Renames a file that is synced, and makes that durable."""
    _replace(temporary, path)
    sync(path.parent)


def _replace(temporary: Path, path: Path) -> None:
    if platform.windows is None:
        os.replace(temporary, path)
    else:
        platform.replace(temporary, path)


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags, 0o666) if platform.windows is None else platform.open_file(path, flags)


def wait_for_new_file(path: Path) -> None:
    """Waits while another process is at making `path`."""
    with contextlib.suppress(FileNotFoundError):
        fd = open_own(path.with_name(path.name + TEMPORARY_SUFFIX), create=False, write=False)
        try:
            _lock(fd, shared=True)
        finally:
            os.close(fd)


def finish_new_file(path: Path, is_whole: Callable[[Path], bool]) -> None:
    """Renames the temporary that a dead maker of `path` left, where `is_whole` says so of what it holds."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with contextlib.suppress(FileNotFoundError):
        fd = open_own(temporary, create=False)
        try:
            _lock(fd)
            if not path.exists() and is_whole(temporary):
                sync_fd(fd, temporary)
                rename(temporary, path)
        finally:
            os.close(fd)


def _open_locked(temporary: Path) -> int:
    """Creates the file, or takes over what a dead process left; waits while a living one holds it."""
    while True:
        fd = open_own(temporary)
        try:
            _lock(fd)
            # Its holder may have renamed or removed it while this call waited: then the lock is on another file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(temporary), os.fstat(fd)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, *, shared: bool = False) -> None:
    """Waits for the file's lock. Some network file systems have none: there, two makers at once aren't kept apart."""
    try:
        platform.lock(fd, shared=shared)
    except OSError as error:
        if error.errno not in platform.NO_LOCKS:
            raise


def sync(path: Path) -> None:
    """Makes a file durable, or, of a folder, the renames in it."""
    if platform.windows is not None and path.is_dir():
        return  # a rename was written through already
    # Windows syncs only what is open for writing.
    fd = _open(path, os.O_RDONLY if platform.windows is None else platform.READ_WRITE)
    try:
        sync_fd(fd, path)
    finally:
        os.close(fd)


def sync_fd(fd: int, path: Path) -> None:
    """Makes what was written to an open file durable, in the disk's own cache too where macOS would stop before.
    Raises `SyncError`; `path` is what it names."""
    with _failing_as_sync(path):
        if platform.FULL_SYNC is None:
            os.fsync(fd)
        else:
            platform.full_sync(fd)


@contextlib.contextmanager
def _failing_as_sync(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise with_way_out(
            SyncError(error.errno, f"can't sync {path}: {error.strerror}. What of it is on the disk isn't known"),
            "open the table again, which goes back to its last commit",
        ) from error


def open_own(path: Path, *, create: bool = True, write: bool = True) -> int:
    """Opens a file that belongs to the table alone. A link in its place is refused: it would lead the writes into a
    file of somebody else's. So is what isn't a file; a pipe would be waited for forever."""
    flags = (platform.READ_WRITE if write else platform.READ) | platform.NO_WAITING | platform.NO_LINKS
    flags |= os.O_CREAT if create else 0
    try:
        if not platform.NO_LINKS and path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        fd = _open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise with_way_out(
                OSError(errno.ELOOP, f"{path} is a link; a file of this name belongs to the table alone"), "Remove it"
            ) from None
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise with_way_out(
                OSError(errno.EINVAL, f"{path} isn't a regular file; a file of this name belongs to the table alone"),
                "Remove it",
            )
        if write and found.st_nlink > 1:
            raise with_way_out(
                OSError(
                    errno.EMLINK,
                    f"{path} is a file that has another name as well (a hard link), and writing would change that "
                    "too",
                ),
                "Put a copy in its place",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def allocate(fd: int, size_bytes: int, path: Path) -> None:
    """Reserves the file's space, zeroed; `OSError` naming the bytes needed and free where there is too little."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
        elif shutil.disk_usage(path.parent).free < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        # Given back before counting, since a failed allocation may have taken what there was.
        os.ftruncate(fd, 0)
        free_bytes = shutil.disk_usage(path.parent).free
        raise with_way_out(
            OSError(
                error.errno,
                f"{path} needs {size_bytes} bytes, {free_bytes} are free in {path.parent}: {_NO_ROOM[error.errno]}",
            ),
            "Make room, choose another path, or a smaller table (fewer rows, float16)",
        ) from None


_COPY_BYTES = 1 << 24


def copy_file(source: Path, path: Path, *, reflink_only: bool = False) -> None:
    """A copy of `source` in the place of what is at `path`: of shared blocks where the file system has them (a
    reflink takes no time and no room), else of the data, or with `reflink_only` an `OSError`. Holes stay holes. The
    same errors as `new_file`, `allocate`.
    """
    with open(source, "rb") as original, new_file(path, replace=True, like=source) as fd, naming(path):
        if platform.reflink(original.fileno(), fd):
            return
        if reflink_only:
            why = "the file system has none, or they lie on two of them"
            what = f"{path}: {source} can't be shared with it as a reflink: {why}"
            raise with_way_out(OSError(errno.EOPNOTSUPP, what), "Use a copy")
        found = os.fstat(original.fileno())
        if has_holes(source):
            os.ftruncate(fd, found.st_size)
        elif found.st_size:
            allocate(fd, found.st_size, path)
        for start, stop in platform.data_ranges(original.fileno(), found.st_size):
            for at in range(start, stop, _COPY_BYTES):
                write_at(fd, platform.read_at(original.fileno(), min(_COPY_BYTES, stop - at), at), at)


def has_holes(path: Path) -> bool:
    """Whether a file takes less room than it is long."""
    found = path.stat()
    return hasattr(found, "st_blocks") and found.st_blocks * 512 < found.st_size


def nameless(folder: Path, size_bytes: int) -> mmap.mmap:
    """A mapping of a new sparse file in `folder` that has no name, and is gone when the mapping is."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size_bytes)
        return mmap.mmap(file.fileno(), size_bytes)


def refuse_full_disk(path: Path, num_rows: int, row_bytes: list[int]) -> None:
    """`OSError` where the disk may have no room for that many rows of each of these lengths, when they are stored
    to sparse files. Every row may lie in a hole, on as many pages as it can touch."""
    page = mmap.PAGESIZE
    needed_bytes = num_rows * sum(-(-length // page) + 1 for length in row_bytes) * page
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < needed_bytes:
        raise with_way_out(
            OSError(
                errno.ENOSPC,
                f"{path} is sparse: {num_rows} rows may need {needed_bytes} bytes of disk, {free_bytes} are free. "
                "Nothing was stored",
            ),
            "Make room, then go on, or commit() what there is",
        )


def write_at(fd: int, data: Any, offset: int) -> None:
    """Writes all of `data` (bytes, or a contiguous buffer) at `offset`, in as many calls as that takes."""
    raw = memoryview(data).cast("B")
    while raw:
        written = os.pwrite(fd, raw, offset) if hasattr(os, "pwrite") else platform.write_at(fd, raw, offset)
        if written == 0:
            raise OSError(errno.EIO, f"a write of {len(raw)} bytes at {offset} wrote nothing")
        raw, offset = raw[written:], offset + written


def sync_mapping(mapping: np.memmap[Any, Any], path: Path) -> None:
    """Makes what was stored into a mapping of the file durable."""
    with _failing_as_sync(path):
        mapping.flush()
    sync(path)


def store(table_ND: torch.Tensor, row_ids_U: torch.Tensor, rows_UD: torch.Tensor) -> None:
    """Stores rows into a mapping. From here on the kernel may write them to the disk whenever it likes."""
    table_ND.index_copy_(0, row_ids_U, rows_UD)


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at `path`, links followed; None where there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


class WriterLock:
    """The right to write to a table: held by one process at a time, and gone when that process is.

    It is a `flock` on a file of its own, whose content is the holder's process id, and one on the table itself where
    that is there: a table has one inode, whatever names lead to it, and nobody clears it away. The kernel drops a
    lock when the last descriptor that stands for it is closed: when the process ends, however it ends, since a
    forked child closes its own at once. (A POSIX record lock isn't inherited, but any close of the file drops it,
    and to copy the folder is to open and close the file.) What this process holds is known by device and inode,
    since a table's folder may be renamed under it.

    Raises `BlockingIOError` naming the holder where another has it.
    """

    _held: ClassVar[dict[tuple[int, int, int], int]] = {}
    """(process, device, inode) of a locked file -> its descriptor."""
    # Reentrant: a collection in the middle of a call may release the lock of a storage that nobody refers to.
    _guard = threading.RLock()

    def __init__(self, path: Path, what: str, table: Path | None = None) -> None:
        files = [path] if table is None or not table.is_file() else [path, table]
        self._own: dict[tuple[int, int, int], int] = {}
        with self._guard:
            if any(map(self._is_own, files)):
                # A model with hooks refers to itself, so one that nobody has any more waits for the collector.
                gc.collect()
            if any(map(self._is_own, files)):
                raise with_way_out(
                    BlockingIOError(errno.EAGAIN, f"{what} is open for writing in this process already"),
                    "close() it first (a model has it as model.engram.storage), or open this one with mode='r'",
                )
            try:
                for file in files:
                    fd = open_own(file) if file is path else _open(file, platform.READ_WRITE | platform.NO_WAITING)
                    found = os.fstat(fd)
                    self._own[os.getpid(), found.st_dev, found.st_ino] = fd
                    self._take(fd, what, path)
                lock_fd = next(iter(self._own.values()))
                if table is not None:
                    platform.take_mode(lock_fd, table)
                os.ftruncate(lock_fd, 0)
                write_at(lock_fd, f"{os.getpid()}\n".encode(), 0)
            except BaseException:
                for fd in self._own.values():
                    os.close(fd)
                raise
            self._held.update(self._own)

    @staticmethod
    def _take(fd: int, what: str, path: Path) -> None:
        for attempt in range(3):
            try:
                return platform.lock(fd, wait=False)
            except OSError as error:
                if error.errno in platform.NO_LOCKS:
                    return None
                if error.errno not in platform.LOCK_IS_HELD:
                    raise
                # `holder` takes the lock for a moment to see whether it is free.
                if attempt < 2:
                    time.sleep(0.02)
        raise with_way_out(
            BlockingIOError(errno.EAGAIN, f"{what} is being written to by process {_holder(path)}"),
            "wait for its end, or open with mode='r' to read beside it",
        )

    def release(self) -> None:
        """Gives it back; a forked child, which doesn't have it, changes nothing."""
        with self._guard:
            for key, fd in self._own.items():
                if key[0] == os.getpid():
                    del self._held[key]
                    platform.unlock(fd)  # Windows takes its time after a close
                    os.close(fd)
            self._own = {}

    @classmethod
    def _after_fork_in_child(cls) -> None:
        """The child has no lock, and what it inherited must not outlast its parent's."""
        for fd in cls._held.values():
            os.close(fd)
        cls._held.clear()
        cls._guard.release()

    @classmethod
    def is_held(cls, path: Path, table: Path | None = None) -> bool:
        """Whether a process, this one included, writes."""
        return any(cls._is_own(file) for file in (path, table) if file) or cls.holder(path, table) is not None

    @classmethod
    def _is_own(cls, path: Path) -> bool:
        """Whether this process holds it."""
        found = identity(path)
        return found is not None and (os.getpid(), *found) in cls._held

    @classmethod
    def holder(cls, path: Path, table: Path | None = None) -> str | None:
        """The id of the other process that holds the lock at `path`, or that of the table; None where nobody, or this
        process, does."""
        with cls._guard:
            for file in [path] if table is None or not table.is_file() else [path, table]:
                try:
                    if cls._is_own(file):
                        continue
                    if file is path:
                        fd = open_own(path, create=False, write=False)
                    else:
                        fd = _open(file, platform.READ | platform.NO_WAITING)
                except FileNotFoundError:
                    continue
                try:
                    platform.lock(fd, shared=True, wait=False)
                except OSError as error:
                    if error.errno in platform.LOCK_IS_HELD:
                        return _holder(path)
                finally:
                    os.close(fd)
            return None


if hasattr(os, "register_at_fork"):
    # No fork between the opening of a lock file and its place in `_held`.
    os.register_at_fork(
        before=WriterLock._guard.acquire,
        after_in_parent=WriterLock._guard.release,
        after_in_child=WriterLock._after_fork_in_child,
    )


def _holder(path: Path) -> str:
    """What the lock file at `path` says."""
    try:
        fd = open_own(path, create=False, write=False)
    except OSError:
        return "unknown"
    try:
        # Anybody may have written the file: nothing but a number goes to a terminal.
        text = platform.read_at(fd, 32, 0).strip()
    finally:
        os.close(fd)
    return text.decode() if text.isdigit() else "unknown"
