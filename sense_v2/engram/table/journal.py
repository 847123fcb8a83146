"""The rollback journal: old bytes of changed rows, to undo what was not committed.

    table.journal = header | record | record | …      docs/format.md, "The journal", has every byte

The header names the commit that the journal goes back to; the journal is live only while that is the manifest's. A
record holds the old bytes of some rows of one file. A record that was being written when the process died fails its
checksums and ends the journal: nothing had been stored to its rows yet.

`Journal` appends; `read_journal` checks and reads; `roll_back` puts the old bytes back. Undoing can itself be cut off
at any moment and done again.

U rows of a record, B bytes of a row, N rows of the table.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table.checksums import HASH_VERSION, PART_BYTES, block_rows, block_sums, row_hashes, to_hex
from sense_v2.engram.table.format import MAX_ROW_BYTES, Committed
from sense_v2.engram.table.named_files import NamedFiles

MAGICS = {b"SENSEjr1": 2, b"SENSEjr2": HASH_VERSION}
"""What a journal begins with -> the format version of its hashes."""
RECORD_MAGIC = b"rows"
_HEADER = struct.Struct("<8sQQQQ")
_RECORD = struct.Struct("<4sHHIIQ")
_CRC = struct.Struct("<II")
_GO_BACK = "Go back to a copy of the table, or, to keep the rows as they are now, remove the journal"
HEADER_BYTES = _HEADER.size + _CRC.size
RECORD_HEADER_BYTES = _RECORD.size + _CRC.size


@dataclass(frozen=True)
class JournalHeader:
    """What a journal goes back to."""

    generation: int
    commit: int
    """The manifest's `commit` as a number; 0 for a table that has none."""
    salt: int
    num_rows: int
    version: int = HASH_VERSION
    """Of the records' hashes."""

    def pack(self) -> bytes:
        magic = next(magic for magic, version in MAGICS.items() if version == self.version)
        raw = _HEADER.pack(magic, self.generation, self.commit, self.salt, self.num_rows)
        return raw + _CRC.pack(zlib.crc32(raw), 0)


@dataclass(frozen=True)
class Record:
    """Old bytes of rows of one file."""

    file: str
    row_ids_U: np.ndarray[Any, Any]
    """int64."""
    rows_UB: np.ndarray[Any, Any]
    """uint8."""
    end: int = 0
    """Where it ends in the journal that it was read from."""


@dataclass(frozen=True)
class LiveJournal:
    """What a journal that has to be undone holds."""

    num_rows_of: dict[str, int]
    """Rows to put back, by file."""
    torn_bytes: int
    """Bytes after the last whole record: one that was being written when the writer ended, or damage."""


class JournalBytes:
    """The bytes of an open journal, read when they are asked for: it may be larger than memory, and a mapping of a
    file that somebody else empties kills who reads it (SIGBUS)."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path
        self._size = os.fstat(fd).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        at, stop, _ = part.indices(self._size)
        with disk.naming(self.path):
            found = platform.read_at(self.fd, stop - at, at)
        if len(found) < stop - at:
            raise with_way_out(
                OSError(errno.EIO, f"{self.path} was cut while it was read: a writer is at the table"), "Try again"
            )
        return found


def pack_record(salt: int, record: Record, hash_sum: int) -> list[bytes | memoryview]:
    """The record's bytes in parts, of which the rows aren't copied. `hash_sum` is that of its rows' hashes."""
    name = record.file.encode()
    ids = record.row_ids_U.astype("<i8").tobytes()
    num_rows, row_bytes = record.rows_UB.shape
    raw = _RECORD.pack(RECORD_MAGIC, len(name), 0, row_bytes, num_rows, hash_sum)
    head = raw + _CRC.pack(_record_crc(salt, raw, name, ids), 0)
    return [head, name, ids, record.rows_UB.data.cast("B")]


def _record_crc(salt: int, raw: bytes, name: bytes, ids: bytes) -> int:
    return zlib.crc32(ids, zlib.crc32(salt.to_bytes(8, "little") + raw + name))


def read_journal(data: bytes | JournalBytes) -> tuple[JournalHeader, Iterator[Record]] | None:
    """The header and the whole records of a journal's bytes; None where not even the header is whole. A large record
    comes in parts, each a record of some of its rows.

    Whether names, ids and lengths fit a table is for the caller to check.
    """
    if len(data) < HEADER_BYTES:
        return None
    raw = data[: _HEADER.size]
    magic, generation, commit, salt, num_rows = _HEADER.unpack(raw)
    if magic not in MAGICS or _CRC.unpack(data[_HEADER.size : HEADER_BYTES]) != (zlib.crc32(raw), 0):
        return None
    header = JournalHeader(generation, commit, salt, num_rows, MAGICS[magic])
    return header, _records(data, header)


def _records(data: bytes | JournalBytes, header: JournalHeader) -> Iterator[Record]:
    at = HEADER_BYTES
    while at + RECORD_HEADER_BYTES <= len(data):
        raw = data[at : at + _RECORD.size]
        crc, zeros = _CRC.unpack(data[at + _RECORD.size : at + RECORD_HEADER_BYTES])
        magic, name_bytes, reserved, row_bytes, num_rows, hash_sum = _RECORD.unpack(raw)
        names_at = at + RECORD_HEADER_BYTES
        ids_at = names_at + name_bytes
        rows_at = ids_at + 8 * num_rows
        end = rows_at + num_rows * row_bytes
        if magic != RECORD_MAGIC or reserved or zeros or not (name_bytes and row_bytes and num_rows):
            return
        # Lengths are believed as far as the file goes, so that a damaged one asks for no memory.
        if end > len(data) or row_bytes > MAX_ROW_BYTES:
            return
        name = data[names_at:ids_at]
        # The file may have holes: what is in memory at once doesn't follow its length.
        step = max(1, PART_BYTES // max(row_bytes, 8))
        found_crc, found_sum = _record_crc(header.salt, raw, name, b""), 0
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            ids = data[ids_at + 8 * first : ids_at + 8 * (first + count)]
            row_ids_U, rows_UB = _part(ids, data, rows_at + first * row_bytes, row_bytes)
            found_crc = zlib.crc32(ids, found_crc)
            found_sum += int(row_hashes(row_ids_U, rows_UB, header.version).sum())
        if found_crc != crc or found_sum % 2**64 != hash_sum:
            return
        try:
            file = name.decode()
        except UnicodeDecodeError:
            return
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            ids = data[ids_at + 8 * first : ids_at + 8 * (first + count)]
            yield Record(file, *_part(ids, data, rows_at + first * row_bytes, row_bytes), end)
        at = end


def _part(
    ids: bytes, data: bytes | JournalBytes, at: int, row_bytes: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    row_ids_U = np.frombuffer(ids, dtype="<i8")
    raw = data[at : at + len(row_ids_U) * row_bytes]
    return row_ids_U, np.frombuffer(raw, dtype=np.uint8).reshape(-1, row_bytes)


class Journal:
    """Appends to the journal at `path`, which comes to be with the first record after a commit.

    `limit_bytes` is what it may grow to between two commits. Raises `OSError` where a record can't be written, which
    leaves the journal as it was before it.
    """

    def __init__(self, path: Path, num_rows: int, limit_bytes: int, beside: NamedFiles | None = None) -> None:
        self.path, self.num_rows, self.limit_bytes, self._beside = path, num_rows, limit_bytes, beside
        self._fd: int | None = None
        self._end = 0
        self._generation, self._commit, self._version, self._salt = 0, 0, HASH_VERSION, 0
        self._folder_synced = False
        self.unsynced = False
        """Whether something was appended since the last sync."""

    def begin(self, generation: int, commit: int, version: int = HASH_VERSION) -> None:
        """What the next records go back to, and the version of their hashes. The journal must be empty, or belong to
        an earlier commit."""
        self._generation, self._commit, self._version = generation, commit, version
        self.empty()

    def empty(self) -> None:
        """There is nothing to undo."""
        self._end, self.unsynced = 0, False
        # What stays where this fails belongs to an earlier commit, and its salt is another one.
        with contextlib.suppress(OSError):
            if self._fd is not None:
                disk.os.ftruncate(self._fd, 0)

    def append(self, record: Record, hash_sum: int) -> None:
        """Adds a record; not durable before `sync`."""
        head: list[bytes | memoryview] = []
        if self._end == 0:
            self._salt = secrets.randbits(64)
            to = JournalHeader(self._generation, self._commit, self._salt, self.num_rows, self._version)
            head = [to.pack()]
        parts = head + pack_record(self._salt, record, hash_sum)
        size = sum(len(part) for part in parts)
        if self._end + size > self.limit_bytes:
            raise with_way_out(
                OSError(
                    errno.EFBIG,
                    f"{self.path} would grow past its limit of {self.limit_bytes} bytes: too many rows changed "
                    "since the last commit",
                ),
                "Call commit() more often, or open the table with a larger journal_limit_bytes",
            )
        if self._fd is not None and self._end == 0 and not self._is_at_its_path():
            self._let_go()  # it was removed: what isn't found undoes nothing
        if self._fd is None:
            self._fd = disk.open_own(self.path) if self._beside is None else self._beside.open_beside(self.path)
            self._folder_synced = False
        try:
            end = self._end
            for part in parts:
                disk.write_at(self._fd, part, end)
                end += len(part)
        except OSError as error:
            raise with_way_out(
                OSError(
                    error.errno,
                    f"can't write {size} bytes to {self.path}: {error.strerror}. Nothing was stored to these rows; "
                    "the last commit is intact",
                ),
                "Make room, and commit() more often",
            ) from error
        self._end, self.unsynced = end, True

    def sync(self) -> None:
        """Makes all records durable, and the first time the file's name too."""
        if self.unsynced and self._fd is not None:
            disk.sync_fd(self._fd, self.path)
            if not self._folder_synced:
                disk.sync(self.path.parent)
                self._folder_synced = True
            self.unsynced = False

    def close(self) -> None:
        """Removes the file where nothing is in it."""
        if self._fd is not None:
            is_empty = self._end == 0 and self._is_at_its_path()
            self._let_go()
            if is_empty:
                with contextlib.suppress(OSError):
                    disk.os.unlink(self.path)

    def _is_at_its_path(self) -> bool:
        """False where another table's may be there by now."""
        assert self._fd is not None
        found = os.fstat(self._fd)
        return disk.identity(self.path) == (found.st_dev, found.st_ino)

    def _let_go(self) -> None:
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None


def roll_back(path: Path, at: Committed, others: Sequence[Path] = ()) -> int | None:
    """Undoes what was stored after a commit and empties the journal.

    All journals are checked before anything is changed, and all rows are put back before the first one is emptied.
    The commit's checksums, where they are known, tell whether a journal that doesn't end with a whole record was cut
    by the end of its writer, or is damaged, and whether one of an earlier commit was left by the commit after it.

    Args:
        path: The journal.
        at: The commit to go back to.
        others: The journals of further processes that stored to the same files.

    Returns:
        How many rows were put back; None where there was no live journal.

    Raises:
        ValueError: For a journal that doesn't fit the files, before anything is changed; and for a damaged one, or
            one whose manifest isn't that of the rows, which then stays.
    """
    journals: list[tuple[Path, int, JournalBytes]] = []
    try:
        for one in (path, *others):
            journal = _open_journal(one, write=True)
            if journal is not None:
                journals.append((one, *journal))
        found = [check_journal(one, data, at) for one, _, data in journals]
        for (_, _, data), live in zip(journals, found, strict=True):
            if live is not None:
                _put_back(data, at, {file: path.with_name(file) for file in live.num_rows_of})
        for (one, _, _), live in zip(journals, found, strict=True):
            if live is None:
                refuse_rows_of_another_commit(one, at)
            elif live.torn_bytes:
                _refuse_other_rows(one, "is damaged: what is whole of it was put back", at)
        for one, fd, _ in journals:
            with disk.naming(one):
                disk.os.ftruncate(fd, 0)
            disk.sync_fd(fd, one)
        restored = [sum(live.num_rows_of.values()) for live in found if live is not None]
        return sum(restored) if restored else None
    finally:
        for _, fd, _ in journals:
            os.close(fd)


def undo_in_copies(path: Path, at: Committed, copies: Mapping[str, Path]) -> bool:
    """Puts the old bytes of the journal at `path` into copies that were made before of some of its files, by name.
    The journal and those files stay as they are: a writer may be at them, who keeps old bytes before it stores.
    Returns whether there was something to undo. Raises as `roll_back`, and `OSError` where the journal was cut
    meanwhile."""
    opened = _open_journal(path, write=False)
    if opened is None:
        return False
    fd, data = opened
    try:
        live = check_journal(path, data, at)
        if live is not None:
            _put_back(data, at, copies)
        return live is not None
    finally:
        os.close(fd)


def _put_back(data: JournalBytes, at: Committed, places: Mapping[str, Path]) -> None:
    """The old bytes of a live journal's rows, into those of its files that have a place."""
    tables = {file: _Rows(place, at.num_rows, at.row_bytes_of[file]) for file, place in places.items()}
    journal_read = read_journal(data)
    for record in journal_read[1] if journal_read else ():
        if record.file in tables:
            tables[record.file].put_back(record)
    for table in tables.values():
        table.sync()


def refuse_rows_of_another_commit(path: Path, at: Committed) -> None:
    """For a journal of an earlier commit than the manifest's. A commit that was cut off behind its rename leaves one,
    and then all rows are the manifest's; so it looks, too, where the manifest is of another moment than the rows.
    Reads all rows; raises `ValueError` where they aren't the manifest's, as far as its checksums are known."""
    what = "is of an earlier commit than the manifest, which a commit that was cut off leaves"
    _refuse_other_rows(path, what, at)


def _refuse_other_rows(path: Path, what: str, at: Committed) -> None:
    for file, expected in at.checksums_of.items():
        if path.with_name(file).exists():
            table = _Rows(path.with_name(file), at.num_rows, at.row_bytes_of[file], mode="r")
            found = to_hex(block_sums(table.table_NB, at.version))
            bad = [block for block, (old, new) in enumerate(zip(expected, found, strict=True)) if old != new]
            if bad:
                first = bad[0] * block_rows(at.num_rows)
                last = min(first + block_rows(at.num_rows), at.num_rows) - 1
                raise with_way_out(
                    ValueError(
                        f"{path} {what}, but {len(bad)} of {len(found)} blocks of {path.with_name(file)} (the "
                        f"first: rows {first} to {last}) don't have the checksum of the manifest's commit"
                    ),
                    "Put table, states and manifest back from a copy, or, to keep the rows as they are now, "
                    "remove the journal",
                )


def _open_journal(path: Path, *, write: bool) -> tuple[int, JournalBytes] | None:
    """(descriptor, bytes) of the journal; None where there is none, or an empty one."""
    try:
        fd = disk.open_own(path, create=False, write=write)
    except FileNotFoundError:
        return None
    data = JournalBytes(fd, path)
    if len(data) == 0:
        os.close(fd)
        return None
    return fd, data


def has_journal(path: Path) -> bool:
    """True if there is a journal that isn't empty. Raises `OSError` for a file that may not be written to."""
    opened = _open_journal(path, write=True)
    if opened is not None:
        os.close(opened[0])
    return opened is not None


def look_at_journal(path: Path, at: Committed) -> tuple[bool, LiveJournal | None]:
    """(True if there is a journal that isn't empty, what of it is live). Raises as `check_journal`."""
    opened = _open_journal(path, write=False)
    if opened is None:
        return False, None
    fd, data = opened
    try:
        return True, check_journal(path, data, at)
    finally:
        os.close(fd)


def check_journal(path: Path, data: bytes | JournalBytes, at: Committed) -> LiveJournal | None:
    """What is in a live journal; None for one that isn't live.

    Raises `ValueError` for one of another history, or whose records don't fit the files.
    """
    journal = read_journal(data)
    if journal is None:
        # Whoever died while writing the header has stored nothing yet; but it may be damage.
        return LiveJournal({}, len(data)) if len(data) else None
    header, records = journal
    if header.generation < at.generation and header.commit != at.commit:
        return None
    if (header.generation, header.commit) != (at.generation, at.commit):
        raise with_way_out(
            ValueError(
                f"{path} goes back to generation {header.generation}, commit {header.commit:016x}, but the manifest "
                f"is of generation {at.generation}, commit {at.commit:016x}: they are of different histories of the "
                "table"
            ),
            "Put back the manifest that belongs to it, or, to keep the rows as they are now, remove the journal",
        )
    num_rows_of: dict[str, int] = {}
    seen: dict[str, np.ndarray[Any, Any]] = {}
    end = HEADER_BYTES
    for record in records:
        expected = at.row_bytes_of.get(record.file)
        found = record.rows_UB.shape[1]
        if header.num_rows != at.num_rows or found != expected:
            says = f"{at.num_rows} rows of {expected} bytes" if expected else "nothing of such a file"
            raise with_way_out(
                ValueError(
                    f"{path} has {header.num_rows} rows of {found} bytes for the file {record.file!r}; the manifest "
                    f"says {says}. The journal isn't this table's, or is damaged; nothing was changed"
                ),
                _GO_BACK,
            )
        low, high = int(record.row_ids_U.min()), int(record.row_ids_U.max())
        if low < 0 or high >= at.num_rows:
            outside = low if low < 0 else high
            raise _damaged(f"{path} has row id {outside} for {record.file!r}, which has rows 0 to {at.num_rows - 1}")
        # One bit a row; the memory of those that aren't touched is never there.
        if not _mark_new(seen.setdefault(record.file, np.zeros(-(-at.num_rows // 8), np.uint8)), record.row_ids_U):
            raise _damaged(
                f"{path} has a row of {record.file!r} more than once, so which bytes are the old ones isn't known"
            )
        num_rows_of[record.file] = num_rows_of.get(record.file, 0) + len(record.row_ids_U)
        end = record.end
    return LiveJournal(num_rows_of, len(data) - end)


def _damaged(what: str) -> ValueError:
    return with_way_out(ValueError(f"{what}. The journal is damaged; nothing was changed"), _GO_BACK)


def _mark_new(bits: np.ndarray[Any, Any], row_ids_U: np.ndarray[Any, Any]) -> bool:
    """Sets a bit for each row; False where one was set already, or is asked for twice."""
    places, masks = row_ids_U >> 3, np.uint8(1) << (row_ids_U & 7).astype(np.uint8)
    is_new = not (bits[places] & masks).any() and len(np.unique(row_ids_U)) == len(row_ids_U)
    np.bitwise_or.at(bits, places, masks)
    return is_new


class _Rows:
    """A file's rows as bytes, mapped."""

    def __init__(self, path: Path, num_rows: int, row_bytes: int, mode: Literal["r", "r+"] = "r+") -> None:
        self.path = path
        found_bytes = path.stat().st_size
        if found_bytes != num_rows * row_bytes:
            raise ValueError(f"{path}: expected {num_rows * row_bytes} bytes, found {found_bytes}")
        self._mapping = np.memmap(path, dtype=np.uint8, mode=mode, shape=(num_rows, row_bytes))
        self.table_NB = np.asarray(self._mapping)

    def put_back(self, record: Record) -> None:
        ids = torch.from_numpy(record.row_ids_U.astype(np.int64))
        disk.store(torch.from_numpy(self.table_NB), ids, torch.from_numpy(record.rows_UB.copy()))

    def sync(self) -> None:
        disk.sync_mapping(self._mapping, self.path)
