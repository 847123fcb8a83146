"""What `export_tables` writes, read by vLLM's own DeepSeek-V4.1 and Qwen4-Exp: names, shapes, types, row ids, rows.

Their models need a GPU; the parts that load and hash are plain Python and torch. `make test-vllm` runs this.
"""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny import VOCABULARY, tiny_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.model import EngramFusionLayer, open_table
from sense_v2.engram.released import exporting
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.variants import variant_config

pytest.importorskip("vllm.version")  # this folder is a package of the name, too
from vllm.models.deepseek_v41.common import engram as deepseek
from vllm.models.qwen4_exp.common.ple import copy_ple_embedding_shard_
from vllm.models.qwen4_exp.nvidia.ngram_embedding import Qwen4ExpNGramEmbedding

EOS = 7
SIZES = {
    # Their primality test takes 61 for composite, which no table of a real size has a head of.
    "deepseek_v41": {"table_size": 100, "engram_dim": 24 * 32},
    "qwen_ple": {
        "table_size": 50,
        "engram_dim": 4 * 16,
        "num_heads": 2,
        "layer_indices": [1],
        "pad_token_id": EOS,
        "dtype": "bfloat16",
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """exported(variant) -> config.json's text part, {name: tensor}, our hasher of each layer, the folder."""
    monkeypatch.setattr("sense_v2.engram.released.layouts.PART_BYTES", 1000)

    def make(variant):
        EngramTokenizerBuilder(tiny_tokenizer(), normalization="deepseek").build_mapping(tmp_path / "map.npy")
        tokenizer = EngramTokenizer(tmp_path / "map.npy")
        layers = variant_config(variant, **SIZES[variant]).layer_indices
        paths = {layer: tmp_path / f"{layer}.dat" for layer in layers}
        hashers, fusion = {}, {}
        for layer, path in paths.items():
            config = variant_config(variant, init_std=0.5, storage_path=str(path), **SIZES[variant])
            table = open_table(config, tokenizer, layer=layer)
            table.commit(step=1)
            if variant == "qwen_ple":  # the hash's buffers come with the fusion layers
                fusion[layer] = EngramFusionLayer(config, 48, layer, tokenizer=tokenizer, storage=table).state_dict()
            table.close()
            sizes = {"compressed_vocab_size": tokenizer.compressed_vocab_size, "pad_id": config.pad_token_id or 0}
            hashers[layer] = NgramHasher.from_config(config, layer_id=layer, **sizes)
        exporting.export_tables([*paths.values()], tmp_path / "out", variant, fusion=fusion)
        settings = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
        tensors = {}
        for file in sorted((tmp_path / "out").glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return SimpleNamespace(**settings), tensors, hashers, tokenizer, tmp_path / "out"

    return make


def token_ids(tokenizer, length=200):
    return torch.randint(0, tokenizer.compressed_vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def test_deepseeks_layout_token_map_and_multipliers_are_ours(exported):
    config, _, hashers, tokenizer, _ = exported("deepseek_v41")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer())
    token_map, size = deepseek.build_compressed_token_map(theirs)
    assert size == config.engram_compressed_vocab_size == tokenizer.compressed_vocab_size
    assert token_map == tokenizer(torch.arange(VOCABULARY)).tolist()
    layout = deepseek.EngramLayout.from_config(config)
    assert layout.layer_ids == tuple(hashers)
    multipliers = deepseek.compute_hash_multipliers(layout.layer_ids, layout.max_ngram_size, size)
    for place, hasher in enumerate(hashers.values()):
        assert layout.num_embeddings[place] == hasher.num_rows
        assert multipliers[place].tolist() == hasher.multipliers.tolist()
        primes = [prime for order in layout.primes[place] for prime in order]
        assert primes == list(hasher.layout.primes_LH[place])
        assert layout.offsets[place].tolist() == list(hasher.layout.offsets_LH[place])


def test_deepseeks_loader_takes_rows_and_scales_as_they_are(exported):
    config, tensors, hashers, _, folder = exported("deepseek_v41")
    layout = deepseek.EngramLayout.from_config(config)
    for place, layer in enumerate(hashers):
        rows = tensors[f"layers.{layer}.engram.embed.weight"]
        scales = tensors[f"layers.{layer}.engram.embed.scale"]
        # As `ParallelEngramEmbedding._allocate_weights` makes them, for one of one ranks.
        sizes = layout.num_embeddings[place], layout.head_dim
        weight = nn.Parameter(torch.empty(sizes, dtype=torch.float8_e4m3fn), requires_grad=False)
        weight_scale_inv = nn.Parameter(torch.empty(sizes[0], sizes[1] // 32, dtype=torch.uint8), requires_grad=False)
        for parameter, tensor in ((weight, rows), (weight_scale_inv, scales)):
            parameter.engram_vocab_start = 0
            deepseek._engram_head_shard_weight_loader(parameter, tensor)
        values = weight.float() * torch.exp2(weight_scale_inv.float() - 127).repeat_interleave(32, dim=1)
        found = open_released_table(folder, layer)(torch.arange(sizes[0]))
        assert torch.equal(found, values.bfloat16())


def test_qwens_own_loader_and_row_ids(exported):
    config, tensors, hashers, tokenizer, folder = exported("qwen_ple")
    ((layer, hasher),) = hashers.items()
    theirs = qwen_embedding(config)
    marker = ".ple_embedding."
    of_table = {name.split(marker)[1]: tensor for name, tensor in tensors.items() if marker in name}
    assert len([name for name in of_table if "shard_" in name]) == config.split_ngram_parts > 1
    computed = {name: buffer.clone() for name, buffer in theirs.named_buffers()}
    loaded = theirs.load_weights(of_table.items())
    assert loaded == {"ngram_embedding.weight", *computed}
    for name, buffer in theirs.named_buffers():  # what the file says is what they compute of its config.json
        assert torch.equal(buffer, computed[name])
    ids_T = token_ids(tokenizer)
    ids_T[::9] = EOS
    starts = torch.tensor([0, 3, 120, 200])
    found = theirs.compute_ngram_ids(ids_T, starts, torch.full((3, config.ngram_size - 1), EOS))
    parts = [hasher(ids_T[None, start:end])[0] for start, end in pairwise(starts)]
    assert torch.equal(found, torch.cat(parts))
    rows = theirs.ngram_embedding.weight[found]
    assert torch.equal(rows, open_released_table(folder, layer)(found))


def qwen_embedding(config):
    """Their module as it is on one rank, without the device that its constructor asks for."""
    made = Qwen4ExpNGramEmbedding.__new__(Qwen4ExpNGramEmbedding)
    nn.Module.__init__(made)
    made.ngram_size, made.heads_per_ngram = config.ngram_size, config.heads_per_ngram
    heads = (config.ngram_size - 1) * config.heads_per_ngram
    made.eos_token_id, made.split_ngram_parts = config.eos_token_id, config.split_ngram_parts
    numbers = made._make_layer_multipliers(
        ngram_size=config.ngram_size,
        unigram_vocab_size=config.vocab_size,
        seed=config.seed,
        ple_dense_layer_id=0,
    )
    sizes, offsets, total = made._make_vocab_layout(
        ngram_vocab_size_base=config.ngram_vocab_size_base, ngram_heads=heads, ple_dense_layer_id=0
    )
    for name, values in (
        ("layer_multipliers", numbers),
        ("ngram_heads_vocab_sizes", sizes),
        ("ngram_heads_offsets", offsets),
    ):
        made.register_buffer(name, torch.tensor(values))
    divisor = config.make_ngram_vocab_size_divisible_by
    rows = -(-total // divisor) * divisor
    made.ngram_embedding = embedding = nn.Module()
    embedding.org_vocab_size, embedding.embedding_dim = rows, config.ple_embed_dim // heads
    embedding.weight = nn.Parameter(
        torch.zeros(rows, embedding.embedding_dim, dtype=torch.bfloat16), requires_grad=False
    )
    embedding.weight.weight_loader = lambda weight, loaded, checkpoint_start: copy_ple_embedding_shard_(
        weight, loaded, checkpoint_start=checkpoint_start, tp_start=0, tp_end=rows
    )
    return made
