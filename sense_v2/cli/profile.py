"""`sense-engram profile`: the rows of a model's table that a corpus looks up most, and what they serve of other text.

Rows are counted over the part of the corpus that training reads, and judged by the part that it holds out: what a hot
set serves of text that it was chosen by says little. Hashes only; no row is read, and no model is loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.cli.progress import ByteProgress, characters
from sense_v2.cli.tokenize import source_of
from sense_v2.cli.workers import chosen_workers
from sense_v2.core.config import Config, TrainConfig
from sense_v2.core.errors import CommandError
from sense_v2.core.folders import new_folders
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.upkeep.hot_rows import HotRows, RowCounts, identity, save
from sense_v2.hf.backbones import saved_tokenizer, separator_id, token_stream
from sense_v2.hf.data.corpus import read_corpus, standard_library
from sense_v2.hf.data.preparing import memory_hashers, profile_rows, read_memory
from sense_v2.hf.data.workers import Processes, RayCluster
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
    processes: int | None = None,
    ray: str | None = None,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Counts, and writes the hottest `share` of the table's rows (as far as they were looked up) to `output`;
    returns one dictionary that JSON can hold.

    With `processes` or `ray` (a cluster's address) that many workers count, a document at a time, and a tenth of the
    documents is held out; else the corpus is read as training reads it, in sequences that go on into the next text.

    Raises `CommandError`, and what reading the model's memory and the corpus raise.
    """
    started = time.perf_counter()
    folder, output = Path(folder), Path(output)
    if not 0 < share <= 1:
        raise CommandError(f"--share {share}: a share of the table's rows", "above 0, and 1 at most")
    try:
        _, _, manifest = read_memory(folder)
    except FileNotFoundError:
        raise CommandError(
            f"{folder}: no model with memory there", "name a folder that `sense-engram train` wrote"
        ) from None
    if processes is None and ray is None:
        counted = _count_as_trained(folder, corpus, echo)
    else:
        counted = _count_by_workers(folder, corpus, chosen_workers(processes, ray))
    train, held_out = counted.train, counted.held_out
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
        ids_R[:kept], counts_R[:kept], manifest.rows, identity(manifest), counted.corpus, train.lookups, len(ids_R)
    )
    with new_folders(output.parent):
        save(hot, output)
    result = {
        "path": str(output),
        "rows": len(hot.row_ids),
        "table_rows": manifest.rows,
        "rows_met": len(ids_R),
        "corpus": counted.corpus,
        "tokens": counted.tokens,
        "held_out_tokens": counted.held_out_tokens,
        "lookups": train.lookups,
        "held_out_lookups": held_out.lookups,
        "hot_sets": sets,
        "seconds": time.perf_counter() - started,
    }
    for line in _description(result):
        echo(line)
    return result


@dataclass
class Counted:
    corpus: str
    tokens: int
    train: RowCounts
    held_out_tokens: int
    held_out: RowCounts


def _count_as_trained(folder: Path, corpus: Sequence[str | Path] | None, echo: Callable[[str], Any]) -> Counted:
    """In this process; whole files are held out, as in training."""
    config, shadow_map, _ = read_memory(folder)
    hashers = memory_hashers(config, shadow_map)
    settings = folder / "config.yaml"
    length = (Config.load(settings).train if settings.is_file() else TrainConfig()).sequence_length
    tokenizer = saved_tokenizer(folder)
    text = read_corpus(corpus or None)
    streams = [token_stream(texts, tokenizer, characters(echo)) for texts in (text.train_texts, text.held_out_texts)]
    counted = [RowCounts(), RowCounts()]
    with ByteProgress("counting", sum(map(len, streams)), unit="tokens", echo=echo) as advance:
        for stream, counts in zip(streams, counted, strict=True):
            for token_ids_BT in _blocks(stream, length):
                compressed_BT = shadow_map(torch.from_numpy(token_ids_BT))
                for hasher in hashers:
                    counts.add(hasher(compressed_BT).numpy())
                advance(token_ids_BT.size)
    return Counted(text.name, len(streams[0]), counted[0], len(streams[1]), counted[1])


def _count_by_workers(folder: Path, corpus: Sequence[str | Path] | None, workers: Processes | RayCluster) -> Counted:
    """By many workers; documents are held out."""
    tokenizer = saved_tokenizer(folder)
    source = source_of(corpus) if corpus else standard_library()
    found = profile_rows(source, folder, tokenizer, workers=workers, separator_id=separator_id(tokenizer))
    if not found.trained.lookups:
        raise CommandError(f"{source}: no token of it is looked up", "name files with more text")
    config, _, _ = read_memory(folder)
    per_token = len(config.layer_indices) * len(config.ngram_orders) * config.num_heads
    name = ", ".join(Path(path).name for path in corpus) if corpus else "Python standard library"
    trained, held_out = found.trained, found.held_out
    return Counted(name, trained.lookups // per_token, trained, held_out.lookups // per_token, held_out)


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
