"""Tokens a second that continuous batching gives with memory, of the bare model's in the same engine.

The physics. A step of the engine reads the model's weights once for all of its requests, so that on a processor whose
memory bus limits one request, several cost little more than one, until arithmetic limits. A memory adds to a step:
hashing its tokens, H rows of each for each layer with memory, two projections, and its state in the paged cache. In
tokens that is a few percent of a small model, and less of a large one.

One process has two models of the same weights, bare and with memory; blocks of 1, 8 and 32 clients take turns, bare
and with memory, each as many requests as clients, greedy, to a fixed length. The cache is warm, prefixes aren't
shared. The ceiling that is printed first is 8 or 32 times one client of the bare engine.

    python benchmarks/serving.py [--quick | --tiny] [--model folder of a Llama] [--rows 1000000]

Medians over blocks, of pairs that ran one after the other. On a machine with other work the processor's time says
more than the clock (run with OMP_NUM_THREADS=1). The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from sense_v2.core.config import EngramConfig
from sense_v2.engram.tokenizer import EngramTokenizer, write_identity_map
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.memory import memory_of

CLIENTS = (1, 8, 32)
PROMPT = 64


def models(name: str | None, rows: int, folder: Path) -> dict[str, Any]:
    """The bare model, and a copy with a memory that adds to its hidden states."""
    if name is None:
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        bare: Any = LlamaForCausalLM(config)
    else:
        bare = AutoModelForCausalLM.from_pretrained(name)
    bare.eval().generation_config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    vocabulary, layers = bare.config.vocab_size, bare.config.num_hidden_layers
    memory = EngramConfig(
        storage_path=str(folder / "engram_table.dat"),
        shadow_map_path=str(folder / "shadow_map.npy"),
        table_size=rows,
        engram_dim=256,
        layer_indices=[1, layers // 2],
    )
    write_identity_map(memory.shadow_map_path, vocabulary)
    with_memory = copy.deepcopy(bare)
    attach_engram(with_memory, memory, EngramTokenizer(memory.shadow_map_path))
    with torch.no_grad():
        for fusion in memory_of(with_memory):
            fusion.W_v.weight.normal_(0, 0.02)
    return {"bare": bare, "with memory": with_memory}


def block(model: Any, clients: int, new: int, seed: int) -> dict[str, float]:
    """Serve as many requests as clients; return tokens a second, and seconds to the last one's first token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, model.config.vocab_size, (clients, PROMPT), generator=generator).tolist()
    settings = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=clients * -(-(PROMPT + new) // 32) + 8,
        max_batch_tokens=512,
        allow_block_sharing=False,
    )
    first: dict[str, float] = {}
    done = 0
    with model.continuous_batching_context_manager(continuous_batching_config=settings) as manager:
        ready, worked = time.perf_counter(), time.process_time()
        manager.add_requests(prompts, max_new_tokens=new, streaming=True)
        while done < clients:
            output = manager.get_result(timeout=60)
            assert output is not None, "the engine stopped"
            assert output.error is None, output.error
            first.setdefault(output.request_id, time.perf_counter() - ready)
            done += output.is_finished()
        seconds, worked = time.perf_counter() - ready, time.process_time() - worked
    return {
        "tokens_per_second": clients * new / seconds,
        "processor_ms_per_token": 1000 * worked / (clients * new),
        "last_first_seconds": max(first.values()),
    }


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="shows that everything runs, and measures nothing")
    parser.add_argument("--model", help="a folder; without it, 8 layers of width 256")
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    new, blocks = (4, 1) if given.tiny else (32, 3) if given.quick else (64, 5)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        both = models(given.model, 20_000 if given.tiny else given.rows, Path(folder))
        for clients in CLIENTS:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in both}
            for number in range(blocks + 1):
                for name in sorted(both, reverse=bool(number % 2)):
                    measured = block(both[name], clients, new, seed=number)
                    if number:  # the first warms up
                        found[name].append(measured)
            of = {
                name: {key: statistics.median(one[key] for one in many) for key in many[0]}
                for name, many in found.items()
            }
            pairs = list(zip(found["with memory"], found["bare"], strict=True))
            of["ratio"] = spread([one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs])
            of["processor ratio"] = spread(
                [other["processor_ms_per_token"] / one["processor_ms_per_token"] for one, other in pairs]
            )
            if clients == 1:
                print(f"ceiling: {of['bare']['tokens_per_second']:.1f} tokens/s a client, bare")
            print(
                f"{clients:3} clients: bare {of['bare']['tokens_per_second']:8.1f} tokens/s, with memory "
                f"{of['with memory']['tokens_per_second']:8.1f}, ratio {of['ratio']['median']:.3f} "
                f"({of['ratio']['least']:.3f} to {of['ratio']['most']:.3f}), by processor time "
                f"{of['processor ratio']['median']:.3f} ({of['processor ratio']['least']:.3f} to "
                f"{of['processor ratio']['most']:.3f}); first tokens by "
                f"{of['bare']['last_first_seconds']:.2f} s and {of['with memory']['last_first_seconds']:.2f} s",
                flush=True,
            )
            results[str(clients)] = of
    print(json.dumps({"benchmark": "serving", "new_tokens": new, "blocks": blocks, "clients": results}))


if __name__ == "__main__":
    main()
