"""The command convert: a table with rows of another type, in a released layout, or of another tokenizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sense_v2.cli.options import (
    CheckedTokenizerOption,
    ConvertedDtypeOption,
    JsonOption,
    LayoutOption,
    TextColumnOption,
    table_or_model_path,
    table_path,
)
from sense_v2.cli.output import lines_to, print_json, progress_to
from sense_v2.core.config import COMPACT_DTYPES, ROW_DTYPES
from sense_v2.core.errors import CommandError
from sense_v2.report import wording

if TYPE_CHECKING:
    from sense_v2.engram.released.importing import Imported

DTYPES = (*ROW_DTYPES, *COMPACT_DTYPES)


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A table, the folder of a model with memory, a released checkpoint, or a GGUF file."),
    ],
    output: Annotated[
        Path, typer.Option(metavar="PATH", help="The new table, the new model's folder, or the new checkpoint's.")
    ],
    dtype: ConvertedDtypeOption = None,
    to: LayoutOption = None,
    layer: Annotated[
        int | None, typer.Option(metavar="N", help="Of a checkpoint: this layer's table, counted from 0.")
    ] = None,
    tokenizer: CheckedTokenizerOption = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Of a model: measure the loss on this, before and after; with --tokenizer, the text whose n-grams "
            "are carried over. Repeatable.",
        ),
    ] = None,
    text_column: TextColumnOption = "text",
    as_json: JsonOption = False,
) -> None:
    """Make a table with rows of another type, of a released layout, or for another tokenizer, and say what it costs.

    Between our tables and the layouts of DeepSeek-V4.1 and Qwen PLE, and GGUF files of these, both ways. Ended
    early, the same command goes on. With --tokenizer, rows of a model's table follow the n-grams of --corpus that
    both tokenizers cut alike.

    Example: sense-engram convert runs/train --dtype int8 --output runs/train-int8 --corpus my_texts/
    """
    from sense_v2.hf.saving.released_form import is_checkpoint

    echo = lines_to(as_json)
    if to is not None:
        _refuse_options("--to", {"--layer": layer, "--tokenizer": tokenizer, "--corpus": corpus})
        is_folder = source.is_dir() or not source.exists()
        export = _export_gguf if to == "gguf" else partial(_export, variant=to)
        result = export(source if is_folder else table_path(source), output, dtype=dtype, echo=echo)
    elif is_checkpoint(source):
        _refuse_options("a released checkpoint", {"--corpus": corpus})
        result = _import(source, output, dtype, layer, tokenizer, echo)
    elif tokenizer is not None:
        _refuse_options("a table of ours", {"--layer": layer})
        result = _change_tokenizer(source, output, tokenizer, dtype, corpus, text_column, echo)
    else:
        _refuse_options("a table of ours", {"--layer": layer})
        source = table_or_model_path(source)
        if dtype is None:
            raise typer.BadParameter("a table of ours needs one, or --to a released layout", param_hint="--dtype")
        result = _convert(source, output, dtype, corpus, text_column, echo)
    if as_json:
        print_json(result)


def _refuse_options(what: str, given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"doesn't go with {what}", param_hint=name)


def _refuse_dtype(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise CommandError(f"--dtype {dtype}: no type of rows", f"one of {', '.join(DTYPES)}")


# To another type of rows


def _convert(
    source: Path, output: Path, dtype: str, corpus: list[Path] | None, text_column: str, echo: Callable[..., Any]
) -> dict[str, Any]:
    from sense_v2.engram.table.format import row_dtype
    from sense_v2.engram.table.opening import TableFiles, read_manifest
    from sense_v2.engram.upkeep.convert import convert_table
    from sense_v2.hf.saving.convert_model import convert_trained
    from sense_v2.hf.saving.folder import MEMORY_FOLDER, TABLE_FILE

    started = time.perf_counter()
    is_model = (source / MEMORY_FOLDER).is_dir()
    table = source / MEMORY_FOLDER / TABLE_FILE if is_model else source
    _refuse_dtype(dtype)
    if corpus and not is_model:
        raise CommandError(
            f"--corpus measures the loss of a model, and {source} is a table", "name the folder of the model"
        )
    manifest = read_manifest(TableFiles(table).manifest)
    if manifest.dtype == dtype:
        raise CommandError(f"{table} has rows of {dtype} already", "choose another --dtype")
    if not is_model and output.is_dir():
        output = output / source.name
    new_bytes = manifest.rows * row_dtype(dtype).row_bytes(manifest.width)
    with progress_to(echo)("converting", manifest.table_bytes + new_bytes) as advance:
        done = (convert_trained if is_model else convert_table)(source, output, dtype, advance=advance)
    seconds = time.perf_counter() - started
    share = done.rms_error / done.rms if done.rms else 0.0
    echo(
        *(f"note: {note}" for note in done.notes),
        f"table    {done.path}, written and verified{_again(done.resumed_rows)}",
        f"rows     {wording.count(manifest.rows)} of {manifest.width} {dtype}, {wording.size(new_bytes)}: "
        f"{wording.percent(new_bytes / manifest.table_bytes)} of the {wording.size(manifest.table_bytes)} of "
        f"{manifest.dtype}",
        f"error    largest {done.max_error:.3g}, RMS {done.rms_error:.3g}: {wording.percent(share)} of the values' "
        f"RMS of {done.rms:.3g}",
        f"seconds  {seconds:.2f}",
    )
    result: dict[str, Any] = {
        "path": str(done.path),
        "source": str(table),
        "rows": manifest.rows,
        "width": manifest.width,
        "dtype": dtype,
        "source_dtype": manifest.dtype,
        "bytes": new_bytes,
        "source_bytes": manifest.table_bytes,
        "resumed_rows": done.resumed_rows,
        "error": {"max": done.max_error, "rms": done.rms_error, "values_rms": done.rms},
        "seconds": seconds,
    }
    if corpus:
        loss = result["loss"] = _losses(source, output, corpus, text_column)
        before, after = (wording.decimals(loss[name], 5) for name in ("before", "after"))
        sign = "" if loss["change"] < 0 else "+"
        echo(
            f"loss     {before} with {manifest.dtype}, {after} with {dtype}: {sign}"
            f"{wording.decimals(loss['change'], 5)} on {wording.count(loss['tokens'])} held-out tokens of "
            f"{loss['corpus']}"
        )
    return result


def _losses(source: Path, output: Path, corpus: list[Path], text_column: str) -> dict[str, Any]:
    """Of the same held-out text, with the old table and the new one."""
    from sense_v2.cli.evaluate import WITH, run_eval

    options: dict[str, Any] = {"corpus": corpus, "text_column": text_column, "echo": lambda line: None}
    found = [run_eval(folder, **options) for folder in (source, output)]
    before, after = (one["loss"][WITH] for one in found)
    return {
        "before": before,
        "after": after,
        "change": after - before,
        "perplexity": [one["perplexity"][WITH] for one in found],
        "tokens": found[0]["tokens"],
        "corpus": found[0]["corpus"]["name"],
    }


# For another tokenizer


def _change_tokenizer(
    source: Path,
    output: Path,
    tokenizer: str,
    dtype: str | None,
    corpus: list[Path] | None,
    text_column: str,
    echo: Callable[..., Any],
) -> dict[str, Any]:
    from sense_v2.hf.saving.change_tokenizer import change_tokenizer

    started = time.perf_counter()
    _refuse_dtype(dtype)
    if not corpus:
        raise typer.BadParameter(
            "with --tokenizer it is the text whose n-grams are carried over, best what was trained on",
            param_hint="--corpus",
        )
    done = change_tokenizer(
        source, output, tokenizer, corpus=corpus, text_column=text_column, dtype=dtype, progress=progress_to(echo)
    )
    seconds = time.perf_counter() - started
    layers = ", ".join(map(str, done.layers))
    echo(
        f"corpus   {done.corpus}, {wording.number_of(done.new_tokens, 'token')} of {done.tokenizer}, "
        f"{wording.count(done.old_tokens)} of the model's own tokenizer",
        *(
            f"{f'{one.order}-grams':8} {wording.count(len(one.counts_U))} of {wording.count(one.num_ngrams)} carried "
            f"over, at {wording.percent(one.share_of_positions)} of the positions"
            for one in done.ngrams
        ),
        f"table    {done.path}",
        f"rows     {wording.count(done.rows)} of {done.width} {done.dtype}, {wording.count(done.carried_rows)} of "
        "them carried over, the others as in a new table",
        f"fusion   layers {layers} carried over, for a model of width {done.hidden_size}",
        f"to use   from_pretrained({str(output)!r}, backbone=MODEL, mode='r+')",
        f"seconds  {seconds:.2f}",
    )
    return {
        "path": str(done.path),
        "source": str(source),
        "tokenizer": done.tokenizer,
        "corpus": done.corpus,
        "tokens": done.new_tokens,
        "source_tokens": done.old_tokens,
        "orders": {
            str(one.order): {
                "ngrams": one.num_ngrams,
                "carried": len(one.counts_U),
                "share_of_positions": one.share_of_positions,
            }
            for one in done.ngrams
        },
        "rows": done.rows,
        "carried_rows": done.carried_rows,
        "width": done.width,
        "dtype": done.dtype,
        "layers": done.layers,
        "hidden_size": done.hidden_size,
        "seconds": seconds,
    }


# From a released layout


def _import(
    source: Path, output: Path, dtype: str | None, layer: int | None, tokenizer: str | None, echo: Callable[..., Any]
) -> dict[str, Any]:
    from sense_v2.engram.released.importing import import_tables

    started = time.perf_counter()
    _refuse_dtype(dtype)
    result: dict[str, Any] = {"source": str(source), "tables": []}
    for done in import_tables(
        source, output, dtype=dtype, layer=layer, tokenizer=tokenizer, progress=progress_to(echo)
    ):
        found = _imported(done)
        result["tables"].append(found)
        echo(
            *(f"note: {note}" for note in done.table.notes),
            f"table    {found['path']}, {found['variant']} layer {found['layer']}{_again(found['resumed_rows'])}",
            f"rows     {wording.count(found['rows'])} of {found['width']} {found['dtype']}, "
            f"{wording.size(found['bytes'])} (there {found['source_dtype']}, {wording.size(found['source_bytes'])})",
            f"check    {wording.size(found['bytes'])} read back: what was written, of a checkpoint that didn't "
            "change",
            f"error    {_error_line(found['error'])}",
            *([f"fusion   {done.fusion_path}, for EngramFusionLayer"] if done.fusion_path else []),
        )
    result["seconds"] = time.perf_counter() - started
    echo(f"seconds  {result['seconds']:.2f}")
    return result


def _imported(done: Imported) -> dict[str, Any]:
    facts, table = done.source.facts, done.table
    return {
        "path": str(table.path),
        "fusion_path": None if done.fusion_path is None else str(done.fusion_path),
        "variant": facts.variant,
        "layer": facts.layer,
        "rows": facts.num_rows,
        "width": facts.width,
        "dtype": table.manifest.dtype,
        "source_dtype": facts.dtype,
        "bytes": done.num_bytes,
        "source_bytes": facts.num_bytes,
        "resumed_rows": table.resumed_rows,
        "checked": facts.checked,
        "unchecked": facts.unchecked,
        "error": {"max": table.max_error, "rms": table.rms_error, "values_rms": _number(table.rms)},
    }


# To a released layout


def _export_gguf(source: Path, output: Path, *, dtype: str | None, echo: Callable[..., Any]) -> dict[str, Any]:
    from sense_v2.hf.saving.released_form import export_to_gguf

    started = time.perf_counter()
    _refuse_dtype(dtype)
    table, done = export_to_gguf(source, output, dtype=dtype, progress=progress_to(echo))
    seconds = time.perf_counter() - started
    error = {
        name: done.errors.get(of) for name, of in (("max", "max_error"), ("rms", "rms_error"), ("values_rms", "rms"))
    }
    echo(
        *(f"note: {note}" for note in done.notes),
        f"file     {done.path}{_again(done.resumed_rows)}",
        f"rows     {wording.count(done.num_rows)} {done.dtype} in {done.tensor}, {wording.size(done.num_bytes)}",
        f"check    {wording.count(done.num_rows)} rows read back: what was written, of a table that didn't change",
        f"error    {_error_line(error)}",
        f"seconds  {seconds:.2f}",
    )
    return {
        "path": str(done.path),
        "source": str(table),
        "tensor": done.tensor,
        "rows": done.num_rows,
        "dtype": done.dtype,
        "bytes": done.num_bytes,
        "resumed_rows": done.resumed_rows,
        "error": error,
        "seconds": seconds,
    }


def _export(
    source: Path, output: Path, *, variant: str, dtype: str | None, echo: Callable[..., Any]
) -> dict[str, Any]:
    from sense_v2.engram.released.layouts import LAYOUTS
    from sense_v2.hf.saving.released_form import export_released

    started = time.perf_counter()
    if variant not in LAYOUTS:
        raise CommandError(f"--to {variant}: no released layout", f"one of {', '.join(LAYOUTS)}, or gguf")
    allowed = LAYOUTS[variant].dtypes
    if dtype not in (None, *allowed):
        raise CommandError(f"--dtype {dtype}: the layout of {variant} has no such rows", f"{' or '.join(allowed)}")
    tables, done = export_released(source, output, variant, dtype=dtype, progress=progress_to(echo))
    seconds = time.perf_counter() - started
    errors = {
        str(layer): {
            "max": _number(of["max_error"]),
            "rms": _number(of["rms_error"]),
            "values_rms": _number(of["rms"]),
        }
        for layer, of in done.errors.items()
    }
    echo(
        *(f"note: {note}" for note in done.notes),
        f"folder   {done.folder}, layout of {variant}{_again(done.resumed_rows)}",
        f"rows     {wording.count(done.num_rows)} {done.dtype}, {wording.size(done.num_bytes)} in {len(done.files)} "
        f"files (here {wording.size(done.source_bytes)})",
        f"check    {wording.count(done.num_rows)} rows read back: what was written, of a table that didn't change",
        *(f"error    layer {of_layer}: {_error_line(error)}" for of_layer, error in errors.items()),
        *(
            f"fusion   layer {of_layer}: largest error {of['max_error']:.3g}, RMS {of['rms_error']:.3g}"
            for of_layer, of in done.fusion_errors.items()
        ),
        f"seconds  {seconds:.2f}",
    )
    return {
        "path": str(done.folder),
        "variant": variant,
        "sources": [str(table) for table in tables],
        "files": done.files,
        "rows": done.num_rows,
        "dtype": done.dtype,
        "bytes": done.num_bytes,
        "source_bytes": done.source_bytes,
        "resumed_rows": done.resumed_rows,
        "errors": errors,
        "fusion_errors": {
            str(layer): {"max": of["max_error"], "rms": of["rms_error"]} for layer, of in done.fusion_errors.items()
        },
        "seconds": seconds,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _again(rows: int) -> str:
    return f", {wording.count(rows)} rows of it by an earlier call" if rows else ""


def _error_line(error: dict[str, float | None]) -> str:
    if error["max"] == 0:
        return "none: every value is the same"
    if error["max"] is None or error["rms"] is None:
        return "not known any more: an earlier call had written the rows"
    line = f"largest {error['max']:.3g}, RMS {error['rms']:.3g}"
    if error["values_rms"]:
        line += (
            f": {wording.percent(error['rms'] / error['values_rms'])} of the values' RMS of {error['values_rms']:.3g}"
        )
    return line
