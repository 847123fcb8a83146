"""Qwen4-Exp's per-layer embedding against transformers' own modules, run side by side: row ids, and the layer."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers.models.qwen4_exp", reason="a transformers before Qwen4-Exp")
from transformers import DynamicCache
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding, Qwen4ExpTextPLELayer

from sense_v2.engram.hashing import NO_TOKEN, NgramHasher
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.variants import variant_config

VOCABULARY, EOS = 50, 7
# Decoder layers that have a table, counted from 0; the model's configuration counts from 1.
LAYERS = [1, 2]


def text_config(**changes) -> Qwen4ExpTextConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "hc_count": 2,
        "hc_lowrank": 4,
        "ple_layer_ids": [2, 3],
        "ple_embed_dim": 32,
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 40,
        # A cache asks its layers of attention how long it is.
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "split_ngram_parts": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    }
    return Qwen4ExpTextConfig(**{**settings, **changes})


def our_config(config, **changes):
    return variant_config(
        "qwen_ple",
        table_size=config.ngram_vocab_size_base,
        num_heads=config.heads_per_ngram,
        engram_dim=config.ple_embed_dim,
        layer_indices=LAYERS,
        pad_token_id=EOS,
        seed=config.seed,
        num_streams=config.hc_count,
        **changes,
    )


def hasher_for(config, layer_id: int) -> NgramHasher:
    return NgramHasher.from_config(
        our_config(config), layer_id=layer_id, compressed_vocab_size=config.vocab_size, pad_id=EOS
    )


def row_ids_of(embedding: Qwen4ExpTextNGramEmbedding, token_ids_BT: torch.Tensor, cache=None) -> torch.Tensor:
    """The ids with which transformers' module looks up its embedding."""
    seen = []
    hook = embedding.ngram_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedding(token_ids_BT, cache)
    hook.remove()
    return seen[0]


def random_ids(length=60, batch=3, seed=0) -> torch.Tensor:
    """With ends of sequences at the first and last place, one behind the other, and elsewhere."""
    ids_BT = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids_BT[torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2] = EOS
    ids_BT[0, [0, length // 2, length // 2 + 1, -1]] = EOS
    return ids_BT


# --- row ids ---


@pytest.mark.parametrize("place", [0, 1])
def test_the_published_row_ids(golden, place):
    published = golden("qwen_ple_hash.json")
    settings, expected = published["config"], published["layers"][place]
    layout = {"layer_ids": LAYERS, "ngram_orders": [2, 3], "num_heads": 8, "table_size": 20_000_000, "seed": 1234}
    hasher = NgramHasher(
        "qwen_ple",
        layer_id=LAYERS[place],
        **layout,
        compressed_vocab_size=settings["vocab_size"],
        pad_id=settings["eos_token_id"],
    )
    assert hasher.multipliers.tolist() == expected["multipliers"]
    assert list(hasher.layout.primes_LH[place]) == expected["head_vocab_sizes"]
    assert list(hasher.layout.offsets_LH[place]) == expected["head_offsets"]
    assert hasher.num_rows == -(-expected["total_vocab_size"] // 128) * 128
    ids_BT = np.array(expected["input_ids"])
    assert (ids_BT == settings["eos_token_id"]).any()
    np.testing.assert_array_equal(hasher(ids_BT), expected["row_ids"])


@pytest.mark.parametrize("place", [0, 1])
def test_row_ids_equal_to_transformers_own(place):
    config = text_config()
    embedding = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, LAYERS[place], place)
    hasher = hasher_for(config, LAYERS[place])
    assert hasher.num_rows == embedding.ngram_embedding.num_embeddings
    for seed in range(4):
        ids_BT = random_ids(seed=seed)
        assert torch.equal(hasher(ids_BT), row_ids_of(embedding, ids_BT))


def test_row_ids_in_parts_with_a_history():
    config = text_config()
    hasher, ids_BT = hasher_for(config, 1), random_ids()
    whole = hasher(ids_BT)
    for cut in range(1, 30):
        history = ids_BT[:, max(0, cut - 2) : cut]
        padded = torch.cat([torch.full((3, 2 - history.shape[1]), NO_TOKEN), history], dim=1)
        assert torch.equal(hasher(ids_BT[:, cut : cut + 3], history=padded), whole[:, cut : cut + 3])


def test_packed_documents_end_n_grams_too():
    """Two sequences in one row give what each gives alone, with ends inside of both."""
    hasher, ids_BT = hasher_for(text_config(), 1), random_ids(length=20, batch=2)
    sequence_ids = torch.tensor([[4] * 9 + [5] * 11] * 2)
    packed = hasher(ids_BT, sequence_ids=sequence_ids)
    assert torch.equal(packed, torch.cat([hasher(ids_BT[:, :9]), hasher(ids_BT[:, 9:])], dim=1))


def test_layout_of_a_padded_table():
    layout = HeadLayout.from_config(our_config(text_config()))
    assert all(rows % 128 == 0 for rows in layout.num_rows_L)
    assert all(rows - sum(primes) < 128 for rows, primes in zip(layout.num_rows_L, layout.primes_LH, strict=True))


# --- the layer ---


@pytest.fixture
def pair(tmp_path):
    """Transformers' layer with weights that all matter, and ours with the same."""
    from sense_v2.engram.model import EngramFusionLayer
    from sense_v2.engram.storage import MMapEmbeddingStorage
    from sense_v2.engram.tokenizer import EngramTokenizer

    config = text_config()
    torch.manual_seed(3)
    theirs = Qwen4ExpTextPLELayer(config, 1, 0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.5)
    np.save(tmp_path / "identity.npy", np.arange(VOCABULARY, dtype=np.int64))
    table = theirs.ple_embedding.ngram_embedding.weight.detach()
    storage = MMapEmbeddingStorage(*table.shape, tmp_path / "rows.dat")
    storage.weight.copy_(table)
    with pytest.warns(UserWarning, match="json"):  # a map without a description
        tokenizer = EngramTokenizer(tmp_path / "identity.npy")
    ours = EngramFusionLayer(our_config(config), config.hidden_size, 1, tokenizer=tokenizer, storage=storage).eval()
    streams = (config.hc_count, config.hidden_size)
    ours.load_state_dict(
        {
            "W_k.weight": theirs.key_proj.weight,
            "W_v.weight": theirs.value_proj.weight,
            "conv.weight": theirs.conv1d.weight,
            # Theirs are kept as what they differ from 1 by.
            "gate.key_norm.weight": 1 + theirs.norm_key.weight.view(streams),
            "gate.query_norm.weight": 1 + theirs.norm_query.weight.view(streams),
            "conv_norm.weight": 1 + theirs.norm_conv.weight.view(streams),
        }
    )
    yield theirs, ours, config
    storage.close()


def hidden_for(config, ids_BT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(*ids_BT.shape, config.hc_count, config.hidden_size, generator=generator)


@torch.no_grad()
def test_the_layer_equals_transformers_own(pair):
    theirs, ours, config = pair
    ids_BT = random_ids(length=25)
    hidden_BTSC = hidden_for(config, ids_BT)
    delta = theirs(hidden_BTSC.flatten(-2), ids_BT, None).unflatten(-1, hidden_BTSC.shape[-2:])
    assert delta.abs().mean() > 0.1
    torch.testing.assert_close(ours(hidden_BTSC, ids_BT) - hidden_BTSC, delta, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[25], [9, 1, 1, 14], [1] * 25])
def test_the_layer_in_parts_equals_transformers_own_with_a_cache(pair, cuts):
    """Theirs with its cache and ours with the tokens and the convolution's inputs of the past, part by part; both
    equal to the whole."""
    theirs, ours, config = pair
    ids_BT = random_ids(length=25)
    hidden_BTSC = hidden_for(config, ids_BT)
    whole = ours(hidden_BTSC, ids_BT)
    cache, inputs, start = DynamicCache(config=config), [], 0

    def remember(inputs_BTX):
        inputs.append(inputs_BTX)
        return torch.cat(inputs, dim=1)[:, -(inputs_BTX.shape[1] + ours.reach) :]

    for cut in cuts:
        part = slice(start, start + cut)
        delta = theirs(hidden_BTSC[:, part].flatten(-2), ids_BT[:, part], cache).unflatten(-1, hidden_BTSC.shape[-2:])
        row_ids = ours.hasher(ids_BT[:, part], history=ids_BT[:, max(0, start - 2) : start])
        out = ours(hidden_BTSC[:, part], row_ids_BTH=row_ids, remember=remember)
        torch.testing.assert_close(out - hidden_BTSC[:, part], delta, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out, whole[:, part], atol=1e-5, rtol=1e-5)
        start += cut


@torch.no_grad()
def test_a_masked_position_passes_through(pair):
    _, ours, config = pair
    ids_BT = random_ids(length=10)
    hidden_BTSC = hidden_for(config, ids_BT)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :4] = 0
    out = ours(hidden_BTSC, ids_BT, mask_BT)
    assert torch.equal(out[1, :4], hidden_BTSC[1, :4])
    alone = ours(hidden_BTSC[1:2, 4:], ids_BT[1:2, 4:])
    torch.testing.assert_close(out[1:2, 4:], alone, atol=1e-5, rtol=1e-5)
