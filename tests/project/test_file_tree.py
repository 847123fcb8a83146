"""The file tree in docs/architecture.md is the one that scripts/file_tree.py makes from the modules' docstrings."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MADE = runpy.run_path(str(ROOT / "scripts" / "file_tree.py"))
LAYERS = runpy.run_path(str(ROOT / "tests" / "project" / "test_layering.py"))["PACKAGES"]


def test_the_page_has_the_tree() -> None:
    text = (ROOT / MADE["PAGE"]).read_text(encoding="utf-8")
    assert text == MADE["with_tree"](text), "`make trees` writes it"


def test_every_file_of_the_package_is_in_the_full_tree() -> None:
    names = [line.split()[0] for line in MADE["tree"]().splitlines()]
    paths = [path for path in (ROOT / "sense_v2").rglob("*") if path.suffix in (".py", ".c", ".h")]
    modules = [path.name for path in paths if path.name != "__init__.py"]
    assert sorted(name for name in names if not name.endswith("/")) == sorted(modules)


def test_every_file_and_package_says_what_it_holds() -> None:
    silent = [line for line in MADE["tree"]().splitlines()[1:] if len(line.split()) == 1]
    assert silent == []


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("Rows of a table", "Rows of a table"),
        (
            "Rows -> sums: " + "of keyed hashes, " * 5 + "so that a sum changes",
            "Rows -> sums: " + "of keyed hashes, " * 4,
        ),
        ("x" * 100, "x" * 100),
    ],
)
def test_a_long_line_ends_with_a_clause(said: str, short: str) -> None:
    assert MADE["shortened"](said) == short.removesuffix(", ")


def test_packages_stand_in_the_order_of_the_layers() -> None:
    names = [line.split()[0].rstrip("/") for line in MADE["tree"]().splitlines()]
    inner = [name.partition(".")[2] for name in LAYERS if "." in name]
    assert [name for name in names if name in inner] == [name for name in inner if name != "engram"]
    assert [name for name in names if name in LAYERS] == ["core", "engram", "hf", "report", "cli"]


def test_a_tree_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    package = tmp_path / "sense_v2" / "table"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""Bytes on disk."""\n')
    (package / "format.py").write_text('"""The bytes.\n\nMore."""\n')
    (package / "_copy.h").write_text("/* Rows, copied.\n   More. */\n")
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{MADE['BEGIN']}\n{MADE['END']}\nafter\n")
    main = MADE["main"]
    monkeypatch.setitem(main.__globals__, "ROOT", tmp_path)
    monkeypatch.setitem(main.__globals__, "PAGE", "page.md")
    assert main(["--check"]) == 1
    assert "page.md: its tree" in capsys.readouterr().err
    assert main(["--write"]) == 0
    lines = page.read_text().splitlines()
    assert lines[4:8] == [
        "sense_v2/",
        "  table/       Bytes on disk",
        "    _copy.h    Rows, copied",
        "    format.py  The bytes",
    ]
    assert (lines[0], lines[-1]) == ("Before", "after")
    assert main(["--check"]) == 0
    (package / "format.py").write_text('"""Other bytes."""\n')
    assert main(["--check"]) == 1
