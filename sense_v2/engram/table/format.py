"""Bytes on disk: names and lengths of the files, and the manifest. Opens no file.

A table is a few kinds of files in one folder; docs/format.md is their specification:

    engram_table.dat          N rows of D values, C order, little-endian, no header: np.memmap alone opens it
    engram_table.json         the manifest: `Manifest`, below
    engram_table.adam.dat     optimizer state, one file a name: N rows of float32, as the manifest lists them
    engram_table.journal      what undoes uncommitted changes (`sense_v2.engram.table.journal`)
    engram_table.lock         who writes
    engram_table.share1.*     journal and lock of a second process that stores to the same table, and so on

Functions here take and give plain values, so that the specification can be tested without a disk. Whoever calls
them adds the path to an error, once.

N rows, D row width.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table.checksums import HASH_VERSION, num_blocks
from sense_v2.engram.table.compact_rows import FLOAT8, INT4, INT4_BLOCK_BYTES, INT8, num_scales

FORMAT_VERSION = HASH_VERSION
READABLE_VERSIONS = (1, 2, 3)
BYTE_ORDER = "little"
STATE_DTYPE = "float32"
# What a file's length may be: off_t is a signed 64-bit integer.
MAX_FILE_BYTES = 2**63 - 1
# What a reader has to hold in memory at once is bounded, whatever a file says.
MAX_ROW_BYTES = 2**24
MAX_MANIFEST_BYTES = 2**26
# Of an integer in JSON.
MAX_DIGITS = 4300
# Nested deeper, some Python could read a manifest and not write it again.
MAX_DEPTH = 64

_STATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEX = re.compile(r"[0-9a-f]{16}")
JOURNAL_SUFFIX, LOCK_SUFFIX, PREPARED_SUFFIX = ".journal", ".lock", ".prepared"


@dataclass(frozen=True)
class RowDtype:
    """How a row's values lie on disk, and what reads them."""

    name: str
    item_bytes: int
    numpy: np.dtype[Any]
    """For bfloat16, which NumPy lacks, the bits as uint16."""
    torch: torch.dtype
    """What rows are looked up as."""
    scale_bytes: int = 0
    """Of each of a compact row's scales, which lie behind its values; `numpy` is then a byte of either."""
    block_bytes: int = 0
    """Of 32 values and their scale, of rows that are such blocks."""

    @property
    def is_compact(self) -> bool:
        return self.scale_bytes > 0

    def row_bytes(self, width: int) -> int:
        """
        >>> [row_dtype(name).row_bytes(256) for name in ("float32", "float8_e4m3fn", "int4")]
        [1024, 264, 144]
        """
        if self.block_bytes:
            return num_scales(width, self.name) * self.block_bytes
        scale_bytes = self.scale_bytes * num_scales(width, self.name) if self.is_compact else 0
        return width * self.item_bytes + scale_bytes

    def row_items(self, width: int) -> int:
        """A row's length in items of `numpy`, to map it."""
        return self.row_bytes(width) // self.numpy.itemsize


ROW_DTYPES = {
    "float32": RowDtype("float32", 4, np.dtype("<f4"), torch.float32),
    "float16": RowDtype("float16", 2, np.dtype("<f2"), torch.float16),
    "bfloat16": RowDtype("bfloat16", 2, np.dtype("<u2"), torch.bfloat16),
}
# Rows that are only read (`compact_rows.py`). Looked up as the narrowest type that holds their values.
COMPACT_DTYPES = {
    FLOAT8: RowDtype(FLOAT8, 1, np.dtype("u1"), torch.bfloat16, scale_bytes=1),
    INT8: RowDtype(INT8, 1, np.dtype("u1"), torch.float32, scale_bytes=4),
    INT4: RowDtype(INT4, 1, np.dtype("u1"), torch.float32, scale_bytes=2, block_bytes=INT4_BLOCK_BYTES),
}
# A row's bytes as they lie on disk, whatever they stand for.
RAW_BYTES = RowDtype("uint8", 1, np.dtype("u1"), torch.uint8)
DTYPES = {**ROW_DTYPES, **COMPACT_DTYPES}


def row_dtype(dtype: str | torch.dtype) -> RowDtype:
    """The row type of that name or torch dtype.

    >>> row_dtype("bfloat16").numpy, row_dtype(torch.float16).name
    (dtype('uint16'), 'float16')
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: a row's values are {', '.join(DTYPES)}")
    return DTYPES[name]


def file_bytes(num_rows: int, width: int, dtype: str | torch.dtype) -> int:
    """Length of a file of that many rows.

    >>> file_bytes(10_000_000, 64, "float32")
    2560000000
    """
    for name, value in (("rows", num_rows), ("width", width)):
        if not _is_int(value) or value < 1 or value.bit_length() > 256:
            raise ValueError(f"{name} = {_shorten(value)}: must be an integer, at least 1")
    size_bytes = num_rows * row_dtype(dtype).row_bytes(width)
    if size_bytes > MAX_FILE_BYTES:
        raise ValueError(f"{num_rows} rows × {width} {dtype} are {size_bytes} bytes, more than a file can have")
    return size_bytes


def manifest_name(table_name: str) -> str:
    """Name of a table's manifest: the table's, with the suffix .json.

    >>> manifest_name("engram_table.dat")
    'engram_table.json'
    """
    stem, suffix = _split(table_name)
    if suffix in (".json", JOURNAL_SUFFIX, LOCK_SUFFIX, PREPARED_SUFFIX):
        what = f"{table_name!r}: {suffix} is the suffix of another of its files"
        raise with_way_out(ValueError(what), f"call the table {stem}.dat")
    return f"{stem}.json"


def journal_name(table_name: str, share: int | str = 0) -> str:
    """Name of the journal of a table's writer; of several, `share` says which.

    >>> journal_name("engram_table.dat"), journal_name("engram_table.dat", 3)
    ('engram_table.journal', 'engram_table.share3.journal')
    """
    return _split(table_name)[0] + (f".share{share}" if share else "") + JOURNAL_SUFFIX


def lock_name(table_name: str, share: int | str = 0) -> str:
    return _split(table_name)[0] + (f".share{share}" if share else "") + LOCK_SUFFIX


def prepared_name(table_name: str) -> str:
    """Name of the manifest that a shard will have if all shards commit (`sense_v2.engram.ranks.global_commit`)."""
    return _split(table_name)[0] + PREPARED_SUFFIX


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


@dataclass(frozen=True)
class Committed:
    """A commit, and what a table's files have to be by it: what a journal is checked against."""

    generation: int
    commit: int
    """The manifest's `commit` as a number; 0 for a table that has none."""
    num_rows: int
    row_bytes_of: Mapping[str, int]
    """Bytes of a row in each file, by name, that takes part in commits: the table and the states."""
    checksums_of: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Block checksums of those files of which they are known."""
    version: int = FORMAT_VERSION


@dataclass
class StateEntry:
    """One optimizer state, as the manifest lists it."""

    file: str
    """A plain name: the file lies in the table's own folder."""
    width: int
    dtype: str = STATE_DTYPE
    step: int = 0
    checksums: list[str] | None = None
    """As the manifest's own."""


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
    commit: str | None = None
    """16 hexadecimal digits, drawn for each commit: what a journal goes back to."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the caller of the last commit wanted kept with it."""
    updates: int = 0
    """Calls that stored rows, up to the last commit."""
    checksums: list[str] | None = None
    """The table's block checksums; None where they aren't known."""
    format_version: int = FORMAT_VERSION
    """2 as long as its checksums are that version's; any other becomes the latest."""

    @property
    def commit_number(self) -> int:
        return int(self.commit, 16) if self.commit else 0

    def row_bytes_of(self, table_name: str) -> dict[str, int]:
        """Bytes of a row in each file that takes part in commits, by the file's name."""
        row_bytes = {entry.file: file_bytes(1, entry.width, entry.dtype) for entry in self.states.values()}
        return {**row_bytes, table_name: file_bytes(1, self.width, self.dtype)}

    def checksums_of(self, table_name: str) -> dict[str, list[str]]:
        """Block checksums of each of those files of which they are known."""
        sums = {table_name: self.checksums}
        sums.update({entry.file: entry.checksums for entry in self.states.values() if entry.file != table_name})
        return {file: texts for file, texts in sums.items() if texts is not None}

    def committed(self, table_name: str) -> Committed:
        """What the files of the table of that name are by this manifest."""
        sizes, sums = self.row_bytes_of(table_name), self.checksums_of(table_name)
        return Committed(self.generation, self.commit_number, self.rows, sizes, sums, self.format_version)

    def next_commit(self, **changes: Any) -> Manifest:
        """The manifest of the commit that follows, with these fields changed. Raises `ValueError` as `validate`."""
        manifest = dataclasses.replace(self, generation=self.generation + 1, commit=new_commit(), **changes)
        manifest.validate()
        return manifest

    @property
    def table_bytes(self) -> int:
        return file_bytes(self.rows, self.width, self.dtype)

    def to_json(self) -> str:
        values = {"format_version": 0, "byte_order": BYTE_ORDER, **dataclasses.asdict(self)}
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        if len(text) > MAX_MANIFEST_BYTES:
            what = f"the manifest would have {len(text)} bytes, and {MAX_MANIFEST_BYTES} are allowed"
            raise with_way_out(ValueError(what), "keep less in extra or provenance")
        return text

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote; anything else is a `ValueError` that names the field."""
        values = load_json(text)
        if not isinstance(values, dict):
            raise ValueError(f"a manifest is a JSON object, not {_shorten(values)}")
        # The version first: a newer one may have other fields, and that is what to tell.
        version = values.pop("format_version", None)
        if not _is_int(version) or version not in READABLE_VERSIONS:
            read = f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}"
            what = f"format_version = {_shorten(version)}: this library reads versions {read}"
            raise with_way_out(ValueError(what), "a newer release of sense-v2 may read it")
        if values.pop("byte_order", None) != BYTE_ORDER:
            raise ValueError(f"byte_order: must be {BYTE_ORDER!r}")
        _check_keys("manifest", values, {f.name for f in dataclasses.fields(cls)}, {"rows", "width", "dtype"})
        states = values.pop("states", {})
        _check(isinstance(states, dict), "states", states, "an object")
        for name in states:
            _check(_STATE_NAME.fullmatch(name) is not None, "states", name, "named by letters, digits, _ and -")
        manifest = cls(**values, states={name: _state_entry(name, entry) for name, entry in states.items()})
        sums = [manifest.checksums, *(entry.checksums for entry in manifest.states.values())]
        has_checksums = any(texts is not None for texts in sums)
        manifest.format_version = max(version, 2) if has_checksums else FORMAT_VERSION
        manifest.validate()
        return manifest

    def validate(self) -> None:
        """Raises `ValueError` naming the first field that can't be."""
        _check(isinstance(self.dtype, str) and self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))
        file_bytes(self.rows, self.width, self.dtype)
        is_seed = self.init_seed is None or (_is_int(self.init_seed) and self.init_seed >= 0)
        _check(is_seed, "init_seed", self.init_seed, "null or 0 or more")
        std = self.init_std
        is_std = isinstance(std, (int, float)) and not isinstance(std, bool) and math.isfinite(std) and std >= 0
        _check(std is None or is_std, "init_std", std, "null or 0 or more")
        _check_row_bytes("width", self.width, self.dtype)
        _check(isinstance(self.provenance, dict), "provenance", self.provenance, "an object")
        _check(_is_count(self.generation), "generation", self.generation, "0 or more")
        _check(self.step is None or _is_count(self.step), "step", self.step, "null or 0 or more")
        is_commit = self.commit is None or (isinstance(self.commit, str) and _HEX.fullmatch(self.commit) is not None)
        _check(is_commit, "commit", self.commit, "null or 16 hexadecimal digits")
        _check(isinstance(self.extra, dict), "extra", self.extra, "an object")
        _check(_is_count(self.updates), "updates", self.updates, "0 or more")
        blocks = num_blocks(self.rows)
        _check_checksums("checksums", self.checksums, blocks)
        is_trainable = not row_dtype(self.dtype).is_compact
        _check(is_trainable or not self.states, "states", list(self.states), f"none beside rows of {self.dtype}")
        for name, entry in self.states.items():
            where = f"states.{name}"
            _check(_STATE_NAME.fullmatch(name) is not None, "states", name, "named by letters, digits, _ and -")
            # The name comes from a file that anybody may have written: it must not lead out of the table's folder.
            _check(_is_plain_name(entry.file), f"{where}.file", entry.file, "a plain file name")
            taken = entry.file.lower().endswith((".json", ".tmp", JOURNAL_SUFFIX, LOCK_SUFFIX, PREPARED_SUFFIX))
            _check(not taken, f"{where}.file", entry.file, "no name of another of the table's files")
            _check(entry.dtype == STATE_DTYPE, f"{where}.dtype", entry.dtype, STATE_DTYPE)
            _check(_is_count(entry.step), f"{where}.step", entry.step, "0 or more")
            file_bytes(self.rows, entry.width, entry.dtype)
            _check_row_bytes(f"{where}.width", entry.width, entry.dtype)
            _check_checksums(f"{where}.checksums", entry.checksums, blocks)
        files = [entry.file for entry in self.states.values()]
        _check(len(files) == len(set(files)), "states", files, "one file each")


def _check_row_bytes(name: str, width: int, dtype: str) -> None:
    widest = MAX_ROW_BYTES // row_dtype(dtype).item_bytes
    is_short = width <= widest and row_dtype(dtype).row_bytes(width) <= MAX_ROW_BYTES
    _check(is_short, name, width, f"at most {widest} of {dtype}, scales included")


def _check_checksums(name: str, sums: Any, blocks: int) -> None:
    is_list = isinstance(sums, list) and all(isinstance(text, str) and _HEX.fullmatch(text) for text in sums)
    is_sums = sums is None or (is_list and len(sums) == blocks)
    _check(is_sums, name, sums, f"null or {blocks} times 16 hexadecimal digits")


def new_commit() -> str:
    """What a new table's manifest, and each commit's, has as `commit`."""
    return f"{secrets.randbits(64):016x}"


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
        values = load_json(json.dumps(dict(provenance or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
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


def load_json(text: str) -> Any:
    """JSON as the RFC has it, without what Python's reader lets through: NaN, infinities, a name twice (of which
    another reader may see the other value). Raises `ValueError`."""
    try:
        values = json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_finite_float,
            parse_int=short_integer,
            object_pairs_hook=_distinct_names,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    level, depth = [values], 0
    while level:
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        depth += 1
        _check(depth <= MAX_DEPTH + 1, "depth", depth, f"nested at most {MAX_DEPTH} deep")
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number there")


def short_integer(text: str) -> int:
    """As Python does it from 3.10.7 on: reading digits takes the square of their number."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"Exceeds the limit ({MAX_DIGITS} digits) of an integer")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(_shorten(text))


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {_shorten(name)} is there twice")
        values[name] = value
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    """A signed 64-bit integer, as the journal has them."""
    return _is_int(value) and 0 <= value < 2**63


def _is_plain_name(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    try:
        return len(name.encode()) <= 255
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


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
