"""Released tables: how fast cold rows come, and how much less memory a model takes whose table stays on disk.

    cold      rows of a DeepSeek-V4.1 table, codes in one tensor and scales in another, against the same rows as a
              table of ours, and against touching them one page after the other
    offload   transformers' Qwen4-Exp with a table of over 2 GB: anonymous memory, and tokens, with the table in
              memory and on disk, each in a process of its own

The ceiling is the disk's random reads of 4 KiB, measured in the same run: a released row is two of them (256 bytes of
codes, 8 of scales, from two places), a row of ours one. Files are dropped from the page cache before each turn;
candidates take turns, and medians are told.

    python benchmarks/released.py [--parts cold,offload] [--folder DISK] [--gigabytes 4]

The last line is one JSON object. `tests/` has the writers of checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / folder) for folder in ("", "hf/serving", "engram/released")]

from checkpoints import write_shard  # type: ignore[import-not-found]  # noqa: E402
from reading import Probe, random_ids  # noqa: E402
from turns import drop_from_cache, machine  # noqa: E402

from sense_v2.engram.reading import row_parts  # noqa: E402
from sense_v2.engram.released.importing import import_table  # noqa: E402
from sense_v2.engram.released.released_table import open_released_table  # noqa: E402
from sense_v2.engram.storage import MMapEmbeddingStorage  # noqa: E402

CODES, SCALES = 256, 8
PARTS = ("cold", "offload")


def write_table(folder: Path, num_rows: int) -> Path:
    """A table of one layer: random codes (none of them NaN) and scales around 1, the same block again and again."""
    path = folder / "model.safetensors"
    name = "layers.1.engram.embed"
    tensors = {
        f"{name}.weight": ("F8_E4M3", (num_rows, CODES), None),
        f"{name}.scale": ("F8_E8M0", (num_rows, SCALES), None),
    }
    write_shard(path, tensors)
    head = path.stat().st_size - num_rows * (CODES + SCALES)
    generator = np.random.default_rng(0)
    block = 1 << 16
    codes = generator.integers(0, 0x7E, (block, CODES), dtype=np.uint8)
    scales = generator.integers(110, 135, (block, SCALES), dtype=np.uint8)
    with open(path, "r+b") as file:
        for start, rows_UB in ((head, codes), (head + num_rows * CODES, scales)):
            file.seek(start)
            for first in range(0, num_rows, block):
                file.write(rows_UB[: min(block, num_rows - first)].tobytes())
        os.fsync(file.fileno())
    return path


def cold(folder: Path, gigabytes: int, rounds: int) -> dict[str, Any]:
    num_rows = (gigabytes << 30) // (CODES + SCALES)
    shard = write_table(folder, num_rows)
    own = folder / "ours.dat"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bare shard
        import_table(shard, 1, own)

    def released() -> Any:
        return open_released_table(shard, 1)

    def ours() -> Any:
        return MMapEmbeddingStorage(num_rows, CODES, own, dtype="float8_e4m3fn", mode="r").eval()

    def one_by_one() -> Any:
        table = open_released_table(shard, 1)
        for tensor in table._reader.tensors:
            for part in tensor._parts:
                part.pages.pages.can_ask = False
                part.pages.pages.mapping.madvise(row_parts.mmap.MADV_RANDOM)
        return table

    figures: dict[str, Any] = {"rows": num_rows}
    for num_ids, calls in ((24, 40), (16_384, 1)):
        seconds: dict[str, list[float]] = {}
        for turn in range(rounds):
            batches = random_ids(num_rows, num_ids, calls, seed=turn)
            for way in (released, ours, one_by_one):
                for path in (shard, own):
                    drop_from_cache(path)
                seconds.setdefault(way.__name__, []).append(timed(way, batches))
        per_second = {name: num_ids * calls / statistics.median(found) for name, found in seconds.items()}
        figures[f"{num_ids} rows"] = {
            **{f"{name}, rows/s": round(rate) for name, rate in per_second.items()},
            "released, of ours": round(per_second["released"] / per_second["ours"], 2),
            "released, of one by one": round(per_second["released"] / per_second["one_by_one"], 1),
        }
    figures["disk, 4-KiB reads/s, 32 in flight, 2 jobs"] = round(Probe(folder).reads(own, 32, 2))
    print(json.dumps(figures, indent=2), flush=True)
    return figures


def timed(opened: Callable[[], Any], batches: list[torch.Tensor]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bare shard, and a platform that can't ask, which is meant
        table = opened()
        started = time.perf_counter()
        for row_ids in batches:
            table(row_ids)
        seconds = time.perf_counter() - started
        table.close()
    return seconds


def offload(folder: Path) -> dict[str, Any]:
    from qwen_generate import write_model  # type: ignore[import-not-found]
    from test_offload import config  # type: ignore[import-not-found]

    started = time.perf_counter()
    num_bytes = write_model(folder, config(ngram_vocab_size_base=4_700_000, ple_embed_dim=256))
    print(f"a table of {num_bytes / 1e6:,.0f} MB written in {time.perf_counter() - started:.0f} s", flush=True)
    found = {}
    for way in ("memory", "disk"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        command = [sys.executable, str(TESTS / "qwen_generate.py"), str(folder), way]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[way] = json.loads(run.stdout.splitlines()[-1])
    figures = {
        "table, MB": round(num_bytes / 1e6),
        **{f"anonymous memory, table in {way}, MB": round(of["anonymous_bytes"] / 1e6) for way, of in found.items()},
        "the same tokens": found["memory"]["token_ids"] == found["disk"]["token_ids"],
    }
    print(json.dumps(figures, indent=2), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--gigabytes", type=int, default=4, help="of the cold table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small cold table, one round: a look, no measurement")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.gigabytes, arguments.rounds, arguments.parts = 1, 1, "cold"
    chosen = arguments.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise SystemExit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "released", "machine": machine()}
    for part in chosen:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            print(part, flush=True)
            result[part] = (
                cold(Path(name), arguments.gigabytes, arguments.rounds) if part == "cold" else offload(Path(name))
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
