"""How a released checkpoint is written: names, types, shapes, header bytes, config.json.

What is here are the facts of the two layouts, as functions of what is known of a table (`DescribedTable`);
`sense_v2.engram.released.exporting` writes. Sources: as `sense_v2.engram.released.released_table`; for the
config.json of DeepSeek-V4.1, whose keys lie under text_config, and its float8 matrices, public code that reads it.

N rows, D row width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.released.fusion_names import Tensors
from sense_v2.engram.table.compact_rows import BLOCK_VALUES, FLOAT8
from sense_v2.engram.table.format import Manifest
from sense_v2.engram.table.row_dtypes import Coding, ScaledCodes
from sense_v2.engram.table.row_files import Column, Piece
from sense_v2.engram.upkeep.convert import identity_of
from sense_v2.engram.variants import VARIANTS

# Qwen's table is cut into tensors of about this size, as the released one is.
PART_BYTES = 1 << 28
MAX_PARTS = 512


@dataclass(frozen=True)
class Layout:
    """How one released layout is written."""

    prefix: str
    """Of a layer's tensors."""
    rows: str
    """Of its rows' tensors, behind that."""
    scales: str
    dtypes: tuple[str, ...]
    """What rows can be written as; the first is what they are without a choice."""


LAYOUTS = {
    "deepseek_v41": Layout("layers.{layer}.", "engram.embed.weight", "engram.embed.scale", (FLOAT8,)),
    "qwen_ple": Layout(
        "model.language_model.layers.{layer}.",
        "ple.ple_embedding.ngram_embedding.shard_{part}.weight",
        "ple.ple_embedding.ngram_embedding.weight_scale",
        ("bfloat16", FLOAT8),
    ),
}


@dataclass(frozen=True)
class DescribedTable:
    """A table of ours with a released layout's row ids."""

    path: Path
    manifest: Manifest
    layer: int
    layout: HeadLayout
    known: dict[str, Any]
    """Its manifest's provenance, completed: variant, seed, table_size, pad_token_id, compressed_vocab_size, …"""


@dataclass(frozen=True)
class Shard:
    """A table's safetensors file in the making."""

    head: bytes
    """Its header, and what lies in front of the rows."""
    num_bytes: int
    tensors: dict[str, int]
    """Name -> bytes."""
    columns: list[Column]
    """Where the rows go."""


def table_shard(path: Path, variant: str, table: DescribedTable, coding: Coding, *, num_parts: int) -> Shard:
    """Lay out the file that holds a table's rows so coded; Qwen's rows in `num_parts` tensors."""
    names, rows, width = LAYOUTS[variant], table.manifest.rows, table.manifest.width
    prefix = names.prefix.format(layer=table.layer)
    dtype, row_bytes = ("BF16", 2 * width) if coding.name == "bfloat16" else ("F8_E4M3", width)
    tensors: dict[str, tuple[str, list[int], int]] = {}
    in_front = b""
    if isinstance(coding, ScaledCodes):
        in_front = torch.tensor([coding.scale], dtype=coding.scale_type).view(torch.uint8).numpy().tobytes()
        tensors[prefix + names.scales] = ("BF16", [1], len(in_front))
    counts = part_rows(rows, num_parts) if "{part}" in names.rows else [rows]
    row_names = [prefix + names.rows.format(part=part) for part in range(len(counts))]
    for name, count in zip(row_names, counts, strict=True):
        tensors[name] = (dtype, [count, width], count * row_bytes)
    num_scales = width // BLOCK_VALUES
    has_block_scales = dtype == "F8_E4M3" and not in_front
    if has_block_scales:
        tensors[prefix + names.scales] = ("F8_E8M0", [rows, num_scales], rows * num_scales)
    header: dict[str, Any] = {"__metadata__": _metadata(table, coding)}
    begins, offset = {}, 0
    for name, (kind, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        begins[name] = offset
        offset += num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    first = 8 + len(raw)
    pieces = [Piece(path, first + begins[name], count) for name, count in zip(row_names, counts, strict=True)]
    columns = [Column(row_bytes, tuple(pieces))]
    if has_block_scales:
        columns.append(Column(num_scales, (Piece(path, first + begins[prefix + names.scales], rows),)))
    head = len(raw).to_bytes(8, "little") + raw + in_front
    return Shard(head, first + offset, {name: size for name, (_, _, size) in tensors.items()}, columns)


def parts_of(num_rows: int, row_bytes: int) -> int:
    """How many tensors the rows are cut into: one for each 256 MiB, 512 at most.

    >>> parts_of(1000, 320), parts_of(320_000_000, 320)
    (1, 381)
    """
    return min(MAX_PARTS, max(1, num_rows * row_bytes // PART_BYTES))


def part_rows(num_rows: int, num_parts: int) -> list[int]:
    """The rows of each part; those of two parts differ by one at most.

    >>> part_rows(10, 3)
    [4, 3, 3]
    """
    each, more = divmod(num_rows, num_parts)
    return [each + (1 if part < more else 0) for part in range(num_parts)]


def _metadata(table: DescribedTable, coding: Coding) -> dict[str, str]:
    """Tell people, and this conversion, where the file comes from."""
    known = {name: table.known.get(name) for name in ("variant", "shadow_map_sha256", "tokenizer_name")}
    known |= {"rows": coding.name, "converted_from": identity_of(table.manifest)}
    return {"format": "pt", "sense_v2": json.dumps(known, sort_keys=True)}


def config_json(
    variant: str,
    tables: Sequence[DescribedTable],
    num_streams: int | None,
    hidden_size: int | None,
    *,
    is_float8: bool,
    num_parts: int,
) -> dict[str, Any]:
    """Describe the layout under the released checkpoint's keys."""
    first = tables[0]
    layout, known = first.layout, first.known
    heads, largest = layout.num_heads, max(layout.ngram_orders)
    text: dict[str, Any]
    if variant == "deepseek_v41":
        text = {
            "model_type": "deepseek_v41_text",
            "engram_layer_ids": list(layout.layer_ids),
            "engram_num_embeddings": list(layout.num_rows_L),
            "engram_max_ngram_size": largest,
            "engram_vocab_size": known["table_size"],
            "engram_n_heads": heads,
            "engram_head_dim": first.manifest.width,
            "engram_pad_token_id": known["pad_token_id"],
            "engram_compressed_vocab_size": known["compressed_vocab_size"],
        }
        streams = "hc_mult"
        quantized = {"activation_scheme": "dynamic", "weight_block_size": [BLOCK_VALUES] * 2, "scale_fmt": "ue8m0"}
    else:
        text = {
            "model_type": "qwen4_exp_text",
            "ple_layer_ids": [layer + 1 for layer in layout.layer_ids],
            "ple_embed_dim": first.manifest.width * heads * len(layout.ngram_orders),
            "ngram_size": largest,
            "heads_per_ngram": heads,
            "ngram_vocab_size_base": known["table_size"],
            "make_ngram_vocab_size_divisible_by": VARIANTS[variant].row_multiple,
            "split_ngram_parts": num_parts,
            "seed": known["seed"],
            "vocab_size": known["compressed_vocab_size"],
            "eos_token_id": known["pad_token_id"],
        }
        streams = "hc_count"
        quantized = {"modules_to_convert": ["ngram_embedding"]}
    if num_streams is not None:  # the fusion layers are written, too
        text |= {streams: num_streams, "hidden_size": hidden_size, "rms_norm_eps": VARIANTS[variant].gate_norm_eps}
    settings: dict[str, Any] = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text}
    if is_float8:
        settings["quantization_config"] = {"quant_method": "fp8", **quantized}
    return settings


def hasher_of(layer: int, table: DescribedTable) -> NgramHasher:
    """Return the hash of a layer of the table's memory, for its multipliers: they don't depend on the pad id."""
    known, layout = table.known, table.layout
    return NgramHasher(
        known["variant"],
        layer_id=layer,
        layer_ids=layout.layer_ids,
        ngram_orders=layout.ngram_orders,
        num_heads=layout.num_heads,
        table_size=known["table_size"],
        compressed_vocab_size=known["compressed_vocab_size"],
        pad_id=0,
        seed=known["seed"],
    )


def hash_buffers(layer: int, table: DescribedTable) -> Tensors:
    """Return what transformers keeps of the hash in a checkpoint."""
    layout = table.layout
    place = layout.layer_ids.index(layer)
    return {
        "layer_multipliers": torch.from_numpy(hasher_of(layer, table).multipliers.copy()),
        "ngram_heads_vocab_sizes": torch.tensor(layout.primes_LH[place]),
        "ngram_heads_offsets": torch.tensor(layout.offsets_LH[place]),
    }
