"""A text -> its tokens, n-grams and row ids, and the norms of a released checkpoint's rows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from sense_v2.core.errors import CommandError
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.model import compressed_pad_id
from sense_v2.engram.pretrained_tokenizer import load_tokenizer
from sense_v2.engram.released.find_tables import find_checkpoint, released_config, released_tables
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.engram.upkeep.shadow_map_setup import temporary_shadow_map
from sense_v2.engram.variants import VARIANTS, variant_config


def look_up_text(
    text: str, *, folder: str | Path | None = None, variant: str | None = None, tokenizer: str
) -> dict[str, Any]:
    """Look a text up in the tables of a released checkpoint, or only say which rows those would be.

    Args:
        text: At least one token of it.
        folder: The checkpoint, or a GGUF file; None to see row ids alone.
        variant: Which architecture; by default the checkpoint's.
        tokenizer: The name of the model's tokenizer.

    Returns:
        What JSON can hold: "variant", "tokens", "token_ids", "compressed_ids", "ngrams" by order,
        "row_ids" by layer, [T][H], and with a folder "row_norms" of the same shape.

    Raises:
        CommandError: The arguments don't go together.
    """
    layers, theirs, variant = _checkpoint(folder, variant)
    rules = VARIANTS[variant]
    config = released_config(theirs) or variant_config(variant)
    if config.variant != variant:
        raise CommandError(f"{folder} is of variant {config.variant}, not {variant}", "leave --variant out")
    loaded, _ = load_tokenizer(tokenizer)
    token_ids = _encode(loaded, text)
    if not token_ids:
        raise CommandError("the text has no tokens", "give some text")
    row_ids: dict[str, Any] = {}
    row_norms: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        shadow_map = None
        if rules.compresses:
            builder = EngramTokenizerBuilder(loaded, normalization=config.normalization)
            builder.tokenizer_name = tokenizer
            shadow_map = stack.enter_context(temporary_shadow_map(builder))
            compressed_BT = shadow_map(torch.tensor([token_ids]))
            size, pad_id = shadow_map.compressed_vocab_size, compressed_pad_id(config, shadow_map, None)
        else:
            compressed_BT, pad_id = torch.tensor([token_ids]), config.pad_token_id or 0
            text_config = theirs.get("text_config") or theirs
            size = int(text_config.get("vocab_size") or rules.vocab_size or max(*token_ids, pad_id) + 1)
        for layer in config.layer_indices:
            hasher = NgramHasher.from_config(config, layer_id=layer, compressed_vocab_size=size, pad_id=pad_id)
            row_ids_BTH = hasher(compressed_BT)
            row_ids[str(layer)] = row_ids_BTH[0].tolist()
            if layer in layers:
                assert folder is not None
                table = open_released_table(folder, layer, variant=variant, config=config, tokenizer=shadow_map)
                row_norms[str(layer)] = table(row_ids_BTH[0]).float().norm(dim=-1).tolist()
                table.close()
    return {
        "variant": variant,
        "tokens": [_decode(loaded, [token_id]) for token_id in token_ids],
        "token_ids": token_ids,
        "compressed_ids": compressed_BT[0].tolist(),
        "ngrams": {str(order): _ngrams(loaded, token_ids, order) for order in config.ngram_orders},
        "row_ids": row_ids,
        **({} if folder is None else {"row_norms": row_norms}),
    }


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
    return [facts.layer for facts in tables], find_checkpoint(folder).config or {}, variants[0]


def _encode(loaded: Any, text: str) -> list[int]:
    encoded = loaded.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))


def _decode(loaded: Any, token_ids: list[int]) -> str:
    return str(loaded.decode(token_ids, skip_special_tokens=False))


def _ngrams(loaded: Any, token_ids: list[int], order: int) -> list[str]:
    """The text that ends at each position; shorter where the text begins."""
    return [_decode(loaded, token_ids[max(0, end - order) : end]) for end in range(1, len(token_ids) + 1)]
