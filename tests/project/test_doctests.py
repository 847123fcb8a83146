"""The examples in the docstrings of every module, run as tests. A module that can't be imported fails."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the files and not from pkgutil, which leaves out what it can't import.
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "sense_v2").rglob("*.py")
    if path.name != "__main__.py"  # importing it would run it
)


def test_the_modules_are_found() -> None:
    assert {"sense_v2", "sense_v2.core.config", "sense_v2.engram.variants"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).is_relative_to(ROOT), "another installation is tested"
    monkeypatch.chdir(tmp_path)  # an example that writes a file writes it there
    result = doctest.testmod(module)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} failed; see the output"
