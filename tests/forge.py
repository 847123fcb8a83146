"""Journals as docs/format.md has them, byte by byte with struct and zlib: what a test needs to forge one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tables import slow_row_hash

HEADER_BYTES, RECORD_BYTES = 48, 32


@dataclass(frozen=True)
class Old:
    """A record: old bytes of rows of one file. What is not given follows from the rest."""

    file: str | bytes
    row_ids: Sequence[int]
    rows: Sequence[bytes]
    row_bytes: int | None = None
    num_rows: int | None = None

    @property
    def name(self) -> bytes:
        return self.file.encode() if isinstance(self.file, str) else self.file

    def pack(self, salt: int, version: int = 3) -> bytes:
        hash_sum = sum(
            slow_row_hash(row_id % 2**64, row, version) for row_id, row in zip(self.row_ids, self.rows, strict=True)
        )
        row_bytes = len(self.rows[0]) if self.row_bytes is None else self.row_bytes
        num_rows = len(self.rows) if self.num_rows is None else self.num_rows
        head = struct.pack("<4sHHIIQ", b"rows", len(self.name), 0, row_bytes, num_rows, hash_sum % 2**64)
        ids = b"".join(struct.pack("<q", row_id) for row_id in self.row_ids)
        crc = zlib.crc32(struct.pack("<Q", salt) + head + self.name + ids)
        return head + struct.pack("<II", crc, 0) + self.name + ids + b"".join(self.rows)


def forged_header(generation: int, commit: int, num_rows: int, salt: int = 1, magic: bytes = b"SENSEjr2") -> bytes:
    raw = struct.pack("<8sQQQQ", magic, generation, commit, salt, num_rows)
    return raw + struct.pack("<II", zlib.crc32(raw), 0)


def forged_journal(generation: int, commit: int, num_rows: int, *records: Old, salt: int = 1) -> bytes:
    return forged_header(generation, commit, num_rows, salt) + b"".join(record.pack(salt) for record in records)


# Undoing, as docs/format.md has it


class Refused(Exception):
    """What a reader must refuse; `files` is what it may have put back before it found out."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__("refused")
        self.files = files


def whole_records(journal: bytes) -> tuple[list[Old], int]:
    """The records in front of the first one that isn't whole, and where they end; the header is whole."""
    (salt,) = struct.unpack("<Q", journal[24:32])
    records: list[Old] = []
    at = HEADER_BYTES
    while at + RECORD_BYTES <= len(journal):
        mark, name_bytes, zeros, row_bytes, num_rows, _, _, more_zeros = struct.unpack(
            "<4sHHIIQII", journal[at : at + RECORD_BYTES]
        )
        ids_at = at + RECORD_BYTES + name_bytes
        rows_at = ids_at + 8 * num_rows
        end = rows_at + num_rows * row_bytes
        is_possible = mark == b"rows" and not zeros and not more_zeros and name_bytes and row_bytes and num_rows
        if not is_possible or row_bytes > 2**24 or end > len(journal):
            break
        record = Old(
            journal[at + RECORD_BYTES : ids_at],
            struct.unpack(f"<{num_rows}q", journal[ids_at:rows_at]),
            [journal[one : one + row_bytes] for one in range(rows_at, end, row_bytes)],
        )
        if record.pack(salt) != journal[at:end]:
            break
        try:
            record.name.decode()
        except UnicodeDecodeError:
            break
        records.append(record)
        at = end
    return records, at


def undone(
    journal: bytes,
    generation: int,
    commit: int,
    num_rows: int,
    files: dict[str, bytes],
    is_committed: Callable[[dict[str, bytes]], bool],
) -> dict[str, bytes]:
    """What becomes of the files; `is_committed` says whether they have the manifest's checksums. Raises `Refused`."""
    if not journal:
        return files
    is_whole = len(journal) >= HEADER_BYTES and _is_header(journal[:HEADER_BYTES])
    header = struct.unpack("<8x4Q8x", journal[:HEADER_BYTES]) if is_whole else (0, 0, 0, 0)
    header_generation, header_commit, _, header_rows = header
    if not is_whole or (header_generation < generation and header_commit != commit):
        if not is_committed(files):
            raise Refused(files)
        return files
    if (header_generation, header_commit) != (generation, commit):
        raise Refused(files)
    records, end = whole_records(journal)
    restored = {name: bytearray(raw) for name, raw in files.items()}
    seen: set[tuple[str, int]] = set()
    for record in records:
        name, row_bytes = record.name.decode(), len(record.rows[0])
        if header_rows != num_rows or name not in files or row_bytes * num_rows != len(files[name]):
            raise Refused(files)
        for row_id, row in zip(record.row_ids, record.rows, strict=True):
            if not 0 <= row_id < num_rows or (name, row_id) in seen:
                raise Refused(files)
            seen.add((name, row_id))
            restored[name][row_id * row_bytes : (row_id + 1) * row_bytes] = row
    after = {name: bytes(raw) for name, raw in restored.items()}
    if end != len(journal) and not is_committed(after):
        raise Refused(after)
    return after


def _is_header(raw: bytes) -> bool:
    return raw[:8] == b"SENSEjr2" and struct.unpack("<II", raw[40:]) == (zlib.crc32(raw[:40]), 0)
