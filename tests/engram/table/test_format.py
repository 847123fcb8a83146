"""format.py against docs/format.md: sizes and names by hand, manifests that must be refused, provenance."""

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sense_v2.engram.table.format import (
    MAX_FILE_BYTES,
    ROW_DTYPES,
    Manifest,
    StateEntry,
    as_json_object,
    file_bytes,
    journal_name,
    lock_name,
    manifest_name,
    merge_provenance,
    provenance_differences,
    row_dtype,
    state_file_name,
)

MINIMAL = {"format_version": 2, "byte_order": "little", "rows": 5, "width": 4, "dtype": "float32"}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=4)


FIELDS = [*MINIMAL, "provenance", "states", "step", "generation", "commit", "extra", "updates", "checksums"]


def manifest_text(**changes: Any) -> str:
    return json.dumps({**MINIMAL, **changes})


# Row types


@pytest.mark.parametrize(("name", "item_bytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_row_dtype_by_name_and_by_torch_dtype(name: str, item_bytes: int) -> None:
    found = row_dtype(name)
    assert found is row_dtype(getattr(torch, name))
    assert (found.item_bytes, found.numpy.itemsize, found.torch.itemsize) == (item_bytes,) * 3


def test_the_values_are_little_endian() -> None:
    raw = struct.pack("<f", 1.5), struct.pack("<e", 1.5), struct.pack("<f", 1.5)[2:]
    for name, value_bytes in zip(ROW_DTYPES, raw, strict=True):
        array = np.frombuffer(value_bytes, dtype=row_dtype(name).numpy)
        assert torch.from_numpy(array.copy()).view(row_dtype(name).torch).item() == 1.5


@pytest.mark.parametrize("dtype", ["float64", "Float32", "", None, 32, torch.float64, torch.int32])
def test_another_dtype_is_refused_with_the_allowed_ones(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype = .*: a row's values are float32, float16, bfloat16"):
        row_dtype(dtype)


# Sizes and names


def test_file_bytes() -> None:
    assert file_bytes(1, 1, "bfloat16") == 2
    assert file_bytes(10_000_000, 1024, "float32") == 40_960_000_000
    assert file_bytes(2**61 - 1, 1, "float32") == 2**63 - 4


@pytest.mark.parametrize("rows", [0, -1, 1.0, True, "5", None])
def test_file_bytes_refuses_what_is_no_count(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"rows = .*: must be an integer, at least 1"):
        file_bytes(rows, 4, "float32")
    with pytest.raises(ValueError, match=r"width = .*: must be an integer, at least 1"):
        file_bytes(4, rows, "float32")


@given(st.integers(1, 2**70), st.integers(1, 2**70), st.sampled_from(list(ROW_DTYPES)))
def test_file_bytes_never_wraps(rows: int, width: int, dtype: str) -> None:
    exact = rows * width * {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    if exact < 2**63:
        assert file_bytes(rows, width, dtype) == exact
    else:
        with pytest.raises(ValueError, match=f"are {exact} bytes, more than a file can have"):
            file_bytes(rows, width, dtype)


@pytest.mark.parametrize(
    ("table", "stem"),
    [
        ("engram_table.dat", "engram_table"),
        ("a.b.dat", "a.b"),
        ("table", "table"),
        (".hidden", ".hidden"),
        ("t.", "t"),
    ],
)
def test_names(table: str, stem: str) -> None:
    assert manifest_name(table) == f"{stem}.json"
    assert state_file_name(table, "adam") == f"{stem}.adam.dat"
    assert journal_name(table) == f"{stem}.journal"
    assert lock_name(table) == f"{stem}.lock"


@pytest.mark.parametrize("suffix", ["json", "journal", "lock"])
def test_a_table_cannot_have_the_name_of_another_of_its_files(suffix: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'t\.{suffix}': \.{suffix} is the suffix of another of its files; call the table t\.dat"
    ):
        manifest_name(f"t.{suffix}")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "ä", "a" * 65, "a\n", None, 3])
def test_a_state_name_that_could_be_a_path_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="state name"):
        state_file_name("engram_table.dat", name)


# Manifest


def test_the_manifests_golden_text() -> None:
    manifest = Manifest(
        rows=5,
        width=4,
        dtype="bfloat16",
        init_seed=7,
        init_std=0.02,
        provenance={"variant": "sense"},
        generation=3,
        step=120,
        states={"adam": StateEntry("engram_table.adam.dat", 8, step=119, checksums=["00000000000000ff"])},
        commit="0123456789abcdef",
        extra={"loss": 2.5},
        updates=121,
        checksums=["fedcba9876543210"],
    )
    assert manifest.commit_number == 0x0123456789ABCDEF
    assert json.loads(manifest.to_json()) == {
        "format_version": 3,
        "byte_order": "little",
        "rows": 5,
        "width": 4,
        "dtype": "bfloat16",
        "init_seed": 7,
        "init_std": 0.02,
        "provenance": {"variant": "sense"},
        "generation": 3,
        "step": 120,
        "states": {
            "adam": {
                "file": "engram_table.adam.dat",
                "width": 8,
                "dtype": "float32",
                "step": 119,
                "checksums": ["00000000000000ff"],
            }
        },
        "commit": "0123456789abcdef",
        "extra": {"loss": 2.5},
        "updates": 121,
        "checksums": ["fedcba9876543210"],
    }
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.table_bytes == 40


def test_what_a_manifest_may_leave_out() -> None:
    manifest = Manifest.from_json(json.dumps(MINIMAL))
    assert manifest == Manifest(5, 4, "float32")
    assert (manifest.generation, manifest.step, manifest.provenance, manifest.states) == (0, None, {}, {})
    assert (manifest.commit, manifest.extra, manifest.updates, manifest.checksums) == (None, {}, 0, None)
    assert manifest.commit_number == 0


def test_a_manifest_of_version_1_is_read_and_written_as_the_latest() -> None:
    text = """{
      "format_version": 1, "byte_order": "little", "rows": 5, "width": 4, "dtype": "bfloat16",
      "init_seed": 7, "init_std": 0.02, "provenance": {"variant": "sense"}, "generation": 3, "step": 120,
      "states": {"adam": {"file": "engram_table.adam.dat", "width": 8, "dtype": "float32", "step": 119}}
    }"""
    manifest = Manifest.from_json(text)
    assert manifest == Manifest(
        5,
        4,
        "bfloat16",
        init_seed=7,
        init_std=0.02,
        provenance={"variant": "sense"},
        generation=3,
        step=120,
        states={"adam": StateEntry("engram_table.adam.dat", 8, step=119)},
    )
    written = json.loads(manifest.to_json())
    assert (written["format_version"], written["commit"], written["checksums"]) == (3, None, None)


def test_bytes_of_a_row_in_each_file() -> None:
    manifest = Manifest(5, 4, "bfloat16", states={"adam": StateEntry("t.adam.dat", 8), "sum": StateEntry("s", 1)})
    assert manifest.row_bytes_of("t.dat") == {"t.dat": 8, "t.adam.dat": 32, "s": 4}


@given(json_objects, st.integers(0, 2**63 - 1), st.none() | st.integers(0, 2**40))
def test_a_manifest_comes_back_as_it_was_written(
    provenance: dict[str, Any], generation: int, step: int | None
) -> None:
    manifest = Manifest(1, 1, "float16", provenance=provenance, generation=generation, step=step)
    assert Manifest.from_json(manifest.to_json()) == manifest


STATE = {"file": "t.adam.dat", "width": 2}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", r"a manifest is a JSON object, not \[\]"),
        ("null", "a manifest is a JSON object, not None"),
        ("{}", "format_version = None: this library reads versions 1 to 3"),
        (manifest_text(format_version=4, new_field=1), "format_version = 4: .*a newer release"),
        (manifest_text(format_version=True), "format_version = True"),
        (manifest_text(format_version="1"), "format_version = '1'"),
        (manifest_text(byte_order="big"), "byte_order: must be 'little'"),
        (json.dumps({k: v for k, v in MINIMAL.items() if k != "rows"}), "manifest has no field 'rows'"),
        (manifest_text(row=5), "manifest has an unknown field 'row'"),
        (manifest_text(rows=0), "rows = 0: must be an integer, at least 1"),
        (manifest_text(rows=2.0), "rows = 2.0"),
        (manifest_text(rows="5"), "rows = '5'"),
        (manifest_text(width=-1), "width = -1"),
        (manifest_text(width=None), "width = None"),
        (manifest_text(rows=2**62), f"are {2**62 * 16} bytes, more than a file can have"),
        (manifest_text(dtype="float8"), "dtype = 'float8': must be float32, float16, bfloat16"),
        (manifest_text(dtype=["float32"]), "dtype = "),
        (manifest_text(init_seed=-1), "init_seed = -1"),
        (manifest_text(init_std=-0.5), "init_std = -0.5"),
        (manifest_text(init_std=float("nan")), "no JSON: NaN is no number"),
        (manifest_text(init_std=True), "init_std = True"),
        (manifest_text(provenance=[]), r"provenance = \[\]: must be an object"),
        (manifest_text(generation=-1), "generation = -1"),
        (manifest_text(generation=1.5), "generation = 1.5"),
        (manifest_text(step="7"), "step = '7'"),
        (manifest_text(states=[]), r"states = \[\]: must be an object"),
        (manifest_text(states={"adam": 1}), "states.adam = 1: must be an object"),
        (manifest_text(states={"../adam": STATE}), "states = '../adam'"),
        (manifest_text(states={"adam": {"file": "t.adam.dat"}}), "states.adam has no field 'width'"),
        (manifest_text(states={"adam": {**STATE, "rows": 1}}), "states.adam has an unknown field 'rows'"),
        (manifest_text(states={"adam": {**STATE, "width": 0}}), "width = 0"),
        (manifest_text(states={"adam": {**STATE, "dtype": "float16"}}), "states.adam.dtype = 'float16'"),
        (manifest_text(states={"adam": {**STATE, "step": -1}}), "states.adam.step = -1"),
        (manifest_text(states={"a": STATE, "b": STATE}), "states = .*: must be one file each"),
        (manifest_text(format_version=0), "format_version = 0"),
        *(
            (manifest_text(commit=commit), "commit = .*: must be null or 16 hexadecimal digits")
            for commit in ("", "0" * 15, "0" * 17, "0123456789ABCDEF", "g" * 16, "0" * 16 + "\n", 5, ["0" * 16])
        ),
        (manifest_text(extra=[]), r"extra = \[\]: must be an object"),
        (manifest_text(extra=None), "extra = None: must be an object"),
        (manifest_text(updates=-1), "updates = -1"),
        (manifest_text(updates=True), "updates = True"),
        *(
            (manifest_text(checksums=sums), "checksums = .*: must be null or 1 times 16 hexadecimal digits")
            for sums in ([], ["0" * 16] * 2, ["0" * 15], [7], "0" * 16, {"0" * 16: 1}, 7)
        ),
        (manifest_text(rows=4097, checksums=["0" * 16]), "checksums = .*: must be null or 2 times"),
        (manifest_text(states={"adam": {**STATE, "checksums": []}}), r"states\.adam\.checksums = \[\]"),
        *(
            (manifest_text(states={"adam": {**STATE, "file": file}}), "no name of another of the table's files")
            for file in ("t.json", "t.journal", "t.lock", "t.json.tmp")
        ),
        *(
            (manifest_text(states={"adam": {**STATE, "file": file}}), "a plain file name")
            for file in ("../t.dat", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", 3, None, ["t.adam.dat"])
        ),
    ],
)
def test_a_manifest_that_must_be_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Manifest.from_json(text)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_manifest_is_read_or_refused_by_value_error(changes: dict[str, Any]) -> None:
    try:
        manifest = Manifest.from_json(manifest_text(**changes))
    except ValueError:
        return
    assert manifest.table_bytes <= MAX_FILE_BYTES


# Provenance


def test_provenance_is_compared_where_both_have_a_key() -> None:
    recorded = {"seed": 0, "map": {"size": 3, "sha256": "aa"}, "orders": [2, 3], "old": 1}
    assert provenance_differences(recorded, recorded) == []
    assert provenance_differences(recorded, {}) == []
    assert provenance_differences(recorded, {"new": 1, "map": {"new": 2}}) == []
    given_ = {"seed": 1, "map": {"size": 3, "sha256": "bb"}, "orders": [3, 2]}
    assert provenance_differences(recorded, given_) == [
        ("seed", 0, 1),
        ("map.sha256", "aa", "bb"),
        ("orders", [2, 3], [3, 2]),
    ]
    assert provenance_differences(recorded, {"map": "aa"}) == [("map", recorded["map"], "aa")]
    assert provenance_differences({"causal": True}, {"causal": 1}) == [("causal", True, 1)]


@given(json_objects, json_objects)
def test_what_was_merged_agrees_with_what_was_recorded(recorded: dict[str, Any], given_: dict[str, Any]) -> None:
    merged = merge_provenance(recorded, given_)
    assert provenance_differences(merged, recorded) == []
    assert set(merged) == set(recorded) | set(given_)
    if not provenance_differences(recorded, given_):
        assert provenance_differences(merged, given_) == []


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object(), np.int64(3)])
def test_provenance_must_be_json(value: Any) -> None:
    with pytest.raises(ValueError, match="provenance must be a JSON object"):
        as_json_object({"key": value})
