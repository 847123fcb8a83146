"""`eval --tasks`: tasks of lm-evaluation-harness, with the memory and with it taken off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sense_v2.cli.output import LOADING
from sense_v2.core.errors import CommandError
from sense_v2.report import wording


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    without_memory: bool,
    echo: Callable[..., Any],
    **where: str,
) -> dict[str, Any]:
    """Of each metric its value with memory, without, or both; `where` as `open_trained` takes it."""
    from sense_v2.hf.backbones import open_trained
    from sense_v2.hf.data.held_out import settings_of
    from sense_v2.hf.insight.harness import compare_tasks
    from sense_v2.hf.memory import attached_memory

    started = time.perf_counter()
    if include_path is not None and not include_path.is_dir():
        raise CommandError(f"--include-path {include_path}: no such folder", "name the folder that holds the tasks")
    LOADING.say(f"loading {folder}")
    model, tokenizer = open_trained(folder, **where)
    has_memory = attached_memory(model) is not None
    echo(f"model   {folder}{'' if has_memory else ', which has no memory'}")
    metrics, names = compare_tasks(
        model, tokenizer, tasks, include_path=include_path, limit=limit, without_memory=without_memory
    )
    echo(*_table(metrics, names))
    if len(names) == 2:
        echo(f"without memory: {wording.taken_off(not settings_of(folder).trains_beside_memory)}")
    return {"model": str(folder), "tasks": metrics, "limit": limit, "seconds": time.perf_counter() - started}


def _table(metrics: list[dict[str, Any]], names: list[str]) -> list[str]:
    rows = [["task", "metric", *(name.replace("_", " ") for name in names), "samples"]]
    for one in metrics:
        metric = one["metric"] if one["filter"] == "none" else f"{one['metric']} ({one['filter']})"
        samples = "" if one["samples"] is None else wording.count(one["samples"])
        rows.append([one["task"], metric, *(_value(one[name]) for name in names), samples])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _value(values: dict[str, Any]) -> str:
    value, stderr = values["value"], values["stderr"]
    if not wording.is_finite(value):
        return str(value) if isinstance(value, str) else wording.NOT_FINITE
    return wording.decimals(value, 4) + (f" ± {wording.decimals(stderr, 4)}" if wording.is_finite(stderr) else "")
