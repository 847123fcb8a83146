"""A run of `fit` that ends anywhere goes on as the one that nothing happened to, bit for bit."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

from sense_v2.core.config import TrainConfig
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.data.corpus import Batches
from sense_v2.hf.data.streaming import PackedStream, StreamBatches, open_documents
from sense_v2.hf.insight.evaluation import evaluate
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fit import fit, resumable_checkpoint

SETTINGS = TrainConfig(
    steps=9, batch_size=2, sequence_length=12, warmup_steps=2, row_optimizer="adam", commit_every=2, eval_every=3
)
HELD_OUT = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(9))


def resident(folder, seed=0):
    tokens = np.tile(np.random.default_rng(seed).integers(3, VOCABULARY, 40), 6)
    return Batches(tokens, batch_size=2, sequence_length=12, seed=0)


def streamed(folder, seed=0):
    path = folder / "texts.jsonl"
    if not path.exists():
        generator = np.random.default_rng(seed)
        texts = [" ".join(f"word{token}" for token in generator.integers(1, 30, 9)) for _ in range(40)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"sequence_length": 12, "separator_id": 2, "buffer_blocks": 4, "seed": seed}
    return StreamBatches(PackedStream(open_documents(path), tiny_tokenizer(), **settings), batch_size=2)


def run(folder, batches, *, memory=True, dies_at=None, stops_at=None, resumes=False):
    """(history, model) after training in `folder`; with `dies_at` it ends there as a kill would, uncommitted."""
    gc.collect()  # a run that died has let go of the table by then
    torch.manual_seed(3)
    model = tiny_model("llama", attention_dropout=0.2)  # the random generator's state counts
    if memory:
        attach_engram(model, tiny_config(folder, init_std=0.0), tiny_tokenizer())
    taken = []

    def on_step(history):
        taken.append(history.steps[-1])
        if taken[-1] == dies_at:
            raise KeyboardInterrupt

    history = fit(
        model,
        batches,
        SETTINGS,
        evaluate=lambda model: evaluate(model, HELD_OUT),
        on_step=on_step,
        should_stop=lambda: stops_at in taken,
        folder=folder / "training",
        resumes=resumes,
    )
    return history, model


def outcome(history, model, folder):
    table = [path.read_bytes() for path in sorted(folder.glob("engram_table*.dat"))]
    evals = [{**one, "seconds": None} for one in history.evals]
    weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    return history.steps, history.train_loss, evals, weights, table, history.stopped


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("make_batches", [resident, streamed])
def test_a_run_that_died_goes_on_bit_for_bit(tmp_path, make_batches, memory):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = outcome(*run(whole, make_batches(whole), memory=memory), whole)
    for dies_at in (5, 6, 7):  # after a step without a commit, with one, and in the second life
        with pytest.raises(KeyboardInterrupt):
            run(cut, make_batches(cut), memory=memory, dies_at=dies_at, resumes=dies_at > 5)
    history, model = run(cut, make_batches(cut), memory=memory, resumes=True)
    assert outcome(history, model, cut) == expected
    assert history.steps == list(range(1, 10))
    assert [one["step"] for one in history.evals] == [3, 6, 9]


@pytest.mark.parametrize("stops_at", [1, 4, 9])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, stops_at):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = outcome(*run(whole, resident(whole)), whole)
    history, model = run(cut, resident(cut), stops_at=stops_at)
    assert len(history.steps) == stops_at
    assert history.stopped is (stops_at < 9)
    memory_of(model).storage.close()
    history, model = run(cut, resident(cut), resumes=True)
    assert outcome(history, model, cut) == expected


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_the_file_of_the_tables_commit_is_there_whatever_moment_it_dies_at(tmp_path, monkeypatch):
    """Between the file and the commit as well; and no more than two files are ever there."""
    from sense_v2.engram.storage import MMapEmbeddingStorage

    commit = MMapEmbeddingStorage.commit
    commits, files = [], []

    def dying(self, **given):
        files.append(sorted(path.name for path in (tmp_path / "training").iterdir()))
        commits.append(given)
        if len(commits) == 3:
            raise KeyboardInterrupt
        return commit(self, **given)

    monkeypatch.setattr(MMapEmbeddingStorage, "commit", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, resident(tmp_path))
    monkeypatch.undo()
    assert files == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
    ]
    history, _ = run(tmp_path, resident(tmp_path), resumes=True)
    assert history.steps == list(range(1, 10))


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_another_text_and_another_model_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, resident(tmp_path), dies_at=3)
    with pytest.raises(ValueError, match="the text isn't the one that the run began with"):
        run(tmp_path, resident(tmp_path, seed=1), resumes=True)
    gc.collect()
    model = attach_engram(tiny_model("llama", layers=2), tiny_config(tmp_path, init_std=0.0), tiny_tokenizer())
    with pytest.raises(ValueError, match="parameter group that doesn't match"):
        fit(model, resident(tmp_path), SETTINGS, folder=tmp_path / "training", resumes=True)


@pytest.mark.parametrize("memory", [True, False])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, memory):
    expected = outcome(*run(tmp_path / "whole", resident(tmp_path), memory=memory), tmp_path / "whole")
    _, model = run(tmp_path / "cut", resident(tmp_path), memory=memory, stops_at=5)
    if memory:
        memory_of(model).storage.close()
    half = tmp_path / "cut" / "training" / "checkpoint-7"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half of it")
    (half / "trainer_state.json").write_text("{")
    history, model = run(tmp_path / "cut", resident(tmp_path), memory=memory, resumes=True)
    assert outcome(history, model, tmp_path / "cut") == expected


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, resident(tmp_path), dies_at=1)
    gc.collect()
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path, init_std=0.0), tiny_tokenizer())
    assert resumable_checkpoint(tmp_path / "training", model) is None


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_a_checkpoint_whose_memory_was_written_in_part_is_passed_over(tmp_path, monkeypatch):
    """Killed before its last file: its rows are in the table, and it never passes for one with rows of its own."""
    from sense_v2.hf.training import checkpoint

    written = Path.write_text

    def dying(path, *arguments, **options):
        if path.name == checkpoint.IN_TABLE_FILE and path.parent.parent.name == "checkpoint-4":
            raise KeyboardInterrupt
        return written(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, resident(tmp_path))
    monkeypatch.undo()
    gc.collect()
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path, init_std=0.0), tiny_tokenizer())
    assert resumable_checkpoint(tmp_path / "training", model) == tmp_path / "training" / "checkpoint-2"
