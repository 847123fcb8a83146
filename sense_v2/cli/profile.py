"""`sense-engram profile`: the rows of a model's table that a corpus looks up most, and what they serve of other text.

Rows are counted over the part of the corpus that training reads, and judged by the part that it holds out: what a hot
set serves of text that it was chosen by says little. Hashes only; no row is read, and no model is loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.cli.errors import CommandError
from sense_v2.cli.folders import new_folders
from sense_v2.cli.models import saved_tokenizer, token_stream
from sense_v2.cli.progress import ByteProgress
from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.engram.format import Manifest, row_dtype
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.hot import HotRows, RowCounts, identity, save
from sense_v2.engram.model import compressed_pad_id
from sense_v2.engram.opening import TableFiles, read_manifest
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.hf.corpus import read_corpus
from sense_v2.hf.pretrained import CONFIG_FILE, MEMORY_FOLDER, memory_paths
from sense_v2.report import wording

SHARES = (0.01, 0.05, 0.2)
"""Of the table's rows: the hot sets that are judged."""
BATCH_TOKENS = 1 << 14


def run_profile(
    folder: str | Path,
    output: str | Path,
    *,
    corpus: Sequence[str | Path] | None = None,
    share: float = max(SHARES),
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Counts, and writes the hottest `share` of the table's rows (as far as they were looked up) to `output`;
    returns one dictionary that JSON can hold.

    Raises `CommandError`, and what reading the model's memory and the corpus raise.
    """
    started = time.perf_counter()
    folder, output = Path(folder), Path(output)
    if not 0 < share <= 1:
        raise CommandError(f"--share {share}: a share of the table's rows", "above 0, and 1 at most")
    manifest, hash_rows = _memory(folder)
    settings = folder / "config.yaml"
    length = (Config.load(settings).train if settings.is_file() else TrainConfig()).sequence_length
    tokenizer = saved_tokenizer(folder)
    text = read_corpus(corpus or None)
    streams = [token_stream(texts, tokenizer, echo=echo) for texts in (text.train_texts, text.held_out_texts)]
    counted = [RowCounts(), RowCounts()]
    with ByteProgress("counting", sum(map(len, streams)), unit="tokens", echo=echo) as advance:
        for stream, counts in zip(streams, counted, strict=True):
            for token_ids_BT in _blocks(stream, length):
                counts.add(hash_rows(torch.from_numpy(token_ids_BT)).numpy())
                advance(token_ids_BT.size)
    train, held_out = counted
    ids_R, counts_R = train.hottest()
    row_bytes = row_dtype(manifest.dtype).row_bytes(manifest.width)
    sets = []
    for part in SHARES:
        hot_ids = ids_R[: math.ceil(part * manifest.rows)]
        sets.append(
            {
                "share": part,
                "rows": len(hot_ids),
                "bytes": len(hot_ids) * row_bytes,
                "serves": held_out.served_by(hot_ids),
            }
        )
    kept = math.ceil(share * manifest.rows)
    hot = HotRows(
        ids_R[:kept], counts_R[:kept], manifest.rows, identity(manifest), text.name, train.lookups, len(ids_R)
    )
    with new_folders(output.parent):
        save(hot, output)
    result = {
        "path": str(output),
        "rows": len(hot.row_ids),
        "table_rows": manifest.rows,
        "rows_met": len(ids_R),
        "corpus": text.name,
        "tokens": len(streams[0]),
        "held_out_tokens": len(streams[1]),
        "lookups": train.lookups,
        "held_out_lookups": held_out.lookups,
        "hot_sets": sets,
        "seconds": time.perf_counter() - started,
    }
    for line in _description(result):
        echo(line)
    return result


def _memory(folder: Path) -> tuple[Manifest, Callable[[torch.Tensor], torch.Tensor]]:
    """The table's manifest, and token ids [B, T] -> row ids of all memory layers, [layers, B, T, H]."""
    config_path = folder / MEMORY_FOLDER / CONFIG_FILE
    if not config_path.is_file():
        raise CommandError(f"{folder}: no model with memory there", "name a folder that `sense-engram train` wrote")
    config = EngramConfig.load(config_path)
    table, map_path = memory_paths(folder)
    shadow_map = EngramTokenizer(map_path)
    hashers = [
        NgramHasher.from_config(
            config,
            layer_id=layer_id,
            compressed_vocab_size=shadow_map.compressed_vocab_size,
            pad_id=compressed_pad_id(config, shadow_map, None),
        )
        for layer_id in config.layer_indices
    ]

    def hash_rows(token_ids_BT: torch.Tensor) -> torch.Tensor:
        compressed_BT = shadow_map(token_ids_BT)
        return torch.stack([hasher(compressed_BT) for hasher in hashers])

    return read_manifest(TableFiles(table).manifest), hash_rows


def _blocks(stream: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """The stream as training reads it, in sequences of `length`, several at a time; then what is left."""
    whole = len(stream) // length * length
    if whole:
        blocks = stream[:whole].reshape(-1, length).astype(np.int64)
        step = max(1, BATCH_TOKENS // length)
        yield from (blocks[at : at + step] for at in range(0, len(blocks), step))
    if whole < len(stream):
        yield stream[None, whole:].astype(np.int64)


def _description(result: dict[str, Any]) -> list[str]:
    met = result["rows_met"]
    lines = [
        f"corpus   {result['corpus']}: {wording.count(result['tokens'])} tokens, {wording.count(result['lookups'])} "
        f"lookups of {wording.count(met)} of {wording.count(result['table_rows'])} rows",
        f"rows     {result['path']}, the {wording.count(result['rows'])} hottest",
    ]
    for one in result["hot_sets"]:
        fewer = f" (all that were looked up: {wording.count(one['rows'])} rows)" if one["rows"] == met else ""
        lines.append(
            f"hottest  {wording.percent(one['share'])} of the table, {wording.size(one['bytes'])}: "
            f"{wording.percent(one['serves'])} of the lookups of {wording.count(result['held_out_tokens'])} held-out "
            f"tokens{fewer}"
        )
    return [*lines, f"seconds  {result['seconds']:.2f}"]
