"""`sense-engram convert` between our tables and released checkpoints, of DeepSeek-V4.1's layout and Qwen PLE's.

A checkpoint's tables become tables of ours, one a layer; a trained memory becomes a checkpoint's shards, which a
serving engine loads. What was written is read back and compared; what that found, and what the rows lost, is printed.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sense_v2.cli.progress import ByteProgress
from sense_v2.core.config import COMPACT_DTYPES, ROW_DTYPES
from sense_v2.core.errors import CommandError
from sense_v2.engram.released.exporting import Exported, export_tables
from sense_v2.engram.released.importing import FUSION_SUFFIX, Imported, import_table
from sense_v2.engram.released.layouts import LAYOUTS
from sense_v2.engram.released.released_table import TableFacts, released_tables
from sense_v2.engram.table.compact_rows import FLOAT8
from sense_v2.engram.table.format import file_bytes, row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.variants import VARIANTS
from sense_v2.hf.saving.folder import MEMORY_FOLDER, memory_parts
from sense_v2.report import wording


def is_checkpoint(source: Path) -> bool:
    """Whether a path is a released checkpoint's folder, index or file, and not a table or a model of ours."""
    if source.is_dir():
        return not (source / MEMORY_FOLDER).is_dir() and any(source.glob("*.safetensors")) and not _tables_in(source)
    return source.name.endswith((".safetensors", ".safetensors.index.json"))


def run_import(
    source: Path,
    output: Path,
    dtype: str | None,
    *,
    layer: int | None = None,
    tokenizer: str | None = None,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Converts the tables of the checkpoint at `source`, or that of `layer`; returns one dictionary that JSON can
    hold. `output` is a table's file, or a folder for layer_1.dat, ….

    Raises `CommandError`, and what `sense_v2.engram.released.importing.import_table` raises.
    """
    started = time.perf_counter()
    if dtype is not None and dtype not in (*ROW_DTYPES, *COMPACT_DTYPES):
        raise CommandError(f"--dtype {dtype}: no type of rows", f"one of {', '.join((*ROW_DTYPES, *COMPACT_DTYPES))}")
    tables = [facts for facts in released_tables(source) if layer in (None, facts.layer)]
    if not tables:
        of = "" if layer is None else f" of layer {layer}"
        raise CommandError(f"{source}: no released table{of}", f"sense-engram inspect {source} says what is there")
    is_file = bool(output.suffix) and not output.is_dir()
    if is_file and len(tables) > 1:
        layers = ", ".join(str(facts.layer) for facts in tables)
        raise CommandError(f"{source} has tables of layers {layers}, and {output} is one file", "choose a --layer")
    result: dict[str, Any] = {"source": str(source), "tables": []}
    with _shadow_map(tokenizer, tables) as shadow_map:
        for facts in tables:
            path = output if is_file else output / f"layer_{facts.layer}.dat"
            new_bytes = file_bytes(facts.num_rows, facts.width, dtype or _own_dtype(facts))
            with ByteProgress(f"layer {facts.layer}", facts.num_bytes + new_bytes, echo=echo) as advance:
                done = import_table(
                    source,
                    facts.layer,
                    path,
                    dtype=dtype,
                    variant=facts.variant,
                    tokenizer=shadow_map,
                    advance=advance,
                )
            result["tables"].append(_imported(done, new_bytes))
            for note in done.table.notes:
                echo(f"note: {note}")
            for line in _import_lines(result["tables"][-1]):
                echo(line)
    result["seconds"] = time.perf_counter() - started
    echo(f"seconds  {result['seconds']:.2f}")
    return result


def run_export(
    source: Path, output: Path, variant: str, dtype: str | None, *, echo: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Writes a table, the tables of a folder, or the memory of the model in a folder in the released layout of
    `variant`; returns one dictionary that JSON can hold.

    Raises `CommandError`, and what `sense_v2.engram.released.exporting.export_tables` raises.
    """
    started = time.perf_counter()
    if variant not in LAYOUTS:
        raise CommandError(f"--to {variant}: no released layout", f"one of {', '.join(LAYOUTS)}")
    allowed = LAYOUTS[variant].dtypes
    if dtype not in (None, *allowed):
        raise CommandError(f"--dtype {dtype}: the layout of {variant} has no such rows", f"{' or '.join(allowed)}")
    config, fusion = None, None
    if (source / MEMORY_FOLDER).is_dir():
        config, table, fusion = memory_parts(source)
        tables = [table]
    else:
        tables = _tables_in(source) if source.is_dir() else [source]
        fusion = _fusion_beside(tables)
    if not tables:
        raise CommandError(f"{source}: no table there", "name a table, a folder of tables, or a model's folder")
    manifests = [read_manifest(TableFiles(table).manifest) for table in tables]
    new_bytes = sum(_released_bytes(m.rows, m.width, dtype or allowed[0], variant) for m in manifests)
    with ByteProgress("converting", sum(m.table_bytes for m in manifests) + new_bytes, echo=echo) as advance:
        done = export_tables(tables, output, variant, dtype=dtype, fusion=fusion, config=config, advance=advance)
    for note in done.notes:
        echo(f"note: {note}")
    result = _exported(done, tables)
    result["seconds"] = time.perf_counter() - started
    for line in _export_lines(result):
        echo(line)
    return result


def _tables_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.dat") if TableFiles(path).manifest.is_file())


def _fusion_beside(tables: list[Path]) -> dict[int, Any] | None:
    """What `import_table` wrote beside them, where it did for all."""
    from safetensors.torch import load_file

    paths = {table: table.with_suffix(FUSION_SUFFIX) for table in tables}
    if not tables or not all(path.is_file() for path in paths.values()):
        return None
    layers = {table: read_manifest(TableFiles(table).manifest).provenance.get("layer") for table in tables}
    return {int(layer): load_file(paths[table]) for table, layer in layers.items() if isinstance(layer, int)}


@contextlib.contextmanager
def _shadow_map(tokenizer: str | None, tables: list[TableFacts]) -> Iterator[EngramTokenizer | None]:
    rules = VARIANTS[tables[0].variant]
    if tokenizer is None or not rules.compresses:
        yield None
        return
    builder = EngramTokenizerBuilder(tokenizer, normalization=str(rules.defaults["normalization"]))
    with tempfile.TemporaryDirectory() as scratch:
        builder.build_mapping(Path(scratch) / "shadow_map.npy")
        yield EngramTokenizer(Path(scratch) / "shadow_map.npy")


def _own_dtype(facts: TableFacts) -> str:
    return "bfloat16" if facts.dtype == "BF16" else FLOAT8


def _released_bytes(rows: int, width: int, dtype: str, variant: str) -> int:
    """Qwen's float8 rows have no scales of their own."""
    has_scales = variant != "qwen_ple" or dtype != FLOAT8
    return rows * (row_dtype(dtype).row_bytes(width) if has_scales else width)


def _imported(done: Imported, new_bytes: int) -> dict[str, Any]:
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
        "bytes": new_bytes,
        "source_bytes": facts.num_bytes,
        "resumed_rows": table.resumed_rows,
        "checked": facts.checked,
        "unchecked": facts.unchecked,
        "error": {"max": table.max_error, "rms": table.rms_error, "values_rms": _number(table.rms)},
    }


def _exported(done: Exported, tables: list[Path]) -> dict[str, Any]:
    return {
        "path": str(done.folder),
        "variant": done.variant,
        "sources": [str(table) for table in tables],
        "files": done.files,
        "rows": done.num_rows,
        "dtype": done.dtype,
        "bytes": done.num_bytes,
        "source_bytes": done.source_bytes,
        "resumed_rows": done.resumed_rows,
        "errors": {
            str(layer): {
                "max": _number(of["max_error"]),
                "rms": _number(of["rms_error"]),
                "values_rms": _number(of["rms"]),
            }
            for layer, of in done.errors.items()
        },
        "fusion_errors": {
            str(layer): {"max": of["max_error"], "rms": of["rms_error"]} for layer, of in done.fusion_errors.items()
        },
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _import_lines(table: dict[str, Any]) -> list[str]:
    lines = [
        f"table    {table['path']}, {table['variant']} layer {table['layer']}{_again(table)}",
        f"rows     {wording.count(table['rows'])} of {table['width']} {table['dtype']}, "
        f"{wording.size(table['bytes'])} (there {table['source_dtype']}, {wording.size(table['source_bytes'])})",
        f"check    {wording.size(table['bytes'])} read back: what was written, of a checkpoint that didn't change",
        f"error    {_error_line(table['error'])}",
    ]
    if table["fusion_path"]:
        lines.append(f"fusion   {table['fusion_path']}, for EngramFusionLayer")
    return lines


def _export_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"folder   {result['path']}, layout of {result['variant']}{_again(result)}",
        f"rows     {wording.count(result['rows'])} {result['dtype']}, {wording.size(result['bytes'])} in "
        f"{len(result['files'])} files (here {wording.size(result['source_bytes'])})",
        f"check    {wording.count(result['rows'])} rows read back: what was written, of a table that didn't change",
    ]
    lines += [f"error    layer {layer}: {_error_line(error)}" for layer, error in result["errors"].items()]
    lines += [
        f"fusion   layer {layer}: largest error {error['max']:.3g}, RMS {error['rms']:.3g}"
        for layer, error in result["fusion_errors"].items()
    ]
    return [*lines, f"seconds  {result['seconds']:.2f}"]


def _again(result: dict[str, Any]) -> str:
    rows = result["resumed_rows"]
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
