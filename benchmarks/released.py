"""Released tables: how fast cold rows come, and how much less memory a model takes whose table stays on disk.

    cold      rows of a DeepSeek-V4.1 table, codes in one tensor and scales in another, against the same rows as a
              table of ours, and against touching them one page after the other
    gguf      rows of tables in GGUF files, warm, against the package gguf's own dequantizer and against float32 rows
              of a table of ours, in seconds of the processor; cold, against a table of ours with rows as long (int4);
              and how long a sparse file of 320 M rows takes to open, and how much memory
    offload   transformers' Qwen4-Exp with a table of over 2 GB: anonymous memory, and tokens, with the table in
              memory and on disk, each in a process of its own

The ceiling is the disk's random reads of 4 KiB, measured in the same run: a released row is two of them (256 bytes of
codes, 8 of scales, from two places), a row of ours one. Files are dropped from the page cache before each turn;
candidates take turns, and medians are told.

    python benchmarks/released.py [--parts cold,gguf,offload] [--folder DISK] [--gigabytes 4]

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

import gguf  # noqa: E402
from checkpoints import write_shard  # type: ignore[import-not-found]  # noqa: E402
from gguf_files import QWEN, rows_of, write_gguf  # type: ignore[import-not-found]  # noqa: E402
from reading import Probe, random_ids  # noqa: E402
from turns import anonymous_bytes, drop_from_cache, machine  # noqa: E402

from sense_v2.engram.head_layout import HeadLayout  # noqa: E402
from sense_v2.engram.reading import row_parts  # noqa: E402
from sense_v2.engram.released.importing import import_table  # noqa: E402
from sense_v2.engram.released.released_table import open_released_table  # noqa: E402
from sense_v2.engram.storage import MMapEmbeddingStorage  # noqa: E402
from sense_v2.engram.variants import variant_config  # noqa: E402

CODES, SCALES = 256, 8
GGUF_WIDTH, GGUF_IDS = 160, 32_768
PARTS = ("cold", "gguf", "offload")


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


def of_gguf(folder: Path, num_rows: int, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"rows": num_rows, "width": GGUF_WIDTH, "threads": torch.get_num_threads()}
    ours = folder / "ours.dat"
    table = MMapEmbeddingStorage(num_rows, GGUF_WIDTH, ours, progress=False)
    table.commit()
    table.close()
    floats = MMapEmbeddingStorage(num_rows, GGUF_WIDTH, ours, mode="r").eval()
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"):
        file = write_block_table(folder / f"{kind}.gguf", kind, num_rows)
        figures[kind] = warm(file, kind, floats, rounds)
        if kind != "IQ4_NL":
            file.unlink()
    floats.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bare table
        import_table(folder / "IQ4_NL.gguf", 1, folder / "int4.dat")
    ours.unlink()
    figures["cold, IQ4_NL"] = cold_blocks(folder / "IQ4_NL.gguf", folder / "int4.dat", num_rows, rounds)
    figures["opening, sparse"] = opening(folder)
    print(json.dumps(figures, indent=2), flush=True)
    return figures


def write_block_table(path: Path, kind: str, num_rows: int) -> Path:
    """A table of layer 1: the same 65,536 random rows again and again."""
    rows_NB = rows_of(kind, 1 << 16, GGUF_WIDTH)
    parts = {first: rows_NB[: num_rows - first].tobytes() for first in range(0, num_rows, len(rows_NB))}
    (file,) = write_gguf(path, {"blk.1.engram_embd.weight": (kind, (num_rows, GGUF_WIDTH), parts)})
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    return Path(file)


def opened_quietly(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bare table
        return open_released_table(path, 1).eval()


def warm(file: Path, kind: str, floats: Any, rounds: int) -> dict[str, Any]:
    table = opened_quietly(file)
    span = table.tensors.weights[0]
    raw_NB = np.memmap(file, np.uint8, "r", span.offset, (span.shape[0], span.num_bytes // span.shape[0]))
    number = gguf.GGMLQuantizationType[kind]
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "ours": table,
        "float32": floats,
        "gguf": lambda ids: gguf.dequantize(raw_NB[ids.numpy()], number),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, 3 * rounds):  # the first one only warms up
        ids = torch.from_numpy(np.random.default_rng(turn + 1).integers(0, span.shape[0], GGUF_IDS))
        names = list(ways)
        for name in (*names[turn % 3 :], *names[: turn % 3]):
            ways[name](ids)  # the pages are in memory then, and the result's memory is there
            started = time.process_time()
            ways[name](ids)
            if turn >= 0:
                seconds[name].append(time.process_time() - started)
    table.close()
    median = {name: statistics.median(found) for name, found in seconds.items()}
    best = {name: min(found) for name, found in seconds.items()}
    return {
        **{f"{name}, ms": round(1e3 * found, 2) for name, found in median.items()},
        "times as fast as gguf": round(median["gguf"] / median["ours"], 1),
        "times as fast as gguf, best of each": round(best["gguf"] / best["ours"], 1),
        "time, of float32 rows": round(median["ours"] / median["float32"], 2),
    }


def cold_blocks(file: Path, own: Path, num_rows: int, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"gguf": [], "ours": []}
    for turn in range(rounds):
        batches = random_ids(num_rows, 16_384, 1, seed=turn)
        ways: dict[str, Callable[[], Any]] = {
            "gguf": lambda: opened_quietly(file),
            "ours": lambda: MMapEmbeddingStorage(num_rows, GGUF_WIDTH, own, dtype="int4", mode="r").eval(),
        }
        for name in sorted(ways, reverse=turn % 2 == 0):
            for path in (file, own):
                drop_from_cache(path)
            seconds[name].append(timed(ways[name], batches))
    rate = {name: 16_384 / statistics.median(found) for name, found in seconds.items()}
    return {
        **{f"{name}, rows/s": round(found) for name, found in rate.items()},
        "of ours": round(rate["gguf"] / rate["ours"], 2),
    }


def opening(folder: Path) -> dict[str, Any]:
    """Qwen's table in Q4_0, 28.8 GB of holes, with a tokenizer of 248,320 tokens and as many merges."""
    from test_gguf_tables import qwen_metadata  # type: ignore[import-not-found]

    memory = variant_config("qwen_ple")
    num_rows = HeadLayout.from_config(memory).num_rows_L[0]
    tokens = [f"token {number}" for number in range(248_320)]
    metadata = {
        **qwen_metadata(memory, 248_320),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": tokens,
    }
    tensors = {QWEN: ("Q4_0", (num_rows, GGUF_WIDTH), None)}
    (file,) = write_gguf(folder / "sparse.gguf", tensors, metadata, arch="qwen4exp")
    before, started, of_processor = anonymous_bytes(), time.perf_counter(), time.process_time()
    table = open_released_table(file, 1)
    seconds, of_processor = time.perf_counter() - started, time.process_time() - of_processor
    after = anonymous_bytes()
    table.close()
    return {
        "rows": num_rows,
        "seconds": round(seconds, 2),
        "of the processor": round(of_processor, 2),
        "anonymous memory, MB more": round((after - before) / 1e6, 1),
    }


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
    parser.add_argument("--rows", type=int, default=4_000_000, help="of the gguf tables")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small cold table, one round: a look, no measurement")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.gigabytes, arguments.rounds, arguments.parts, arguments.rows = 1, 1, "cold,gguf", 200_000
    chosen = arguments.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise SystemExit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"benchmark": "released", "machine": machine()}
    for part in chosen:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            print(part, flush=True)
            if part == "cold":
                result[part] = cold(Path(name), arguments.gigabytes, arguments.rounds)
            elif part == "gguf":
                result[part] = of_gguf(Path(name), arguments.rows, arguments.rounds)
            else:
                result[part] = offload(Path(name))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
