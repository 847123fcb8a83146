"""A delta: rows of a table that were changed, as a small file that names the table.

    write_delta ids, ascending, and what gives their rows, a part at a time ──▶ a file, whole or not at all
    read_delta  a file ──▶ Delta, mapped, everything in it checked

The file is a safetensors file, so that any tool of that world opens it; docs/format.md ("Deltas") is its
specification. Memory follows the ids (8 bytes each), never the rows.

A delta names the table it was made on, its base, by that table's `identity()`
(`sense_v2.engram.table_identity`): a digest of the block checksums in a manifest, so nothing of a table of ours is
read, however large it is.

N rows of the base, D row width, U rows of a delta, W values of a row of any tensor.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading.safetensors_headers import TensorSpan, read_header_and_metadata
from sense_v2.engram.table import disk
from sense_v2.engram.table.checksums import HASH_VERSION, PART_BYTES, row_hashes
from sense_v2.engram.table.disk import new_file
from sense_v2.engram.table.format import DTYPES, as_json_object, load_json
from sense_v2.engram.table_identity import BLOCK_CHECKSUMS, SAMPLED_ROWS, TableIdentity

FORMAT, FORMAT_VERSION = "sense-engram delta", "2"
HASHES = {"1": 2, FORMAT_VERSION: HASH_VERSION}
"""A delta's version -> that of its row hashes."""
_STATE = re.compile(r"state\.([A-Za-z0-9_-]{1,64})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAFETENSORS = {dtype: name for name, dtype in _TORCH.items()}
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("<f4"),
    torch.float16: np.dtype("<f2"),
    torch.bfloat16: np.dtype("<u2"),
}


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta says besides its rows."""

    base: TableIdentity
    step: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    updates: int = 0
    state_steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """An opened delta. The tensors share its mapping, and are only read."""

    path: Path
    info: DeltaInfo
    row_ids_U: np.ndarray[Any, Any]
    """int64, ascending."""
    rows_UD: torch.Tensor
    states: dict[str, torch.Tensor]
    """Name -> [U, W], float32."""

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Source:
    """Where a tensor's rows come from when it is written."""

    width: int
    dtype: torch.dtype
    read: Callable[[slice], torch.Tensor]
    """Rows u of a slice of 0 … U - 1, [u, width]."""


# Writing


def write_delta(
    path: Path,
    info: DeltaInfo,
    row_ids_U: np.ndarray[Any, Any],
    sources: Mapping[str, Source],
    *,
    like: Path | None = None,
) -> None:
    """Writes the delta to `path`, in the place of what is there: synced, then renamed. Who may read the file `like`
    may read it.

    `sources` has `rows`, and `state.<name>` for each state. Raises `ValueError` for rows that aren't finite and ids
    that no delta may have, `OSError` where there is no room; `path` is what it was then.
    """
    row_ids_U = np.ascontiguousarray(row_ids_U, dtype="<i8")
    _check_ids(path, row_ids_U, info.base.rows)
    names = ["row_ids", *sorted(name for name in sources if name != "rows"), "rows"]
    checksums = {"row_ids": _id_hash(row_ids_U), **dict.fromkeys(names[1:], 0)}
    header = _header(info, names, sources, len(row_ids_U), checksums)
    with new_file(path, replace=True, like=like) as fd:
        at = len(header)
        disk.allocate(fd, at + _data_bytes(names, sources, len(row_ids_U)), path)
        disk.write_at(fd, row_ids_U, at)
        at += row_ids_U.nbytes
        for name in names[1:]:
            source = sources[name]
            for part in _parts(len(row_ids_U), source.width * source.dtype.itemsize):
                values_UW = source.read(part).to(source.dtype).contiguous()
                _check_finite(path, name, row_ids_U[part], values_UW)
                raw_UB = _as_bytes(values_UW)
                checksums[name] += int(row_hashes(row_ids_U[part], raw_UB).sum())
                disk.write_at(fd, raw_UB, at)
                at += raw_UB.nbytes
        # The checksums are known now, and as long as their stand-ins.
        disk.write_at(fd, _header(info, names, sources, len(row_ids_U), checksums), 0)


def _header(
    info: DeltaInfo, names: list[str], sources: Mapping[str, Source], num_rows: int, checksums: Mapping[str, int]
) -> bytes:
    described = {
        **dataclasses.asdict(info),
        "extra": as_json_object(info.extra),
        "checksums": {name: f"{value % 2**64:016x}" for name, value in checksums.items()},
    }
    delta = json.dumps(described, allow_nan=False)
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "format_version": FORMAT_VERSION, "delta": delta},
        "row_ids": {"dtype": "I64", "shape": [num_rows], "data_offsets": [0, num_rows * 8]},
    }
    at = num_rows * 8
    for name in names[1:]:
        source = sources[name]
        end = at + num_rows * source.width * source.dtype.itemsize
        shape, dtype = [num_rows, source.width], _SAFETENSORS[source.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data_bytes(names: list[str], sources: Mapping[str, Source], num_rows: int) -> int:
    return num_rows * (8 + sum(sources[name].width * sources[name].dtype.itemsize for name in names[1:]))


# Reading


def read_delta(path: str | os.PathLike[str]) -> Delta:
    """Opens a delta and checks all of it, its rows included.

    Raises `FileNotFoundError`, or `ValueError` naming the file for anything that docs/format.md doesn't allow.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise with_way_out(
            FileNotFoundError(f"{path}: no delta there"), "Check the path; sense-engram delta export makes one"
        )
    spans, metadata = read_header_and_metadata(path)
    kind, version = metadata.get("format"), metadata.get("format_version")
    if kind != FORMAT or version not in HASHES:
        what = "no delta of a table" if kind != FORMAT else f"a delta of version {version!r}"
        raise with_way_out(
            ValueError(f"{path} is {what}"),
            f"this library reads versions {' and '.join(map(repr, HASHES))} of {FORMAT!r} (sense-engram delta "
            "export writes it)",
        )
    hashes = HASHES[version]
    try:
        info, checksums = _info(load_json(str(metadata.get("delta"))))
        _check_tensors(spans, info, checksums)
    except ValueError as error:
        raise with_way_out(ValueError(f"{path}: {error}"), "Copy the file again") from None
    row_ids_U = np.array(_mapped(spans["row_ids"], np.dtype("<i8")))
    _check_ids(path, row_ids_U, info.base.rows)
    tensors = {name: _tensor(span) for name, span in spans.items() if name != "row_ids"}
    _check_sum(path, "row_ids", _id_hash(row_ids_U, hashes), checksums)
    for name, values_UW in tensors.items():
        total = 0
        for part in _parts(len(row_ids_U), values_UW.shape[1] * values_UW.element_size()):
            _check_finite(path, name, row_ids_U[part], values_UW[part])
            total += int(row_hashes(row_ids_U[part], _as_bytes(values_UW[part]), hashes).sum())
        _check_sum(path, name, total, checksums)
    return Delta(
        path, info, row_ids_U, tensors.pop("rows"), {_state_name(name): one for name, one in tensors.items()}
    )


def _state_name(tensor: str) -> str:
    return tensor.removeprefix("state.")


def _info(values: Any) -> tuple[DeltaInfo, dict[str, str]]:
    """Raises `ValueError` naming the field that can't be."""
    known = {one.name for one in dataclasses.fields(DeltaInfo)} | {"checksums"}
    if not isinstance(values, dict) or values.keys() != known:
        raise ValueError(f"its description must be an object of {', '.join(sorted(known))}")
    base, checksums = values["base"], values["checksums"]
    names = {one.name for one in dataclasses.fields(TableIdentity)}
    _require(isinstance(base, dict) and base.keys() == names, f"base must be an object of {', '.join(sorted(names))}")
    for name in ("rows", "width"):
        _require(_is_count(base[name]) and base[name] >= 1, f"base.{name} = {base[name]!r}: an integer, at least 1")
    _require(isinstance(base["digest"], str) and _DIGEST.fullmatch(base["digest"]), "base.digest: 64 hex digits")
    kinds = (BLOCK_CHECKSUMS, SAMPLED_ROWS)
    _require(base["digest_of"] in kinds, f"base.digest_of = {base['digest_of']!r}: one of {kinds}")
    _require(isinstance(base["dtype"], str), "base.dtype must be a string")
    if base["digest_of"] == BLOCK_CHECKSUMS:
        _require(base["dtype"] in DTYPES, f"base.dtype = {base['dtype']!r}: one of {', '.join(DTYPES)}")
    _require(isinstance(base["provenance"], dict), "base.provenance must be an object")
    _require(values["step"] is None or _is_count(values["step"]), f"step = {values['step']!r}: null, or 0 or more")
    _require(_is_count(values["updates"]), f"updates = {values['updates']!r}: 0 or more")
    for name in ("extra", "state_steps", "checksums"):
        _require(isinstance(values[name], dict), f"{name} must be an object")
    _require(all(map(_is_count, values["state_steps"].values())), "state_steps must be integers, 0 or more")
    del values["checksums"]
    return DeltaInfo(**{**values, "base": TableIdentity(**base)}), checksums


def _check_tensors(spans: Mapping[str, TensorSpan], info: DeltaInfo, checksums: Mapping[str, str]) -> None:
    for name in ("row_ids", "rows"):
        _require(name in spans, f"it has no tensor {name}")
    states = {name: _STATE.fullmatch(name) for name in spans if name not in ("row_ids", "rows")}
    for name, match in states.items():
        _require(match is not None, f"tensor {name!r} isn't known here")
    named = {_state_name(name) for name in states}
    _require(named == info.state_steps.keys(), f"states are {sorted(named)}, state_steps {sorted(info.state_steps)}")
    _require(spans.keys() == checksums.keys(), "checksums must be of its tensors, each of them")
    ids, rows = spans["row_ids"], spans["rows"]
    _require(
        ids.dtype == "I64" and len(ids.shape) == 1, f"row_ids are {ids.dtype} {list(ids.shape)}, expected I64 [U]"
    )
    num_rows = ids.shape[0]
    expected = (num_rows, info.base.width)
    _require(
        rows.dtype in _TORCH and rows.shape == expected,
        f"rows are {rows.dtype} {list(rows.shape)}, expected {', '.join(_TORCH)} {list(expected)}",
    )
    for name in states:
        one = spans[name]
        is_state = one.dtype == "F32" and len(one.shape) == 2 and one.shape[0] == num_rows and one.shape[1] >= 1
        _require(is_state, f"{name} is {one.dtype} {list(one.shape)}, expected F32 [{num_rows}, W]")


def _require(ok: object, text: str) -> None:
    if not ok:
        raise ValueError(text)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _mapped(span: TensorSpan, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if not span.num_bytes:
        return np.empty(span.shape, dtype)
    # Mode "c" (a write stays in memory) for torch, which has no read-only tensors.
    return np.memmap(span.path, dtype, "c", span.offset, span.shape)


def _tensor(span: TensorSpan) -> torch.Tensor:
    dtype = _TORCH[span.dtype]
    return torch.from_numpy(_mapped(span, _NUMPY[dtype])).view(dtype)


# Both


def _check_ids(path: Path, row_ids_U: np.ndarray[Any, Any], num_rows: int) -> None:
    steps = np.diff(row_ids_U)
    if (steps <= 0).any():
        at = int(np.flatnonzero(steps <= 0)[0])
        what = "twice" if steps[at] == 0 else f"before {row_ids_U[at + 1]}"
        raise with_way_out(
            ValueError(f"{path}: row id {row_ids_U[at]} comes {what}; a delta's ids ascend"), "Make the delta anew"
        )
    if len(row_ids_U) and (row_ids_U[0] < 0 or row_ids_U[-1] >= num_rows):
        outside = row_ids_U[0] if row_ids_U[0] < 0 else row_ids_U[-1]
        raise with_way_out(
            ValueError(f"{path}: row id {outside}: its base has rows 0 to {num_rows - 1}"), "Make the delta anew"
        )


def _check_finite(path: Path, name: str, row_ids_U: np.ndarray[Any, Any], values_UW: torch.Tensor) -> None:
    bad_U = ~torch.isfinite(values_UW).all(dim=1)
    if bad_U.any():
        row_id = int(row_ids_U[int(bad_U.nonzero()[0])])
        raise with_way_out(
            ValueError(
                f"{path}: row {row_id} has NaN or infinite values in {name}, {int(bad_U.sum())} rows at least have"
            ),
            "A delta keeps numbers only: go back to a state from before, and lower the learning rate",
        )


def _check_sum(path: Path, name: str, total: int, checksums: Mapping[str, str]) -> None:
    found = f"{total % 2**64:016x}"
    if found != checksums[name]:
        raise with_way_out(
            ValueError(f"{path}: {name} has checksum {found}, expected {checksums[name]}: the file is damaged"),
            "Copy it again",
        )


def _id_hash(row_ids_U: np.ndarray[Any, Any], version: int = HASH_VERSION) -> int:
    places_U = np.arange(len(row_ids_U), dtype=np.int64)
    return int(row_hashes(places_U, row_ids_U.view(np.uint8).reshape(-1, 8), version).sum())


def _as_bytes(values_UW: torch.Tensor) -> np.ndarray[Any, Any]:
    return values_UW.view(torch.uint8).numpy()


def _parts(num_rows: int, row_bytes: int) -> list[slice]:
    rows = max(1, PART_BYTES // max(1, row_bytes))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]
