"""Several deltas on one table at once: which one a lookup goes through lies in its row id.

    numbered   row ids + the number of each one's delta ──▶ row ids that say it, in bits above those of any row
    ChosenRows such row ids ──▶ rows of the table, and in the place of those that the delta has changed, the delta's

Number 0 is the table alone. So a batch in which each sequence has a delta of its own goes the way of any other batch,
up to the place where row ids become rows.

Rows are kept in memory, not mapped: a file that is cut while it is mapped ends the process, and with it all that the
other deltas serve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sense_v2.engram.delta.delta_file import Delta
from sense_v2.engram.delta.overlay import find_ids
from sense_v2.engram.row_source import RowSource

ROW_BITS = 40
"""More rows than a disk holds."""


def numbered(row_ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Say in row ids which delta each is looked up through; the shapes broadcast.

    >>> numbered(torch.tensor([7]), torch.tensor([0])), plain(numbered(torch.tensor([7]), torch.tensor([3])))
    (tensor([7]), tensor([7]))
    """
    return row_ids | (numbers << ROW_BITS)


def plain(row_ids: torch.Tensor) -> torch.Tensor:
    """Take the numbers off."""
    return row_ids & ((1 << ROW_BITS) - 1)


class ChosenRows:
    """The changed rows of each delta on one table, by the delta's number."""

    def __init__(self) -> None:
        self._deltas: dict[int, tuple[np.ndarray[Any, Any], torch.Tensor]] = {}

    def add(self, number: int, delta: Delta) -> None:
        """Read a delta into memory."""
        self._deltas[number] = delta.row_ids_U.copy(), delta.rows_UD.clone()

    def remove(self, number: int) -> None:
        """Let go of a delta's rows, if there are any. Lookups through it find those of the table: an engine may still
        run a request that was cancelled, and an error would end all others with it."""
        self._deltas.pop(number, None)

    def __call__(self, row_ids: torch.Tensor, storage: RowSource) -> torch.Tensor:
        """Look up numbered row ids [...] -> rows [..., D]; the rest as `RowSource`."""
        rows = storage(plain(row_ids))
        numbers = row_ids >> ROW_BITS
        for number in numbers.unique().tolist():
            delta = self._deltas.get(number)  # another thread may unload it meanwhile
            if delta is None:
                continue
            changed_U, rows_UD = delta
            at = (numbers == number).nonzero(as_tuple=True)
            is_changed, places = find_ids(changed_U, plain(row_ids[at]).cpu().numpy())
            at = tuple(one[torch.from_numpy(is_changed).to(one.device)] for one in at)
            rows = rows.index_put(at, rows_UD[torch.from_numpy(places)].to(rows.device))
        return rows
