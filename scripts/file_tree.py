"""Prints the tree of sense_v2/, made from the modules' docstrings, and writes it into docs/architecture.md.

    python scripts/file_tree.py            print the tree
    python scripts/file_tree.py --write    write it into the page
    python scripts/file_tree.py --check    exit with status 1 if the page differs

`make trees` writes it. A file's line is the first line of its docstring. In the page the tree stands between two
comments, `BEGIN` and `END`; nothing else is touched.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sense_v2"
PAGE = "docs/architecture.md"
ORDER = ("core", "engram", "hf", "report", "cli", "table", "reading", "upkeep", "released", "delta", "ranks")
"""Packages from the bottom to the top, as tests/project/test_layering.py holds it; others follow by name."""
BEGIN = "<!-- tree: written by `make trees` -->"
END = "<!-- end of tree -->"
LONGEST = 90
"""Characters of a line; a module's first docstring line that has more is cut at a clause, and named."""


def _parsed(text: str) -> ast.Module:
    for _ in range(9):
        try:
            return ast.parse(text)
        except SystemError:  # CPython before 3.12 while something else parses (python/cpython#106905)
            continue
    return ast.parse(text)


def first_line(path: Path) -> str:
    """Return what a file says it holds: the first line of its docstring, or of its first comment in C."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(_parsed(text)) or ""
    else:
        comment = re.match(r"\s*(?:/\*+|//)\s*(.*)", text)
        said = comment[1] if comment else ""
    return said.split("\n")[0].strip().removesuffix("*/").rstrip(" .:")


def shortened(said: str) -> str:
    """Return the first sentence of a line that is longer than `LONGEST`, or its last clause that fits."""
    if len(said) <= LONGEST:
        return said
    if ". " in said[:LONGEST]:
        return said[: said.index(". ")]
    ends = [match.start() for match in re.finditer(r"[,;:] ", said[:LONGEST])]
    return said[: ends[-1]] if ends else said


def rank(folder: Path) -> tuple[int, str]:
    """Return what packages are sorted by: their place in `ORDER`, then their name."""
    name = folder.name
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def entries(folder: Path, depth: int = 1) -> Iterator[tuple[str, str]]:
    """Yield the lines below a folder, each a name with its indent and what it holds."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".py", ".c", ".h")):
        if path.name != "__init__.py":
            yield "  " * depth + path.name, shortened(first_line(path))
    packages = [p for p in folder.iterdir() if p.is_dir() and any(p.glob("*.py"))]
    for package in sorted(packages, key=rank):
        init = package / "__init__.py"
        yield "  " * depth + f"{package.name}/", shortened(first_line(init)) if init.exists() else ""
        yield from entries(package, depth + 1)


def tree() -> str:
    """Return the tree as text, one line a file or package, aligned."""
    lines = [(f"{PACKAGE}/", ""), *entries(ROOT / PACKAGE)]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}{said}".rstrip() for name, said in lines)


def with_tree(page: str) -> str:
    """Return the page's text with the tree as it should stand there.

    Raises `ValueError` if the page doesn't have each of the two comments once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs {BEGIN} and {END}, once each")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n```\n{tree()}\n```\n\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write the tree into the page")
    action.add_argument("--check", action="store_true", help="exit with status 1 if the page differs")
    options = parser.parse_args(arguments)
    if not (options.write or options.check):
        print(tree())
        return 0
    path = ROOT / PAGE
    page = path.read_text(encoding="utf-8")
    wanted = with_tree(page)
    if page != wanted and options.check:
        print(f"{PAGE}: its tree isn't that of {PACKAGE}/; `make trees` writes it", file=sys.stderr)
    elif page != wanted:
        path.write_text(wanted, encoding="utf-8")
        print(f"{PAGE}: written")
    for path in sorted((ROOT / PACKAGE).rglob("*.[pch]*")):
        if path.suffix in (".py", ".c", ".h") and len(first_line(path)) > LONGEST:
            print(f"{path.relative_to(ROOT)}: its first line is longer than {LONGEST} characters", file=sys.stderr)
    return int(page != wanted and options.check)


if __name__ == "__main__":
    sys.exit(main())
