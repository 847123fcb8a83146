"""What not every operating system has: file locks, reflinks, advice on pages, memory counts.

Everything else asks here, and goes on where the answer is that the system has no such thing. `fcntl`, `resource` and
Windows' kernel32 are used nowhere else. docs/platforms.md says what is promised where.

Windows differs in three things. A file that is open can be renamed or removed only if whoever has it open allowed
that, so files are opened with CreateFileW, which can allow it. A lock keeps others from reading what it covers, so it
covers a byte far behind the end, as SQLite's does. And folders can't be synced: renames are written through.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def _load_windows() -> Any:
    """kernel32, msvcrt and the errors of ctypes; None on other systems."""
    found: Any = ctypes
    if not hasattr(found, "WinDLL"):
        return None
    import msvcrt

    kernel32 = found.WinDLL("kernel32", use_last_error=True)
    pointer, number, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_wchar_p
    kernel32.CreateFileW.argtypes = (text, number, number, pointer, number, number, pointer)
    kernel32.CreateFileW.restype = pointer
    kernel32.LockFileEx.argtypes = (pointer, number, number, number, number, pointer)
    kernel32.UnlockFileEx.argtypes = (pointer, number, number, number, pointer)
    kernel32.MoveFileExW.argtypes = (text, text, number)
    kernel32.GlobalMemoryStatusEx.argtypes = (pointer,)
    return SimpleNamespace(kernel32=kernel32, msvcrt=msvcrt, last_error=found.get_last_error, error=found.WinError)


windows: Any = _load_windows()

_NOT_INHERITED = getattr(os, "O_CLOEXEC", getattr(os, "O_NOINHERIT", 0))
_BINARY = getattr(os, "O_BINARY", 0)
READ = os.O_RDONLY | _NOT_INHERITED | _BINARY
READ_WRITE = os.O_RDWR | _NOT_INHERITED | _BINARY
# A pipe in a file's place would be waited for.
NO_WAITING = getattr(os, "O_NONBLOCK", 0)
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LOCK_IS_HELD = (errno.EACCES, errno.EAGAIN)

# macOS: fsync stops at the disk's own cache. None where fsync is enough; Windows' is FlushFileBuffers.
FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
_NO_FULL_SYNC = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
# Linux: ioctl(2) FICLONE, from linux/fs.h.
_FICLONE = 0x40049409
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EBADF)


# Of Windows, by its own names: GENERIC_READ, FILE_SHARE_…, OPEN_…, LOCKFILE_…, MOVEFILE_… and its errors.
_GENERIC_READ, _GENERIC_WRITE = 0x80000000, 0x40000000
_SHARE_ALL = 0x1 | 0x2 | 0x4  # to read, to write, to rename and remove
_OPEN_EXISTING, _OPEN_ALWAYS = 3, 4
_INVALID_HANDLE = ctypes.c_void_p(-1).value
_LOCK_NO_WAITING, _LOCK_EXCLUSIVE = 0x1, 0x2
_MOVE_REPLACES, _MOVE_WRITES_THROUGH = 0x1, 0x8
_NO_SUCH_FUNCTION = (1, 50)  # ERROR_INVALID_FUNCTION, ERROR_NOT_SUPPORTED
_IS_IN_USE = (5, 32)  # ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION
_IS_LOCKED = (33, 997)  # ERROR_LOCK_VIOLATION, ERROR_IO_PENDING
_WAIT_SECONDS = 2.0
"""For somebody who reads the file that is to be replaced."""


class _Overlapped(ctypes.Structure):
    """OVERLAPPED: here, the position of a lock."""

    _fields_ = (
        ("internal", ctypes.c_void_p),
        ("internal_high", ctypes.c_void_p),
        ("offset", ctypes.c_uint32),
        ("offset_high", ctypes.c_uint32),
        ("event", ctypes.c_void_p),
    )


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 6),
    )


# Files


def open_file(path: str | Path, flags: int) -> int:
    """os.open(2). On Windows, others may rename and remove the file while it is open, as they may elsewhere."""
    if windows is None:
        return os.open(path, flags, 0o666)
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    handle = windows.kernel32.CreateFileW(
        str(path),
        _GENERIC_READ | (_GENERIC_WRITE if writes else 0),
        _SHARE_ALL,
        None,
        _OPEN_ALWAYS if flags & os.O_CREAT else _OPEN_EXISTING,
        0,
        None,
    )
    if handle == _INVALID_HANDLE:
        error = windows.error(windows.last_error())
        error.filename = str(path)
        raise error
    return int(windows.msvcrt.open_osfhandle(handle, flags & ~os.O_CREAT))


def open_folder(path: Path) -> int | None:
    """The folder's descriptor, to lock or to sync; None on Windows, where a folder has neither."""
    return os.open(path, READ) if windows is None else None


def replace(source: Path, target: Path) -> None:
    """Renames on Windows, through to the disk; waits a while for who reads what is replaced."""
    give_up = time.monotonic() + _WAIT_SECONDS
    while not windows.kernel32.MoveFileExW(str(source), str(target), _MOVE_REPLACES | _MOVE_WRITES_THROUGH):
        code = windows.last_error()
        if code not in _IS_IN_USE or time.monotonic() > give_up:
            error = windows.error(code)
            error.filename, error.filename2 = str(source), str(target)
            raise error
        time.sleep(0.01)


# One position a descriptor: without pread and pwrite, a seek and what follows it belong together.
_seeking = threading.Lock()


def read_into(fd: int, buffer: Any, at: int) -> int:
    """Reads at a position into a buffer; returns how many bytes, as preadv(2)."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], at)
    found = read_at(fd, memoryview(buffer).nbytes, at)
    memoryview(buffer).cast("B")[: len(found)] = found
    return len(found)


def read_at(fd: int, num_bytes: int, at: int) -> bytes:
    """pread(2)."""
    if hasattr(os, "pread"):
        return os.pread(fd, num_bytes, at)
    with _seeking:
        os.lseek(fd, at, os.SEEK_SET)
        return os.read(fd, num_bytes)


def write_at(fd: int, data: Any, at: int) -> int:
    """pwrite(2) where there is none."""
    with _seeking:
        os.lseek(fd, at, os.SEEK_SET)
        return os.write(fd, data)


def next_data(fd: int, at: int) -> int | None:
    """Where the file goes on with something other than a hole: `at` itself where holes aren't told. None if with
    nothing."""
    if not hasattr(os, "SEEK_DATA"):
        return at
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return None if error.errno == errno.ENXIO else at


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what isn't a hole."""
    at = 0
    while at < size_bytes:
        start = next_data(fd, at)
        if start is None:  # a hole up to the end
            return
        at = size_bytes
        if hasattr(os, "SEEK_HOLE"):
            with contextlib.suppress(OSError):  # a file system that doesn't tell
                at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def lock(fd: int, *, shared: bool = False, wait: bool = True) -> None:
    """Takes the open file's lock. Raises `OSError`: one of `NO_LOCKS` where there are none, of `LOCK_IS_HELD` where
    another process has it and `wait` is False."""
    if windows is not None:
        flags = (0 if shared else _LOCK_EXCLUSIVE) | (0 if wait else _LOCK_NO_WAITING)
        handle, place = windows.msvcrt.get_osfhandle(fd), _lock_place()
        if not windows.kernel32.LockFileEx(handle, flags, 0, 1, 0, ctypes.byref(place)):
            code = windows.last_error()
            if code in _NO_SUCH_FUNCTION:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            if code in _IS_LOCKED:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            raise windows.error(code)
        return
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def unlock(fd: int) -> None:
    """Gives the open file's lock back before it is closed."""
    if windows is not None:
        place = _lock_place()
        windows.kernel32.UnlockFileEx(windows.msvcrt.get_osfhandle(fd), 0, 1, 0, ctypes.byref(place))
    elif fcntl is not None:
        with contextlib.suppress(OSError):  # where there are none
            fcntl.flock(fd, fcntl.LOCK_UN)


def _lock_place() -> _Overlapped:
    return _Overlapped(offset_high=1 << 30)


def take_mode(fd: int, like: Path) -> None:
    """Gives an open file of this process's user the group of the file at `like`, and lets group and others do what
    they may do there. Where the group can't be given, it may do nothing."""
    if not (hasattr(os, "fchown") and like.is_file()):
        return
    found, own = os.stat(like), os.fstat(fd)
    bits = found.st_mode & 0o066
    if own.st_uid != os.geteuid():
        return
    if own.st_gid != found.st_gid:
        try:
            os.fchown(fd, -1, found.st_gid)
        except OSError:
            bits &= 0o006
    with contextlib.suppress(OSError):  # a file system without modes
        os.fchmod(fd, 0o600 | bits)


def full_sync(fd: int) -> None:
    """Syncs an open file past the disk's own cache, where there is a `FULL_SYNC`. A file system that can't, such as a
    network's, does what it can."""
    assert FULL_SYNC is not None
    try:
        fcntl.fcntl(fd, FULL_SYNC)
    except OSError as error:
        if error.errno not in _NO_FULL_SYNC:
            raise
        os.fsync(fd)


def reflink(source_fd: int, fd: int) -> bool:
    """Makes an open file share the other's blocks; False where the file system can't."""
    if fcntl is None:
        return False
    try:
        fcntl.ioctl(fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    return True


def advise(fd: int, advice: str, at: int = 0, num_bytes: int = 0) -> None:
    """posix_fadvise(2) with "SEQUENTIAL" or "WILLNEED", where there is one."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, at, num_bytes, getattr(os, f"POSIX_FADV_{advice}"))


# Pages in memory


def tells_what_is_in_memory(path: Path) -> bool:
    """True if Linux tells this process which pages of the file are in memory: of others' files it says all are."""
    try:
        return os.access(path, os.W_OK) or (hasattr(os, "geteuid") and os.stat(path).st_uid == os.geteuid())
    except OSError:
        return False


def private_pages(num_bytes: int) -> mmap.mmap:
    """Zeros in pages that take memory when they are first set."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without such pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


@functools.cache
def mincore() -> Any:  # a ctypes function
    """The C library's mincore(2), or None."""
    try:
        function = ctypes.CDLL(None).mincore
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function


def page_is_in_memory(address: int) -> bool | None:
    """None where the kernel can't be asked."""
    found = ctypes.c_ubyte()
    call = mincore()
    if call is None or call(address // mmap.PAGESIZE * mmap.PAGESIZE, 1, ctypes.byref(found)) != 0:
        return None
    return bool(found.value & 1)


def disk_reads() -> int | None:
    """Page faults of this process that had to wait for a disk."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def file_backed_bytes() -> int | None:
    """The memory of this process that files back, by Linux's count."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(256).split()[2]) * mmap.PAGESIZE
    except OSError:
        return None


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or less where a cgroup (a container) limits this process."""
    limits = [_memory_bytes()]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":  # version 2 has one tree, version 1 one for each resource
                limits += _limits(root / "sys/fs/cgroup", group, "memory.max")
            elif "memory" in controllers.split(","):
                limits += _limits(root / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes")
    return min(limits)


def _memory_bytes() -> int:
    if windows is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise windows.error(windows.last_error())
    return int(status.total)


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
