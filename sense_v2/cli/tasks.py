"""`sense-engram eval --tasks`: tasks of lm-evaluation-harness, with the memory and with it taken off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sense_v2.cli.errors import CommandError
from sense_v2.cli.evaluate import WITH, WITHOUT
from sense_v2.cli.models import open_trained
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.insight import harness
from sense_v2.hf.memory import attached_memory
from sense_v2.report import wording


def run_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    without_memory: bool = False,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Runs the tasks; returns one dictionary that JSON can hold: of each metric its value with memory, without, or
    both. Nothing in `folder` changes.

    Raises `CommandError`, `ImportError` without lm_eval, and what loading the model and the tasks raises.
    """
    started = time.perf_counter()
    folder = Path(folder)
    if include_path is not None and not Path(include_path).is_dir():
        raise CommandError(f"--include-path {include_path}: no such folder", "name the folder that holds the tasks")
    model, tokenizer = open_trained(folder)
    has_memory = attached_memory(model) is not None
    echo(f"model   {folder}{'' if has_memory else ', which has no memory'}")
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    names = ([WITH] if has_memory else []) + ([WITHOUT] if without_memory or not has_memory else [])
    for name in names:
        if name == WITHOUT and has_memory:
            detach_engram(model)
        for one in harness.run_tasks(model, tokenizer, tasks, include_path=include_path, limit=limit):
            key = one["task"], one["metric"], one["filter"]
            values = {"value": one.pop("value"), "stderr": one.pop("stderr")}
            found.setdefault(key, one)[name] = values
    result: dict[str, Any] = {
        "model": str(folder),
        "tasks": list(found.values()),
        "limit": limit,
        "seconds": time.perf_counter() - started,
    }
    for line in _table(result["tasks"], names):
        echo(line)
    if len(names) == 2:
        echo("without memory: this model with its memory taken off; one that was trained without may do better")
    return result


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
