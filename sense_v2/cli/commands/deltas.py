"""Commands for rows that were changed in a table, as small files: delta teach, export, apply, revert, merge, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sense_v2.cli.options import FolderArgument, JsonOption, one_of, table_path_of
from sense_v2.cli.output import lines_to, print_json

PREFERENCES = ("first", "last", "mean")

OutputOption = Annotated[Path, typer.Option(metavar="FILE", help="The new delta, NAME.safetensors.")]
TableArgument = Annotated[
    Path, typer.Argument(callback=table_path_of, help="A table, or the folder of a model with memory.")
]


def teach(
    folder: FolderArgument,
    text: Annotated[str, typer.Argument(help="What the model is to say; mind the space that it begins with.")],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The delta, NAME.safetensors; one that is there learns it as well.")
    ],
    prompt: Annotated[str, typer.Option(help="After what.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    lr: Annotated[float | None, typer.Option(help="How far a row moves in a step.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a model a short text, in the rows of its n-grams alone; they go to a small file, the model stays.

    Example: sense-engram delta teach runs/demo/model " Lutz." --prompt "The capital is" --output facts.safetensors
    """
    from sense_v2.cli.teach import run_teach

    result = run_teach(folder, text, output, prompt=prompt, steps=steps, lr=lr, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def export(
    source: Annotated[
        Path,
        typer.Argument(help="A trained table or model; or an overlay's file, to leave its optimizer states out."),
    ],
    output: OutputOption,
    base: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The table, or the model's folder, it was trained from.")
    ] = None,
    rows_only: Annotated[
        bool, typer.Option("--rows-only", help="Also where the fusion layers were trained, which no delta holds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the rows that were changed in a table to a small file, which names the table they were changed in.

    Example: sense-engram delta export runs/taught --base runs/demo/model --output facts.safetensors
    """
    from sense_v2.cli.delta import run_export

    result = run_export(source, output, base=base, rows_only=rows_only, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def apply(
    delta: Annotated[Path, typer.Argument(help="What export, or an overlay, has written.")],
    table: TableArgument,
    as_json: JsonOption = False,
) -> None:
    """Put a delta's rows into the table they were changed in, in place, and keep beside it what they replace.

    Example: sense-engram delta apply facts.safetensors runs/demo/model
    """
    from sense_v2.cli.delta import run_apply

    result = run_apply(delta, table, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def revert(table: TableArgument, as_json: JsonOption = False) -> None:
    """Take the delta that was applied last out of a table again: its rows are what they were, bit for bit.

    Example: sense-engram delta revert runs/demo/model
    """
    from sense_v2.cli.delta import run_revert

    result = run_revert(table, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def merge(
    deltas: Annotated[list[Path], typer.Argument(help="Two or more deltas of one table.")],
    output: OutputOption,
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(PREFERENCES),
            help="Whose row is taken where several changed one to different values; refused without it.",
            autocompletion=one_of(*PREFERENCES),
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make one delta of several of the same table.

    Example: sense-engram delta merge facts.safetensors names.safetensors --output both.safetensors
    """
    from sense_v2.cli.delta import run_merge

    if prefer is not None and prefer not in PREFERENCES:
        raise typer.BadParameter(f"{prefer!r}: {', '.join(PREFERENCES)}", param_hint="--prefer")
    result = run_merge(deltas, output, prefer=prefer, echo=lines_to(as_json))
    if as_json:
        print_json(result)


def show(
    delta: Annotated[Path, typer.Argument(help="What export, merge, or an overlay has written.")],
    base: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A table, or a model's folder: is it the delta's base?")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all rows of the base, rather than believe its manifest.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is in a delta, and check it: rows, layers, bytes, which table it is of.

    Example: sense-engram delta show facts.safetensors --base runs/demo/model
    """
    from sense_v2.cli.delta import run_show

    result = run_show(delta, base=base, verify=verify, echo=lines_to(as_json))
    if as_json:
        print_json(result)
