"""Rows -> block checksums: sums of keyed row hashes, kept up to date by differences.

    h(n, row) = XXH3 (64 bits) of the row's bytes, seeded with n; 0 for a row of zeros
    block     = Σ h(n, row_n) over its rows                                             mod 2⁶⁴

A commit adds h(new) - h(old) for the rows that changed and never rereads the table. A sparse file's sums are known
without reading its holes. This finds damage (flipped bits, torn or swapped rows); it is no defence against somebody
who forges rows.

Tables of format version 2 have another hash, linear in the row's 8-byte words: a change of the top bits of two words
(the signs of two values) leaves it as it was. They keep it until `sense-engram verify --repair`. docs/format.md has
both; `version` is the table's format version.

`_row_hashes.c` hashes, or, where it wasn't compiled, the package xxhash, one call a row and several times slower.

U row ids, B bytes of a row, N rows.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

MAX_BLOCKS = 1024
MIN_BLOCK_ROWS = 4096
# Rows are hashed in parts of this size, so that a check's memory doesn't follow the table.
PART_BYTES = 1 << 22

HASH_VERSION = 3
"""Of the hash that new tables, journals and deltas have: the format version that brought it."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def block_rows(num_rows: int) -> int:
    """Rows of a block: a power of two, at least 4,096, so that there are at most 1,024 blocks.

    >>> block_rows(1000), block_rows(100_000_000)
    (4096, 131072)
    """
    rows = MIN_BLOCK_ROWS
    while rows * MAX_BLOCKS < num_rows:
        rows *= 2
    return rows


def num_blocks(num_rows: int) -> int:
    return -(-num_rows // block_rows(num_rows))


def splitmix64(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mixing step of SplitMix64 on uint64 counters (Steele, Lea, Flood 2014)."""
    z = (values + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _load_compiled() -> Any:
    try:
        return importlib.import_module("sense_v2.engram.table._row_hashes").hash_rows
    except ImportError:  # no compiler where it was installed
        return None


compiled: Any = _load_compiled()


def row_hashes(
    row_ids_U: np.ndarray[Any, Any], rows_UB: np.ndarray[Any, Any], version: int = HASH_VERSION
) -> np.ndarray[Any, Any]:
    """uint64 [U] of rows given as contiguous bytes, uint8 [U, B]."""
    if version < 3:
        return _word_hashes(row_ids_U, rows_UB)
    ids_U = np.ascontiguousarray(row_ids_U, dtype=np.int64)
    if compiled is not None:
        hashes_U = np.empty(len(ids_U), dtype=np.uint64)
        compiled(ids_U, rows_UB, hashes_U)
        return hashes_U
    import xxhash

    rows = rows_UB.view(f"V{rows_UB.shape[1]}")[:, 0].tolist()
    hashes = map(xxhash.xxh3_64_intdigest, rows, ids_U.view(np.uint64).tolist())
    return np.fromiter(hashes, np.uint64, len(ids_U)) * rows_UB.any(axis=1)


def _word_hashes(row_ids_U: np.ndarray[Any, Any], rows_UB: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Those of format version 2."""
    word_bytes = next(size for size in (8, 4, 2, 1) if rows_UB.shape[1] % size == 0)
    words_UW = rows_UB.view(f"<u{word_bytes}").astype(np.uint64, copy=False)
    keys_W = splitmix64(np.arange(words_UW.shape[1], dtype=np.uint64)) | np.uint64(1)
    sums_U = words_UW @ keys_W
    sums_U ^= sums_U >> np.uint64(32)
    sums_U *= _MIX_1
    sums_U ^= sums_U >> np.uint64(29)
    return sums_U * (splitmix64(row_ids_U.astype(np.uint64)) | np.uint64(1))


def add_to_blocks(
    sums: np.ndarray[Any, Any], row_ids_U: np.ndarray[Any, Any], hashes_U: np.ndarray[Any, Any], num_rows: int
) -> None:
    """In place: adds each row's hash to its block's sum, uint64 [blocks], modulo 2⁶⁴."""
    np.add.at(sums, row_ids_U // block_rows(num_rows), hashes_U)


def add_rows(
    sums: np.ndarray[Any, Any],
    row_ids_U: np.ndarray[Any, Any],
    rows_UB: np.ndarray[Any, Any],
    num_rows: int,
    version: int = HASH_VERSION,
) -> None:
    """In place: adds rows, given as contiguous bytes, to their blocks' sums."""
    add_to_blocks(sums, row_ids_U, row_hashes(row_ids_U, rows_UB, version), num_rows)


def block_sums(table_NB: np.ndarray[Any, Any], version: int = HASH_VERSION) -> np.ndarray[Any, Any]:
    """uint64 [blocks] of a whole file, mapped as uint8 [N, B]; reads all of it once, front to back."""
    num_rows, row_bytes = table_NB.shape
    sums = np.zeros(num_blocks(num_rows), dtype=np.uint64)
    part_rows = max(1, PART_BYTES // row_bytes)
    for start in range(0, num_rows, part_rows):
        part = np.ascontiguousarray(table_NB[start : start + part_rows])
        ids = np.arange(start, start + len(part), dtype=np.int64)
        add_rows(sums, ids, part, num_rows, version)
    return sums


def to_hex(sums: np.ndarray[Any, Any]) -> list[str]:
    """As the manifest has them: 16 hexadecimal digits a block (a JSON number holds 53 bits)."""
    return [f"{value:016x}" for value in sums.tolist()]


def from_hex(texts: list[str]) -> np.ndarray[Any, Any]:
    return np.array([int(text, 16) for text in texts], dtype=np.uint64)
