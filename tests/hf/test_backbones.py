"""Where a saved model runs, and in which type."""

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer

from sense_v2.core.errors import CommandError
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.backbones import device_of, open_trained
from sense_v2.hf.saving.save import save_pretrained


@pytest.fixture
def folder(tmp_path):
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path), tiny_tokenizer())
    save_pretrained(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    model.engram.storage.close()
    return tmp_path / "model"


@pytest.mark.parametrize("found", ["cuda", "xpu", "mps", None])
def test_auto_is_the_accelerator_that_torch_finds_or_the_cpu(found, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(found or "cpu"))
    assert device_of("auto") == torch.device(found or "cpu")
    assert device_of("cpu") == torch.device("cpu")


def test_a_model_moves_to_the_device_and_takes_the_type(folder, monkeypatch):
    moved, move = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to, **how: (moved.append(to), move(self))[1])
    model, _ = open_trained(folder, device="cuda:1", dtype="bfloat16")
    assert (torch.device("cuda:1"),) in moved
    assert model.dtype == torch.bfloat16
    assert model(torch.arange(12)[None]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["quantum", "cuda:-1", "xpu:7"])
def test_a_device_that_is_not_there_is_named_with_the_way_out(folder, name):
    with pytest.raises(CommandError, match=rf"--device {name}: .*cpu"):
        open_trained(folder, device=name)


def test_a_type_that_is_none_is_named_with_those_that_are(folder):
    with pytest.raises(CommandError, match=r"--dtype foo: .*bfloat16"):
        open_trained(folder, dtype="foo")
