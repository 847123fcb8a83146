"""A long prompt whose rows are all on the disk: seconds to its first token, of the same prompt's with rows in memory.

The physics. A prompt of T tokens needs T·H rows for each layer with memory, at random places of the table, so a page
of 4 KiB each. One read after the other takes T·H times the disk's latency, minutes; all of them in flight at once
take T·H divided by its random reads a second. They are asked for before the first layer, and come while the layers
below the memory run.

Each round drops the table from the page cache, attaches it anew, and runs one prompt cold, the same one warm, and
bare. The table is written, not sparse, and larger than what a round reads; the ceiling is the disk's random reads
past the cache (benchmarks/probe.c).

    python benchmarks/prefill.py [--tiny] [--model folder of a Llama] [--tokens 4096] [--rows 30000000] [--rounds 3]

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from reading import Probe
from serving import models, spread
from turns import drop_from_cache

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.memory import memory_of


@torch.inference_mode()
def prefill(model: Any, token_ids_1T: torch.Tensor) -> float:
    started = time.perf_counter()
    model(token_ids_1T, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="shows that everything runs, and measures nothing")
    parser.add_argument("--model", help="a folder; without it, 8 layers of width 256")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=30_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="data", help="for the table, on the disk that is measured")
    given = parser.parse_args()
    if given.tiny:
        given.tokens, given.rows, given.rounds = 64, 20_000, 1
    Path(given.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        print(json.dumps({"benchmark": "prefill", "tokens": given.tokens, **measured(given, Path(name))}))


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    both = models(given.model, given.rows, folder)
    bare, model = both["bare"], both["with memory"]
    memory = memory_of(model)
    config, tokenizer, path = memory.config, memory.tokenizer, memory.storages[0].path
    num_rows = given.tokens * len(config.layer_indices) * config.total_heads
    disk = Probe(folder).reads(path, 64, 2)
    print(f"{path.stat().st_size / 1e9:.1f} GB of rows, {num_rows} of them a prompt; the disk: {disk:.0f} reads/s")
    detach_engram(model)
    seconds: dict[str, list[float]] = {"bare": [], "warm": [], "cold": []}
    for number in range(given.rounds + 1):
        ids_1T = torch.randint(3, bare.config.vocab_size, (1, given.tokens), generator=torch.manual_seed(number))
        times = {"bare": prefill(bare, ids_1T)}
        drop_from_cache(path)
        attach_engram(model, config, tokenizer, mode="r")
        times["cold"] = prefill(model, ids_1T)
        times["warm"] = prefill(model, ids_1T)
        detach_engram(model)
        if number:  # the first warms up
            for name, taken in times.items():
                seconds[name].append(taken)
    medians = {name: statistics.median(many) for name, many in seconds.items()}
    pairs = zip(seconds["cold"], seconds["warm"], strict=True)
    of_warm = spread([cold / warm for cold, warm in pairs])
    alone = num_rows / disk
    print(
        f"bare {medians['bare']:.2f} s, warm {medians['warm']:.2f} s, cold {medians['cold']:.2f} s: "
        f"{of_warm['median']:.2f} of warm ({of_warm['least']:.2f} to {of_warm['most']:.2f}); the disk alone takes "
        f"{alone:.2f} s for these rows"
    )
    return {"seconds": medians, "cold of warm": of_warm, "disk_reads_per_second": disk, "rows": num_rows}


if __name__ == "__main__":
    main()
