"""`sense-engram verify`: each thing that can be wrong is said in one line, and nothing changes without --repair.

The damage is done with plain file calls. What a table must come back to is bytes that were kept aside. Checksums are
computed by docs/format.md in Python's own integers.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tables import slow_sums

from sense_v2.cli import main
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import row_scan
from sense_v2.engram.table.checksums import to_hex
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.row_scan import scan_rows
from sense_v2.engram.upkeep import check
from sense_v2.engram.upkeep.check import Check, check_table, repair_table

# Three blocks of checksums: 4,096 rows, 4,096 rows, 1,808 rows.
N, D = 10_000, 8
STATE_WIDTH = 3
IDS = torch.tensor([3, 4095, 4096, 9999])
TABLE, STATE = "engram_table.dat", "engram_table.adam.dat"
MANIFEST, JOURNAL, LOCK = "engram_table.json", "engram_table.journal", "engram_table.lock"


def rows(value: float, ids: torch.Tensor = IDS, width: int = D) -> torch.Tensor:
    return torch.full((len(ids), width), float(value))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with a state, two commits old; tests work on copies."""
    folder = tmp_path_factory.mktemp("made")
    table = MMapEmbeddingStorage(N, D, folder / TABLE, seed=5)
    state = table.open_state("adam", STATE_WIDTH)
    for step in (11, 12):
        table.write(IDS, rows(step))
        table.write_state(state, IDS, rows(step, width=STATE_WIDTH))
        table.commit(step=step)
    table.close()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "table"))


@pytest.fixture
def crashed(made: Path, tmp_path: Path) -> Path:
    """What a writer that is killed between two commits leaves: what its files hold at that moment."""
    folder = Path(shutil.copytree(made, tmp_path / "alive"))
    table = MMapEmbeddingStorage(N, D, folder / TABLE)
    state = table.open_state("adam", STATE_WIDTH)
    table.write(IDS, rows(99))
    table.write(torch.tensor([7]), rows(99, torch.tensor([7])))
    table.write_state(state, IDS, rows(99, width=STATE_WIDTH))
    left = Path(shutil.copytree(folder, tmp_path / "table"))
    table.commit()
    table.close()
    return left


@pytest.fixture
def verify(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """verify(path, …) -> (exit status, stdout, stderr)"""

    def call(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main.main(["verify", *map(str, arguments)])
        found = capfd.readouterr()
        return status, found.out, found.err

    return call


def found_lines(out: str, what: str = "wrong") -> list[str]:
    """The findings of a kind, without their first word."""
    return [line[len("repaired  ") :] for line in out.splitlines() if line.split()[0] == what]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def statuses(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {path.name: path.lstat() for path in [folder, *folder.iterdir()]}
    return {name: (one.st_ino, one.st_mode, one.st_size, one.st_mtime_ns) for name, one in found.items()}


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 0x10]))


# A table that is as it should be


def test_nothing_is_wrong(verify: Any, folder: Path) -> None:
    status, out, error = verify(folder / TABLE)
    assert (status, error) == (0, "")
    table, commit, read, result = out.splitlines()
    assert table == f"table     {folder / TABLE}"
    assert commit == "commit    generation 2, step 12: 10,000 rows of 8 float32"
    assert re.fullmatch(r"read      10,000 rows, 2 files, 440 KB in \S+ m?s", read)
    assert result == "result    nothing is wrong"


def test_json(verify: Any, folder: Path) -> None:
    flip(folder / TABLE, 0)
    status, out, error = verify(folder / TABLE, "--json")
    found = json.loads(out)
    assert (status, found["wrong"], found["bytes"]) == (1, 1, N * D * 4 + N * STATE_WIDTH * 4)
    assert (found["rows"], found["width"], found["dtype"]) == (N, D, "float32")
    assert (found["generation"], found["step"], found["repaired"]) == (2, 12, [])
    (finding,) = found["findings"]
    assert (finding["kind"], finding["file"], finding["is_wrong"]) == ("checksum", TABLE, True)
    assert error.startswith("table     "), "what a person reads goes to stderr"


def test_a_manifest_without_states_and_extremes_of_shape(tmp_path: Path) -> None:
    for number, (num_rows, width, dtype) in enumerate(
        [(1, 1, "float32"), (1, 1, "bfloat16"), (4096, 3, "float16"), (4097, 1, "float16"), (2, 300_000, "float32")]
    ):
        path = tmp_path / str(number) / "t"
        MMapEmbeddingStorage(num_rows, width, path, dtype=dtype, init_std=1.0).close()
        found = check_table(path)
        assert (found.findings, found.num_bytes) == ([], path.stat().st_size)
        flip(path, path.stat().st_size - 1)
        assert [finding.kind for finding in check_table(path).findings] == ["checksum"]


# Which table is meant


def test_a_table_is_named_by_its_file_its_manifest_or_its_folder(verify: Any, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "config.yaml").write_text("a: 1")
    for path in (folder / TABLE, folder / MANIFEST, folder):
        status, out, _ = verify(path)
        assert status == 0
        assert out.startswith(f"table     {folder / TABLE}\n")


def test_a_table_of_another_name(verify: Any, tmp_path: Path) -> None:
    for name in ("rows.bin", "rows"):
        folder = tmp_path / f"of {name}"
        MMapEmbeddingStorage(4, 2, folder / name).close()
        for path in (folder, folder / "rows.json"):
            assert verify(path)[:2][0] == 0
            assert verify(path)[1].startswith(f"table     {folder / name}\n")


def test_calls_that_name_no_table_have_status_2(verify: Any, folder: Path, tmp_path: Path) -> None:
    MMapEmbeddingStorage(4, 2, folder / "other.dat").close()
    (tmp_path / "empty").mkdir()
    for arguments, what in [
        ((), "Missing argument"),
        ((folder,), f"more than one table is in the folder {folder}: {TABLE}, other.dat; name the one that is meant"),
        ((tmp_path / "empty",), "no table is in the folder"),
        ((tmp_path / "not there.dat",), "not there.dat isn't there"),
        ((folder / LOCK,), f"{LOCK} belongs to a table, but isn't one"),
        ((folder / TABLE, "--fix"), "No such option"),
    ]:
        status, out, error = verify(*arguments)
        assert (status, out) == (2, "")
        assert what in " ".join(error.split())


def test_a_manifest_whose_table_is_gone_names_it(verify: Any, folder: Path) -> None:
    (folder / TABLE).unlink()
    for path in (folder / TABLE, folder / MANIFEST, folder):
        status, out, _ = verify(path)
        assert (status, found_lines(out)) == (
            1,
            [f"{TABLE}: the manifest describes it, and it isn't there. Put it back"],
        )


# Checksums


@pytest.mark.parametrize(("width", "dtype"), [(8, "float32"), (3, "float32"), (3, "float16"), (1, "bfloat16")])
def test_the_sums_of_a_scan_are_those_of_the_specification(tmp_path: Path, width: int, dtype: str) -> None:
    num_rows, size = 5000, width * row_dtype(dtype).item_bytes
    raw = bytearray(random.Random(3).randbytes(num_rows * size))
    raw[size * 100 : size * 4000] = bytes(size * 3900)
    (tmp_path / "rows").write_bytes(raw)
    found = scan_rows(tmp_path / "rows", num_rows, width, row_dtype(dtype))
    assert to_hex(found.sums) == slow_sums(tmp_path / "rows", num_rows)
    zeros = sum(not any(raw[size * number : size * (number + 1)]) for number in range(num_rows))
    assert found.num_zero_rows == zeros >= 3900


@pytest.mark.parametrize(
    ("damaged_rows", "expected"),
    [
        ([0], "1 of 3 blocks don't have the checksum of generation 2, step 12: rows 0 to 4,095."),
        ([4096], "1 of 3 blocks don't have the checksum of generation 2, step 12: rows 4,096 to 8,191."),
        ([9999], "1 of 3 blocks don't have the checksum of generation 2, step 12: rows 8,192 to 9,999."),
        (
            [5, 9000],
            "2 of 3 blocks don't have the checksum of generation 2, step 12: rows 0 to 4,095, 8,192 to 9,999.",
        ),
        ([5, 6, 4100], "2 of 3 blocks don't have the checksum of generation 2, step 12: rows 0 to 8,191."),
    ],
)
@pytest.mark.parametrize(("name", "row_bytes"), [(TABLE, D * 4), (STATE, STATE_WIDTH * 4)])
def test_damaged_blocks_are_named_by_their_rows(
    verify: Any, folder: Path, damaged_rows: list[int], expected: str, name: str, row_bytes: int
) -> None:
    for row in damaged_rows:
        flip(folder / name, row * row_bytes + row % row_bytes)
    status, out, _ = verify(folder / TABLE)
    assert status == 1
    assert found_lines(out) == [f"{name}: {expected} Put the table's files back from a copy"]
    assert out.endswith("result    1 thing is wrong\n")


def test_rows_that_changed_places_are_found(folder: Path) -> None:
    raw = bytearray((folder / TABLE).read_bytes())
    raw[:64] = raw[32:64] + raw[:32]
    (folder / TABLE).write_bytes(raw)
    assert [finding.kind for finding in check_table(folder / TABLE).findings] == ["checksum"]


def test_many_damaged_ranges_are_counted(tmp_path: Path) -> None:
    num_rows = 40 * 4096
    MMapEmbeddingStorage(num_rows, 1, tmp_path / "t").close()
    for block in range(0, 40, 2):
        flip(tmp_path / "t", block * 4096 * 4 + 1)
    (finding,) = (finding for finding in check_table(tmp_path / "t").findings if finding.is_wrong)
    assert "20 of 40 blocks" in finding.text
    assert "rows 0 to 4,095, 8,192 to 12,287, 16,384 to 20,479," in finding.text
    assert "and 12 more ranges" in finding.text


# Values


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_no_numbers(verify: Any, tmp_path: Path, dtype: str) -> None:
    row_type = row_dtype(dtype)
    path = tmp_path / "t.dat"
    table = MMapEmbeddingStorage(N, D, path, dtype=dtype)
    limits = torch.finfo(row_type.torch)
    finite = torch.tensor([[limits.max, limits.min, limits.tiny, -limits.tiny, limits.tiny / 2, 0.0, -0.0, 1.0]])
    table.write(torch.tensor([17]), finite)
    table.commit()
    table.close()
    assert verify(path)[0] == 0
    values = torch.zeros(4, D)
    values[0, 2] = float("nan")
    values[1] = float("-inf")
    values[3, 7], values[3, 0] = float("inf"), float("nan")
    table = MMapEmbeddingStorage(N, D, path, dtype=dtype)
    table.write(torch.tensor([9998, 4000, 2, 6000]), values)
    table.commit()
    table.close()
    stored = torch.from_numpy(np.fromfile(path, row_type.numpy)).view(row_type.torch)
    num_nan, num_infinite = int(stored.isnan().sum()), int(stored.isinf().sum())
    assert (num_nan, num_infinite) == (2, D + 1)
    status, out, _ = verify(path)
    assert status == 1
    assert found_lines(out) == [
        "t.dat: 2 values are NaN and 9 infinite, in 3 of 10,000 rows; the first is row 4,000. "
        "Go back to a copy from before"
    ]


def test_every_nan_counts(tmp_path: Path) -> None:
    """Signs and payloads, quiet and signalling; of float16, every value there is."""
    raw = np.arange(1 << 16, dtype="<u2")
    for dtype, exponent in (("float16", 0x7C00), ("bfloat16", 0x7F80)):
        raw.tofile(tmp_path / dtype)
        found = scan_rows(tmp_path / dtype, 1 << 14, 4, row_dtype(dtype))
        infinite = [bits for bits in range(1 << 16) if bits & 0x7FFF == exponent]
        nan = [bits for bits in range(1 << 16) if bits & 0x7FFF > exponent]
        assert (found.num_infinite, found.num_nan) == (len(infinite), len(nan))
        assert found.num_bad_rows == len({bits // 4 for bits in infinite + nan})
        assert found.first_bad_row == min(infinite + nan) // 4


def test_a_state_that_is_not_finite(verify: Any, folder: Path) -> None:
    table = MMapEmbeddingStorage(N, D, folder / TABLE)
    state = table.open_state("adam", STATE_WIDTH)
    table.write_state(state, IDS, rows(float("inf"), width=STATE_WIDTH))
    table.commit()
    table.close()
    status, out, _ = verify(folder)
    assert status == 1
    assert found_lines(out)[0].startswith(f"{STATE}: 0 values are NaN and 12 infinite, in 4 of 10,000 rows")


def test_rows_of_zeros_are_no_error(verify: Any, folder: Path) -> None:
    table = MMapEmbeddingStorage(N, D, folder / TABLE)
    ids = torch.arange(100, 350)
    table.write(ids, rows(0, ids))
    table.commit()
    table.close()
    status, out, _ = verify(folder)
    assert (status, found_lines(out)) == (0, [])
    assert found_lines(out, "note") == [f"{TABLE}: 250 of 10,000 rows (2.5%) are all zeros"]


def test_a_sparse_table_says_so_and_its_holes_are_not_read(verify: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.dat"
    num_rows = 10_000_000
    table = MMapEmbeddingStorage(num_rows, 64, path, sparse=True)
    ids = torch.tensor([0, 5_000_000, num_rows - 1])
    table.write(ids, rows(1.0, ids, 64))
    table.flush()
    table.close()
    if path.stat().st_blocks * 512 == path.stat().st_size:
        pytest.fail("the file system of the tests has no sparse files")
    status, out, _ = verify(path)
    assert status == 0
    (note,) = found_lines(out, "note")
    on_disk = path.stat().st_blocks * 512
    assert note == (
        "t.dat: 9,999,997 of 10,000,000 rows (100.0%) are all zeros; the file is sparse, "
        f"{on_disk:,} of its 2,560,000,000 bytes are on the disk"
    )
    with open(path, "r+b") as file:
        file.seek(3_000_000 * 256)
        file.write(b"\1")
    (wrong,) = found_lines(verify(path)[1])
    assert "1 of 611 blocks" in wrong
    assert "rows 2,998,272 to 3,014,655" in wrong


# Journals


def test_a_live_journal_says_what_it_would_undo(verify: Any, crashed: Path) -> None:
    status, out, _ = verify(crashed)
    assert status == 1
    assert found_lines(out) == [
        f"{JOURNAL}: a writer ended between two commits: it puts back 5 rows of {TABLE}, 4 rows of {STATE}, as at "
        "generation 2, step 12. --repair does that, and so does opening with mode='r+'; until then checksums aren't "
        "judged"
    ]


def test_repair_puts_the_last_commit_back(verify: Any, crashed: Path, made: Path) -> None:
    assert content(crashed)[TABLE] != content(made)[TABLE]
    status, out, error = verify(crashed, "--repair")
    assert (status, error, found_lines(out)) == (0, "", [])
    assert found_lines(out, "repaired") == ["9 rows put back as they were at generation 2, step 12"]
    for name in (TABLE, STATE, MANIFEST):
        assert content(crashed)[name] == content(made)[name]
    status, out, _ = verify(crashed)
    assert (status, found_lines(out, "note")) == (0, [])


def test_a_journal_cut_in_a_record_is_repaired_where_that_changes_nothing(crashed: Path, made: Path) -> None:
    """The record was being written: its row is still the old one."""
    table, journal = crashed / TABLE, crashed / JOURNAL
    first_record = 48 + 32 + len(TABLE) + 4 * (8 + D * 4)
    raw = bytearray((made / TABLE).read_bytes())
    for row in IDS.tolist():
        raw[row * D * 4 : (row + 1) * D * 4] = table.read_bytes()[row * D * 4 : (row + 1) * D * 4]
    table.write_bytes(raw)
    shutil.copy(made / STATE, crashed / STATE)
    os.truncate(journal, first_record + 20)
    (finding,) = check_table(table).findings
    assert f"it puts back 4 rows of {TABLE}, as at generation 2, step 12, and ends in 20 bytes" in finding.text
    done, found = repair_table(table)
    assert (done, found.findings) == (["4 rows put back as they were at generation 2, step 12"], [])
    assert content(crashed)[TABLE] == content(made)[TABLE]


def test_a_damaged_journal_is_not_taken_for_one_that_was_cut(verify: Any, crashed: Path) -> None:
    second_record = 48 + 32 + len(TABLE) + 4 * (8 + D * 4)
    flip(crashed / JOURNAL, second_record + 40)
    journal = content(crashed)[JOURNAL]
    status, out, error = verify(crashed, "--repair")
    assert (status, out) == (1, "")
    assert f"{JOURNAL} is damaged: what is whole of it was put back, but 1 of 3 blocks of" in error
    assert "rows 0 to 4095" in error
    assert content(crashed)[JOURNAL] == journal


def test_a_journal_of_another_history(verify: Any, crashed: Path) -> None:
    change_manifest(crashed, commit="0" * 15 + "1")
    before = content(crashed)
    for option in ((), ("--repair",)):
        status, out, _ = verify(crashed, *option)
        assert status == 1
        assert found_lines(out)[0].startswith(f"{JOURNAL}: goes back to generation 2, commit ")
        assert "different histories" in found_lines(out)[0]
        # The rows are compared with the manifest that is there.
        assert [line.split(":")[0] for line in found_lines(out)[1:]] == [TABLE, STATE]
        assert {**content(crashed), LOCK: b""} == {**before, LOCK: b""}


def test_journals_that_undo_nothing(verify: Any, crashed: Path, made: Path) -> None:
    stale = content(crashed)[JOURNAL]
    for name in (TABLE, STATE, MANIFEST):
        shutil.copy(made / name, crashed / name)
    table = MMapEmbeddingStorage(N, D, made / TABLE, mode="r")
    header = stale[:48]
    change_manifest(crashed, generation=3, commit="00000000000000ab")
    for raw in (stale, header):
        (crashed / JOURNAL).write_bytes(raw)
        status, out, _ = verify(crashed)
        assert (status, found_lines(out)) == (0, [])
        (note,) = found_lines(out, "note")
        assert note == f"{JOURNAL}: undoes nothing any more; the next opening to write removes it"
        damaged = bytearray(content(crashed)[TABLE])
        damaged[0] ^= 1
        (crashed / TABLE).write_bytes(damaged)
        status, out, _ = verify(crashed)
        assert (status, [line.split(":")[0] for line in found_lines(out)]) == (1, [TABLE])
        (note,) = found_lines(out, "note")
        assert note.startswith(f"{JOURNAL}: is of an earlier commit, and the rows aren't the last one's")
        with pytest.raises(ValueError, match=rf"{JOURNAL} is of an earlier commit than the manifest"):
            MMapEmbeddingStorage(N, D, crashed / TABLE)
        shutil.copy(made / TABLE, crashed / TABLE)
    (crashed / JOURNAL).write_bytes(b"")
    assert verify(crashed)[1].count("\n") == 4
    table.close()


def test_a_journal_beside_other_damage_is_left_to_a_person(verify: Any, crashed: Path) -> None:
    os.truncate(crashed / STATE, 100)
    before = content(crashed)
    status, out, _ = verify(crashed, "--repair")
    assert (status, found_lines(out, "repaired")) == (1, [])
    assert [line.split(":")[0] for line in found_lines(out)] == [STATE, JOURNAL]
    assert {**content(crashed), LOCK: b""} == {**before, LOCK: b""}


# A writer at work

WRITER = """
import sys, torch
from sense_v2.engram.storage import MMapEmbeddingStorage
table = MMapEmbeddingStorage(10_000, 8, sys.argv[1])
table.write(torch.tensor([1, 2]), torch.ones(2, 8))
print("stored", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder / TABLE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stored\n"
    yield process
    process.kill()
    process.communicate()


def test_a_writer_at_work(verify: Any, folder: Path, writer: subprocess.Popen[str]) -> None:
    status, out, _ = verify(folder)
    assert (status, found_lines(out)) == (0, [])
    assert found_lines(out, "note") == [
        f"{LOCK}: process {writer.pid} is writing: rows may be ahead of the last commit, "
        "their checksums aren't judged"
    ]
    before = statuses(folder)
    status, out, error = verify(folder, "--repair")
    assert (status, out) == (1, "")
    assert f"is being written to by process {writer.pid}" in error
    assert statuses(folder) == before
    # What doesn't depend on when it is read is still found.
    flip(folder / STATE, 3)
    os.truncate(folder / STATE, 8)
    assert len(found_lines(verify(folder)[1])) == 1


def test_this_process_is_the_writer(folder: Path) -> None:
    table = MMapEmbeddingStorage(N, D, folder / TABLE)
    table.write(IDS, rows(5))
    found = check_table(folder / TABLE)
    assert [(finding.kind, finding.is_wrong) for finding in found.findings] == [("writer", False)]
    assert f"process {os.getpid()} is writing" in found.findings[0].text
    with pytest.raises(BlockingIOError, match="open for writing in this process already"):
        repair_table(folder / TABLE)
    table.write(IDS, rows(6))
    table.commit()
    table.close()
    assert check_table(folder / TABLE).findings == []


def test_a_writer_that_comes_while_the_table_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commits_first(*arguments: Any, **more: Any) -> row_scan.Scan:
        table = MMapEmbeddingStorage(N, D, folder / TABLE)
        table.write(IDS, rows(1.5))
        table.commit()
        table.close()
        return scan_rows(*arguments, **more)

    monkeypatch.setattr(check, "scan_rows", commits_first)
    found = check_table(folder / TABLE)
    assert [(finding.kind, finding.is_wrong) for finding in found.findings] == [("writer", False)]
    assert "a writer came while this was read" in found.findings[0].text


def test_a_lock_file_that_nobody_holds_is_nothing(verify: Any, folder: Path) -> None:
    (folder / LOCK).write_text("1\n")
    assert verify(folder)[1].count("\n") == 4


# Files


def damage_state(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: change(folder / STATE)


def as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere.bin"))
    path.symlink_to("elsewhere.bin")


def as_hard_link(path: Path) -> None:
    path.unlink()
    os.truncate(path.with_name(TABLE), N * STATE_WIDTH * 4)
    path.hardlink_to(path.with_name(TABLE))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        f"{MANIFEST}: isn't there: nothing says what the table holds. Put it back, or open the table with its "
        "configuration and commit()",
    ),
    "an empty manifest": (
        lambda folder: (folder / MANIFEST).write_text(""),
        f"{MANIFEST}: no JSON: Expecting value: line 1 column 1 (char 0)",
    ),
    "an unknown field": (
        lambda folder: change_manifest(folder, compression="zstd"),
        f"{MANIFEST}: manifest has an unknown field 'compression'",
    ),
    "a newer version": (
        lambda folder: change_manifest(folder, format_version=9),
        f"{MANIFEST}: format_version = 9: ",
    ),
    "a folder as manifest": (
        lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()),
        f"{MANIFEST}: Is a directory",
    ),
    "a table that was cut": (
        lambda folder: os.truncate(folder / TABLE, N * D * 4 - 1),
        f"{TABLE}: expected 320,000 bytes (10,000 rows × 8 float32), found 319,999: the file was cut, or isn't",
    ),
    "a table that is too long": (
        lambda folder: os.truncate(folder / TABLE, N * D * 4 + 1),
        f"{TABLE}: expected 320,000 bytes (10,000 rows × 8 float32), found 320,001: the file was cut, or isn't",
    ),
    "a folder as table": (
        lambda folder: ((folder / TABLE).unlink(), (folder / TABLE).mkdir()),
        f"{TABLE}: is no regular file",
    ),
    "a state that was cut": (
        damage_state(lambda path: os.truncate(path, 0)),
        f"{STATE}: expected 120,000 bytes (10,000 rows × 3 float32), found 0: the file was cut, or isn't",
    ),
    "a state that is gone": (damage_state(Path.unlink), f"{STATE}: the manifest describes it, and it isn't there"),
    "a state that is a link": (damage_state(as_link), f"{STATE}: is a link; put the file itself there"),
    "a state that is a pipe": (
        damage_state(lambda path: (path.unlink(), os.mkfifo(path))),
        f"{STATE}: is no regular file",
    ),
    "a state that is a table": (
        damage_state(lambda path: path.with_suffix(".json").write_text("{}")),
        f"{STATE}: has a manifest of its own: it is a table, and no optimizer state",
    ),
    "a damaged block": (lambda folder: flip(folder / TABLE, 99), f"{TABLE}: 1 of 3 blocks"),
    "a journal that is a link": (
        lambda folder: (folder / JOURNAL).symlink_to(folder / TABLE),
        f"{JOURNAL}: is a link; a file of this name belongs to the table alone. Remove it",
    ),
    "a journal of noise": (
        lambda folder: (folder / JOURNAL).write_bytes(b"?" * 48),
        f"{JOURNAL}: a writer ended between two commits: it puts back nothing, as at generation 2, step 12, and ends "
        "in 48 bytes that are no whole record",
    ),
    "a lock that is a pipe": (
        lambda folder: ((folder / LOCK).unlink(), os.mkfifo(folder / LOCK)),
        f"{LOCK}: isn't a regular file",
    ),
}


def name_of_table(folder: Path) -> Path:
    """Its file; where a folder is in its place, the manifest."""
    return folder / (MANIFEST if (folder / TABLE).is_dir() else TABLE)


@pytest.mark.parametrize("name", DAMAGE)
def test_every_damage_is_one_line_and_verify_changes_nothing(verify: Any, folder: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(folder)
    before, bytes_before = statuses(folder), content(folder)
    status, out, error = verify(name_of_table(folder))
    assert (status, error) == (1, "")
    (line,) = found_lines(out)
    assert line.startswith(expected)
    assert statuses(folder) == before
    assert content(folder) == bytes_before


@pytest.mark.parametrize("name", [name for name in DAMAGE if name not in ("a journal of noise",)])
def test_repair_does_not_touch_what_it_cannot_repair(verify: Any, folder: Path, name: str) -> None:
    DAMAGE[name][0](folder)
    before = content(folder)
    status, out, _ = verify(name_of_table(folder), "--repair")
    assert status == 1
    assert "repaired" not in out
    # The lock was taken: its file says by whom.
    assert {**content(folder), LOCK: b""} == {**before, LOCK: b""}


def test_a_hard_link_between_state_and_table(tmp_path: Path) -> None:
    table = MMapEmbeddingStorage(100, 8, tmp_path / TABLE)
    table.open_state("adam", 8)
    table.commit()
    table.close()
    (tmp_path / STATE).unlink()
    (tmp_path / STATE).hardlink_to(tmp_path / TABLE)
    found = {finding.text for finding in check_table(tmp_path / TABLE).findings if finding.is_wrong}
    assert f"is one file with {TABLE}: what is stored to one changes the other" in found


def test_verify_changes_nothing_beside_a_journal(verify: Any, crashed: Path) -> None:
    before, bytes_before = statuses(crashed), content(crashed)
    verify(crashed)
    assert statuses(crashed) == before
    assert content(crashed) == bytes_before


def test_a_table_that_is_a_link_to_another_disk(verify: Any, folder: Path, tmp_path: Path) -> None:
    (folder / TABLE).rename(tmp_path / "disk.bin")
    (folder / TABLE).symlink_to(tmp_path / "disk.bin")
    assert verify(folder)[0] == 0
    (tmp_path / "disk.bin").unlink()
    status, out, _ = verify(folder)
    assert (status, found_lines(out)) == (1, [f"{TABLE}: the manifest describes it, and it isn't there. Put it back"])


def test_states_that_are_not_listed(verify: Any, folder: Path) -> None:
    (folder / "engram_table.sum.dat").write_bytes(b"")
    (folder / "engram_table.notes.txt").write_bytes(b"")
    MMapEmbeddingStorage(2, 2, folder / "engram_table.small.dat").close()
    status, out, _ = verify(folder / TABLE)
    assert (status, found_lines(out)) == (0, [])
    assert found_lines(out, "note") == [
        "engram_table.sum.dat: the manifest doesn't list it: it was made after the last commit, or is left over. "
        "Training with an optimizer state 'sum' makes it anew"
    ]


def test_a_disk_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch, verify: Any) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(row_scan.os, "preadv", fail)
    status, out, _ = verify(folder)
    assert status == 1
    assert found_lines(out) == [f"{name}: can't be read: Input/output error" for name in (TABLE, STATE)]


def test_a_file_that_is_cut_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def cut_first(fd: int, *more: Any) -> int:
        os.truncate(folder / TABLE, 1000)
        return real(fd, *more)

    monkeypatch.setattr(row_scan.os, "preadv", cut_first)
    found = check_table(folder / TABLE)
    assert found.findings[0].text == "can't be read: its length changed while it was read"


# Version 1


@pytest.fixture
def version_1(folder: Path) -> Path:
    values = json.loads((folder / MANIFEST).read_text())
    states = {"adam": {**values["states"]["adam"], "checksums": ...}}
    states["adam"].pop("checksums")
    change_manifest(folder, format_version=1, states=states, commit=..., extra=..., updates=..., checksums=...)
    return folder


def test_a_table_without_checksums_gets_them_from_repair(verify: Any, version_1: Path, made: Path) -> None:
    before = content(version_1)
    status, out, _ = verify(version_1)
    assert (status, found_lines(out)) == (0, [])
    text = "has no checksums: nothing says whether its rows are those that were stored. --repair adds them"
    assert found_lines(out, "note") == [f"{TABLE}: {text}", f"{STATE}: {text}"]
    assert content(version_1) == before

    status, out, _ = verify(version_1, "--repair")
    assert (status, found_lines(out), found_lines(out, "note")) == (0, [], [])
    assert found_lines(out, "repaired") == [f"checksums written of {TABLE}, {STATE}, as the rows are now"]
    assert {name: raw for name, raw in content(version_1).items() if name not in (MANIFEST, LOCK)} == {
        name: raw for name, raw in before.items() if name not in (MANIFEST, LOCK)
    }
    written, old = (json.loads((folder / MANIFEST).read_text()) for folder in (version_1, made))
    assert written["checksums"] == old["checksums"]
    assert written["states"]["adam"] == old["states"]["adam"]
    assert (written["format_version"], written["generation"], written["step"]) == (3, 2, 12)
    flip(version_1 / STATE, 8)
    assert verify(version_1)[0] == 1
    flip(version_1 / STATE, 8)
    table = MMapEmbeddingStorage(N, D, version_1 / TABLE)
    table.write(IDS, rows(3))
    table.commit()
    table.close()
    assert check_table(version_1 / TABLE).findings == []


def test_checksums_are_not_written_of_a_table_that_is_not_clean(verify: Any, version_1: Path) -> None:
    (version_1 / TABLE).write_bytes(np.full((N, D), np.nan, "<f4").tobytes())
    before = content(version_1)
    status, out, _ = verify(version_1, "--repair")
    assert (status, found_lines(out, "repaired")) == (1, [])
    assert {**content(version_1), LOCK: b""} == {**before, LOCK: b""}


def test_one_file_without_checksums(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change_manifest(folder, states={"adam": {**values["states"]["adam"], "checksums": None}})
    done, found = repair_table(folder / TABLE)
    assert (done, found.findings) == ([f"checksums written of {STATE}, as the rows are now"], [])
    assert json.loads((folder / MANIFEST).read_text())["states"] == values["states"]


# Large tables


def test_memory_does_not_follow_the_table(tmp_path: Path) -> None:
    table = MMapEmbeddingStorage(400_000, 64, tmp_path / "t.dat", dtype="float32", num_threads=1)
    table.close()
    tracemalloc.start()
    found: Check = check_table(tmp_path / "t.dat")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.findings, found.num_bytes) == ([], 102_400_000)
    assert peak < 30_000_000


def test_a_bar_above_a_gigabyte(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check.PROGRESS_BYTES == 1_000_000_000
    check_table(folder / TABLE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(check, "PROGRESS_BYTES", 1)
    check_table(folder / TABLE)
    assert capsys.readouterr().err == "", "a log is no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    check_table(folder / TABLE)
    assert "100%" in capsys.readouterr().err
    check_table(folder / TABLE, progress=False)
    assert capsys.readouterr().err == ""
