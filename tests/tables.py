"""Small tables for the tests, and what reads them without the code under test: NumPy, JSON, a slow hash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from sense_v2.engram.storage import MMapEmbeddingStorage

N, D = 50, 8
DTYPES = ("float32", "float16", "bfloat16")


def make(path: Path, **arguments: Any) -> MMapEmbeddingStorage:
    return MMapEmbeddingStorage(N, D, path, **arguments)


def on_disk(path: Path, dtype: str = "float32", width: int = D) -> np.ndarray[Any, Any]:
    """The file's rows as float32, by NumPy alone."""
    if dtype == "bfloat16":
        bits = np.fromfile(path, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(-1, width)
    return np.fromfile(path, dtype={"float32": "<f4", "float16": "<f2"}[dtype]).astype(np.float32).reshape(-1, width)


def manifest(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_suffix(".json").read_text()))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def gradients_of(table: MMapEmbeddingStorage) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = table.gradients()
    assert gradients is not None
    return gradients


def run_python(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def in_a_fork(call: Callable[[], object]) -> str:
    """What `call` returns, or the error it raises, in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            result = str(call())
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(write, result.encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        result = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return result


# Block checksums as docs/format.md has them, a row at a time; those of version 2 a word at a time.


def slow_row_hash(row_id: int, row: bytes, version: int = 3) -> int:
    if version == 2:
        return _slow_word_hash(row_id, row)
    return xxhash.xxh3_64_intdigest(row, row_id % 2**64) if any(row) else 0


def splitmix(x: int) -> int:
    z = (x + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _slow_word_hash(row_id: int, row: bytes) -> int:
    word_bytes = max(size for size in (1, 2, 4, 8) if len(row) % size == 0)
    words = [int.from_bytes(row[at : at + word_bytes], "little") for at in range(0, len(row), word_bytes)]
    s = sum(word * (splitmix(j) | 1) for j, word in enumerate(words)) % 2**64
    s ^= s >> 32
    s = s * 0xBF58476D1CE4E5B9 % 2**64
    s ^= s >> 29
    return s * (splitmix(row_id) | 1) % 2**64


def slow_sums(path: Path, num_rows: int = N, version: int = 3) -> list[str]:
    """Checksums of all blocks of a file, as its manifest should have them."""
    raw = path.read_bytes()
    row_bytes = len(raw) // num_rows
    block_rows = 4096
    while block_rows * 1024 < num_rows:
        block_rows *= 2
    sums = [0] * (-(-num_rows // block_rows))
    for row_id in range(num_rows):
        row = raw[row_id * row_bytes : (row_id + 1) * row_bytes]
        sums[row_id // block_rows] += slow_row_hash(row_id, row, version)
    return [f"{value % 2**64:016x}" for value in sums]
