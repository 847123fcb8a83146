"""`sense-engram analyze`: what a trained memory does, token by token and row by row: an HTML report and its JSON.

The text that is analysed is the part of the corpus that training holds out. Counts of n-grams are of the part that
training reads, so that "seen once" means once in training, where it is the corpus that the model was trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.cli.pages import report_paths, write_json
from sense_v2.cli.progress import ByteProgress, characters
from sense_v2.engram.upkeep.ngram_usage import Ngrams, number_ngrams, rows_of
from sense_v2.engram.upkeep.row_lengths import MAX_ROWS, measure_rows, num_measured
from sense_v2.hf.backbones import open_with_memory, token_stream
from sense_v2.hf.data.held_out import Blocks, read_blocks, settings_of
from sense_v2.hf.data.token_texts import Words
from sense_v2.hf.insight import analysis
from sense_v2.hf.insight.evaluation import Evaluation, count_text_bytes
from sense_v2.hf.insight.observation import Observation, observe
from sense_v2.hf.memory import EngramMemory

MAX_COUNTED_TOKENS = 1 << 22
"""Of the text that is counted; more takes memory for its distinct n-grams, and changes little."""
TEXT_TOKENS = 320


def run_analyze(
    folder: str | Path,
    output: str | Path,
    *,
    corpus: Sequence[str | Path] | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    all_files: bool = False,
    text_column: str = "text",
    text_tokens: int = TEXT_TOKENS,
    max_rows: int = MAX_ROWS,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Writes the report to `output` and its JSON beside it; returns what the JSON holds (see
    `sense_v2.report.analysis`). Nothing in `folder` changes.

    `text_tokens` of the first sequence are shown coloured; of a larger table than `max_rows` a sample is measured.
    Raises `CommandError`, and what loading the model and reading the corpus and the table raise.
    """
    from sense_v2.report import analysis as report

    started = time.perf_counter()
    folder = Path(folder)
    html_path, json_path = report_paths(output)
    model, tokenizer, memory = open_with_memory(folder, "look into")
    blocks = read_blocks(
        folder,
        model,
        tokenizer,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        text_column=text_column,
        counting=characters(echo),
    )
    blocks_BT = blocks.token_ids_BT
    echo(f"model   {folder}")
    echo(f"corpus  {blocks.line()}, with memory and without")
    with ByteProgress("reading the text", 2 * blocks_BT.numel(), unit="tokens", echo=echo) as progress:
        seen = observe(model, blocks_BT, advance=lambda num_blocks: progress(num_blocks * blocks_BT.shape[1]))
    counted, stream_tokens = _counted(blocks, tokenizer, settings_of(folder).sequence_length, echo)
    manifest = memory.storage.manifest
    with ByteProgress(
        "reading the table", num_measured(manifest, max_rows=max_rows), unit="rows", echo=echo
    ) as progress:
        lengths = measure_rows(memory.storage.path, manifest, max_rows=max_rows, advance=progress)

    fusions = list(memory)
    layers = [fusion.layer_id for fusion in fusions]
    layout = fusions[0].hasher.layout
    ngrams = _ngrams(memory, seen, counted)
    rows_LO = [[rows_of(own, fusion.hasher) for own in ngrams] for fusion in fusions]
    ids_R, counted_R, analysed_R = analysis.row_counts(ngrams, rows_LO)
    words = Words(tokenizer)
    text_bytes = count_text_bytes(blocks_BT[:, 1:], tokenizer)
    losses = {
        name: Evaluation(float(losses_BT.mean()), losses_BT.size, text_bytes)
        for name, losses_BT in (("with", seen.losses_with_BT), ("without", seen.losses_without_BT))
    }
    results = {
        "model": str(folder),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "corpus": blocks.description(),
        "counted": {
            "held_out": blocks.is_held_out,
            "tokens": sum(part.size for part in counted),
            "of_tokens": stream_tokens,
        },
        "sequences": len(blocks_BT),
        "sequence_length": blocks_BT.shape[1],
        "tokens": losses["with"].tokens,
        **{
            measure: {name: getattr(one, measure) for name, one in losses.items()}
            for measure in ("loss", "perplexity", "bits_per_byte")
        },
        "table": {
            "rows": manifest.rows,
            "width": manifest.width,
            "dtype": manifest.dtype,
            "bytes": manifest.table_bytes,
            "heads": len(layers) * len(ngrams) * layout.num_heads,
        },
        "gain": analysis.gain_spread(seen),
        "gates": analysis.gates(seen, layers),
        "classes": analysis.token_classes(seen, words),
        "text": analysis.coloured_text(seen, ngrams, rows_LO, layers, words, num_tokens=text_tokens),
        "leaned_on": analysis.leaned_on(seen, ngrams, layers, words),
        "helped": analysis.extreme_tokens(seen, ngrams, words),
        "harmed": analysis.extreme_tokens(seen, ngrams, words, harm=True),
        "by_frequency": analysis.by_frequency(seen, ngrams),
        "heads": analysis.heads(ngrams, rows_LO, layout, lengths),
        "zipf": analysis.zipf(ngrams),
        "hot_sets": analysis.hot_sets(counted_R, analysed_R, manifest.rows),
        "rows": analysis.rows(lengths, layout, ids_R, counted_R),
        "seconds": time.perf_counter() - started,
    }
    report.write_report(results, html_path)
    write_json(results, json_path)
    for line in report.lines(results):
        echo(line)
    echo(f"report  {html_path}, its numbers in {json_path}")
    return results


def _counted(
    blocks: Blocks, tokenizer: Any, length: int, echo: Callable[[str], Any]
) -> tuple[list[np.ndarray[Any, Any]], int]:
    """Token ids of the counted text in blocks [B, T] as training reads it, and how many tokens it has in all."""
    texts = blocks.corpus.train_texts
    if not blocks.is_held_out:
        texts = [*texts, *blocks.corpus.held_out_texts]
    stream = token_stream(texts, tokenizer, characters(echo))
    taken = stream[:MAX_COUNTED_TOKENS].astype(np.int64)
    whole = len(taken) // length * length
    parts = [taken[:whole].reshape(-1, length), taken[None, whole:]]
    return [part for part in parts if part.size], len(stream)


def _ngrams(memory: EngramMemory, seen: Observation, counted: list[np.ndarray[Any, Any]]) -> list[Ngrams]:
    hasher = next(iter(memory)).hasher
    compressed = [memory.tokenizer(torch.from_numpy(part)).numpy() for part in counted]
    return number_ngrams(compressed, [seen.compressed_ids_BT], hasher.layout.ngram_orders, pad_id=hasher.pad_id)
