"""A model with memory and blocks of text -> all that the analysis report says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.upkeep.ngram_usage import number_ngrams, rows_of
from sense_v2.engram.upkeep.row_lengths import MAX_ROWS, measure_rows, num_measured
from sense_v2.hf.data.token_texts import Words
from sense_v2.hf.insight import analysis
from sense_v2.hf.insight.evaluation import Evaluation, count_text_bytes
from sense_v2.hf.insight.observation import observe
from sense_v2.hf.memory import memory_of


def analyze_memory(
    model: PreTrainedModel,
    tokenizer: Any,
    blocks_BT: torch.Tensor,
    counted: Sequence[np.ndarray],
    *,
    text_tokens: int,
    max_rows: int = MAX_ROWS,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Read a text with the memory and without it, and measure the table's rows.

    Args:
        model: With memory attached.
        tokenizer: The model's.
        blocks_BT: Token ids of the text that is analysed.
        counted: Token ids [B, T] of the text whose n-grams are counted; a part of another length each.
        text_tokens: This many tokens of the first block are shown coloured.
        max_rows: Of a larger table a sample is measured.
        progress: Is told how many tokens and rows are read.

    Returns:
        What JSON can hold: "tokens" and "table" to "rows" of `sense_v2.report.analysis`, and the losses.
    """
    memory = memory_of(model)
    with progress("reading the text", 2 * blocks_BT.numel(), unit="tokens") as advance:
        seen = observe(model, blocks_BT, advance=lambda num_blocks: advance(num_blocks * blocks_BT.shape[1]))
    manifest = memory.storage.manifest
    with progress("reading the table", num_measured(manifest, max_rows=max_rows), unit="rows") as advance:
        lengths = measure_rows(memory.storage.path, manifest, max_rows=max_rows, advance=advance)
    fusions = list(memory)
    layers = [fusion.layer_id for fusion in fusions]
    hasher = fusions[0].hasher
    layout = hasher.layout
    compressed = [memory.tokenizer(torch.from_numpy(part)).numpy() for part in counted]
    ngrams = number_ngrams(compressed, [seen.compressed_ids_BT], layout.ngram_orders, pad_id=hasher.pad_id)
    rows_LO = [[rows_of(own, fusion.hasher) for own in ngrams] for fusion in fusions]
    ids_R, counted_R, analysed_R = analysis.row_counts(ngrams, rows_LO)
    words = Words(tokenizer)
    text_bytes = count_text_bytes(blocks_BT[:, 1:], tokenizer)
    losses = {
        name: Evaluation(float(losses_BT.mean()), losses_BT.size, text_bytes)
        for name, losses_BT in (("with", seen.losses_with_BT), ("without", seen.losses_without_BT))
    }
    return {
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
        "scattered": analysis.scattered(seen),
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
    }
