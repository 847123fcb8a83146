"""`sense-engram inspect`: what released tables a checkpoint has, and whether they are what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.core.errors import CommandError
from sense_v2.engram.released.released_table import TableFacts, released_tables
from sense_v2.report import wording


def run_inspect(folder: str | Path, *, echo: Callable[[str], Any] = print) -> dict[str, Any]:
    """Reads headers and config.json, no row; returns one dictionary that JSON can hold.

    Raises `CommandError` where there is no released table, and what damaged files raise.
    """
    tables = released_tables(folder)
    if not tables:
        raise CommandError(
            f"{folder}: no released table of DeepSeek-V4.1 or Qwen PLE in its safetensors files",
            "name a checkpoint's folder, index or shard; sense-engram verify looks at this project's own tables",
        )
    result = {"folder": str(folder), "tables": [_as_json(facts) for facts in tables]}
    for table in result["tables"]:
        assert isinstance(table, dict)
        for line in _lines(table):
            echo(line)
    return result


def _as_json(facts: TableFacts) -> dict[str, Any]:
    layout = facts.layout
    place = None if layout is None else layout.layer_ids.index(facts.layer)
    return {
        "variant": facts.variant,
        "layer": facts.layer,
        "rows": facts.num_rows,
        "width": facts.width,
        "dtype": facts.dtype,
        "parts": facts.num_parts,
        "bytes": facts.num_bytes,
        "ngram_orders": None if layout is None else list(layout.ngram_orders),
        "heads_per_order": None if layout is None else layout.num_heads,
        "primes": None if layout is None or place is None else list(layout.primes_LH[place]),
        "offsets": None if layout is None or place is None else list(layout.offsets_LH[place]),
        "checked": facts.checked,
        "unchecked": facts.unchecked,
    }


def _lines(table: dict[str, Any]) -> list[str]:
    parts = "whole" if table["parts"] == 1 else f"in {table['parts']} parts"
    lines = [
        f"layer {table['layer']}, {table['variant']}",
        f"  rows       {table['rows']:,} of {table['width']} values, {table['dtype']}, {parts}",
        f"  bytes      {wording.size(table['bytes'])}",
    ]
    if table["primes"] is not None:
        orders, primes = table["ngram_orders"], table["primes"]
        lines.append(
            f"  heads      {len(primes)}: {table['heads_per_order']} for each of the {orders[0]}- to {orders[-1]}-"
            f"grams, {min(primes):,} to {max(primes):,} rows each"
        )
    lines.append(f"  checked    {', '.join(table['checked'])}")
    if table["unchecked"]:
        lines.append(f"  unchecked  {', '.join(table['unchecked'])}")
    return lines
