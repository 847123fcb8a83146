"""A Qwen4-Exp model's checkpoint with a table of any size; and, run as a script, what a model of it generates.

python qwen_generate.py FOLDER memory|disk    prints {"token_ids": …, "anonymous_bytes": …}
"""

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from checkpoints import bits, write_shard
from safetensors import safe_open
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM, Qwen4ExpTextNGramEmbedding

PROMPTS = [[3, 9, 4, 4, 7, 12, 3, 9], [21, 5, 6, 7, 33, 8, 21, 5]]


def write_model(folder: Path, config, *, dtype=torch.bfloat16, num_parts: int = 3) -> int:
    """Saves a random model whose table is random, too, written part by part; returns the table's bytes."""
    from sense_v2.hf.serving.offload import EmbeddingOnDisk

    torch.manual_seed(4)
    # A model with the table would take the memory that is to be saved: one with a small table, told of the large.
    small = copy.deepcopy(config)
    small.ngram_vocab_size_base = 40
    model = Qwen4ExpForCausalLM(small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    with torch.device("meta"):
        large = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, 1)
    shape = large.ngram_embedding.weight.shape
    layer = model.model.layers[1].ple
    layer.ple_embedding.ngram_embedding = EmbeddingOnDisk(*shape, layer, None)
    layer.ple_embedding.ngram_heads_vocab_sizes.copy_(torch.tensor(large.head_vocab_sizes))
    layer.ple_embedding.ngram_heads_offsets.copy_(torch.tensor(large.head_offsets))
    model.config.ngram_vocab_size_base = config.ngram_vocab_size_base
    model.to(dtype).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    prefix = next(re.match(r"(.*layers\.1\.)", name)[1] for name in names if "layers.1." in name)
    weight_map = dict.fromkeys(names, "weights.safetensors")
    generator, cuts = np.random.default_rng(0), torch.tensor_split(torch.arange(shape[0]), num_parts)
    for number, rows in enumerate(cuts):
        values = torch.from_numpy(generator.standard_normal((len(rows), shape[1]), dtype=np.float32)).to(
            torch.bfloat16
        )
        name = f"{prefix}ple.ple_embedding.ngram_embedding.shard_{number}.weight"
        write_shard(folder / f"table-{number}.safetensors", {name: ("BF16", tuple(values.shape), bits(values))})
        weight_map[name] = f"table-{number}.safetensors"
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shape[0] * shape[1] * 2


def quantize_table(folder: Path) -> None:
    """Makes the table of a checkpoint that `write_model` wrote float8 with one scale, as transformers has it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = [name for name in index["weight_map"] if "ngram_embedding.shard_" in name]
    parts = {}
    for name in names:
        with safe_open(folder / index["weight_map"][name], framework="pt") as file:
            parts[name] = file.get_tensor(name)
    scale = torch.stack([part.abs().max() for part in parts.values()]).amax().reshape(1) / 448
    for number, (name, part) in enumerate(parts.items()):
        codes = (part.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {name: ("F8_E4M3", tuple(codes.shape), bits(codes))}
        if number == 0:
            scale_name = f"{name.partition('.shard_')[0]}.weight_scale"
            tensors[scale_name] = ("BF16", (1,), bits(scale))
            index["weight_map"][scale_name] = index["weight_map"][name]
        write_shard(folder / index["weight_map"][name], tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "modules_to_convert": ["ngram_embedding"]}
    (folder / "config.json").write_text(json.dumps(config))


def generated(model) -> list[list[int]]:
    """Greedy and sampled, with a cache."""
    prompt = torch.tensor(PROMPTS)
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "attention_mask": torch.ones_like(prompt)}
    greedy = model.generate(prompt, do_sample=False, **options)
    return [*greedy.tolist(), *model.generate(prompt, do_sample=True, **options).tolist()]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10


if __name__ == "__main__":
    folder, way = sys.argv[1:]
    torch.set_num_threads(1)
    if way == "disk":
        from sense_v2.hf.serving.offload import load_with_tables_on_disk

        model = load_with_tables_on_disk(folder)
    else:
        model = Qwen4ExpForCausalLM.from_pretrained(folder)
    token_ids = generated(model.eval())
    print(json.dumps({"token_ids": token_ids, "anonymous_bytes": anonymous_bytes()}))
