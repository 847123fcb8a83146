"""A table of ours -> a GGUF file with the table's tensor and what llama.cpp's converter says of it.

Streamed, taken up again after a kill, read back and compared (`sense_v2.engram.upkeep.transfer`). Names and keys are
those of `sense_v2.engram.released.gguf_tables`. The file has the table alone: no model of llama.cpp is whole without
the rest, which comes from a file of the model. A manifest has the tokenizer map's checksum and not the map, so
DeepSeek's token_map and pad_id aren't written.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading.gguf_headers import ALIGNMENT, ARRAY, MAGIC, STRING, TENSOR_TYPES, UINT32, UINT64
from sense_v2.engram.released.exporting import described_table
from sense_v2.engram.released.gguf_tables import DEEPSEEK_TENSOR, QWEN_ARCHITECTURE, QWEN_TENSOR
from sense_v2.engram.released.importing import OUR_DTYPES
from sense_v2.engram.released.layouts import DescribedTable, hasher_of
from sense_v2.engram.table import disk
from sense_v2.engram.table.compact_rows import BLOCK_VALUES, INT4
from sense_v2.engram.table.disk import WriterLock
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.table.row_dtypes import DtypeCoding
from sense_v2.engram.table.row_files import Column, Piece
from sense_v2.engram.upkeep.convert import identity_of, progress_path, readable_manifest, table_side, temporary
from sense_v2.engram.upkeep.transfer import NewFile, Target, Transfer

VERSION = 3
_NUMBERS = {name: number for number, (name, *_) in TENSOR_TYPES.items()}
# A row type of ours -> GGUF's type with the same bytes.
GGUF_DTYPES = {ours: theirs for theirs, ours in OUR_DTYPES.items() if theirs in _NUMBERS}


@dataclass
class ExportedGguf:
    """What `export_gguf` did."""

    path: Path
    tensor: str
    dtype: str
    """As GGUF spells it."""
    num_rows: int
    num_bytes: int
    """Of the file."""
    resumed_rows: int
    """Rows that an earlier call had done."""
    errors: dict[str, float]
    """`transfer.ERRORS`."""
    notes: list[str]


def export_gguf(
    table: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    config: EngramConfig | None = None,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> ExportedGguf:
    """Write a table as a GGUF file, or go on with it.

    Args:
        table: Its rows' ids are those of DeepSeek-V4.1's or Qwen PLE's layout.
        output: The new file.
        dtype: Of the rows, a row type of ours; by default the table's.
        config: The memory's, for what the table's manifest doesn't say.
        advance: Is told how many bytes are read and written.

    Raises:
        FileExistsError: A file is there.
        ValueError: GGUF has no such rows, or the layout can't express the memory; else as `convert_table`.
    """
    source, output = Path(table), Path(output)
    manifest = readable_manifest(source)
    described = described_table(source, str(manifest.provenance.get("variant")), config)
    name = row_dtype(dtype or manifest.dtype).name
    if name not in GGUF_DTYPES:
        raise with_way_out(
            ValueError(f"{source}: GGUF has no rows of {name}"), f"choose one of {', '.join(GGUF_DTYPES)}"
        )
    if name == INT4 and manifest.width % BLOCK_VALUES:
        raise with_way_out(
            ValueError(
                f"{source}: rows of {manifest.width} values, and GGUF's {GGUF_DTYPES[name]} has whole blocks of "
                f"{BLOCK_VALUES}"
            ),
            "Choose another dtype",
        )
    coding = DtypeCoding(row_dtype(name))
    tensor, head = _head(described, GGUF_DTYPES[name])
    num_bytes = len(head) + _padded(manifest.rows * coding.row_bytes(manifest.width))
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(output.with_name(f"{output.name}.lock"), str(output))
    try:
        if output.exists() or output.is_symlink():
            raise with_way_out(FileExistsError(f"{output} is there already"), "choose another --output")
        rows = Column(coding.row_bytes(manifest.width), (Piece(temporary(output), len(head), manifest.rows),))
        transfer = Transfer(
            table_side(source, manifest),
            Target(output, [rows], coding),
            num_rows=manifest.rows,
            width=manifest.width,
            files=[NewFile(temporary(output), num_bytes, head)],
            progress_path=progress_path(output),
            identity=lambda: identity_of(read_manifest(TableFiles(source).manifest)),
            source_checksums=manifest.checksums,
            source_version=manifest.format_version,
        )
        transfer.run(advance)
        disk.rename(temporary(output), output)
        progress_path(output).unlink(missing_ok=True)
        known = {name: value for name, value in transfer.errors().items() if math.isfinite(value)}
        of = (output, tensor, GGUF_DTYPES[name], manifest.rows, num_bytes)
        return ExportedGguf(*of, transfer.resumed_rows, known, transfer.notes)
    finally:
        output.with_name(f"{output.name}.lock").unlink(missing_ok=True)
        lock.release()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _head(table: DescribedTable, dtype: str) -> tuple[str, bytes]:
    """The tensor's name, and what the file begins with: all up to the first row."""
    is_qwen = table.known["variant"] == "qwen_ple"
    tensor = QWEN_TENSOR if is_qwen else DEEPSEEK_TENSOR.format(layer=table.layer)
    architecture = QWEN_ARCHITECTURE if is_qwen else "deepseek41"
    keys = _qwen_keys(table) if is_qwen else _deepseek_keys(table)
    pairs = {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in keys.items()}}
    raw = MAGIC + struct.pack("<IQQ", VERSION, 1, len(pairs))
    raw += b"".join(_text(key) + _value(value) for key, value in pairs.items())
    shape = table.manifest.width, table.manifest.rows
    raw += _text(tensor) + struct.pack("<I2QIQ", 2, *shape, _NUMBERS[dtype], 0)
    return tensor, raw.ljust(_padded(len(raw)), b"\0")


def _qwen_keys(table: DescribedTable) -> Mapping[str, Any]:
    layout, place = table.layout, table.layout.layer_ids.index(table.layer)
    return {
        "ple.layers": [table.layer],
        "ple.ngram_size": max(layout.ngram_orders),
        "ple.heads_per_ngram": layout.num_heads,
        "ple.eos_token_id": table.known["pad_token_id"],
        "embedding_length_per_layer_input": table.manifest.width,
        "vocab_size": table.known["compressed_vocab_size"],
        "ple.layer_multipliers": hasher_of(table.layer, table).multipliers.tolist(),
        "ple.head_offsets": list(layout.offsets_LH[place]),
        "ple.head_vocab_sizes": list(layout.primes_LH[place]),
    }


def _deepseek_keys(table: DescribedTable) -> Mapping[str, Any]:
    layout = table.layout
    return {
        "engram.layer_ids": list(layout.layer_ids),
        "engram.head_count": layout.num_heads,
        "engram.key_length": table.manifest.width,
        "engram.max_ngram_size": max(layout.ngram_orders),
        "engram.multipliers": [
            int(number) for layer in layout.layer_ids for number in hasher_of(layer, table).multipliers
        ],
        "engram.primes": [prime for primes_H in layout.primes_LH for prime in primes_H],
        "engram.offsets": [offset for offsets_H in layout.offsets_LH for offset in offsets_H],
    }


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """Texts, numbers of 32 bits and lists of numbers of 64, as the converter writes them."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}Q", ARRAY, UINT64, len(value), *value)
    return struct.pack("<II", UINT32, value)
