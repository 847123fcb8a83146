"""Journals that somebody forged, or that belong to another table: no byte of any file is written from them."""

import os
import re
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from forge import Old, forged_header, forged_journal
from targets import (
    JOURNAL,
    MANIFEST,
    STATE,
    TABLE,
    D,
    N,
    content,
    make_table,
    manifest_of,
    open_all,
    open_table,
    with_state_file,
    write_manifest,
)

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import opening
from sense_v2.engram.upkeep.check import check_table

ROW = bytes(range(D * 4))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_table(tmp_path / "table")


def of_this_table(path: Path) -> tuple[int, int, int]:
    """What the header of a live journal says."""
    values = manifest_of(path)
    return values["generation"], int(values["commit"], 16), values["rows"]


def assert_refused(path: Path, error: str) -> None:
    """Whoever opens it is told; nothing has changed, the journal included."""
    journal = path.with_name(JOURNAL)
    before = content(path.parent.parent)
    for mode in ("r", "r+"):
        with pytest.raises(ValueError, match=f"{re.escape(str(journal))} {error}"):
            open_all(path, mode)
    assert error.split()[0] in " ".join(finding.text for finding in check_table(path).findings if finding.is_wrong)
    assert content(path.parent.parent) == before


def test_what_is_forged_here_would_work(path: Path) -> None:
    """The test of these tests: a journal without the flaw is undone."""
    path.with_name(JOURNAL).write_bytes(
        forged_journal(*of_this_table(path), Old(TABLE, [3, 59], [ROW, ROW]), Old(STATE, [0], [ROW]))
    )
    with pytest.warns(UserWarning, match="3 rows were put back"):
        open_all(path)
    rows = path.read_bytes()
    assert rows[3 * 16 : 4 * 16] == rows[59 * 16 :] == path.with_name(STATE).read_bytes()[:16] == ROW
    assert not path.with_name(JOURNAL).exists() or path.with_name(JOURNAL).read_bytes() == b""


# Of another table


@pytest.mark.parametrize("commits", [0, 2])
def test_the_journal_of_another_table(path: Path, tmp_path: Path, commits: int) -> None:
    """Of the same shape and as many commits; of none at all, too."""
    folder = tmp_path / "other"
    if commits:
        make_table(folder, seed=1, commits=commits)
    path = path if commits else tmp_path / "third" / TABLE
    if not commits:
        MMapEmbeddingStorage(N, D, path).close()
    other = MMapEmbeddingStorage(N, D, folder / TABLE, seed=1)
    other.protect(torch.arange(9))
    shutil.copy(folder / JOURNAL, path.with_name(JOURNAL))
    other.close()
    assert_refused(path, f"goes back to generation {commits}, commit [0-9a-f]*, but the manifest is of generation")


@pytest.mark.parametrize(
    ("generation", "is_own_commit"), [(1, True), (2, False), (3, True), (3, False), (2**64 - 1, False)]
)
def test_a_journal_of_another_history(path: Path, generation: int, is_own_commit: bool) -> None:
    """An earlier generation with this commit's mark can't be: somebody changed the manifest's number."""
    _, commit, num_rows = of_this_table(path)
    journal = forged_journal(generation, commit if is_own_commit else commit ^ 1, num_rows, Old(TABLE, [3], [ROW]))
    path.with_name(JOURNAL).write_bytes(journal)
    assert_refused(path, f"goes back to generation {generation}, .* they are of different histories of the table")


def test_a_manifest_whose_number_was_raised_does_not_hide_its_journal(path: Path) -> None:
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), Old(TABLE, [3], [ROW])))
    write_manifest(path, {**manifest_of(path), "generation": 7})
    assert_refused(path, "goes back to generation 2, .* but the manifest is of generation 7")


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_the_manifest_of_a_later_commit(path: Path, tmp_path: Path, mode: str) -> None:
    """As if the journal were left over from a commit that was cut off behind its rename. Then the rows would be that
    manifest's."""
    table = open_table(path)
    table.write(torch.arange(5), torch.full((5, D), 7.0))
    shutil.copytree(path.parent, tmp_path / "uncommitted")
    table.write(torch.arange(2), torch.full((2, D), 8.0))
    table.commit()
    table.close()
    other = tmp_path / "uncommitted" / TABLE
    shutil.copy(path.with_name(MANIFEST), other.with_name(MANIFEST))
    before = content(other.parent)
    error = (
        rf"{JOURNAL} is of an earlier commit than the manifest, which a commit that was cut off leaves, but 1 of 1 "
        rf"blocks of .*{TABLE} \(the first: rows 0 to {N - 1}\) don't have the checksum of the manifest's commit"
    )
    with pytest.raises(ValueError, match=error):
        open_table(other, mode)
    assert content(other.parent) == before
    assert {finding.kind for finding in check_table(other).findings if finding.is_wrong} == {"checksum"}


def test_a_journal_that_a_cut_off_commit_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are the manifest's: writing removes it. Who reads a large table is told why that takes time."""
    table = open_table(path)
    table.write(torch.arange(5), torch.full((5, D), 7.0))
    journal = path.with_name(JOURNAL).read_bytes()
    table.commit()
    table.close()
    path.with_name(JOURNAL).write_bytes(journal)
    before = path.read_bytes()
    open_table(path, "r").close()
    monkeypatch.setattr(opening, "PROGRESS_BYTES", 2 * N * D * 4 - 1)
    with pytest.warns(UserWarning, match=f"{JOURNAL} is of an earlier commit: all rows of .*{TABLE} are read"):
        open_table(path, "r").close()
    assert path.with_name(JOURNAL).read_bytes() == journal
    open_table(path).close()
    assert path.read_bytes() == before
    assert not path.with_name(JOURNAL).exists() or path.with_name(JOURNAL).read_bytes() == b""
    assert check_table(path).findings == []


def test_a_journal_without_a_manifest(path: Path) -> None:
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), Old(TABLE, [3], [ROW])))
    path.with_suffix(".json").unlink()
    before = content(path.parent)
    with (
        pytest.warns(UserWarning, match="has no manifest"),
        pytest.raises(ValueError, match=r"goes back to generation 2, .* but the manifest is of generation 0"),
    ):
        open_table(path)
    assert content(path.parent) == before


# That doesn't fit


@pytest.mark.parametrize("row_id", [-1, N, N + 1, 2**62, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_row_ids_out_of_range(path: Path, row_id: int, place: int) -> None:
    ids = [5, 6]
    ids.insert(place, row_id)
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), Old(TABLE, ids, [ROW] * 3)))
    assert_refused(path, f"has row id {row_id} for '{TABLE}', which has rows 0 to {N - 1}. The journal is damaged")


def test_a_bad_record_behind_a_good_one_changes_nothing(path: Path) -> None:
    good, bad = Old(TABLE, [3], [ROW]), Old(TABLE, [N], [ROW])
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), good, bad))
    assert_refused(path, f"has row id {N} ")


@pytest.mark.parametrize(
    "file",
    [
        "engram_table.json",
        "engram_table.lock",
        "engram_table.sum.dat",
        "../outside.dat",
        "/etc/passwd",
        "./engram_table.dat",
        "engram_table.dat\0",
        "ENGRAM_TABLE.DAT",
        "\x1b[2J",
        "x" * 255,
    ],
)
def test_a_record_of_a_file_that_is_not_the_tables(path: Path, file: str) -> None:
    (path.parent.parent / "outside.dat").write_bytes(bytes(N * D * 4))
    path.with_name("engram_table.sum.dat").write_bytes(bytes(N * D * 4))
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), Old(file, [3], [ROW])))
    assert_refused(path, f"has {N} rows of 16 bytes for the file .*; the manifest says nothing of such a file")


@pytest.mark.parametrize("row_bytes", [1, 15, 17, 8, 32])
def test_rows_of_another_length(path: Path, row_bytes: int) -> None:
    journal = forged_journal(*of_this_table(path), Old(TABLE, [3], [bytes(row_bytes)]))
    path.with_name(JOURNAL).write_bytes(journal)
    assert_refused(
        path, f"has {N} rows of {row_bytes} bytes for the file '{TABLE}'; the manifest says {N} rows of 16"
    )


@pytest.mark.parametrize("num_rows", [0, N - 1, N + 1, 2**64 - 1])
def test_a_table_of_another_number_of_rows(path: Path, num_rows: int) -> None:
    generation, commit, _ = of_this_table(path)
    path.with_name(JOURNAL).write_bytes(forged_journal(generation, commit, num_rows, Old(TABLE, [3], [ROW])))
    assert_refused(path, f"has {num_rows} rows of 16 bytes for the file '{TABLE}'; the manifest says {N} rows of 16")


@pytest.mark.parametrize("split", [False, True])
def test_a_row_that_is_there_twice(path: Path, split: bool) -> None:
    """The first would be the committed one, the second what was stored after it, or a forgery of either."""
    other = bytes(reversed(ROW))
    records = [Old(TABLE, [4, 3], [ROW, ROW]), Old(TABLE, [3], [other])]
    if not split:
        records = [Old(TABLE, [4, 3, 3], [ROW, ROW, other])]
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), *records))
    assert_refused(path, f"has a row of '{TABLE}' more than once")


def test_a_journal_that_writes_to_another_table(path: Path) -> None:
    """The manifest calls that table a state, and the journal has rows for it."""
    MMapEmbeddingStorage(N, D, path.with_name("other.dat")).close()
    with_state_file(path, "other.dat", width=D)
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), Old("other.dat", [3], [ROW])))
    before = content(path.parent)
    with pytest.raises(ValueError, match=r"other\.dat is a table: optimizer state 'adam' can't be there"):
        open_all(path)
    assert content(path.parent) == before


# That is damaged


def test_a_header_of_noise_is_not_taken_for_an_empty_journal(path: Path) -> None:
    """Rows that it should have undone are found by their checksums; nothing lets go of the journal before that."""
    journal = path.with_name(JOURNAL)
    raw = bytearray(path.read_bytes())
    raw[:16] = ROW
    for magic in (b"SENSEjr3", b"\0" * 8):
        path.write_bytes(raw)
        journal.write_bytes(forged_header(*of_this_table(path), magic=magic) + bytes(100))
        with pytest.raises(ValueError, match="Open it once with mode='r\\+', or run: sense-engram verify --repair"):
            open_table(path, "r")
        before = content(path.parent)
        with pytest.raises(
            ValueError, match=rf"{JOURNAL} is damaged: .* 1 of 1 blocks of .*{TABLE} .*rows 0 to {N - 1}"
        ):
            open_table(path)
        assert content(path.parent) == before


def test_noise_beside_a_whole_table_is_cleared_away(path: Path) -> None:
    before = path.read_bytes()
    path.with_name(JOURNAL).write_bytes(os.urandom(5000))
    open_all(path)
    assert path.read_bytes() == before
    assert check_table(path).findings == []


@pytest.mark.parametrize("missing", [1, 16, 17, 40, 71, 73, 119])
def test_a_record_that_was_cut_off_by_damage(path: Path, missing: int) -> None:
    """Its row had been stored to: a writer that died in the middle of the record would not have got so far."""
    old = path.read_bytes()[:16]
    raw = bytearray(path.read_bytes())
    raw[:16] = ROW
    path.write_bytes(raw)
    journal = forged_journal(*of_this_table(path), Old(TABLE, [0], [old]))
    path.with_name(JOURNAL).write_bytes(journal[:-missing])
    with pytest.raises(ValueError, match=f"{JOURNAL} is damaged"):
        open_table(path)
    assert path.with_name(JOURNAL).read_bytes() == journal[:-missing]
    # The whole journal brings the table back.
    path.with_name(JOURNAL).write_bytes(journal)
    with pytest.warns(UserWarning, match="1 row was put back"):
        open_table(path).close()
    assert path.read_bytes()[:16] == old
    assert check_table(path).findings == []


@pytest.mark.parametrize("kept_bytes", [None, 0, 48])
def test_a_journal_that_is_gone_or_cut_between_two_records(path: Path, kept_bytes: int | None) -> None:
    """What isn't stopped: this is how it looks when nothing was stored. The checksums know better, and still do after
    further commits."""
    old = path.read_bytes()[:16]
    journal = forged_journal(*of_this_table(path), Old(TABLE, [0], [old]))
    raw = bytearray(path.read_bytes())
    raw[:16] = ROW
    path.write_bytes(raw)
    if kept_bytes is not None:
        path.with_name(JOURNAL).write_bytes(journal[:kept_bytes])
    table = open_table(path)
    assert table.weight[0].numpy().tobytes() == ROW
    table.write(torch.tensor([0, 1]), torch.ones(2, D))
    table.commit()
    table.close()
    assert [finding.kind for finding in check_table(path).findings] == ["checksum"]


# That asks for memory


@pytest.mark.parametrize(
    ("num_rows", "row_bytes"), [(2**32 - 1, 16), (1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0, 16)]
)
def test_lengths_that_the_file_does_not_have(path: Path, num_rows: int, row_bytes: int) -> None:
    """Ignored as a torn record is, without a byte being reserved for it."""
    record = Old(TABLE, [3], [ROW], row_bytes=row_bytes, num_rows=num_rows)
    path.with_name(JOURNAL).write_bytes(forged_journal(*of_this_table(path), record))
    before = path.read_bytes()
    tracemalloc.start()
    open_all(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert path.read_bytes() == before


@pytest.mark.parametrize(("num_rows", "row_bytes"), [(2**24, 16), (20, 2**24), (2, 2**28)])
def test_a_journal_of_holes(path: Path, num_rows: int, row_bytes: int) -> None:
    """A sparse file has any length for nothing. Ids and rows are zeros, whose checksums are easily right."""
    generation, commit, rows = of_this_table(path)
    head = struct.pack("<4sHHIIQ", b"rows", len(TABLE), 0, row_bytes, num_rows, 0)
    crc = zlib.crc32(struct.pack("<Q", 1) + head + TABLE.encode())
    zeros = bytes(2**20)
    for at in range(0, 8 * num_rows, len(zeros)):
        crc = zlib.crc32(zeros[: min(len(zeros), 8 * num_rows - at)], crc)
    with open(path.with_name(JOURNAL), "wb") as file:
        file.write(forged_header(generation, commit, rows) + head + struct.pack("<II", crc, 0) + TABLE.encode())
        file.truncate(file.tell() + num_rows * (8 + row_bytes))
    before = path.read_bytes()
    tracemalloc.start()
    if row_bytes > 2**24:
        open_all(path)  # longer than a row may be: as if it weren't whole
    else:
        error = f"has a row of '{TABLE}' more than once|rows of {row_bytes} bytes for the file"
        with pytest.raises(ValueError, match=error):
            open_all(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**27, "its length is half a gigabyte"
    assert path.read_bytes() == before
