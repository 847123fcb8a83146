"""What a command prints: lines for people, or one JSON object for programs.

Without `--json` the lines go to stdout. With it stdout holds the object and nothing else, and the lines go to stderr.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any


def lines_to(as_json: bool) -> Callable[[str], Any]:
    """Where a command's lines for people go: the `echo` of its `run_…`."""
    return functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


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
