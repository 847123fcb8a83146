"""A table over several ranks <-> one copy of it: each rank moves its own range.

    copy_table     every rank's rows and states ──▶ its range of one ordinary table
    restore_table  every rank's range of such a copy ──▶ its own rows, where they differ, and one global commit

The copy knows nothing of ranks: four can write it and two, or one, go on from it, in either layout. Everything that
reads a table reads it. `sense_v2.engram.table_copy` does the same for a table of one process.

N rows of the whole table, R rows of a rank's range, W values of a row.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sense_v2.engram import table_copy
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.ownership import OwnFile
from sense_v2.engram.row_source import TrainableRows
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk
from sense_v2.engram.table.checksums import PART_BYTES, add_rows, num_blocks, to_hex
from sense_v2.engram.table.format import Manifest, file_bytes, state_file_name


class RankedRows(TrainableRows, Protocol):
    """A table over several ranks (`ShardedTable`), as one of them has it."""

    ranks: Ranks
    own_rows: range
    """Ids of the rows that this rank stores to."""
    own_file: OwnFile

    @property
    def own(self) -> MMapEmbeddingStorage: ...


def copy_table(table: RankedRows, path: str | os.PathLike[str], *, states: bool = True) -> None:
    """Copies the table of the last commit to `path`, with its manifest, and its optimizer states where `states`. By
    all ranks.

    What lies there is replaced; the manifest goes first and comes last, so that a copy that was cut off has none.
    Raises `ValueError` where rows were stored since the last commit, `OSError` where there is no room.
    """
    path, ranks, manifest = Path(path), table.ranks, table.own.manifest
    table_copy.refuse_uncommitted(table.own)
    names = list(manifest.states) if states else []
    files = {"": path, **{name: path.with_name(state_file_name(path.name, name)) for name in names}}
    values = {"": table.own.weight, **{name: _state_values(table, name) for name in names}}

    def make_room() -> Path:
        target = table_copy.remove_manifest(path)
        for name, file in files.items():
            with disk.new_file(file, replace=True, like=table.own.path) as fd:
                row_bytes = file_bytes(1, values[name].shape[1], values[name].dtype)
                disk.allocate(fd, table.num_embeddings * row_bytes, file)
        return target

    target = ranks.together("copy: room", make_room, only=0)
    sums = ranks.together(
        "copy: rows", lambda: [_copy_range(table, values[name], file) for name, file in files.items()]
    )
    # As int64: gloo's own types don't matter to a sum modulo 2⁶⁴.
    gathered = ranks.all_gather("copy: checksums", torch.from_numpy(np.stack(sums).view(np.int64)))
    totals = dict(zip(files, gathered.numpy().view(np.uint64).sum(axis=0, dtype=np.uint64), strict=True))

    def finish() -> None:
        entries = {
            name: dataclasses.replace(manifest.states[name], file=files[name].name, checksums=to_hex(totals[name]))
            for name in names
        }
        whole = dataclasses.replace(_whole_manifest(table), states=entries, checksums=to_hex(totals[""]))
        disk.write_file(target, whole.to_json(), like=path)

    ranks.together("copy: manifest", finish, only=0)


def _copy_range(table: RankedRows, values_NW: torch.Tensor, path: Path) -> np.ndarray[Any, Any]:
    """Writes this rank's range and returns the block sums of the whole file that it makes up: uint64 [blocks]."""
    sums = np.zeros(num_blocks(table.num_embeddings), dtype=np.uint64)
    row_bytes = file_bytes(1, values_NW.shape[1], values_NW.dtype)
    part_rows = max(1, PART_BYTES // row_bytes)
    own = table.own_rows
    with open(path, "r+b", buffering=0) as file:
        for start in range(own.start, own.stop, part_rows):
            stop = min(start + part_rows, own.stop)
            raw = _bytes_of(values_NW, start - table.own_file.first_row, stop - table.own_file.first_row)
            disk.write_at(file.fileno(), raw, start * row_bytes)
            ids = np.arange(start, stop, dtype=np.int64)
            add_rows(sums, ids, raw, table.num_embeddings, table.own.manifest.format_version)
        disk.sync_fd(file.fileno(), path)
    return sums


def restore_table(table: RankedRows, path: str | os.PathLike[str]) -> None:
    """Gives the table the rows, optimizer states, step, extra and update count of the copy at `path`, in one commit.
    By all ranks.

    A state that the copy lacks becomes zeros. Raises `ValueError` for a copy of another table or a damaged one, and
    changes nothing then; `FileNotFoundError` for one that was cut off.
    """
    path, ranks, own = Path(path), table.ranks, table.own
    manifest = ranks.together(
        "restore: check", lambda: table_copy.checked_copy(path, own.path, _whole_manifest(table))
    )
    _refuse_other_rows(table, path, manifest)
    with own.one_commit():
        # Where all ranks map one file, rank 0 makes a new state's file for the others.
        for name, entry in {**own.manifest.states, **manifest.states}.items():
            table.open_state(name, entry.width)
        first_row = table.own_file.first_row
        ranks.together(
            "restore: rows",
            lambda: table_copy.store_differences(own, path, manifest, table.own_rows, first_row),
        )
        own.updates = manifest.updates
        table.commit(step=manifest.step, extra=manifest.extra)


def _whole_manifest(table: RankedRows) -> Manifest:
    """What a table with the rows of all ranks would say of itself, but for checksums."""
    own = table.own.manifest
    provenance = {name: value for name, value in own.provenance.items() if name != "shard"}
    return dataclasses.replace(own, rows=table.num_embeddings, provenance=provenance)


def _refuse_other_rows(table: RankedRows, path: Path, manifest: Manifest) -> None:
    """Raises `ValueError` on all ranks for a file of the copy whose rows don't have its manifest's checksums; each
    rank reads its own range."""
    own = table.own_rows
    for file, texts in manifest.checksums_of(path.name).items():
        raw_NB = np.memmap(path.with_name(file), dtype=np.uint8, mode="r").reshape(manifest.rows, -1)
        sums = np.zeros(num_blocks(manifest.rows), dtype=np.uint64)
        part_rows = max(1, PART_BYTES // raw_NB.shape[1])
        for start in range(own.start, own.stop, part_rows):
            ids = np.arange(start, min(start + part_rows, own.stop), dtype=np.int64)
            raw = np.ascontiguousarray(raw_NB[ids[0] : ids[-1] + 1])
            add_rows(sums, ids, raw, len(raw_NB), manifest.format_version)
        gathered = table.ranks.all_gather("restore: checksums", torch.from_numpy(sums.view(np.int64)))
        found = to_hex(gathered.numpy().view(np.uint64).sum(axis=0, dtype=np.uint64))
        table_copy.refuse_other_sums(path.with_name(file), found, texts)


def _state_values(table: RankedRows, name: str) -> torch.Tensor:
    values: torch.Tensor = table.open_state(name, table.own.manifest.states[name].width).values
    return values


def _bytes_of(values_NW: torch.Tensor, start: int, stop: int) -> np.ndarray[Any, Any]:
    raw: np.ndarray[Any, Any] = values_NW[start:stop].contiguous().view(torch.uint8).numpy()
    return raw
