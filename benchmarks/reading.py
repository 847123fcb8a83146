"""What the reading benchmarks share: the C probe, files of rows, ways that take turns.

All ways of a case take turns in each round, in an order drawn anew for each: PyTorch's threads spin for a while after
an operation, so who came next would always pay for it. Figures are medians over rounds, with the tenth and ninetieth
percentile.

This module measures nothing by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from turns import drop_from_cache

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf.experiments.step_times import spread

PAGE_BYTES = 4096
Ways = dict[str, Callable[[int], Any]]


@dataclass(frozen=True)
class Scale:
    """How large the files are and how often everything is done."""

    warm_bytes: int
    cold_bytes: int
    small_calls: int
    small_rounds: int
    large_rounds: int
    cold_rounds: int
    ceiling_seconds: float
    large_ids: int
    """Of a large warm batch; a cold one is half as large."""
    millions: tuple[int, ...]
    """Rows of the tables that differ in size, the largest ones sparse."""


FULL = Scale(2 << 30, 6 << 30, 2000, 15, 9, 7, 1.0, 32_768, (1, 100, 768))
QUICK = Scale(1 << 30, 2 << 30, 2000, 5, 3, 3, 1.0, 32_768, (1, 100, 768))
# Shows that everything runs, and measures nothing.
TINY = Scale(8 << 20, 64 << 20, 4, 1, 1, 1, 0.05, 2048, (1, 2))


class Probe:
    """benchmarks/probe.c, compiled here."""

    WAYS = tuple((threads, way, stream) for threads in (1, 2) for way in range(3) for stream in range(2))
    NAMES = ("memcpy", "rows ahead", "rows side by side")

    def __init__(self, folder: Path) -> None:
        library = folder / "probe.so"
        source = Path(__file__).with_name("probe.c")
        subprocess.run(["cc", "-O3", "-fopenmp", "-shared", "-fPIC", "-o", library, source, "-lpthread"], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.probe_reads.restype = ctypes.c_double

    def name(self, threads: int, way: int, stream: int) -> str:
        return f"probe, {threads} threads, {self.NAMES[way]}{', past the cache' if stream else ''}"

    def gather(
        self, table: np.ndarray, ids: np.ndarray, out: torch.Tensor, threads: int, way: int, stream: int
    ) -> None:
        self._library.probe_gather(
            ctypes.c_void_p(table.ctypes.data),
            ctypes.c_long(table.shape[1] * table.itemsize),
            ctypes.c_void_p(ids.ctypes.data),
            ctypes.c_long(len(ids)),
            ctypes.c_void_p(out.data_ptr()),
            threads,
            way,
            stream,
        )

    def reads(self, path: Path, depth: int, jobs: int, seconds: float = 1.0) -> float:
        size = ctypes.c_int64(path.stat().st_size)
        return float(self._library.probe_reads(str(path).encode(), size, depth, jobs, ctypes.c_double(seconds)))


def write_rows(path: Path, num_bytes: int) -> None:
    """Random bytes that are no NaN, written and synced: a hole, or space that is only reserved, is never read."""
    values = np.random.default_rng(0).standard_normal(4 << 20, dtype=np.float32)
    with open(path, "wb") as file:
        for start in range(0, num_bytes, values.nbytes):
            file.write(values.data.cast("B")[: min(values.nbytes, num_bytes - start)])
        file.flush()
        os.fsync(file.fileno())


def open_rows(path: Path, row_bytes: int) -> MMapEmbeddingStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no manifest
        return MMapEmbeddingStorage(path.stat().st_size // row_bytes, row_bytes // 4, path, mode="r").eval()


def in_turns(ways: Ways, calls: int, rounds: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Seconds a call: each round runs `calls` calls of one way, then of the next."""
    order = random.Random(seed)
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        order.shuffle(names)
        for name in names:
            way = ways[name]
            start = time.perf_counter()
            for call in range(calls):
                way(call)
            taken = (time.perf_counter() - start) / calls
            if turn >= 0:
                seconds[name].append(taken)
    return {name: spread(values) for name, values in seconds.items()}


def ratio(result: dict[str, dict[str, float]], peer: str, ours: str = "storage") -> float:
    return round(result[peer]["median"] / result[ours]["median"], 2)


def touch(rows: np.ndarray) -> int:
    """Reads a byte of every page."""
    return int(np.asarray(rows).reshape(-1).view(np.uint8)[::PAGE_BYTES].max())


def random_ids(num_rows: int, num_ids: int, batches: int, seed: int = 0) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.integers(0, num_rows, (1, 1, num_ids))) for _ in range(batches)]


def say(case: str, figures: dict[str, Any]) -> None:
    print(f"  {case}: " + ", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)


def reads_of(storage: MMapEmbeddingStorage, batches: list[torch.Tensor]) -> Callable[[int], torch.Tensor]:
    return lambda call: storage(batches[call])


@contextlib.contextmanager
def cold(path: Path) -> Iterator[MMapEmbeddingStorage]:
    drop_from_cache(path)
    storage = open_rows(path, PAGE_BYTES)
    yield storage
    storage.close()
