"""What a command prints: lines for people, or one JSON object for programs.

Without `--json` the lines go to stdout. With it stdout holds the object and nothing else, and the lines go to stderr.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sense_v2.core.errors import CommandError
from sense_v2.core.progress import Progress


def lines_to(as_json: bool) -> Callable[..., Any]:
    """Return the `print` for a command's lines: to stdout, or to stderr if stdout holds JSON."""
    return functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


def progress_to(echo: Callable[[str], Any]) -> Progress:
    """Show how far a call of the library is: a bar in a terminal, a line now and then elsewhere."""
    from sense_v2.cli.progress import ByteProgress

    return functools.partial(ByteProgress, echo=echo)


def print_json(values: Any) -> None:
    print(json.dumps(finite(values), indent=2, allow_nan=False, default=str), flush=True)


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


def require_plots() -> None:
    """Refuse at the start, not after the work, a report whose plots nothing here can draw."""
    if find_spec("matplotlib") is None:
        raise CommandError(
            "the report's plots are drawn by matplotlib, not installed here",
            'pip install "sense-v2[demo]" installs it',
        )


def report_paths(path: Path) -> tuple[Path, Path]:
    """Return the paths of a report and its JSON. Raises `CommandError` if --output names no page."""
    if path.suffix != ".html":
        raise CommandError(f"--output {path}: a report is an .html file", f"--output {path.with_suffix('.html')}")
    if path.is_dir():
        raise CommandError(f"--output {path}: that is a folder", "name a file that ends in .html")
    return path, path.with_suffix(".json")


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write the numbers of a report, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
