"""Python files as syntax trees, whatever else the process is doing."""

import ast
from pathlib import Path

TRIES = 10


def parsed(text: str, path: Path | str = "<text>") -> ast.Module:
    """`ast.parse`, again where CPython (before 3.12) counts its depth wrongly: a garbage collection or another thread
    that parses in the same moment makes it raise `SystemError` (python/cpython#106905)."""
    for _ in range(TRIES - 1):
        try:
            return ast.parse(text, str(path))
        except SystemError:
            continue
    return ast.parse(text, str(path))
