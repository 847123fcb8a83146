"""`trainable_parameters`: the weights and the rows that training would change, whatever was frozen or wrapped."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.hf import attach_engram, detach_engram, memory_of, memory_off, trainable_parameters


def test_trainable_parameters_count_the_rows(tmp_path):
    model = tiny_model("llama")
    backbone = sum(weight.numel() for weight in model.parameters())
    assert trainable_parameters(model) == {"backbone": backbone, "fusion": 0, "rows": 0}
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    table = model.engram.storage
    fusion = sum(weight.numel() for name, weight in model.named_parameters() if name.startswith("engram."))
    rows = table.path.stat().st_size // 4
    assert trainable_parameters(model) == {"backbone": backbone, "fusion": fusion, "rows": rows}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("engram."))
    assert trainable_parameters(model) == {"backbone": 0, "fusion": fusion, "rows": rows}
    table.requires_grad_(False)
    assert trainable_parameters(model)["rows"] == 0
    detach_engram(model)
    attach_engram(model, tiny_config(tmp_path), mode="r")
    assert trainable_parameters(model)["rows"] == 0


def test_trainable_parameters_of_a_lora_beside_the_memory(tmp_path):
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path), tiny_tokenizer())
    wrapper = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter = sum(weight.numel() for name, weight in wrapper.named_parameters() if ".lora_" in name)
    # PEFT has frozen the fusion layers; the rows are no parameters of the model.
    rows = model.engram.storage.path.stat().st_size // 4
    assert trainable_parameters(wrapper) == {"backbone": adapter, "fusion": 0, "rows": rows}


def test_the_memory_is_off_for_a_while_by_its_public_names(tmp_path):
    ids = torch.arange(2, 10)[None]
    model = tiny_model("llama").eval()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        attach_engram(model, tiny_config(tmp_path, init_std=1.0), tiny_tokenizer())
        for fusion in memory_of(model):
            torch.nn.init.normal_(fusion.W_v.weight)
        changed = model(ids, use_cache=False).logits
        for off in (lambda: memory_off(memory_of(model)), lambda: memory_off(model), model.disable_memory):
            with off():
                assert torch.equal(model(ids, use_cache=False).logits, before)
            assert torch.equal(model(ids, use_cache=False).logits, changed)
    assert not torch.equal(changed, before)
    with pytest.raises(ValueError, match="layer 7 has no memory"), model.disable_memory([7]):
        pass
    detach_engram(model)
    assert not hasattr(model, "disable_memory")
    with pytest.raises(ValueError, match="no memory attached"), memory_off(model):
        pass


def test_the_memory_of_a_copy_and_of_a_wrapped_model_is_off_by_its_own_method(tmp_path):
    ids = torch.arange(2, 10)[None]
    model = attach_engram(tiny_model("llama").eval(), tiny_config(tmp_path), tiny_tokenizer())
    wake(memory_of(model))
    copied = copy.deepcopy(model)
    wrapper = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        bare, changed = tiny_model("llama").eval()(ids).logits, copied(ids).logits
        assert not torch.equal(bare, changed)
        with copied.disable_memory():
            assert torch.equal(copied(ids, use_cache=False).logits, bare)
            assert torch.equal(wrapper(ids, use_cache=False).logits, changed)
        with wrapper.disable_memory():
            assert torch.equal(wrapper(ids, use_cache=False).logits, bare)
            assert torch.equal(copied(ids, use_cache=False).logits, changed)
