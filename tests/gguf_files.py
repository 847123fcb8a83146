"""GGUF files, their headers written by the package gguf, at any size. Holes where no row is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

# name -> (type as gguf spells it, shape [rows, width], content): all bytes, or {row: its bytes} with holes between,
# or None for holes alone.
Tensors = Mapping[str, tuple[str, Sequence[int], "bytes | Mapping[int, bytes] | None"]]

DEEPSEEK, QWEN = "blk.{layer}.engram_embd.weight", "per_layer_token_embd.weight"


def write_gguf(
    path: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None, *, arch: str = "llama", most: int = 0
) -> list[Path]:
    """Write one file, or, of `most` tensors each, several; return them."""
    writer = GGUFWriter(path, arch, split_max_tensors=most)
    for key, value in (metadata or {}).items():
        if isinstance(value, list):
            of = GGUFValueType.STRING if value and isinstance(value[0], str) else GGUFValueType.UINT64
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=of)
        else:
            writer.add_key_value(key, value, GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32)
    for name, (kind, shape, _) in tensors.items():
        values, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        writer.add_tensor_info(
            name,
            list(shape),
            np.dtype(np.float32),
            math.prod(shape) // values * num_bytes,
            raw_dtype=GGMLQuantizationType[kind],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    files = []
    for file, of_file in zip(writer.fout, writer.tensors, strict=True):
        at = gguf.GGUFWriter.ggml_pad(file.tell(), writer.data_alignment)
        for name, info in of_file.items():
            _, shape, content = tensors[name]
            row_bytes = info.nbytes // math.prod(shape[:-1])
            for row, raw in (content if isinstance(content, Mapping) else {0: content or b""}).items():
                file.seek(at + row * row_bytes)
                file.write(raw)
            at += gguf.GGUFWriter.ggml_pad(info.nbytes, writer.data_alignment)
        file.truncate(at)
        files.append(Path(file.name))
    writer.close()
    return files


def rows_of(kind: str, num_rows: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Bytes of random rows, [N, bytes of a row], with scales that are no NaN and no infinity."""
    values, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    if values == 1:
        floats = generator.standard_normal((num_rows, width)).astype(np.float32)
        if kind == "BF16":
            return (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return floats.astype({"F32": np.float32, "F16": np.float16}[kind]).view(np.uint8)
    rows = generator.integers(0, 256, (num_rows, width // values, num_bytes), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0,) if values == 32 else (0, 2))
    for at in {*places, 2} if kind in ("Q4_1", "Q5_1") else places:
        rows[:, :, at : at + 2] = generator.uniform(-0.1, 0.1, rows.shape[:2]).astype("<f2")[..., None].view(np.uint8)
    return rows.reshape(num_rows, -1)


def slow_rows(rows_NB: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """float32 [N, width], by the package gguf."""
    return gguf.dequantize(np.ascontiguousarray(rows_NB), GGMLQuantizationType[kind])
