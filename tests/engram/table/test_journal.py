"""journal.py against docs/format.md: golden bytes, a writer of its own for bad journals, damage at every bit."""

import dataclasses
import errno
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import slow_row_hash, slow_sums

from sense_v2.engram.table import disk, journal
from sense_v2.engram.table.format import Committed
from sense_v2.engram.table.journal import (
    Journal,
    JournalBytes,
    JournalHeader,
    Record,
    check_journal,
    pack_record,
    read_journal,
    roll_back,
)

GENERATION, COMMIT, SALT, ROWS = 3, 0x0123456789ABCDEF, 0x1122334455667788, 10
TABLE, STATE = "t.dat", "t.adam.dat"
ROW_BYTES = {TABLE: 8, STATE: 6}
AT = Committed(GENERATION, COMMIT, ROWS, ROW_BYTES)

GOLDEN_HEADER = bytes.fromhex(
    "53454e53456a7232"  # SENSEjr2
    "0300000000000000"
    "efcdab8967452301"
    "8877665544332211"
    "0a00000000000000"
    "d833a790"  # CRC-32
    "00000000"
)
GOLDEN_RECORD = bytes.fromhex(
    "726f7773"  # rows
    "0500"
    "0000"
    "08000000"
    "02000000"
    "64485c4e09625462"  # sum of hashes
    "45c861d3"  # CRC-32
    "00000000"
    "742e646174"  # t.dat
    "0700000000000000"
    "0100000000000000"
    "0001020304050607"
    "1011121314151617"
)


# The format once more, as the specification has it.


def header(generation: int = GENERATION, commit: int = COMMIT, salt: int = SALT, num_rows: int = ROWS) -> bytes:
    raw = b"SENSEjr2" + struct.pack("<4Q", generation, commit, salt, num_rows)
    return raw + struct.pack("<II", zlib.crc32(raw), 0)


def record(file: str, rows: dict[int, bytes], salt: int = SALT) -> bytes:
    name = file.encode()
    ids = b"".join(struct.pack("<q", row_id) for row_id in rows)
    hash_sum = sum(slow_row_hash(row_id % 2**64, row) for row_id, row in rows.items()) % 2**64
    row_bytes = len(next(iter(rows.values())))
    raw = b"rows" + struct.pack("<HHIIQ", len(name), 0, row_bytes, len(rows), hash_sum)
    crc = zlib.crc32(struct.pack("<Q", salt) + raw + name + ids)
    return raw + struct.pack("<II", crc, 0) + name + ids + b"".join(rows.values())


def rows_of(file: str, ids: list[int], seed: int = 1) -> dict[int, bytes]:
    drawn = np.random.default_rng(seed)
    return {row_id: drawn.bytes(ROW_BYTES[file]) for row_id in ids}


PARTS = [(TABLE, rows_of(TABLE, [7, 1])), (STATE, rows_of(STATE, [0, 9, 4])), (TABLE, rows_of(TABLE, [0], 2))]
WHOLE = header() + b"".join(record(*part) for part in PARTS)
# Where each record begins, and where the last one ends.
STARTS = [48]
for _part in PARTS:
    STARTS.append(STARTS[-1] + len(record(*_part)))


def as_array(rows: dict[int, bytes]) -> Record:
    raw = np.frombuffer(b"".join(rows.values()), dtype=np.uint8).reshape(len(rows), -1)
    return Record(TABLE if raw.shape[1] == 8 else STATE, np.array(list(rows)), raw)


def found(data: bytes | JournalBytes) -> list[tuple[str, dict[int, bytes]]] | None:
    read = read_journal(data)
    if read is None:
        return None
    return [
        (one.file, dict(zip(one.row_ids_U.tolist(), (row.tobytes() for row in one.rows_UB), strict=True)))
        for one in read[1]
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table and a state, of bytes that no record has."""
    (tmp_path / TABLE).write_bytes(bytes(range(100, 180)))
    (tmp_path / STATE).write_bytes(bytes(range(180, 240)))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def undo(folder: Path, **changes: Any) -> int | None:
    return roll_back(folder / "t.journal", dataclasses.replace(AT, **changes))


# Bytes


def test_the_golden_bytes_of_a_header() -> None:
    assert JournalHeader(GENERATION, COMMIT, SALT, ROWS).pack() == GOLDEN_HEADER == header()


def test_the_golden_bytes_of_a_record() -> None:
    rows = {7: bytes(range(8)), 1: bytes(range(16, 24))}
    hash_sum = sum(slow_row_hash(row_id, row) for row_id, row in rows.items()) % 2**64
    packed = b"".join(pack_record(SALT, as_array(rows), hash_sum))
    assert packed == GOLDEN_RECORD == record(TABLE, rows)


def test_what_is_appended_is_a_header_and_records(tmp_path: Path) -> None:
    path = tmp_path / "t.journal"
    written = Journal(path, ROWS, 10**6)
    written.begin(GENERATION, COMMIT)
    assert not path.exists(), "it comes to be with the first record"
    salts = set()
    for _ in range(2):
        for _, rows in PARTS:
            hash_sum = sum(slow_row_hash(row_id, row) for row_id, row in rows.items()) % 2**64
            written.append(as_array(rows), hash_sum)
        salt = struct.unpack_from("<Q", path.read_bytes(), 24)[0]
        assert path.read_bytes() == header(salt=salt) + b"".join(record(*part, salt) for part in PARTS)
        assert found(path.read_bytes()) == PARTS
        salts.add(salt)
        written.begin(GENERATION, COMMIT)
        assert path.read_bytes() == b""
    assert len(salts) == 2, "an old record must not fit a new journal"
    written.close()
    assert not path.exists()


# Reading


@pytest.fixture
def read_back(tmp_path: Path) -> Iterator[Any]:
    """Bytes as they are read from a file."""
    descriptors = []

    def read(data: bytes) -> JournalBytes:
        (tmp_path / "read").write_bytes(data)
        descriptors.append(os.open(tmp_path / "read", os.O_RDONLY))
        return JournalBytes(descriptors[-1], tmp_path / "read")

    yield read
    for fd in descriptors:
        os.close(fd)


@pytest.mark.parametrize("part_bytes", [1, 16, 1 << 22])
def test_a_large_record_is_read_in_parts(read_back: Any, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    monkeypatch.setattr(journal, "PART_BYTES", part_bytes)
    for data in (WHOLE, read_back(WHOLE)):
        parts = found(data) or []
        assert [(file, row) for file, rows in parts for row in rows.items()] == [
            (file, row) for file, rows in PARTS for row in rows.items()
        ]
        largest = max(1, part_bytes // 8)
        assert max(len(rows) for _, rows in parts) == min(largest, 3)
    cut = WHOLE[:-1]
    assert sum(len(rows) for _, rows in found(cut) or []) == 5, "a record that isn't whole gives no part"


def test_every_cut_leaves_the_records_before_it(read_back: Any) -> None:
    for length in range(len(WHOLE) + 1):
        whole = sum(end <= length for end in STARTS[1:])
        expected = None if length < 48 else PARTS[:whole]
        assert found(WHOLE[:length]) == expected
        assert found(read_back(WHOLE[:length])) == expected


def test_every_changed_bit_ends_the_journal_at_its_record() -> None:
    for bit in range(8 * len(WHOLE)):
        changed = bytearray(WHOLE)
        changed[bit // 8] ^= 1 << bit % 8
        whole = sum(end <= bit // 8 for end in STARTS[1:])
        assert found(bytes(changed)) == (None if bit < 8 * 48 else PARTS[:whole]), f"bit {bit}"


def test_zeros_and_an_older_journals_records_behind_the_last_one_are_no_records() -> None:
    for behind in (bytes(1), bytes(5000), record(*PARTS[0], salt=SALT + 1), WHOLE, b"rows" + b"\xff" * 5000):
        assert found(WHOLE + behind) == PARTS


@pytest.mark.parametrize("count", [0, 2**32 - 1])
def test_a_record_of_no_rows_or_of_more_than_there_are(count: int) -> None:
    """A length asks for no memory before it is known to be true."""
    raw = b"rows" + struct.pack("<HHIIQ", 5, 0, 8, count, 0)
    crc = zlib.crc32(struct.pack("<Q", SALT) + raw + b"t.dat")
    assert found(header() + raw + struct.pack("<II", crc, 0) + b"t.dat") == []


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "read").write_bytes(WHOLE)
    with open(tmp_path / "read", "r+b") as file:
        data = JournalBytes(file.fileno(), tmp_path / "read")
        read = read_journal(data)
        assert read is not None
        file.truncate(0)
        with pytest.raises(OSError, match="read was cut while it was read: a writer is at the table"):
            list(read[1])


# Undoing


def undone(before: dict[str, bytes]) -> dict[str, bytes]:
    files = {name: bytearray(data) for name, data in before.items() if name != "t.journal"}
    for file, rows in PARTS:
        for row_id, row in rows.items():
            files[file][row_id * len(row) : (row_id + 1) * len(row)] = row
    return {name: bytes(data) for name, data in files.items()}


def test_old_bytes_go_back_where_they_were(folder: Path) -> None:
    before = contents(folder)
    assert undo(folder) is None, "there is no journal"
    (folder / "t.journal").write_bytes(WHOLE)
    assert undo(folder) == 6
    assert contents(folder) == {**undone(before), "t.journal": b""}
    assert undo(folder) is None
    assert contents(folder) == {**undone(before), "t.journal": b""}


@pytest.mark.parametrize("last_call", range(12))
def test_undoing_that_is_cut_off_can_be_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, last_call: int
) -> None:
    """After any number of its stores, syncs and truncations."""
    before = contents(folder)
    (folder / "t.journal").write_bytes(WHOLE)
    left = [last_call]

    class CutOffError(Exception):
        pass

    def counted(call: Any) -> Any:
        def do(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise CutOffError
            return call(*arguments)

        return do

    with monkeypatch.context() as patch:
        patch.setattr(disk, "store", counted(disk.store))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "ftruncate", counted(os.ftruncate))
        try:
            undo(folder)
        except CutOffError:
            is_cut = True
        else:
            is_cut = False
    # Three stores, a sync of each file, the truncation, its sync.
    assert is_cut == (last_call < 7)
    emptied = last_call >= 6
    assert (folder / "t.journal").read_bytes() == (b"" if emptied else WHOLE)
    assert undo(folder) == (None if emptied else 6)
    assert contents(folder) == {**undone(before), "t.journal": b""}


@pytest.mark.parametrize(
    "data",
    [b"", WHOLE[:5], WHOLE[:47], WHOLE[:48], WHOLE[: STARTS[1] - 1], header(generation=2, commit=7) + WHOLE[48:]],
)
def test_what_there_is_nothing_to_undo_in(folder: Path, data: bytes) -> None:
    """An empty journal, one cut in its header or first record, one of an earlier commit."""
    before = contents(folder)
    (folder / "t.journal").write_bytes(data)
    assert not undo(folder)
    assert contents(folder) == {**before, "t.journal": b""}


def test_a_cut_journal_is_undone_as_far_as_it_is_whole(folder: Path) -> None:
    before = contents(folder)
    (folder / "t.journal").write_bytes(WHOLE[: STARTS[2] + 3])
    assert undo(folder) == 5
    after = contents(folder)
    expected = undone(before)
    assert after[STATE] == expected[STATE]
    assert (after[TABLE][8:], after[TABLE][:8]) == (expected[TABLE][8:], before[TABLE][:8])


def refusals() -> list[Any]:
    good, more = record(TABLE, rows_of(TABLE, [2])), "; nothing was changed"
    other = "they are of different histories of the table. Put back the manifest that belongs to it, or, to keep the"
    now = f"but the manifest is of generation 3, commit 0123456789abcdef: {other} rows as they are now, remove"
    return [
        (header(generation=4), good, f"goes back to generation 4, commit 0123456789abcdef, {now}"),
        (header(commit=5), good, f"goes back to generation 3, commit 0000000000000005, {now}"),
        (header(generation=2), good, f"goes back to generation 2, commit 0123456789abcdef, {now}"),
        (header(num_rows=11), good, "has 11 rows of 8 bytes for the file 't.dat'; the manifest says 10 rows of 8"),
        (header(), record("x.dat", {1: b"12345678"}), "'x.dat'; the manifest says nothing of such a file"),
        (header(), record("../t.dat", {1: b"12345678"}), "'../t.dat'; the manifest says nothing of such a file"),
        (header(), record(TABLE, {1: b"1234"}), f"10 rows of 4 bytes for the file 't.dat'; .*{more}"),
        (header(), record(TABLE, {3: b"12345678", 10: b"12345678"}), f"row id 10 .* rows 0 to 9.*{more}"),
        (header(), record(STATE, {-1: b"123456"}), f"row id -1 for 't.adam.dat', .*{more}"),
        (header(), record(TABLE, {2**63 - 1: b"12345678"}), f"row id {2**63 - 1} .*{more}"),
    ]


@pytest.mark.parametrize(("head", "bad", "error"), refusals())
def test_a_journal_that_does_not_fit_is_refused_and_nothing_is_changed(
    folder: Path, head: bytes, bad: bytes, error: str
) -> None:
    """The records before the one that doesn't fit aren't undone either."""
    (folder / "t.journal").write_bytes(head + record(TABLE, rows_of(TABLE, [5])) + bad)
    before = contents(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}/t\\.journal .*{error}"):
            undo(folder)
        assert contents(folder) == before


def test_a_file_of_another_length_is_refused(folder: Path) -> None:
    (folder / "t.journal").write_bytes(WHOLE)
    os.truncate(folder / STATE, 59)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"t\.adam\.dat: expected 60 bytes, found 59"):
        undo(folder)
    assert contents(folder) == before


def test_damage_is_told_from_a_cut_by_the_checksums_of_the_last_commit(folder: Path) -> None:
    """A record in the middle that can't be read hides those behind it: their rows stay as they are."""
    files = undone(contents(folder))
    sums = {}
    for name, data in files.items():
        (folder.parent / name).write_bytes(data)
        sums[name] = slow_sums(folder.parent / name, ROWS)
    damaged = bytearray(WHOLE)
    damaged[STARTS[1] + 60] ^= 1
    (folder / "t.journal").write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"t\.journal is damaged: what is whole of it was put back, but 1 of 1 blocks"
    ):
        undo(folder, checksums_of=sums)
    assert (folder / "t.journal").read_bytes() == damaged
    # As it is after a kill in the middle of an append: the rows of the record that was cut hadn't changed.
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert undo(folder, checksums_of=sums) == 2
    assert contents(folder) == {**files, "t.journal": b""}


def test_what_a_live_journal_holds(folder: Path) -> None:
    path = folder / "t.journal"
    live = check_journal(path, WHOLE + b"torn", AT)
    assert live is not None
    assert (live.num_rows_of, live.torn_bytes) == ({TABLE: 3, STATE: 3}, 4)
    assert check_journal(path, header(generation=2, commit=5), AT) is None


# Appending


def test_a_journal_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "t.journal"
    written = Journal(path, ROWS, STARTS[1])
    written.begin(GENERATION, COMMIT)
    (_, first), (_, second), _ = PARTS
    written.append(as_array(first), sum(slow_row_hash(*row) for row in first.items()) % 2**64)
    before = path.read_bytes()
    error = (
        rf"t\.journal would grow past its limit of {STARTS[1]} bytes: too many rows changed since the last commit\. "
        r"Call commit\(\) more often, or open the table with a larger journal_limit_bytes"
    )
    with pytest.raises(OSError, match=error) as caught:
        written.append(as_array(second), 0)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    # A commit makes room.
    written.begin(GENERATION + 1, COMMIT + 1)
    written.append(as_array(first), sum(slow_row_hash(*row) for row in first.items()) % 2**64)
    assert found(path.read_bytes()) == PARTS[:1]


@pytest.mark.parametrize("bad_write", range(1, 5))
def test_an_append_that_fails_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_write: int
) -> None:
    """Each of a record's parts may be the one for which there is no room; half of it is written."""
    path = tmp_path / "t.journal"
    written = Journal(path, ROWS, 10**6)
    written.begin(GENERATION, COMMIT)
    sums = [sum(slow_row_hash(*row) for row in rows.items()) % 2**64 for _, rows in PARTS]
    written.append(as_array(PARTS[0][1]), sums[0])
    writes = [0]
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        writes[0] += 1
        if writes[0] == bad_write:
            real(fd, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "no space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(
            OSError,
            match=r"can't write \d+ bytes to .*t\.journal: no space left on device\. Nothing was stored to these "
            r"rows; the last commit is intact\. Make room, and commit\(\) more often",
        ) as caught:
            written.append(as_array(PARTS[1][1]), sums[1])
        assert caught.value.errno == errno.ENOSPC
    assert found(path.read_bytes()) == PARTS[:1]
    # A shorter record takes the place; what is left of the longer one behind it is no record.
    written.append(as_array(PARTS[2][1]), sums[2])
    assert found(path.read_bytes()) == [PARTS[0], PARTS[2]]
    written.append(as_array(PARTS[1][1]), sums[1])
    assert found(path.read_bytes()) == [PARTS[0], PARTS[2], PARTS[1]]


def test_the_first_sync_makes_the_name_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Journal(tmp_path / "t.journal", ROWS, 10**6)
    written.begin(GENERATION, COMMIT)
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    written.sync()
    assert synced == [], "there is nothing to sync"
    for expected in (["t.journal", tmp_path.name], ["t.journal"], ["t.journal"]):
        written.append(as_array(PARTS[0][1]), 0)
        written.append(as_array(PARTS[1][1]), 0)
        written.sync()
        written.sync()
        assert synced == expected
        synced.clear()
        written.begin(GENERATION, COMMIT)


def test_a_journal_of_an_earlier_commit_that_cannot_be_emptied_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it behind the new records has another salt."""
    path = tmp_path / "t.journal"
    written = Journal(path, ROWS, 10**6)
    written.begin(GENERATION, COMMIT)
    sums = [sum(slow_row_hash(*row) for row in rows.items()) % 2**64 for _, rows in PARTS]
    for (_, rows), hash_sum in zip(PARTS, sums, strict=True):
        written.append(as_array(rows), hash_sum)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        written.begin(GENERATION + 1, COMMIT + 1)
    assert path.read_bytes() == before
    assert check_journal(path, before, dataclasses.replace(AT, generation=GENERATION + 1, commit=COMMIT + 1)) is None
    written.append(as_array(PARTS[0][1]), sums[0])
    assert len(path.read_bytes()) == len(before)
    assert found(path.read_bytes()) == PARTS[:1]


def test_a_journal_that_holds_something_stays_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "t.journal"
    written = Journal(path, ROWS, 10**6)
    written.begin(GENERATION, COMMIT)
    written.append(as_array(PARTS[0][1]), sum(slow_row_hash(*row) for row in PARTS[0][1].items()) % 2**64)
    written.close()
    written.close()
    assert found(path.read_bytes()) == PARTS[:1]
