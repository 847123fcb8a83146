"""How fast rows are read, warm and cold, against NumPy, against a table in RAM, and against the machine.

The physics. A warm row is a random access: its cache lines come from memory, with the TLB miss in front of them, and
the result goes back to memory; the ceiling is a C probe (benchmarks/probe.c, the best of memcpy and stores past the
cache, with and without fetching ahead, one thread and two), measured on the same batches. A cold row is a random read
of 4 KiB; the ceiling is what the disk gives past the page cache with two times 64 reads in flight.

Parts (`--parts`), each through the public `storage(row_ids)`, bounds checked:

warm    16, 24 and 32,768 rows of 256 B, 2 KiB, 4 KiB, ids drawn anew for each call from a table of 2 GiB in the page
        cache, against `memmap[ids]`, and a table in RAM with 4-KiB pages: `F.embedding` and `index_select(out=)`.
o1      the same number of distinct warm pages in sparse tables of 1 M, 100 M and 768 M rows.
cold    16 and 16,384 rows of 4 KiB whose pages aren't in memory, against the default mapping and MADV_RANDOM.
ahead   prefetch on and off, warm and cold, with as much other work between asking and reading as a small layer takes.
peer    the same rows and cache state through `engramdb` (PyPI engramdb-python; only where it is installed and named).
shared  memory of N processes that read one file (PSS).

    python benchmarks/lookup.py [--quick] [--parts warm,o1,cold,ahead,shared] [--folder data]

All ways of a case take turns in each round, in an order that changes; figures are medians over rounds, with the
tenth and ninetieth percentile in the JSON. The last line of stdout is JSON. Needs Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from turns import drop_from_cache, machine, spread

from sense_v2.engram import gather
from sense_v2.engram.storage import MMapEmbeddingStorage

PAGE_BYTES = 4096
Ways = dict[str, Callable[[int], Any]]


class Probe:
    """benchmarks/probe.c, compiled here."""

    def __init__(self, folder: Path) -> None:
        library = folder / "probe.so"
        source = Path(__file__).with_name("probe.c")
        subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", library, source, "-lpthread"], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.probe_reads.restype = ctypes.c_double

    def gather(
        self, table: np.ndarray, ids: np.ndarray, out: torch.Tensor, threads: int, stream: int, ahead: int
    ) -> None:
        self._library.probe_gather(
            ctypes.c_void_p(table.ctypes.data),
            ctypes.c_long(table.shape[1] * table.itemsize),
            ctypes.c_void_p(ids.ctypes.data),
            ctypes.c_long(len(ids)),
            ctypes.c_void_p(out.data_ptr()),
            threads,
            stream,
            ahead,
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


def in_turns(ways: Ways, calls: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds a call: each round runs `calls` calls of one way, then of the next."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
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


# Warm


def warm(probe: Probe, folder: Path, quick: bool) -> dict[str, Any]:
    path = folder / "warm.dat"
    write_rows(path, (1 if quick else 2) << 30)
    cases = {}
    for row_bytes in (256, 2048, 4096):
        storage = open_rows(path, row_bytes)
        memmap = np.memmap(path, "<f4", "r", shape=(storage.num_embeddings, row_bytes // 4))
        with mmap.mmap(-1, path.stat().st_size) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            resident = torch.frombuffer(memory, dtype=torch.float32).view(*memmap.shape)
            resident.numpy()[:] = memmap
            # Both mappings have their page tables, so that no way pays for the other's first touch.
            touch(storage.mmap)
            touch(memmap)
            for num_ids in (16, 24, 32_768):
                figures = _warm_case(probe, storage, memmap, resident, num_ids, quick)
                cases[f"{num_ids} x {row_bytes} B"] = figures
                say(f"{num_ids} rows of {row_bytes} B", {k: v for k, v in figures.items() if k != "seconds"})
            del resident
        storage.close()
        del memmap
    path.unlink()
    return cases


def _warm_case(
    probe: Probe, storage: MMapEmbeddingStorage, memmap: np.ndarray, resident: torch.Tensor, num_ids: int, quick: bool
) -> dict[str, Any]:
    large = num_ids > 1024
    batches = random_ids(len(memmap), num_ids, 4 if large else 2000)
    numbers = [batch.numpy() for batch in batches]
    flat = [batch.reshape(-1) for batch in batches]
    out = torch.empty(num_ids, memmap.shape[1])
    ways: Ways = {
        "numpy": lambda call: memmap[numbers[call]],
        "numpy_to_torch": lambda call: torch.from_numpy(memmap[batches[call].numpy()]),
        "embedding": lambda call: F.embedding(batches[call], resident),
        "index_select": lambda call: torch.index_select(resident, 0, flat[call], out=out),
        "storage": lambda call: storage(batches[call]),
    }

    def add_probe(*way: int) -> None:
        name = " ".join(map(str, ("probe", *way)))
        ways[name] = lambda call: probe.gather(memmap, numbers[call].reshape(-1), out, *way)

    if large:
        for threads in (1, 2):
            for stream in (0, 1):
                for ahead in (0, 4):
                    add_probe(threads, stream, ahead)
    assert torch.equal(storage(batches[1]), F.embedding(batches[1], resident))
    with torch.no_grad():
        result = in_turns(ways, len(batches), (3 if quick else 7) if large else (5 if quick else 15))
    figures: dict[str, Any] = {
        "M rows/s": round(num_ids / result["storage"]["median"] / 1e6, 2),
        "x numpy": ratio(result, "numpy"),
        "x numpy to torch": ratio(result, "numpy_to_torch"),
        "x embedding": ratio(result, "embedding"),
        "x index_select": ratio(result, "index_select"),
    }
    if large:
        best = min((name for name in result if name.startswith("probe")), key=lambda name: result[name]["median"])
        figures["of the best probe"] = ratio(result, best)
        figures["best probe M rows/s"] = round(num_ids / result[best]["median"] / 1e6, 2)
    return {**figures, "seconds": result}


def o1(folder: Path, quick: bool) -> dict[str, Any]:
    """Ids on 4,096 pages that are spread over the table evenly, whatever its size."""
    storages = {}
    batches: dict[str, list[torch.Tensor]] = {}
    generator = np.random.default_rng(0)
    for millions in (1, 100, 768):
        name = f"{millions} M"
        storages[name] = MMapEmbeddingStorage(
            millions * 1_000_000, 64, folder / f"o1_{millions}" / "engram_table.dat", sparse=True
        ).eval()
        num_pages = millions * 1_000_000 * 256 // PAGE_BYTES
        # A stride that is odd, so that pages don't share cache sets by being powers of two apart.
        pages = np.linspace(0, num_pages - 1, 4096).astype(np.int64)
        rows = pages * (PAGE_BYTES // 256) + generator.integers(0, PAGE_BYTES // 256, len(pages))
        storages[name](torch.from_numpy(rows))
        batches[name] = [torch.from_numpy(generator.choice(rows, (1, 1, 16))) for _ in range(2000)]
        large = [torch.from_numpy(generator.permutation(rows)) for _ in range(20)]
        batches[name + " large"] = large
    figures: dict[str, Any] = {}
    for suffix, calls in (("", 2000), (" large", 20)):
        result = in_turns(
            {name: _reads_of(storages[name], batches[name + suffix]) for name in storages}, calls, 5 if quick else 21
        )
        figures["4,096 rows" if suffix else "16 rows"] = {
            **{name: ratio(result, name, "1 M") for name in storages},
            "seconds": result,
        }
    for name, storage in storages.items():
        storage.close()
        shutil.rmtree(folder / f"o1_{name.split()[0]}")
    for case, values in figures.items():
        say(case, {f"{name} rows of the time at 1 M": values[name] for name in storages})
    return figures


def _reads_of(storage: MMapEmbeddingStorage, batches: list[torch.Tensor]) -> Callable[[int], torch.Tensor]:
    return lambda call: storage(batches[call])


# Cold


@contextlib.contextmanager
def cold(path: Path) -> Iterator[MMapEmbeddingStorage]:
    drop_from_cache(path)
    storage = open_rows(path, PAGE_BYTES)
    yield storage
    storage.close()


def cold_part(probe: Probe, path: Path, quick: bool) -> dict[str, Any]:
    rounds = 3 if quick else 7
    num_rows = path.stat().st_size // PAGE_BYTES
    ceilings = {f"{jobs} x {depth}": probe.reads(path, depth, jobs) for jobs, depth in ((1, 1), (1, 64), (2, 64))}
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
    for num_ids, calls in ((16, 24), (16_384, 1)):
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


def ahead(path: Path, quick: bool) -> dict[str, Any]:
    """Decoding steps of 16 rows for each of two layers, and batches of 4,096 rows as in training."""
    num_rows = path.stat().st_size // PAGE_BYTES
    figures: dict[str, Any] = {}
    left = torch.randn(512, 512)

    def work(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            torch.mm(left, left)

    for case, num_ids, steps, between in (("decode", 16, 60, 3e-3), ("train", 4096, 4, 60e-3)):
        for state in ("cold", "warm"):
            seconds: dict[str, list[float]] = {"off": [], "on": [], "resident": []}
            for turn in range(3 if quick else 7):
                for name in ("off", "on", "resident") if turn % 2 else ("resident", "on", "off"):
                    batches = random_ids(num_rows, num_ids, 2 * steps, seed=turn)
                    with cold(path) as storage:
                        if state == "warm":
                            for batch in batches:
                                storage(batch)
                            for batch in [*batches[:20]] * 8:
                                storage(batch)
                        start = time.perf_counter()
                        for step in range(steps):
                            pair = batches[2 * step : 2 * step + 2]
                            if name == "on":
                                for batch in pair:
                                    storage.prefetch(batch)
                            for batch in pair:
                                work(between / 2)
                                if name != "resident":
                                    storage(batch)
                        seconds[name].append((time.perf_counter() - start) / steps)
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


def peer(path: Path, quick: bool) -> dict[str, Any]:
    """`engramdb.Store.fetch` on the same file, warm, and its io_uring page reader, cold."""
    import engramdb  # type: ignore[import-not-found]

    row_bytes, figures = 256, {}
    shards = path.with_suffix(".shards")
    shards.mkdir()
    os.link(path, shards / "shard_000.bin")
    num_rows = path.stat().st_size // row_bytes
    # Its width is counted in bytes.
    store, storage = engramdb.Store(str(shards), 1, num_rows, row_bytes), open_rows(path, row_bytes)
    for num_ids, calls, rounds in ((16, 500, 5 if quick else 15), (32_768, 2, 3 if quick else 7)):
        # A million rows, which stay in memory.
        batches = random_ids(1 << 20, num_ids, calls)
        lists = [batch.reshape(-1).tolist() for batch in batches]
        assert storage(batches[0]).numpy().tobytes() == bytes(store.fetch(lists[0]))
        ways: Ways = {"engramdb": partial(_fetch, store, lists), "storage": _reads_of(storage, batches)}
        result = in_turns(ways, calls, rounds)
        figures[f"warm, {num_ids} rows"] = {"x engramdb": ratio(result, "engramdb"), "seconds": result}
    storage.close()
    del store
    reader = engramdb.IoUringPageReader(PAGE_BYTES)
    with open(path, "rb") as file:
        for num_ids, calls in ((16, 24), (16_384, 1)):
            seconds: dict[str, list[float]] = {"engramdb": [], "storage": []}
            for turn in range(3 if quick else 7):
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


# Sharing


def _reads_all(path: Path, row_bytes: int, connection: Any) -> None:
    storage = open_rows(path, row_bytes)
    for batch in random_ids(storage.num_embeddings, 4096, 200, seed=1):
        storage(batch)
    pss, rss = _of_mapping(path)
    connection.send((pss, rss))
    connection.recv()
    connection.send(_of_mapping(path))
    connection.recv()


def _of_mapping(path: Path) -> tuple[int, int]:
    """(PSS, RSS) of this process's mapping of the file, in bytes."""
    pss = rss = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith(("Pss:", "Rss:")):
            value = int(line.split()[1]) * 1024
            pss, rss = (pss + value, rss) if line.startswith("Pss:") else (pss, rss + value)
    return pss, rss


def shared(path: Path, num_processes: int = 4) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    children = []
    for _ in range(num_processes):
        mine, theirs = context.Pipe()
        child = context.Process(target=_reads_all, args=(path, PAGE_BYTES, theirs))
        child.start()
        mine.recv()
        children.append((child, mine))
    found = []
    for _, connection in children:
        connection.send("look again")
        found.append(connection.recv())
    for child, connection in children:
        connection.send("done")
        child.join()
    figures = {
        "processes": num_processes,
        "sum of RSS, MB": round(sum(rss for _, rss in found) / 1e6),
        "sum of PSS, MB": round(sum(pss for pss, _ in found) / 1e6),
        "one RSS, MB": round(found[0][1] / 1e6),
    }
    say("one file", figures)
    return figures


PARTS = ("warm", "o1", "cold", "ahead", "shared")
# Needs `pip install engramdb-python`.
OPTIONAL_PARTS = ("peer",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller files, fewer rounds: a look, no measurement")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--gigabytes", type=int, default=8, help="of the cold table")
    parser.add_argument("--plain", action="store_true", help="without the compiled extension")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - {*PARTS, *OPTIONAL_PARTS}:
        raise SystemExit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if arguments.plain:
        gather.compiled = None
    result: dict[str, Any] = {"benchmark": "lookup", "compiled": gather.compiled is not None, "machine": machine()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        probe = Probe(folder)
        if "warm" in parts:
            print("warm", flush=True)
            result["warm"] = warm(probe, folder, arguments.quick)
        if "o1" in parts:
            print("tables of three sizes, 4,096 warm pages of each", flush=True)
            result["o1"] = o1(folder, arguments.quick)
        if {"cold", "ahead", "peer", "shared"} & set(parts):
            path = folder / "cold.dat"
            write_rows(path, (2 if arguments.quick else arguments.gigabytes) << 30)
            if "cold" in parts:
                print("cold", flush=True)
                result["cold"] = cold_part(probe, path, arguments.quick)
            if "ahead" in parts:
                print("prefetch", flush=True)
                result["ahead"] = ahead(path, arguments.quick)
            if "peer" in parts:
                print("engramdb", flush=True)
                result["peer"] = peer(path, arguments.quick)
            if "shared" in parts:
                print("sharing", flush=True)
                result["shared"] = shared(path)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
