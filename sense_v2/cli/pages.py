"""A report's HTML file and the JSON beside it: their names, checked before the work that fills them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sense_v2.cli.errors import CommandError


def report_paths(output: str | Path) -> tuple[Path, Path]:
    """(the page, its JSON) for `--output`. Raises `CommandError` for a name that isn't a page's."""
    path = Path(output)
    if path.suffix != ".html":
        raise CommandError(f"--output {path}: a report is an .html file", f"--output {path.with_suffix('.html')}")
    if path.is_dir():
        raise CommandError(f"--output {path}: that is a folder", "name a file that ends in .html")
    return path, path.with_suffix(".json")


def finite(values: Any) -> Any:
    """JSON has no nan and no infinity: null.

    >>> finite({"loss": float("nan"), "gates": (0.5, float("inf"))})
    {'loss': None, 'gates': [0.5, None]}
    """
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_json(values: dict[str, Any], path: Path) -> None:
    """Writes what a report was made from, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
