"""A pretrained model learns new text in each way, and is what it was after each; the figures are those of NumPy."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import tiny_model, write_corpus
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import CommandError
from sense_v2.hf.backbones import open_trained
from sense_v2.hf.experiments import pretrained
from sense_v2.hf.experiments.pretrained import WAYS, adapted, pretrained_settings, run_pretrained, young_code
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fresh_model import train_bpe


@pytest.fixture
def folder(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    tokenizer = train_bpe([path.read_text() for path in corpus.iterdir()])
    tiny_model("llama", vocabulary=tokenizer.get_vocab_size()).save_pretrained(tmp_path / "plain")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "plain")
    return tmp_path


MEMORY = EngramConfig(table_size=4000, engram_dim=64, num_heads=2, layer_indices=[1], init_std=0.0)


def run(folder, **more):
    model = str(folder / "plain")
    settings = pretrained_settings(model, steps=8, batch_size=2, sequence_length=16, eval_sequences=6)
    return run_pretrained(
        model, [folder / "corpus"], folder / "out", settings=settings, engram=MEMORY, **more
    ), folder / "out" / "model"


def test_each_way_learns_and_what_it_loses_is_told(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "SAMPLE_TOKENS", 12)
    results, saved = run(folder)
    json.dumps(results, allow_nan=False)
    runs = results["runs"]
    assert set(runs) == set(WAYS)
    untouched = runs.pop("untouched")
    assert (untouched["steps"], untouched["damage"], untouched["trained"]) == (0, None, {"fusion": 0, "lora": 0})
    counted = runs.pop("counted")
    assert (counted["steps"], counted["trained"]) == (0, {"fusion": 0, "lora": 0})
    assert counted["loss"] < untouched["loss"]
    assert all(one["loss"] < untouched["loss"] and one["damage"]["divergence"] > 0 for one in runs.values())
    assert runs["both"]["loss"] < runs["memory"]["loss"] < runs["random_rows"]["loss"]
    assert {name: one["steps"] for name, one in runs.items() if name != "lora"} == dict.fromkeys(
        ("memory", "both", "random_rows"), 8
    )
    times = results["step_times"]
    counting = counted["seconds"] / times["seconds"]["lora"]["median"]
    assert runs["lora"]["steps"] == max(1, round(8 * times["ratio"] + counting))
    assert runs["memory"]["seconds"] > counted["seconds"] > 0
    fusion, lora = runs["memory"]["trained"]["fusion"], runs["lora"]["trained"]["lora"]
    assert fusion > 0 < lora
    assert runs["memory"]["trained"]["lora"] == 0 == runs["lora"]["trained"]["fusion"]
    assert runs["both"]["trained"] == {"fusion": fusion, "lora": lora}
    change = results["changes"]["both - lora"]
    assert change["mean"] == pytest.approx(runs["both"]["loss"] - runs["lora"]["loss"])
    assert change["low"] <= change["mean"] <= change["high"]
    gains = [untouched["loss"] - runs[name]["loss"] for name in ("random_rows", "memory")]
    assert results["random_rows_keep"] == pytest.approx(gains[0] / gains[1])
    assert {"prompt", *WAYS} == set(results["generations"][0])
    # What is saved is the model with its memory, which names its backbone.
    model, tokenizer = open_trained(saved)
    assert not list(saved.glob("model*.safetensors"))
    assert [path.name for path in saved.iterdir() if path.is_dir()] == ["engram"]
    assert memory_of(model).storage.weight.any()
    assert tokenizer.vocab_size == model.config.vocab_size


def test_without_controls_there_are_three_ways(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "SAMPLE_TOKENS", 4)
    results, _ = run(folder, controls=False)
    assert list(results["runs"]) == ["untouched", "counted", "memory", "lora"]
    assert results["random_rows_keep"] is None
    assert set(results["changes"]) == {
        f"{one} - {other}" for one in ("counted", "memory") for other in ("untouched", "lora")
    }


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_adapted_model_is_afterwards_what_it_was(folder, memory, rank):
    model = AutoModelForCausalLM.from_pretrained(folder / "plain").eval()
    names, token_ids_BT = list(model.state_dict()), torch.randint(0, 90, (2, 9))
    before = model(token_ids_BT).logits
    where = {"storage_path": str(folder / "table.dat"), "shadow_map_path": str(folder / "map.npy")}
    config = dataclasses.replace(MEMORY, **where) if memory else None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "plain")
    with adapted(model, config, rank, tokenizer) as learner:
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1)
        assert torch.equal(learner(token_ids_BT).logits, before) == (not rank and not memory)
    assert list(model.state_dict()) == names
    assert torch.equal(model(token_ids_BT).logits, before)


def test_the_interval_is_of_differences_between_the_same_sequences():
    """Two ways that differ by the same on every sequence, however unlike the sequences are."""
    found = pretrained._change(np.full(20, -0.25), seed=0)
    assert found == {"mean": -0.25, "low": -0.25, "high": -0.25}


def test_the_corpus_is_one_file_an_architecture():
    name, files = young_code()
    assert len(files) > 100
    assert all(path.is_file() for path in files)
    assert "modeling_llama.py" in {path.name for path in files}
    assert not [path for path in files if path.name.startswith("modular")]
    assert "transformers" in name


def test_a_model_that_is_not_there_is_refused_before_anything_is_made(folder):
    (folder / "empty").mkdir()
    with pytest.raises((CommandError, OSError, ValueError)):
        run_pretrained(str(folder / "empty"), [folder / "corpus"], folder / "out")
    assert not (folder / "out").exists()
