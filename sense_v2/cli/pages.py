"""A report's HTML file and the JSON beside it: their names, checked before the work that fills them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sense_v2.cli.output import finite
from sense_v2.core.errors import CommandError


def report_paths(output: str | Path) -> tuple[Path, Path]:
    """(the page, its JSON) for `--output`. Raises `CommandError` for a name that isn't a page's."""
    path = Path(output)
    if path.suffix != ".html":
        raise CommandError(f"--output {path}: a report is an .html file", f"--output {path.with_suffix('.html')}")
    if path.is_dir():
        raise CommandError(f"--output {path}: that is a folder", "name a file that ends in .html")
    return path, path.with_suffix(".json")


def write_json(values: dict[str, Any], path: Path) -> None:
    """Writes what a report was made from, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
