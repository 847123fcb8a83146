"""docs/training.md's code blocks run one after the other; the examples run as they stand, short."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments, folder):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_guides_code_runs(tmp_path):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 6
    run("-c", "\n".join(blocks), folder=tmp_path)
    assert (tmp_path / "runs/guide/checkpoint-8/engram/engram_table.dat").exists()


def corpus(folder):
    folder.mkdir()
    for number in range(30):
        text = "".join(f"def f{line}(x): return x + {line % 7} + {number}\n" for line in range(80))
        (folder / f"{number:02}.py").write_text(text)
    return folder


def perplexities(out):
    (line,) = (line for line in out.splitlines() if line.startswith("held-out perplexity"))
    return [float(number) for number in re.findall(r"\d+\.\d", line)]


def test_the_trainers_example_learns_and_resumes(tmp_path):
    script = str(ROOT / "examples" / "train_trainer.py")
    arguments = (script, "--corpus", str(corpus(tmp_path / "texts")))
    before, after = perplexities(run(*arguments, "--steps", "60", folder=tmp_path))
    assert after < before / 2
    assert "after 61 steps" in run(*arguments, "--steps", "61", "--resume", folder=tmp_path)
    assert (tmp_path / "runs/trainer/engram/config.json").exists()


def test_the_retrofit_leaves_the_model_as_it_was(tmp_path):
    script = str(ROOT / "examples" / "retrofit.py")
    out = run(script, "--corpus", str(corpus(tmp_path / "texts")), "--steps", "20", folder=tmp_path)
    before, after = perplexities(out)
    assert after < before
    assert "what it was, bit for bit" in out
