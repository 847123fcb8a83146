"""Which rows a text looks up most, and getting rows into memory before they are asked for.

    row ids of a corpus ──RowCounts──▶ (row, count), hottest first ──save──▶ hot_rows.npy and its JSON
    hot_rows.npy ──load──▶ row ids ──warm_rows──▶ their pages in the page cache

N-grams follow Zipf's law: a few rows serve much of any text, so a machine that can't hold a table may hold what
matters of it. Counting takes memory for the distinct rows that were met, not for the table.

Warming reads through the file, not the mapping: every process that maps the table finds the pages there. Pages are
asked for in batches ahead of the reads, each once and in the file's order, so that the disk has many reads in flight.

U row ids, R distinct rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading.pages import page_runs
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table.disk import new_file
from sense_v2.engram.table.format import Manifest, provenance_differences
from sense_v2.engram.table.row_scan import next_data
from sense_v2.engram.upkeep.convert import CONVERTED_FROM

FORMAT, FORMAT_VERSION = "sense-engram hot rows", 1
# Ids that are kept before they are sorted into the counts.
PENDING_IDS = 1 << 22
# Runs of pages asked for ahead of the one that is read.
RUNS_AHEAD = 256
READ_BYTES = 1 << 21


class RowCounts:
    """How often each row was looked up.

    >>> counts = RowCounts()
    >>> counts.add(np.array([7, 3, 7])); counts.add(np.array([[3, 7]]))
    >>> [values.tolist() for values in counts.hottest()]
    [[7, 3], [3, 2]]
    """

    def __init__(self) -> None:
        self.lookups = 0
        self._ids_R = np.empty(0, dtype=np.int64)
        self._counts_R = np.empty(0, dtype=np.int64)
        self._pending: list[np.ndarray[Any, Any]] = []
        self._counted: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._num_pending = 0

    def add(self, row_ids: np.ndarray[Any, Any]) -> None:
        """Row ids of any shape."""
        self._pending.append(row_ids.reshape(-1).astype(np.int64))
        self._num_pending += row_ids.size
        self.lookups += row_ids.size
        if self._num_pending >= PENDING_IDS:
            self._sort_in()

    def add_counted(self, row_ids_R: np.ndarray[Any, Any], counts_R: np.ndarray[Any, Any]) -> None:
        """Rows that somebody else has counted: each id, in any order, with the number of its lookups."""
        self._counted.append((row_ids_R.astype(np.int64), counts_R.astype(np.int64)))
        self._num_pending += len(row_ids_R)
        self.lookups += int(counts_R.sum())
        if self._num_pending >= PENDING_IDS:
            self._sort_in()

    def _sort_in(self) -> None:
        if self._pending:
            self._counted.append(np.unique(np.concatenate(self._pending), return_counts=True))
        if not self._counted:
            return
        parts = [(self._ids_R, self._counts_R), *self._counted]
        ids, inverse = np.unique(np.concatenate([ids for ids, _ in parts]), return_inverse=True)
        counts = np.zeros(len(ids), dtype=np.int64)
        np.add.at(counts, inverse, np.concatenate([counts for _, counts in parts]))
        self._ids_R, self._counts_R = ids, counts
        self._pending, self._counted, self._num_pending = [], [], 0

    def hottest(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(ids_R, counts_R), int64, the most looked up first, of equals the lower id."""
        self._sort_in()
        order = np.argsort(-self._counts_R, kind="stable")
        return self._ids_R[order], self._counts_R[order]

    def served_by(self, hot_ids: np.ndarray[Any, Any]) -> float:
        """The share of these lookups whose row is among `hot_ids`; nan where there was none."""
        self._sort_in()
        if not self.lookups:
            return float("nan")
        return int(self._counts_R[np.isin(self._ids_R, hot_ids)].sum()) / self.lookups


@dataclass
class HotRows:
    """The hottest rows of a table over a corpus."""

    row_ids: np.ndarray[Any, Any]
    """int64, the most looked up first."""
    counts: np.ndarray[Any, Any]
    rows: int
    """Of the table."""
    provenance: dict[str, Any]
    """The table's: what its row ids mean. Tables of other dtypes converted from it have the same."""
    corpus: str
    lookups: int
    rows_met: int
    """Distinct rows that were looked up, of which these are the hottest."""


def identity(manifest: Manifest) -> dict[str, Any]:
    """What of a table's provenance decides which row an id means."""
    return {name: value for name, value in manifest.provenance.items() if name != CONVERTED_FROM}


def description_path(path: Path) -> Path:
    return path.with_suffix(".json")


def save(hot: HotRows, path: Path) -> None:
    """Writes int64 [R, 2], (row id, count), to `path` (.npy) and the rest to the JSON beside it, which comes last."""
    if path.suffix != ".npy":
        raise with_way_out(ValueError(f"{path}: hot rows are a .npy file"), "choose such a name")
    raw = io.BytesIO()
    np.save(raw, np.stack([hot.row_ids, hot.counts], axis=1), allow_pickle=False)
    values = {name: value for name, value in asdict(hot).items() if name not in ("row_ids", "counts")}
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **values,
        "sha256": hashlib.sha256(raw.getvalue()).hexdigest(),
    }
    for file, data in (
        (path, raw.getvalue()),
        (description_path(path), (json.dumps(values, indent=2) + "\n").encode()),
    ):
        with new_file(file, replace=True) as fd:
            disk.write_at(fd, data, 0)


def load(path: Path, manifest: Manifest) -> HotRows:
    """What `save` wrote, for the table of that manifest.

    Raises `ValueError` where the files are damaged or of another table, `FileNotFoundError` where one is missing.
    """
    description = description_path(path)
    for file in (path, description):
        if not file.is_file():
            raise with_way_out(FileNotFoundError(f"{file}: no such file"), "`sense-engram profile` writes it")
    raw = path.read_bytes()
    try:
        values = json.loads(description.read_text(encoding="utf-8"))
        kind, version, digest = (values.pop(name, None) for name in ("format", "format_version", "sha256"))
        if (kind, version) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {kind!r}, version {version!r}")
        if hashlib.sha256(raw).hexdigest() != digest:
            raise ValueError(f"{path.name} isn't the file that it describes")
        pairs = np.load(io.BytesIO(raw), allow_pickle=False)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != np.int64:
            raise ValueError(f"{path.name} has shape {pairs.shape} of {pairs.dtype}")
        hot = HotRows(pairs[:, 0], pairs[:, 1], **values)
        differences = provenance_differences(hot.provenance, identity(manifest))
    except Exception as error:  # NumPy's reader lets through whatever a forged header makes Python say
        raise with_way_out(
            ValueError(f"{description} isn't the JSON of hot rows: {error}"), "Make them again"
        ) from None
    if hot.rows != manifest.rows:
        differences.insert(0, ("rows", hot.rows, manifest.rows))
    if differences:
        found = "; ".join(f"{name} is {old!r}, the table's {new!r}" for name, old, new in differences)
        raise with_way_out(ValueError(f"{path} was counted for another table: {found}"), "Profile this one")
    if len(hot.row_ids) and not 0 <= hot.row_ids.min() <= hot.row_ids.max() < manifest.rows:
        raise with_way_out(ValueError(f"{path} names rows that the table of {manifest.rows} hasn't"), "Make it again")
    return hot


# Pages


def runs_of(row_ids: np.ndarray[Any, Any], row_bytes: int, file_bytes: int) -> np.ndarray[Any, Any]:
    """int64 [runs, 2], (first byte, length) of the pages of these rows, as `page_runs`, cut at the file's end."""
    runs = page_runs(row_ids, row_bytes)
    runs[:, 1] = np.minimum(runs[:, 1], file_bytes - runs[:, 0])
    return runs


def warm_rows(
    path: Path,
    row_ids: np.ndarray[Any, Any],
    row_bytes: int,
    *,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> int:
    """Reads the pages of these rows into the page cache; returns how many bytes they are. Raises `OSError`."""
    runs = runs_of(row_ids, row_bytes, path.stat().st_size)
    _read(path, [(at, length) for at, length in runs.tolist()], advance)
    return int(runs[:, 1].sum())


def warm_table(path: Path, *, advance: Callable[[int], Any] = lambda num_bytes: None) -> int:
    """Reads the whole file into the page cache, holes of a sparse one left out; returns the bytes."""
    pieces = list(_data(path))
    _read(path, pieces, advance)
    return sum(length for _, length in pieces)


def _data(path: Path) -> Iterator[tuple[int, int]]:
    """(first byte, length) of pieces that aren't wholly in a hole."""
    size = path.stat().st_size
    fd = platform.open_file(path, platform.READ)
    try:
        at = 0
        while (at := next_data(fd, at)) < size:
            at -= at % READ_BYTES
            yield at, min(READ_BYTES, size - at)
            at += READ_BYTES
    finally:
        os.close(fd)


def _read(path: Path, pieces: Sequence[tuple[int, int]], advance: Callable[[int], Any]) -> None:
    buffer = memoryview(bytearray(READ_BYTES))
    # Large pieces fill the queue by themselves; more ahead of them only takes memory.
    mean_bytes = max(1, sum(length for _, length in pieces) // max(1, len(pieces)))
    ahead = max(2, min(RUNS_AHEAD, 8 * READ_BYTES // mean_bytes))
    fd = platform.open_file(path, platform.READ)
    try:
        for number, (at, length) in enumerate(pieces):
            if number % ahead == 0:
                # The first batch of its own, then always the one behind that which is read.
                for next_at, next_length in pieces[number + (ahead if number else 0) : number + 2 * ahead]:
                    platform.advise(fd, "WILLNEED", next_at, next_length)
            while length > 0:
                found = platform.read_into(fd, buffer[:length], at)
                if found == 0:
                    raise with_way_out(
                        OSError(f"{path}: it was cut while it was read"), "check it with sense-engram verify"
                    )
                at, length = at + found, length - found
                advance(found)
    finally:
        os.close(fd)
