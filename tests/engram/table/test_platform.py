"""Systems that lack something: all modules are imported; tables are made, trained, committed, read, copied, checked.

What is missing is taken away in processes that fork from one that has torch and transformers. Windows' calls are
replaced by ones that do on Linux what Windows documents, its refusals included; nothing here has run on Windows.
"""

import ast
import ctypes
import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tables import run_python

from sense_v2.engram.optim import RowAdam
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.row_scan import scan_rows

PACKAGE = Path(platform.__file__).parents[2]
POSIX_ONLY = {
    *("fork", "forkpty", "geteuid", "getegid", "getuid", "getgid", "getpgrp", "getpgid", "setsid", "killpg", "uname"),
    *("mkfifo", "mknod", "pread", "preadv", "pwrite", "pwritev", "posix_fadvise", "posix_fallocate", "sysconf"),
    *("sched_getaffinity", "fchown", "chown", "lchown", "fdatasync", "sync", "statvfs", "fstatvfs", "sendfile"),
    *("copy_file_range", "register_at_fork", "getloadavg", "nice", "memfd_create", "lockf", "fchmod"),
    *("O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECT", "O_DIRECTORY", "O_SYNC", "O_DSYNC", "O_NOCTTY", "O_PATH"),
    *("SEEK_DATA", "SEEK_HOLE"),
}
"""Of `os`: what Windows lacks."""

CODE = """
import importlib, mmap, os, sys, ctypes, tempfile, traceback, warnings
from pathlib import Path
import numpy as np
import torch
import transformers, accelerate, transformers.trainer, safetensors.torch, psutil, yaml, torch.distributed.checkpoint

posix_only = set(sys.argv[2].split())

def without_os(*names):
    for name in names:
        if hasattr(os, name):
            delattr(os, name)

def without_fcntl():
    for name in ("fcntl", "resource"):
        sys.modules[name] = None

def without_madvise():
    for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
        delattr(mmap, name)
    without_compiled()

def without_mincore():
    def missing(*arguments, **keywords):
        raise OSError("no library")
    ctypes.CDLL = missing
    without_compiled()

def without_compiled():
    for name in ("sense_v2.engram._ngrams", "sense_v2.engram.reading._gather", "sense_v2.engram.table._row_hashes"):
        sys.modules[name] = None

def without_all():
    without_fcntl(), without_madvise(), without_mincore(), without_os(*posix_only - {"statvfs"})  # shutil needs it
    for name in ("MAP_PRIVATE", "MAP_ANONYMOUS"):
        delattr(mmap, name)
    os.sysconf = lambda name: {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}[name]  # Windows' is tested by itself

def use(folder):
    package = importlib.import_module("sense_v2")
    for file in sorted(Path(package.__file__).parent.rglob("*.py")):
        name = ".".join(file.relative_to(Path(package.__file__).parents[1]).with_suffix("").parts)
        if not name.endswith(("__main__", "play.page", "charts", "plots", "engines", "vllm_plugin")):
            importlib.import_module(name.removesuffix(".__init__"))
    from sense_v2.engram.storage import MMapEmbeddingStorage
    from sense_v2.engram.optim import RowAdam
    from sense_v2.engram.table.disk import copy_file
    from sense_v2.engram.upkeep.check import check_table
    from sense_v2.engram.upkeep.hot_rows import warm_table
    for sparse in (False, True):
        path = folder / f"{sparse}.dat"
        settings = {"sparse": True, "init_std": 0} if sparse else {}
        table = MMapEmbeddingStorage(3000, 8, path, **settings)
        rows = RowAdam(table, lr=0.1)
        for step in (1, 2):
            table(torch.tensor([[5, 7, 2999]])).pow(2).sub(1).sum().backward()
            rows.step()
            table.commit(step=step)
        table.write(torch.tensor([5]), torch.ones(1, 8))
        table.commit(step=3)
        table.write(torch.tensor([6]), torch.ones(1, 8))
        table.close()
        MMapEmbeddingStorage(3000, 8, path, **settings).close()  # what wasn't committed is undone
        table = MMapEmbeddingStorage(3000, 8, path, mode="r", max_resident_bytes=1 << 24, **settings)
        for ids in (torch.tensor([5, 2999]), torch.arange(3000)):
            table.prefetch(ids)
            expected = np.fromfile(path, "<f4").reshape(3000, 8)[ids.numpy()]
            assert np.array_equal(table(ids).numpy(), expected)
        assert table(torch.tensor([5])).tolist() == [[1.0] * 8]
        assert table(torch.tensor([6])).tolist() != [[1.0] * 8]
        table.close()
        assert check_table(path).num_wrong == 0
        copy_file(path, folder / "copy.dat")
        assert (folder / "copy.dat").read_bytes() == path.read_bytes()
        warm_table(path)

for name, take in {
    "nothing": lambda: None,
    "fcntl": without_fcntl,
    "madvise": without_madvise,
    "mincore": without_mincore,
    "posix_fallocate": lambda: without_os("posix_fallocate"),
    "O_DIRECT": lambda: without_os("O_DIRECT", "O_SYNC", "O_DSYNC"),
    "all": without_all,
}.items():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        leave = os._exit
        try:
            warnings.simplefilter("ignore")
            take()
            folder = Path(sys.argv[1]) / name
            folder.mkdir()
            use(folder)
            print(name, "works", flush=True)
        except BaseException:
            print(name, "fails", traceback.format_exc(), flush=True)
        leave(0)
    os.waitpid(child, 0)
"""


def test_what_a_system_lacks_is_done_without(tmp_path: Path) -> None:
    out, error = run_python(CODE, tmp_path, " ".join(POSIX_ONLY)).communicate(timeout=600)
    names = ("nothing", "fcntl", "madvise", "mincore", "posix_fallocate", "O_DIRECT", "all")
    assert out.splitlines() == [f"{name} works" for name in names], out
    assert error == ""


def test_one_module_knows_the_platform() -> None:
    """What Windows lacks is named in platform.py alone, or behind a question whether it is there."""
    for file in PACKAGE.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        asked = {
            node.args[1].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("hasattr", "getattr")
            and isinstance(node.args[1], ast.Constant)
        }
        if file == Path(platform.__file__):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"fcntl", "resource", "msvcrt"}, file
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "mmap"):
                is_missing = node.attr in POSIX_ONLY or node.attr.startswith(("MADV_", "MAP_"))
                assert not is_missing or node.attr in asked, f"{file}:{node.lineno} {ast.unparse(node)}"


# Windows


def windows_error(code: int) -> OSError:
    """As ctypes.WinError: of the class that Windows' number means."""
    return OSError(errno.ENOENT if code == 2 else errno.EACCES, f"Windows error {code}")


class Kernel32:
    """The calls of kernel32, as documented, on Linux. A handle is a descriptor.

    What Linux allows and Windows doesn't is refused: to rename a file that is open, mapped or not, by a call that
    doesn't share that, and to replace one that is open at all.
    """

    def __init__(self) -> None:
        self.code = 0
        self.calls: list[str] = []
        self.sharing: set[int] = set()
        self.busy = 0

    def is_open(self, path: str, *, by_sharing: bool) -> bool:
        links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        found = {
            int(link.name) for link in links if link.is_symlink() and os.readlink(link) == os.path.realpath(path)
        }
        return bool(found if by_sharing else found - self.sharing)

    def refuse(self, code: int) -> int:
        self.code = code
        return 0

    def CreateFileW(self, path, access, share, security, creation, attributes, template):
        assert share == 7, "others may read, write, rename"
        flags = os.O_RDWR if access & 0x40000000 else os.O_RDONLY
        try:
            fd = os.open(path, flags | (os.O_CREAT if creation == 4 else 0), 0o666)
        except OSError:
            self.code = 2
            return ctypes.c_void_p(-1).value
        self.sharing.add(fd)
        return fd

    def LockFileEx(self, handle, flags, reserved, low, high, place):
        assert (low, high) == (1, 0)
        assert (place._obj.offset, place._obj.offset_high) == (0, 1 << 30)
        self.calls.append("lock")
        how = (fcntl.LOCK_EX if flags & 2 else fcntl.LOCK_SH) | (fcntl.LOCK_NB if flags & 1 else 0)
        try:
            fcntl.flock(handle, how)
        except OSError:
            return self.refuse(33)
        return 1

    def UnlockFileEx(self, handle, reserved, low, high, place):
        fcntl.flock(handle, fcntl.LOCK_UN)
        return 1

    def MoveFileExW(self, source, target, flags):
        assert flags == 1 | 8, "replaces, and writes through"
        if self.busy:
            self.busy -= 1
            return self.refuse(32)
        if self.is_open(source, by_sharing=False) or self.is_open(target, by_sharing=True):
            return self.refuse(32)
        self.calls.append(f"move {Path(source).name}")
        os.rename(source, target)
        return 1

    def GlobalMemoryStatusEx(self, status):
        assert status._obj.length == 64
        status._obj.total = 1 << 35
        return 1


@pytest.fixture
def kernel32(monkeypatch: pytest.MonkeyPatch) -> Kernel32:
    """A process on what looks like Windows: its calls, and what `os` lacks or refuses there."""
    fake = Kernel32()
    msvcrt = SimpleNamespace(get_osfhandle=lambda fd: fd, open_osfhandle=lambda handle, flags: handle)
    windows = SimpleNamespace(kernel32=fake, msvcrt=msvcrt, last_error=lambda: fake.code, error=windows_error)
    real_open, real_fsync, real_close = os.open, os.fsync, os.close

    def open_file(path, flags, mode=0o777, **keywords):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real_open(path, flags, mode, **keywords)

    def fsync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Windows syncs what is open for writing")
        fake.calls.append("sync")
        real_fsync(fd)

    def close(fd):
        fake.sharing.discard(fd)
        real_close(fd)

    def rename(source, target):
        raise AssertionError("a rename that isn't written through")

    monkeypatch.setattr(platform, "windows", windows)
    monkeypatch.setattr(platform, "fcntl", None)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "close", close)
    monkeypatch.setattr(os, "replace", rename)
    for name in ("pread", "preadv", "pwrite", "posix_fallocate", "posix_fadvise", "fchown", "SEEK_DATA", "SEEK_HOLE"):
        monkeypatch.delattr(os, name)
    return fake


def test_a_table_on_windows(tmp_path: Path, kernel32: Kernel32) -> None:
    path = tmp_path / "t.dat"
    table = MMapEmbeddingStorage(500, 8, path)
    rows = RowAdam(table, lr=0.1)
    table(torch.tensor([[5, 499]])).pow(2).sub(1).sum().backward()
    rows.step()
    kernel32.calls.clear()
    table.commit(step=1)
    moved = kernel32.calls.index("move t.json.tmp")
    assert "sync" in kernel32.calls[:moved], "rows are on the disk before the commit"
    table.write(torch.tensor([7]), torch.ones(1, 8))
    with pytest.raises(BlockingIOError, match="in this process already"):
        MMapEmbeddingStorage(500, 8, path)
    table.commit(step=2)
    table.close()
    again = MMapEmbeddingStorage(500, 8, path)
    assert again(torch.tensor([7])).tolist() == [[1.0] * 8]
    again.close()
    expected = np.fromfile(path, "<f4").reshape(500, 8)
    assert expected[7].tolist() == [1.0] * 8
    scan = scan_rows(path, 500, 8, row_dtype("float32"))
    assert len(scan.sums) == 1
    disk.copy_file(path, tmp_path / "copy.dat")
    assert (tmp_path / "copy.dat").read_bytes() == path.read_bytes()


def test_a_lock_of_another_on_windows(tmp_path: Path, kernel32: Kernel32) -> None:
    (tmp_path / "file").write_bytes(b"x")
    mine, other = (platform.open_file(tmp_path / "file", platform.READ_WRITE) for _ in range(2))
    platform.lock(mine)
    for shared in (True, False):
        with pytest.raises(BlockingIOError) as refused:
            platform.lock(other, shared=shared, wait=False)
        assert refused.value.errno in platform.LOCK_IS_HELD
    platform.unlock(mine)
    platform.lock(other, wait=False)
    kernel32.LockFileEx = lambda *arguments: kernel32.refuse(50)  # type: ignore[method-assign]
    with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)) as none:
        platform.lock(mine, wait=False)
    assert none.value.errno in platform.NO_LOCKS
    os.close(mine)
    os.close(other)


def test_a_rename_on_windows_waits_for_a_reader(
    tmp_path: Path, kernel32: Kernel32, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "file").write_bytes(b"old")
    kernel32.busy = 3
    platform.replace(tmp_path / "new", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "new").write_bytes(b"newer")
    monkeypatch.setattr(platform, "_WAIT_SECONDS", 0.05)
    with open(tmp_path / "file", "rb"), pytest.raises(OSError, match="Windows error 32") as refused:
        platform.replace(tmp_path / "new", tmp_path / "file")
    assert refused.value.filename2 == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    fd = platform.open_file(tmp_path / "new", platform.READ)  # which allows it
    platform.replace(tmp_path / "new", tmp_path / "file")
    assert platform.read_at(fd, 5, 0) == (tmp_path / "file").read_bytes() == b"newer"
    os.close(fd)


def test_a_file_that_isnt_there_on_windows(tmp_path: Path, kernel32: Kernel32) -> None:
    with pytest.raises(FileNotFoundError, match="Windows error 2") as refused:
        platform.open_file(tmp_path / "none", platform.READ)
    assert refused.value.filename == str(tmp_path / "none")


def test_a_link_on_windows_is_refused(tmp_path: Path, kernel32: Kernel32, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "NO_LINKS", 0)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="is a link"):
        disk.open_own(tmp_path / "link")


def test_the_memory_of_windows(kernel32: Kernel32, tmp_path: Path) -> None:
    assert platform.usable_memory_bytes(tmp_path) == 1 << 35


# macOS


def test_a_full_sync_falls_back_where_a_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    answers = iter([0, OSError(errno.ENOTSUP, "not supported"), OSError(errno.EIO, "input/output error")])

    def control(fd: int, command: int) -> int:
        calls.append(command)
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(platform, "FULL_SYNC", 51)
    monkeypatch.setattr(platform, "fcntl", SimpleNamespace(fcntl=control))
    monkeypatch.setattr(platform.os, "fsync", lambda fd: calls.append("fsync"))
    (tmp_path / "file").write_bytes(b"x")
    disk.sync(tmp_path / "file")
    assert calls == [51]
    disk.sync(tmp_path / "file")
    assert calls == [51, 51, "fsync"]
    with pytest.raises(disk.SyncError, match="input/output error"):
        disk.sync(tmp_path / "file")
    assert calls == [51, 51, "fsync", 51]
