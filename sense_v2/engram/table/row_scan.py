"""A file of rows -> its block checksums, and its values that are no numbers, in one pass.

Parts of a few MiB go through one buffer, so memory doesn't follow the file; holes of a sparse file are skipped, since
a row of zeros hashes to 0. Values are looked at as bits, which serves bfloat16 as well: NumPy has no such type.
Compact rows are decoded first: a scale can be what is no number.

N rows, U rows of a part, B bytes of a row.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.table import platform
from sense_v2.engram.table.checksums import HASH_VERSION, PART_BYTES, add_to_blocks, num_blocks, row_hashes
from sense_v2.engram.table.compact_rows import decode_rows
from sense_v2.engram.table.format import MAX_FILE_BYTES, ROW_DTYPES, RowDtype

# All ones there: infinity where the rest of the value is zero, NaN otherwise.
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
_FRACTION = {"float32": 0x007FFFFF, "float16": 0x03FF, "bfloat16": 0x007F}


@dataclass
class Scan:
    """What one reading of a file has found."""

    sums: np.ndarray[Any, Any]
    """Block checksums, uint64."""
    num_zero_rows: int = 0
    num_nan: int = 0
    num_infinite: int = 0
    num_bad_rows: int = 0
    """Rows with values that are no numbers."""
    first_bad_row: int = -1


def scan_rows(
    path: Path,
    num_rows: int,
    width: int,
    dtype: RowDtype,
    *,
    version: int = HASH_VERSION,
    is_link_allowed: bool = False,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> Scan:
    """Reads the file once, front to back; `advance` is told how many bytes were dealt with. Raises `OSError`."""
    row_bytes = dtype.row_bytes(width)
    scan = Scan(np.zeros(num_blocks(num_rows), dtype=np.uint64))
    part_rows = max(1, PART_BYTES // max(row_bytes, 64))
    buffer = np.empty((min(part_rows, num_rows), row_bytes), dtype=np.uint8)
    # A pipe would be waited for.
    no_link = 0 if is_link_allowed else platform.NO_LINKS
    fd = platform.open_file(path, platform.READ | platform.NO_WAITING | no_link)
    try:
        platform.advise(fd, "SEQUENTIAL")
        data_from = 0
        for start in range(0, num_rows, part_rows):
            rows_UB = buffer[: min(part_rows, num_rows - start)]
            end = (start + len(rows_UB)) * row_bytes
            if data_from < end:
                data_from = next_data(fd, max(data_from, start * row_bytes))
            if data_from >= end:
                scan.num_zero_rows += len(rows_UB)  # all of it is a hole, and zeros hash to 0
            else:
                read_into(fd, rows_UB, start * row_bytes)
                _scan_part(scan, rows_UB, start, num_rows, width, dtype, version)
            advance(rows_UB.nbytes)
        if os.fstat(fd).st_size != num_rows * row_bytes:
            raise OSError(errno.EIO, "its length changed while it was read")
    finally:
        os.close(fd)
    return scan


def next_data(fd: int, at: int) -> int:
    """Where the file goes on with something other than a hole."""
    found = platform.next_data(fd, at)
    return MAX_FILE_BYTES if found is None else found


def read_into(fd: int, rows_UB: np.ndarray[Any, Any], at: int) -> None:
    raw = rows_UB.data.cast("B")
    while raw:
        found = platform.read_into(fd, raw, at)
        if found == 0:
            raise OSError(errno.EIO, "its length changed while it was read")
        raw, at = raw[found:], at + found


def _scan_part(
    scan: Scan, rows_UB: np.ndarray[Any, Any], start: int, num_rows: int, width: int, dtype: RowDtype, version: int
) -> None:
    row_ids_U = np.arange(start, start + len(rows_UB), dtype=np.int64)
    hashes_U = row_hashes(row_ids_U, rows_UB, version)
    add_to_blocks(scan.sums, row_ids_U, hashes_U, num_rows)
    # Other rows could hash to 0 as well, one in 2⁶⁴.
    scan.num_zero_rows += int((~rows_UB[hashes_U == 0].any(axis=1)).sum())
    name = dtype.name
    if dtype.is_compact:
        rows_UB, name = decode_rows(torch.from_numpy(rows_UB), width, name).numpy().view(np.uint8), "float32"
    bits = rows_UB.view(f"<u{ROW_DTYPES[name].item_bytes}")
    exponent = bits.dtype.type(_EXPONENT[name])
    bad = (bits & exponent) == exponent
    if bad.any():
        fraction = bits.dtype.type(_FRACTION[name])
        num_infinite = int((bad & ((bits & fraction) == 0)).sum())
        bad_rows = np.flatnonzero(bad.any(axis=1))
        if scan.first_bad_row < 0:
            scan.first_bad_row = start + int(bad_rows[0])
        scan.num_bad_rows += len(bad_rows)
        scan.num_infinite += num_infinite
        scan.num_nan += int(bad.sum()) - num_infinite
