"""What the pages show and the examples run in the tests' own process, which has imported all that they import."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """run_here(code or path, *arguments): runs it as a program in `tmp_path`; what it printed."""

    def run(program, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        capsys.readouterr()
        if isinstance(program, Path):
            runpy.run_path(str(program), run_name="__main__")
        else:
            exec(compile(program, "page", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run
