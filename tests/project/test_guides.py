"""The code blocks of docs/huggingface.md run one after the other, and the examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments, folder):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["huggingface.md"])
def test_a_guides_code_runs(tmp_path, name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 8
    run("-W", "error::FutureWarning", "-c", "\n".join(blocks), folder=tmp_path)
    assert (tmp_path / "data/engram_table.dat").exists()


def test_the_preparing_guides_code_runs(tmp_path):
    text = (ROOT / "docs" / "preparing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "serve nan" not in run("-c", block, folder=tmp_path)


def test_the_example_generates_what_it_learned_and_leaves_nothing(tmp_path):
    out = run(str(ROOT / "examples" / "generate.py"), folder=tmp_path)
    lines = [line.split("…", 1)[1] for line in out.splitlines() if "…" in line]
    assert len(lines) == 7
    assert (
        lines[0] == lines[1] == lines[2] == " what it knows about the last few words, and a gate decides how much of"
    )
    assert lines[4].startswith(" learned stays in the table")
    assert list(tmp_path.iterdir()) == []
