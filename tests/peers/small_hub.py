"""A pytest plugin for PEFT's tests: the models of the hub that they name, small and made on the spot.

    pytest -p audible_memory -p small_hub --outcomes FILE [--bare] …

What `AutoModelForCausalLM.from_pretrained` opens under such a name has a memory that shows in its outputs, unless
`--bare` is given. The same name gives the same weights and rows each time.
"""

import re
from pathlib import Path

import pytest
import torch
from audible_memory import attach_audible
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

VOCABULARY = 1200  # PEFT's tests name ids up to 1000
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
# What a name of the hub says -> the model's type, and its sizes.
MODELS = {
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "gpt2": ("gpt2", GPT),
    "opt": ("opt", {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 8}),
    "mistral": ("mistral", GROUPED),
    "llama": ("llama", GROUPED),
}


def _family(name):
    if isinstance(name, str) and not Path(name).exists() and re.fullmatch(r"[\w-]+/tiny-[\w-]+", name):
        return next((found for part, found in MODELS.items() if part in name.lower()), None)
    return None


@pytest.fixture(autouse=True)
def models_of_the_hub(request, monkeypatch):
    own_model, own_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model(name, *args, dtype=None, **kwargs):
        found = _family(name)
        if found is None:
            return own_model(name, *args, **({} if dtype is None else {"dtype": dtype}), **kwargs)
        family, sizes = found
        config = AutoConfig.for_model(
            family, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
        )
        config._name_or_path = name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(config).to(dtype or torch.float32).eval()
            if not request.config.getoption("--bare"):
                attach_audible(made)
        return made

    def tokenizer(name, *args, **kwargs):
        if _family(name) is None:
            return own_tokenizer(name, *args, **kwargs)
        return PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer(VOCABULARY), eos_token="word0", pad_token="<pad>"
        )

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
