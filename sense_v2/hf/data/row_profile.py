"""The rows that a corpus looks up most, and how much of other text they serve.

Rows are counted over the part of the corpus that training reads, and judged by the part that it holds out: what a hot
set serves of text that it was chosen by says little. Hashes only; no row is read, and no model is loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import CommandError
from sense_v2.core.folders import new_folders
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.upkeep.hot_rows import HotRows, RowCounts, identity, save
from sense_v2.hf.backbones import saved_tokenizer, separator_id, token_stream
from sense_v2.hf.data.corpus import read_corpus, standard_library
from sense_v2.hf.data.held_out import settings_of
from sense_v2.hf.data.preparing import memory_hashers, profile_rows, read_memory
from sense_v2.hf.data.workers import Processes, RayCluster, source_of

SHARES = (0.01, 0.05, 0.2)
"""Of the table's rows: the hot sets that are judged."""
BATCH_TOKENS = 1 << 14


def write_hot_rows(
    folder: str | Path,
    output: str | Path,
    *,
    corpus: Sequence[str | Path] | None = None,
    text_column: str = "text",
    share: float = max(SHARES),
    workers: Processes | RayCluster | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Count which rows a corpus looks up, and write the hottest.

    Args:
        folder: A model with memory.
        output: The file of hot rows, NAME.npy.
        corpus: Files or folders; by default the Python standard library's source.
        text_column: Where documents have their text.
        share: At most this share of the table's rows is written, as far as they were looked up.
        workers: Count a document at a time, and hold out a tenth of the documents. Without them, the corpus is read
            as training reads it, in sequences that go on into the next text.
        progress: Is told how many characters are tokenised, and how many tokens are counted.

    Returns:
        What JSON can hold: "path", "rows", "table_rows", "rows_met", "corpus", "tokens", "held_out_tokens",
        "lookups", "held_out_lookups", "seconds", and "hot_sets": how much those of `SHARES` serve.

    Raises:
        CommandError: No token of the corpus is looked up.
        FileNotFoundError: The folder has no memory.
    """
    started = time.perf_counter()
    folder, output = Path(folder), Path(output)
    config, _, manifest = read_memory(folder)
    if workers is None:
        name, train, held_out = _count_as_trained(folder, corpus, text_column, progress)
    else:
        name, train, held_out = _count_by_workers(folder, corpus, text_column, workers)
    # A token looks up one row for each of these.
    per_token = len(config.layer_indices) * len(config.ngram_orders) * config.num_heads
    ids_R, counts_R = train.hottest()
    row_bytes = row_dtype(manifest.dtype).row_bytes(manifest.width)
    sets = []
    for part in SHARES:
        hot_ids = ids_R[: math.ceil(part * manifest.rows)]
        served = held_out.served_by(hot_ids)
        sets.append({"share": part, "rows": len(hot_ids), "bytes": len(hot_ids) * row_bytes, "serves": served})
    kept = math.ceil(share * manifest.rows)
    hot = HotRows(ids_R[:kept], counts_R[:kept], manifest.rows, identity(manifest), name, train.lookups, len(ids_R))
    with new_folders(output.parent):
        save(hot, output)
    return {
        "path": str(output),
        "rows": len(hot.row_ids),
        "table_rows": manifest.rows,
        "rows_met": len(ids_R),
        "corpus": name,
        "tokens": train.lookups // per_token,
        "held_out_tokens": held_out.lookups // per_token,
        "lookups": train.lookups,
        "held_out_lookups": held_out.lookups,
        "hot_sets": sets,
        "seconds": time.perf_counter() - started,
    }


def _count_as_trained(
    folder: Path,
    corpus: Sequence[str | Path] | None,
    text_column: str,
    progress: Progress,
) -> tuple[str, RowCounts, RowCounts]:
    """In this process; whole files are held out, as in training."""
    config, shadow_map, _ = read_memory(folder)
    hashers = memory_hashers(config, shadow_map)
    length = settings_of(folder).sequence_length
    text = read_corpus(corpus or None, text_column=text_column)
    tokenizer = saved_tokenizer(folder)
    streams = [token_stream(texts, tokenizer, progress) for texts in (text.train_texts, text.held_out_texts)]
    counted = RowCounts(), RowCounts()
    with progress("counting", sum(map(len, streams)), unit="tokens") as advance:
        for stream, counts in zip(streams, counted, strict=True):
            for token_ids_BT in _blocks(stream, length):
                compressed_BT = shadow_map(torch.from_numpy(token_ids_BT))
                for hasher in hashers:
                    counts.add(hasher(compressed_BT).numpy())
                advance(token_ids_BT.size)
    return text.name, *counted


def _count_by_workers(
    folder: Path,
    corpus: Sequence[str | Path] | None,
    text_column: str,
    workers: Processes | RayCluster,
) -> tuple[str, RowCounts, RowCounts]:
    """By many workers; documents are held out."""
    source = source_of(corpus) if corpus else standard_library()
    tokenizer = saved_tokenizer(folder)
    found = profile_rows(
        source, folder, tokenizer, workers=workers, separator_id=separator_id(tokenizer), text_column=text_column
    )
    if not found.trained.lookups:
        raise CommandError(f"{source}: no token of it is looked up", "name files with more text")
    name = ", ".join(Path(path).name for path in corpus) if corpus else "Python standard library"
    return name, found.trained, found.held_out


def _blocks(stream: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """The stream as training reads it, in sequences of `length`, several at a time; then what is left."""
    whole = len(stream) // length * length
    if whole:
        blocks = stream[:whole].reshape(-1, length).astype(np.int64)
        step = max(1, BATCH_TOKENS // length)
        yield from (blocks[at : at + step] for at in range(0, len(blocks), step))
    if whole < len(stream):
        yield stream[None, whole:].astype(np.int64)
