"""A table -> the same rows in another dtype, in a new file: streamed, taken up again after a kill, verified.

Rows go through memory in parts of a few MiB, front to back. What is made lies under a temporary name, and now and
then, once its rows are synced, a progress file says how far it is, from which commit of which table, and what the
checksums and errors are so far; the same call later goes on from there. At the end the whole new file is read once
and compared with the checksums of what was meant to be written, the source's own checksums are compared with the rows
that were read, and only then does the table get its name. The source is only read.

    engram_table.dat.converting.tmp     rows of the new table
    engram_table.dat.progress.tmp       how far they go

Optimizer state isn't converted: it belongs to the rows as they were.

U rows of a part, D row width, B bytes of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram import compact, disk
from sense_v2.engram.checksums import add_to_blocks, from_hex, num_blocks, row_hashes, to_hex
from sense_v2.engram.disk import WriterLock, allocate, has_holes, new_file, open_own
from sense_v2.engram.format import Manifest, RowDtype, row_dtype
from sense_v2.engram.opening import (
    TableFiles,
    checked_manifest,
    lock_table,
    new_commit,
    read_manifest,
    refuse_leftovers,
    refuse_live_journal,
)
from sense_v2.engram.scan import next_data, read_into, scan_rows

CONVERTED_FROM = "converted_from"
ERRORS = ("max_error", "rms_error", "rms")
PART_VALUES = 1 << 18
# Bytes of the source between two syncs of the progress: what a kill costs at most.
SAVE_BYTES = 1 << 28


@dataclass(frozen=True)
class Progress:
    """How far a conversion is. A new one takes the old one's place after each part, in one assignment: whatever ends
    the loop, what is saved then is true."""

    source: dict[str, Any]
    """Which rows are read: the source's `_identity`, rows and width."""
    dtype: str
    rows_done: int
    sums: np.ndarray[Any, Any]
    """Block checksums of the new rows so far."""
    source_sums: np.ndarray[Any, Any]
    max_error: float = 0.0
    sum_square_error: float = 0.0
    sum_square: float = 0.0

    def to_json(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**values, "sums": to_hex(self.sums), "source_sums": to_hex(self.source_sums)})

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Raises `ValueError` or `TypeError` for what isn't one."""
        values = json.loads(text)
        sums = {name: from_hex(values[name]) for name in ("sums", "source_sums")}
        return cls(**{**values, **sums})


@dataclass
class Conversion:
    """What a conversion did."""

    path: Path
    manifest: Manifest
    source: Manifest
    resumed_rows: int
    """Rows that an earlier call had done."""
    max_error: float
    """Largest |new value - old value|."""
    rms_error: float
    rms: float
    """Of the old values, to compare with."""
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
    source, output = Path(source), Path(output)
    old = _opened(source)
    to, files = row_dtype(dtype), TableFiles(output)
    wanted = dataclasses.replace(
        old,
        dtype=to.name,
        init_seed=None,
        init_std=None,
        provenance={name: value for name, value in old.provenance.items() if name != CONVERTED_FROM},
        states={},
        commit=None,
        checksums=None,
    )
    wanted.validate()
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(files.lock, str(output))
    try:
        if output.exists() or output.is_symlink():
            return _finished(files, old, to.name)
        refuse_leftovers(files)
        work = _Work(source, old, output, wanted)
        if files.manifest.exists() and not work.resumed_rows:
            raise FileExistsError(f"{files.manifest} is there, of a table that isn't; choose another --output")
        return work.run(files, advance)
    finally:
        lock.release()


def _finished(files: TableFiles, old: Manifest, dtype: str) -> Conversion:
    """An earlier call's result. Raises `FileExistsError` where the table that is there is another."""
    manifest = None
    with contextlib.suppress(OSError, ValueError):
        manifest = read_manifest(files.manifest)
    found = manifest.provenance.get(CONVERTED_FROM) if manifest else None
    if (
        manifest is None
        or not isinstance(found, dict)
        or manifest.dtype != dtype
        or not _identity(old).items() <= found.items()
    ):
        raise FileExistsError(f"{files.table} is there already; choose another --output")
    progress_path(files.table).unlink(missing_ok=True)
    max_error, rms_error, rms = (float(found.get(name, math.nan)) for name in ERRORS)
    return Conversion(files.table, manifest, old, manifest.rows, max_error, rms_error, rms)


def _opened(source: Path) -> Manifest:
    """The source's manifest, once file and journal agree with it and nobody writes."""
    files = TableFiles(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no table there")
    if WriterLock.is_held(files.lock):
        holder = WriterLock.holder(files.lock) or os.getpid()
        raise BlockingIOError(f"process {holder} is writing to {source}. Convert it when that has ended")
    if files.lack_manifest():
        raise ValueError(
            f"{source} has no manifest {files.manifest.name}, so nothing says how long its rows are. Open it with "
            "its configuration and commit()"
        )
    manifest = read_manifest(files.manifest)
    lock_table(files, write=False)
    checked_manifest(files, manifest, write=False)
    refuse_live_journal(files, manifest)
    return manifest


def _identity(manifest: Manifest) -> dict[str, Any]:
    """Which rows these are: of the manifest that `provenance.converted_from` of the new one names."""
    sums = manifest.checksums
    digest = None if sums is None else hashlib.sha256("".join(sums).encode()).hexdigest()
    names = ("dtype", "generation", "commit")
    return {**{name: getattr(manifest, name) for name in names}, "checksums_sha256": digest}


def progress_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.progress.tmp")


class _Work:
    """One conversion: the file in the making and its progress."""

    def __init__(self, source: Path, old: Manifest, output: Path, wanted: Manifest) -> None:
        self.source, self.old, self.wanted = source, old, wanted
        self.old_dtype, self.new_dtype = row_dtype(old.dtype), row_dtype(wanted.dtype)
        self.rows_path = output.with_name(f"{output.name}.converting.tmp")
        self.progress_path = progress_path(output)
        self.notes: list[str] = []
        self.rows_of = {**_identity(old), "rows": old.rows, "width": old.width}
        zeros = np.zeros(num_blocks(old.rows), dtype=np.uint64)
        self.progress = self._found() or Progress(self.rows_of, wanted.dtype, 0, zeros, zeros)
        self.resumed_rows = self.progress.rows_done

    def _found(self) -> Progress | None:
        """An earlier call's progress, where it is of these rows and the file is there that it speaks of."""
        try:
            found = Progress.from_json(self.progress_path.read_text(encoding="utf-8"))
            count = num_blocks(self.old.rows)
            whole = (
                0 < found.rows_done <= self.old.rows
                and len(found.sums) == len(found.source_sums) == count
                and self.rows_path.stat().st_size == self.wanted.table_bytes
            )
            if whole and found.source == self.rows_of and found.dtype == self.wanted.dtype:
                return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            pass
        self.notes.append(
            f"{self.progress_path.name} isn't of this conversion (another source, commit or dtype, or damaged): it "
            "begins anew"
        )
        return None

    def run(self, files: TableFiles, advance: Callable[[int], Any]) -> Conversion:
        fd = open_own(self.rows_path)
        try:
            with disk.naming(self.rows_path):
                if not self.resumed_rows:
                    disk.os.ftruncate(fd, 0)
                    if has_holes(self.source):
                        disk.os.ftruncate(fd, self.wanted.table_bytes)
                    else:
                        allocate(fd, self.wanted.table_bytes, self.rows_path)
                advance(self.resumed_rows * self.old_dtype.row_bytes(self.old.width))
                self._convert(fd, advance)
                self._save(fd)
            self._verify(advance)
            self._publish(files)
        finally:
            os.close(fd)
        max_error, rms_error, rms = self._errors().values()
        return Conversion(
            files.table, self.wanted, self.old, self.resumed_rows, max_error, rms_error, rms, self.notes
        )

    def _errors(self) -> dict[str, float]:
        count = self.old.rows * self.old.width
        rms_error, rms = (
            math.sqrt(total / count) for total in (self.progress.sum_square_error, self.progress.sum_square)
        )
        return dict(zip(ERRORS, (self.progress.max_error, rms_error, rms), strict=True))

    def _convert(self, fd: int, advance: Callable[[int], Any]) -> None:
        rows, width = self.old.rows, self.old.width
        row_bytes, new_row_bytes = self.old_dtype.row_bytes(width), self.new_dtype.row_bytes(width)
        part_rows = max(1, min(PART_VALUES // width, rows))
        buffer = np.empty((part_rows, row_bytes), dtype=np.uint8)
        source_fd = os.open(self.source, os.O_RDONLY | os.O_CLOEXEC)
        saved = data_from = 0
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(source_fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for start in range(self.progress.rows_done, rows, part_rows):
                rows_UB = buffer[: min(part_rows, rows - start)]
                end = (start + len(rows_UB)) * row_bytes
                if data_from < end:
                    data_from = next_data(source_fd, max(data_from, start * row_bytes))
                if data_from < end:  # or else a hole: zeros, which stay one
                    read_into(source_fd, rows_UB, start * row_bytes)
                    new_UB, progress = self._part(rows_UB, start)
                    disk.write_at(fd, new_UB, start * new_row_bytes)
                    self.progress = progress
                else:
                    self.progress = dataclasses.replace(self.progress, rows_done=start + len(rows_UB))
                advance(rows_UB.nbytes)
                if end - saved >= SAVE_BYTES:
                    self._save(fd)
                    saved = end
        except BaseException:
            with contextlib.suppress(OSError):  # not worth hiding what happened
                self._save(fd)
            raise
        finally:
            os.close(source_fd)

    def _part(self, rows_UB: np.ndarray[Any, Any], start: int) -> tuple[np.ndarray[Any, Any], Progress]:
        """The new bytes of rows from `start` on, and the progress once they are written."""
        values_UD = to_float32(rows_UB, self.old.width, self.old_dtype)
        try:
            new_UB = from_float32(values_UD, self.new_dtype)
        except NotRepresentableError as error:
            raise ValueError(
                f"{self.source}: row {start + error.row} {error.what}. sense-engram verify counts such values"
            ) from None
        error_UD = to_float32(new_UB, self.old.width, self.new_dtype) - values_UD
        ids_U = np.arange(start, start + len(rows_UB), dtype=np.int64)
        old = self.progress
        source_sums, sums = old.source_sums.copy(), old.sums.copy()
        add_to_blocks(source_sums, ids_U, row_hashes(ids_U, rows_UB), self.old.rows)
        add_to_blocks(sums, ids_U, row_hashes(ids_U, new_UB), self.old.rows)
        return new_UB, dataclasses.replace(
            old,
            rows_done=start + len(rows_UB),
            sums=sums,
            source_sums=source_sums,
            max_error=max(old.max_error, float(error_UD.abs().max())),
            sum_square_error=old.sum_square_error + float(error_UD.square().sum(dtype=torch.float64)),
            sum_square=old.sum_square + float(values_UD.square().sum(dtype=torch.float64)),
        )

    def _save(self, fd: int) -> None:
        """The rows first: what the progress says is done must be on the disk."""
        progress = self.progress
        disk.sync_fd(fd, self.rows_path)
        with new_file(self.progress_path, replace=True) as progress_fd:
            disk.write_at(progress_fd, progress.to_json().encode(), 0)

    def _verify(self, advance: Callable[[int], Any]) -> None:
        expected = to_hex(self.progress.sums)
        found = to_hex(scan_rows(self.rows_path, self.old.rows, self.old.width, self.new_dtype, advance=advance).sums)
        now = read_manifest(TableFiles(self.source).manifest)
        changed = _identity(now) != _identity(self.old) or (
            self.old.checksums is not None and to_hex(self.progress.source_sums) != self.old.checksums
        )
        if changed or found != expected:
            self.progress_path.unlink(missing_ok=True)  # the next call begins anew
            self.rows_path.unlink(missing_ok=True)
        if changed:
            raise ValueError(
                f"{self.source}: the rows that were read aren't those of its commit (generation "
                f"{self.old.generation}): it changed meanwhile, or is damaged. sense-engram verify says which"
            )
        if found != expected:
            raise ValueError(
                f"{self.rows_path}: what was read back isn't what was written. Look at the disk, then convert again"
            )

    def _publish(self, files: TableFiles) -> None:
        """The manifest first: without its table it is an error to a reader, and to this function a thing to go on
        with."""
        provenance = {**self.wanted.provenance, CONVERTED_FROM: {**_identity(self.old), **self._errors()}}
        self.wanted = dataclasses.replace(
            self.wanted, provenance=provenance, commit=new_commit(), checksums=to_hex(self.progress.sums)
        )
        self.wanted.validate()
        with new_file(files.manifest, replace=True) as fd:
            disk.write_at(fd, self.wanted.to_json().encode(), 0)
        disk.os.replace(self.rows_path, files.table)
        disk.sync(files.table.parent)
        self.progress_path.unlink(missing_ok=True)


# Rows as they lie on disk <-> float32


class NotRepresentableError(Exception):
    """A row that a dtype can't hold: its number among those given, and why."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row} {what}")
        self.row, self.what = row, what


def to_float32(rows_UB: np.ndarray[Any, Any], width: int, dtype: RowDtype) -> torch.Tensor:
    """float32 [U, D] of rows as bytes, uint8 [U, B]."""
    raw_UB = torch.from_numpy(rows_UB)
    if dtype.is_compact:
        return compact.decode_rows(raw_UB, width, dtype.name)
    return raw_UB.view(dtype.torch).float()


def from_float32(values_UD: torch.Tensor, dtype: RowDtype) -> np.ndarray[Any, Any]:
    """Rows as bytes, uint8 [U, B], of float32 [U, D]. Raises `NotRepresentableError`."""
    _refuse_not_finite(values_UD, "holds NaN or an infinity")
    if dtype.is_compact:
        return compact.join(*compact.encode(values_UD, dtype.name)).numpy()
    new_UD = values_UD.to(dtype.torch)
    _refuse_not_finite(new_UD, f"holds a value too large for {dtype.name}")
    new_UB: np.ndarray[Any, Any] = new_UD.view(torch.uint8).numpy()
    return new_UB


def _refuse_not_finite(values_UD: torch.Tensor, what: str) -> None:
    finite_U = values_UD.isfinite().all(dim=1)
    if not finite_U.all():
        raise NotRepresentableError(int(finite_U.logical_not().nonzero()[0]), what)
