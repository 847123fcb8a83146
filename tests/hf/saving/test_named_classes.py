"""A saved folder opens right whatever class opens it, and a checkpoint of experts is resumed with its experts."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_copies import IDS, logits, train
from test_trainer import arguments, blocks, check_resumes_bit_for_bit
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.trainer import EngramTrainer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}


def experts(name="mixtral"):
    torch.manual_seed(0)
    small = {**SIZES, "moe_intermediate_size": 16}
    if name == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    elif name == "qwen2_moe":
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**small, num_experts=4, shared_expert_intermediate_size=16))
    else:
        sizes = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**small, **sizes, **ranks))
    return model.eval()


def with_memory(folder, model):
    folder.mkdir(exist_ok=True)
    attach_engram(model, tiny_config(folder), tiny_tokenizer())
    wake(memory_of(model))
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_named_class_opens_the_backbone_as_it_was_saved(tmp_path, name):
    model = with_memory(tmp_path / "table", experts(name))
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    named = type(model).from_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        given = from_pretrained(tmp_path / "saved", backbone=named)
        opened = from_pretrained(tmp_path / "saved")
    for found in (given, opened, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert torch.equal(logits(found), expected)
    assert given.config.model_type == name
    assert not hasattr(given.config, "backbone_model_type")
    given.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["backbone_model_type"] == name
    bare = detach_engram(model)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), logits(bare))


def test_a_mamba_that_a_named_class_opened_is_known_for_one(tmp_path):
    model = with_memory(tmp_path / "table", tiny_model("mamba"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    backbone = MambaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved", backbone=backbone)), expected)


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_experts_are_resumed_bit_for_bit(tmp_path, monkeypatch):
    def attached(folder, **_):
        return attach_engram(experts("qwen2_moe"), tiny_config(folder), tiny_tokenizer())

    check_resumes_bit_for_bit(tmp_path, monkeypatch, attached)


def test_a_checkpoint_whose_weights_a_trainer_cant_find_is_refused(tmp_path):
    model = with_memory(tmp_path / "table", experts())
    settings = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    EngramTrainer(model, settings, train_dataset=blocks()).train()
    path = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    renamed = {name.replace(".gate.", ".router."): value for name, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model\.layers\.0\.mlp\.gate\.weight.*from_pretrained\("):
        EngramTrainer(model, settings, train_dataset=blocks()).train(resume_from_checkpoint=str(path.parent))


def test_a_trained_checkpoint_of_experts_opens_by_any_class(tmp_path):
    model = with_memory(tmp_path / "table", experts())
    settings = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    EngramTrainer(model, settings, train_dataset=blocks()).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert torch.equal(logits(from_pretrained(checkpoint)), logits(model))
    train(model)
    named = MixtralForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(named(IDS).logits, detach_engram(model)(IDS).logits)
