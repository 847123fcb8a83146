"""How files are mapped, asked of the kernel (/proc/self/smaps); memory limits, in a made-up tree of cgroups; rows
read warm, cold and ahead, with everything that is asked of the kernel granted, refused and missing."""

import contextlib
import gc
import mmap
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tables import in_a_fork, run_python

from sense_v2.engram.reading import cold_policy, gather, pages
from sense_v2.engram.reading.cold_policy import ASKED_BATCHES
from sense_v2.engram.reading.pages import page_runs
from sense_v2.engram.reading.reader import RowReader, map_rows
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import platform
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.platform import usable_memory_bytes

needs_compiled = pytest.mark.skipif(gather.compiled is None, reason="the extension wasn't compiled")
needs_small_reads = pytest.mark.skipif(
    gather.compiled is None or gather._exchange is None,
    reason="the extension wasn't compiled, or this PyTorch can't be handed memory",
)
needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks /proc/self/smaps")
MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reads_ahead(path: Path) -> bool:
    """Whether the kernel may read around a page of this file's one mapping: flag rr says that it may not."""
    found = []
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if entry.splitlines() and entry.splitlines()[0].endswith(f" {path}"):
            found.append(re.search(r"^VmFlags: (.*)$", entry, re.MULTILINE).group(1).split())
    assert len(found) == 1
    return "rr" not in found[0]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "rows.dat"
    np.arange(4096 * 8, dtype="<f4").tofile(path)
    return path


@needs_smaps
@pytest.mark.parametrize(("memory_bytes", "has_holes"), [(4 << 20, False), (4 << 20, True), (4096 * 8 * 4, False)])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_reading_ahead_stays_where_the_file_fits_and_has_no_holes(path, monkeypatch, memory_bytes, has_holes, mode):
    monkeypatch.setattr(platform, "usable_memory_bytes", lambda: memory_bytes)
    rows_ND = map_rows(path, np.dtype("<f4"), mode, (4096, 8), has_holes=has_holes)
    assert reads_ahead(path) == (memory_bytes == 4 << 20 and not has_holes)
    np.testing.assert_array_equal(rows_ND, np.arange(4096 * 8).reshape(4096, 8))


@needs_smaps
@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_and_its_states_are_mapped_so(tmp_path, sparse):
    path = tmp_path / "engram_table.dat"
    storage = MMapEmbeddingStorage(65_536, 64, path, sparse=sparse)
    state = storage.open_state("sums", 64)
    assert reads_ahead(path) == reads_ahead(state.path) == (not sparse)
    storage.write(torch.tensor([5]), torch.ones(1, 64))
    assert storage.gather(torch.tensor([5])).tolist() == [[1.0] * 64]
    storage.commit()
    storage.close()


def cgroups(root: Path, line: str, limits: dict[str, str]) -> int:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpuset:/elsewhere\n{line}\n")
    for file, text in limits.items():
        target = root / "sys/fs/cgroup" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return usable_memory_bytes(root)


LIMIT = 1 << 20


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("0::/user/one", {"user/one/memory.max": f"{LIMIT}\n", "user/memory.max": "max\n"}),
        ("0::/user/one", {"user/one/memory.max": "max\n", "user/memory.max": f"{LIMIT}\n"}),
        ("0::/user/one", {"user/one/memory.max": f"{2 * LIMIT}\n", "user/memory.max": f"{LIMIT}\n"}),
        ("0::/", {"memory.max": f"{LIMIT}\n"}),
        ("0::/the/hosts/path", {"memory.max": f"{LIMIT}\n"}),
        ("4:memory:/one", {"memory/one/memory.limit_in_bytes": f"{LIMIT}\n"}),
        ("4:memory,hugetlb:/one", {"memory/memory.limit_in_bytes": f"{LIMIT}\n"}),
    ],
)
def test_the_least_limit_counts(tmp_path, line, limits):
    assert cgroups(tmp_path, line, limits) == LIMIT


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("0::/one", {}),
        ("0::/one", {"one/memory.max": "max\n"}),
        ("4:memory:/one", {"memory/one/memory.limit_in_bytes": f"{2**63 - 4096}\n"}),
        ("4:memory:/one", {"memory/two/memory.limit_in_bytes": f"{LIMIT}\n"}),
        ("4:cpu:/one", {"memory/one/memory.limit_in_bytes": f"{LIMIT}\n"}),
    ],
)
def test_without_a_limit_it_is_the_machines_memory(tmp_path, line, limits):
    assert cgroups(tmp_path, line, limits) == MACHINE_BYTES


def test_where_nothing_tells_of_cgroups(tmp_path):
    assert usable_memory_bytes(tmp_path) == MACHINE_BYTES


# Reading


N_ROWS, WIDTH = 4096, 256


@pytest.fixture(params=["plain", pytest.param("compiled", marks=needs_compiled)])
def way(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(gather, "compiled", None)
    pages._warn_once.cache_clear()
    return request.param


def open_reader(path: Path, **arguments) -> tuple[RowReader, np.ndarray]:
    values = np.random.default_rng(0).standard_normal((N_ROWS, WIDTH), dtype=np.float32)
    values.tofile(path)
    mapped = map_rows(path, np.dtype("<f4"), "r", values.shape, has_holes=False)
    return RowReader(mapped, row_dtype("float32"), path, width=WIDTH, **arguments), values


def asked_runs(opened: RowReader, monkeypatch, *, in_memory: bool | None) -> list[np.ndarray]:
    """What is asked for from here on; `in_memory` is what the kernel says of every page."""
    runs: list[np.ndarray] = []
    # Else the extension would ask the real kernel about a small batch.
    monkeypatch.setattr(opened._cold, "tells", False)
    opened.small.batches_after_cold = 0
    monkeypatch.setattr(opened._pages, "will_need", runs.append)
    monkeypatch.setattr(opened._pages, "in_memory", lambda offsets: in_memory)
    return runs


def take_forever(opened: RowReader, monkeypatch, forever: bool) -> None:
    """Whether every gather counts as slow, or none does."""
    slow_ns = -(10**12) if forever else 10**12
    monkeypatch.setattr(cold_policy, "SLOW_NS", slow_ns)
    opened.small.slow_ns = slow_ns


@pytest.mark.parametrize("num_ids", [0, 1, 16, 2000])
@pytest.mark.parametrize("in_memory", [True, False, None])
@pytest.mark.parametrize("batches_to_ask", [0, 9])
def test_rows_are_the_same_asked_for_or_not(tmp_path, way, monkeypatch, num_ids, in_memory, batches_to_ask):
    opened, values = open_reader(tmp_path / "rows")
    monkeypatch.setattr(opened._pages, "in_memory", lambda offsets: in_memory)
    opened.small.batches_to_ask = batches_to_ask
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, N_ROWS, num_ids))
    opened.prefetch(ids)
    for dtype in (torch.int64, torch.int32):
        np.testing.assert_array_equal(opened.read(ids.to(dtype)).numpy(), values[ids.numpy()])
    opened.close()


def test_a_warm_table_is_never_asked_for(tmp_path, way, monkeypatch):
    monkeypatch.setattr(cold_policy, "SLOW_NS", 10**12)
    opened, _ = open_reader(tmp_path / "rows")
    runs = asked_runs(opened, monkeypatch, in_memory=True)
    for num_ids in (16, 16, 5000, 16):
        ids = torch.arange(num_ids) % N_ROWS
        opened.prefetch(ids)
        opened.read(ids)
    opened.close()
    assert runs == []


def test_a_slow_batch_that_read_the_disk_is_followed_by_asking(tmp_path, way, monkeypatch):
    opened, _ = open_reader(tmp_path / "rows")
    ids = torch.tensor([1, 5])
    take_forever(opened, monkeypatch, False)
    runs = asked_runs(opened, monkeypatch, in_memory=False)
    opened.small.batches_to_ask = 0
    opened.read(ids)
    assert runs == []
    reads = opened._cold.disk_reads
    take_forever(opened, monkeypatch, True)
    monkeypatch.setattr(cold_policy, "disk_reads", lambda: reads)
    opened.read(ids)  # slow, but not because of the disk
    assert not opened.reads_the_disk
    monkeypatch.setattr(cold_policy, "disk_reads", lambda: reads + 1)
    opened.read(ids)
    assert opened.reads_the_disk
    assert runs == []
    opened.read(ids)
    assert [run.tolist() for run in runs] == [page_runs(ids.numpy(), WIDTH * 4).tolist()]


def test_asking_ends_when_nothing_is_slow_any_more(tmp_path, way, monkeypatch):
    monkeypatch.setattr(cold_policy, "SLOW_NS", 10**12)
    opened, _ = open_reader(tmp_path / "rows")
    runs = asked_runs(opened, monkeypatch, in_memory=None)
    opened.small.batches_to_ask = ASKED_BATCHES
    for _ in range(ASKED_BATCHES + 20):
        opened.read(torch.tensor([1]))
    assert len(runs) == ASKED_BATCHES


def test_prefetch_asks_for_the_pages_and_a_large_one_in_a_thread(tmp_path, way, monkeypatch):
    opened, _ = open_reader(tmp_path / "rows")
    threads = []
    asked_runs(opened, monkeypatch, in_memory=False)
    monkeypatch.setattr(opened._pages, "will_need", lambda runs: threads.append((threading.get_ident(), len(runs))))
    opened.prefetch(torch.tensor([0, 0, 100]))
    opened.prefetch(torch.arange(0, 4000, 4))
    opened.close()  # waits for the thread
    assert threads[0] == (threading.get_ident(), 2)
    assert threads[1][0] != threading.get_ident()


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@needs_small_reads
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no page cache to drop")
def test_the_extension_asks_for_small_batches_that_arent_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    opened, values = open_reader(path)
    drop(path)
    opened._mapping.madvise(mmap.MADV_RANDOM)  # a read brings no other page
    monkeypatch.setattr(opened._pages, "will_need", pytest.fail)
    monkeypatch.setattr(opened, "_read_any", lambda *_: pytest.fail("went the long way"))
    opened.small.slow_ns = 10**12  # however slow this machine is
    ids = torch.tensor([0, 1, 2, 3, 400])  # four of them on one page
    if opened._pages.in_memory([0]):
        pytest.skip("this file system keeps its pages")
    opened.prefetch(ids)
    assert opened.small.batches_to_ask == ASKED_BATCHES
    for deadline in [time.monotonic() + 10]:
        while not opened._pages.in_memory([0, 400 * WIDTH * 4]) and time.monotonic() < deadline:
            time.sleep(0.001)
    for batch, left in ((ids, -1), (torch.tensor([2000, 2001]), 0), (ids, -1)):
        np.testing.assert_array_equal(opened.read(batch).numpy(), values[batch.numpy()])
        assert opened.small.batches_to_ask == ASKED_BATCHES + left
    opened.small.batches_to_ask = 1
    assert opened.small.prefetch(ids)
    assert opened.small.batches_to_ask == 1
    assert opened.small.prefetch(torch.tensor([1, 3000], dtype=torch.int32))
    assert opened.small.batches_to_ask == ASKED_BATCHES
    assert not opened.small.prefetch(torch.tensor([N_ROWS]))
    assert not opened.small.prefetch(torch.zeros(65, dtype=torch.int64))


@needs_small_reads
def test_what_isnt_a_small_warm_batch_goes_the_other_way(tmp_path, monkeypatch):
    opened, values = open_reader(tmp_path / "rows")
    ids = torch.arange(16).reshape(2, 8)
    many = torch.zeros(65, dtype=torch.int64)
    opened.small.slow_ns = 10**12  # however slow this machine is
    assert opened.small.read(many) is None  # whether the table is warm isn't known yet
    opened.small.batches_after_cold = 0
    assert opened.small.read(ids) is None
    opened.small.batches_to_ask = 0
    assert opened.small.read(many) is not None
    assert torch.equal(opened.small.read(ids), torch.from_numpy(values[:16].reshape(2, 8, WIDTH)))
    assert torch.equal(opened.small.read(ids[:, :1].contiguous()), torch.from_numpy(values[[[0], [8]]]))
    one_past = torch.arange(1025 * 1024 // (4 * WIDTH)) % N_ROWS
    fake = torch.nn.Parameter(ids, requires_grad=False)
    for other in (ids.T, ids[:, ::2], ids.float(), ids.to(torch.int16), ids.to("meta"), fake, one_past, None, [1]):
        assert opened.small.read(other) is None
    opened.small.slow = True
    monkeypatch.setattr(cold_policy, "disk_reads", lambda: opened._cold.disk_reads)
    assert opened.small.read(ids) is None
    assert opened.read(ids) is not None
    assert opened.small.read(ids) is not None  # it was no disk


@needs_compiled
def test_ids_of_a_transform_are_refused_by_pytorch(tmp_path):
    opened, _ = open_reader(tmp_path / "rows")
    opened.small.batches_to_ask = 0
    with pytest.raises(RuntimeError, match="doesn't have storage"):
        torch.func.vmap(opened.read)(torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize("bad", [-1, N_ROWS])
def test_ids_outside(tmp_path, way, bad):
    opened, _ = open_reader(tmp_path / "rows")
    for call in (opened.read, opened.prefetch):
        for asks in (0, 5):
            opened.small.batches_to_ask = asks
            with pytest.raises(IndexError, match=rf"row id {bad}: .*rows has rows 0 to {N_ROWS - 1}"):
                call(torch.tensor([3, bad]))


@pytest.mark.parametrize("num_ids", [2, 3000])
def test_a_file_that_was_cut_is_an_error(tmp_path, way, num_ids):
    path = tmp_path / "rows"
    opened, values = open_reader(path)
    opened.read(torch.tensor([1]))
    os.truncate(path, values.nbytes // 2)
    time.sleep(0.002)  # small batches look once a millisecond
    ids = torch.arange(num_ids)
    for call in (opened.read, opened.prefetch):
        with pytest.raises(OSError, match=rf"{values.nbytes} bytes, found {values.nbytes // 2}: the file was cut"):
            call(ids)


def test_a_file_that_was_removed_or_replaced_is_read_as_it_was(tmp_path, way):
    path = tmp_path / "rows"
    opened, values = open_reader(path)
    path.unlink()
    path.write_bytes(b"another file")
    np.testing.assert_array_equal(opened.read(torch.arange(N_ROWS)).numpy(), values)


def test_a_file_in_memory(quick_path, way):
    opened, values = open_reader(quick_path / "rows")
    opened.small.batches_to_ask = 5
    opened.prefetch(torch.arange(N_ROWS))
    np.testing.assert_array_equal(opened.read(torch.arange(N_ROWS)).numpy(), values)
    opened.close()


@pytest.mark.parametrize("advice", ["MADV_HUGEPAGE", "MADV_NOHUGEPAGE"])
def test_with_huge_pages_and_without(tmp_path, way, advice):
    opened, values = open_reader(tmp_path / "rows")
    with contextlib.suppress(OSError):  # the kernel may have none
        opened._mapping.madvise(getattr(mmap, advice))
    np.testing.assert_array_equal(opened.read(torch.arange(N_ROWS)).numpy(), values)


def test_rows_outlive_the_reader(tmp_path, way):
    opened, values = open_reader(tmp_path / "rows")
    rows = [opened.read(torch.arange(num_ids)) for num_ids in (3, 4000)]
    opened.close()
    del opened
    gc.collect()
    for found in rows:
        np.testing.assert_array_equal(found.numpy(), values[: len(found)])


def test_in_a_forked_child(tmp_path, way):
    opened, values = open_reader(tmp_path / "rows")
    opened.small.batches_to_ask = 50
    opened.prefetch(torch.arange(1000))

    def child() -> str:
        opened.small.batches_to_ask = 50
        opened.prefetch(torch.arange(1000))
        return str(float(opened.read(torch.arange(1000)).sum()))

    assert in_a_fork(child) == str(float(torch.from_numpy(values[:1000]).sum()))
    opened.close()


def resident_bytes(rows_ND: np.memmap) -> int:
    """How much of a mapping is mapped into this process's memory, by the kernel's bit for each page."""
    first, num_pages = rows_ND.ctypes.data // mmap.PAGESIZE, -(-rows_ND.nbytes // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * num_pages), dtype="<u8")
    assert len(entries) == num_pages
    return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE


@needs_smaps
@pytest.mark.filterwarnings("ignore:.*no manifest")
def test_the_budget_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    values = np.random.default_rng(0).standard_normal((65_536, 256), dtype=np.float32)  # 64 MiB
    values.tofile(path)
    free = MMapEmbeddingStorage(65_536, 256, shutil.copy(path, tmp_path / "free"), mode="r")
    bound = MMapEmbeddingStorage(65_536, 256, path, mode="r", max_resident_bytes=8 << 20)
    generator = torch.Generator().manual_seed(0)
    highest, keep = [], bound._reader._budget.keep
    monkeypatch.setattr(bound._reader._budget, "keep", lambda: (highest.append(resident_bytes(bound.mmap)), keep()))
    for num_ids in [16] * 20 + [300]:
        ids = torch.randint(0, 65_536, (num_ids,), generator=generator)
        assert torch.equal(bound(ids), free(ids))
    assert resident_bytes(free.mmap) > 16 << 20
    assert 0 < max(highest) <= 8 << 20
    assert resident_bytes(bound.mmap) <= 8 << 20


def test_a_budget_that_is_too_small(tmp_path):
    with pytest.raises(ValueError, match="max_resident_bytes = 5: must be None, or at least 8388608"):
        open_reader(tmp_path / "rows", max_resident_bytes=5)


def test_without_statm_the_budget_counts_what_it_may_have_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "file_backed_bytes", lambda: None)
    opened, values = open_reader(tmp_path / "rows", max_resident_bytes=8 << 20)
    drops = []
    monkeypatch.setattr(opened._pages, "drop", lambda: drops.append(1))
    np.testing.assert_array_equal(opened.read(torch.arange(100)).numpy(), values[:100])
    assert len(drops) == 50


@needs_smaps
def test_processes_share_one_copy(tmp_path):
    path = tmp_path / "rows"
    opened, _ = open_reader(path)
    opened.read(torch.arange(N_ROWS))
    code = (
        "import sys, re, torch, pathlib\n"
        "from sense_v2.engram.storage import MMapEmbeddingStorage\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        f"table = MMapEmbeddingStorage({N_ROWS}, {WIDTH}, sys.argv[1], mode='r')\n"
        f"table(torch.arange({N_ROWS}))\n"
        "entry = pathlib.Path('/proc/self/smaps').read_text().split(sys.argv[1])[1]\n"
        "print(*[re.search(name + r': +(\\d+)', entry).group(1) for name in ('Rss', 'Pss')])\n"
    )
    out, error = run_python(code, path).communicate(timeout=120)
    assert not error, error
    rss, pss = map(int, out.split())
    assert rss == N_ROWS * WIDTH * 4 // 1024
    assert pss <= rss / 2 + 64  # this process has the other half
    opened.close()
