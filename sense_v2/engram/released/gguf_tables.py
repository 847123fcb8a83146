"""A GGUF file's tables, under the names and the configuration of the released checkpoint that it was made from.

    deepseek_v41   blk.{i}.engram_embd.weight   and the keys deepseek41.engram.*
    qwen_ple       per_layer_token_embd.weight  and the keys qwen4exp.ple.*, of which ple.layers counts from 0

GGUF has what the hash comes to (primes, offsets, multipliers, the token map), and a checkpoint's config.json what it
is made of. Here one is made of the other, and held against it: rows whose ids come from other numbers would be found
without an error, and mean nothing. Keys that a file lacks can't be checked; `ReleasedTensors` says so.

Source: ggml-org/llama.cpp, src/models/deepseek41.cpp at 16ffdb3a, conversion/qwen4exp.py at 0a32c5ee and
src/models/qwen4exp.cpp at 001d906a.

L layers, H heads in all.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.reading.gguf_headers import GgufModel, StringArray, find_gguf
from sense_v2.engram.reading.safetensors_headers import Checkpoint
from sense_v2.engram.variants import VARIANTS, variant_config

DEEPSEEK_TENSOR = "blk.{layer}.engram_embd.weight"
QWEN_TENSOR = "per_layer_token_embd.weight"
QWEN_ARCHITECTURE = "qwen4exp"
_DEEPSEEK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.engram_embd\.weight")
# What config.json may ask for as well; the layout of more heads would be computed for long.
MAX_ORDER, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, MAX_TOKENS = 16, 1024, 64, 1 << 20, 1 << 24
MAX_LAYER = 10**6


def gguf_checkpoint(place: str | os.PathLike[str]) -> Checkpoint:
    """Find the tables of a GGUF model. Raises `FileNotFoundError` or `ValueError` naming the file, or the key."""
    model = find_gguf(place)
    tensors = {}
    for name, span in model.tensors.items():
        match = _DEEPSEEK_NAME.fullmatch(name)
        if match:
            tensors[f"layers.{int(match[1])}.engram.embed.weight"] = [span]
    config = _deepseek_config(model) if tensors else None
    keys = _Keys(model)
    # Gemma has a tensor of that name, too.
    if QWEN_TENSOR in model.tensors and keys.architecture == QWEN_ARCHITECTURE:
        (layer,) = keys.numbers("ple.layers", 1)
        if not 0 <= layer < MAX_LAYER:
            raise keys.wrong("ple.layers", f"= [{layer}]: must be a layer, counted from 0")
        tensors[f"layers.{layer}.ple.ple_embedding.ngram_embedding.weight"] = [model.tensors[QWEN_TENSOR]]
        config = _qwen_config(model, layer)
    return Checkpoint(model.path, tensors, config, is_gguf=True)


class _Keys:
    """The metadata of one architecture: numbers, checked for what they may be."""

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.architecture = model.metadata.get("general.architecture")

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self.model.metadata

    def number(self, key: str, low: int, high: int) -> int:
        value = self._value(key)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"= {str(value)[:50]}: must be from {low} to {high}")
        return value

    def numbers(self, key: str, count: int) -> list[int]:
        values = self._value(key)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
            raise self.wrong(key, "must be a list of integers")
        if len(values) != count:
            raise self.wrong(key, f"has {len(values)} numbers; expected {count}")
        found: list[int] = values.tolist()
        return found

    def count_of(self, key: str, most: int) -> int:
        """How many numbers a list has."""
        values = self._value(key)
        count = len(values) if isinstance(values, np.ndarray) else 0
        if not 1 <= count <= most:
            raise self.wrong(key, f"must be a list of 1 to {most} integers")
        return count

    def wrong(self, key: str, what: str) -> ValueError:
        return with_way_out(
            ValueError(f"{self.model.path}: {self._name(key)} {what}"), "Fetch the file again, or convert it anew"
        )

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _value(self, key: str) -> Any:
        if key not in self:
            raise self.wrong(key, "isn't there, though other keys of the memory are")
        return self.model.metadata[self._name(key)]


def _deepseek_config(model: GgufModel) -> dict[str, Any] | None:
    """What the checkpoint's config.json would say; None where the file says nothing of the memory."""
    keys = _Keys(model)
    if "engram.layer_ids" not in keys:
        return None
    layers = keys.numbers("engram.layer_ids", keys.count_of("engram.layer_ids", MAX_LAYERS))
    if sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= MAX_LAYER:
        raise keys.wrong("engram.layer_ids", f"= {layers}: must be layers in ascending order")
    largest, heads = (
        keys.number("engram.max_ngram_size", 2, MAX_ORDER),
        keys.number("engram.head_count", 1, MAX_HEADS),
    )
    width = keys.number("engram.key_length", 1, MAX_WIDTH)
    primes = None
    if "engram.primes" in keys:
        tables = [DEEPSEEK_TENSOR.format(layer=layer) for layer in layers]
        primes = _primes(keys, "engram.primes", len(layers) * (largest - 1) * heads, tables)
    config = _memory("deepseek_v41", layers, largest, heads, width, primes)
    said: dict[str, Any] = {
        "engram_layer_ids": layers,
        "engram_max_ngram_size": largest,
        "engram_n_heads": heads,
        "engram_head_dim": width,
        "engram_vocab_size": config.table_size,
        "hc_mult": keys.number("hyper_connection.count", 1, 1024) if "hyper_connection.count" in keys else 1,
    }
    if primes is not None:
        _check_heads(keys, config, "engram.primes", "engram.offsets")
    if "engram.token_map" in keys:
        token_map = keys.numbers("engram.token_map", keys.count_of("engram.token_map", MAX_TOKENS))
        size, pad_id = max(token_map) + 1, keys.number("engram.pad_id", 0, MAX_TOKENS)
        if min(token_map) < 0 or size > len(token_map) or pad_id not in token_map:
            raise keys.wrong("engram.token_map", f"is no map of tokens to ids from 0 on, with the pad id {pad_id}")
        _check_hash(keys, "engram.multipliers", config, size)
        # llama.cpp has the compressed id, config.json a token's.
        said["engram_pad_token_id"] = token_map.index(pad_id)
        said |= {"engram_compressed_vocab_size": size, "engram_tokenizer_map": token_map}
    return said


def _qwen_config(model: GgufModel, layer: int) -> dict[str, Any]:
    keys = _Keys(model)
    largest, heads = keys.number("ple.ngram_size", 2, MAX_ORDER), keys.number("ple.heads_per_ngram", 1, MAX_HEADS)
    num_heads, width = (largest - 1) * heads, keys.number("embedding_length_per_layer_input", 1, MAX_WIDTH)
    primes = _primes(keys, "ple.head_vocab_sizes", num_heads, [QWEN_TENSOR])
    config = _memory("qwen_ple", [layer], largest, heads, width, primes)
    _check_heads(keys, config, "ple.head_vocab_sizes", "ple.head_offsets")
    tokens, size = model.metadata.get("tokenizer.ggml.tokens"), VARIANTS["qwen_ple"].vocab_size
    if isinstance(tokens, StringArray) and tokens.count:  # filled up to the model's vocab_size by the converter
        size = tokens.count
    elif "vocab_size" in keys:
        size = keys.number("vocab_size", 1, MAX_TOKENS)
    assert size is not None
    _check_hash(keys, "ple.layer_multipliers", config, size)
    return {
        "ple_layer_ids": [layer + 1],
        "ngram_size": largest,
        "heads_per_ngram": heads,
        "ngram_vocab_size_base": config.table_size,
        # No key has the divisor: llama.cpp takes a table with any number of rows behind those of its heads.
        "make_ngram_vocab_size_divisible_by": max(model.tensors[QWEN_TENSOR].shape[0], 1),
        "ple_embed_dim": width * num_heads,
        "eos_token_id": keys.number("ple.eos_token_id", 0, size - 1),
        "vocab_size": size,
        "seed": config.seed,
        "hc_count": keys.number("hyper_connection.count", 1, 1024) if "hyper_connection.count" in keys else 1,
    }


def _memory(
    variant: str, layers: list[int], largest: int, heads: int, width: int, primes: list[int] | None
) -> EngramConfig:
    """The memory that the keys describe, with the published seed; its heads begin at the first prime."""
    sizes = {} if primes is None else {"table_size": primes[0]}
    return variant_config(
        variant,
        layer_indices=layers,
        ngram_orders=list(range(2, largest + 1)),
        num_heads=heads,
        engram_dim=width * (largest - 1) * heads,
        **sizes,
    )


def _primes(keys: _Keys, key: str, count: int, tables: list[str]) -> list[int]:
    """Rows of the heads. Raises `ValueError` for numbers from which the layout would be computed for long."""
    primes = keys.numbers(key, count)
    rows = sum(span.shape[0] for name, span in keys.model.tensors.items() if name in tables)
    if count > MAX_ORDER * MAX_HEADS or min(primes) < 2 or max(primes) > rows:
        raise keys.wrong(
            key, f"has {count} heads of {min(primes)} to {max(primes)} rows, and the tables have {rows} rows"
        )
    return primes


def _check_heads(keys: _Keys, config: EngramConfig, primes_key: str, offsets_key: str) -> None:
    """Compare the heads with the layout that they would have. Raises `ValueError` for the first that is another."""
    layout = HeadLayout.from_config(config)
    for key, expected_LH in ((primes_key, layout.primes_LH), (offsets_key, layout.offsets_LH)):
        expected = [number for of_layer in expected_LH for number in of_layer]
        for head, (found, number) in enumerate(zip(keys.numbers(key, len(expected)), expected, strict=True)):
            if found != number:
                raise keys.wrong(
                    key, f"has {found} for head {head}, and the layout {number}: the rows are of another layout"
                )


def _check_hash(keys: _Keys, key: str, config: EngramConfig, compressed_vocab_size: int) -> None:
    """Compare the multipliers with the published ones: with others, other rows belong to a text."""
    expected: list[int] = []
    for layer in config.layer_indices:
        hasher = NgramHasher.from_config(
            config, layer_id=layer, compressed_vocab_size=compressed_vocab_size, pad_id=0
        )
        expected += hasher.multipliers.tolist()
    if keys.numbers(key, len(expected)) != expected:
        raise keys.wrong(
            key,
            f"aren't those of seed {config.seed} and {compressed_vocab_size} ids: the rows belong to another hash",
        )
