"""Who owns which rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sense_v2.engram.ranks.ownership import Ownership, OwnFile, RowIds


@given(st.integers(1, 500), st.integers(1, 32))
def test_every_row_has_one_owner_and_ranges_are_equal_within_one(num_rows: int, num_ranks: int) -> None:
    if num_rows < num_ranks:
        with pytest.raises(ValueError, match=f"{num_rows} rows can't be owned by {num_ranks} ranks"):
            Ownership.split(num_rows, num_ranks)
        return
    ownership = Ownership.split(num_rows, num_ranks)
    owned = [row for rank in range(num_ranks) for row in ownership.rows_of(rank)]
    assert owned == list(range(num_rows))
    sizes = [len(ownership.rows_of(rank)) for rank in range(num_ranks)]
    assert max(sizes) - min(sizes) <= 1


def test_no_head_is_cut_where_they_divide_evenly() -> None:
    heads = [0, 13, 24, 35]
    assert Ownership.split(50, 2, heads).bounds == (0, 24, 50)
    assert Ownership.split(50, 4, heads).bounds == (0, 13, 24, 35, 50)
    # Four heads for three ranks: equal ranges of rows.
    assert Ownership.split(50, 3, heads).bounds == (0, 17, 34, 50)


def test_ids_are_counted_by_owner() -> None:
    ownership = Ownership((0, 13, 24, 50))
    ids = torch.tensor([0, 12, 13, 23, 24, 25, 49])
    expected = [sum(int(row) in ownership.rows_of(rank) for row in ids) for rank in range(3)]
    assert ownership.counts(RowIds(ids)) == expected == [2, 2, 3]
    assert ownership.counts(RowIds(ids[:0])) == [0, 0, 0]
    assert Ownership((0, 50)).counts(RowIds(ids)) == [7]


def test_local_ids_count_from_the_files_first_row() -> None:
    own = OwnFile(13)
    local = own.to_local(RowIds(torch.tensor([13, 20])))
    assert local.tolist() == [0, 7]
    assert own.to_row_ids(local).tolist() == [13, 20]
