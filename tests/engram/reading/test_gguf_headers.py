"""Headers of GGUF files: what the package gguf writes and reads, and what is refused before it is believed."""

import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import rows_of, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sense_v2.engram.reading import gguf_headers
from sense_v2.engram.reading.gguf_headers import TENSOR_TYPES, StringArray, find_gguf, is_gguf, read_gguf_header

METADATA = {
    "a.number": 7,
    "a.text": "words",
    "tokenizer.ggml.tokens": ["one", "two", "three"],
    "a.list": [1, 2**63 + 1],
}
TENSORS = {
    "first.weight": ("F32", (3, 5), bytes(60)),
    "table.weight": ("Q4_0", (7, 64), rows_of("Q4_0", 7, 64).tobytes()),
    "last.weight": ("F16", (4,), bytes(8)),
}


def test_types_are_those_of_gguf():
    theirs = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    # The package and ggml's code give Q8_1 other sizes; no file has it.
    assert {number: kind for number, kind in theirs.items() if kind[0] != "Q8_1"} == TENSOR_TYPES


def test_what_gguf_writes_is_read(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", TENSORS, METADATA)
    metadata, spans = read_gguf_header(file)
    assert {key: metadata[key] for key in ("a.number", "a.text", "general.architecture")} == {
        "a.number": 7,
        "a.text": "words",
        "general.architecture": "llama",
    }
    assert metadata["tokenizer.ggml.tokens"] == StringArray(3)
    assert metadata["a.list"].tolist() == [1, 2**63 + 1]
    raw = file.read_bytes()
    assert list(spans) == list(TENSORS)
    for theirs in gguf.GGUFReader(file).tensors:
        span = spans[theirs.name]
        assert (span.dtype, list(span.shape)) == (theirs.tensor_type.name, theirs.shape.tolist()[::-1])
        assert (span.path, span.offset, span.num_bytes) == (file, theirs.data_offset, theirs.n_bytes)
        assert raw[span.offset : span.offset + span.num_bytes] == TENSORS[theirs.name][2]


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_tensors_begin_at_the_alignment(tmp_path, alignment):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name in ("a", "b"):
        writer.add_tensor(name, np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for span in read_gguf_header(path)[1].values():
        assert span.offset % alignment == 0
        assert path.read_bytes()[span.offset :][:12] == np.arange(3, dtype=np.float32).tobytes()


def test_a_header_with_a_tokenizer_is_read_fast_and_in_little_memory(tmp_path):
    tokens = [f"token {number}" for number in range(250_000)]
    many = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": tokens}
    (file,) = write_gguf(tmp_path / "m.gguf", TENSORS, many)
    tracemalloc.start()
    began = time.perf_counter()
    metadata, _ = read_gguf_header(file)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert metadata["tokenizer.ggml.merges"] == StringArray(250_000)
    assert peak < 5 << 20
    assert seconds < 30  # tracing makes it several times slower


@pytest.mark.parametrize("part_bytes", [8, 9, 50, 1000])
def test_texts_are_gone_through_in_parts_of_any_size(tmp_path, monkeypatch, part_bytes):
    texts = ["", "a" * 100, *(f"text {number}" * (number % 5) for number in range(200)), "b" * 2000, ""]
    (file,) = write_gguf(tmp_path / "m.gguf", TENSORS, {"k": texts, "after.number": 5, "l": ["x"], **METADATA})
    monkeypatch.setattr(gguf_headers, "PART_BYTES", part_bytes)
    metadata, spans = read_gguf_header(file)
    assert (metadata["k"], metadata["after.number"], metadata["l"]) == (StringArray(204), 5, StringArray(1))
    assert list(spans) == list(TENSORS)
    path = tmp_path / "cut.gguf"
    for length in range(100, file.read_bytes().index(b"after.number"), 37):
        path.write_bytes(file.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            read_gguf_header(path)


# Several files


def split(folder: Path) -> list[Path]:
    return write_gguf(folder / "m.gguf", TENSORS, METADATA, most=1)


def test_a_split_model_is_one(tmp_path):
    files = split(tmp_path)
    assert [file.name for file in files] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for place in (*files, tmp_path):
        model = find_gguf(place)
        assert [(span.name, span.path) for span in model.tensors.values()] == list(zip(TENSORS, files, strict=True))
        assert model.metadata["a.number"] == 7


def test_a_part_that_is_missing_is_named(tmp_path):
    files = split(tmp_path)
    files[1].unlink()
    for place in (files[0], files[2], tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is one of 3 parts, and m-00002-of-00003\.gguf isn't there"):
            find_gguf(place)


def test_parts_under_other_names_are_refused(tmp_path):
    files = split(tmp_path)
    os.rename(files[0], tmp_path / "x")
    os.rename(files[1], files[0])
    os.rename(tmp_path / "x", files[1])
    with pytest.raises(
        ValueError, match=r"by its name it is part 1 of 3, and by its header part 1 \(counted from 0\)"
    ):
        find_gguf(files[0])
    os.rename(files[0], tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match=r"by its name it is part 1 of 1, and by its header part 1 .* of 3"):
        find_gguf(tmp_path / "renamed.gguf")


def test_the_number_of_all_tensors_is_held_against_the_parts(tmp_path):
    files = split(tmp_path)
    raw = files[0].read_bytes()
    at = raw.index(b"split.tensors.count") + len("split.tensors.count") + 4
    files[0].write_bytes(raw[:at] + struct.pack("<i", 4) + raw[at + 4 :])
    with pytest.raises(ValueError, match="the 3 parts have 3 tensors, and it says 4"):
        find_gguf(files[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    files = write_gguf(
        tmp_path / "m.gguf", {"a.weight": TENSORS["first.weight"], "b.weight": TENSORS["first.weight"]}, most=1
    )
    files[1].write_bytes(files[1].read_bytes().replace(b"b.weight", b"a.weight"))
    with pytest.raises(ValueError, match=r"a\.weight is in .*m-00001-of-00002\.gguf and in .*m-00002-of-00002\.gguf"):
        find_gguf(files[0])


def test_folders(tmp_path):
    assert not is_gguf(tmp_path)
    write_gguf(tmp_path / "m.gguf", TENSORS)
    assert is_gguf(tmp_path)
    assert is_gguf(tmp_path / "m.gguf")
    assert list(find_gguf(tmp_path).tensors) == list(TENSORS)
    write_gguf(tmp_path / "mmproj.gguf", TENSORS)
    with pytest.raises(ValueError, match=r"has 2 GGUF models: m\.gguf, mmproj\.gguf\. Name the file"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_gguf(tmp_path)


# Damaged and forged


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, raw: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + raw


def tensor(name: bytes, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def forged(*, pairs=(), tensors=(), data=b"", num_pairs=None, num_tensors=None, version=3, magic=b"GGUF"):
    """A header in GGUF's form, by struct alone, and behind it the tensors' bytes."""
    counts = len(tensors) if num_tensors is None else num_tensors, len(pairs) if num_pairs is None else num_pairs
    raw = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + data


ONE = tensor(b"t", [8, 4])
HUGE = 2**64 - 1


def test_what_is_forged_here_would_work(tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(forged(pairs=[pair(b"k", 4, struct.pack("<I", 5))], tensors=[ONE], data=bytes(128)))
    metadata, spans = read_gguf_header(path)
    assert (metadata, spans["t"].shape) == ({"k": 5}, (4, 8))
    assert gguf.GGUFReader(path).tensors[0].n_bytes == 128


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "no GGUF file"),
        (b"GGUF", "no GGUF file"),
        (forged(magic=b"GGJT"), "no GGUF file"),
        (forged(version=1), "GGUF version 1; versions 2 and 3"),
        (forged(version=3 << 24), r"GGUF version 50331648 \(it is big-endian\)"),
        (forged(num_tensors=HUGE), f"says that {HUGE} descriptions of tensors follow"),
        (forged(num_pairs=HUGE), f"says that {HUGE} keys follow"),
        (forged(num_pairs=1), "says that"),
        (forged(pairs=[struct.pack("<Q", HUGE)]), "says that|at most 65535 are allowed"),
        (forged(pairs=[pair(b"k", 8, struct.pack("<Q", 5 << 30)), bytes(64)]), "k of 5368709120 bytes; at most"),
        (forged(pairs=[pair(b"k", 8, struct.pack("<Q", 90_000_000)), bytes(64)]), "90000000 bytes of k follow"),
        (forged(pairs=[string(b"k" * 70_000)]), "a key of 70000 bytes; at most 65535"),
        (forged(pairs=[pair(b"\xff", 4, bytes(4))]), "a key isn't UTF-8"),
        (forged(pairs=[pair(b"k", 8, string(b"\xff"))]), "k isn't UTF-8"),
        (forged(pairs=[pair(b"k", 13, bytes(64))]), "k is of type 13, which isn't known"),
        (forged(pairs=[pair(b"k", 4, bytes(4))] * 2), "the key k is there twice"),
        (forged(pairs=[pair(b"k", 9, struct.pack("<IQ", 8, HUGE)), bytes(64)]), f"{HUGE} texts of k follow"),
        (forged(pairs=[pair(b"k", 9, struct.pack("<IQ", 10, HUGE)), bytes(64)]), f"{HUGE} numbers of k follow"),
        (forged(pairs=[pair(b"k", 9, struct.pack("<IQ", 10, 2**61)), bytes(64)]), "numbers of k follow"),
        (forged(pairs=[pair(b"k", 9, struct.pack("<IQ", 9, 1)), bytes(64)]), "k is a list of type 9"),
        (forged(pairs=[pair(b"general.alignment", 4, struct.pack("<I", 0))]), "must be a power of two"),
        (forged(pairs=[pair(b"general.alignment", 4, struct.pack("<I", 24))]), "must be a power of two"),
        (forged(pairs=[pair(b"general.alignment", 8, string(b"32"))]), "must be a power of two"),
        (forged(tensors=[tensor(b"t" * 65, [8])], data=bytes(32)), "a tensor's name of 65 bytes; at most 64"),
        (forged(tensors=[tensor(b"t", [1] * 5)], data=bytes(32)), "t has 5 dimensions"),
        (forged(tensors=[string(b"t") + struct.pack("<I", 2**32 - 1) + bytes(64)]), "t has 4294967295 dimensions"),
        (forged(tensors=[tensor(b"t", [HUGE, 4])]), "more than a file can have"),
        (forged(tensors=[tensor(b"t", [2**32, 2**32])]), "more than a file can have"),
        (forged(tensors=[tensor(b"t", [2**62, 4, 4])]), "more than a file can have"),
        (forged(tensors=[tensor(b"t", [8], offset=2**63)]), "more than a file can have"),
        (forged(tensors=[ONE, ONE], data=bytes(256)), "t is there twice"),
        (forged(tensors=[ONE], data=bytes(127)), "was cut short"),
        (forged(tensors=[ONE], data=bytes(160)), "has bytes that no tensor owns"),
        (forged(tensors=[tensor(b"t", [8, 4], offset=32)], data=bytes(160)), "leaves a gap before it"),
        (forged(tensors=[tensor(b"t", [8, 4], offset=8)], data=bytes(160)), "isn't at a multiple of 32"),
        (forged(tensors=[ONE, tensor(b"u", [8, 4], offset=96)], data=bytes(256)), "u overlaps the tensor before it"),
        (forged(tensors=[ONE, tensor(b"u", [8, 4], offset=160)], data=bytes(320)), "u leaves a gap before it"),
        (forged(tensors=[tensor(b"t", [40, 4], 2)], data=bytes(96)), "rows of 40 values, .* blocks of 32, as Q4_0"),
        (forged(tensors=[tensor(b"t", [32, 2**57], 2)], data=bytes(96)), "was cut short"),
    ],
)
def test_headers_that_lie_are_refused_at_once(tmp_path, raw, text):
    path = tmp_path / "t.gguf"
    path.write_bytes(raw)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=text) as error:
        read_gguf_header(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000
    assert time.perf_counter() - began < 2


def test_a_type_that_is_not_known_is_no_obstacle_to_the_tensors_beside_it(tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(forged(tensors=[tensor(b"t", [8], 77), tensor(b"u", [8], offset=64)], data=bytes(96)))
    spans = read_gguf_header(path)[1]
    assert (spans["t"].dtype, spans["u"].dtype) == ("type 77", "F32")
    tensors = [tensor(b"s", [8]), tensor(b"t", [8], 77, offset=32), tensor(b"u", [8], offset=0)]
    path.write_bytes(forged(tensors=tensors, data=bytes(96)))
    with pytest.raises(ValueError, match="overlaps the tensor before it"):
        read_gguf_header(path)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ValueError, match=r"pipe\.gguf: a pipe or a device"):
        find_gguf(tmp_path / "pipe.gguf")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        find_gguf(tmp_path / "none.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    (file,) = write_gguf(tmp_path_factory.mktemp("whole") / "m.gguf", TENSORS, METADATA)
    return file.read_bytes()


def read_or_refused(path: Path, raw: bytes) -> None:
    """Refused by name, or what the package gguf reads of the same bytes."""
    path.write_bytes(raw)
    try:
        _, spans = read_gguf_header(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return
    if not {span.dtype for span in spans.values()} <= {name for name, *_ in TENSOR_TYPES.values()}:
        return  # a type that the package doesn't know either, and stops at
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(spans) == set(theirs)
    for name, span in spans.items():
        found = theirs[name]
        assert (span.dtype, list(span.shape)) == (found.tensor_type.name, found.shape.tolist()[::-1])
        assert (span.offset, span.num_bytes) == (found.data_offset, found.n_bytes)


def test_every_length_that_it_can_be_cut_to_is_refused(whole, tmp_path):
    path = tmp_path / "m.gguf"
    # The last tensor has 8 bytes of its 32.
    for length in range(len(whole) - 24):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            read_gguf_header(path)


@given(at=st.floats(0, 1, exclude_max=True), new=st.integers(0, 255))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_byte_that_was_changed_gives_no_other_tensors_than_gguf_reads(whole, tmp_path, at, new):
    place = int(at * len(whole))
    read_or_refused(tmp_path / "m.gguf", whole[:place] + bytes([new]) + whole[place + 1 :])


@given(st.binary(max_size=200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_behind_the_magic(tmp_path, raw):
    read_or_refused(tmp_path / "m.gguf", b"GGUF\x03\0\0\0" + raw)
