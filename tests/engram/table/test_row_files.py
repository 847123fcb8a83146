"""Rows across columns and files, against NumPy slices of the whole."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sense_v2.engram.table.row_files import Column, Piece, RowFiles, are_sparse, paths_of

N, WIDTHS = 40, (5, 3)


def laid_out(folder, cuts):
    """Columns of 5 and 3 bytes a row, cut at other rows, odd bytes in front of each piece, in two files by turns."""
    rows_NB = np.random.default_rng(0).integers(1, 256, (N, sum(WIDTHS)), dtype=np.uint8)
    contents = {folder / "a": b"", folder / "b": b""}
    columns, at = [], 0
    for width, bounds in zip(WIDTHS, cuts, strict=True):
        pieces = []
        for number, (low, high) in enumerate(zip([0, *bounds], [*bounds, N], strict=True)):
            path = folder / "ab"[number % 2]
            contents[path] += b"odd"
            pieces.append(Piece(path, len(contents[path]), high - low))
            contents[path] += rows_NB[low:high, at : at + width].tobytes()
        columns.append(Column(width, tuple(pieces)))
        at += width
    for path, content in contents.items():
        path.write_bytes(content)
    return columns, rows_NB


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.tuples(*[st.lists(st.integers(0, N), max_size=4).map(sorted)] * 2),
    start=st.integers(0, N - 1),
    num_rows=st.integers(1, N),
)
def test_parts_of_rows_are_read_and_written_where_they_lie(tmp_path_factory, cuts, start, num_rows):
    columns, rows_NB = laid_out(tmp_path_factory.mktemp("rows"), cuts)
    num_rows = min(num_rows, N - start)
    found = np.zeros((num_rows, 8), dtype=np.uint8)
    with RowFiles(columns) as files:
        assert (files.num_rows, files.row_bytes) == (N, 8)
        files.read(start, found)
        assert files.hold_data(start, num_rows)
    assert np.array_equal(found, rows_NB[start : start + num_rows])
    before = {path: path.read_bytes() for path in paths_of(columns)}
    with RowFiles(columns, write=True) as files:
        files.write(start, 255 - found)
        files.sync()
    whole = np.zeros((N, 8), dtype=np.uint8)
    with RowFiles(columns) as files:
        files.read(0, whole)
    expected = rows_NB.copy()
    expected[start : start + num_rows] = 255 - found
    assert np.array_equal(whole, expected)
    with RowFiles(columns, write=True) as files:
        files.write(start, found)
    assert {path: path.read_bytes() for path in paths_of(columns)} == before


def test_holes_are_known_in_either_column(tmp_path):
    page = os.sysconf("SC_PAGE_SIZE")
    for name, data_at in (("codes", 5), ("scales", 9)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(20 * page)
            file.seek(data_at * page)
            file.write(b"x")
    columns = [Column(page, (Piece(tmp_path / name, 0, 20),)) for name in ("codes", "scales")]
    assert are_sparse(columns)
    with RowFiles(columns) as files:
        assert [row for row in range(20) if files.hold_data(row, 1)] == [5, 9]
    with RowFiles(columns) as files:
        assert [files.hold_data(0, 5), files.hold_data(5, 2), files.hold_data(7, 2), files.hold_data(9, 11)] == [
            *(False, True),
            *(False, True),
        ]


def test_a_file_that_ends_early_is_named(tmp_path):
    columns, _ = laid_out(tmp_path, ([20], []))
    os.truncate(tmp_path / "b", 10)
    with RowFiles(columns) as files, pytest.raises(OSError, match="its length changed") as caught:
        files.read(0, np.empty((N, 8), dtype=np.uint8))
    assert str(tmp_path / "b") in str(caught.value)
