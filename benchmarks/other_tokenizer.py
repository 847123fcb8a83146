"""A memory carried over to another tokenizer against a new one: held-out loss at once, and after a few steps.

    sense-engram train --corpus TEXTS --output runs/train
    python benchmarks/other_tokenizer.py runs/train

The other tokenizer is a BPE of another size, made from other text (Python's standard library). The memory is attached
to two models of it, of the first one's shape:

    retokenized    the trained model itself, its embedding made for the new tokens: the mean of the old tokens that
                   spell each. The hidden states are those that the fusion layers know
    another        a fresh one, trained without memory on the same text. Its hidden states are its own

Ways: none; new (memory as `train` starts it); rows (carried over, with new fusion layers); rows and fusion.
Everything is trained, as `train` does, on the same batches. Losses are nats a token of the new tokenizer.

The last line is one JSON object. benchmarks/LOG.md keeps the figures.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sense_v2.core.config import EngramConfig, TrainConfig
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.backbones import saved_tokenizer, token_stream
from sense_v2.hf.data.corpus import Batches, Corpus, read_corpus
from sense_v2.hf.data.held_out import settings_of
from sense_v2.hf.insight.evaluation import token_losses
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import attached_memory
from sense_v2.hf.saving.change_tokenizer import change_tokenizer
from sense_v2.hf.saving.folder import memory_paths
from sense_v2.hf.training.fit import fit
from sense_v2.hf.training.fresh_model import END_OF_TEXT, fresh_backbone, train_bpe

WAYS = ("none", "new", "rows", "rows and fusion")


def retokenized(model: LlamaForCausalLM, old: Any, new: Tokenizer) -> LlamaForCausalLM:
    """The same model with an embedding for the new tokens, which is its output layer too."""
    config = LlamaConfig(**{**model.config.to_dict(), "vocab_size": new.get_vocab_size()})
    made, weights = LlamaForCausalLM(config), model.state_dict()
    old_VC = weights["model.embed_tokens.weight"]
    embedding_VC = made.model.embed_tokens.weight.detach().clone()
    for token_id, text in enumerate(EngramTokenizerBuilder(new).token_texts):
        pieces = old.encode(text, add_special_tokens=False) if text else []
        if pieces:
            embedding_VC[token_id] = old_VC[pieces].mean(dim=0)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    made.load_state_dict({**weights, **dict.fromkeys(names, embedding_VC)})
    return made.eval()


def measure(
    way: str, backbone: Any, tokenizer: Any, folders: dict[str, Path], batches: Batches, config: TrainConfig,
    held_out_BT: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Loss at once and at the end, of a copy of the backbone with a copy of the memory."""
    model = copy.deepcopy(backbone)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=folders["carried"].parent) as place:
        folder = Path(place) / "model"
        if way != "none":
            shutil.copytree(folders["carried"], folder)
            storage_path, shadow_map_path = map(str, memory_paths(folder))
            settings = EngramConfig.load(folder / "engram" / "config.json")
            settings = dataclasses.replace(settings, storage_path=storage_path, shadow_map_path=shadow_map_path)
            if way == "new":
                for path in folder.glob("engram/engram_table*"):
                    path.unlink()
            if way == "rows and fusion":
                from_pretrained(folder, backbone=model, mode="r+")
            else:
                attach_engram(model, settings, tokenizer)
        losses = [float(token_losses(model, held_out_BT).mean())]
        fit(model, batches, config)
        losses.append(float(token_losses(model, held_out_BT).mean()))
        if attached_memory(model) is not None:
            detach_engram(model)
    return {"way": way, "at_once": losses[0], "trained": losses[1]}


def trained_corpus(folder: Path) -> Corpus:
    return read_corpus(json.loads((folder / "corpus.json").read_text())["paths"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a fresh model that sense-engram train wrote")
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pretraining", type=int, default=300, help="steps of the other model")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--other-text", type=Path, help="what the tokenizer is made from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus, settings = trained_corpus(arguments.folder), settings_of(arguments.folder)
    other = read_corpus([arguments.other_text] if arguments.other_text else None)
    new = train_bpe(other.train_texts, vocabulary=arguments.vocabulary)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=new, eos_token=END_OF_TEXT)
    length = settings.sequence_length
    blocks: dict[str, Any] = {"batch_size": settings.batch_size, "sequence_length": length}
    stream = token_stream(corpus.train_texts, tokenizer)
    held_out_BT = Batches(token_stream(corpus.held_out_texts, tokenizer), **blocks, seed=0).sample(
        arguments.sequences
    )
    short: dict[str, Any] = {"eval_every": 0, "commit_every": 0}
    config = dataclasses.replace(settings, steps=arguments.steps, warmup_steps=arguments.steps // 10, **short)

    with tempfile.TemporaryDirectory() as place:
        folders = {"carried": Path(place) / "carried"}
        started = time.perf_counter()
        done = change_tokenizer(arguments.folder, folders["carried"], tokenizer, corpus=_paths(arguments.folder))
        print(f"carried over in {time.perf_counter() - started:.1f} s: {done.carried_rows:,} of {done.rows:,} rows")
        orders = {}
        for one in done.ngrams:
            orders[one.order] = {"ngrams": one.num_ngrams, "carried": len(one.counts_U),
                                 "positions": one.share_of_positions}  # fmt: skip
            print(f"{one.order}-grams: {len(one.counts_U):,} of {one.num_ngrams:,}, "
                  f"{one.share_of_positions:.1%} of the positions")  # fmt: skip
        first: Any = detach_engram(from_pretrained(arguments.folder))
        old_tokenizer = saved_tokenizer(arguments.folder)
        another = fresh_backbone(new.get_vocab_size(), seed=1, max_positions=max(512, length))
        before = dataclasses.replace(settings, steps=arguments.pretraining, **short)
        fit(another, Batches(stream, **blocks, seed=1), before)
        backbones = {"retokenized": retokenized(first, old_tokenizer, new), "another": another.eval()}
        results = []
        for name, backbone in backbones.items():
            for way in WAYS:
                batches = Batches(stream, **blocks, seed=2)
                found = measure(way, backbone, tokenizer, folders, batches, config, held_out_BT)
                results.append({"model": name, **found})
                print(f"{name:12} {way:16} {found['at_once']:.4f} at once, {found['trained']:.4f} after "
                      f"{arguments.steps} steps", flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "other_tokenizer", "orders": orders, "carried_rows": done.carried_rows,
                      "rows": done.rows, "steps": arguments.steps, "results": results}))  # fmt: skip


def _paths(folder: Path) -> list[str]:
    paths: list[str] = json.loads((folder / "corpus.json").read_text())["paths"]
    return paths


if __name__ == "__main__":
    main()
