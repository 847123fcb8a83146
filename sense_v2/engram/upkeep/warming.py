"""A table, or its hottest rows -> the page cache, for every process that opens the table."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from sense_v2.core.errors import CommandError
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.table.platform import usable_memory_bytes
from sense_v2.engram.upkeep.hot_rows import load, runs_of, warm_rows, warm_table


def warm(
    table: str | os.PathLike[str],
    *,
    hot_rows: str | os.PathLike[str] | None = None,
    share: float = 1.0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Read the pages of a table's rows.

    Args:
        table: The table's file.
        hot_rows: A file of hot rows, of which the hottest are read. Without it, all rows are.
        share: At most this share of the table's rows.
        progress: Is told how many bytes are read.

    Returns:
        What was read, as JSON holds it: "path", "rows", "table_rows", "bytes", "table_bytes", "seconds".

    Raises:
        CommandError: The rows don't fit into memory, or the file isn't of its manifest's size.
        ValueError: The hot rows are another table's.
    """
    started = time.perf_counter()
    table = Path(table)
    manifest = read_manifest(TableFiles(table).manifest)
    size = table.stat()
    if size.st_size != manifest.table_bytes:
        raise CommandError(
            f"{table}: {size.st_size} bytes, and its manifest says {manifest.table_bytes}",
            f"sense-engram verify {table} says what is wrong",
        )
    row_bytes = row_dtype(manifest.dtype).row_bytes(manifest.width)
    if hot_rows is None:
        num_rows, row_ids, needed_bytes = manifest.rows, None, size.st_blocks * 512
    else:
        row_ids = load(Path(hot_rows), manifest).row_ids[: math.ceil(share * manifest.rows)]
        num_rows = len(row_ids)
        needed_bytes = int(runs_of(row_ids, row_bytes, manifest.table_bytes)[:, 1].sum())
    memory_bytes = usable_memory_bytes()
    if needed_bytes > memory_bytes:
        raise CommandError(
            f"{num_rows} rows of {table} take {needed_bytes} bytes, and this process may use {memory_bytes} of "
            "memory",
            "fewer rows: --rows with what sense-engram profile wrote, a smaller --share, or a compact table",
        )
    with progress("warming", max(needed_bytes, 1)) as advance:
        if row_ids is None:
            num_bytes = warm_table(table, advance=advance)
        else:
            num_bytes = warm_rows(table, row_ids, row_bytes, advance=advance)
    return {
        "path": str(table),
        "rows": num_rows,
        "table_rows": manifest.rows,
        "bytes": num_bytes,
        "table_bytes": manifest.table_bytes,
        "seconds": time.perf_counter() - started,
    }
