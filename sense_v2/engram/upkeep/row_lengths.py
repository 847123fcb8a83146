"""A table -> how long its rows are, and how far they have moved since it was made.

A table's initial noise comes from its seed (`initial_noise.py`), so each row's distance from its beginning is exact
without a copy: parts of the file are read, the same parts of the noise are drawn again, and the two are compared. A
row that no step ever reached is bit for bit its noise.

A table of more than `max_rows` rows is sampled: parts evenly spread over the file, so that memory and time have a
bound whatever the table's size. One that was converted or came from elsewhere has lengths, and no known beginning.

N rows, U rows of a part, D row width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.table import platform
from sense_v2.engram.table.compact_rows import decode_rows
from sense_v2.engram.table.format import Manifest, row_dtype
from sense_v2.engram.table.initial_noise import CHUNK_VALUES, InitialNoise
from sense_v2.engram.table.row_scan import read_into

MAX_ROWS = 1 << 22
"""Rows that are read at most, and 2 GiB of them."""
MAX_BYTES = 1 << 31


@dataclass
class RowLengths:
    """Some or all rows of a table, by ascending id."""

    row_ids: np.ndarray[Any, Any]
    norms: np.ndarray[Any, Any]
    """float32: the Euclidean length of each."""
    drifts: np.ndarray[Any, Any] | None
    """float32: the distance of each from its initial values; exactly 0 where nothing moved; None where those aren't
    known."""
    table_rows: int

    @property
    def is_sampled(self) -> bool:
        return len(self.row_ids) < self.table_rows


def measure_rows(
    path: Path,
    manifest: Manifest,
    *,
    max_rows: int = MAX_ROWS,
    advance: Callable[[int], Any] = lambda num_rows: None,
) -> RowLengths:
    """Reads the table once, or a sample of it, front to back; `advance` is told how many rows were dealt with, of
    `num_measured`. Raises `OSError`."""
    dtype = row_dtype(manifest.dtype)
    row_bytes, width = dtype.row_bytes(manifest.width), manifest.width
    noise = None
    if manifest.init_std is not None and not dtype.is_compact:
        noise = InitialNoise(manifest.init_seed or 0, manifest.init_std, manifest.dtype)
    parts = _parts(manifest, max_rows)
    row_ids, norms, drifts = [], [], []
    fd = platform.open_file(path, platform.READ)
    try:
        for first, count in parts:
            raw_UB = np.empty((count, row_bytes), dtype=np.uint8)
            read_into(fd, raw_UB, first * row_bytes)
            raw = torch.from_numpy(raw_UB)
            rows_UD = decode_rows(raw, width, dtype.name) if dtype.is_compact else raw.view(dtype.torch)
            norms.append(rows_UD.float().norm(dim=1).numpy())
            if noise is not None:
                began_UD = noise.values(first * width, count * width).view(count, width)
                drifts.append((rows_UD.float() - began_UD.float()).norm(dim=1).numpy())
            row_ids.append(np.arange(first, first + count, dtype=np.int64))
            advance(count)
    finally:
        os.close(fd)
    return RowLengths(
        np.concatenate(row_ids),
        np.concatenate(norms),
        np.concatenate(drifts) if noise is not None else None,
        manifest.rows,
    )


def num_measured(manifest: Manifest, *, max_rows: int = MAX_ROWS) -> int:
    """Rows that `measure_rows` reads."""
    return sum(count for _, count in _parts(manifest, max_rows))


def _parts(manifest: Manifest, max_rows: int) -> list[tuple[int, int]]:
    """(first row, rows) of what is read: about one chunk of noise each."""
    part_rows = max(1, CHUNK_VALUES // manifest.width)
    num_parts = -(-manifest.rows // part_rows)
    row_bytes = row_dtype(manifest.dtype).row_bytes(manifest.width)
    most_parts = max(1, min(max_rows, MAX_BYTES // row_bytes) // part_rows)
    chosen = np.arange(num_parts)
    if most_parts < num_parts:
        chosen = np.unique(np.linspace(0, num_parts - 1, most_parts).astype(np.int64))
    starts = [int(part) * part_rows for part in chosen]
    return [(start, min(part_rows, manifest.rows - start)) for start in starts]
