"""transformers' common model tests over small models of its families: collected by scripts/test_peers.py alone.

`tests.test_modeling_common` is the sdist's. The sdist lacks each family's own test file; a tiny configuration stands
here in its place.
"""

import unittest

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import test_modeling_common

VOCABULARY, BATCH, LENGTH, LAYERS, HEADS, HIDDEN = 99, 3, 7, 2, 4, 32
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma": {**GROUPED, "head_dim": 8},
    "mistral": GROUPED,
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, "head_dim": 8, **EXPERTS},
    "gpt_neox": LLAMA,
    "opt": {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": HIDDEN},
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "falcon": LLAMA,
    "mpt": {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64},
    "lfm2": {**GROUPED, "layer_types": ["full_attention", "conv"]},
    "mamba": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8},
    "phi": LLAMA,
}


class _Tester:
    is_training, batch_size, seq_length = True, BATCH, LENGTH
    hidden_size, num_hidden_layers, num_attention_heads = HIDDEN, LAYERS, HEADS

    def __init__(self, family):
        self.family = family

    def get_config(self):
        return AutoConfig.for_model(self.family, **COMMON, **FAMILIES[self.family])

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tests_of(family):
    def set_up(self):
        self.model_tester = _Tester(family)

    model_class = AutoModelForCausalLM._model_mapping[type(_Tester(family).get_config())]
    has_attentions = family not in ("mamba", "lfm2")
    members = {"setUp": set_up, "all_model_classes": (model_class,), "has_attentions": has_attentions}
    return type(f"Test_{family}", (test_modeling_common.ModelTesterMixin, unittest.TestCase), members)


globals().update({f"Test_{family}": _tests_of(family) for family in FAMILIES})
