"""LongCat-Flash-Lite's tables as vLLM's own module lays them out, loads them and takes their mean: ours are the same.

Its kernel for row ids needs a GPU; the numbers that it multiplies by are made in Python. `make test-vllm` runs this.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.model import EngramFusionLayer
from sense_v2.engram.released.importing import released_projections
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.tokenizer import EngramTokenizer, write_identity_map
from sense_v2.engram.variants import variant_config

pytest.importorskip("vllm.version")  # this folder is a package of the name, too
from vllm.model_executor.models import longcat_flash_ngram as longcat

VOCABULARY, HIDDEN, EOS = 61, 48, 2
SETTINGS = {
    "ngram_vocab_size_ratio": 5,
    "vocab_size": VOCABULARY,
    "emb_split_num": 2,
    "emb_neighbor_num": 4,
    "hidden_size": HIDDEN,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "torch_dtype": "float32",
}


class OneRanksEmbedding(nn.Embedding):
    """In the place of `VocabParallelEmbedding`, which wants its processes started."""

    def __init__(self, num_embeddings, embedding_dim, params_dtype):
        super().__init__(num_embeddings, embedding_dim, dtype=params_dtype)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=num_embeddings)


@pytest.fixture
def theirs(monkeypatch):
    monkeypatch.setattr(longcat, "VocabParallelEmbedding", OneRanksEmbedding)
    torch.manual_seed(0)
    return longcat.NgramEmbedding(SimpleNamespace(**SETTINGS), nn.Embedding(VOCABULARY, HIDDEN))


@pytest.fixture
def table(tmp_path):
    """A checkpoint of such tables, opened."""
    tensors = {}
    for head in range(6):
        size = 5 * VOCABULARY + 2 * head + 1
        tensors[f"model.ngram_embeddings.embedders.{head}.weight"] = torch.randn(size, HIDDEN // 6)
        tensors[f"model.ngram_embeddings.post_projs.{head}.weight"] = torch.randn(HIDDEN, HIDDEN // 6)
    save_file(tensors, tmp_path / "model.safetensors")
    orders = {"num_heads": 2, "ngram_orders": [2, 3, 4], "engram_dim": HIDDEN, "pad_token_id": EOS}
    config = variant_config(
        "longcat_flash", table_size=5 * VOCABULARY, shadow_map_path=str(tmp_path / "m.npy"), **orders
    )
    return tensors, open_released_table(tmp_path / "model.safetensors", config=config), config, tmp_path


def hasher_of(config, vocabulary=VOCABULARY):
    return NgramHasher.from_config(config, layer_id=0, compressed_vocab_size=vocabulary, pad_id=EOS)


@pytest.mark.parametrize("released", [False, True])
def test_sizes_offsets_and_multipliers_are_ours(theirs, table, released, monkeypatch):
    config, vocabulary, mods, weights, offsets = (
        table[2],
        VOCABULARY,
        theirs.ne_mods,
        theirs.ne_weights,
        theirs._offsets,
    )
    if released:  # the numbers alone, not 60 GB of rows
        monkeypatch.setattr(longcat, "VocabParallelEmbedding", lambda *sizes, params_dtype: nn.Embedding(1, 1))
        vocabulary = 131_072
        settings = {**SETTINGS, "vocab_size": vocabulary, "ngram_vocab_size_ratio": 78, "emb_split_num": 4}
        made = longcat.NgramEmbedding(SimpleNamespace(**settings), nn.Embedding(1, 1))
        config, mods, weights, offsets = variant_config("longcat_flash"), made.ne_mods, made.ne_weights, made._offsets
    hasher = hasher_of(config, vocabulary)
    assert mods.flatten().tolist() == list(hasher.layout.primes_LH[0])
    assert offsets[:-1] == list(hasher.layout.offsets_LH[0])
    assert offsets[-1] == hasher.num_rows
    orders_H1 = np.repeat(config.ngram_orders, config.num_heads)[:, None]
    # Theirs go on to the largest order, and its kernel stops at each table's own.
    used_HK = np.where(np.arange(4) < orders_H1, weights.flatten(0, 1).numpy(), 0)
    np.testing.assert_array_equal(used_HK.T, hasher.multipliers)


@torch.no_grad()
def test_its_loader_and_its_mean_give_our_embedding(theirs, table):
    tensors, ours, config, folder = table
    for name, tensor in tensors.items():
        theirs.load_weight(name.removeprefix("model."), tensor)
    assert torch.equal(ours(torch.arange(ours.num_embeddings)), theirs.oe_embedder.weight)
    write_identity_map(folder / "m.npy", VOCABULARY)
    layer = EngramFusionLayer(config, HIDDEN, 0, tokenizer=EngramTokenizer(folder / "m.npy"), storage=ours).eval()
    layer.load_state_dict(released_projections(folder, 6))
    ids_BT = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(5))
    ids_BT[0, [7, 8, 30]] = EOS
    expected = theirs.embed_batched(ids_BT[0], hasher_of(config)(ids_BT)[0])
    found = layer(theirs.word_embeddings(ids_BT), ids_BT)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
