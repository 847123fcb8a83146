"""Copies of a model with memory have the rows of their moment, or are refused."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.engram.optim import RowAdam
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10]])


def with_memory(folder, **changes):
    folder.mkdir(exist_ok=True)
    model = attach_engram(tiny_model("llama"), tiny_config(folder, **changes), tiny_tokenizer())
    wake(memory_of(model))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def train(model, steps=1):
    """Moves the rows and nothing else."""
    rows = RowAdam(memory_of(model).storage, lr=0.1)
    for _ in range(steps):
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        rows.step()
        rows.zero_grad()


def references(model, folder):
    """Every way to keep a model that doesn't move."""
    from trl.experimental.utils import create_reference_model

    memory_of(model).storage.commit()
    model.save_pretrained(folder)
    trained_in_place = from_pretrained(folder, mode="r+")
    others = [from_pretrained(folder), copy.deepcopy(trained_in_place), create_reference_model(trained_in_place)]
    return trained_in_place, [*others, pickle.loads(pickle.dumps(trained_in_place))]


def test_a_reference_stays_while_the_model_trains(tmp_path):
    model, others = references(with_memory(tmp_path / "table"), tmp_path / "saved")
    before = logits(model)
    for _ in range(2):
        train(model)
        memory_of(model).storage.commit()
        assert (logits(model) - before).abs().max() > 0.01
        for other in others:
            assert torch.equal(logits(other), before)


def test_a_copy_of_a_moment_is_saved_as_it_is(tmp_path):
    model = with_memory(tmp_path / "table")
    train(model)  # not committed
    best, before = copy.deepcopy(model), logits(model)
    train(model)
    best.save_pretrained(tmp_path / "best")
    assert torch.equal(logits(from_pretrained(tmp_path / "best")), before)
    model.save_pretrained(tmp_path / "saved")
    model = from_pretrained(tmp_path / "saved", mode="r+")
    best = copy.deepcopy(model)
    train(model)
    with pytest.raises(ValueError, match=r"has gone on since this model was copied.*choose another folder"):
        best.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="has gone on since this model was copied"):
        best.save_pretrained(tmp_path / "named", table="reference")


def test_weights_are_not_loaded_beside_other_rows(tmp_path):
    model = with_memory(tmp_path / "table")
    train(model)
    kept = copy.deepcopy(model.state_dict())
    assert model.load_state_dict(kept).missing_keys == []
    memory_of(model).storage.commit()
    model.load_state_dict(kept)  # the same rows
    train(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        kept["lm_head.weight"].mul_(2)
    for loaded, state in (
        (model, kept),
        (memory_of(model), {n[7:]: v for n, v in kept.items() if n[:7] == "engram."}),
    ):
        for strict in (True, False):
            with pytest.raises(ValueError, match=r"(?s)other rows than the table.*save_pretrained.*_extra_state"):
                loaded.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    del kept["engram._extra_state"]
    assert model.load_state_dict(kept).missing_keys == []


def test_accelerates_state_is_not_loaded_beside_other_rows(tmp_path):
    model = with_memory(tmp_path / "table")
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state")
    before = logits(prepared)
    train(prepared)
    with pytest.raises(ValueError, match="other rows than the table"):
        accelerator.load_state(tmp_path / "state")
    assert not torch.equal(logits(prepared), before)


def test_a_memory_is_not_copied_without_its_model(tmp_path):
    model = with_memory(tmp_path / "table")
    with pytest.raises(ValueError, match=r"a memory is copied with its model.*modules_to_save"):
        copy.deepcopy(memory_of(model))
    assert copy.deepcopy(model).engram is not model.engram
