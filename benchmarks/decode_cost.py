"""What memory costs a decoding step of a model of SmolLM2-135M's shape, part by part.

The physics. A step of one token reads all of the model's weights, 540 MB of float32, and computes little: some fifty
milliseconds of one core. Memory adds two small layers and, whatever the model's size, what it takes to hash a token,
to keep it in the cache and to read sixteen rows: small calls, each a few microseconds of Python and of torch. The
ceiling is the same model without memory, its weights the same tensors, in turns with it; tokens are given, one at a
time, through a DynamicCache. Times are of the thread (`thread_time`), which other work on the machine moves least.

    OMP_NUM_THREADS=1 python benchmarks/decode_cost.py [--rounds 12] [--tokens 24] [--tiny]

Random weights: only their shapes count. The parts overlap (a layer's hook holds its fusion layer, that the reading of
rows). The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from reading import say
from tokenizers import Tokenizer, models
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from turns import machine

from sense_v2.core.config import EngramConfig
from sense_v2.engram.model import EngramFusionLayer
from sense_v2.hf import forward_hooks
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.cache import EngramState
from sense_v2.hf.experiments.step_times import spread
from sense_v2.hf.memory import EngramMemory, memory_of

PROMPT = 64
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {**SMOLLM2, "vocab_size": 512, "hidden_size": 36, "num_hidden_layers": 12}


def make_models(folder: Path, shape: dict[str, Any]) -> dict[str, LlamaForCausalLM]:
    """The same weights without memory and with it, before layers 4 and 10."""
    torch.manual_seed(0)
    bare, remembering = LlamaForCausalLM(LlamaConfig(**shape)), LlamaForCausalLM(LlamaConfig(**shape))
    remembering.load_state_dict(bare.state_dict(), assign=True)
    remembering.tie_weights()
    words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(shape["vocab_size"])}, unk_token="w0"))
    config = EngramConfig(
        table_size=1_000_000,
        engram_dim=256,
        num_heads=4,
        layer_indices=[4, 10],
        storage_path=str(folder / "engram_table.dat"),
        shadow_map_path=str(folder / "shadow_map.npy"),
    )
    attach_engram(remembering, config, words)
    return {"bare": bare.eval(), "memory": remembering.eval()}


def step_seconds(
    model: LlamaForCausalLM, seed: int, tokens: int, after_prompt: Callable[[], None] | None = None
) -> list[float]:
    """Of the thread, for each of `tokens` tokens behind a prompt."""
    generator = torch.Generator().manual_seed(seed)
    token_ids_BT = torch.randint(0, model.config.vocab_size, (1, PROMPT + tokens), generator=generator)
    cache, seconds = DynamicCache(), []
    with torch.inference_mode():
        model(token_ids_BT[:, :PROMPT], past_key_values=cache, use_cache=True)
        if after_prompt is not None:
            after_prompt()
        for place in range(PROMPT, PROMPT + tokens):
            started = time.thread_time()
            model(token_ids_BT[:, place : place + 1], past_key_values=cache, use_cache=True)
            seconds.append(time.thread_time() - started)
    return seconds


@contextlib.contextmanager
def timed_parts(model: LlamaForCausalLM, spent: dict[str, float]) -> Iterator[None]:
    """Adds the thread's seconds in each part to `spent`."""

    def timed(name: str, call: Any) -> Any:
        @functools.wraps(call, updated=())
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name] += time.thread_time() - started

        return wrapper

    parts: list[tuple[str, Any, str]] = [
        ("compressed ids and hashes", forward_hooks, "token_rows"),
        ("fusion layers", EngramFusionLayer, "forward"),
        ("cache entry, the convolution's inputs", EngramState, "remember"),
        ("cache entry, tokens", EngramState, "append_tokens"),
        ("asking for rows ahead", EngramMemory, "begin_rows"),
        ("reading rows", type(memory_of(model).storage), "forward"),
    ]
    with contextlib.ExitStack() as stack:
        for name, owner, attribute in parts:
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        hooks: dict[Any, str] = {
            forward_hooks.carry_inputs: "the model's hook, with the hashes",
            forward_hooks.add_memory: "the layers' hooks, with the fusion layers",
        }
        for module in model.modules():
            registered = module._forward_pre_hooks
            for key, hook in list(registered.items()):
                if getattr(hook, "func", None) in hooks:
                    stack.enter_context(mock.patch.dict(registered, {key: timed(hooks[hook.func], hook)}))  # type: ignore[attr-defined]
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24, help="of a round, for each model")
    parser.add_argument("--tiny", action="store_true", help="a small model: nothing but a proof that it runs")
    parser.add_argument("--quick", action="store_true", help="three rounds: a look, no measurement")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    seconds: dict[str, list[float]] = {"bare": [], "memory": []}
    spent: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as name:
        found = make_models(Path(name), TINY if arguments.tiny else SMOLLM2)
        ratios, names = [], list(found)
        for turn in range(-1, rounds):
            random.Random(turn).shuffle(names)
            of_turn = {way: step_seconds(found[way], turn + 1, arguments.tokens) for way in names}
            if turn >= 0:
                ratios.append(statistics.median(of_turn["bare"]) / statistics.median(of_turn["memory"]))
                for way in names:
                    seconds[way] += of_turn[way]
        with timed_parts(found["memory"], spent):
            whole = sum(step_seconds(found["memory"], rounds + 1, 2 * arguments.tokens, spent.clear))
    figures: dict[str, Any] = {
        "milliseconds": {way: spread([1000 * value for value in values]) for way, values in seconds.items()},
        "tokens/s of bare": spread(ratios),
        "share": {part: value / whole for part, value in sorted(spent.items(), key=lambda item: -item[1])},
    }
    say("a step, ms", {way: round(values["median"], 2) for way, values in figures["milliseconds"].items()})
    say("tokens/s with memory, of bare", {k: round(v, 3) for k, v in figures["tokens/s of bare"].items()})
    for part, share in figures["share"].items():
        print(f"  {share:6.2%} {part}", flush=True)
    print(json.dumps({"benchmark": "decode_cost", "machine": machine(), **figures}))


if __name__ == "__main__":
    main()
