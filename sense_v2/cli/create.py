"""`sense-engram create`: the table that a configuration describes, made, or checked where it is there already."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.cli.folders import new_folders
from sense_v2.core.config import EngramConfig
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.model import open_table
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.report import wording


def run_create(config: EngramConfig, *, echo: Callable[[str], Any] = print) -> dict[str, Any]:
    """Makes the table at `config.storage_path`; returns what it is, one dictionary that JSON can hold.

    One that is there is opened read-only, compared with the configuration and left as it is. Raises what opening the
    shadow map and the table raise.
    """
    shadow_map = EngramTokenizer(config.shadow_map_path)
    is_there = Path(config.storage_path).exists()
    started = time.perf_counter()
    with new_folders(Path(config.storage_path).parent):
        storage = open_table(config, shadow_map, mode="r" if is_there else "r+")
    seconds = time.perf_counter() - started
    layout = HeadLayout.from_config(config)
    heads = [rows for primes in layout.primes_LH for rows in primes]
    table_bytes = storage.path.stat().st_size
    result = {
        "path": str(storage.path),
        "status": "there already" if is_there else "written",
        "rows": storage.num_embeddings,
        "width": storage.embedding_dim,
        "dtype": config.dtype,
        "bytes": table_bytes,
        "heads": len(heads),
        "rows_per_head": [min(heads), max(heads)],
        "variant": config.variant,
        "seed": config.seed,
        "shadow_map": str(shadow_map.path),
        "tokenizer": storage.manifest.provenance.get("tokenizer_name"),
        "generation": storage.manifest.generation,
        "step": storage.committed_step,
        "seconds": seconds,
        "megabytes_per_second": None if is_there else table_bytes / 1e6 / seconds,
    }
    for line in _description(result, config):
        echo(line)
    storage.close()
    return result


def _description(result: dict[str, Any], config: EngramConfig) -> list[str]:
    fewest, most = result["rows_per_head"]
    orders, layers = len(config.ngram_orders), len(config.layer_indices)
    lines = [
        f"table    {result['path']}, {result['status']}",
        f"rows     {wording.count(result['rows'])} of {result['width']} {result['dtype']}, "
        f"{wording.size(result['bytes'])}",
        f"heads    {result['heads']}: {layers} {'layer' if layers == 1 else 'layers'} × {orders} n-gram "
        f"{'order' if orders == 1 else 'orders'} × {config.num_heads}, of {wording.count(fewest)} to "
        f"{wording.count(most)} rows",
        f"tokens   {result['tokenizer'] or 'of an unnamed tokenizer'}, {result['shadow_map']}",
    ]
    if result["status"] == "written":
        rate = f"{result['megabytes_per_second']:,.0f} MB/s"
        return [*lines, f"seconds  {result['seconds']:.2f}, {rate}"]
    return [*lines, f"kept     it is what the configuration describes; {wording.count(result['generation'])} commits"]
