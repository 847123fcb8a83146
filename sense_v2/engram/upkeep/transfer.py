"""Carries rows over to new files: streamed, resumable, read back and compared.

Rows go through memory in parts of a few MiB, front to back, wherever either side has them
(`sense_v2.engram.table.row_files`) and however it codes them (`sense_v2.engram.table.row_dtypes`). Where both code
them alike their bytes are copied. What is made lies under temporary names, and now and then, once its rows are
synced, a progress file says how far it is, of which rows, and what the checksums and errors are so far; the same call
later goes on from there. At the end all that was written is read once and compared with the checksums of what was
meant to be written, and the source must be what it was. Who calls renames the files then. The source is only read.

    NAME.converting.tmp     a file in the making
    NAME.progress.tmp       how far it is

U rows of a part, D row width, B bytes of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table.checksums import HASH_VERSION, add_rows, from_hex, num_blocks, to_hex
from sense_v2.engram.table.disk import allocate, open_own
from sense_v2.engram.table.row_dtypes import Coding, NotRepresentableError, ReadCoding
from sense_v2.engram.table.row_files import Column, RowFiles, are_sparse, paths_of

ERRORS = ("max_error", "rms_error", "rms")
PART_VALUES = 1 << 18
# Bytes of the source between two syncs of the progress: what a kill costs at most.
SAVE_BYTES = 1 << 28


@dataclass(frozen=True)
class Side:
    """Where rows are, and how they are coded there."""

    path: Path
    """What errors name."""
    columns: Sequence[Column]
    coding: ReadCoding


@dataclass(frozen=True)
class Target(Side):
    """Where rows go to."""

    coding: Coding


@dataclass(frozen=True)
class NewFile:
    """A file to make, under its temporary name."""

    path: Path
    num_bytes: int
    head: bytes = b""
    """What it begins with, in front of the rows."""


@dataclass(frozen=True)
class Progress:
    """How far a transfer is. A new one takes the old one's place after each part, in one assignment: whatever ends
    the loop, what is saved then is true."""

    source: dict[str, Any]
    """Which rows are read: their identity, number and width."""
    dtype: str
    """The new rows' coding."""
    rows_done: int
    sums: np.ndarray[Any, Any]
    """Block checksums of the new rows so far."""
    source_sums: np.ndarray[Any, Any]
    source_version: int
    """Of its hashes, whose the source's manifest has."""
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


class Transfer:
    """One transfer of `num_rows` rows of `width` values: `run`, or go on with it.

    `identity()` says which rows the source's are, as JSON has it; where it, or `source_checksums`, isn't the same at
    the end, the source changed meanwhile.
    """

    def __init__(
        self,
        source: Side,
        target: Target,
        *,
        num_rows: int,
        width: int,
        files: Sequence[NewFile],
        progress_path: Path,
        identity: Callable[[], Mapping[str, Any]],
        source_checksums: list[str] | None = None,
        source_version: int = HASH_VERSION,
    ) -> None:
        self.source, self.target, self.files = source, target, files
        self.num_rows, self.width = num_rows, width
        self.progress_path, self.identity, self.source_checksums = progress_path, identity, source_checksums
        self.copies = source.coding == target.coding
        self.notes: list[str] = []
        self.rows_of = json.loads(json.dumps({**identity(), "rows": num_rows, "width": width}))
        zeros = np.zeros(num_blocks(num_rows), dtype=np.uint64)
        self.progress = self._found(source_version) or Progress(
            self.rows_of, target.coding.name, 0, zeros, zeros, source_version
        )
        self.resumed_rows = self.progress.rows_done

    def _found(self, source_version: int) -> Progress | None:
        """An earlier call's progress, where it is of these rows and the files are there that it speaks of."""
        try:
            found = Progress.from_json(self.progress_path.read_text(encoding="utf-8"))
            count = num_blocks(self.num_rows)
            whole = (
                0 < found.rows_done <= self.num_rows
                and len(found.sums) == len(found.source_sums) == count
                and all(is_made(file) for file in self.files)
            )
            of = (found.source, found.dtype, found.source_version)
            if whole and of == (self.rows_of, self.target.coding.name, source_version):
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

    def run(self, advance: Callable[[int], Any]) -> None:
        """Writes and verifies; `advance` is told how many bytes of either side were dealt with, the source's once,
        the new ones once when they are verified. Raises `ValueError`, `OSError`."""
        if not self.resumed_rows:
            self._make_files()
        advance(self.resumed_rows * self.source.coding.row_bytes(self.width))
        with RowFiles(self.source.columns) as old, RowFiles(self.target.columns, write=True) as new:
            self._convert(old, new, advance)
            self._save(new)
        self._verify(advance)

    def errors(self) -> dict[str, float]:
        """max_error, rms_error, rms (of the old values; NaN where one of those that were copied is)."""
        count = self.num_rows * self.width
        rms_error, rms = (
            math.sqrt(total / count) for total in (self.progress.sum_square_error, self.progress.sum_square)
        )
        return dict(zip(ERRORS, (self.progress.max_error, rms_error, rms), strict=True))

    def _make_files(self) -> None:
        has_holes = are_sparse(self.source.columns)
        for file in self.files:
            fd = open_own(file.path)
            try:
                with disk.naming(file.path):
                    disk.os.ftruncate(fd, 0)
                    platform.take_mode(fd, paths_of(self.source.columns)[0])
                    if has_holes:
                        disk.os.ftruncate(fd, file.num_bytes)
                    else:
                        allocate(fd, file.num_bytes, file.path)
                    if file.head:
                        disk.write_at(fd, file.head, 0)
            finally:
                os.close(fd)

    def _convert(self, old: RowFiles, new: RowFiles, advance: Callable[[int], Any]) -> None:
        part_rows = max(1, min(PART_VALUES // self.width, self.num_rows))
        buffer = np.empty((part_rows, old.row_bytes), dtype=np.uint8)
        saved = 0
        try:
            for start in range(self.progress.rows_done, self.num_rows, part_rows):
                rows_UB = buffer[: min(part_rows, self.num_rows - start)]
                if old.hold_data(start, len(rows_UB)):
                    old.read(start, rows_UB)
                    new_UB, progress = self._part(rows_UB, start)
                    new.write(start, new_UB)
                    self.progress = progress
                else:  # a hole: zeros, which stay one
                    self.progress = dataclasses.replace(self.progress, rows_done=start + len(rows_UB))
                advance(rows_UB.nbytes)
                end = (start + len(rows_UB)) * old.row_bytes
                if end - saved >= SAVE_BYTES:
                    self._save(new)
                    saved = end
        except BaseException:
            with contextlib.suppress(OSError):  # not worth hiding what happened
                self._save(new)
            raise

    def _part(self, rows_UB: np.ndarray[Any, Any], start: int) -> tuple[np.ndarray[Any, Any], Progress]:
        """The new bytes of rows from `start` on, and the progress once they are written."""
        ids_U = np.arange(start, start + len(rows_UB), dtype=np.int64)
        old = self.progress
        source_sums, sums = old.source_sums.copy(), old.sums.copy()
        add_rows(source_sums, ids_U, rows_UB, self.num_rows, old.source_version)
        values_UD = self.source.coding.decode(rows_UB, self.width)
        done = dataclasses.replace(
            old,
            rows_done=start + len(rows_UB),
            sums=sums,
            source_sums=source_sums,
            sum_square=old.sum_square + float(values_UD.square().sum(dtype=torch.float64)),
        )
        if self.copies:
            if old.source_version == HASH_VERSION:
                sums[:] = source_sums
            else:
                add_rows(sums, ids_U, rows_UB, self.num_rows)
            return rows_UB, done
        try:
            new_UB = self.target.coding.encode(values_UD)
        except NotRepresentableError as error:
            raise with_way_out(
                ValueError(f"{self.source.path}: row {start + error.row} {error.what}"),
                "sense-engram verify counts such values",
            ) from None
        add_rows(sums, ids_U, new_UB, self.num_rows)
        error_UD = self.target.coding.decode(new_UB, self.width) - values_UD
        return new_UB, dataclasses.replace(
            done,
            max_error=max(old.max_error, float(error_UD.abs().max())),
            sum_square_error=old.sum_square_error + float(error_UD.square().sum(dtype=torch.float64)),
        )

    def _save(self, new: RowFiles) -> None:
        """The rows first: what the progress says is done must be on the disk."""
        progress = self.progress
        new.sync()
        disk.write_file(self.progress_path, progress.to_json(), like=self.files[0].path)

    def _verify(self, advance: Callable[[int], Any]) -> None:
        expected, found = to_hex(self.progress.sums), self._sums_on_disk(advance)
        now = json.loads(json.dumps({**self.identity(), "rows": self.num_rows, "width": self.width}))
        changed = now != self.rows_of or (
            self.source_checksums is not None and to_hex(self.progress.source_sums) != self.source_checksums
        )
        if changed or found != expected:
            self.progress_path.unlink(missing_ok=True)  # the next call begins anew
            for file in self.files:
                file.path.unlink(missing_ok=True)
        if changed:
            raise with_way_out(
                ValueError(
                    f"{self.source.path}: the rows that were read aren't those it began with: it changed meanwhile, "
                    "or is damaged"
                ),
                "sense-engram verify says which",
            )
        if found != expected:
            raise with_way_out(
                ValueError(f"{self.target.path}: what was read back isn't what was written"),
                "Look at the disk, then convert again",
            )

    def _sums_on_disk(self, advance: Callable[[int], Any]) -> list[str]:
        sums = np.zeros(num_blocks(self.num_rows), dtype=np.uint64)
        with RowFiles(self.target.columns) as new:
            part_rows = max(1, min(PART_VALUES // self.width, self.num_rows))
            buffer = np.empty((part_rows, new.row_bytes), dtype=np.uint8)
            for start in range(0, self.num_rows, part_rows):
                rows_UB = buffer[: min(part_rows, self.num_rows - start)]
                if new.hold_data(start, len(rows_UB)):
                    new.read(start, rows_UB)
                    ids_U = np.arange(start, start + len(rows_UB), dtype=np.int64)
                    add_rows(sums, ids_U, rows_UB, self.num_rows)
                advance(rows_UB.nbytes)
        if not all(is_made(file) for file in self.files):
            return []
        return to_hex(sums)


def is_made(file: NewFile) -> bool:
    """Whether it has its length and what it begins with."""
    with open(file.path, "rb") as opened:
        return os.fstat(opened.fileno()).st_size == file.num_bytes and opened.read(len(file.head)) == file.head
