"""`sense-engram`: the commands, each in a file of its own; this one names them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Conditional memory for Hugging Face language models, in memory-mapped files.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps sub-commands named even while there is only one."""


@app.command()
def demo(
    corpus: Annotated[
        Path | None, typer.Option(help="A file or folder of text; the standard library's source.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where report, numbers and model go.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Leave the two controls out.")] = False,
) -> None:
    """Train a small model without and with memory, and write the report that compares them."""
    from sense_v2.cli.demo import run_demo

    run_demo(corpus, output, quick=quick)


if __name__ == "__main__":
    app()
