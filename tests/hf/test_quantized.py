"""Backbones whose weights aren't plain numbers on one device: quantized and offloaded ones."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from test_attach import attached, some_ids, state_of
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.saving.backbone_facts import backbone_facts, backbone_reference

PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(2, -1), "use_cache": False}


class Quantized(torch.nn.Module):
    """A linear layer as bitsandbytes' and fp8's are: codes of one byte, and a scale in float32."""

    def __init__(self, linear, codes):
        super().__init__()
        scale = linear.weight.detach().abs().max().float() / 127
        self.weight = torch.nn.Parameter((linear.weight / scale).to(codes), requires_grad=False)
        self.scale = torch.nn.Parameter(scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_backbones_memory_has_the_type_that_it_computes_with(tmp_path, codes):
    model, ids = tiny_model("llama").bfloat16(), some_ids()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Quantized(layer.self_attn.q_proj, codes)
    before = model(ids).logits
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    assert model.engram.layers["1"].W_k.weight.dtype == torch.bfloat16
    assert torch.equal(model(ids).logits, before)
    wake(model.engram)
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_is_quantized_dynamically_before_and_after_attaching(tmp_path):
    model, ids = attached("llama", tmp_path), some_ids()
    fusion, expected = state_of(model.engram.layers), model(ids).logits
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    assert torch.allclose(quantized(ids).logits, expected, atol=0.1)
    detach_engram(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    attach_engram(quantized, tiny_config(tmp_path), mode="r").engram.layers.load_state_dict(fusion)
    assert torch.allclose(quantized(ids).logits, expected, atol=0.1)


def test_weights_that_are_brought_when_they_are_needed(tmp_path):
    """Offloaded before attaching and after it: all weights, or the layer's with memory, on the disk."""
    model, ids = attached("llama", tmp_path), some_ids()
    fusion, expected = state_of(model.engram.layers), model(ids, **PACKED).logits
    cpu_offload(model)
    assert torch.equal(model(ids, **PACKED).logits, expected)
    names = ("embed_tokens", "rotary_emb", "layers.0", "layers.2", "norm")
    places = {**{f"model.{name}": "cpu" for name in names}, "lm_head": "cpu", "model.layers.1": "disk"}
    disk = {"device_map": places, "main_device": "cpu", "offload_dir": tmp_path / "layer"}
    for offload, given in ((cpu_offload, {}), (dispatch_model, disk)):
        other = offload(tiny_model("llama"), **given)
        attach_engram(other, tiny_config(tmp_path), mode="r").engram.layers.load_state_dict(fusion)
        assert torch.equal(other(ids, **PACKED).logits, expected)


class Opaque(torch.Tensor):
    """A weight as torchao's quantized ones are: it is multiplied, moved and shown, and refuses the rest."""

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.values_of = values
        return made

    def __repr__(self, **_):
        return "Opaque"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            weight = args[1].values_of
            return function(args[0], weight, *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values_of)
        raise NotImplementedError(f"Opaque dispatch: attempting to run unimplemented operator/function: {function}")


def test_a_weight_without_values_to_look_at_has_no_digest(tmp_path):
    """As quantized weights of any kind: the memory trains, and nothing can name such a backbone."""
    model, ids = tiny_model("llama"), some_ids()
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(Opaque(projection.weight.detach()), requires_grad=False)
    before = model(ids).logits
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    assert torch.equal(model(ids).logits, before)
    assert backbone_facts(model)["weights"] is None
    model.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="quantized"):
        backbone_reference(model)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.engram.parameters())
