"""What `sense-engram` imports before it says anything: a help text needs no model library, and nothing slow.

benchmarks/startup.py measures how long it takes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL_LIBRARIES = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub"}
# typer's own: rich for boxes and colours, pydantic for values. Each takes longer than the rest of a help text.
SLOW = {"rich", "pydantic", "yaml"}

RUN = "import sys; from sense_v2.cli.main import main; status = main(sys.argv[1:]); print(status, *sys.modules)"


def run(*arguments: str) -> tuple[str, set[str]]:
    """(what was printed, the packages that were imported)"""
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    status, *modules = last.split()
    assert status == "0", done
    return "\n".join(printed), {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_it_has_is_said_without_anything_slow(option: str) -> None:
    printed, packages = run(option)
    assert "sense-engram" in printed
    assert packages & (MODEL_LIBRARIES | SLOW) == set()


@pytest.mark.parametrize("command", ["generate", "delta", "delta teach", "train"])
def test_the_help_of_a_command_loads_no_model_library(command: str) -> None:
    printed, packages = run(*command.split(), "--help")
    assert f"sense-engram {command}" in printed
    assert packages & (MODEL_LIBRARIES | {"rich", "yaml"}) == set()
