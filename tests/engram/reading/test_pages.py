"""Pages of rows against a plain loop, for pages of three sizes; what the kernel is asked, and what is done else."""

import errno
import mmap
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sense_v2.engram.reading import gather, pages
from sense_v2.engram.reading.pages import Pages, page_runs
from sense_v2.engram.table import platform

needs_compiled = pytest.mark.skipif(gather.compiled is None, reason="the extension wasn't compiled")


@pytest.fixture(params=["plain", pytest.param("compiled", marks=needs_compiled)])
def way(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(gather, "compiled", None)
    pages._warn_once.cache_clear()
    return request.param


def slow_pages(row_ids: list[int], row_bytes: int, page_bytes: int, first_byte: int) -> list[int]:
    pages = set()
    for row in row_ids:
        start = first_byte + row * row_bytes
        pages |= set(range(start // page_bytes, (start + row_bytes - 1) // page_bytes + 1))
    return sorted(pages)


@given(
    row_ids=st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    row_bytes=st.sampled_from([2, 12, 256, 264, 4096, 4098, 6000, 65536, 70000]),
    page_bytes=st.sampled_from([4096, 16384, 65536]),
    first_byte=st.sampled_from([0, 1, 8, 4095, 4096, 70_001]),
)
def test_each_page_once_and_in_order(row_ids, row_bytes, page_bytes, first_byte):
    runs = page_runs(np.array(row_ids), row_bytes, page_bytes, 4 * page_bytes, first_byte=first_byte)
    covered = [
        page
        for offset, length in runs.tolist()
        for page in range(offset // page_bytes, (offset + length) // page_bytes)
    ]
    assert covered == slow_pages(row_ids, row_bytes, page_bytes, first_byte)
    assert (runs % page_bytes == 0).all()
    assert (runs[:, 1] <= 4 * page_bytes).all()
    # As few runs as the limit allows: two neighbours meet only at a boundary of it.
    for (offset, length), (following, _) in zip(runs[:-1].tolist(), runs[1:].tolist(), strict=True):
        assert offset + length < following or following % (4 * page_bytes) == 0


def test_ids_of_32_bits_dont_overflow():
    last = 2**31 - 1
    assert page_runs(np.array([last], dtype=np.int32), 4096, 4096).tolist() == [[last * 4096, 4096]]


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        address = np.frombuffer(mapping, dtype=np.uint8)
        yield path, Pages(mapping, address.ctypes.data, len(mapping))
        del address


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="no madvise")
def test_what_is_asked_for_comes_into_memory(way, mapped):
    path, asked = mapped
    drop(path)
    page = mmap.PAGESIZE
    offsets = [3 * page, 40 * page]
    if asked.in_memory(offsets) is not False:
        pytest.skip("this file system's files are memory, or it doesn't let go of them")
    asked.will_need(np.array([[offset, page] for offset in offsets]))
    end = time.monotonic() + 10
    while not asked.in_memory(offsets) and time.monotonic() < end:
        time.sleep(0.001)
    assert asked.in_memory(offsets)


def test_a_refusal_of_the_kernel_is_said_once_and_not_repeated(way, mapped):
    _, asked = mapped
    unaligned = np.array([[1, mmap.PAGESIZE]])
    with pytest.warns(UserWarning, match=r"madvise\(WILLNEED\) failed .*read one at a time from here on"):
        asked.will_need(unaligned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked.can_ask = True
        asked.will_need(unaligned)


def test_the_compiled_refusal_is_einval():
    if gather.compiled is not None:
        assert gather.compiled.will_need(1, np.array([[0, 4096]])) == errno.EINVAL


def test_without_madvise(mapped, monkeypatch):
    pages._warn_once.cache_clear()
    monkeypatch.delattr(mmap, "MADV_WILLNEED")
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    _, old = mapped
    asked = Pages(old.mapping, old.address, old.num_bytes)
    with pytest.warns(UserWarning, match=r"no madvise\(WILLNEED\)"):
        asked.will_need(np.array([[0, mmap.PAGESIZE]]))
    with pytest.warns(UserWarning, match="max_resident_bytes has no effect"):
        asked.drop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked.will_need(np.array([[0, mmap.PAGESIZE]]))


def test_without_mincore(mapped, monkeypatch):
    monkeypatch.setattr(platform, "mincore", lambda: None)
    assert mapped[1].in_memory([0]) is None


def test_of_others_files_the_kernel_isnt_asked(mapped):
    _, old = mapped
    assert Pages(old.mapping, old.address, old.num_bytes, tells=False).in_memory([0]) is None


def test_dropping_loses_nothing_and_goes_in_slices(mapped, monkeypatch):
    _, asked = mapped
    asked.mapping[5] = 7
    calls = []

    class Recorded:
        def madvise(self, *arguments):
            calls.append(arguments)
            asked_mapping.madvise(*arguments)

    asked_mapping, asked.mapping = asked.mapping, Recorded()
    monkeypatch.setattr(pages, "DROP_BYTES", 10 * mmap.PAGESIZE)
    asked.drop()
    assert [offset // mmap.PAGESIZE for _, offset, _ in calls] == [0, 10, 20, 30, 40, 50, 60]
    assert calls[-1][2] == 4 * mmap.PAGESIZE
    assert asked_mapping[5] == 7
