"""PEFT's adapters beside a memory: saved together, or refused where they are set up."""

import copy
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from test_copies import IDS, logits, train, with_memory
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.callback import EngramCallback

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}


def lora(model, **changes):
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(**{**LORA, **changes}))


def adapted_after(folder, base):
    return lora(attach_engram(base, tiny_config(folder), tiny_tokenizer()))


def attached_after(folder, base):
    return attach_engram(lora(base), tiny_config(folder), tiny_tokenizer())


@pytest.fixture
def base(tmp_path):
    """A model without memory, which an adapter can name."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = type(tiny_model("llama")).from_pretrained(tmp_path / "base")
    (tmp_path / "table").mkdir()
    return model


@pytest.mark.parametrize("make", [adapted_after, attached_after])
def test_an_adapter_is_saved_with_the_memory(tmp_path, base, make):
    model = make(tmp_path / "table", base)
    train_fusion(model)
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opened = from_pretrained(tmp_path / "saved")
    assert isinstance(opened, PeftModel)
    assert torch.equal(logits(opened), expected)
    with pytest.warns(UserWarning, match=r"memory_in_engram: open with sense_v2\.hf\.from_pretrained"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    given = from_pretrained(tmp_path / "saved", backbone=tiny_model("llama"))
    assert torch.equal(logits(given), expected)
    trained_on = from_pretrained(tmp_path / "saved", mode="r+")
    train(trained_on)
    expected = logits(trained_on)
    trained_on.save_pretrained(tmp_path / "saved")  # the table lies there
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), expected)
    with pytest.raises(ValueError, match=r"model\.save_pretrained\(folder\) saves the adapter and the memory"):
        save_pretrained(model, tmp_path / "function")
    detach_engram(model)
    model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "engram").exists()


def train_fusion(model):
    with torch.no_grad():
        for layer in memory_of(model):
            layer.W_v.weight.normal_(0, 0.3)


def test_a_trainers_save_model_keeps_the_memory_of_an_adapter(tmp_path, base):
    model = adapted_after(tmp_path / "table", base)
    train_fusion(model)
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, report_to="none", use_cpu=True, save_steps=2)
    blocks = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    trainer = Trainer(model, arguments, train_dataset=blocks, callbacks=[EngramCallback()])
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    for folder in ("saved", "run/checkpoint-2"):
        assert torch.equal(logits(from_pretrained(tmp_path / folder)), logits(model))


def test_adapters_of_other_names_share_the_memory(tmp_path, base):
    model = adapted_after(tmp_path / "table", base)
    train_fusion(model)
    model.add_adapter("other", LoraConfig(**LORA))
    model.set_adapter("other")
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["other"])
    assert torch.equal(logits(from_pretrained(tmp_path / "saved" / "other")), expected)


def test_an_adapter_that_names_no_base_asks_for_it(tmp_path):
    model = lora(with_memory(tmp_path / "table"))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"names no base_model_name_or_path.*backbone="):
        from_pretrained(tmp_path / "saved")
    opened = from_pretrained(tmp_path / "saved", backbone=tiny_model("llama"))
    assert torch.equal(logits(opened), logits(model))


def test_with_the_adapter_off_the_memory_stays_and_says_so(tmp_path, recwarn):
    model = lora(with_memory(tmp_path / "table"))
    with model.disable_adapter():
        before = logits(model)
    assert not [one for one in recwarn if "adapter is off" in str(one.message)]
    train(model)
    with pytest.warns(UserWarning, match="the adapter is off, and the memory stays on"), model.disable_adapter():
        assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_are_refused_where_they_are_set_up(tmp_path, kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"virtual tokens.*LoraConfig.*detach_engram"):
        get_peft_model(with_memory(tmp_path / "first"), config)
    wrapped = get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match=r"virtual tokens.*LoraConfig"):
        attach_engram(wrapped, tiny_config(tmp_path), tiny_tokenizer())
    assert not hasattr(wrapped, "engram")
    model = with_memory(tmp_path / "second")
    detach_engram(model)
    get_peft_model(model, config)(IDS)


def test_a_memory_is_no_module_to_save(tmp_path):
    model = with_memory(tmp_path / "table")
    with pytest.raises(ValueError, match=r"modules_to_save=\['engram'\]"):
        lora(model, modules_to_save=["engram"])


def test_an_adapter_inside_the_memory_trains_nothing_unseen(tmp_path):
    model = lora(with_memory(tmp_path / "table"), target_modules="all-linear")
    model(IDS)
    with pytest.raises(ValueError, match=r"reaches into the memory \(engram.*exclude_modules"):
        model.train()(IDS)


def test_layers_are_replicated_before_memory_is_attached(tmp_path):
    settings = {"layer_replication": [[0, 2], [1, 3]]}
    with pytest.raises(ValueError, match=r"layer_replication.*before attach_engram"):
        lora(with_memory(tmp_path / "table"), **settings)
    (tmp_path / "after").mkdir()
    model = attached_after_replication(tmp_path / "after", settings)
    train_fusion(model)
    whole = logits(model)
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).past_key_values
        parts = model(IDS[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(parts, whole[:, 5:], atol=1e-5, rtol=0)


def attached_after_replication(folder, settings):
    model = lora(tiny_model("llama"), **settings)
    return attach_engram(model, tiny_config(folder, layer_indices=[1, 3]), tiny_tokenizer())


def test_a_copy_of_a_wrapped_model_saves_itself(tmp_path, base):
    model = adapted_after(tmp_path / "table", base)
    train_fusion(model)
    copied, before = copy.deepcopy(model), logits(model)
    train_fusion(model)
    train(model)
    copied.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), before)
