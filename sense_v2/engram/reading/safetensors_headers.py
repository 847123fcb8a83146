"""safetensors files -> where the bytes of their tensors lie, from the headers alone.

A safetensors file is a length (8 bytes), a JSON header of that length, and the tensors' bytes. Headers are small
whatever the tensors weigh, so a checkpoint of 500 GB is understood in milliseconds. What is said of a tensor is held
against the file before anybody maps it: that its type and shape have as many bytes as its offsets say, that tensors
lie one behind the other without overlap or gap, and that the file ends where the last one does. A short shard that
was mapped would end in a SIGBUS, or read as somebody else's rows.

The safetensors library gives tensors and slices, not where they lie in the file, and opens one file at a time: for
rows that stay in place the header is read here. Its files are the oracle of the tests.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table.format import MAX_FILE_BYTES, short_integer

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
INDEX_NAME = "model.safetensors.index.json"
# What the format allows; the length of a damaged file could ask for any memory.
MAX_HEADER_BYTES = 100_000_000
# As many numbers as the shape of a tensor of torch may have.
MAX_DIMENSIONS = 64
# DeepSeek's own tools write one file a rank, each with its share of every tensor's rows under the same name.
_RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor, or a part of its rows, lies."""

    name: str
    dtype: str
    """As safetensors spells it: BF16, F8_E4M3, …"""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of its first byte in the file."""
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors that were asked for, and the configuration beside them."""

    path: Path
    """The folder, index or file that was opened."""
    tensors: dict[str, list[TensorSpan]]
    """More than one span where each rank's file has a share of the rows; in the ranks' order."""
    config: dict[str, Any] | None
    """config.json, where there is one; of a GGUF file, what its keys come to in the same words."""
    is_gguf: bool = False
    """True if types are spelled as GGUF has them."""


def find_tensors(place: str | os.PathLike[str], wanted: Callable[[str], bool]) -> Checkpoint:
    """The tensors whose names are `wanted` in a folder, an index or one safetensors file. Only headers are read.

    Raises `FileNotFoundError` where there are no such files, `ValueError` naming the file for anything damaged.
    """
    path = Path(place).absolute()
    if path.is_dir():
        indexes = sorted(path.glob("*.safetensors.index.json"))
        index = path / INDEX_NAME if path / INDEX_NAME in indexes else (indexes[0] if len(indexes) == 1 else None)
        if index is None and indexes:
            raise with_way_out(
                ValueError(f"{path} has {len(indexes)} indexes, none called {INDEX_NAME}"),
                "name the one that is meant",
            )
        files = sorted(path.glob("*.safetensors"))
        if index is None and not files:
            raise with_way_out(
                FileNotFoundError(f"{path}: no safetensors files there"),
                "Name the checkpoint's folder, index or file",
            )
        tensors = _from_files(files, wanted) if index is None else _from_index(index, wanted)
        return Checkpoint(path, tensors, _config_in(path))
    if not path.exists():
        raise with_way_out(
            FileNotFoundError(f"{path}: no such folder or file"),
            "Name a checkpoint's folder, index or safetensors file",
        )
    tensors = _from_index(path, wanted) if path.suffix == ".json" else _from_files([path], wanted)
    return Checkpoint(path, tensors, _config_in(path.parent))


def _from_index(index: Path, wanted: Callable[[str], bool]) -> dict[str, list[TensorSpan]]:
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise with_way_out(
            ValueError(f"{index}: no weight_map of tensor names to file names; it is no safetensors index"),
            "Name a checkpoint's folder, index or safetensors file",
        )
    headers: dict[str, dict[str, TensorSpan]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not wanted(name):
            continue
        if file not in headers:
            headers[file] = read_header(_beside(index, file))
        if name not in headers[file]:
            raise with_way_out(
                ValueError(
                    f"{index} says that {name} is in {file}, which doesn't have it. The files are of different "
                    "checkpoints"
                ),
                "fetch the checkpoint again",
            )
        tensors[name] = [headers[file][name]]
    return tensors


def _beside(index: Path, file: str) -> Path:
    """An index names files of its own folder. (A file there may be a link: that is how the hub's cache looks.)"""
    parts = PurePosixPath(file).parts
    if not parts or file.startswith("/") or ".." in parts or "\\" in file or "\0" in file:
        raise with_way_out(
            ValueError(f"{index} names {file!r}, which lies outside of its folder. No file of it was opened"),
            "Fetch the checkpoint from whom you trust",
        )
    path = index.parent / file
    if not path.exists():
        raise with_way_out(
            FileNotFoundError(f"{path}: missing, though {index.name} names it"), "Fetch the rest of the checkpoint"
        )
    return path


def _from_files(files: list[Path], wanted: Callable[[str], bool]) -> dict[str, list[TensorSpan]]:
    ranks = [_RANK_FILE.fullmatch(file.name) for file in files]
    if files and all(ranks):
        numbers = sorted((int(match[1]), int(match[2])) for match in ranks if match)
        world = numbers[0][1]
        if numbers != [(rank, world) for rank in range(world)]:
            raise with_way_out(
                ValueError(
                    f"{files[0].parent}: model0-mp{world} to model{world - 1}-mp{world} are one checkpoint, and "
                    f"there are {', '.join(file.name for file in files)}"
                ),
                "Fetch the missing ones, or move the others away",
            )
        files = sorted(files, key=lambda file: int(_RANK_FILE.fullmatch(file.name)[1]))  # type: ignore[index]
    tensors: dict[str, list[TensorSpan]] = {}
    for file in files:
        for name, span in read_header(file).items():
            if wanted(name):
                tensors.setdefault(name, []).append(span)
                if len(tensors[name]) > 1 and not all(ranks):
                    first = tensors[name][0].path
                    raise with_way_out(
                        ValueError(f"{name} is in {first} and in {file}"),
                        "name the file, or the index, that is meant",
                    )
    return tensors


def read_header(path: Path) -> dict[str, TensorSpan]:
    """Every tensor of one file. Raises `ValueError` naming the file and what is wrong with it."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, TensorSpan], dict[str, Any]]:
    """The same, and what the file's `__metadata__` says: an empty object where it has none."""
    if not path.is_file() and path.exists():
        raise with_way_out(
            ValueError(f"{path}: a pipe or a device, which might be waited for forever"), "Name a file"
        )
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        if total < 8:
            raise with_way_out(ValueError(f"{path}: {total} bytes are no safetensors file"), "Fetch it again")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER_BYTES, total - 8):
            raise with_way_out(
                ValueError(f"{path}: its header is said to have {length} bytes of {total}"), "Fetch the file again"
            )
        raw = file.read(length)
    header = _parse(raw, path)
    start = 8 + length
    spans = [_span(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"]
    end = start
    for span in sorted(spans, key=lambda span: (span.offset, span.num_bytes)):
        if span.offset != end:
            what = "overlaps the tensor before it" if span.offset < end else "leaves a gap before it"
            raise with_way_out(
                ValueError(f"{path}: {span.name} {what} (byte {span.offset}, expected {end})"), "Fetch the file again"
            )
        end += span.num_bytes
    if end != total:
        what = "was cut short" if total < end else "has bytes that no tensor owns"
        raise with_way_out(
            ValueError(f"{path}: expected {end} bytes, found {total}: the file {what}"), "Fetch it again"
        )
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise with_way_out(ValueError(f"{path}: its __metadata__ is no JSON object"), "Fetch the file again")
    return {span.name: span for span in spans}, metadata


def _span(path: Path, name: str, entry: Any, start: int) -> TensorSpan:
    fields = entry if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) else {}
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    are_sizes = _are_sizes(shape) and _are_sizes(offsets) and len(shape) <= MAX_DIMENSIONS
    if not (are_sizes and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise with_way_out(
            ValueError(f"{path}: the header's entry for {name} is damaged: {str(entry)[:200]}"),
            "Fetch the file again",
        )
    begin, end = offsets
    item_bytes = ITEM_BYTES.get(entry["dtype"])
    expected = None if item_bytes is None else math.prod(shape) * item_bytes
    if expected is not None and expected != end - begin:
        found = f"{expected} bytes" if expected <= MAX_FILE_BYTES else "more bytes than a file can have"
        raise with_way_out(
            ValueError(
                f"{path}: {name}, {entry['dtype']} {str(shape)[:200]}, has {found}, but {end - begin} by its offsets"
            ),
            "Fetch the file again",
        )
    return TensorSpan(name, entry["dtype"], tuple(shape), path, start + begin, end - begin)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name comes twice")
        return values

    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=short_integer)
    except (ValueError, RecursionError) as error:
        raise with_way_out(ValueError(f"{path}: its header is no JSON ({error})"), "Fetch the file again") from None
    if not isinstance(values, dict):
        raise with_way_out(ValueError(f"{path}: its header is no JSON object"), "Fetch the file again")
    return values


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file() and path.exists():
        raise with_way_out(
            ValueError(f"{path}: a pipe or a device, which might be waited for forever"), "Name a file"
        )
    return _parse(path.read_bytes(), path)


def _config_in(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return _json_object(path) if path.is_file() else None
