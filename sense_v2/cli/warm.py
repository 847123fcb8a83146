"""`sense-engram warm`: a table, or the rows that a profile found hot, into memory before anything asks for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.cli.errors import CommandError
from sense_v2.cli.progress import ByteProgress
from sense_v2.engram.table.format import row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.table.platform import usable_memory_bytes
from sense_v2.engram.upkeep.hot_rows import load, runs_of, warm_rows, warm_table
from sense_v2.report import wording


def run_warm(
    table: str | Path,
    *,
    hot_rows: str | Path | None = None,
    share: float | None = None,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Reads the pages of all rows, or of the hottest ones in `hot_rows` (at most `share` of the table's), into the
    page cache; returns one dictionary that JSON can hold.

    Raises `CommandError` where they don't fit into memory, and what reading the files raises.
    """
    started = time.perf_counter()
    table = Path(table)
    manifest = read_manifest(TableFiles(table).manifest)
    if table.stat().st_size != manifest.table_bytes:
        raise CommandError(
            f"{table}: {table.stat().st_size} bytes, and its manifest says {manifest.table_bytes}",
            f"sense-engram verify {table} says what is wrong",
        )
    if share is not None and not 0 < share <= 1:
        raise CommandError(f"--share {share}: a share of the table's rows", "above 0, and 1 at most")
    if share is not None and hot_rows is None:
        raise CommandError("--share says how many of the hot rows", "name the file that profile wrote with --rows")
    row_bytes = row_dtype(manifest.dtype).row_bytes(manifest.width)
    if hot_rows is None:
        num_rows, row_ids, needed_bytes = manifest.rows, None, table.stat().st_blocks * 512
    else:
        hot = load(Path(hot_rows), manifest)
        row_ids = hot.row_ids[: math.ceil((share or 1) * manifest.rows)]
        num_rows = len(row_ids)
        needed_bytes = int(runs_of(row_ids, row_bytes, manifest.table_bytes)[:, 1].sum())
    memory_bytes = usable_memory_bytes()
    if needed_bytes > memory_bytes:
        raise CommandError(
            f"{num_rows} rows of {table} take {needed_bytes} bytes, and this process may use {memory_bytes} of "
            "memory",
            "fewer rows: --rows with what sense-engram profile wrote, a smaller --share, or a compact table",
        )
    with ByteProgress("warming", max(needed_bytes, 1), echo=echo) as advance:
        num_bytes = (
            warm_table(table, advance=advance)
            if row_ids is None
            else warm_rows(table, row_ids, row_bytes, advance=advance)
        )
    seconds = time.perf_counter() - started
    result = {
        "path": str(table),
        "rows": num_rows,
        "table_rows": manifest.rows,
        "bytes": num_bytes,
        "table_bytes": manifest.table_bytes,
        "seconds": seconds,
    }
    echo(f"table    {table}, {wording.count(manifest.rows)} rows, {wording.size(manifest.table_bytes)}")
    echo(
        f"loaded   {wording.count(num_rows)} rows, {wording.percent(num_rows / manifest.rows)}, in pages of "
        f"{wording.size(num_bytes)}: {wording.duration(seconds)}, {wording.size(num_bytes / seconds)}/s"
    )
    return result
