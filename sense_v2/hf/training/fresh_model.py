"""A corpus -> a tokenizer, a small untrained model, and a memory of a size that suits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sense_v2.core.config import EngramConfig
from sense_v2.core.progress import Progress, no_progress
from sense_v2.hf.saving.folder import memory_paths

# Few, as suits a run that reads little text: after 300 steps of 8 × 256 tokens one held-out pair in seven was never
# met, of 8,192 tokens one in five, and the output layer, half of a step, costs half (benchmarks/LOG.md).
BPE_VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


def train_bpe(texts: list[str], progress: Progress = no_progress, *, vocabulary: int = BPE_VOCABULARY) -> Tokenizer:
    """Train a byte-level BPE of 4,096 tokens, or fewer if the texts have no more to give; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    with progress("making a tokenizer", sum(map(len, texts)), unit="characters") as advance:

        def read() -> Iterator[str]:
            for text in texts:
                yield text
                advance(len(text))

        tokenizer.train_from_iterator(read(), trainer)
    return tokenizer


def fresh_backbone(vocab_size: int, seed: int, *, max_positions: int = 512) -> LlamaForCausalLM:
    """Make a Llama of two layers of width 128; the same arguments give the same weights. Its embedding is its output
    layer too, as in small models; weights are drawn at 0.05, since the usual 0.02 suits larger widths."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=END_OF_TEXT_ID,
            pad_token_id=END_OF_TEXT_ID,
        )
    )


def small_memory(folder: str | Path) -> EngramConfig:
    """Return a memory of 4 heads of about 524,288 rows of width 64 before layer 1, zeros at first, in a folder that
    `save_pretrained` will save to."""
    storage_path, shadow_map_path = memory_paths(folder)
    return EngramConfig(
        table_size=4 * 524_288,
        engram_dim=256,
        num_heads=2,
        init_std=0.0,
        ngram_orders=[2, 3],
        layer_indices=[1],
        storage_path=str(storage_path),
        shadow_map_path=str(shadow_map_path),
    )


def memory_for(model: PreTrainedModel, config: EngramConfig) -> EngramConfig:
    """Return `config` with layers, width and heads that suit a model which was there before: 8 heads of at most 64
    values, before the layers at a quarter and at two thirds of its depth (measured: benchmarks/LOG.md)."""
    return _suited(model, config, (0.27, 0.67))


def late_memory_for(model: PreTrainedModel, config: EngramConfig) -> EngramConfig:
    """Return `config` with what suits rows that are counted: `memory_for`'s width and heads, before the one layer at
    five sixths of the depth, whose hidden states are soon compared with output embeddings."""
    return _suited(model, config, (5 / 6,))


def _suited(model: PreTrainedModel, config: EngramConfig, shares: tuple[float, ...]) -> EngramConfig:
    text = model.config.get_text_config()
    depth, width = int(text.num_hidden_layers), int(text.hidden_size)
    layers = {min(depth - 1, max(1, round(depth * share))) for share in shares}
    row_width = min(64, max(16, width // 8 // 16 * 16))
    heads = 4 * len(config.ngram_orders)
    return dataclasses.replace(config, layer_indices=sorted(layers), engram_dim=heads * row_width, num_heads=4)
