"""Headers whose numbers ask for more work than a file of their size could mean."""

import json
import struct
import time
from pathlib import Path

import pytest

from sense_v2.engram.reading.safetensors_headers import read_header
from sense_v2.engram.table.format import Manifest


def write(path: Path, header: str) -> Path:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    return path


def entry(shape: str, begin: str = "0", end: str = "4") -> str:
    return f'{{"t": {{"dtype": "U8", "shape": {shape}, "data_offsets": [{begin}, {end}]}}}}'


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (entry(json.dumps([2**62 + 1] * 40_000)), "entry for t is damaged"),
        (entry(json.dumps([1] * 65)), "entry for t is damaged"),
        (entry(json.dumps([2**62] * 64)), "more bytes than a file can have, but 4 by its offsets"),
        (entry("[" + "9" * 700_000 + "]"), "no JSON"),
        (entry("[4]", end="1" + "0" * 5_000), "no JSON"),
    ],
)
def test_numbers_are_bounded_before_they_are_multiplied(tmp_path: Path, header: str, text: str) -> None:
    path = write(tmp_path / "model.safetensors", header)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=text) as error:
        read_header(path)
    assert time.perf_counter() - began < 2
    assert len(str(error.value)) < 1000


def test_a_shape_of_as_many_numbers_as_a_tensor_of_torch_may_have(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "t", entry(json.dumps([1] * 63 + [4]))))["t"].num_bytes == 4


@pytest.mark.parametrize("field", ["rows", "width"])
@pytest.mark.parametrize("value", [str(2**63), "1" + "0" * 4000, "1" + "0" * 1_000_000])
def test_so_are_a_manifests(field: str, value: str) -> None:
    values = {"format_version": "3", "byte_order": '"little"', "rows": "5", "width": "4", "dtype": '"float32"'}
    text = "{" + ", ".join(f'"{name}": {one}' for name, one in {**values, field: value}.items()) + "}"
    began = time.perf_counter()
    with pytest.raises(ValueError, match=rf"{field} = |a file can have|no JSON") as error:
        Manifest.from_json(text)
    assert time.perf_counter() - began < 2
    assert len(str(error.value)) < 1000
