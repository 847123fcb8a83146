"""A fact is taught into rows alone, shipped, and undone bit for bit."""

import shutil

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.core.progress import no_progress
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.memory import memory_of
from sense_v2.hf.overlays import add_overlay, remove_overlay
from sense_v2.hf.training import teaching
from sense_v2.hf.training.teaching import teach

IDS = torch.tensor([[16, 19, 10, 4, 26, 10]])  # the fact's tokens, and one more
FACT = {"text": "word3 word1 Word8", "prompt": "word5 word6"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a table that was trained, and the fusion layers' weights."""
    folder = tmp_path_factory.mktemp("saved")
    model = attach_engram(tiny_model("llama"), tiny_config(folder), tiny_tokenizer())
    wake(model.engram)
    memory = memory_of(model)
    memory.storage.write(torch.tensor([0]), torch.zeros(1, 8))  # a commit needs something to commit
    weights = memory.layers.state_dict()
    detach_engram(model)
    return folder, weights


@pytest.fixture
def model(saved, tmp_path):
    for file in saved[0].iterdir():
        shutil.copy(file, tmp_path / file.name)
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path), mode="r")
    memory_of(model).layers.load_state_dict(saved[1])
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_fact_is_learned_by_rows_of_its_own_n_grams_and_nothing_else_moves(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = (tmp_path / "engram_table.dat").read_bytes()
    # The rows of the prompt's last position and of the text's, but for its last, behind which nothing is learned.
    row_ids = memory_of(model).hash_tokens(IDS[:, :5])[1][0, 0, 1:4].unique()
    taught = teach(model, tiny_tokenizer(), **FACT, lr=0.05, steps=12)
    assert taught.losses[-1] < taught.losses[0] - 0.2
    assert len(taught.losses) == 13
    assert torch.equal(taught.row_ids_U, row_ids)
    assert len(row_ids) >= 10
    assert bool((taught.distances_U > 0).all())
    assert taught.overlay is memory_of(model).storage
    assert torch.equal(taught.overlay.changed_ids, taught.row_ids_U)
    after = model.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        "engram._extra_state"
    }  # rows' sum
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules() if module is not taught.overlay.base)
    assert (tmp_path / "engram_table.dat").read_bytes() == table
    assert taught.overlay.gradients() is None


def test_undo_puts_every_bit_back_and_the_last_one_first(model):
    untouched = logits(model)
    first = teach(model, tiny_tokenizer(), **FACT, lr=0.05, steps=3)
    after_first = logits(model)
    second = teach(model, tiny_tokenizer(), "word3 word2", prompt="word5 word6", steps=3)
    with pytest.raises(ValueError, match="Undo what was taught later first"):
        first.undo()
    second.undo()
    assert torch.equal(logits(model), after_first)
    assert not torch.equal(after_first, untouched)
    first.undo()
    assert torch.equal(logits(model), untouched)
    assert len(first.overlay.changed_ids) == 0


def test_a_fact_is_shipped_as_a_small_file_that_does_the_same_on_a_copy(model, saved, tmp_path):
    taught = teach(model, tiny_tokenizer(), **FACT, lr=0.05, steps=5)
    taught.overlay.copy_to(tmp_path / "fact.safetensors", states=False)
    assert (tmp_path / "fact.safetensors").stat().st_size < 5_000
    assert read_delta(tmp_path / "fact.safetensors").row_ids_U.tolist() == taught.row_ids_U.tolist()
    other = attach_engram(tiny_model("llama"), tiny_config(saved[0]), mode="r")
    memory_of(other).layers.load_state_dict(saved[1])
    untouched = logits(other)
    add_overlay(other, tmp_path / "fact.safetensors", mode="r")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="has an overlay already"):
        add_overlay(other)
    remove_overlay(other)
    assert torch.equal(logits(other), untouched)
    with pytest.raises(ValueError, match="has no overlay"):
        remove_overlay(other)


def test_what_it_taught_before_is_a_file_where_the_overlay_has_one(model, tmp_path):
    overlay = add_overlay(model, tmp_path / "facts.safetensors")
    taught = teach(model, tiny_tokenizer(), **FACT, lr=0.05, steps=2)
    overlay.commit()
    taught.undo()
    assert len(overlay.changed_ids) == 0
    overlay.discard()
    assert torch.equal(overlay.changed_ids, taught.row_ids_U)
    detach_engram(model)


def test_teaching_stops_where_the_loss_is_low_enough(model):
    taught = teach(model, tiny_tokenizer(), **FACT, stop_below=100.0)
    assert len(taught.losses) == 1
    assert len(taught.row_ids_U) == 0
    taught.undo()


def test_a_text_that_the_model_does_not_say_is_tried_again_at_higher_rates_and_told(model, monkeypatch):
    tried = []

    def progress(label, total, **unit):
        tried.append(label)
        return no_progress(label, total, **unit)

    untouched = logits(model)
    taught = teach(model, tiny_tokenizer(), **FACT, lr=1e-6, steps=2, progress=progress)
    assert (taught.is_said, tried) == (False, ["teaching"])
    taught.undo()
    monkeypatch.setattr(teaching, "RATES", (1e-6, 0.5, 1e-5))
    taught = teach(model, tiny_tokenizer(), **FACT, steps=40, progress=progress)
    assert (taught.is_said, tried[1:]) == (True, ["teaching", "teaching at rate 0.5"])
    assert torch.equal(logits(model)[0, 1:4].argmax(-1), IDS[0, 2:5])
    taught.undo()
    # Where none does it, the nearest: not the last.
    monkeypatch.setattr(teaching, "RATES", (0.01, 1e-6))
    nearest = teach(model, tiny_tokenizer(), **FACT, steps=3)
    losses = nearest.losses
    rows_UD = nearest.overlay(nearest.row_ids_U)
    nearest.undo()
    alone = teach(model, tiny_tokenizer(), **FACT, steps=3, lr=0.01)
    assert not alone.is_said
    assert losses == alone.losses
    assert torch.equal(rows_UD, alone.overlay(alone.row_ids_U))
    alone.undo()
    assert torch.equal(logits(model), untouched)


def test_what_cant_be_taught_is_an_error_and_changes_nothing(model):
    untouched = logits(model)
    with pytest.raises(ValueError, match="'word3' has 1 token, and none"):
        teach(model, tiny_tokenizer(), "word3")
    with pytest.raises(FloatingPointError, match="lower lr"):
        teach(model, tiny_tokenizer(), **FACT, lr=float("nan"))
    assert torch.equal(logits(model), untouched)
    for layer in memory_of(model):
        torch.nn.init.zeros_(layer.W_v.weight)
    with pytest.raises(ValueError, match="never trained: W_v is zero"):
        teach(model, tiny_tokenizer(), **FACT)
