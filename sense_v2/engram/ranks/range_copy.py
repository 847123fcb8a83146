"""A table over several ranks <-> one copy of it in a folder that all of them see: each rank moves its own range.

    copy_table     every rank's rows and states ──▶ its range of one ordinary table
    restore_table  every rank's range of such a copy ──▶ its own rows, where they differ, and one global commit

The copy knows nothing of ranks: four can write it and two, or one, go on from it, in either layout. Everything that
reads a table reads it. What `sense_v2.engram.upkeep.table_copy` does for a table of one process.

N rows of the whole table, R rows of a rank's range, W values of a row.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.ranks.sharded_table import ShardedTable
from sense_v2.engram.table import disk
from sense_v2.engram.table.checksums import PART_BYTES, add_to_blocks, num_blocks, row_hashes, to_hex
from sense_v2.engram.table.disk import allocate, new_file, write_at
from sense_v2.engram.table.format import (
    STATE_DTYPE,
    Manifest,
    file_bytes,
    journal_name,
    manifest_name,
    state_file_name,
)
from sense_v2.engram.table.opening import read_manifest
from sense_v2.engram.upkeep.table_copy import differences, mapped_copy, refuse_other_table


def copy_table(table: ShardedTable, path: str | Path, *, states: bool = True) -> None:
    """Copies the table of the last commit to `path`, with its manifest, and its optimizer states where `states`. By
    all ranks.

    What lies there is replaced; the manifest goes first and comes last, so that a copy that was cut off has none.
    Raises `ValueError` where rows were stored since the last commit, `OSError` where there is no room.
    """
    path, ranks, manifest = Path(path), table.ranks, table.own.manifest
    if table.own.updates != manifest.updates:
        raise ValueError(f"{table.path} has updates since its last commit; commit() before it is copied")
    names = list(manifest.states) if states else []
    files = {"": path, **{name: path.with_name(state_file_name(path.name, name)) for name in names}}
    values = {"": table.own.weight, **{name: _state_values(table, name) for name in names}}
    target = path.with_name(manifest_name(path.name))

    def make_room() -> None:
        target.unlink(missing_ok=True)
        path.with_name(journal_name(path.name)).unlink(missing_ok=True)
        for name, file in files.items():
            with new_file(file, replace=True) as fd:
                row_bytes = file_bytes(1, values[name].shape[1], values[name].dtype)
                allocate(fd, table.num_embeddings * row_bytes, file)

    ranks.together("copy: room", make_room, only=0)
    sums = ranks.together(
        "copy: rows", lambda: [_copy_range(table, values[name], file) for name, file in files.items()]
    )
    # As int64: gloo's own types don't matter to a sum modulo 2⁶⁴.
    gathered = ranks.all_gather("copy: checksums", torch.from_numpy(np.stack(sums).view(np.int64)))
    totals = dict(zip(files, gathered.numpy().view(np.uint64).sum(axis=0, dtype=np.uint64), strict=True))

    def finish() -> None:
        provenance = {name: value for name, value in manifest.provenance.items() if name != "shard"}
        entries = {
            name: dataclasses.replace(manifest.states[name], file=files[name].name, checksums=to_hex(totals[name]))
            for name in names
        }
        whole = dataclasses.replace(
            manifest,
            rows=table.num_embeddings,
            provenance=provenance,
            states=entries,
            checksums=to_hex(totals[""]),
        )
        with new_file(target, replace=True) as fd:
            write_at(fd, whole.to_json().encode(), 0)

    ranks.together("copy: manifest", finish, only=0)


def _copy_range(table: ShardedTable, values_NW: torch.Tensor, path: Path) -> np.ndarray[Any, Any]:
    """Writes this rank's range and returns the block sums of the whole file that it makes up: uint64 [blocks]."""
    sums = np.zeros(num_blocks(table.num_embeddings), dtype=np.uint64)
    row_bytes = file_bytes(1, values_NW.shape[1], values_NW.dtype)
    part_rows = max(1, PART_BYTES // row_bytes)
    own = table.own_rows
    with open(path, "r+b", buffering=0) as file:
        for start in range(own.start, own.stop, part_rows):
            stop = min(start + part_rows, own.stop)
            raw = _bytes_of(values_NW, start - table.own_file.first_row, stop - table.own_file.first_row)
            write_at(file.fileno(), raw, start * row_bytes)
            ids = np.arange(start, stop, dtype=np.int64)
            add_to_blocks(sums, ids, row_hashes(ids, raw), table.num_embeddings)
        disk.sync_fd(file.fileno(), path)
    return sums


def restore_table(table: ShardedTable, path: str | Path) -> None:
    """Gives the table the rows, optimizer states, step, extra and update count of the copy at `path`, in one commit.
    By all ranks.

    A state that the copy lacks becomes zeros. Raises `ValueError` for a copy of another table or a damaged one, and
    changes nothing then; `FileNotFoundError` for one that was cut off.
    """
    path, ranks, own = Path(path), table.ranks, table.own
    manifest = ranks.together("restore: check", lambda: _checked_copy(table, path))
    _refuse_other_rows(table, path, manifest)
    limit_bytes, own.journal_limit_bytes = own.journal_limit_bytes, 2**63 - 1
    try:
        # Where all ranks map one file, rank 0 makes a new state's file for the others.
        for name, entry in {**own.manifest.states, **manifest.states}.items():
            table.open_state(name, entry.width)
        ranks.together("restore: rows", lambda: _store_differences(table, path, manifest))
        own.updates = manifest.updates
        table.commit(step=manifest.step, extra=manifest.extra)
    finally:
        own.journal_limit_bytes = limit_bytes


def _checked_copy(table: ShardedTable, path: Path) -> Manifest:
    """The copy's manifest, once files and rows agree with it; each rank reads its own range."""
    manifest_path = path.with_name(manifest_name(path.name))
    if not manifest_path.is_file():
        raise FileNotFoundError(f"{manifest_path} isn't there: this copy of a table was not made to its end")
    manifest, own = read_manifest(manifest_path), table.own.manifest
    provenance = {name: value for name, value in own.provenance.items() if name != "shard"}
    whole = dataclasses.replace(own, rows=table.num_embeddings, provenance=provenance)
    refuse_other_table(path, manifest, table.path, whole)
    for file, row_bytes in manifest.row_bytes_of(path.name).items():
        copy = path.with_name(file)
        expected_bytes, found_bytes = manifest.rows * row_bytes, copy.stat().st_size
        if found_bytes != expected_bytes:
            raise ValueError(f"{copy}: expected {expected_bytes} bytes, found {found_bytes}: the copy is damaged")
    return manifest


def _refuse_other_rows(table: ShardedTable, path: Path, manifest: Manifest) -> None:
    """Raises `ValueError` on all ranks for a file of the copy whose rows don't have its manifest's checksums; each
    rank reads its own range."""
    own = table.own_rows
    for file, texts in manifest.checksums_of(path.name).items():
        raw_NB = np.memmap(path.with_name(file), dtype=np.uint8, mode="r").reshape(manifest.rows, -1)
        sums = np.zeros(num_blocks(manifest.rows), dtype=np.uint64)
        part_rows = max(1, PART_BYTES // raw_NB.shape[1])
        for start in range(own.start, own.stop, part_rows):
            ids = np.arange(start, min(start + part_rows, own.stop), dtype=np.int64)
            add_to_blocks(sums, ids, row_hashes(ids, np.ascontiguousarray(raw_NB[ids[0] : ids[-1] + 1])), len(raw_NB))
        gathered = table.ranks.all_gather("restore: checksums", torch.from_numpy(sums.view(np.int64)))
        if to_hex(gathered.numpy().view(np.uint64).sum(axis=0, dtype=np.uint64)) != texts:
            raise ValueError(
                f"{path.with_name(file)} doesn't have the checksums of its manifest: the copy is damaged, or was "
                "trained on. Go back to another one"
            )


def _store_differences(table: ShardedTable, path: Path, manifest: Manifest) -> None:
    """Of this rank's range, what the copy has otherwise."""
    own, rows = table.own, table.own_rows
    local = slice(rows.start - table.own_file.first_row, rows.stop - table.own_file.first_row)
    copied_NW = mapped_copy(path, manifest.rows, manifest.width, manifest.dtype)
    for ids_U, new_UW in differences(own.weight[local], copied_NW[rows.start : rows.stop]):
        own.write(ids_U + local.start, new_UW)
    for name, entry in {**own.manifest.states, **manifest.states}.items():
        state = own.open_state(name, entry.width)
        copied = manifest.states.get(name)
        wanted_RW = None
        if copied is not None:
            values_NW = mapped_copy(path.with_name(copied.file), manifest.rows, copied.width, STATE_DTYPE)
            wanted_RW = values_NW[rows.start : rows.stop]
        for ids_U, new_UW in differences(state.values[local], wanted_RW):
            own.write_state(state, ids_U + local.start, new_UW)
        state.step = 0 if copied is None else copied.step


def _state_values(table: ShardedTable, name: str) -> torch.Tensor:
    return table.open_state(name, table.own.manifest.states[name].width).values


def _bytes_of(values_NW: torch.Tensor, start: int, stop: int) -> np.ndarray[Any, Any]:
    raw: np.ndarray[Any, Any] = values_NW[start:stop].contiguous().view(torch.uint8).numpy()
    return raw
