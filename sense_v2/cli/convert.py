"""`sense-engram convert`: a table, or a trained model's, with rows of another dtype, and what that costs.

A table goes to a new file; a model's folder to a new folder that is a model again. The error is that of every value;
with a corpus and a model, the loss before and after as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sense_v2.cli.evaluate import WITH, run_eval
from sense_v2.cli.progress import ByteProgress
from sense_v2.core.config import COMPACT_DTYPES, ROW_DTYPES
from sense_v2.core.errors import CommandError
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.upkeep.convert import convert_table
from sense_v2.hf.saving.convert_model import convert_trained
from sense_v2.hf.saving.folder import MEMORY_FOLDER, TABLE_FILE
from sense_v2.report import wording


def run_convert(
    source: str | Path,
    output: str | Path,
    dtype: str,
    *,
    corpus: Sequence[str | Path] | None = None,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Converts the table at `source`, or the table of the model in that folder; returns one dictionary that JSON can
    hold. Ended early, the same call goes on where it was.

    Raises `CommandError`, and what `sense_v2.engram.upkeep.convert.convert_table` and evaluating the model raise.
    """
    started = time.perf_counter()
    source, output = Path(source), Path(output)
    is_model = (source / MEMORY_FOLDER).is_dir()
    table = source / MEMORY_FOLDER / TABLE_FILE if is_model else source
    if dtype not in (*ROW_DTYPES, *COMPACT_DTYPES):
        raise CommandError(f"--dtype {dtype}: no type of rows", f"one of {', '.join((*ROW_DTYPES, *COMPACT_DTYPES))}")
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
    with ByteProgress("converting", manifest.table_bytes + new_bytes, echo=echo) as advance:
        convert = convert_trained if is_model else convert_table
        done = convert(source, output, dtype, advance=advance)
    for note in done.notes:
        echo(f"note: {note}")
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
        "seconds": time.perf_counter() - started,
    }
    for line in _description(result):
        echo(line)
    if corpus:
        result["loss"] = _losses(source, output, corpus)
        echo(f"loss     {_loss_line(result['loss'], manifest.dtype, dtype)}")
    return result


def _losses(source: Path, output: Path, corpus: Sequence[str | Path]) -> dict[str, Any]:
    """Of the same held-out text, with the old table and the new one."""
    found = [run_eval(folder, corpus=corpus, echo=lambda line: None) for folder in (source, output)]
    before, after = (one["loss"][WITH] for one in found)
    return {
        "before": before,
        "after": after,
        "change": after - before,
        "perplexity": [one["perplexity"][WITH] for one in found],
        "tokens": found[0]["tokens"],
        "corpus": found[0]["corpus"]["name"],
    }


def _loss_line(loss: dict[str, Any], old: str, new: str) -> str:
    sign = "" if loss["change"] < 0 else "+"
    before, after = (wording.decimals(loss[name], 5) for name in ("before", "after"))
    return (
        f"{before} with {old}, {after} with {new}: {sign}{wording.decimals(loss['change'], 5)} on "
        f"{wording.count(loss['tokens'])} held-out tokens of {loss['corpus']}"
    )


def _description(result: dict[str, Any]) -> list[str]:
    error = result["error"]
    share = error["rms"] / error["values_rms"] if error["values_rms"] else 0.0
    again = ""
    if result["resumed_rows"]:
        again = f", {wording.count(result['resumed_rows'])} rows of it by an earlier call"
    return [
        f"table    {result['path']}, written and verified{again}",
        f"rows     {wording.count(result['rows'])} of {result['width']} {result['dtype']}, "
        f"{wording.size(result['bytes'])}: {wording.percent(result['bytes'] / result['source_bytes'])} of the "
        f"{wording.size(result['source_bytes'])} of {result['source_dtype']}",
        f"error    largest {error['max']:.3g}, RMS {error['rms']:.3g}: {wording.percent(share)} of the values' RMS "
        f"of {error['values_rms']:.3g}",
        f"seconds  {result['seconds']:.2f}",
    ]
