"""Calls that change files fail below Python (a full disk, an input/output error), whoever makes them: NumPy's and
safetensors' as well. The table opens as of the last commit, and the model as it was or as it was to be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_base_and_taught

from sense_v2.cli.main import main
from sense_v2.hf.training.run import default_config

TESTS = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.slow,  # about 90 processes
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="a library is compiled and preloaded"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "faults.so"
    source = str(TESTS / "faults_below_python.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(path), source, "-ldl"], check=True)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "original"
    folder.mkdir()
    save_base_and_taught(folder)
    shutil.rmtree(folder / "table")
    delta = ["--output", str(folder / "delta.safetensors")]
    assert main(["delta", "export", str(folder / "taught"), "--base", str(folder / "base"), *delta]) == 0
    (folder / "corpus").mkdir()
    for number in range(6):
        words = [f"word{(number * 7 + place) % 30}" for place in range(300)]
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(words))
    config = default_config(None)
    config.train.commit_every, config.train.eval_sequences, config.train.eval_every, config.train.steps = 2, 4, 0, 3
    config.engram.table_size, config.train.batch_size, config.train.sequence_length = 2000, 2, 16
    config.save(folder / "run.yaml")
    return folder


@pytest.mark.parametrize(("operation", "moments"), [("commit", 40), ("apply", 40), ("save", 30), ("train", 12)])
def test_a_call_that_fails_below_python_loses_nothing(original, library, tmp_path, operation, moments):
    shutil.copytree(original, tmp_path / "original")
    ended = subprocess.run(
        [sys.executable, str(TESTS / "faults_below_python.py"), str(tmp_path / "original"), operation, str(moments)],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    counted = json.loads(ended.stdout.splitlines()[-1])
    print(operation, counted)
    assert counted["before"]
    assert counted["failed"] > 5
