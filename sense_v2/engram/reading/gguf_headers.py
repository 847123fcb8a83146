"""GGUF files -> where the bytes of their tensors lie, and what the file says of itself, from the headers alone.

A GGUF file is a version, two counts, that many pairs of a key and a value, that many descriptions of tensors, and the
tensors' bytes, each from a multiple of the alignment on. A model may be split into files, NAME-00001-of-00003.gguf.

Every count and length is held against what is left of the file, and of the limit on headers, before anything is read
or multiplied; tensors must lie one behind the other to the file's end, as llama.cpp demands it as well. A short file
that was mapped would end in a SIGBUS, or read as somebody else's rows. The package gguf reads counts and strings
without a limit, and checks no offset against the file: a header of a few bytes can make it loop, or give other rows.
So the header is read here, and that package is the oracle of the tests.

Source of the format: ggml-org/ggml, docs/gguf.md. Texts in lists (a tokenizer's tokens) are counted and not kept.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading.block_rows import BLOCK_FORMATS
from sense_v2.engram.reading.safetensors_headers import MAX_HEADER_BYTES, TensorSpan
from sense_v2.engram.table.format import MAX_FILE_BYTES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_DIMENSIONS = 65535, 64, 4
MAX_PARTS = 99_999
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

PART_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")

UINT32, STRING, ARRAY, UINT64 = 4, 8, 9, 10
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    UINT32: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    UINT64: "<u8",
    11: "<i8",
    12: "<f8",
}

# Number of a tensor's type -> name, values of a block, bytes of a block.
PLAIN_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
TENSOR_TYPES = {
    **PLAIN_TYPES,
    **{blocks.number: (blocks.name, blocks.block_values, blocks.block_bytes) for blocks in BLOCK_FORMATS.values()},
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    22: ("IQ2_S", 256, 82),
    18: ("IQ3_XXS", 256, 98),
    21: ("IQ3_S", 256, 110),
    19: ("IQ1_S", 256, 50),
    29: ("IQ1_M", 256, 56),
    23: ("IQ4_XS", 256, 136),
    15: ("Q8_K", 256, 292),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    41: ("Q1_0", 128, 18),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}


@dataclass(frozen=True)
class StringArray:
    """A list of texts, which aren't kept."""

    count: int


@dataclass(frozen=True)
class GgufModel:
    """What one GGUF file, or all parts of one, have."""

    path: Path
    """What was opened."""
    metadata: dict[str, Any]
    """Numbers, texts, arrays of numbers as NumPy has them, and `StringArray`; the first part's."""
    tensors: dict[str, TensorSpan]
    """Shapes are [rows, …, width], the reverse of GGUF's order."""


def is_gguf(place: str | os.PathLike[str]) -> bool:
    """True for a GGUF file, and for a folder that has some and no safetensors files."""
    path = Path(place)
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix == ".gguf"


def find_gguf(place: str | os.PathLike[str]) -> GgufModel:
    """Read the headers of a GGUF file, of all files that it is a part of, or of the one model in a folder.

    Raises:
        FileNotFoundError: There is no such file, or a part is missing.
        ValueError: A header is damaged, or the parts aren't of one model; names the file and what is wrong.
    """
    path = Path(place).absolute()
    first = _of_folder(path) if path.is_dir() else path
    metadata: dict[str, Any] = {}
    tensors: dict[str, TensorSpan] = {}
    files = _parts(first)
    for number, file in enumerate(files):
        own, spans = read_gguf_header(file)
        _check_part(file, own, number, len(files))
        metadata = metadata or own
        for name, span in spans.items():
            if name in tensors:
                raise with_way_out(
                    ValueError(f"{name} is in {tensors[name].path} and in {file}"), "Fetch the model again"
                )
            tensors[name] = span
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise with_way_out(
            ValueError(
                f"{files[0]}: the {len(files)} parts have {len(tensors)} tensors, and it says {total}. They are of "
                "different models"
            ),
            "fetch them again",
        )
    return GgufModel(path, metadata, tensors)


def _of_folder(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    names = {match["stem"] if (match := _SPLIT_NAME.fullmatch(file.name)) else file.name for file in files}
    if len(names) != 1:
        raise with_way_out(
            ValueError(f"{folder} has {len(names)} GGUF models: {', '.join(sorted(names)[:8])}"),
            "Name the file that is meant",
        )
    return files[0]


def _parts(path: Path) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or count < 2:
        return [path]
    files = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        listed = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        raise with_way_out(
            FileNotFoundError(f"{path.parent}: {path.name} is one of {count} parts, and {listed} isn't there"),
            "Fetch it",
        )
    return files


def _check_part(file: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    says = metadata.get("split.no", 0), metadata.get("split.count", 1) or 1
    if says != (number, count):
        raise with_way_out(
            ValueError(
                f"{file}: by its name it is part {number + 1} of {count}, and by its header part "
                f"{_shorten(says[0])} (counted from 0) of {_shorten(says[1])}"
            ),
            "Give the parts the names that they were fetched under",
        )


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorSpan]]:
    """Read (metadata, tensors) of one file. Raises `ValueError` naming the file and what is wrong with it."""
    if not path.is_file() and path.exists():
        raise with_way_out(
            ValueError(f"{path}: a pipe or a device, which might be waited for forever"), "Name a file"
        )
    with open(path, "rb") as file:
        reader = _Reader(file, path, os.fstat(file.fileno()).st_size)
        if reader.total < 24 or reader.take(4, "its first bytes") != MAGIC:
            raise with_way_out(
                ValueError(f"{path}: no GGUF file: it doesn't begin with {MAGIC.decode()}"), "Fetch it again"
            )
        version = reader.number("<I", "its version")
        if version not in VERSIONS:
            why = " (it is big-endian)" if version & 0xFFFF == 0 else ""
            raise with_way_out(
                ValueError(f"{path}: GGUF version {version}{why}"), "versions 2 and 3, little-endian, are read"
            )
        num_tensors, num_pairs = reader.number("<Q", "its counts"), reader.number("<Q", "its counts")
        reader.refuse_more(num_tensors, 24, "descriptions of tensors")
        reader.refuse_more(num_pairs, 13, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = reader.text(MAX_KEY_BYTES, "a key")
            if key in metadata:
                raise with_way_out(
                    ValueError(f"{path}: the key {_shorten(key)} is there twice"), "Fetch the file again"
                )
            metadata[key] = reader.value(reader.number("<I", key), key)
        described = [_Described.read(reader) for _ in range(num_tensors)]
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise with_way_out(
            ValueError(f"{path}: {ALIGNMENT_KEY} = {_shorten(alignment)}: must be a power of two"), "Fetch it again"
        )
    return metadata, _spans(path, described, _aligned(reader.at, alignment), alignment, reader.total)


@dataclass(frozen=True)
class _Described:
    """A tensor as its header has it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    """From the first byte behind the header."""

    @classmethod
    def read(cls, reader: _Reader) -> _Described:
        name = reader.text(MAX_NAME_BYTES, "a tensor's name")
        num_dimensions = reader.number("<I", name)
        if num_dimensions > MAX_DIMENSIONS:
            raise with_way_out(
                ValueError(f"{reader.path}: {name} has {num_dimensions} dimensions"), "Fetch the file again"
            )
        sizes = [reader.number("<Q", name) for _ in range(num_dimensions)]
        kind, offset = reader.number("<I", name), reader.number("<Q", name)
        if max([offset, *sizes]) > MAX_FILE_BYTES or math.prod(sizes) > MAX_FILE_BYTES:
            raise with_way_out(
                ValueError(
                    f"{reader.path}: {name} has sizes {sizes} and begins at byte {offset}: more than a file can have"
                ),
                "Fetch it again",
            )
        return cls(name, tuple(reversed(sizes)), kind, offset)


def _spans(path: Path, described: list[_Described], start: int, alignment: int, total: int) -> dict[str, TensorSpan]:
    """Where the tensors lie. What one of a type that isn't known here takes isn't known either: it is then asked of
    the one behind it only that it begins later."""
    spans: dict[str, TensorSpan] = {}
    expected, is_exact = 0, True
    for one in described:
        if one.name in spans:
            raise with_way_out(ValueError(f"{path}: {one.name} is there twice"), "Fetch the file again")
        if one.offset < expected or one.offset % alignment or (one.offset > expected and is_exact):
            what = "overlaps the tensor before it" if one.offset < expected else "leaves a gap before it"
            what = f"isn't at a multiple of {alignment}" if one.offset % alignment else what
            raise with_way_out(
                ValueError(f"{path}: {one.name} {what} (byte {one.offset} behind the header, expected {expected})"),
                "Fetch the file again",
            )
        name, block_values, block_bytes = TENSOR_TYPES.get(one.kind, (f"type {one.kind}", 1, 0))
        width = one.shape[-1] if one.shape else 1
        if width % block_values:
            raise with_way_out(
                ValueError(
                    f"{path}: {one.name} has rows of {width} values, which isn't a whole number of blocks of "
                    f"{block_values}, as {name} has them"
                ),
                "Fetch the file again",
            )
        num_bytes = math.prod(one.shape) // block_values * block_bytes
        end = start + one.offset + num_bytes
        if end > total:
            raise with_way_out(
                ValueError(
                    f"{path}: {one.name}, {name} {list(one.shape)}, ends at byte {end}, and the file has {total}: "
                    "it was cut short"
                ),
                "Fetch it again",
            )
        spans[one.name] = TensorSpan(one.name, name, one.shape, path, start + one.offset, num_bytes)
        expected, is_exact = _aligned(one.offset + num_bytes, alignment), one.kind in TENSOR_TYPES
    if is_exact and described and total > start + expected:
        raise with_way_out(
            ValueError(f"{path}: expected {start + expected} bytes, found {total}: it has bytes that no tensor owns"),
            "Fetch it again",
        )
    return spans


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Reader:
    """Reads a header front to back, never more than the file, or a header, may have."""

    def __init__(self, file: BinaryIO, path: Path, total: int) -> None:
        self._file, self.path, self.total = file, path, total
        self.at = 0

    def take(self, count: int, of: str) -> bytes:
        self.refuse_more(count, 1, f"bytes of {_shorten(of)}")
        raw = self._file.read(count)
        if len(raw) != count:
            raise with_way_out(ValueError(f"{self.path}: it was cut short while it was read"), "Fetch it again")
        self.at += count
        return raw

    def refuse_more(self, count: int, item_bytes: int, what: str) -> None:
        """Raises `ValueError` if there can't be so many items, of at least that many bytes."""
        left = min(self.total, MAX_HEADER_BYTES) - self.at
        if count > left // item_bytes:
            raise with_way_out(
                ValueError(
                    f"{self.path}: its header says that {_shorten(count)} {what} follow, and {left} bytes are left "
                    f"of the file, or of what a header may have ({MAX_HEADER_BYTES})"
                ),
                "Fetch it again",
            )

    def number(self, code: str, of: str) -> int:
        (number,) = struct.unpack(code, self.take(struct.calcsize(code), of))
        return int(number)

    def text(self, most: int, of: str) -> str:
        length = self.number("<Q", of)
        if length > most:
            raise with_way_out(
                ValueError(f"{self.path}: {_shorten(of)} of {_shorten(length)} bytes; at most {most} are allowed"),
                "Fetch it again",
            )
        try:
            return self.take(length, of).decode("utf-8")
        except UnicodeDecodeError:
            raise with_way_out(
                ValueError(f"{self.path}: {_shorten(of)} isn't UTF-8"), "Fetch the file again"
            ) from None

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(MAX_HEADER_BYTES, key)
        if kind == ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise with_way_out(
                ValueError(f"{self.path}: {_shorten(key)} is of type {kind}, which isn't known"), "Fetch it again"
            )
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(dtype.itemsize, key), dtype)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self.number("<I", key), self.number("<Q", key)
        if kind == STRING:
            self._skip_texts(count, key)
            return StringArray(count)
        if kind not in _NUMBERS:
            raise with_way_out(
                ValueError(f"{self.path}: {_shorten(key)} is a list of type {kind}, which isn't known"),
                "Fetch it again",
            )
        dtype = np.dtype(_NUMBERS[kind])
        self.refuse_more(count, dtype.itemsize, f"numbers of {_shorten(key)}")
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)

    def _skip_texts(self, count: int, key: str) -> None:
        """A tokenizer has hundreds of thousands: a part of the file is read at a time, and gone through."""
        self.refuse_more(count, 8, f"texts of {_shorten(key)}")
        raw, at, most = b"", 0, min(self.total, MAX_HEADER_BYTES)
        unpack = _LENGTH.unpack_from
        for _ in range(count):
            if at + 8 > len(raw):
                self.at += at
                self._file.seek(self.at)
                raw, at = self._file.read(min(PART_BYTES, most - self.at)), 0
                if len(raw) < 8:
                    self.refuse_more(8, 1, f"bytes of {_shorten(key)}")
            (length,) = unpack(raw, at)
            at += 8 + length
            if at > len(raw):
                self.refuse_more(at, 1, f"bytes of {_shorten(key)}")
        self.at += at
        self._file.seek(self.at)


def _shorten(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."
