"""How fast rows are read, warm and cold, against NumPy, against a table in RAM, and against the machine.

The physics. A warm row is a random access: its cache lines come from memory, with the TLB miss in front of them, and
the result goes back to memory; the ceiling is a C probe (benchmarks/probe.c, the best of memcpy, rows asked for ahead
and rows side by side, stored to the cache or past it, one thread and two), measured on the same batches, each into a
buffer of its own that is used again. A result of ours that the caller has dropped is the next one's buffer, too;
NumPy's and `F.embedding`'s is new each time. A cold row is a random read of 4 KiB; the ceiling is what the disk gives
past the page cache with two times 64 reads in flight.

Parts (`--parts`), each through the public `storage(row_ids)`, bounds checked:

warm    16, 24, 4,096 and 32,768 rows of 256 B, 2 KiB, 4 KiB, ids drawn anew for each call from a table of 2 GiB in
        the page cache, against `memmap[ids]`, and a table in RAM with 4-KiB pages: `F.embedding` and
        `index_select(out=)`.
o1      the same number of distinct warm pages in sparse tables of 1 M, 100 M and 768 M rows.
cold    16 and 16,384 rows of 4 KiB whose pages aren't in memory, against the default mapping and MADV_RANDOM.
ahead   prefetch on and off, warm and cold, with as much other work between asking and reading as a small layer takes.
peer    the same rows and cache state through `engramdb` (PyPI engramdb-python; only where it is installed and named).
shared  memory of N processes that read one file (PSS).

    python benchmarks/lookup.py [--quick] [--parts warm,o1,cold,ahead,shared] [--folder data]

The last line of stdout is JSON. Needs Linux and a C compiler that knows OpenMP.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lookup_cold
import numpy as np
import torch
import torch.nn.functional as F
from reading import (
    FULL,
    PAGE_BYTES,
    QUICK,
    TINY,
    Probe,
    Scale,
    Ways,
    in_turns,
    open_rows,
    random_ids,
    ratio,
    reads_of,
    say,
    touch,
    write_rows,
)
from turns import machine

from sense_v2.engram.reading import gather
from sense_v2.engram.storage import MMapEmbeddingStorage

# Warm


def warm(probe: Probe, folder: Path, scale: Scale) -> dict[str, Any]:
    path = folder / "warm.dat"
    write_rows(path, scale.warm_bytes)
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
            for num_ids in (16, 24, 4096, scale.large_ids):
                figures = _warm_case(probe, storage, memmap, resident, num_ids, scale)
                cases[f"{num_ids} x {row_bytes} B"] = figures
                say(f"{num_ids} rows of {row_bytes} B", {k: v for k, v in figures.items() if k != "seconds"})
            del resident
        storage.close()
        del memmap
    path.unlink()
    return cases


def _warm_case(
    probe: Probe,
    storage: MMapEmbeddingStorage,
    memmap: np.ndarray,
    resident: torch.Tensor,
    num_ids: int,
    scale: Scale,
) -> dict[str, Any]:
    large = num_ids > 1024
    batches = random_ids(len(memmap), num_ids, 4 if large else scale.small_calls)
    numbers = [batch.numpy() for batch in batches]
    flat = [batch.reshape(-1) for batch in batches]

    def new_out() -> torch.Tensor:
        """Of each way its own, as ours: one that all of them filled in turn would be in the cache for them alone."""
        return torch.empty(num_ids, memmap.shape[1])

    selected = new_out()
    ways: Ways = {
        "numpy": lambda call: memmap[numbers[call]],
        "numpy_to_torch": lambda call: torch.from_numpy(memmap[batches[call].numpy()]),
        "embedding": lambda call: F.embedding(batches[call], resident),
        "index_select": lambda call: torch.index_select(resident, 0, flat[call], out=selected),
        "storage": lambda call: storage(batches[call]),
    }

    def add_probe(*way: int) -> None:
        out = new_out()
        ways[probe.name(*way)] = lambda call: probe.gather(memmap, numbers[call].reshape(-1), out, *way)

    if large:
        for way in Probe.WAYS:
            add_probe(*way)
    assert torch.equal(storage(batches[1]), F.embedding(batches[1], resident))
    with torch.no_grad():
        result = in_turns(ways, len(batches), scale.large_rounds if large else scale.small_rounds)
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
        figures["best probe"] = best.removeprefix("probe, ")
        figures["best probe x numpy"] = ratio(result, "numpy", best)
    return {**figures, "seconds": result}


def o1(probe: Probe, folder: Path, scale: Scale) -> dict[str, Any]:
    """Ids on 4,096 pages that are spread over the table evenly, whatever its size.

    The probe reads the same rows: of a large table each page has a page of page tables of its own, 16 MiB in all, and
    how much of a row's time it takes to read those is the machine's, not the library's.
    """
    storages = {}
    batches: dict[str, list[torch.Tensor]] = {}
    generator = np.random.default_rng(0)
    for millions in scale.millions:
        name = f"{millions} M"
        storages[name] = MMapEmbeddingStorage(
            millions * 1_000_000, 64, folder / f"o1_{millions}" / "engram_table.dat", sparse=True
        ).eval()
        num_pages = millions * 1_000_000 * 256 // PAGE_BYTES
        # A stride that is odd, so that pages don't share cache sets by being powers of two apart.
        pages = np.linspace(0, num_pages - 1, 4096).astype(np.int64)
        rows = pages * (PAGE_BYTES // 256) + generator.integers(0, PAGE_BYTES // 256, len(pages))
        storages[name](torch.from_numpy(rows))
        batches[name] = [torch.from_numpy(generator.choice(rows, (1, 1, 16))) for _ in range(scale.small_calls)]
        large = [torch.from_numpy(generator.permutation(rows)) for _ in range(20)]
        batches[name + " large"] = large
    figures: dict[str, Any] = {}
    for suffix, calls in (("", scale.small_calls), (" large", 20)):
        ways: Ways = {name: reads_of(storages[name], batches[name + suffix]) for name in storages}
        ways |= {f"{name}, probe": _probe_of(probe, storages[name], batches[name + suffix]) for name in storages}
        result = in_turns(ways, calls, scale.small_rounds)
        figures["4,096 rows" if suffix else "16 rows"] = {
            **{name: ratio(result, name, "1 M") for name in storages},
            **{f"{name}, probe": ratio(result, f"{name}, probe", "1 M, probe") for name in storages},
            "seconds": result,
        }
    for name, storage in storages.items():
        storage.close()
        shutil.rmtree(folder / f"o1_{name.split()[0]}")
    for case, values in figures.items():
        say(f"{case}, of the time at 1 M rows", {k: v for k, v in values.items() if k != "seconds"})
    return figures


def _probe_of(probe: Probe, storage: MMapEmbeddingStorage, batches: list[torch.Tensor]) -> Callable[[int], None]:
    table, numbers = storage.mmap, [batch.numpy().reshape(-1) for batch in batches]
    out = torch.empty(len(numbers[0]), storage.embedding_dim)
    return lambda call: probe.gather(table, numbers[call], out, 1, 0, 0)


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
    parser.add_argument("--tiny", action="store_true", help="nothing but a proof that it runs")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--gigabytes", type=int, help="of the cold table")
    parser.add_argument("--plain", action="store_true", help="without the compiled extension")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - {*PARTS, *OPTIONAL_PARTS}:
        raise SystemExit(f"no part {', '.join(sorted(unknown))}: there are {', '.join((*PARTS, *OPTIONAL_PARTS))}")
    scale = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    if arguments.gigabytes:
        scale = dataclasses.replace(scale, cold_bytes=arguments.gigabytes << 30)
    if arguments.plain:
        gather.compiled = None
    result: dict[str, Any] = {"benchmark": "lookup", "compiled": gather.compiled is not None, "machine": machine()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        probe = Probe(folder)
        if "warm" in parts:
            print("warm", flush=True)
            result["warm"] = warm(probe, folder, scale)
            # How the extension copied large results: what it had found on the first of them.
            result["ways"] = [dataclasses.asdict(found) for found in gather.found_ways()]
            for found in result["ways"]:
                say(f"rows of {found['row_bytes']} B", {"way": found["way"], **found["ns_per_row"]})
        if "o1" in parts:
            print("tables of several sizes, 4,096 warm pages of each", flush=True)
            result["o1"] = o1(probe, folder, scale)
        if {"cold", "ahead", "peer", "shared"} & set(parts):
            path = folder / "cold.dat"
            write_rows(path, scale.cold_bytes)
            if "cold" in parts:
                print("cold", flush=True)
                result["cold"] = lookup_cold.cold_part(probe, path, scale)
            if "ahead" in parts:
                print("prefetch", flush=True)
                result["ahead"] = lookup_cold.ahead(path, scale)
            if "peer" in parts:
                print("engramdb", flush=True)
                result["peer"] = lookup_cold.peer(path, scale)
            if "shared" in parts:
                print("sharing", flush=True)
                result["shared"] = shared(path)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
