"""A delta's file: read by the safetensors library and by hand, and damaged in every way that the format forbids."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tables import D, N, make, manifest, slow_row_hash

from sense_v2.engram.delta.delta_file import DeltaInfo, Source, read_delta, write_delta
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table_identity import TableIdentity

BASE = TableIdentity(N, D, "float32", "ab" * 32, "block checksums", {"variant": "sense"})
IDS = np.array([3, 9, 40])
ROWS = torch.arange(3 * D, dtype=torch.float32).reshape(3, D)


def write(path, ids=IDS, rows=ROWS, info=None, **states):
    sources = {"rows": Source(rows.shape[1], rows.dtype, lambda part: rows[part])}
    for name, values in states.items():
        sources[f"state.{name}"] = Source(values.shape[1], torch.float32, lambda part, values=values: values[part])
    write_delta(path, info or DeltaInfo(BASE, state_steps=dict.fromkeys(states, 5)), ids, sources)
    return path


def hash_of(ids, tensor, version=3):
    raw = tensor.contiguous().view(torch.uint8).numpy()
    total = sum(slow_row_hash(int(row_id), raw[place].tobytes(), version) for place, row_id in enumerate(ids)) % 2**64
    return f"{total:016x}"


# What it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_safetensors_library_reads_what_the_format_says(tmp_path, dtype):
    rows, state = ROWS.to(dtype), torch.rand(3, 2)
    info = DeltaInfo(BASE, step=4, extra={"note": "é"}, updates=6, state_steps={"adam": 5})
    path = write(tmp_path / "facts.safetensors", rows=rows, info=info, adam=state)
    found = load_file(path)
    assert found.keys() == {"row_ids", "rows", "state.adam"}
    assert found["row_ids"].tolist() == IDS.tolist()
    assert torch.equal(found["rows"], rows)
    assert torch.equal(found["state.adam"], state)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("sense-engram delta", "2")
    places = b"".join(struct.pack("<q", row_id) for row_id in IDS)
    ids_hash = sum(slow_row_hash(place, places[8 * place : 8 * place + 8]) for place in range(3)) % 2**64
    assert json.loads(metadata["delta"]) == {
        "base": {
            "rows": N,
            "width": D,
            "dtype": "float32",
            "digest": "ab" * 32,
            "digest_of": "block checksums",
            "provenance": {"variant": "sense"},
        },
        "checksums": {
            "row_ids": f"{ids_hash:016x}",
            "rows": hash_of(IDS, rows),
            "state.adam": hash_of(IDS, state),
        },
        "step": 4,
        "extra": {"note": "é"},
        "updates": 6,
        "state_steps": {"adam": 5},
    }
    delta = read_delta(path)
    assert delta.info == info
    assert torch.equal(delta.rows_UD, rows)
    assert torch.equal(delta.states["adam"], state)
    assert delta.row_ids_U.tolist() == IDS.tolist()


def test_every_tensor_begins_at_a_multiple_of_its_items_bytes(tmp_path):
    info = DeltaInfo(TableIdentity(N, 1, "bfloat16", "ab" * 32, "block checksums"), state_steps={"a": 0})
    raw = write(tmp_path / "d", rows=ROWS[:, :1].bfloat16(), info=info, a=torch.rand(3, 1)).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, item_bytes in (("row_ids", 8), ("state.a", 4), ("rows", 2)):
        assert (8 + length + header[name]["data_offsets"][0]) % item_bytes == 0


def test_a_delta_of_no_rows_and_one_of_many_parts_are_deltas(tmp_path, monkeypatch):
    empty = read_delta(write(tmp_path / "empty", ids=IDS[:0], rows=ROWS[:0]))
    assert len(empty.row_ids_U) == 0
    assert empty.rows_UD.shape == (0, D)
    whole = write(tmp_path / "whole").read_bytes()
    monkeypatch.setattr("sense_v2.engram.delta.delta_file.PART_BYTES", 4 * D)
    assert write(tmp_path / "parts").read_bytes() == whole
    assert torch.equal(read_delta(tmp_path / "parts").rows_UD, ROWS)


# What it names


def test_a_table_is_named_by_its_manifests_checksums_and_a_copy_is_the_same_table(tmp_path):
    table = make(tmp_path / "a.dat", provenance={"variant": "sense"})
    named = table.identity()
    text = "".join(manifest(tmp_path / "a.dat")["checksums"])
    assert named == TableIdentity(
        N, D, "float32", hashlib.sha256(text.encode()).hexdigest(), "block checksums", {"variant": "sense"}
    )
    table.commit()  # of no row
    assert table.identity() == named
    table.write(torch.tensor([1]), torch.ones(1, D))
    with pytest.raises(ValueError, match=r"updates since its last commit; commit\(\)"):
        table.identity()
    table.commit()
    assert table.identity().digest != named.digest
    table.close()


def test_a_table_without_checksums_is_told_how_to_get_them(tmp_path):
    ROWS.numpy().tofile(tmp_path / "raw.dat")
    with pytest.warns(UserWarning, match="no manifest"):
        table = MMapEmbeddingStorage(3, D, tmp_path / "raw.dat", mode="r")
    with pytest.raises(ValueError, match="sense-engram verify --repair"):
        OverlayStorage(table)
    table.close()


# What is refused


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([9, 3, 40], "row id 9 comes before 3"),
        ([3, 3, 40], "row id 3 comes twice"),
        ([-1, 3, 40], "row id -1: its base has rows 0 to 49"),
        ([3, 9, N], "row id 50: its base has rows 0 to 49"),
    ],
)
def test_ids_that_no_delta_may_have_are_neither_written_nor_read(tmp_path, ids, text):
    path = write(tmp_path / "d")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=text):
        write(path, ids=np.array(ids))
    assert path.read_bytes() == before
    start = before.index(IDS.astype("<i8").tobytes())
    path.write_bytes(before[:start] + np.array(ids).astype("<i8").tobytes() + before[start + 24 :])
    with pytest.raises(ValueError, match=f"d: {text}"):
        read_delta(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_neither_written_nor_read(tmp_path, value):
    rows = ROWS.clone()
    rows[1, 2] = value
    with pytest.raises(ValueError, match="row 9 has NaN or infinite values in rows, 1 rows"):
        write(tmp_path / "d", rows=rows)
    assert list(tmp_path.iterdir()) == []
    raw = write(tmp_path / "d").read_bytes()
    start = raw.index(ROWS.numpy().tobytes())
    (tmp_path / "d").write_bytes(raw[:start] + rows.numpy().tobytes() + raw[start + 3 * D * 4 :])
    with pytest.raises(ValueError, match="row 9 has NaN or infinite values"):
        read_delta(tmp_path / "d")


def test_a_flipped_bit_is_found_in_ids_rows_and_states(tmp_path):
    raw = write(tmp_path / "d", adam=torch.rand(3, 2)).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name in ("row_ids", "rows", "state.adam"):
        at = 8 + length + header[name]["data_offsets"][0]
        (tmp_path / "d").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(ValueError, match=f"{name} has checksum .* the file is damaged"):
            read_delta(tmp_path / "d")


def test_a_cut_file_is_refused_at_every_length(tmp_path):
    raw = write(tmp_path / "d").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "d").write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"/d: "):
            read_delta(tmp_path / "d")
    (tmp_path / "d").write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match="bytes that no tensor owns"):
        read_delta(tmp_path / "d")


def forged(path, change):
    """The file with another header: `change` gets it and the description, as objects."""
    raw = write(path, adam=torch.zeros(3, 2)).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    delta = json.loads(header["__metadata__"]["delta"])
    change(header, delta)
    if "__metadata__" in header and "delta" in header["__metadata__"]:
        header["__metadata__"]["delta"] = json.dumps(delta)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_a_delta_of_version_1_is_read_and_checked_with_its_own_hashes(tmp_path):
    places = b"".join(struct.pack("<q", row_id) for row_id in IDS)
    ids_hash = sum(slow_row_hash(place, places[8 * place : 8 * place + 8], 2) for place in range(3)) % 2**64
    sums = {name: hash_of(IDS, values, 2) for name, values in (("rows", ROWS), ("state.adam", torch.zeros(3, 2)))}

    def write_as_1(header, delta):
        header["__metadata__"]["format_version"] = "1"
        delta["checksums"] = {"row_ids": f"{ids_hash:016x}", **sums}

    forged(tmp_path / "d", write_as_1)
    assert torch.equal(read_delta(tmp_path / "d").rows_UD, ROWS)
    sums["rows"] = "0" * 16
    forged(tmp_path / "d", write_as_1)
    with pytest.raises(ValueError, match="rows has checksum"):
        read_delta(tmp_path / "d")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h, d: h.pop("__metadata__"), "is no delta of a table"),
        (lambda h, d: h["__metadata__"].update(format="pt"), "is no delta of a table"),
        (lambda h, d: h["__metadata__"].update(format_version="3"), "a delta of version '3'"),
        (lambda h, d: h["__metadata__"].pop("delta"), "no JSON"),
        (lambda h, d: d.update(more=1), "must be an object of base, checksums"),
        (lambda h, d: d.pop("step"), "must be an object of base, checksums"),
        (lambda h, d: d.update(step=-1), "step = -1"),
        (lambda h, d: d.update(updates=True), "updates = True"),
        (lambda h, d: d.update(extra=[]), "extra must be an object"),
        (lambda h, d: d.update(state_steps={}), "states are"),
        (lambda h, d: d.update(state_steps={"adam": "x"}), "state_steps must be integers"),
        (lambda h, d: d["base"].pop("digest"), "base must be an object"),
        (lambda h, d: d["base"].update(digest="ab"), "base.digest"),
        (lambda h, d: d["base"].update(digest_of="luck"), "base.digest_of = 'luck'"),
        (lambda h, d: d["base"].update(dtype="float7"), "base.dtype = 'float7'"),
        (lambda h, d: d["base"].update(rows=0), "base.rows = 0"),
        (lambda h, d: d["base"].update(rows=40), "row id 40: its base has rows 0 to 39"),
        (lambda h, d: d["base"].update(width=D + 1), r"rows are F32 \[3, 8\], expected F32, F16, BF16 \[3, 9\]"),
        (lambda h, d: d["base"].update(provenance=None), "base.provenance"),
        (lambda h, d: d["checksums"].pop("rows"), "checksums must be of its tensors"),
        (lambda h, d: d["checksums"].update(rows=None), "rows has checksum"),
        (lambda h, d: h["row_ids"].update(dtype="U64"), "row_ids are U64"),
        (lambda h, d: h["rows"].update(dtype="I32"), "rows are I32"),
        (lambda h, d: h["rows"].update(shape=[2, 12]), r"rows are F32 \[2, 12\]"),
        (lambda h, d: h["state.adam"].update(shape=[6, 1]), "state.adam is F32"),
        (lambda h, d: h.update({"state.a/b": h.pop("state.adam")}), "tensor 'state.a/b' isn't known"),
        (lambda h, d: h.update(other=h.pop("rows")), "it has no tensor rows"),
    ],
)
def test_what_the_format_forbids_is_an_error_that_names_file_and_field(tmp_path, change, text):
    forged(tmp_path / "d", change)
    with pytest.raises(ValueError, match=text) as error:
        read_delta(tmp_path / "d")
    assert str(tmp_path / "d") in str(error.value)


def test_what_isnt_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no delta there"):
        read_delta(tmp_path / "d")
