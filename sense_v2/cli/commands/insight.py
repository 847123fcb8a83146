"""Commands that look into a trained memory and write a report: analyze, ablate."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sense_v2.cli.options import (
    AllFilesOption,
    DeviceOption,
    DtypeOption,
    FolderArgument,
    JsonOption,
    MeasuredCorpusOption,
    SequenceLengthOption,
    SequencesOption,
    TextColumnOption,
)
from sense_v2.cli.output import (
    LOADING,
    lines_to,
    print_json,
    progress_to,
    report_paths,
    require_plots,
    spell_out,
    write_json,
)

if TYPE_CHECKING:
    from sense_v2.hf.data.held_out import Blocks

MAX_COUNTED_TOKENS = 1 << 22
"""Of the text that is counted; more takes memory for its distinct n-grams, and changes little."""


def analyze(
    folder: FolderArgument,
    corpus: MeasuredCorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The report; its JSON goes beside it.")] = Path(
        "analysis.html"
    ),
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    text_column: TextColumnOption = "text",
    text_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of the first sequence to show coloured.")
    ] = 320,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show what the memory does: gates over the text, n-grams it leans on, where it helps, how its rows are used.

    Example: sense-engram analyze runs/train --corpus my_texts/ --output analysis.html
    """
    import numpy as np

    from sense_v2.hf.backbones import open_with_memory, token_stream
    from sense_v2.hf.data.held_out import read_blocks, settings_of
    from sense_v2.hf.insight.memory_analysis import analyze_memory
    from sense_v2.report import analysis as report

    started, echo = time.perf_counter(), lines_to(as_json)
    report_paths(output)
    require_plots()
    LOADING.say(f"loading {folder}")
    model, tokenizer, _ = open_with_memory(folder, "look into", device=device, dtype=dtype)
    blocks = read_blocks(
        folder,
        model,
        tokenizer,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        text_column=text_column,
        progress=progress_to(echo),
    )
    echo(f"model   {folder}", f"corpus  {blocks.line()}, with memory and without")
    # As training reads it, so that "seen once" means once in training where it is the model's own corpus.
    texts = blocks.corpus.train_texts
    if not blocks.is_held_out:
        texts = [*texts, *blocks.corpus.held_out_texts]
    stream = token_stream(texts, tokenizer, progress_to(echo))
    taken = stream[:MAX_COUNTED_TOKENS].astype(np.int64)
    length = settings_of(folder).sequence_length
    whole = len(taken) // length * length
    parts = [part for part in (taken[:whole].reshape(-1, length), taken[None, whole:]) if part.size]
    found = analyze_memory(
        model, tokenizer, blocks.token_ids_BT, parts, text_tokens=text_tokens, progress=progress_to(echo)
    )
    counted = {"held_out": blocks.is_held_out, "tokens": len(taken), "of_tokens": len(stream)}
    results = _results(folder, blocks, started, {"counted": counted, **found})
    _write_report(report, results, report.lines(results), output, echo)
    if as_json:
        print_json(results)


def ablate(
    folder: FolderArgument,
    corpus: MeasuredCorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The report; its JSON goes beside it.")] = Path(
        "ablation.html"
    ),
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    text_column: TextColumnOption = "text",
    no_heads: Annotated[bool, typer.Option("--no-heads", help="Leave out single heads, which take longest.")] = False,
    resamples: Annotated[
        int, typer.Option(metavar="N", min=100, help="Resamples of the sequences, for the intervals.")
    ] = 10_000,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the shuffling, the noise and the resamples.")
    ] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say whether the memory helps, and where: the loss with one part of it changed at a time.

    Example: sense-engram ablate runs/train --corpus my_texts/ --output ablation.html
    """
    from sense_v2.hf.backbones import open_with_memory
    from sense_v2.hf.data.held_out import read_blocks
    from sense_v2.hf.insight import ablation
    from sense_v2.hf.insight.evaluation import Evaluation, count_text_bytes
    from sense_v2.report import ablation as report

    started, echo = time.perf_counter(), lines_to(as_json)
    report_paths(output)
    LOADING.say(f"loading {folder}")
    model, tokenizer, memory = open_with_memory(folder, "take off", device=device, dtype=dtype)
    blocks = read_blocks(
        folder,
        model,
        tokenizer,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        text_column=text_column,
        progress=progress_to(echo),
    )
    blocks_BT = blocks.token_ids_BT
    passes = ablation.num_passes(memory, single_heads=not no_heads)
    echo(f"model   {folder}", f"corpus  {blocks.line()}, {passes} times")
    with progress_to(echo)("ablating", passes * blocks_BT.numel(), unit="tokens") as advance:
        found = ablation.ablate(
            model,
            blocks_BT,
            seed=seed,
            resamples=resamples,
            single_heads=not no_heads,
            advance=lambda num_blocks: advance(num_blocks * blocks_BT.shape[1]),
        )
    whole = Evaluation(found["loss"], found["tokens"], count_text_bytes(blocks_BT[:, 1:], tokenizer))
    measured = {"perplexity": whole.perplexity, "bits_per_byte": whole.bits_per_byte, **found}
    results = _results(folder, blocks, started, measured)
    _write_report(report, results, report.terminal_table(results).splitlines(), output, echo)
    if as_json:
        print_json(results)


def _results(folder: Path, blocks: Blocks, started: float, measured: dict[str, Any]) -> dict[str, Any]:
    from sense_v2.hf.data.held_out import settings_of

    return {
        "model": spell_out(str(folder)),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "corpus": blocks.description(),
        "trained_alone": not settings_of(folder).trains_beside_memory,
        "sequences": len(blocks.token_ids_BT),
        "sequence_length": blocks.token_ids_BT.shape[1],
        **measured,
        "seconds": time.perf_counter() - started,
    }


def _write_report(
    report: ModuleType, results: dict[str, Any], lines: list[str], output: Path, echo: Callable[..., Any]
) -> None:
    html_path, json_path = report_paths(output)
    report.write_report(results, html_path)
    write_json(results, json_path)
    echo(*lines, f"report  {html_path}, its numbers in {json_path}")
