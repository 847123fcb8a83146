"""No code asks which table it has: what differs between tables is a property of `RowSource`, not a class."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_files import parsed

ROOT = Path(__file__).parents[2]
TABLES = {"MMapEmbeddingStorage", "OverlayStorage", "ReleasedTable", "ShardedTable", "TableModule"}
DUCKS = {"table", "storage", "overlay", "base"}


def class_tests(code: str) -> Iterator[int]:
    """Lines that test for a table's class: isinstance, issubclass, type(…) is, match; or for an attribute of it."""
    for node in ast.walk(parsed(code)):
        called = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
        if called in ("isinstance", "issubclass"):
            found = any(named_in(argument) & TABLES for argument in node.args[1:])
        elif called in ("getattr", "hasattr"):
            found = bool({getattr(node.args[0], "id", None), getattr(node.args[0], "attr", None)} & DUCKS)
        elif isinstance(node, ast.Compare):
            found = "type" in named_in(node) and bool(named_in(node) & TABLES)
        else:
            found = isinstance(node, ast.MatchClass) and bool(named_in(node) & TABLES)
        if found:
            yield node.lineno


def named_in(node: ast.AST) -> set[str | None]:
    return {getattr(one, "id", getattr(one, "attr", None)) for one in ast.walk(node)}


def test_nobody_asks_for_the_class_of_a_table() -> None:
    files = list((ROOT / "sense_v2").rglob("*.py"))
    assert len(files) > 100
    found = [f"{path}:{line}" for path in files for line in class_tests(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(x, OverlayStorage)",
        "isinstance(memory.storage, (int, sharded_table.ShardedTable))",
        "isinstance(x, ReleasedTable | None)",
        "issubclass(type(x), MMapEmbeddingStorage)",
        "type(x) is ReleasedTable",
        "getattr(self.storage, 'base', None)",
        "hasattr(table, 'commit')",
        "match x:\n    case OverlayStorage():\n        pass",
    ],
)
def test_the_test_finds_them(code: str) -> None:
    assert list(class_tests(code))
