"""A committed table <-> a copy of it: what a checkpoint keeps, since the table itself has one state only.

    copy_table     table, optimizer states, manifest ──▶ files of another name, a reflink where the file system can
    restore_table  such a copy ──▶ the rows that differ are stored to the open table, and committed

Restoring stores into the files that are there and ends with one commit. So a kill in the middle leaves the table as
it was before, every process that maps the table sees the rows come back, and the copy stays what it is. It reads both
tables once, and writes what differs.

N rows, U rows that differ, W values of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.checksums import PART_BYTES, block_sums, to_hex
from sense_v2.engram.table.disk import copy_file, write_file
from sense_v2.engram.table.format import (
    STATE_DTYPE,
    Manifest,
    StateEntry,
    file_bytes,
    journal_name,
    manifest_name,
    provenance_differences,
    row_dtype,
    state_file_name,
)
from sense_v2.engram.table.opening import read_manifest


def copy_table(
    storage: MMapEmbeddingStorage, path: str | Path, *, states: bool = True, reflink_only: bool = False
) -> None:
    """Copies the table of the last commit to `path`, with its manifest, and its optimizer states where `states`.
    `reflink_only`: an `OSError` where the file system would have to copy the data.

    What lies there is replaced; the manifest goes first and comes last, so that a copy that was cut off has none.
    Raises `ValueError` where rows were stored since the last commit, `OSError` where there is no room.
    """
    path = Path(path)
    if storage.mode == "r+" and storage.updates != storage.manifest.updates:
        raise ValueError(f"{storage.path} has updates since its last commit; commit() before it is copied")
    manifest = storage.manifest
    target = path.with_name(manifest_name(path.name))
    target.unlink(missing_ok=True)
    # A journal of what was there would be undone in the copy.
    path.with_name(journal_name(path.name)).unlink(missing_ok=True)
    entries: dict[str, StateEntry] = {}
    for name, entry in manifest.states.items() if states else ():
        entries[name] = dataclasses.replace(entry, file=state_file_name(path.name, name))
        copy_file(storage.path.with_name(entry.file), path.with_name(entries[name].file), reflink_only=reflink_only)
    copy_file(storage.path, path, reflink_only=reflink_only)
    write_file(target, dataclasses.replace(manifest, states=entries).to_json())


def restore_table(storage: MMapEmbeddingStorage, path: str | Path) -> None:
    """Gives the table the rows, optimizer states, step, extra and update count of the copy at `path`, in one commit.

    A state that the copy lacks becomes zeros. Raises `ValueError` for a copy of another table or a damaged one, and
    changes nothing then; `FileNotFoundError` for one that was cut off.
    """
    path = Path(path)
    manifest = _checked_copy(storage, path)
    if storage.updates == storage.manifest.updates and manifest.commit == storage.manifest.commit:
        return  # it is there
    limit_bytes, storage.journal_limit_bytes = storage.journal_limit_bytes, 2**63 - 1
    try:
        _store_differences(storage, path, manifest)
        storage.updates = manifest.updates
        storage.commit(step=manifest.step, extra=manifest.extra)
    finally:
        storage.journal_limit_bytes = limit_bytes


def _checked_copy(storage: MMapEmbeddingStorage, path: Path) -> Manifest:
    manifest_path = path.with_name(manifest_name(path.name))
    if not manifest_path.is_file():
        raise FileNotFoundError(f"{manifest_path} isn't there: this copy of a table was not made to its end")
    manifest, own = read_manifest(manifest_path), storage.manifest
    refuse_other_table(path, manifest, storage.path, own)
    for file, row_bytes in manifest.row_bytes_of(path.name).items():
        copy = path.with_name(file)
        expected_bytes, found_bytes = manifest.rows * row_bytes, copy.stat().st_size
        if found_bytes != expected_bytes:
            raise ValueError(f"{copy}: expected {expected_bytes} bytes, found {found_bytes}: the copy is damaged")
    for file, sums in manifest.checksums_of(path.name).items():
        raw = np.memmap(path.with_name(file), dtype=np.uint8, mode="r").reshape(manifest.rows, -1)
        if to_hex(block_sums(raw)) != sums:
            raise ValueError(
                f"{path.with_name(file)} doesn't have the checksums of its manifest: the copy is damaged, or was "
                "trained on. Go back to another one"
            )
    return manifest


def refuse_other_table(copy: Path, manifest: Manifest, path: Path, own: Manifest) -> None:
    """Raises `ValueError` naming what differs where the copy's manifest isn't of the table at `path`."""
    recorded, given = (
        {**{name: getattr(one, name) for name in ("rows", "width", "dtype", "init_seed")}, **one.provenance}
        for one in (manifest, own)
    )
    found = provenance_differences(recorded, given)
    if found:
        told = "; ".join(f"{name} is {old!r}, here {new!r}" for name, old, new in found)
        raise ValueError(f"{copy} is a copy of another table than {path}: {told}")


def _store_differences(storage: MMapEmbeddingStorage, path: Path, manifest: Manifest) -> None:
    rows_NW = mapped_copy(path, manifest.rows, manifest.width, manifest.dtype)
    for row_ids_U, new_UW in differences(storage.weight, rows_NW):
        storage.write(row_ids_U, new_UW)
    for name, entry in {**storage.manifest.states, **manifest.states}.items():
        state = storage.open_state(name, entry.width)
        copied = manifest.states.get(name)
        values_NW = None
        if copied is not None:
            values_NW = mapped_copy(path.with_name(copied.file), manifest.rows, copied.width, STATE_DTYPE)
        for row_ids_U, new_UW in differences(state.values, values_NW):
            storage.write_state(state, row_ids_U, new_UW)
        state.step = 0 if copied is None else copied.step


def mapped_copy(path: Path, num_rows: int, width: int, dtype: str) -> torch.Tensor:
    """[N, W], to be read only."""
    kind = row_dtype(dtype)
    # Mode "c" (a write stays in memory) for torch, which has no read-only tensors. Read front to back, so not by
    # `map_rows`, which may advise against reading ahead.
    return torch.from_numpy(np.memmap(path, dtype=kind.numpy, mode="c", shape=(num_rows, width))).view(kind.torch)


def differences(now_NW: torch.Tensor, wanted_NW: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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
