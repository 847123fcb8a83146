"""Hot rows: counted, kept, matched with their table; and pages that are in memory afterwards."""

import collections
import ctypes
import dataclasses
import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sense_v2.engram.table.format import Manifest
from sense_v2.engram.upkeep import hot_rows as hot_rows_module
from sense_v2.engram.upkeep.hot_rows import HotRows, RowCounts, load, runs_of, save, warm_rows, warm_table

PROVENANCE = {"variant": "sense", "seed": 3, "layout": {"primes": [[7, 11]]}, "shadow_map_sha256": "aa"}
TABLE = Manifest(1000, 8, "float32", provenance={**PROVENANCE, "converted_from": {"dtype": "float32"}})


# Counting


@given(st.lists(st.lists(st.integers(0, 20), max_size=12), max_size=12), st.integers(1, 40))
def test_counts_are_those_of_a_dictionary(parts, pending):
    counts, expected = RowCounts(), collections.Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_rows_module, "PENDING_IDS", pending)
        for part in parts:
            counts.add(np.array(part, dtype=np.int64))
            expected.update(part)
    ids, found = counts.hottest()
    assert list(zip(ids.tolist(), found.tolist(), strict=True)) == sorted(
        expected.items(), key=lambda pair: (-pair[1], pair[0])
    )
    assert counts.lookups == sum(expected.values())


def test_what_a_hot_set_serves_counts_lookups_and_not_rows():
    counts = RowCounts()
    counts.add(np.array([5, 5, 5, 6, 7]))
    assert counts.served_by(np.array([5])) == 0.6
    assert counts.served_by(np.array([5, 8])) == 0.6
    assert counts.served_by(np.array([], dtype=np.int64)) == 0
    assert np.isnan(RowCounts().served_by(np.array([5])))


# Keeping


def hot_rows():
    return HotRows(np.array([7, 3]), np.array([9, 2]), 1000, dict(PROVENANCE), "texts", 40, 6)


def test_saved_and_loaded_they_are_the_same(tmp_path):
    path = tmp_path / "hot_rows.npy"
    save(hot_rows(), path)
    found = load(path, TABLE)
    assert np.load(path).tolist() == [[7, 9], [3, 2]]
    assert (found.row_ids.tolist(), found.counts.tolist()) == ([7, 3], [9, 2])
    assert (found.rows, found.corpus, found.lookups, found.rows_met) == (1000, "texts", 40, 6)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (dataclasses.replace(TABLE, rows=999), "rows is 1000, the table's 999"),
        (dataclasses.replace(TABLE, provenance={**PROVENANCE, "seed": 4}), "seed is 3, the table's 4"),
        (
            dataclasses.replace(TABLE, provenance={**PROVENANCE, "layout": {"primes": [[7, 13]]}}),
            r"layout.primes is \[\[7, 11\]\], the table's \[\[7, 13\]\]",
        ),
    ],
)
def test_rows_of_another_table_are_refused_by_field(tmp_path, table, text):
    save(hot_rows(), tmp_path / "hot.npy")
    with pytest.raises(ValueError, match=f"was counted for another table: {text}"):
        load(tmp_path / "hot.npy", table)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "hot.npy"
    with pytest.raises(FileNotFoundError, match="sense-engram profile"):
        load(path, TABLE)
    save(hot_rows(), path)
    whole, described = path.read_bytes(), path.with_suffix(".json").read_text()
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"hot\.npy isn't the file that it describes"):
        load(path, TABLE)
    path.write_bytes(whole)
    for text in ("{", "[]", "{}", described.replace('"lookups"', '"look"'), described.replace("hot rows", "rows")):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match="isn't the JSON of hot rows"):
            load(path, TABLE)
    with pytest.raises(ValueError, match=r"hot rows are a \.npy file"):
        save(hot_rows(), tmp_path / "hot.txt")


def test_rows_that_the_table_has_not_are_refused(tmp_path):
    rows = hot_rows()
    rows.row_ids[0] = 1000
    save(rows, tmp_path / "hot.npy")
    with pytest.raises(ValueError, match="names rows that the table of 1000 hasn't"):
        load(tmp_path / "hot.npy", TABLE)


# Pages


@given(data=st.data())
def test_runs_cover_the_pages_of_the_rows_and_no_other(data):
    page, num_rows = mmap.PAGESIZE, 500
    row_bytes = data.draw(st.sampled_from([1, 66, 256, 264, 4096, 10_000, 70_000]))
    ids = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=60))
    expected = set()
    for row in ids:
        expected.update(range(row * row_bytes // page, (row * row_bytes + row_bytes - 1) // page + 1))
    runs = runs_of(np.array(ids, dtype=np.int64), row_bytes, num_rows * row_bytes).tolist()
    assert [at // page for at, length in runs for at in range(at, at + length, page)] == sorted(expected)
    assert all(at % page == 0 and length > 0 and at + length <= num_rows * row_bytes for at, length in runs)


def resident_pages(path):
    """Which of a file's pages are in the page cache, asked of the kernel."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        here = ctypes.c_char.from_buffer(mapping)
        status = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(here)), ctypes.c_size_t(size), found
        )
        del here
        assert status == 0
        return [page for page in range(pages) if found[page] & 1]


@pytest.fixture
def cold(tmp_path):
    """16 MiB of rows of 1,024 bytes, none of whose pages is in memory."""
    path = tmp_path / "table.dat"
    path.write_bytes(os.urandom(1 << 24))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if resident_pages(path):
        pytest.skip("this file system's pages can't be dropped")
    return path


def test_warm_rows_are_in_memory_and_the_rest_is_not(cold):
    ids = np.array([0, 9000, 9001, 16_383])
    told = []
    num_bytes = warm_rows(cold, ids, 1024, advance=told.append)
    found = set(resident_pages(cold))
    assert found >= {row * 1024 // mmap.PAGESIZE for row in ids.tolist()}
    assert len(found) < 4096
    assert num_bytes == sum(told) == 3 * mmap.PAGESIZE


def test_a_warm_table_is_in_memory(cold):
    told = []
    assert warm_table(cold, advance=told.append) == sum(told) == 1 << 24
    assert len(resident_pages(cold)) == (1 << 24) // mmap.PAGESIZE


def test_holes_are_not_read(tmp_path):
    path = tmp_path / "sparse.dat"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"x" * 4096)
    assert warm_table(path) == hot_rows_module.READ_BYTES


def test_no_rows_are_no_bytes(cold):
    assert warm_rows(cold, np.empty(0, dtype=np.int64), 1024) == 0


def test_without_read_ahead_the_rows_are_read_all_the_same(cold, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    assert warm_rows(cold, np.array([5000]), 1024) == mmap.PAGESIZE
    assert 5000 * 1024 // mmap.PAGESIZE in resident_pages(cold)
