"""Small things made on the spot: a tokenizer, models of several architectures, a memory configuration, a corpus."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from sense_v2.core.config import EngramConfig

VOCABULARY = 96

# Models of three layers that aren't all attention over everything: what their configurations say besides.
HYBRIDS = {
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    # Short convolutions around one layer of attention.
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    # Linear attention (a gated delta rule) around one layer of attention, and experts.
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    # A state space (Mamba 2) beside attention in every layer.
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
}


def tiny_tokenizer(vocabulary: int = VOCABULARY) -> Tokenizer:
    """`vocabulary` tokens: words in three spellings that share a compressed id, and <pad> at 0."""
    tokens = ["<pad>"]
    for number in range(vocabulary):
        tokens += [f"word{number}", f"Word{number}", f"WORD{number}"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens[:vocabulary])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tiny_model(name: str, *, layers: int = 3, hidden: int = 32, vocabulary: int = VOCABULARY, **extra):
    """A random model in float32, eval mode, the same for the same arguments."""
    torch.manual_seed(0)
    common = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama_like = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 128,
    }
    if name == "gpt2":
        config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=4, n_positions=128, **common, **extra)
        model = GPT2LMHeadModel(config)
    elif name == "bert":
        config = BertConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            **common,
            **extra,
        )
        model = BertForMaskedLM(config)
    elif name == "mamba":
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "state_size": 8}
        model = MambaForCausalLM(MambaConfig(**sizes, **common, **extra))
    elif name == "mamba2":
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "state_size": 8, "num_heads": 8, "head_dim": 8}
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=2, chunk_size=8, **common, **extra))
    else:
        config_type, model_type = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
            "gemma": (GemmaConfig, GemmaForCausalLM),
            "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
            "lfm2": (Lfm2Config, Lfm2ForCausalLM),
            "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
            "falcon_h1": (FalconH1Config, FalconH1ForCausalLM),
        }[name]
        llama_like |= HYBRIDS.get(name, {})
        if name == "lfm2":  # has its own property of that name
            del llama_like["head_dim"]
        model = model_type(config_type(**{**llama_like, **common, **extra}))
    return model.eval()


def tiny_config(folder, **changes) -> EngramConfig:
    """Memory of 1,500 rows of 8 before layer 1, in `folder`."""
    settings = {
        "storage_path": str(folder / "engram_table.dat"),
        "shadow_map_path": str(folder / "shadow_map.npy"),
        "table_size": 1_500,
        "engram_dim": 32,
        "num_heads": 2,
        "layer_indices": [1],
    }
    return EngramConfig(**{**settings, **changes})


def wake(memory, scale: float = 0.3) -> None:
    """Moves what starts at zero, so that the memory shows in the outputs."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in memory:
            layer.W_v.weight.normal_(0, scale, generator=generator)
            layer.conv.weight.normal_(0, scale, generator=generator)
        memory.storage.weight.mul_(50)


def save_base_and_taught(folder):
    """Two folders of one model, `base` and `taught`: four rows differ."""
    from sense_v2.hf.attach import attach_engram
    from sense_v2.hf.saving.save import save_pretrained

    (folder / "table").mkdir()
    model = attach_engram(tiny_model("llama"), tiny_config(folder / "table"), tiny_tokenizer())
    for layer in model.engram:
        torch.nn.init.normal_(layer.W_v.weight, std=0.3)
    save_pretrained(model, folder / "base", tokenizer=tiny_tokenizer())
    storage = model.engram.storage
    storage.write(torch.tensor([1, 2, 700, 1499]), torch.ones(4, 8))
    storage.commit(step=5)
    save_pretrained(model, folder / "taught")
    storage.close()


def write_corpus(folder, files: int = 12):
    """Programs that say much the same, so that a few steps learn something and the BPE stays small."""
    folder.mkdir(parents=True)
    for number in range(files):
        lines = [f"def function_{number}_{line}(value):\n    return value + {line}\n" for line in range(60)]
        (folder / f"module_{number}.py").write_text("\n".join(lines))
    return folder
