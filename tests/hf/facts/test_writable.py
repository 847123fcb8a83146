"""Fusion layers learn to carry facts; the table and all rows stay as they were."""

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.facts.facts_file import Fact
from sense_v2.hf.facts.teach_facts import Descent, teach_facts
from sense_v2.hf.facts.writable import make_writable
from sense_v2.hf.memory import memory_of
from sense_v2.hf.overlays import add_overlay, overlay_of, remove_overlay

TAUGHT = ("word3 {subject} word4", "{subject} word6 word7")
FACTS = [Fact("word20 word21 word22", "word1", TAUGHT), Fact("word23 word24 word25", "word2", TAUGHT)]
OTHERS = [Fact(f"word{n} word{n + 1} word{n + 2}", f"word{n % 5}", TAUGHT) for n in (12, 15, 18, 26)]


@pytest.fixture
def model(tmp_path):
    """A fresh memory, its table only read."""
    config = tiny_config(tmp_path, table_size=8_000)
    detach_engram(attach_engram(tiny_model("llama"), config, tiny_tokenizer()))
    return attach_engram(tiny_model("llama"), config, mode="r")


def test_a_fresh_memory_takes_facts_in_rows_alone_once_it_is_writable(model, tmp_path):
    with pytest.raises(ValueError, match=r"W_v is zero.*make it writable"):
        teach_facts(model, tiny_tokenizer(), FACTS)
    table = (tmp_path / "engram_table.dat").read_bytes()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = make_writable(model, tiny_tokenizer(), facts=OTHERS, steps=60)
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("engram.layers.") and not name.endswith("bias") for name in changed)
    assert (tmp_path / "engram_table.dat").read_bytes() == table
    assert overlay_of(model) is None
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    fusion = {name: value.clone() for name, value in memory_of(model).layers.state_dict().items()}
    done = teach_facts(model, tiny_tokenizer(), FACTS, neutral=[[16, 19, 10, 4]], lr=0.3, steps=200)
    assert done.report["loss"][1] < done.report["loss"][0]
    assert all(torch.equal(value, fusion[name]) for name, value in memory_of(model).layers.state_dict().items())


def test_what_ends_it_leaves_the_fusion_layers_as_they_were(model, monkeypatch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = Descent.step

    def interrupted(descent, *arguments):
        step(descent, *arguments)
        if len(descent.losses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Descent, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_writable(model, tiny_tokenizer(), facts=OTHERS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    add_overlay(model)
    with pytest.raises(ValueError, match="remove_overlay"):
        make_writable(model, tiny_tokenizer(), facts=OTHERS)
    remove_overlay(model)
