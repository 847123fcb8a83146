"""Finds the tables of a released checkpoint, in safetensors or GGUF files, and checks them, before any row is read.

Everything that can be known is checked: types, shapes, bytes, that the parts are all there, and, against the
checkpoint's config.json or what the caller passes, the layout (`HeadLayout`), the number of rows and the tokenizer's
map. What could not be checked is said in a warning: rows of another layout are found without an error, and mean
nothing. Long because each family has names, types and rules of its own, and what is checked stands beside them.

Sources: the names and shapes of deepseek-ai/DeepSeek-V4.1-Flash, of transformers' models/qwen4_exp, with its
FP8Embedding, and of meituan-longcat/LongCat-Flash-Lite.

N rows, D row width.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.head_layout import HeadLayout, round_up
from sense_v2.engram.reading.block_rows import BLOCK_FORMATS
from sense_v2.engram.reading.gguf_headers import PLAIN_TYPES, is_gguf
from sense_v2.engram.reading.safetensors_headers import ITEM_BYTES, Checkpoint, TensorSpan, find_tensors
from sense_v2.engram.released.gguf_tables import MAX_HEADS, MAX_ORDER, gguf_checkpoint
from sense_v2.engram.table.compact_rows import BLOCK_VALUES
from sense_v2.engram.tokenizer import EngramTokenizer, map_sha256
from sense_v2.engram.variants import VARIANTS, variant_config


@dataclass(frozen=True)
class ReleasedNames:
    """How one variant's tables are called and typed in safetensors files."""

    tensor: re.Pattern[str]
    """Groups: layer (without it 0), shard (or None), and kind, `weight` or `scale`."""
    weight_dtypes: tuple[str, ...]
    scale_kind: str
    """block: F8_E8M0, one for 32 values of a row. table: one number for all rows of an F8_E4M3 table. none."""
    shards_are_heads: bool = False
    """True if each shard is the rows of one head."""


_NAMES = {
    "deepseek_v41": ReleasedNames(
        re.compile(
            r"(?:model\.)?layers\.(?P<layer>\d+)\.engram\.embed(?:\.shard_(?P<shard>\d+))?\.(?P<kind>weight|scale)"
        ),
        ("F8_E4M3",),
        "block",
    ),
    "qwen_ple": ReleasedNames(
        re.compile(
            r"(?:model\.)?(?:language_model\.)?layers\.(?P<layer>\d+)\.ple\.ple_embedding\.ngram_embedding"
            r"(?:\.shard_(?P<shard>\d+))?\.(?:weight_)?(?P<kind>weight|scale)"
        ),
        ("BF16", "F8_E4M3"),
        "table",
    ),
    "longcat_flash": ReleasedNames(
        re.compile(r"(?:model\.)?ngram_embeddings\.embedders\.(?P<shard>\d+)\.(?P<kind>weight)"),
        ("BF16", "F16", "F32"),
        "none",
        shards_are_heads=True,
    ),
}
# Other models with `ngram_vocab_size_ratio` leave tokens out, or hash in another base.
_LONGCAT_TYPES = ("longcat_flash_ngram", "longcat_flash")
# Of a table in a GGUF file, whatever its variant.
_GGUF_DTYPES = (*(name for name, *_ in PLAIN_TYPES.values()), *BLOCK_FORMATS)
TORCH_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# No table has more rows than int64 has numbers.
MAX_RATIO, MAX_VOCABULARY = 1 << 20, 1 << 31
# Two tokenizers of one size can map differently. That of the released DeepSeek-V4.1 tables, over little-endian int64.
_RELEASED_MAPS = {
    ("deepseek_v41", 99_092): "26b9be2936d236a124ba318a998c417bc7032e3e92a3107fe98deee49f1dc496",
}


@dataclass
class TableFacts:
    """What is known of a released table before its first lookup."""

    variant: str
    layer: int
    num_rows: int
    width: int
    dtype: str
    """Of the codes, as safetensors, or GGUF, spells it."""
    num_parts: int
    num_bytes: int
    """Of codes and scales, in the files."""
    layout: HeadLayout | None = None
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


@dataclass
class ReleasedTensors:
    """A table's tensors in a checkpoint's files, and what is known of it."""

    path: Path
    """What was opened: a folder, an index or a file."""
    weights: list[TensorSpan]
    """The rows' codes, in their order."""
    scales: list[TensorSpan]
    facts: TableFacts
    scale: torch.Tensor | None = None
    """Of an F8_E4M3 table with one for all rows, [1]."""
    config: EngramConfig | None = None
    """Whose layout the rows have: the caller's, else config.json's."""
    compressed_vocab_size: int | None = None
    map_sha256: str | None = None
    """Of the tokenizer's map that the rows belong to."""


def find_released_table(
    place: str | os.PathLike[str],
    layer: int | None = None,
    *,
    variant: str | None = None,
    config: EngramConfig | None = None,
    tokenizer: EngramTokenizer | None = None,
) -> ReleasedTensors:
    """Where the table that `open_released_table` opens lies, and what is known of it, checked in the same way."""
    checkpoint = find_checkpoint(place)
    tables = _tables(checkpoint)
    found = [key for key in tables if layer in (None, key[1]) and variant in (None, key[0])]
    if len(found) != 1:
        there = ", ".join(f"{name} layer {number}" for name, number in sorted(tables)) or "none"
        of = "" if layer is None else f" of layer {layer}"
        raise with_way_out(
            ValueError(f"{checkpoint.path}: {len(found)} released tables{of}"),
            f"There are: {there}; layers are counted from 0",
        )
    tensors = _checked_tensors(checkpoint, *found[0], tables[found[0]])
    _check_layout(tensors, checkpoint, config, tokenizer)
    if tensors.scales and _NAMES[tensors.facts.variant].scale_kind == "table":
        tensors.scale = _read_number(tensors.scales[0])
    return tensors


def find_checkpoint(place: str | os.PathLike[str]) -> Checkpoint:
    """Find the tensors of a checkpoint's tables, in its safetensors files or in a GGUF model, and its configuration.
    Raises `FileNotFoundError` or `ValueError` naming the file."""
    if is_gguf(place):
        return gguf_checkpoint(place)
    return find_tensors(place, lambda name: any(names.tensor.fullmatch(name) for names in _NAMES.values()))


def _rows_by_name(spans: Sequence[TensorSpan]) -> dict[str, int]:
    """The rows of each tensor, in their order."""
    rows: dict[str, int] = {}
    for span in spans:
        rows[span.name] = rows.get(span.name, 0) + span.shape[0]
    return rows


def row_bytes(facts: TableFacts) -> int:
    """Bytes that a row has in the tensors of its codes."""
    blocks = BLOCK_FORMATS.get(facts.dtype)
    if blocks is not None:
        return facts.width // blocks.block_values * blocks.block_bytes
    return facts.width * ITEM_BYTES[facts.dtype]


def warn_unchecked(tensors: ReleasedTensors, *, stacklevel: int) -> None:
    """Says what of a table couldn't be checked, if anything."""
    facts = tensors.facts
    if facts.unchecked:
        warnings.warn(
            f"{tensors.path}, layer {facts.layer}: not checked, because nothing there says what they must be: "
            f"{', '.join(facts.unchecked)}. Pass config=EngramConfig and tokenizer=EngramTokenizer, or open the "
            "whole checkpoint",
            UserWarning,
            stacklevel=stacklevel,
        )


def released_tables(place: str | os.PathLike[str]) -> list[TableFacts]:
    """What released tables a checkpoint has, checked as `open_released_table` checks them; nothing is mapped."""
    checkpoint = find_checkpoint(place)
    found = []
    for (variant, layer), tensors in sorted(_tables(checkpoint).items()):
        one = _checked_tensors(checkpoint, variant, layer, tensors)
        _check_layout(one, checkpoint, None, None)
        found.append(one.facts)
    return found


def released_config(config: Mapping[str, Any]) -> EngramConfig | None:
    """The layout that a checkpoint's config.json describes; None where it describes none.

    Raises `ValueError` where it does with values that can't be.
    """
    text = config.get("text_config") or config
    try:
        if text.get("engram_layer_ids"):
            orders = list(range(2, _count(text, "engram_max_ngram_size", MAX_ORDER) + 1))
            heads = _count(text, "engram_n_heads", MAX_HEADS)
            return variant_config(
                "deepseek_v41",
                table_size=text["engram_vocab_size"],
                num_heads=heads,
                ngram_orders=orders,
                engram_dim=text["engram_head_dim"] * heads * len(orders),
                layer_indices=sorted(text["engram_layer_ids"]),
                pad_token_id=text.get("engram_pad_token_id", VARIANTS["deepseek_v41"].defaults["pad_token_id"]),
                seed=text.get("engram_seed", 0),
                num_streams=text.get("hc_mult", 1),
            )
        if text.get("ple_layer_ids"):
            orders = list(range(2, _count({"ngram_size": 3, **text}, "ngram_size", MAX_ORDER) + 1))
            heads = _count({"heads_per_ngram": 8, **text}, "heads_per_ngram", MAX_HEADS)
            end = text.get("eos_token_id")
            return variant_config(
                "qwen_ple",
                table_size=text.get("ngram_vocab_size_base", 20_000_000),
                num_heads=heads,
                ngram_orders=orders,
                engram_dim=text.get("ple_embed_dim") or text["hidden_size"],
                layer_indices=sorted(number - 1 for number in set(text["ple_layer_ids"])),
                pad_token_id=end[0] if isinstance(end, list) else end,
                seed=text.get("seed", 1234),
                num_streams=text.get("hc_count", 4),
            )
        if text.get("ngram_vocab_size_ratio"):
            return _longcat_config(text)
    except (KeyError, TypeError, IndexError) as error:
        raise with_way_out(
            ValueError(f"config.json describes a memory, but not all of it: {error!r}"), "Fetch it again"
        ) from None
    return None


def _longcat_config(text: Mapping[str, Any]) -> EngramConfig:
    kind, ratio = text.get("model_type"), text["ngram_vocab_size_ratio"]
    if kind not in _LONGCAT_TYPES:
        raise ValueError(
            f"config.json: the n-grams of model_type = {str(kind)[:50]!r} may follow other rules than those of "
            f"LongCat-Flash-Lite ({' or '.join(_LONGCAT_TYPES)}), and aren't read"
        )
    if type(ratio) not in (int, float) or not 0 < ratio <= MAX_RATIO:
        raise with_way_out(
            ValueError(
                f"config.json: ngram_vocab_size_ratio = {str(ratio)[:50]}: must be above 0, and {MAX_RATIO} at most"
            ),
            "Fetch it again",
        )
    orders = list(range(2, _count(text, "emb_neighbor_num", MAX_ORDER) + 1))
    heads = _count(text, "emb_split_num", MAX_HEADS)
    num_tables, end = heads * len(orders), text["eos_token_id"]
    return variant_config(
        "longcat_flash",
        table_size=int(ratio * _count(text, "vocab_size", MAX_VOCABULARY)),
        num_heads=heads,
        ngram_orders=orders,
        engram_dim=text["hidden_size"] // max(num_tables, 1) * num_tables,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )


def _count(text: Mapping[str, Any], name: str, largest: int) -> int:
    """Return a number that decides how much is computed."""
    value = text[name]
    if value is None:
        raise TypeError(f"{name} is null")
    if type(value) is not int or not 1 <= value <= largest:
        raise with_way_out(
            ValueError(f"config.json: {name} = {str(value)[:50]}: must be from 1 to {largest}"), "Fetch it again"
        )
    return value


def _tables(checkpoint: Checkpoint) -> dict[tuple[str, int], dict[str, list[TensorSpan]]]:
    """(variant, layer) -> the tensors of that table."""
    tables: dict[tuple[str, int], dict[str, list[TensorSpan]]] = {}
    for name, spans in checkpoint.tensors.items():
        for variant, names in _NAMES.items():
            match = names.tensor.fullmatch(name)
            if match:
                layer = int(match.groupdict().get("layer", 0))
                tables.setdefault((variant, layer), {})[name] = spans
    return tables


def _checked_tensors(
    checkpoint: Checkpoint, variant: str, layer: int, tensors: Mapping[str, list[TensorSpan]]
) -> ReleasedTensors:
    names = _NAMES[variant]
    where = f"{checkpoint.path}, {variant} layer {layer}"
    weights = _in_order(where, names, tensors, "weight")
    scales = _in_order(where, names, tensors, "scale")
    if not weights:
        raise with_way_out(
            ValueError(f"{where}: {', '.join(tensors)}, and no weight"), "Fetch the rest of the checkpoint"
        )
    first = weights[0]
    dtypes = _GGUF_DTYPES if checkpoint.is_gguf else names.weight_dtypes
    for span in weights:
        if span.dtype not in dtypes or span.dtype != first.dtype:
            allowed = " or ".join(dtypes)
            raise with_way_out(
                ValueError(f"{span.path}: {span.name} is {span.dtype}; expected {allowed}, in all parts alike"),
                "Fetch the checkpoint again",
            )
        if len(span.shape) != 2 or span.shape[1:] != first.shape[1:] or span.shape[1] < 1:
            raise with_way_out(
                ValueError(
                    f"{span.path}: {span.name} has shape {list(span.shape)}; expected [rows, width], the same width "
                    f"as in {first.name} ({list(first.shape)})"
                ),
                "Fetch the checkpoint again",
            )
    if names.shards_are_heads:
        of_first, *_ = _rows_by_name(weights).values()
        for head, (name, rows) in enumerate(_rows_by_name(weights).items()):
            if rows != of_first + 2 * head:
                raise ValueError(f"{where}: {name} has {rows} rows; expected {of_first + 2 * head}, by the first")
    num_rows, width = sum(span.shape[0] for span in weights), first.shape[1]
    if num_rows == 0:
        raise ValueError(f"{first.path}: {first.name} has no rows")
    if first.dtype == "F8_E4M3" and not scales:
        raise with_way_out(
            ValueError(f"{first.path}: {first.name} is F8_E4M3, and its scale isn't there"), "Fetch the rest"
        )
    if names.scale_kind == "block" and not checkpoint.is_gguf:
        _check_block_scales(scales, num_rows, width)
    elif first.dtype == "F8_E4M3":
        one = scales[0]
        if len(scales) != 1 or one.dtype not in TORCH_TYPES or one.shape not in ((), (1,)):
            raise with_way_out(
                ValueError(
                    f"{one.path}: {one.name} is {one.dtype} {list(one.shape)}, {len(scales)} in all; expected one "
                    f"number ({', '.join(TORCH_TYPES)}) for the whole table, as transformers has it"
                ),
                "Fetch the checkpoint again",
            )
    elif scales:
        raise ValueError(f"{scales[0].path}: {scales[0].name} beside {first.dtype} rows, which have no scale")
    num_bytes = sum(span.num_bytes for span in (*weights, *scales))
    facts = TableFacts(variant, layer, num_rows, width, first.dtype, len(weights), num_bytes)
    facts.checked += ["types", "shapes", "bytes", "parts"]
    return ReleasedTensors(checkpoint.path, weights, scales, facts)


def _check_block_scales(scales: list[TensorSpan], num_rows: int, width: int) -> None:
    if width % BLOCK_VALUES:
        raise with_way_out(
            ValueError(f"{scales[0].path}: rows of {width} values; scales for {BLOCK_VALUES} each don't fit them"),
            "Fetch the checkpoint again",
        )
    for span in scales:
        if span.dtype != "F8_E8M0":
            raise with_way_out(
                ValueError(f"{span.path}: {span.name} is {span.dtype}; expected F8_E8M0"),
                "Fetch the checkpoint again",
            )
        if len(span.shape) != 2 or span.shape[1] != width // BLOCK_VALUES:
            raise with_way_out(
                ValueError(
                    f"{span.path}: {span.name} has shape {list(span.shape)}; expected "
                    f"[rows, {width // BLOCK_VALUES}], one for {BLOCK_VALUES} of {width} values"
                ),
                "Fetch the checkpoint again",
            )
    found = sum(span.shape[0] for span in scales)
    if found != num_rows:
        raise with_way_out(
            ValueError(f"{scales[0].path}: scales of {found} rows beside {num_rows} rows"), "Fetch the rest"
        )


def _in_order(
    where: str, names: ReleasedNames, tensors: Mapping[str, list[TensorSpan]], kind: str
) -> list[TensorSpan]:
    """The parts of a tensor, by their numbers. Raises `ValueError` where one is missing or doubled."""
    numbered: dict[int | None, list[TensorSpan]] = {}
    for name, spans in tensors.items():
        match = names.tensor.fullmatch(name)
        assert match
        if match["kind"] == kind:
            number = None if match["shard"] is None else int(match["shard"])
            if number in numbered:
                raise ValueError(f"{where}: {name} and {numbered[number][0].name} are the same part of one tensor")
            numbered[number] = spans
    if None in numbered:
        if len(numbered) > 1:
            raise with_way_out(
                ValueError(f"{where}: its {kind} is there whole and in parts"), "Remove one of the two"
            )
        return numbered[None]
    numbers = sorted(number for number in numbered if number is not None)
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise with_way_out(
            ValueError(f"{where}: {kind} shard {listed} of {numbers[-1] + 1} isn't there"), "Fetch the rest"
        )
    return [span for number in numbers for span in numbered[number]]


def _check_layout(
    tensors: ReleasedTensors, checkpoint: Checkpoint, config: EngramConfig | None, tokenizer: EngramTokenizer | None
) -> None:
    facts = tensors.facts
    where = f"{checkpoint.path}, {facts.variant} layer {facts.layer}"
    theirs = checkpoint.config or {}
    text = theirs.get("text_config") or theirs
    said = released_config(theirs)
    of_file = "its metadata" if checkpoint.is_gguf else "config.json"
    for source, layout_config in ((of_file, said), ("the configuration passed", config)):
        if layout_config is not None:
            multiple = text.get("make_ngram_vocab_size_divisible_by") if facts.variant == "qwen_ple" else None
            facts.layout = _fitting_layout(tensors, where, source, layout_config, multiple)
            tensors.config = layout_config
    if facts.layout is None:
        facts.unchecked.append("the number of rows against the layout")
    else:
        facts.checked.append("rows against the layout")
    if checkpoint.is_gguf:
        has_hash = "seed" in text or "engram_tokenizer_map" in text
        (facts.checked if has_hash else facts.unchecked).append("the hash's multipliers")
    declared = text.get("engram_num_embeddings")
    if declared is not None and said is not None:
        place = said.layer_indices.index(facts.layer)
        wanted = declared[place] if isinstance(declared, list) and len(declared) > place else declared
        if wanted != facts.num_rows:
            raise ValueError(
                f"{where}: {facts.num_rows} rows, but config.json says engram_num_embeddings = {declared}"
            )
    if VARIANTS[facts.variant].compresses:
        _check_map(tensors, where, text, tokenizer)
    else:
        tensors.compressed_vocab_size = text.get("vocab_size")


def _fitting_layout(
    tensors: ReleasedTensors, where: str, source: str, config: EngramConfig, multiple: int | None
) -> HeadLayout:
    facts = tensors.facts
    if config.variant != facts.variant:
        raise ValueError(f"{where}: {source} is of variant {config.variant!r}")
    if facts.layer not in config.layer_indices:
        raise ValueError(f"{where}: {source} has memory in layers {config.layer_indices}, counted from 0")
    if config.row_dim != facts.width:
        raise ValueError(f"{where}: rows of {facts.width} values; {source} says {config.row_dim}")
    layout = HeadLayout.from_config(config)
    place = config.layer_indices.index(facts.layer)
    expected = layout.num_rows_L[place]
    if _NAMES[facts.variant].shards_are_heads:
        rows_H = _rows_by_name(tensors.weights)
        if len(rows_H) != config.total_heads:
            raise ValueError(
                f"{where}: {len(rows_H)} tables, up to {list(rows_H)[-1]}; {source} says {config.total_heads}, "
                f"{config.num_heads} for each n-gram order"
            )
    if multiple:
        expected = round_up(sum(layout.primes_LH[place]), multiple)
    if expected != facts.num_rows:
        raise with_way_out(
            ValueError(
                f"{where}: {facts.num_rows} rows, but the layout of {source} has {expected}: a part is missing, or "
                "the rows are of another layout"
            ),
            "Fetch the rest, or name the configuration that the rows were made with",
        )
    return layout


def _check_map(
    tensors: ReleasedTensors, where: str, text: Mapping[str, Any], tokenizer: EngramTokenizer | None
) -> None:
    facts = tensors.facts
    size, ids = text.get("engram_compressed_vocab_size"), text.get("engram_tokenizer_map")
    if tokenizer is not None and size is not None and tokenizer.compressed_vocab_size != size:
        name = tokenizer.tokenizer_name or tokenizer.path
        raise with_way_out(
            ValueError(
                f"{where}: {name} has {tokenizer.compressed_vocab_size} compressed ids, config.json says {size}"
            ),
            "Make the map from the checkpoint's own tokenizer",
        )
    if size is None and tokenizer is not None:
        size = tokenizer.compressed_vocab_size
    known = _RELEASED_MAPS.get((facts.variant, size)) if isinstance(size, int) else None
    if isinstance(ids, list):
        known = map_sha256(np.array(ids, dtype=np.int64))
    tensors.compressed_vocab_size, tensors.map_sha256 = size, known
    if tokenizer is None or known is None:
        facts.unchecked.append("the tokenizer's map")
        if tokenizer is not None:
            tensors.map_sha256 = tokenizer.sha256
    elif known != tokenizer.sha256:
        name = tokenizer.tokenizer_name or tokenizer.path
        raise with_way_out(
            ValueError(
                f"{where}: the map of {name} is that of another tokenizer, or of another revision (SHA-256 "
                f"{tokenizer.sha256[:12]}…, expected {known[:12]}…)"
            ),
            "Make it from the checkpoint's own tokenizer",
        )
    else:
        facts.checked.append("the tokenizer's map")


def _read_number(span: TensorSpan) -> torch.Tensor:
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        number = torch.frombuffer(bytearray(file.read(span.num_bytes)), dtype=TORCH_TYPES[span.dtype])
    if not bool(number.isfinite().all()):
        raise with_way_out(ValueError(f"{span.path}: {span.name} is {number.item()}"), "Fetch the file again")
    return number
