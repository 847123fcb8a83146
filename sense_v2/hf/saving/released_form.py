"""A saved model, or tables of ours -> a checkpoint in a released layout, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sense_v2.core.errors import CommandError
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.released.exporting import Exported, export_tables
from sense_v2.engram.released.gguf_exporting import ExportedGguf, export_gguf
from sense_v2.engram.released.importing import FUSION_SUFFIX
from sense_v2.engram.released.layouts import LAYOUTS
from sense_v2.engram.table.compact_rows import FLOAT8
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.hf.saving.folder import MEMORY_FOLDER, memory_parts


def is_checkpoint(source: Path) -> bool:
    """True for a released checkpoint's folder, index or file, or a GGUF one; False for a table or a model of ours."""
    if source.is_dir():
        has_theirs = any(source.glob("*.safetensors")) or any(source.glob("*.gguf"))
        return not (source / MEMORY_FOLDER).is_dir() and has_theirs and not _tables_in(source)
    return source.name.endswith((".safetensors", ".safetensors.index.json", ".gguf"))


def export_released(
    source: Path, output: Path, variant: str, *, dtype: str | None = None, progress: Progress = no_progress
) -> tuple[list[Path], Exported]:
    """Write a memory in a released layout.

    Args:
        source: The folder of a model, a folder of tables, or a table.
        output: The new checkpoint's folder.
        variant: Whose layout.
        dtype: Of the rows, by default what the layout has.
        progress: Is told how many bytes are read and written.

    Returns:
        The tables that were written, and what that did.

    Raises:
        CommandError: There is no table.
        ValueError: The layout can't express the memory.
    """
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
    written = dtype or LAYOUTS[variant].dtypes[0]
    # Qwen's float8 rows have no scales of their own.
    is_bare = variant == "qwen_ple" and written == FLOAT8
    new_bytes = sum(m.rows * (m.width if is_bare else row_dtype(written).row_bytes(m.width)) for m in manifests)
    with progress("converting", sum(m.table_bytes for m in manifests) + new_bytes) as advance:
        done = export_tables(tables, output, variant, dtype=dtype, fusion=fusion, config=config, advance=advance)
    return tables, done


def export_to_gguf(
    source: Path, output: Path, *, dtype: str | None = None, progress: Progress = no_progress
) -> tuple[Path, ExportedGguf]:
    """Write a memory's table as a GGUF file.

    Args:
        source: The folder of a model with one table, a folder with one, or a table.
        output: The new file.
        dtype: Of the rows, by default the table's.
        progress: Is told how many bytes are read and written.

    Returns:
        The table that was written, and what that did.

    Raises:
        CommandError: There is no table, or there are several.
        ValueError: As `export_gguf`.
    """
    config, tables = None, [source]
    if (source / MEMORY_FOLDER).is_dir():
        config, table, _ = memory_parts(source)
        tables = [table]
    elif source.is_dir():
        tables = _tables_in(source)
    if len(tables) != 1:
        raise CommandError(f"{source} has {len(tables)} tables, and a GGUF file of ours has one", "name a table")
    manifest = read_manifest(TableFiles(tables[0]).manifest)
    new_bytes = manifest.rows * row_dtype(dtype or manifest.dtype).row_bytes(manifest.width)
    with progress("converting", manifest.table_bytes + new_bytes) as advance:
        return tables[0], export_gguf(tables[0], output, dtype=dtype, config=config, advance=advance)


def _tables_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.dat") if TableFiles(path).manifest.is_file())


def _fusion_beside(tables: list[Path]) -> dict[int, Any] | None:
    """The fusion weights that `import_table` wrote beside the tables, if all tables have them."""
    paths = {table: table.with_suffix(FUSION_SUFFIX) for table in tables}
    if not tables or not all(path.is_file() for path in paths.values()):
        return None
    layers = {table: read_manifest(TableFiles(table).manifest).provenance.get("layer") for table in tables}
    return {int(layer): load_file(paths[table]) for table, layer in layers.items() if isinstance(layer, int)}
