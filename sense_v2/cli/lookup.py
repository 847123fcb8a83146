"""`sense-engram lookup`: a text -> tokens, compressed ids, n-grams, row ids, and the norms of a checkpoint's rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import CommandError
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.model import compressed_pad_id
from sense_v2.engram.pretrained_tokenizer import load_tokenizer
from sense_v2.engram.released.released_table import open_released_table, released_config, released_tables
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.variants import VARIANTS, variant_config


def run_lookup(
    text: str,
    *,
    folder: str | Path | None,
    variant: str | None,
    tokenizer: str,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Looks `text` up in the tables of `folder`, or only says which rows those would be; returns one dictionary that
    JSON can hold: "row_ids" and "row_norms" by layer, [T][H]. Raises `CommandError` for what doesn't go together."""
    layers, theirs, variant = _checkpoint(folder, variant)
    rules = VARIANTS[variant]
    config = released_config(theirs) or variant_config(variant)
    if config.variant != variant:
        raise CommandError(f"{folder} is of variant {config.variant}, not {variant}", "leave --variant out")
    loaded, _ = load_tokenizer(tokenizer)
    token_ids = _encode(loaded, text)
    if not token_ids:
        raise CommandError("the text has no tokens", "give some text")
    with tempfile.TemporaryDirectory() as scratch:
        shadow_map = _shadow_map(loaded, tokenizer, config, Path(scratch)) if rules.compresses else None
        if shadow_map is not None:
            compressed_BT = shadow_map(torch.tensor([token_ids]))
            size, pad_id = shadow_map.compressed_vocab_size, compressed_pad_id(config, shadow_map, None)
        else:
            compressed_BT, pad_id = torch.tensor([token_ids]), config.pad_token_id or 0
            text_config = theirs.get("text_config") or theirs
            size = int(text_config.get("vocab_size") or rules.vocab_size or max(*token_ids, pad_id) + 1)
        row_ids: dict[str, Any] = {}
        row_norms: dict[str, Any] = {}
        for layer in config.layer_indices:
            hasher = NgramHasher.from_config(config, layer_id=layer, compressed_vocab_size=size, pad_id=pad_id)
            row_ids_BTH = hasher(compressed_BT)
            row_ids[str(layer)] = row_ids_BTH[0].tolist()
            if layer in layers:
                assert folder is not None
                table = open_released_table(folder, layer, variant=variant, config=config, tokenizer=shadow_map)
                row_norms[str(layer)] = table(row_ids_BTH[0]).float().norm(dim=-1).tolist()
                table.close()
    tokens = [_decode(loaded, [token_id]) for token_id in token_ids]
    result: dict[str, Any] = {
        "variant": variant,
        "tokens": tokens,
        "token_ids": token_ids,
        "compressed_ids": compressed_BT[0].tolist(),
        "ngrams": {str(order): _ngrams(loaded, token_ids, order) for order in config.ngram_orders},
        "row_ids": row_ids,
    }
    if folder is not None:
        result["row_norms"] = row_norms
    for line in _lines(result, config):
        echo(line)
    return result


def _checkpoint(folder: str | Path | None, variant: str | None) -> tuple[list[int], dict[str, Any], str]:
    """(layers that have a table, config.json, the variant)"""
    if folder is None:
        if variant is None:
            raise CommandError("neither a FOLDER nor --variant was given", f"--variant {'|'.join(VARIANTS)}")
        if variant not in VARIANTS:
            raise CommandError(f"no variant {variant!r}", f"there are {', '.join(VARIANTS)}")
        return [], {}, variant
    tables = [facts for facts in released_tables(folder) if variant in (None, facts.variant)]
    variants = sorted({facts.variant for facts in tables})
    if len(variants) != 1:
        of = "" if variant is None else f" of variant {variant}"
        raise CommandError(f"{folder}: no released table{of}", "sense-engram inspect FOLDER says what is there")
    place = Path(folder)
    file = (place if place.is_dir() else place.parent) / "config.json"
    theirs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [facts.layer for facts in tables], theirs, variants[0]


def _shadow_map(loaded: Any, name: str, config: EngramConfig, scratch: Path) -> EngramTokenizer:
    builder = EngramTokenizerBuilder(loaded, normalization=config.normalization)
    builder.tokenizer_name = name
    builder.build_mapping(scratch / "shadow_map.npy")
    return EngramTokenizer(scratch / "shadow_map.npy")


def _encode(loaded: Any, text: str) -> list[int]:
    encoded = loaded.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))


def _decode(loaded: Any, token_ids: list[int]) -> str:
    return str(loaded.decode(token_ids, skip_special_tokens=False))


def _ngrams(loaded: Any, token_ids: list[int], order: int) -> list[str]:
    """The text that ends at each position; shorter where the text begins."""
    return [_decode(loaded, token_ids[max(0, end - order) : end]) for end in range(1, len(token_ids) + 1)]


def _lines(result: dict[str, Any], config: EngramConfig) -> list[str]:
    lines = []
    for position, token in enumerate(result["tokens"]):
        token_id, compressed_id = result["token_ids"][position], result["compressed_ids"][position]
        lines.append(f"{token!r}  token {token_id}, compressed {compressed_id}")
        for layer, row_ids in result["row_ids"].items():
            norms = result.get("row_norms", {}).get(layer)
            for number, order in enumerate(config.ngram_orders):
                heads = slice(number * config.num_heads, (number + 1) * config.num_heads)
                ids = " ".join(map(str, row_ids[position][heads]))
                lines.append(f"  layer {layer}, {order}-gram {result['ngrams'][str(order)][position]!r}: rows {ids}")
                if norms is not None:
                    lines.append(f"    norms {' '.join(f'{norm:.3f}' for norm in norms[position][heads])}")
    return lines
