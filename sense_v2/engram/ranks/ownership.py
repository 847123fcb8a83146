"""Row ids of a whole table -> who owns them, and where they lie in the owner's file.

    bounds = (0, b₁, …, N)        rank r owns rows bounds[r] to bounds[r + 1] - 1

Ranges are contiguous, so ascending ids are cut into owners by W - 1 binary searches. Where the heads can be dealt out
evenly the bounds are first rows of heads: a head's rows then lie on one rank, and two tables of one layout are cut
alike. Pure functions of numbers; what is done with the ranges is `sense_v2.engram.ranks.sharded_table`'s.

W ranks, N rows of the whole table, U unique row ids, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

import torch

RowIds = NewType("RowIds", torch.Tensor)
"""Ids over the whole table, as hashing gives them: int64."""
LocalIds = NewType("LocalIds", torch.Tensor)
"""Ids within the one file that a rank stores to: int64."""


@dataclass(frozen=True)
class Ownership:
    """Which rank owns which rows.

    >>> Ownership.split(10, 4).bounds
    (0, 3, 6, 8, 10)
    >>> Ownership.split(10, 2, head_rows=[0, 3, 5, 7]).bounds
    (0, 5, 10)
    """

    bounds: tuple[int, ...]

    @classmethod
    def split(cls, num_rows: int, num_ranks: int, head_rows: Sequence[int] = ()) -> Ownership:
        """`head_rows` are the first rows of the heads, ascending from 0; the last head's range ends with the table.

        Raises `ValueError` where a rank would own nothing.
        """
        if num_rows < num_ranks:
            raise ValueError(f"{num_rows} rows can't be owned by {num_ranks} ranks: each needs one at least")
        heads = sorted(set(head_rows))
        if heads and heads[0] == 0 and len(heads) % num_ranks == 0:
            return cls((*heads[:: len(heads) // num_ranks], num_rows))
        least, more = divmod(num_rows, num_ranks)
        return cls(tuple(rank * least + min(rank, more) for rank in range(num_ranks + 1)))

    @property
    def num_ranks(self) -> int:
        return len(self.bounds) - 1

    def rows_of(self, rank: int) -> range:
        return range(self.bounds[rank], self.bounds[rank + 1])

    def counts(self, row_ids_U: RowIds) -> list[int]:
        """How many of these ascending ids each rank owns; in that order they lie in `row_ids_U`.

        >>> Ownership((0, 5, 10)).counts(RowIds(torch.tensor([0, 4, 5])))
        [2, 1]
        """
        inner = torch.tensor(self.bounds[1:-1], dtype=torch.int64)
        cuts = torch.searchsorted(row_ids_U, inner).tolist()
        return [stop - start for start, stop in zip([0, *cuts], [*cuts, len(row_ids_U)], strict=True)]


@dataclass(frozen=True)
class OwnFile:
    """Where the rows that a rank stores to lie: in a file that begins with row `first_row` of the whole table."""

    first_row: int

    def to_local(self, row_ids: RowIds) -> LocalIds:
        return LocalIds(row_ids - self.first_row)

    def to_row_ids(self, local_ids: LocalIds) -> RowIds:
        return RowIds(local_ids + self.first_row)
