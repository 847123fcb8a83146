"""Released checkpoints, written byte by byte at any size: shards, an index, a config.json. Holes where no row is
given.

Knows the safetensors format by itself (a length, a JSON header, the bytes), so that it can forge what no library
would write. `tests/engram/released/test_released_table.py` has the library read what it writes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

ITEM_BYTES = {"U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4, "I64": 8}

# name -> (dtype, shape, content): all bytes, or {row: its bytes} with holes between, or None for holes alone.
Tensors = Mapping[str, tuple[str, tuple[int, ...], "bytes | Mapping[int, bytes] | None"]]


def header(entries: Mapping[str, Any]) -> bytes:
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_shard(path: Path, tensors: Tensors) -> None:
    entries, offset = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    head = header(entries)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + offset)
        for name, (dtype, shape, content) in tensors.items():
            start = len(head) + entries[name]["data_offsets"][0]
            row_bytes = math.prod(shape[1:]) * ITEM_BYTES[dtype]
            for row, raw in (content if isinstance(content, Mapping) else {0: content or b""}).items():
                file.seek(start + row * row_bytes)
                file.write(raw)


def write_checkpoint(folder: Path, shards: Mapping[str, Tensors], config: Mapping[str, Any] | None = None) -> Path:
    """File name -> its tensors. With an index, and a config.json where one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        write_shard(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def deepseek_config(primes_from: int, num_rows: list[int], **changes: Any) -> dict[str, Any]:
    """config.json of a checkpoint in DeepSeek-V4.1's layout, of 24 heads of 256 values."""
    config = {
        "model_type": "deepseek_v41",
        "vocab_size": 129_280,
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": num_rows,
        "engram_max_ngram_size": 4,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_vocab_size": primes_from,
        "engram_compressed_vocab_size": 99_092,
        "engram_pad_token_id": 2,
    }
    return {**config, **changes}


def deepseek_rows(num_rows: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes [N, 256] (no NaN among them) and scale bytes [N, 8] around 1."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 256, (num_rows, 256), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes, generator.integers(110, 135, (num_rows, 8), dtype=np.uint8)


def slow_deepseek_rows(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> torch.Tensor:
    """As torch itself decodes them: float8 -> float32, times 2^(byte - 127), rounded to bfloat16."""
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    factors = torch.from_numpy(2.0 ** (scales.astype(np.float64) - 127)).float()
    return (values * factors.repeat_interleave(32, dim=-1)).bfloat16()
