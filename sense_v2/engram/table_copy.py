"""A committed table <-> a copy of it, which a checkpoint keeps.

    copy_table     table, optimizer states, manifest ──▶ files of another name, a reflink where the file system can
    restore_table  such a copy ──▶ the rows that differ are stored to the open table, and committed

Restoring stores into the files that are there and ends with one commit. So a kill in the middle leaves the table as
it was before, every process that maps the table sees the rows come back, and the copy stays what it is. It reads both
tables once, and writes what differs. The parts of both are here for `sense_v2.engram.ranks.range_copy`, too, where
each rank has some of the rows.

N rows, U rows that differ, W values of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading.earlier_rows import EarlierRows
from sense_v2.engram.row_source import TrainableRows
from sense_v2.engram.table import disk
from sense_v2.engram.table.checksums import PART_BYTES, block_sums, to_hex
from sense_v2.engram.table.disk import WriterLock, copy_file, write_file
from sense_v2.engram.table.format import (
    STATE_DTYPE,
    Manifest,
    StateEntry,
    file_bytes,
    journal_name,
    manifest_name,
    new_commit,
    provenance_differences,
    row_dtype,
    state_file_name,
)
from sense_v2.engram.table.journal import undo_in_copies
from sense_v2.engram.table.opening import TableFiles, read_manifest

# Of a copy beside a process that commits.
ATTEMPTS = 3


class MappedRows(TrainableRows, Protocol):
    """A table in one file of ours."""

    @property
    def path(self) -> Path: ...

    @property
    def weight(self) -> torch.Tensor:
        """[N, D], sharing the mapping."""

    def refuse_moved(self) -> None:
        """Raises `OSError` where its path names another file by now."""

    def one_commit(self) -> contextlib.AbstractContextManager[None]:
        """Lets the journal grow to whatever one commit takes."""


def copy_table(
    storage: MappedRows,
    path: str | os.PathLike[str],
    *,
    states: bool = True,
    reflink_only: bool = False,
    earlier: EarlierRows | None = None,
) -> None:
    """Copies the table of the last commit to `path`, with its manifest.

    What lies there is replaced; the manifest goes first and comes last, so that a copy that was cut off has none.
    Beside a writer in another process the copy is of the commit that the manifest names before and after it: what was
    stored since is undone in the copy by the writer's journal, and the copy is compared with the checksums.

    Args:
        storage: The table.
        path: Where its rows go; manifest and states lie beside them.
        states: Copies the optimizer states, too.
        reflink_only: Raises `OSError` if the file system would have to copy the data.
        earlier: The table's rows, where its file may have gone on since.

    Raises:
        ValueError: Rows were stored since the last commit, the table's rows aren't its commit's, or optimizer
            states were asked for and have gone on since `earlier`.
        BlockingIOError: Another process commits more often than a copy can be made.
        OSError: There is no room.
    """
    path = Path(path)
    refuse_uncommitted(storage)
    if earlier is not None and (earlier.row_ids or storage.updates != storage.manifest.updates):
        return _copy_earlier(storage, path, earlier, states=states, reflink_only=reflink_only)
    target = remove_manifest(path)
    for _ in range(ATTEMPTS):
        manifest = _committed(storage)
        entries: dict[str, StateEntry] = {}
        copies = {storage.path.name: path}
        for name, entry in manifest.states.items() if states else ():
            entries[name] = dataclasses.replace(entry, file=state_file_name(path.name, name))
            copies[entry.file] = path.with_name(entries[name].file)
        for file, copy in copies.items():
            copy_file(storage.path.with_name(file), copy, reflink_only=reflink_only)
        if storage.mode == "r+" or _are_of_commit(storage, manifest, copies):
            return write_file(target, dataclasses.replace(manifest, states=entries).to_json(), like=path)
    raise with_way_out(
        BlockingIOError(errno.EAGAIN, f"{storage.path} was committed to {ATTEMPTS} times while it was copied"),
        "Copy it in the process that trains it, or when that has ended",
    )


def _copy_earlier(storage: MappedRows, path: Path, earlier: EarlierRows, *, states: bool, reflink_only: bool) -> None:
    """Nobody put states aside, and rows that weren't committed are those of no manifest."""
    if states and storage.manifest.states:
        raise ValueError(
            f"{storage.path} has gone on since this copy of it was made, and its optimizer states with it: "
            "copy_to(…, states=False) writes the rows"
        )
    target = remove_manifest(path)
    copy_file(storage.path, path, reflink_only=reflink_only)
    sums = to_hex(block_sums(earlier.write_to(path), storage.manifest.format_version))
    manifest = dataclasses.replace(storage.manifest, updates=storage.updates, commit=new_commit(), states={})
    write_file(target, dataclasses.replace(manifest, checksums=sums).to_json(), like=path)


def _committed(storage: MappedRows) -> Manifest:
    """The manifest of the last commit, which another process may have made since a reader opened the table."""
    path = TableFiles(storage.path).manifest
    return read_manifest(path) if storage.mode == "r" and path.exists() else storage.manifest


def _are_of_commit(storage: MappedRows, manifest: Manifest, copies: dict[str, Path]) -> bool:
    """Undoes what a writer had stored meanwhile; False where it has committed, too."""
    files, at = TableFiles(storage.path), manifest.committed(storage.path.name)
    has_writer = WriterLock.is_held(files.lock, files.table)
    journals = (files.journal, *files.other_journals)
    try:
        num_undone = sum(undo_in_copies(journal, at, copies) for journal in journals)
    except (OSError, ValueError):
        if _committed(storage).commit == manifest.commit:
            raise
        return False
    if _committed(storage).commit != manifest.commit:
        return False
    for file, expected in at.checksums_of.items() if num_undone or has_writer else ():
        if file in copies:
            raw = np.memmap(copies[file], dtype=np.uint8, mode="r").reshape(manifest.rows, -1)
            refuse_other_sums(copies[file], to_hex(block_sums(raw, at.version)), list(expected))
    return True


def refuse_uncommitted(storage: MappedRows) -> None:
    storage.refuse_moved()
    if storage.mode == "r+" and storage.updates != storage.manifest.updates:
        raise with_way_out(
            ValueError(f"{storage.path} has updates since its last commit"), "commit() before it is copied"
        )


def remove_manifest(path: Path) -> Path:
    """Takes away the manifest of what lies at `path`, and the journal, which would be undone in the copy. Returns
    where the new manifest goes."""
    target = path.with_name(manifest_name(path.name))
    for file in (target, path.with_name(journal_name(path.name))):
        with contextlib.suppress(FileNotFoundError):
            disk.os.unlink(file)
    return target


def restore_table(storage: MappedRows, path: str | os.PathLike[str]) -> None:
    """Gives the table the rows, optimizer states, step, extra and update count of the copy at `path`, in one commit.

    A state that the copy lacks becomes zeros. Raises `ValueError` for a copy of another table or a damaged one, and
    changes nothing then; `FileNotFoundError` for one that was cut off.
    """
    path = Path(path)
    manifest = checked_copy(path, storage.path, storage.manifest)
    for file, sums in manifest.checksums_of(path.name).items():
        raw = np.memmap(path.with_name(file), dtype=np.uint8, mode="r").reshape(manifest.rows, -1)
        refuse_other_sums(path.with_name(file), to_hex(block_sums(raw, manifest.format_version)), sums)
    if storage.updates == storage.manifest.updates and manifest.commit == storage.manifest.commit:
        return  # it is there
    with storage.one_commit():
        store_differences(storage, path, manifest, range(manifest.rows), 0)
        storage.updates = manifest.updates
        storage.commit(step=manifest.step, extra=manifest.extra)


def checked_copy(path: Path, table: Path, own: Manifest) -> Manifest:
    """The manifest of the copy at `path`, if it is of the table that has the manifest `own`, and its files are as
    long as it says. Raises as `restore_table`."""
    manifest_path = path.with_name(manifest_name(path.name))
    if not manifest_path.is_file():
        raise FileNotFoundError(f"{manifest_path} isn't there: this copy of a table was not made to its end")
    manifest = read_manifest(manifest_path)
    recorded, given = (
        {**{name: getattr(one, name) for name in ("rows", "width", "dtype", "init_seed")}, **one.provenance}
        for one in (manifest, own)
    )
    found = provenance_differences(recorded, given)
    if found:
        told = "; ".join(f"{name} is {old!r}, here {new!r}" for name, old, new in found)
        raise ValueError(f"{path} is a copy of another table than {table}: {told}")
    for file, row_bytes in manifest.row_bytes_of(path.name).items():
        copy = path.with_name(file)
        expected_bytes, found_bytes = manifest.rows * row_bytes, copy.stat().st_size
        if found_bytes != expected_bytes:
            raise ValueError(f"{copy}: expected {expected_bytes} bytes, found {found_bytes}: the copy is damaged")
    return manifest


def refuse_other_sums(copy: Path, found: list[str], expected: list[str]) -> None:
    if found != expected:
        raise with_way_out(
            ValueError(f"{copy} doesn't have the checksums of its manifest: the copy is damaged, or was trained on"),
            "Go back to another one",
        )


def store_differences(storage: MappedRows, path: Path, manifest: Manifest, rows: range, first_row: int) -> None:
    """Stores what the copy at `path` has otherwise than the table, in the copy's rows `rows`.

    Args:
        storage: The table that is stored to.
        path: The copy's rows.
        manifest: The copy's.
        rows: Which of the copy's rows.
        first_row: The copy's row that is row 0 of `storage`.
    """
    local = slice(rows.start - first_row, rows.stop - first_row)
    copied_NW = _mapped(path, manifest.rows, manifest.width, manifest.dtype)
    for ids_U, new_UW in _differences(storage.weight[local], copied_NW[rows.start : rows.stop]):
        storage.write(ids_U + local.start, new_UW)
    for name, entry in {**storage.manifest.states, **manifest.states}.items():
        state = storage.open_state(name, entry.width)
        copied = manifest.states.get(name)
        wanted_RW = None
        if copied is not None:
            values_NW = _mapped(path.with_name(copied.file), manifest.rows, copied.width, STATE_DTYPE)
            wanted_RW = values_NW[rows.start : rows.stop]
        for ids_U, new_UW in _differences(state.values[local], wanted_RW):
            storage.write_state(state, ids_U + local.start, new_UW)
        state.step = 0 if copied is None else copied.step


def _mapped(path: Path, num_rows: int, width: int, dtype: str) -> torch.Tensor:
    """[N, W], to be read only."""
    kind = row_dtype(dtype)
    # Mode "c" (a write stays in memory) for torch, which has no read-only tensors. Read front to back, so not by
    # `map_rows`, which may advise against reading ahead.
    return torch.from_numpy(np.memmap(path, dtype=kind.numpy, mode="c", shape=(num_rows, width))).view(kind.torch)


def _differences(now_NW: torch.Tensor, wanted_NW: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(row ids, the rows wanted there) of rows whose bytes differ, in parts; wanted None is zeros."""
    num_rows, width = now_NW.shape
    part_rows = max(1, PART_BYTES // file_bytes(1, width, now_NW.dtype))
    for start in range(0, num_rows, part_rows):
        now = now_NW[start : start + part_rows]
        wanted = torch.zeros_like(now) if wanted_NW is None else wanted_NW[start : start + part_rows]
        # Bytes, not values: -0.0 equals 0.0, and NaN nothing.
        differ = (now.view(torch.uint8) != wanted.view(torch.uint8)).any(dim=1)
        row_ids_U = differ.nonzero()[:, 0]
        if len(row_ids_U):
            yield row_ids_U + start, wanted[row_ids_U]
