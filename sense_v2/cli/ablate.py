"""`sense-engram ablate`: did the memory help, and where? A trained model with one part of its memory changed at a
time, on text that training holds out: a table, sentences, an HTML report and its JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sense_v2.cli.pages import report_paths, write_json
from sense_v2.cli.progress import ByteProgress, characters
from sense_v2.hf.backbones import open_with_memory
from sense_v2.hf.data.held_out import read_blocks
from sense_v2.hf.insight.ablation import ablate, num_passes
from sense_v2.hf.insight.evaluation import Evaluation, count_text_bytes


def run_ablate(
    folder: str | Path,
    output: str | Path,
    *,
    corpus: Sequence[str | Path] | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    all_files: bool = False,
    text_column: str = "text",
    single_heads: bool = True,
    resamples: int = 10_000,
    seed: int = 0,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Writes the report to `output` and its JSON beside it; returns what the JSON holds (see
    `sense_v2.report.ablation`). Nothing in `folder` changes.

    Raises `CommandError`, and what loading the model and reading the corpus raise.
    """
    from sense_v2.report import ablation as report

    started = time.perf_counter()
    folder = Path(folder)
    html_path, json_path = report_paths(output)
    model, tokenizer, memory = open_with_memory(folder, "take off")
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
    passes = num_passes(memory, single_heads=single_heads)
    echo(f"model   {folder}")
    echo(f"corpus  {blocks.line()}, {passes} times")
    with ByteProgress("ablating", passes * blocks_BT.numel(), unit="tokens", echo=echo) as progress:
        found = ablate(
            model,
            blocks_BT,
            seed=seed,
            resamples=resamples,
            single_heads=single_heads,
            advance=lambda num_blocks: progress(num_blocks * blocks_BT.shape[1]),
        )
    whole = Evaluation(found["loss"], found["tokens"], count_text_bytes(blocks_BT[:, 1:], tokenizer))
    results = {
        "model": str(folder),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "corpus": blocks.description(),
        "sequences": len(blocks_BT),
        "sequence_length": blocks_BT.shape[1],
        "perplexity": whole.perplexity,
        "bits_per_byte": whole.bits_per_byte,
        **found,
        "seconds": time.perf_counter() - started,
    }
    report.write_report(results, html_path)
    write_json(results, json_path)
    for line in report.terminal_table(results).splitlines():
        echo(line)
    echo(f"report  {html_path}, its numbers in {json_path}")
    return results
