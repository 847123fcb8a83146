"""Manifests that somebody forged or damaged. Each is refused by name, with the file, and nothing has changed."""

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import (
    MANIFEST,
    STATE,
    TABLE,
    content,
    make_table,
    manifest_of,
    open_all,
    with_state_file,
    write_manifest,
)

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.upkeep.check import check_table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table in a folder beside a file that it must never reach."""
    (tmp_path / "outside.dat").write_bytes(bytes(range(240)) * 4)
    return make_table(tmp_path / "table")


def assert_refused(path: Path, error: str, modes: tuple[str, ...] = ("r", "r+")) -> None:
    """Every way to open it names the manifest and the reason; `verify` finds it; no byte has changed."""
    before = content(path.parent.parent)
    for mode in modes:
        with pytest.raises(ValueError, match=f"{re.escape(str(path.with_suffix('.json')))}: {error}") as raised:
            open_all(path, mode)
        assert str(raised.value).isprintable(), "what a file says can't talk to the terminal"
        assert len(str(raised.value)) < 500
    (finding,) = check_table(path).findings
    assert re.match(error, finding.text)
    assert finding.is_wrong
    assert content(path.parent.parent) == before


# Out of the folder


@pytest.mark.parametrize(
    "file",
    [
        "../outside.dat",
        "../../outside.dat",
        "/etc/passwd",
        "folder/file.dat",
        "..\\outside.dat",
        "a\0b",
        "engram_table.adam.dat\0.json",
        "",
        ".",
        "..",
        "\ud800.dat",
        "x" * 256,
        7,
        None,
        [STATE],
        {"name": STATE},
    ],
)
def test_a_state_that_leads_out_of_the_folder(path: Path, file: Any) -> None:
    with_state_file(path, file)
    assert_refused(path, r"states\.adam\.file = .*: must be a plain file name")


@pytest.mark.parametrize(
    "file",
    [MANIFEST, "other.json", "engram_table.journal", "engram_table.lock", f"{TABLE}.tmp", "Engram_Table.JSON"],
)
def test_a_state_that_is_another_of_the_tables_files(path: Path, file: str) -> None:
    with_state_file(path, file)
    assert_refused(path, r"states\.adam\.file = .*: must be no name of another of the table's files")


def test_a_state_that_is_the_table(path: Path) -> None:
    with_state_file(path, TABLE)
    before = content(path.parent)
    with pytest.raises(ValueError, match=r"engram_table\.dat is a table: optimizer state 'adam' can't be there"):
        open_all(path)
    assert content(path.parent) == before
    assert {finding.text for finding in check_table(path).findings if finding.kind == "state"} >= {
        "has a manifest of its own: it is a table, and no optimizer state"
    }


def test_a_state_that_is_another_table(path: Path) -> None:
    MMapEmbeddingStorage(60, 4, path.with_name("other.dat")).close()
    with_state_file(path, "other.dat")
    before = content(path.parent)
    with pytest.raises(ValueError, match=r"other\.dat is a table: optimizer state 'adam' can't be there"):
        open_all(path)
    assert content(path.parent) == before


def test_two_states_in_one_file(path: Path) -> None:
    values = manifest_of(path)
    values["states"]["sum"] = values["states"]["adam"]
    write_manifest(path, values)
    assert_refused(path, r"states = \[.*\]: must be one file each")


@pytest.mark.parametrize("name", ["../adam", "a/b", "a.b", "", "x" * 65, "\x1b[2J", "ä"])
def test_a_state_name_that_could_be_a_path_or_a_command(path: Path, name: str) -> None:
    values = manifest_of(path)
    values["states"] = {name: 3}
    write_manifest(path, values)
    assert_refused(path, "states = .*: must be named by letters, digits, _ and -")


# Numbers


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rows": 2**62, "width": 2**10}, r"4611686018427387904 rows × 1024 float32 are \d+ bytes, more than a file"),
        ({"rows": 2**64}, "18446744073709551616 rows × 4 float32 are .* more than a file can have"),
        ({"rows": 1, "width": 2**22 + 1}, "width = 4194305: must be at most 4194304 of float32"),
        ({"rows": 0}, "rows = 0: must be an integer, at least 1"),
        ({"rows": -60}, "rows = -60: must be an integer, at least 1"),
        ({"rows": 60.0}, "rows = 60.0: must be an integer, at least 1"),
        ({"rows": True}, "rows = True: must be an integer, at least 1"),
        ({"rows": "60"}, "rows = '60': must be an integer, at least 1"),
        ({"rows": None}, "rows = None: must be an integer, at least 1"),
        # A journal has 8 bytes for it, and one is added for every commit.
        ({"generation": 2**63}, "generation = 9223372036854775808: must be 0 or more"),
        ({"generation": 10**4000}, r"generation = 1000.*\.\.\.: must be 0 or more"),
        ({"step": 2**63}, "step = 9223372036854775808: must be null or 0 or more"),
        ({"updates": -1}, "updates = -1: must be 0 or more"),
        ({"commit": "00000000000000AB"}, "commit = .*: must be null or 16 hexadecimal digits"),
        ({"commit": 7}, "commit = 7: must be null or 16 hexadecimal digits"),
        ({"checksums": ["0" * 16] * 2}, "checksums = .*: must be null or 1 times 16 hexadecimal digits"),
        ({"checksums": [7]}, "checksums = .*: must be null or 1 times 16 hexadecimal digits"),
    ],
)
def test_numbers_that_would_overflow_or_are_none(path: Path, changes: dict[str, Any], error: str) -> None:
    write_manifest(path, {**manifest_of(path), **changes})
    assert_refused(path, error)


def test_a_state_wider_than_a_row_may_be(path: Path) -> None:
    with_state_file(path, STATE, width=2**30)
    assert_refused(path, r"states\.adam\.width = 1073741824: must be at most 4194304 of float32")


def test_more_digits_than_python_reads(path: Path) -> None:
    text = path.with_suffix(".json").read_text().replace('"generation": 2', f'"generation": {"9" * 5000}')
    path.with_suffix(".json").write_text(text)
    assert_refused(path, "no JSON: Exceeds the limit")


@pytest.mark.parametrize("byte_order", ["big", "native", "", None, 1])
def test_another_byte_order(path: Path, byte_order: Any) -> None:
    write_manifest(path, {**manifest_of(path), "byte_order": byte_order})
    assert_refused(path, "byte_order: must be 'little'")


# JSON that is no JSON, or means two things


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("NaN", "NaN is no number there"),
        ("Infinity", "Infinity is no number there"),
        ("-Infinity", "-Infinity is no number there"),
        ("1e999", "'1e999' is no number there"),
        ("-1" + "0" * 400 + ".0", r"'-1000.*\.\.\. is no number there"),
    ],
)
def test_numbers_that_json_does_not_have(path: Path, text: str, error: str) -> None:
    """In `provenance`, where any JSON may be: read, they could never be written again."""
    manifest = path.with_suffix(".json").read_text()
    for where, replaced in [('"provenance": {}', '"provenance": {"a": [X]}'), ('"init_std": 0.02', '"init_std": X')]:
        assert where in manifest
        path.with_suffix(".json").write_text(manifest.replace(where, replaced.replace("X", text)))
        assert_refused(path, f"no JSON: {error}")


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ('"rows": 60', '"rows": 60, "rows": 61', "rows"),
        ('"rows": 60', '"rows": 60, "rows": 60', "rows"),
        ('"format_version": 3', '"format_version": 3, "format_version": 4', "format_version"),
        ('"provenance": {}', '"provenance": {"a": {"b": 1, "b": 1}}', "b"),
        (f'"file": "{STATE}"', f'"file": "{STATE}", "file": "../outside.dat"', "file"),
        ('"step": 1', '"step": 1, "\\u0073tep": 1', "step"),
    ],
)
def test_a_name_that_is_there_twice(path: Path, old: str, new: str, name: str) -> None:
    """Of which one reader sees the first, and another the last."""
    text = path.with_suffix(".json").read_text()
    assert old in text
    path.with_suffix(".json").write_text(text.replace(old, new, 1))
    assert_refused(path, f"no JSON: the name '{name}' is there twice")


def test_many_names_of_which_the_last_is_there_twice(path: Path) -> None:
    """Found in one pass: a search of all names for each would take hours."""
    names = ", ".join(f'"n{number}": 0' for number in range(300_000))
    path.with_suffix(".json").write_text(f'{{{names}, "n299999": 1}}')
    assert_refused(path, "no JSON: the name 'n299999' is there twice")


@pytest.mark.parametrize("depth", [65, 600, 990, 100_000])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_json_nested_too_deep(path: Path, depth: int, left: str, right: str) -> None:
    """Some depths could be read and never be written again, so that no commit would succeed any more."""
    nested = left * depth + "1" + right * depth
    text = path.with_suffix(".json").read_text().replace('"provenance": {}', f'"provenance": {{"a": {nested}}}')
    path.with_suffix(".json").write_text(text)
    assert_refused(path, "depth = 66: must be nested at most 64 deep|no JSON: maximum recursion depth exceeded")


def test_json_nested_as_deep_as_it_may_be(path: Path) -> None:
    values = manifest_of(path)
    nested: Any = 1
    for _ in range(62):
        nested = [nested]
    values["provenance"] = {"a": nested}
    write_manifest(path, values)
    table = MMapEmbeddingStorage(60, 4, path)
    table.commit()
    table.close()
    assert manifest_of(path)["provenance"] == {"a": nested}


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "no JSON: Expecting value"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
        ("\ufeff{}".encode(), "no JSON: Unexpected UTF-8 BOM"),
        ('{"rows": 60}'.encode("utf-16"), "'utf-8' codec can't decode"),
        (b"\x00" * 100, "no JSON: Expecting value"),
        (b"{", "no JSON: Expecting property name"),
        (b"[]", r"a manifest is a JSON object, not \[\]"),
        (b'"manifest"', "a manifest is a JSON object, not 'manifest'"),
        (b"null", "a manifest is a JSON object, not None"),
        (b"{}", "format_version = None: this library reads versions 1 to 3"),
        (b'{"format_version": 1e0}', "format_version = 1.0: this library reads"),
        (b'{"format_version": true}', "format_version = True: this library reads"),
        (b'{"format_version": 4}', "format_version = 4: .* a newer release of sense-v2 may read it"),
        (b'{"format_version": "\\u001b[2J"}', r"format_version = '\\x1b\[2J'"),
        (b'{"format_version": "' + b"x" * 10_000 + b'"}', r"format_version = 'x*\.\.\.: "),
    ],
)
def test_what_is_no_manifest(path: Path, raw: bytes, error: str) -> None:
    path.with_suffix(".json").write_bytes(raw)
    assert_refused(path, error)


def test_a_field_that_nobody_knows(path: Path) -> None:
    """A reader that went on would lose it with its first commit."""
    write_manifest(path, {**manifest_of(path), "row_order": "shuffled"})
    assert_refused(path, "manifest has an unknown field 'row_order'")


# Sizes


def test_a_manifest_of_gigabytes(path: Path) -> None:
    with open(path.with_suffix(".json"), "r+b") as file:
        file.truncate(40 * 2**30)
    tracemalloc.start()
    for mode in ("r", "r+"):
        with pytest.raises(ValueError, match=r"json: a manifest has 67108864 bytes at most, this has 42949672960"):
            open_all(path, mode)
    (finding,) = check_table(path).findings
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert finding.text.startswith("a manifest has 67108864 bytes at most")
    assert peak < 2**22


def test_a_left_manifest_of_gigabytes(path: Path) -> None:
    """A kill between the renames of table and manifest leaves the manifest under its temporary name."""
    path.with_suffix(".json").unlink()
    with open(path.with_suffix(".json.tmp"), "wb") as file:
        file.truncate(40 * 2**30)
    tracemalloc.start()
    with pytest.warns(UserWarning, match="has no manifest"):
        MMapEmbeddingStorage(60, 4, path).close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({"text": "x" * 2**26}, r"the manifest would have \d+ bytes, and 67108864 are allowed; keep less"),
        ({"a": float("nan")}, "must be a JSON object: Out of range float values"),
        ({"a": [[[]]]}, ""),
    ],
)
def test_no_manifest_is_written_that_could_not_be_read(path: Path, extra: dict[str, Any], error: str) -> None:
    if not error:
        for _ in range(70):
            extra = {"a": extra}
        error = "depth = 66: must be nested at most 64 deep"
    table = MMapEmbeddingStorage(60, 4, path)
    table.write(torch.tensor([1]), torch.ones(1, 4))
    with pytest.raises(ValueError, match=error):
        table.commit(extra=extra)
    assert manifest_of(path)["generation"] == 2
    table.commit(extra={"a": 1})
    table.close()
    assert (manifest_of(path)["generation"], manifest_of(path)["extra"]) == (3, {"a": 1})
    assert check_table(path).findings == []


def test_the_manifest_of_another_table(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / TABLE
    MMapEmbeddingStorage(240, 1, other).close()
    os.replace(other.with_suffix(".json"), path.with_suffix(".json"))
    before = content(path.parent)
    for mode in ("r", "r+"):
        with pytest.raises(
            ValueError, match=r"describes another table: rows is 240, asked for 60; width is 1, asked"
        ):
            open_all(path, mode)
    assert content(path.parent) == before
    # As long as the other one: checksums tell them apart.
    assert json.loads(path.with_suffix(".json").read_text())["rows"] * 1 * 4 == path.stat().st_size
    assert [finding.kind for finding in check_table(path).findings if finding.is_wrong] == ["checksum"]
