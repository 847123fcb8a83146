"""Commands that look into a trained memory: analyze, ablate, play."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sense_v2.cli.options import (
    AllFilesOption,
    CorpusOption,
    FolderArgument,
    JsonOption,
    SequenceLengthOption,
    SequencesOption,
    TextColumnOption,
)
from sense_v2.cli.output import lines_to, print_json


def analyze(
    folder: FolderArgument,
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The report; its JSON goes beside it.")] = Path(
        "analysis.html"
    ),
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    text_column: TextColumnOption = "text",
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the first sequence to show coloured.")] = 320,
    as_json: JsonOption = False,
) -> None:
    """Show what the memory does: gates over the text, n-grams it leans on, where it helps, how its rows are used.

    Example: sense-engram analyze runs/train --corpus my_texts/ --output analysis.html
    """
    from sense_v2.cli.analyze import run_analyze

    result = run_analyze(
        folder,
        output,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        text_column=text_column,
        text_tokens=text_tokens,
        echo=lines_to(as_json),
    )
    if as_json:
        print_json(result)


def ablate(
    folder: FolderArgument,
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The report; its JSON goes beside it.")] = Path(
        "ablation.html"
    ),
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    text_column: TextColumnOption = "text",
    no_heads: Annotated[bool, typer.Option("--no-heads", help="Leave out single heads, which take longest.")] = False,
    resamples: Annotated[int, typer.Option(min=100, help="Of the sequences, for the intervals.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffling, the noise and the resamples.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Say whether the memory helps, and where: the loss with one part of it changed at a time.

    Example: sense-engram ablate runs/train --corpus my_texts/ --output ablation.html
    """
    from sense_v2.cli.ablate import run_ablate

    result = run_ablate(
        folder,
        output,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        text_column=text_column,
        single_heads=not no_heads,
        resamples=resamples,
        seed=seed,
        echo=lines_to(as_json),
    )
    if as_json:
        print_json(result)


def play(
    folder: FolderArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 7860,
    save_to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where what you teach the model goes, if you save it.")
    ] = Path("deltas"),
    as_json: JsonOption = False,
) -> None:
    """Open a page on this machine that shows what a model's memory does, and lets you teach it something.

    Example: sense-engram play runs/demo/model
    """
    from sense_v2.cli.play import run_play

    tell = print_json if as_json else None
    run_play(folder, port=port, save_to=save_to, tell=tell, echo=lines_to(as_json))
