"""How fast a small model decodes with a table four times as large as the memory it is allowed.

The physics. A token needs 16 rows for each of two layers, most of them on pages that aren't in memory: 32 random
reads. They are known when the token is, before the first layer runs, so that the disk can work beside the layers:
what a token can cost more than the same model's with its table in RAM is what submitting reads and taking pages
costs, and what of the reads the layers before the first memory are too short to hide. The peer is that model, its
table a tensor in RAM, outside of the limit.

Two child processes run the same model: `resident` outside, and `limited` inside a memory cgroup, its table on the
disk and all of it cold at the start, with prefetch and (in blocks between those) without. They take turns, a block
of tokens each. The tokens are given (nothing is sampled), one at a time through the model's cache: held-out text, and
random ids, which meet no row twice. That the limit bites is seen from the group's peak.

    python benchmarks/decode.py [--quick | --tiny] [--folder data] [--layers 8] [--width 512]

Medians over tokens, with the tenth and ninetieth percentile. The last line of stdout is JSON. Needs Linux and the
right to make a memory cgroup.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reading import say
from resident import ResidentRows
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from turns import Text, drop_from_cache, machine, memory_limit, prepare_text

from sense_v2.core.config import EngramConfig
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.experiments.step_times import spread
from sense_v2.hf.memory import memory_of

ROW_BYTES, HEADS, LAYERS_WITH_MEMORY = 256, 16, 2
PROMPT = 8


@dataclasses.dataclass(frozen=True)
class Size:
    limit_bytes: int
    blocks: int
    tokens: int
    """Of a block."""
    corpus_bytes: int


FULL, QUICK = Size(560 << 20, 8, 48, 4 << 20), Size(560 << 20, 2, 24, 2 << 20)
# Shows that everything runs, and measures nothing.
TINY = Size(560 << 20, 1, 2, 1 << 18)


def memory_config(text: Text, folder: Path, rows: int, layers: int) -> EngramConfig:
    where: dict[str, Any] = {
        "layer_indices": [1, layers // 2],
        "engram_dim": HEADS * ROW_BYTES // 4,
        "num_heads": HEADS // 2,
    }
    return text.memory(folder, rows, init_std=0.02, **where)


def make_model(spec: dict[str, Any]) -> LlamaForCausalLM:
    text = Text(Path(spec["text"]), spec["vocab_size"])
    torch.manual_seed(0)
    width, layers = spec["width"], spec["layers"]
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
    )
    model = LlamaForCausalLM(config)
    attach_engram(model, memory_config(text, Path(spec["folder"]), spec["rows"], layers))
    return model.eval()


def _nothing(row_ids: torch.Tensor) -> None:
    """In the place of prefetch."""


def child(spec: dict[str, Any]) -> None:
    """Answers each line (kind of tokens, block, whether to prefetch) with the tokens' seconds and a sum of logits."""
    model = make_model(spec)
    memory = memory_of(model)
    prefetch = memory.prefetch_rows
    # transformers renamed it.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    if spec["resident"]:
        rows = ResidentRows(memory.storage.weight.clone())
        memory.storage.close()
        for module in (memory, *memory):
            module.storage = rows
        rows.eval()
    held_out = np.load(Path(spec["text"]) / "held_out.npy", mmap_mode="r")
    print("ready", flush=True)
    for line in sys.stdin:
        kind, block, on = json.loads(line)
        setattr(memory, "prefetch_rows", prefetch if on else _nothing)  # noqa: B010
        length = PROMPT + spec["tokens"]
        if kind == "text":
            start = block * length % (len(held_out) - length)
            token_ids = torch.from_numpy(np.asarray(held_out[start : start + length], dtype=np.int64))
        else:
            token_ids = torch.randint(
                0, spec["vocab_size"], (length,), generator=torch.Generator().manual_seed(block)
            )
        cache, seconds, total = {cache_name: DynamicCache()}, [], 0.0
        with torch.inference_mode():
            logits = model(token_ids[None, :PROMPT], use_cache=True, **cache).logits
            for token_id in token_ids[PROMPT:].split(1):
                started = time.perf_counter()
                logits = model(token_id[None], use_cache=True, **cache).logits
                seconds.append(time.perf_counter() - started)
                total += float(logits.double().sum())
        print(json.dumps({"seconds": seconds, "sum": total}), flush=True)


class Child:
    def __init__(self, spec: dict[str, Any], enter: Callable[[], None] | None) -> None:
        command = [sys.executable, __file__, "--child", json.dumps(spec)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, preexec_fn=enter, text=True, **pipes)  # type: ignore[call-overload]
        self._answer()

    def _answer(self) -> str:
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a child ended with {self._process.wait()}; its error stands above")
        return answer

    def block(self, kind: str, number: int, on: bool) -> dict[str, Any]:
        self._process.stdin.write(json.dumps([kind, number, on]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure(spec: dict[str, Any], size: Size) -> dict[str, Any]:
    seconds: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        enter, used = stack.enter_context(memory_limit(size.limit_bytes))
        # This one lets go of the file before it is ready; pages count for the group that first touches them.
        resident = stack.enter_context(Child({**spec, "resident": True}, None))
        drop_from_cache(Path(spec["table"]))
        limited = stack.enter_context(Child({**spec, "resident": False}, enter))
        number = 0
        for block in range(-1, size.blocks):
            for kind in ("text", "random"):
                ways = [("on", limited, True), ("off", limited, False), ("resident", resident, True)]
                found = {}
                for name, process, on in ways[block % 3 :] + ways[: block % 3]:
                    # Other tokens with prefetch and without it, or the second would find the first one's pages.
                    number += 1
                    found[name] = process.block(kind, number, on)
                    if block >= 0:
                        seconds.setdefault(kind, {}).setdefault(name, []).extend(found[name]["seconds"])
        same = [process.block("text", 1, True)["sum"] for process in (limited, resident)]
        group = used()
    assert same[0] == same[1], f"the models differ: {same}"
    figures: dict[str, Any] = {"limit_bytes": size.limit_bytes, "group": group}
    for kind, ways_seconds in seconds.items():
        times = {name: spread(values) for name, values in ways_seconds.items()}
        mean = {name: sum(values) / len(values) for name, values in ways_seconds.items()}
        figures[kind] = {
            "tokens/s with prefetch, of resident": round(mean["resident"] / mean["on"], 3),
            "without, of resident": round(mean["resident"] / mean["off"], 3),
            "by medians": round(times["resident"]["median"] / times["on"]["median"], 3),
            "tokens/s resident": round(1 / mean["resident"], 1),
            "seconds": times,
        }
        say(kind, {name: value for name, value in figures[kind].items() if name != "seconds"})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens: a look, no measurement")
    parser.add_argument("--tiny", action="store_true", help="nothing but a proof that it runs")
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    size = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    rows = (8 << 20 if arguments.tiny else 4 * size.limit_bytes * 21 // 20) // ROW_BYTES
    result: dict[str, Any] = {"benchmark": "decode", "machine": machine()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        text = prepare_text(folder, size.corpus_bytes)
        spec = {"text": name, "folder": name, "vocab_size": text.vocab_size, "rows": rows, "tokens": size.tokens}
        spec |= {"layers": arguments.layers, "width": arguments.width}
        storage = memory_of(make_model(spec)).storage
        table = storage.path
        storage.close()
        spec["table"] = str(table)
        shares = table.stat().st_size / size.limit_bytes
        print(
            f"a table {shares:.1f} times the limit, {arguments.layers} layers of width {arguments.width}", flush=True
        )
        result |= {"table_bytes": table.stat().st_size, "layers": arguments.layers, "width": arguments.width}
        try:
            result |= measure(spec, size)
        except OSError as error:
            print(f"  not shown: {error}")
            result["not_shown"] = str(error)
    group = result.get("group")
    if group:
        print(f"  the group's peak: {group['peak_bytes'] / size.limit_bytes:.1%} of the limit")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
