"""Bytes on disk: what the files are called, how long they are, and what the manifest says. Opens no file.

A table is three kinds of files in one folder; docs/format.md is their specification:

    engram_table.dat          N rows of D values, C order, little-endian, no header: np.memmap alone opens it
    engram_table.json         the manifest: `Manifest`, below
    engram_table.adam.dat     optimizer state, one file a name: N rows of float32, as the manifest lists them

Functions here take and give plain values, so that the specification can be tested without a disk. Whoever calls
them adds the path to an error, once.

N rows, D row width.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

FORMAT_VERSION = 1
BYTE_ORDER = "little"
STATE_DTYPE = "float32"
# What a file's length may be: off_t is a signed 64-bit integer.
MAX_FILE_BYTES = 2**63 - 1

_STATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class RowDtype:
    """How a row's values lie on disk, and what reads them."""

    name: str
    item_bytes: int
    numpy: np.dtype[Any]
    """For bfloat16, which NumPy lacks, the bits as uint16."""
    torch: torch.dtype


ROW_DTYPES = {
    "float32": RowDtype("float32", 4, np.dtype("<f4"), torch.float32),
    "float16": RowDtype("float16", 2, np.dtype("<f2"), torch.float16),
    "bfloat16": RowDtype("bfloat16", 2, np.dtype("<u2"), torch.bfloat16),
}


def row_dtype(dtype: str | torch.dtype) -> RowDtype:
    """The row type of that name or torch dtype.

    >>> row_dtype("bfloat16").numpy, row_dtype(torch.float16).name
    (dtype('uint16'), 'float16')
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in ROW_DTYPES:
        raise ValueError(f"dtype = {dtype!r}: a row's values are {', '.join(ROW_DTYPES)}")
    return ROW_DTYPES[name]


def file_bytes(num_rows: int, width: int, dtype: str | torch.dtype) -> int:
    """Length of a file of that many rows.

    >>> file_bytes(10_000_000, 64, "float32")
    2560000000
    """
    for name, value in (("rows", num_rows), ("width", width)):
        if not _is_int(value) or value < 1:
            raise ValueError(f"{name} = {value!r}: must be an integer, at least 1")
    size_bytes = num_rows * width * row_dtype(dtype).item_bytes
    if size_bytes > MAX_FILE_BYTES:
        raise ValueError(f"{num_rows} rows × {width} {dtype} are {size_bytes} bytes, more than a file can have")
    return size_bytes


def manifest_name(table_name: str) -> str:
    """Name of a table's manifest: the table's, with the suffix .json.

    >>> manifest_name("engram_table.dat")
    'engram_table.json'
    """
    stem, suffix = _split(table_name)
    if suffix == ".json":
        raise ValueError(f"{table_name!r}: .json is the manifest's suffix; call the table {stem}.dat")
    return f"{stem}.json"


def state_file_name(table_name: str, state_name: str) -> str:
    """Name of the file that holds one optimizer state.

    >>> state_file_name("engram_table.dat", "adam")
    'engram_table.adam.dat'
    """
    if not isinstance(state_name, str) or not _STATE_NAME.fullmatch(state_name):
        raise ValueError(f"state name {state_name!r}: up to 64 letters, digits, _ and -")
    return f"{_split(table_name)[0]}.{state_name}.dat"


def _split(table_name: str) -> tuple[str, str]:
    stem, dot, suffix = table_name.rpartition(".")
    return (stem, dot + suffix) if stem else (table_name, "")


@dataclass
class StateEntry:
    """One optimizer state, as the manifest lists it."""

    file: str
    """A plain name: the file lies in the table's own folder."""
    width: int
    dtype: str = STATE_DTYPE
    step: int = 0


@dataclass
class Manifest:
    """What a table's file doesn't say itself.

    >>> manifest = Manifest(rows=5, width=4, dtype="float32", provenance={"variant": "sense"})
    >>> Manifest.from_json(manifest.to_json()) == manifest
    True
    """

    rows: int
    width: int
    dtype: str
    init_seed: int | None = None
    """None, as `init_std`: the table came from elsewhere."""
    init_std: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the rows mean: any JSON object (variant, seed, head layout, the shadow map's checksum, …)."""
    generation: int = 0
    """Commits so far."""
    step: int | None = None
    """Training step of the last commit that named one."""
    states: dict[str, StateEntry] = field(default_factory=dict)

    @property
    def table_bytes(self) -> int:
        return file_bytes(self.rows, self.width, self.dtype)

    def to_json(self) -> str:
        values = {"format_version": FORMAT_VERSION, "byte_order": BYTE_ORDER, **dataclasses.asdict(self)}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote; anything else is a `ValueError` that names the field."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"a manifest is a JSON object, not {_shorten(values)}")
        # The version first: a newer one may have other fields, and that is what to tell.
        version = values.pop("format_version", None)
        if not _is_int(version) or version != FORMAT_VERSION:
            raise ValueError(
                f"format_version = {_shorten(version)}: this library reads version {FORMAT_VERSION}; "
                "a newer release of sense-v2 may read it"
            )
        if values.pop("byte_order", None) != BYTE_ORDER:
            raise ValueError(f"byte_order: must be {BYTE_ORDER!r}")
        _check_keys("manifest", values, {f.name for f in dataclasses.fields(cls)}, {"rows", "width", "dtype"})
        states = values.pop("states", {})
        _check(isinstance(states, dict), "states", states, "an object")
        manifest = cls(**values, states={name: _state_entry(name, entry) for name, entry in states.items()})
        manifest.validate()
        return manifest

    def validate(self) -> None:
        """Raises `ValueError` naming the first field that can't be."""
        _check(isinstance(self.dtype, str) and self.dtype in ROW_DTYPES, "dtype", self.dtype, ", ".join(ROW_DTYPES))
        file_bytes(self.rows, self.width, self.dtype)
        _check(self.init_seed is None or _is_count(self.init_seed), "init_seed", self.init_seed, "null or 0 or more")
        std = self.init_std
        is_std = isinstance(std, (int, float)) and not isinstance(std, bool) and math.isfinite(std) and std >= 0
        _check(std is None or is_std, "init_std", std, "null or 0 or more")
        _check(isinstance(self.provenance, dict), "provenance", self.provenance, "an object")
        _check(_is_count(self.generation), "generation", self.generation, "0 or more")
        _check(self.step is None or _is_count(self.step), "step", self.step, "null or 0 or more")
        for name, entry in self.states.items():
            where = f"states.{name}"
            _check(_STATE_NAME.fullmatch(name) is not None, "states", name, "named by letters, digits, _ and -")
            # The name comes from a file that anybody may have written: it must not lead out of the table's folder.
            _check(_is_plain_name(entry.file), f"{where}.file", entry.file, "a plain file name")
            _check(entry.dtype == STATE_DTYPE, f"{where}.dtype", entry.dtype, STATE_DTYPE)
            _check(_is_count(entry.step), f"{where}.step", entry.step, "0 or more")
            file_bytes(self.rows, entry.width, entry.dtype)
        files = [entry.file for entry in self.states.values()]
        _check(len(files) == len(set(files)), "states", files, "one file each")


def _state_entry(name: str, values: Any) -> StateEntry:
    _check(isinstance(values, dict), f"states.{name}", values, "an object")
    _check_keys(f"states.{name}", values, {f.name for f in dataclasses.fields(StateEntry)}, {"file", "width"})
    return StateEntry(**values)


def as_json_object(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """The provenance as it will be read back: tuples are lists, and nothing JSON lacks gets in.

    >>> as_json_object({"orders": (2, 3)})
    {'orders': [2, 3]}
    """
    try:
        values = json.loads(json.dumps(dict(provenance or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must be a JSON object: {error}") from None
    return dict(values)


# A tokenizer is a hub name to one user and a folder to another; the map's checksum is what identifies it.
_TOLD_ONLY = ("tokenizer_name",)


def provenance_differences(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, recorded value, given value) of every key that both have and that differs; nested ones by path.

    >>> provenance_differences({"seed": 0, "map": {"sha256": "aa"}}, {"map": {"sha256": "bb"}, "new": 1})
    [('map.sha256', 'aa', 'bb')]
    """
    differences: list[tuple[str, Any, Any]] = []
    for key in given:
        if key not in recorded or key in _TOLD_ONLY:
            continue
        old, new = recorded[key], given[key]
        if isinstance(old, dict) and isinstance(new, dict):
            differences += [(f"{key}.{path}", a, b) for path, a, b in provenance_differences(old, new)]
        # `True == 1` in Python, not in JSON.
        elif old != new or isinstance(old, bool) != isinstance(new, bool):
            differences.append((key, old, new))
    return differences


def merge_provenance(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values, and those of the given keys that weren't recorded yet.

    >>> merge_provenance({"map": {"size": 3}}, {"map": {"size": 3, "sha256": "bb"}})
    {'map': {'size': 3, 'sha256': 'bb'}}
    """
    merged = dict(recorded)
    for key, new in given.items():
        old = merged.get(key)
        if key not in merged:
            merged[key] = new
        elif isinstance(old, dict) and isinstance(new, dict):
            merged[key] = merge_provenance(old, new)
    return merged


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _check(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {_shorten(value)}: must be {allowed}")


def _check_keys(owner: str, values: dict[str, Any], known: set[str], required: set[str]) -> None:
    for key in required - values.keys():
        raise ValueError(f"{owner} has no field {key!r}")
    for key in values.keys() - known:
        raise ValueError(f"{owner} has an unknown field {_shorten(key)}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
