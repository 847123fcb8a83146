"""Families of models: how each calls its layers is found out at attaching, and what can't have memory is refused."""

import pytest
import torch
from test_generation import assert_generates, assert_same, full_logits, padded, some_ids
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from sense_v2.hf.attach import attach_engram
from sense_v2.hf.memory import attached_memory

COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **COMMON}


def qwen2_vl():
    text = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def minimax():
    """Its cache has a list of its own beside `layers`, and breaks where these are made before their time."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "block_size": 4}
    kinds = {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    return MiniMaxForCausalLM(MiniMaxConfig(**SIZES, **sizes, **kinds))


FAMILIES = {
    # Their layers are handed no arguments.
    "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SIZES)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **COMMON)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=128, **COMMON)),
    "minimax": minimax,
    "qwen2_vl": qwen2_vl,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_generate_with_memory(tmp_path, family):
    torch.manual_seed(0)
    model, ids = FAMILIES[family]().eval(), some_ids()
    model.generation_config.eos_token_id = None
    bare = full_logits(model, ids)
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    assert_same(full_logits(model, ids), bare)
    wake(model.engram)
    assert not torch.allclose(full_logits(model, ids), bare, atol=1e-2)
    assert_generates(model, ids)
    assert_generates(model, *padded())


def xlnet():
    return XLNetLMHeadModel(XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, **COMMON))


def gemma_3n():
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "laurel_rank": 8}
    inputs = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
    kinds = {"activation_sparsity_pattern": [0.0] * 2, "layer_types": ["full_attention"] * 2}
    return Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **inputs, **kinds, **SIZES))


def deepseek_v4():
    return DeepseekV4ForCausalLM(DeepseekV4Config(n_routed_experts=2, **SIZES))


def t5():
    return T5ForConditionalGeneration(T5Config(d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8, **COMMON))


@pytest.mark.parametrize(
    ("family", "error"),
    [
        (xlnet, r"\(3, 2, 32\) for 2 sequences of 3 tokens.*isn't supported"),
        (gemma_3n, r"\(4, 2, 3, 32\) for 2 sequences of 3 tokens.*isn't supported"),
        (deepseek_v4, r"\(2, 3, 4, 32\) for 2 sequences.*num_streams=4"),
        (t5, r"can't tell the 2 layers.*encoder\.block, decoder\.block"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_layers_whose_hidden_states_are_of_another_shape_are_refused_when_memory_is_attached(tmp_path, family, error):
    model = family().eval()
    with pytest.raises(ValueError, match=error):
        attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    assert attached_memory(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not (tmp_path / "engram_table.dat").exists()


def test_judging_a_model_draws_no_random_number(tmp_path):
    """Its embedding's dropout would."""
    found = []
    for rate in (0.0, 0.5):
        (tmp_path / str(rate)).mkdir()
        model = tiny_model("gpt2", embd_pdrop=rate).train()
        torch.manual_seed(1)
        attach_engram(model, tiny_config(tmp_path / str(rate)), tiny_tokenizer())
        found.append(model.engram.layers["1"].W_k.weight)
    assert torch.equal(*found)


def test_positions_of_several_kinds(tmp_path):
    """Qwen-VL's are of time, height and width, and of text before those, which alone say where a document begins."""
    model = qwen2_vl().eval()
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    wake(model.engram)
    ids, asked = some_ids(), []
    expected = full_logits(model, ids)
    for kinds in (3, 4):
        positions = torch.arange(13).expand(kinds, 2, -1)
        assert_same(model(ids, position_ids=positions, use_cache=False).logits, expected)
    positions = positions.clone()
    positions[:, :, 5:] -= 5
    model.engram.storage.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    model(ids, position_ids=positions, use_cache=False)
    (layer,) = model.engram
    assert torch.equal(asked[0], torch.cat([layer.row_ids(ids[:, :5]), layer.row_ids(ids[:, 5:])], 1))
