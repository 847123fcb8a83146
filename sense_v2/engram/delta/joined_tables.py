"""`JoinedTables`: several tables as one, so that one overlay lies on all, and one delta changes rows of each.

    rows 0 … N₁ - 1   the first table's
    then N₂ more      the second's, and so on

A memory whose layers have tables of their own is looked up so while it has an overlay. The joined table names its
parts by layer and digest, and so does a delta that was made on it. It is only read, as a base is.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading import devices
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.row_source import RowSource
from sense_v2.engram.table.format import Manifest, row_dtype
from sense_v2.engram.table_identity import BLOCK_CHECKSUMS, SAMPLED_ROWS, TableIdentity
from sense_v2.engram.table_module import TableModule


class JoinedTables(TableModule):
    """Tables of one width and type, one behind the other; it owns them, and closes them with itself.

    Raises `ValueError` for tables that can be written to, or that differ in width or type.
    """

    def __init__(self, tables: Sequence[Any]) -> None:
        first = tables[0]
        for table in tables:
            if table.mode != "r":
                raise with_way_out(
                    ValueError(f"{table.path} is open with mode={table.mode!r}"), "open it with mode='r'"
                )
            if (table.embedding_dim, table.dtype) != (first.embedding_dim, first.dtype):
                raise ValueError(
                    f"{table.path} has rows of {table.embedding_dim} {table.dtype}, and {first.path} of "
                    f"{first.embedding_dim} {first.dtype}: they can't be one table, and have no overlay together"
                )
        super().__init__(sum(table.num_embeddings for table in tables), first.embedding_dim, mode="r")
        self.tables = nn.ModuleList(tables)
        self.path: Path | None = first.path
        self.dtype: torch.dtype = first.dtype
        self.is_released = any(table.is_released for table in tables)

    def first_row(self, table: RowSource) -> int:
        """Find where a table's rows begin."""
        return next(start for start, one in self._parts() if one is table)

    def _parts(self) -> Iterator[tuple[int, Any]]:
        start, tables = 0, cast("list[Any]", self.tables)
        for table in tables:
            yield start, table
            start += table.num_embeddings

    def _in_parts(self, row_ids: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
        """(table, which of these ids are its, those of them as its own)."""
        self._refuse_out_of_range(row_ids.reshape(-1))
        for start, table in self._parts():
            is_its = (row_ids >= start) & (row_ids < start + table.num_embeddings)
            if is_its.any():
                yield table, is_its, row_ids[is_its] - start

    # What it is

    @property
    def manifest(self) -> Manifest:
        known = {"tables": [table.manifest.provenance for _, table in self._parts()]}
        return Manifest(self.num_embeddings, self.embedding_dim, row_dtype(self.dtype).name, provenance=known)

    def identity(self) -> TableIdentity:
        """Its parts', one behind the other."""
        parts = [table.identity() for _, table in self._parts()]
        digest = hashlib.sha256("".join(one.digest for one in parts).encode("ascii")).hexdigest()
        are_sampled = any(one.digest_of == SAMPLED_ROWS for one in parts)
        return TableIdentity(
            self.num_embeddings,
            self.embedding_dim,
            parts[0].dtype,
            digest,
            SAMPLED_ROWS if are_sampled else BLOCK_CHECKSUMS,
            {"tables": [{**one.provenance, "rows": one.rows, "digest": one.digest} for one in parts]},
        )

    @property
    def whole_table(self) -> Any:
        raise with_way_out(
            ValueError(f"{self._name} are a table for each of several layers, which no file has together"),
            "Save each by itself: copy_to, or sense-engram convert for a released one",
        )

    @property
    def has_gone_on(self) -> bool:
        return any(table.has_gone_on for _, table in self._parts())

    @property
    def _name(self) -> object:
        return " and ".join(str(table.path) for _, table in self._parts())

    # Reading

    def _read(self, row_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        rows = torch.empty(*row_ids.shape, self.embedding_dim, dtype=self.dtype, device="cpu")
        for table, is_its, ids in self._in_parts(row_ids):
            rows[is_its] = table(ids)
        return devices.move(rows, device)

    def prefetch(self, row_ids: torch.Tensor) -> None:
        for table, _, ids in self._in_parts(self._checked_ids(row_ids)):
            table.prefetch(ids)

    @property
    def reads_the_disk(self) -> bool:
        self._refuse_closed()
        return any(table.reads_the_disk for _, table in self._parts())

    def stats(self) -> ReadStats:
        self._refuse_closed()
        found = ReadStats()
        for _, table in self._parts():
            found = found.with_those_of(table.stats())
        return found

    def close(self) -> None:
        self._is_closed = True
        for _, table in self._parts():
            table.close()

    def __copy__(self) -> JoinedTables:
        return JoinedTables([copy.copy(table) for table in self.tables])

    def __deepcopy__(self, memo: dict[int, Any]) -> JoinedTables:
        return JoinedTables([copy.deepcopy(table, memo) for table in self.tables])

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedTables, (list(self.tables),)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} rows of {self.embedding_dim}"
