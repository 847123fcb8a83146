"""Cold rows, for benchmarks/lookup.py: its parts cold, ahead and peer. Reads that find nothing in the page cache."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reading import PAGE_BYTES, Probe, Scale, Ways, cold, in_turns, open_rows, random_ids, ratio, reads_of, say

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf.experiments.step_times import spread


def cold_part(probe: Probe, path: Path, scale: Scale) -> dict[str, Any]:
    rounds = scale.cold_rounds
    num_rows = path.stat().st_size // PAGE_BYTES
    ceilings = {
        f"{jobs} x {depth}": probe.reads(path, depth, jobs, scale.ceiling_seconds)
        for jobs, depth in ((1, 1), (1, 64), (2, 64))
    }
    say("disk, random 4-KiB reads/s past the cache", {name: round(value) for name, value in ceilings.items()})
    figures: dict[str, Any] = {"ceiling reads/s": ceilings}

    def mapped(advice: int | None) -> Callable[[list[torch.Tensor]], None]:
        def read(batches: list[torch.Tensor]) -> None:
            memmap = np.memmap(path, "<f4", "r", shape=(num_rows, PAGE_BYTES // 4))
            if advice is not None:
                memmap._mmap.madvise(advice)  # type: ignore[attr-defined]  # NumPy's own name for the mapping
            for batch in batches:
                memmap.take(batch.numpy().reshape(-1), 0, None, "clip")

        return read

    def ours(batches: list[torch.Tensor]) -> None:
        storage = opened[0]
        for batch in batches:
            storage(batch)

    opened: list[MMapEmbeddingStorage] = []
    for num_ids, calls in ((16, 24), (scale.large_ids // 2, 1)):
        ways = {"default": mapped(None), "MADV_RANDOM": mapped(mmap.MADV_RANDOM), "storage": ours}
        if num_ids > 1024:
            del ways["default"]  # minutes
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            names = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
            for name in names:
                some = 2 if name == "default" else calls
                batches = random_ids(num_rows, num_ids, some, seed=turn)
                with cold(path) as storage:
                    opened[:] = [storage]
                    start = time.perf_counter()
                    ways[name](batches)
                    seconds[name].append((time.perf_counter() - start) / some)
                    opened.clear()
        result = {name: spread(values) for name, values in seconds.items()}
        case: dict[str, Any] = {"rows/s": round(num_ids / result["storage"]["median"])}
        case |= {f"x {name}": ratio(result, name) for name in ways if name != "storage"}
        case["of the disk, 2 x 64"] = round(case["rows/s"] / ceilings["2 x 64"], 2)
        say(f"{num_ids} cold rows", case)
        figures[f"{num_ids} rows"] = {**case, "seconds": result}
    return figures


def ahead(path: Path, scale: Scale) -> dict[str, Any]:
    """Decoding steps of 16 rows for each of two layers, and batches of 4,096 rows as in training."""
    num_rows = path.stat().st_size // PAGE_BYTES
    figures: dict[str, Any] = {}
    left, product = torch.randn(192, 192), torch.empty(192, 192)

    def work(pieces: int) -> None:
        for _ in range(pieces):
            torch.mm(left, left, out=product)

    # As much work each time, whatever happens meanwhile.
    work(200)
    start = time.perf_counter()
    work(200)
    pieces_a_second = 200 / (time.perf_counter() - start)

    order = random.Random(0)
    train_ids, train_steps = min(4096, scale.large_ids), min(4, scale.small_calls)
    cases = (("decode", 16, min(40, scale.small_calls), 3e-3), ("train", train_ids, train_steps, 60e-3))
    for case, num_ids, steps, between in cases:
        pieces = round(between / 2 * pieces_a_second)
        for state in ("cold", "warm"):
            seconds: dict[str, list[float]] = {"off": [], "on": [], "resident": []}
            # What there is to see in the warm ones is small.
            for turn in range(scale.cold_rounds * (1 if state == "cold" else 3)):
                with cold(path) as storage:
                    drawn = iter(random_ids(num_rows, num_ids, 6 * steps, seed=turn))
                    pairs = [(next(drawn), next(drawn)) for _ in range(3 * steps)]
                    if state == "warm":
                        for batch in [batch for pair in pairs for batch in pair] + [pairs[0][0]] * 80:
                            storage(batch)
                    # Step by step, so that a moment in which the machine is slow counts for all.
                    for step in range(steps):
                        names = ["off", "on", "resident"]
                        order.shuffle(names)
                        for name, pair in zip(names, pairs[3 * step : 3 * step + 3], strict=True):
                            start = time.perf_counter()
                            if name == "on":
                                for batch in pair:
                                    storage.prefetch(batch)
                            for batch in pair:
                                work(pieces)
                                if name != "resident":
                                    storage(batch)
                            seconds[name].append(time.perf_counter() - start)
            result = {name: spread(values) for name, values in seconds.items()}
            figures[f"{case}, {state}"] = {
                "off / on": ratio(result, "off", "on"),
                "without rows / on": ratio(result, "resident", "on"),
                "without rows / off": ratio(result, "resident", "off"),
                "seconds": result,
            }
            say(f"{case} steps, {state}", {k: v for k, v in figures[f"{case}, {state}"].items() if k != "seconds"})
    return figures


# The peer


def peer(path: Path, scale: Scale) -> dict[str, Any]:
    """`engramdb.Store.fetch` on the same file, warm, and its io_uring page reader, cold."""
    import engramdb  # type: ignore[import-not-found, import-untyped, unused-ignore]

    row_bytes, figures = 256, {}
    shards = path.with_suffix(".shards")
    shards.mkdir()
    os.link(path, shards / "shard_000.bin")
    num_rows = path.stat().st_size // row_bytes
    # Its width is counted in bytes.
    store, storage = engramdb.Store(str(shards), 1, num_rows, row_bytes), open_rows(path, row_bytes)
    for num_ids, calls, rounds in (
        (16, min(500, scale.small_calls), scale.small_rounds),
        (scale.large_ids, 2, scale.large_rounds),
    ):
        # A million rows, which stay in memory.
        batches = random_ids(min(1 << 20, num_rows), num_ids, calls)
        lists = [batch.reshape(-1).tolist() for batch in batches]
        assert storage(batches[0]).numpy().tobytes() == bytes(store.fetch(lists[0]))
        ways: Ways = {"engramdb": partial(_fetch, store, lists), "storage": reads_of(storage, batches)}
        result = in_turns(ways, calls, rounds)
        figures[f"warm, {num_ids} rows"] = {"x engramdb": ratio(result, "engramdb"), "seconds": result}
    storage.close()
    del store
    reader = engramdb.IoUringPageReader(PAGE_BYTES)
    with open(path, "rb") as file:
        for num_ids, calls in ((16, 24), (scale.large_ids // 2, 1)):
            seconds: dict[str, list[float]] = {"engramdb": [], "storage": []}
            for turn in range(scale.cold_rounds):
                batches = random_ids(path.stat().st_size // PAGE_BYTES, num_ids, calls, seed=turn)
                for name in ("engramdb", "storage") if turn % 2 else ("storage", "engramdb"):
                    with cold(path) as opened:
                        start = time.perf_counter()
                        for batch in batches:
                            if name == "storage":
                                opened(batch)
                            else:
                                offsets = (batch.reshape(-1) * PAGE_BYTES).tolist()
                                reader.read_pages([file.fileno()] * num_ids, offsets)
                        seconds[name].append((time.perf_counter() - start) / calls)
            result = {name: spread(values) for name, values in seconds.items()}
            figures[f"cold, {num_ids} rows"] = {
                "x engramdb": ratio(result, "engramdb"),
                "backend": str(reader.backend),
                "seconds": result,
            }
    for case, values in figures.items():
        say(case, {"x engramdb": values["x engramdb"]})
    return figures


def _fetch(store: Any, lists: list[list[int]], call: int) -> Any:
    return store.fetch(lists[call])
