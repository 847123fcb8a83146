"""How fast a table is filled with noise, against the disk and against NumPy.

The physics: a fill writes every byte once, so the ceiling is what `dd` writes with the same sync at the end, measured
first and again in every round. Between the two stands the cost of drawing normal noise. The peer is what a NumPy user
would write: a chunked `Generator.normal` into a memory map. Every run starts without a file and ends synced, and its
file is removed. The order changes from round to round, since who writes first into memory that lay idle pays for it.

    python benchmarks/fill.py --megabytes 512 --rounds 5 [--folder data] [--dtype float32]

The last line of stdout is JSON: seconds and bytes a second (medians), the spread, and the ratio to dd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.format import row_dtype

WIDTH = 64


def fill_dd(path: Path, num_bytes: int) -> None:
    count = num_bytes // 2**20
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={count}", "conv=fdatasync"]
    subprocess.run(command, check=True, capture_output=True)


def fill_numpy(path: Path, num_bytes: int) -> None:
    """float32 whatever the dtype: NumPy draws no narrower noise, and has no bfloat16."""
    rows = np.memmap(path, dtype=np.float32, mode="w+", shape=(num_bytes // (4 * WIDTH), WIDTH))
    generator = np.random.default_rng(0)
    for start in range(0, len(rows), 1 << 16):
        chunk = rows[start : start + (1 << 16)]
        np.multiply(generator.standard_normal(chunk.shape, dtype=np.float32), 0.02, out=chunk)
    rows.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    num_bytes = arguments.megabytes * 2**20
    num_rows = num_bytes // (WIDTH * row_dtype(arguments.dtype).item_bytes)

    def fill_ours(path: Path, num_bytes: int) -> None:
        MMapEmbeddingStorage(num_rows, WIDTH, path, dtype=arguments.dtype, progress=False).close()

    ways: dict[str, Callable[[Path, int], None]] = {"dd": fill_dd, "numpy": fill_numpy, "ours": fill_ours}
    free_bytes = shutil.disk_usage(arguments.folder).free
    if free_bytes < 2 * num_bytes:
        raise SystemExit(f"{free_bytes} bytes free in {arguments.folder}: not enough for {num_bytes}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "fill.dat"
        for round_number in range(-1, arguments.rounds):
            first = round_number % len(ways) if round_number > 0 else 0
            for name in [*ways, *ways][first : first + len(ways)]:
                start = time.perf_counter()
                ways[name](path, num_bytes)
                taken = time.perf_counter() - start
                assert path.stat().st_size == num_bytes
                for file in (path, path.with_suffix(".json")):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file)
                if round_number < 0:  # the first round only warms the code and the disk up
                    if name == "dd":
                        print(
                            f"ceiling: dd {num_bytes / taken / 1e6:.0f} MB/s ({arguments.megabytes} MiB, fdatasync)"
                        )
                    continue
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "benchmark": "fill",
        "megabytes": arguments.megabytes,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "min_max_seconds": {name: [round(min(v), 4), round(max(v), 4)] for name, v in seconds.items()},
        "median_bytes_per_second": {name: round(num_bytes / value) for name, value in medians.items()},
        "of_dd": {name: round(medians["dd"] / medians[name], 3) for name in ("numpy", "ours")},
    }
    for name, value in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        speed = num_bytes / value / 1e6
        print(f"{name:6} {speed:7.0f} MB/s  {medians['dd'] / value:5.0%} of dd  ({low:.2f} to {high:.2f} s)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
