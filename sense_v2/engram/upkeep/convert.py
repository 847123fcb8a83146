"""Converts a table to another dtype, in a new file, resumable and verified.

How rows are carried over is `sense_v2.engram.upkeep.transfer`'s; here a table of ours is both sides of it, and what
was made gets its manifest, and its name, when it was read back and compared.

Optimizer state isn't converted: it belongs to the rows as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table import disk
from sense_v2.engram.table.checksums import to_hex
from sense_v2.engram.table.disk import WriterLock
from sense_v2.engram.table.format import FORMAT_VERSION, Manifest, new_commit, row_dtype
from sense_v2.engram.table.opening import (
    TableFiles,
    checked_manifest,
    lock_table,
    read_manifest,
    real_table,
    refuse_leftovers,
    refuse_live_journal,
)
from sense_v2.engram.table.row_dtypes import DtypeCoding
from sense_v2.engram.table.row_files import Column, Piece
from sense_v2.engram.upkeep.transfer import ERRORS, NewFile, Side, Target, Transfer

CONVERTED_FROM = "converted_from"


@dataclass
class Conversion:
    """What a conversion to a table of ours did."""

    path: Path
    manifest: Manifest
    resumed_rows: int
    """Rows that an earlier call had done."""
    max_error: float
    """Largest |new value - old value|."""
    rms_error: float
    rms: float
    """Of the old values, to compare with; NaN where one of those that were copied is."""
    notes: list[str] = field(default_factory=list)


def convert_table(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str,
    *,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> Conversion:
    """Writes the table at `source` to `output` with rows of `dtype`, or goes on where an earlier call was ended.

    `advance` is told how many bytes of either file were dealt with: the source's once, the new one's once when it is
    verified.

    A table at `output` that is this conversion's result stays as it is.

    Raises `FileExistsError` where another one is there, `BlockingIOError` where the source is being written to
    or another process converts to `output`, `ValueError` for a row that the dtype can't hold, a damaged or changed
    source, or a new file that isn't what was written; `OSError` for what reading and writing raise.
    """
    source = real_table(source)
    old = readable_manifest(source)
    wanted = dataclasses.replace(
        old,
        dtype=row_dtype(dtype).name,
        init_seed=None,
        init_std=None,
        provenance={name: value for name, value in old.provenance.items() if name != CONVERTED_FROM},
        states={},
        commit=None,
        checksums=None,
        format_version=FORMAT_VERSION,
    )
    manifest_path = TableFiles(source).manifest
    return make_table(
        table_side(source, old),
        Path(output),
        wanted,
        identity=lambda: identity_of(read_manifest(manifest_path)),
        source_checksums=old.checksums,
        source_version=old.format_version,
        advance=advance,
    )


def make_table(
    source: Side,
    output: Path,
    wanted: Manifest,
    *,
    identity: Callable[[], Mapping[str, Any]],
    source_checksums: list[str] | None = None,
    source_version: int = FORMAT_VERSION,
    advance: Callable[[int], Any],
) -> Conversion:
    """The table that `wanted` describes, at `output`, with the rows of `source`, whose `identity` it names under
    `provenance.converted_from`. Raises as `convert_table`."""
    wanted.validate()
    files = TableFiles(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(files.lock, str(output))
    try:
        if output.exists() or output.is_symlink():
            return _finished(files, identity(), wanted.dtype)
        refuse_leftovers(files)
        rows_path = temporary(output)
        transfer = Transfer(
            source,
            table_side(rows_path, wanted),
            num_rows=wanted.rows,
            width=wanted.width,
            files=[NewFile(rows_path, wanted.table_bytes)],
            progress_path=progress_path(output),
            identity=identity,
            source_checksums=source_checksums,
            source_version=source_version,
        )
        if files.manifest.exists() and not transfer.resumed_rows:
            raise with_way_out(
                FileExistsError(f"{files.manifest} is there, of a table that isn't"), "choose another --output"
            )
        transfer.run(advance)
        manifest = _publish(files, wanted, transfer)
        max_error, rms_error, rms = transfer.errors().values()
        return Conversion(files.table, manifest, transfer.resumed_rows, max_error, rms_error, rms, transfer.notes)
    finally:
        lock.release()


def _publish(files: TableFiles, wanted: Manifest, transfer: Transfer) -> Manifest:
    """The manifest first: without its table it is an error to a reader, and to `make_table` a thing to go on with."""
    of = {name: value for name, value in transfer.rows_of.items() if name not in ("rows", "width")}
    known = {name: value for name, value in transfer.errors().items() if math.isfinite(value)}
    manifest = dataclasses.replace(
        wanted,
        provenance={**wanted.provenance, CONVERTED_FROM: {**of, **known}},
        commit=new_commit(),
        checksums=to_hex(transfer.progress.sums),
    )
    manifest.validate()
    disk.write_file(files.manifest, manifest.to_json(), like=temporary(files.table))
    disk.rename(temporary(files.table), files.table)
    progress_path(files.table).unlink(missing_ok=True)
    return manifest


def _finished(files: TableFiles, identity: Mapping[str, Any], dtype: str) -> Conversion:
    """An earlier call's result. Raises `FileExistsError` where the table that is there is another."""
    manifest = None
    with contextlib.suppress(OSError, ValueError):
        manifest = read_manifest(files.manifest)
    found = manifest.provenance.get(CONVERTED_FROM) if manifest else None
    if (
        manifest is None
        or not isinstance(found, dict)
        or manifest.dtype != dtype
        or not identity.items() <= found.items()
    ):
        raise with_way_out(FileExistsError(f"{files.table} is there already"), "choose another --output")
    progress_path(files.table).unlink(missing_ok=True)
    max_error, rms_error, rms = (float(found.get(name, math.nan)) for name in ERRORS)
    return Conversion(files.table, manifest, manifest.rows, max_error, rms_error, rms)


def readable_manifest(source: Path) -> Manifest:
    """A table's manifest, once file and journal agree with it and nobody writes. Raises `FileNotFoundError`,
    `BlockingIOError`, `ValueError`."""
    files = TableFiles(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no table there")
    if WriterLock.is_held(files.lock, source):
        holder = WriterLock.holder(files.lock, source) or os.getpid()
        raise with_way_out(
            BlockingIOError(f"process {holder} is writing to {source}"), "Convert it when that has ended"
        )
    if files.lack_manifest():
        raise with_way_out(
            ValueError(f"{source} has no manifest {files.manifest.name}, so nothing says how long its rows are"),
            "Open it with its configuration and commit()",
        )
    manifest = read_manifest(files.manifest)
    lock_table(files, write=False)
    checked_manifest(files, manifest, write=False)
    refuse_live_journal(files, manifest)
    return manifest


def identity_of(manifest: Manifest) -> dict[str, Any]:
    """Which rows these are: of the manifest that `provenance.converted_from` of the new one names."""
    sums = manifest.checksums
    digest = None if sums is None else hashlib.sha256("".join(sums).encode()).hexdigest()
    names = ("dtype", "generation", "commit")
    return {**{name: getattr(manifest, name) for name in names}, "checksums_sha256": digest}


def table_side(path: Path, manifest: Manifest) -> Target:
    """Our table at `path`, as either side of a transfer: one column of one file."""
    dtype = row_dtype(manifest.dtype)
    column = Column(dtype.row_bytes(manifest.width), (Piece(path, 0, manifest.rows),))
    return Target(path, [column], DtypeCoding(dtype))


def temporary(path: Path) -> Path:
    """What a file is called while it is made."""
    return path.with_name(f"{path.name}.converting.tmp")


def progress_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.progress.tmp")
