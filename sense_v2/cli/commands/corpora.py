"""Commands that work through a whole corpus: tokenize, profile."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sense_v2.cli.options import (
    DEFAULT_TOKENIZER,
    CorpusOption,
    FolderArgument,
    JsonOption,
    ProcessesOption,
    RayOption,
    TextColumnOption,
    TokenizerOption,
    check_share,
)
from sense_v2.cli.output import lines_to, print_json, progress_to
from sense_v2.core.errors import CommandError
from sense_v2.report import wording

if TYPE_CHECKING:
    from sense_v2.hf.data.workers import Processes, RayCluster


def tokenize(
    corpus: Annotated[
        list[Path],
        typer.Option(metavar="PATH|NAME", help="Text, JSON lines or Parquet, repeatable; or a dataset of the hub."),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The new folder for the files.")],
    tokenizer: TokenizerOption = DEFAULT_TOKENIZER,
    text_column: TextColumnOption = "text",
    processes: ProcessesOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a corpus's token ids to Parquet files, which profile and a PackedStream read without the text.

    Example: sense-engram tokenize --corpus my_texts/ --tokenizer runs/train --output my_tokens/ --processes 8
    """
    from sense_v2.core.folders import new_folders
    from sense_v2.engram.pretrained_tokenizer import load_tokenizer
    from sense_v2.hf.backbones import saved_tokenizer, separator_id
    from sense_v2.hf.data.preparing import tokenize_corpus
    from sense_v2.hf.data.workers import source_of

    started = time.perf_counter()
    is_saved = Path(tokenizer).is_dir() and (Path(tokenizer) / "tokenizer.json").is_file()
    loaded = saved_tokenizer(Path(tokenizer)) if is_saved else load_tokenizer(tokenizer)[0]
    workers = _workers(1 if processes is None and ray is None else processes, ray)
    assert workers is not None
    with new_folders(output.parent):
        made = tokenize_corpus(
            source_of(corpus),
            loaded,
            output,
            workers=workers,
            separator_id=separator_id(loaded),
            text_column=text_column,
        )
    seconds = time.perf_counter() - started
    empty = f", {wording.count(made['empty_documents'])} empty ones skipped" if made["empty_documents"] else ""
    lines_to(as_json)(
        f"tokens   {output}: {wording.count(made['tokens'])} of {wording.count(made['documents'])} documents{empty}, "
        f"{wording.count(made['tokens'] / seconds)} a second"
    )
    if as_json:
        print_json({"path": str(output), **made, "seconds": seconds})


def profile(
    folder: FolderArgument,
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the hottest rows go.")] = Path(
        "hot_rows.npy"
    ),
    share: Annotated[
        float, typer.Option(metavar="NUMBER", help="How many of the table's rows to write, at most.")
    ] = 0.2,
    text_column: TextColumnOption = "text",
    processes: ProcessesOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count which rows a corpus looks up, write the hottest, and say how much of held-out text they serve.

    Example: sense-engram profile runs/train --corpus my_texts/ --output runs/train/hot_rows.npy
    """
    from sense_v2.hf.data.row_profile import write_hot_rows

    check_share(share)
    echo, workers = lines_to(as_json), _workers(processes, ray)
    result = write_hot_rows(
        folder,
        output,
        corpus=corpus,
        text_column=text_column,
        share=share,
        workers=workers,
        progress=progress_to(echo),
    )
    met = result["rows_met"]
    echo(
        f"corpus   {result['corpus']}: {wording.number_of(result['tokens'], 'token')}, "
        f"{wording.number_of(result['lookups'], 'lookup')} of {wording.count(met)} of "
        f"{wording.number_of(result['table_rows'], 'row')}",
        f"rows     {result['path']}, the {wording.count(result['rows'])} hottest",
    )
    for one in result["hot_sets"]:
        fewer = f" (all that were looked up: {wording.count(one['rows'])} rows)" if one["rows"] == met else ""
        echo(
            f"hottest  {wording.percent(one['share'])} of the table, {wording.size(one['bytes'])}: "
            f"{wording.percent(one['serves'])} of the lookups of {wording.count(result['held_out_tokens'])} held-out "
            f"tokens{fewer}"
        )
    echo(f"seconds  {result['seconds']:.2f}")
    if as_json:
        print_json(result)


def _workers(processes: int | None, ray: str | None) -> Processes | RayCluster | None:
    """Who works through a corpus; None where neither is given."""
    from sense_v2.hf.data.workers import Processes, RayCluster

    if processes is not None and ray is not None:
        raise CommandError("--processes and --ray both say who works", "give one of them")
    progress = sys.stderr.isatty()
    if ray is not None:
        return RayCluster(ray, progress=progress)
    return None if processes is None else Processes(processes, progress=progress)
