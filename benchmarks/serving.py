"""Tokens a second that continuous batching gives with memory, of the bare model's in the same engine.

The physics. A step of the engine reads the model's weights once for all of its requests, so that on a processor whose
memory bus limits one request, several cost little more than one, until arithmetic limits. A memory adds to a step:
hashing its tokens, H rows of each for each layer with memory, two projections, and its state in the paged cache. In
tokens that is a few percent of a small model, and less of a large one.

One process has two models of the same weights, bare and with memory; blocks of 1, 8 and 32 clients take turns, bare
and with memory, each as many requests as clients, greedy, to a fixed length. The cache is warm, prefixes aren't
shared. The ceiling that is printed first is 8 or 32 times one client of the bare engine.

    python benchmarks/serving.py [--quick | --tiny] [--model folder of a Llama] [--rows 1000000] [--clients 1 8 32]
    .venv-vllm/bin/python benchmarks/serving.py --engine vllm …

vLLM serves both models as saved folders, bare and through the plugin, in one process; it doesn't say when a first
token came. Medians over blocks, of pairs that ran one after the other. On a machine with other work the processor's
time says more than the clock (run with OMP_NUM_THREADS=1). The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
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
from sense_v2.hf.saving.save import save_pretrained

CLIENTS = (1, 8, 32)
PROMPT = 64
_RATIOS = ("ratio", "processor ratio")


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
    write_identity_map(memory.paths()[1], vocabulary)
    with_memory = copy.deepcopy(bare)
    attach_engram(with_memory, memory, EngramTokenizer(memory.paths()[1]))
    with torch.no_grad():
        for fusion in memory_of(with_memory):
            fusion.W_v.weight.normal_(0, 0.02)
    return {"bare": bare, "with memory": with_memory}


def prompts(vocabulary: int, clients: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(3, vocabulary, (clients, PROMPT), generator=generator).tolist()
    return found


def block(model: Any, clients: int, new: int, seed: int) -> dict[str, Any]:
    """Serve as many requests as clients; return tokens a second, and seconds to each one's first token."""
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
        manager.add_requests(prompts(model.config.vocab_size, clients, seed), max_new_tokens=new, streaming=True)
        while done < clients:
            output = manager.get_result(timeout=60)
            assert output is not None, "the engine stopped"
            assert output.error is None, output.error
            first.setdefault(output.request_id, time.perf_counter() - ready)
            done += output.is_finished()
        seconds, worked = time.perf_counter() - ready, time.process_time() - worked
    return _figures(clients * new, seconds, worked) | {"first_seconds": list(first.values())}


def _figures(tokens: int, seconds: float, worked: float) -> dict[str, Any]:
    return {"tokens_per_second": tokens / seconds, "processor_ms_per_token": 1000 * worked / tokens}


def vllm_engines(both: dict[str, Any], folder: Path, new: int) -> dict[str, Any]:
    """Save both models, and open them in vLLM."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    import vllm

    both["bare"].save_pretrained(folder / "bare")
    save_pretrained(both["with memory"], folder / "with memory")
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    settings |= {"max_model_len": PROMPT + new, "max_num_seqs": max(CLIENTS), "enable_prefix_caching": False}
    return {name: vllm.LLM(str(folder / name), **settings) for name in both}


def vllm_block(engine: Any, clients: int, new: int, seed: int) -> dict[str, Any]:
    """As `block`, by vLLM."""
    from vllm import SamplingParams

    asked = prompts(engine.llm_engine.model_config.get_vocab_size(), clients, seed)
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    started, worked = time.perf_counter(), time.process_time()
    engine.generate([{"prompt_token_ids": ids} for ids in asked], settings, use_tqdm=False)
    return _figures(clients * new, time.perf_counter() - started, time.process_time() - worked)


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="shows that everything runs, and measures nothing")
    parser.add_argument("--model", help="a folder; without it, 8 layers of width 256")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    given = parser.parse_args()
    new, blocks = (4, 1) if given.tiny else (32, 3) if given.quick else (64, 5)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        engines = models(given.model, 20_000 if given.tiny else given.rows, Path(folder))
        serve = vllm_block if given.engine == "vllm" else block
        if given.engine == "vllm":
            engines = vllm_engines(engines, Path(folder), new)
        for clients in given.clients:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for number in range(blocks + 1):
                for name in sorted(engines, reverse=bool(number % 2)):
                    measured = serve(engines[name], clients, new, seed=number)
                    if number:  # the first warms up
                        found[name].append(measured)
            results[str(clients)] = summary(found)
            print(f"{clients:3} clients: {told(results[str(clients)])}", flush=True)
        ceiling = results[str(given.clients[0])]["bare"]["tokens_per_second"] / given.clients[0]
    print(f"ceiling: clients times {ceiling:.1f} tokens/s")
    given_settings = {"engine": given.engine, "new_tokens": new, "blocks": blocks}
    print(json.dumps({"benchmark": "serving", **given_settings, "clients": results}))


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both, the 99th percentile of all first tokens, the ratios of pairs that ran one after the other."""
    of: dict[str, Any] = {}
    for name, many in found.items():
        of[name] = {key: statistics.median(one[key] for one in many) for key in many[0] if key != "first_seconds"}
        first = [seconds for one in many for seconds in one.get("first_seconds", ())]
        if first:
            of[name]["first_seconds_p99"] = float(np.percentile(first, 99))
    pairs = list(zip(found["with memory"], found["bare"], strict=True))
    of["ratio"] = spread([one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs])
    of["processor ratio"] = spread(
        [other["processor_ms_per_token"] / one["processor_ms_per_token"] for one, other in pairs]
    )
    return of


def told(of: dict[str, Any]) -> str:
    ratios = (f"{of[key]['median']:.3f} ({of[key]['least']:.3f} to {of[key]['most']:.3f})" for key in _RATIOS)
    bare, memory = of["bare"], of["with memory"]
    line = "bare {:.1f} tokens/s, with memory {:.1f}, ratio {}, by processor time {}".format(
        bare["tokens_per_second"], memory["tokens_per_second"], *ratios
    )
    if "first_seconds_p99" in bare:
        line += f"; first tokens, p99: {bare['first_seconds_p99']:.2f} s and {memory['first_seconds_p99']:.2f} s"
    return line


if __name__ == "__main__":
    main()
