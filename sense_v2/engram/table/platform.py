"""What not every operating system has: file locks, reflinks, advice on pages, memory counts.

Everything else asks here, and goes on where the answer is that the system has no such thing. `fcntl` and `resource`
are imported nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
READ_WRITE = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
# A pipe in a file's place would be waited for.
NO_WAITING = getattr(os, "O_NONBLOCK", 0)
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LOCK_IS_HELD = (errno.EACCES, errno.EAGAIN)

# macOS: fsync stops at the disk's own cache. None where fsync is enough.
FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
# Linux: ioctl(2) FICLONE, from linux/fs.h.
_FICLONE = 0x40049409
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EBADF)


# Files


def lock(fd: int, *, shared: bool = False, wait: bool = True) -> None:
    """Takes the open file's lock. Raises `OSError`: one of `NO_LOCKS` where there are none, of `LOCK_IS_HELD` where
    another process has it and `wait` is False."""
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def unlock(fd: int) -> None:
    """Gives the open file's lock back before it is closed."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # where there are none
            fcntl.flock(fd, fcntl.LOCK_UN)


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
    """Syncs an open file past the disk's own cache, where there is a `FULL_SYNC`."""
    assert FULL_SYNC is not None
    fcntl.fcntl(fd, FULL_SYNC)


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
