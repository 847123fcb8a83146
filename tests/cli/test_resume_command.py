"""`sense-engram train` on corpora that it reads while it trains, and `--resume`: the run that nothing happened to."""

import gc
import json
import re
import signal

import numpy as np
import pytest
from test_cli import content
from tiny import write_corpus
from transformers import AutoModelForCausalLM

from sense_v2.cli import train
from sense_v2.core.config import Config
from sense_v2.hf.data import large_corpus
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training import run as run_module

SMALL = ("--batch-size", 2, "--sequence-length", 16, "--table-size", 2000, "--steps", 6)

MEMORY_PARTS = ("engram_table.dat", "engram_table.adagrad.dat", "fusion.safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")


@pytest.fixture
def settings(tmp_path):
    """A checkpoint every second step."""
    config = run_module.default_config(None)
    config.train.commit_every, config.train.eval_sequences, config.train.warmup_steps = 2, 4, 1
    config.save(tmp_path / "run.yaml")
    return ("--config", tmp_path / "run.yaml", *SMALL)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Few and short: the stream's place, its second round included, decides what is trained on."""
    path = tmp_path_factory.mktemp("documents") / "texts.jsonl"
    texts = [f"def function_{n % 9}(value):\n    return value + {n}\n" for n in range(60)]
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def ends(monkeypatch):
    """ends(3, how): what happens once, when a run has taken three steps."""
    show = train.TrainingProgress.__call__

    def at(step, happening):
        def call(progress, history):
            show(progress, history)
            if history.steps[-1] == step:
                monkeypatch.setattr(train.TrainingProgress, "__call__", show)
                happening()

        monkeypatch.setattr(train.TrainingProgress, "__call__", call)

    return at


def fail():
    raise OSError("the machine gave up")


def trained_parts(folder):
    parts = (
        "model.safetensors",
        "engram/engram_table.dat",
        "engram/fusion.safetensors",
        "engram/engram_table.adagrad.dat",
    )
    return {part: (folder / part).read_bytes() for part in parts}


@pytest.mark.parametrize("kind", ["text", "documents"])
def test_a_run_that_failed_is_resumed(run, run_json, settings, corpus, documents, tmp_path, ends, kind):
    text = ("--corpus", corpus) if kind == "text" else ("--corpus", documents, "--text-column", "content")
    whole = run_json("train", *text, *settings, "--output", tmp_path / "whole")
    ends(5, fail)
    status, _, error = run("train", *text, *settings, "--output", tmp_path / "cut")
    assert status == 1
    assert "the machine gave up" in error
    assert not (tmp_path / "cut" / "config.json").exists()
    gc.collect()
    found = run_json("train", "--resume", "--output", tmp_path / "cut")
    times = ("seconds", "train_seconds", "tokens_per_second", "output")
    assert {name: found[name] for name in found if name not in times} == {
        name: whole[name] for name in whole if name not in times
    }
    assert trained_parts(tmp_path / "cut") == trained_parts(tmp_path / "whole")
    assert sorted(content(tmp_path / "cut")) == sorted(content(tmp_path / "whole"))
    assert memory_of(AutoModelForCausalLM.from_pretrained(tmp_path / "cut")).storage.committed_step == 6
    status, _, error = run("train", "--resume", "--output", tmp_path / "cut")
    assert status == 1
    assert "holds no run that could go on: the model there took all its steps" in error


def test_a_run_that_was_stopped_is_a_model_and_is_resumed(
    run, run_json, settings, corpus, tmp_path, ends, monkeypatch
):
    run_json("train", "--corpus", corpus, *settings, "--output", tmp_path / "whole")
    cut = tmp_path / "cut"
    ends(3, lambda: signal.raise_signal(signal.SIGINT))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = run_json("train", "--corpus", corpus, *settings, "--output", cut, status=130)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (stopped["steps"], stopped["stopped"]) == (3, True)
    assert run_json("generate", cut, "def function", "--max-new-tokens", 2)["tokens"] == 2
    before = content(cut)
    status, _, error = run("train", "--corpus", corpus, *settings, "--output", cut)
    assert status == 1
    assert "--resume goes on with it, which was stopped" in error
    status, _, error = run("train", "--resume", "--steps", 9, "--output", cut)
    assert status == 2
    assert "the run goes on with the settings it began with: leave --steps out" in error
    assert content(cut) == before
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_corpus", lambda *_, **__: fail())
        assert run("train", "--resume", "--output", cut)[0] == 1
    assert content(cut) == before

    found = run_json("train", "--resume", "--output", cut)
    assert (found["steps"], found["stopped"]) == (6, False)
    assert trained_parts(cut) == trained_parts(tmp_path / "whole")
    assert sorted(content(cut)) == sorted(content(tmp_path / "whole"))
    assert Config.load(cut / "config.yaml").engram.storage_path == str(cut / "engram" / "engram_table.dat")


def test_a_run_that_ended_after_its_last_checkpoint_says_what_it_learned(
    run, run_json, settings, corpus, tmp_path, monkeypatch
):
    """All steps are taken by then, so none is evaluated on the way."""
    whole = run_json("train", "--corpus", corpus, *settings, "--output", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_save", lambda *_: fail())
        assert run("train", "--corpus", corpus, *settings, "--output", tmp_path / "cut")[0] == 1
    gc.collect()
    found = run_json("train", "--resume", "--output", tmp_path / "cut")
    assert found["perplexity"] == whole["perplexity"]
    assert found["bits_per_byte"] == whole["bits_per_byte"]
    card = [(tmp_path / name / "README.md").read_text().replace(name, "") for name in ("cut", "whole")]
    assert [line for line in card[0].splitlines() if "per" in line] == [
        line for line in card[1].splitlines() if "per" in line
    ]


def test_what_cannot_be_resumed(run, settings, corpus, tmp_path, ends):
    status, _, error = run("train", "--resume", "--output", tmp_path / "nothing")
    assert status == 1
    assert "holds no run that could go on" in error

    ends(1, fail)
    assert run("train", "--corpus", corpus, *settings, "--output", tmp_path / "early")[0] == 1
    assert list((tmp_path / "early").glob("*")) == []  # before a checkpoint, nothing is kept

    changing = tmp_path / "texts"
    write_corpus(changing, files=2)  # one of them is held out
    ends(3, fail)
    assert run("train", "--corpus", changing, *settings, "--output", tmp_path / "cut")[0] == 1
    for number in range(2):
        gc.collect()
        file = changing / f"module_{number}.py"
        text = file.read_text()
        file.write_text(text.replace("value", "other"))
        status, _, error = run("train", "--resume", "--output", tmp_path / "cut")
        assert status == 1, error
        assert re.search("isn't the one that the run began with", error)
        file.write_text(text)
    gc.collect()
    assert run("train", "--resume", "--output", tmp_path / "cut")[0] == 0


def test_a_large_text_is_streamed_and_evaluated_alike(run_json, settings, corpus, tmp_path, monkeypatch):
    """With the limit lowered: the same folder is then read while it trains."""
    monkeypatch.setattr(large_corpus, "MAX_RESIDENT_BYTES", 1000)
    found = run_json("train", "--corpus", corpus, *settings, "--output", tmp_path / "run")
    assert found["corpus"]["files"] is None
    assert found["perplexity"]["after"] < found["perplexity"]["before"]
    again = run_json("eval", tmp_path / "run", "--corpus", corpus)
    assert np.isclose(again["perplexity"]["with_memory"], found["perplexity"]["after"], rtol=1e-6)
