"""The tables that tests/contract runs over, and what their files hold, read without the code under test.

`KINDS` are names; `open_kind(name, folder)` makes such a table's files there where there are none, and opens it;
`rows_in_files(name, folder)` are its rows as float32 [N, D], from the raw bytes: NumPy, JSON, torch's own float8, the
package gguf.
"""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoints import deepseek_rows, slow_deepseek_rows, write_shard
from gguf_files import DEEPSEEK, rows_of, slow_rows, write_gguf
from tables import D, N, make, on_disk

from sense_v2.engram.delta.joined_tables import JoinedTables
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.sharded_table import ShardedTable
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.upkeep.convert import convert_table

MAPPED = ("float32", "float16", "bfloat16")
COMPACT = ("int8", "float8_e4m3fn", "int4")
GGUF = {"gguf Q8_0": 64, "gguf Q4_K": 256, "gguf BF16": 16}
RELEASED = ("deepseek", "qwen bfloat16", "qwen float8", *GGUF)
OVERLAYS = tuple(f"overlay on {base}" for base in ("float32", "bfloat16", "int8", "deepseek", "gguf Q8_0", "joined"))
SHARDED = ("ranks, one file", "ranks, shards")
TRAINABLE = (*MAPPED, *OVERLAYS, *SHARDED)
READ_ONLY = (
    *(f"{dtype}, read-only" for dtype in MAPPED),
    "overlay on float32, read-only",
    *COMPACT,
    *RELEASED,
    "joined",
)
KINDS = (*TRAINABLE, *READ_ONLY)

CHANGED = (40, 3)
"""What an overlay's first commit changes: to 1, 2, 3, …"""
WIDTHS = {"deepseek": 256, "qwen bfloat16": 16, "qwen float8": 16, **GGUF}
QWEN_SCALE = 0.3
PARTS = {"first.dat": 20, "second.dat": N - 20}
"""Of joined tables, and their rows."""


def width_of(kind: str) -> int:
    return WIDTHS.get(_base(kind), D)


def type_of(kind: str) -> torch.dtype:
    """Of the rows that are looked up."""
    floats = ("joined", "int8", "int4", "qwen float8", "gguf Q8_0", "gguf Q4_K")
    types = {**dict.fromkeys(floats, torch.float32), "float8_e4m3fn": torch.bfloat16}
    return types.get(_base(kind)) or getattr(torch, _base(kind), None) or _type_of_others(kind)


def _type_of_others(kind: str) -> torch.dtype:
    return torch.float32 if kind in SHARDED else torch.bfloat16


def _base(kind: str) -> str:
    return kind.removeprefix("overlay on ").removesuffix(", read-only")


def open_kind(kind: str, folder: Path, **settings: Any) -> Any:
    mode = "r" if kind in READ_ONLY else "r+"
    if kind.startswith("overlay"):
        path, base = folder / "changed.safetensors", _open_table(_base(kind), folder, mode="r", is_base=True)
        if not path.exists():
            first = OverlayStorage(base, path)
            first.write(torch.tensor(CHANGED), first_changes(width_of(kind)))
            first.commit()
            base = first.release()
        return OverlayStorage(base, path, mode=mode)
    if kind in SHARDED:
        layout = "file" if kind == SHARDED[0] else "shards"
        return ShardedTable(N, D, folder / "engram_table.dat", ranks=Ranks(), layout=layout, **settings)
    return _open_table(_base(kind), folder, mode=mode, **settings)


def first_changes(width: int) -> torch.Tensor:
    return torch.arange(1.0, 2 * width + 1).reshape(2, width) % 100


def _open_table(kind: str, folder: Path, *, mode: str, is_base: bool = False, **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    path = folder / "engram_table.dat"
    if kind in RELEASED:
        path = folder / ("model.gguf" if kind in GGUF else "model.safetensors")
        if not path.exists():
            _write_released(kind, path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not checked", UserWarning)
            return open_released_table(path, 1)
    if kind == "joined":
        for name, num_rows in PARTS.items():
            if not (folder / name).exists():
                MMapEmbeddingStorage(num_rows, D, folder / name, init_std=1.0).close()
        return JoinedTables([MMapEmbeddingStorage(n, D, folder / name, mode="r") for name, n in PARTS.items()])
    if kind in COMPACT:
        if not path.exists():
            make(folder / "from.dat", init_std=1.0).close()
            convert_table(folder / "from.dat", path, kind)
        return MMapEmbeddingStorage(N, D, path, dtype=kind, mode="r")
    if not path.exists():
        make(path, dtype=kind, init_std=1.0).close()
    return make(path, dtype=kind, mode=mode, **settings)


def _write_released(kind: str, path: Path) -> None:
    if kind in GGUF:
        name, width = kind.removeprefix("gguf "), GGUF[kind]
        write_gguf(path, {DEEPSEEK.format(layer=1): (name, (N, width), rows_of(name, N, width).tobytes())})
        return
    if kind == "deepseek":
        codes, scales = deepseek_rows(N)
        name = "layers.1.engram.embed"
        tensors: dict[str, Any] = {
            f"{name}.weight": ("F8_E4M3", codes.shape, codes.tobytes()),
            f"{name}.scale": ("F8_E8M0", scales.shape, scales.tobytes()),
        }
    else:
        name = "model.layers.1.ple.ple_embedding.ngram_embedding.weight"
        values = torch.randn(N, 16, generator=torch.Generator().manual_seed(0))
        stored = values.to(torch.bfloat16 if kind == "qwen bfloat16" else torch.float8_e4m3fn).view(torch.uint8)
        dtype = "BF16" if kind == "qwen bfloat16" else "F8_E4M3"
        tensors = {name: (dtype, (N, 16), stored.numpy().tobytes())}
        if kind == "qwen float8":
            tensors[f"{name}_scale"] = ("F32", (1,), struct.pack("<f", QWEN_SCALE))
    write_shard(path, tensors)


# What the files hold


def rows_in_files(kind: str, folder: Path) -> np.ndarray[Any, Any]:
    base = _base(kind)
    path = folder / "engram_table.dat"
    if base in MAPPED:
        rows = on_disk(path, base)
    elif base == "joined":
        rows = np.concatenate([on_disk(folder / name) for name in PARTS])
    elif base in COMPACT:
        rows = _compact_rows(base, path)
    elif base in GGUF:
        (tensor,) = gguf.GGUFReader(folder / "model.gguf").tensors
        rows = slow_rows(tensor.data, tensor.tensor_type.name)
    elif base in RELEASED:
        rows = _released_rows(base, folder / "model.safetensors")
    else:
        rows = on_disk(path if kind == SHARDED[0] else path.with_name("engram_table.0-of-1.dat"))
    if kind.startswith("overlay"):
        tensors = read_safetensors(folder / "changed.safetensors")
        ids = np.frombuffer(tensors["row_ids"][2], "<i8")
        rows = rows.copy()
        rows[ids] = _floats(*tensors["rows"])
    return rows


def _compact_rows(kind: str, path: Path) -> np.ndarray[Any, Any]:
    raw = np.fromfile(path, np.uint8).reshape(N, -1)
    if kind == "int4":
        return gguf.dequantize(raw, gguf.GGMLQuantizationType.IQ4_NL)[:, :D]
    codes, scales = np.ascontiguousarray(raw[:, :D]), np.ascontiguousarray(raw[:, D:])
    if kind == "int8":
        return codes.view(np.int8).astype(np.float32) * scales.view("<f4")
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    factors = torch.from_numpy(2.0 ** (scales.astype(np.float64) - 127)).float()
    return (values * factors).bfloat16().float().numpy()


def _released_rows(kind: str, path: Path) -> np.ndarray[Any, Any]:
    tensors = read_safetensors(path)
    if kind == "deepseek":
        raw = {name.rpartition(".")[2]: np.frombuffer(tensors[name][2], np.uint8).reshape(N, -1) for name in tensors}
        return slow_deepseek_rows(raw["weight"].copy(), raw["scale"].copy()).float().numpy()
    (codes,) = (one for one in tensors.values() if one[1] == [N, 16])
    if codes[0] == "BF16":
        return _floats(*codes)
    values = torch.frombuffer(bytearray(codes[2]), dtype=torch.float8_e4m3fn).reshape(N, 16)
    return (values.float() * torch.tensor(QWEN_SCALE)).numpy()


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (type, shape, bytes): a length, a JSON header, the bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    entries = json.loads(raw[8 : 8 + length])
    entries.pop("__metadata__", None)
    data = raw[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in entries.items()
    }


def _floats(dtype: str, shape: list[int], raw: bytes) -> np.ndarray[Any, Any]:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32).reshape(shape)


def rounded(rows: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """float32 rounded to the nearest of `dtype`, ties to even: by NumPy, or, for bfloat16, by the bits."""
    if dtype == torch.float16:
        return rows.astype(np.float16).astype(np.float32)
    if dtype == torch.bfloat16:
        bits = rows.view(np.uint32).astype(np.uint64)
        return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)
    return rows
