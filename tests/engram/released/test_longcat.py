"""LongCat-Flash-Lite's n-gram embedding: row ids as its own code has them, the layer as torch, tables in place."""

import json
import random
import warnings

import numpy as np
import pytest
import torch
from checkpoints import bits, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from sense_v2.cli.main import main
from sense_v2.engram.hashing import NO_TOKEN, NgramHasher
from sense_v2.engram.model import EngramFusionLayer, open_table
from sense_v2.engram.released.importing import import_table, released_projections
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.tokenizer import EngramTokenizer, write_identity_map
from sense_v2.engram.variants import variant_config

VOCABULARY, RATIO, SPLITS, LARGEST, EOS = 50, 3, 2, 4, 7
HEADS = SPLITS * (LARGEST - 1)


def small(**changes):
    settings = {
        "table_size": RATIO * VOCABULARY,
        "num_heads": SPLITS,
        "ngram_orders": [2, 3, 4],
        "engram_dim": HEADS * 4,
        "pad_token_id": EOS,
    }
    return variant_config("longcat_flash", **{**settings, **changes})


def hasher_for(config=None, vocabulary=VOCABULARY, **changes) -> NgramHasher:
    config = config or small(**changes)
    return NgramHasher.from_config(
        config, layer_id=0, compressed_vocab_size=vocabulary, pad_id=config.pad_token_id or 0
    )


def slow_rows(tokens, vocabulary=VOCABULARY, m=RATIO * VOCABULARY, splits=SPLITS, largest=LARGEST, end=EOS):
    """Each n-gram as one whole number in base `vocabulary`, in Python's integers."""
    rows = []
    for t in range(len(tokens)):
        row, first = [], 0
        for table in range(splits * (largest - 1)):
            number = 0
            for back in range(2 + table // splits):
                if t - back < 0 or (back > 0 and tokens[t - back] == end):
                    break
                number += tokens[t - back] * vocabulary**back
            size = m + 2 * table + 1
            row.append(first + number % size)
            first += size
        rows.append(row)
    return rows


def random_ids(length=60, batch=3, seed=0) -> torch.Tensor:
    """With ends of sequences at the first and last place, one behind the other, and elsewhere."""
    ids_BT = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids_BT[torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2] = EOS
    ids_BT[0, [0, length // 2, length // 2 + 1, -1]] = EOS
    return ids_BT


# --- row ids ---


def published(settings):
    """The hasher of a published configuration."""
    m = int(settings["ngram_vocab_size_ratio"] * settings["vocab_size"])
    orders = list(range(2, settings["emb_neighbor_num"] + 1))
    heads = settings["emb_split_num"]
    config = variant_config(
        "longcat_flash",
        table_size=m,
        num_heads=heads,
        ngram_orders=orders,
        engram_dim=heads * len(orders),
        pad_token_id=settings["eos_token_id"],
    )
    return hasher_for(config, settings["vocab_size"])


@pytest.mark.parametrize("case", range(10))
def test_the_published_row_ids(golden, case):
    expected = golden("longcat_flash_hash.json")["cases"][case]
    hasher, ids_BT = published(expected["config"]), np.array([expected["input_ids"]])
    np.testing.assert_array_equal(hasher(ids_BT)[0], expected["row_ids"])
    farthest = expected["config"]["emb_neighbor_num"] - 1
    for cut in range(1, ids_BT.shape[1]):
        rest = hasher(ids_BT[:, cut:], history=ids_BT[:, max(0, cut - farthest) : cut])
        np.testing.assert_array_equal(rest[0], expected["row_ids"][cut:])


@pytest.mark.parametrize("which", [0, 1])
def test_the_published_tables(golden, which):
    expected = golden("longcat_flash_hash.json")["layouts"][which]
    hasher = published(expected["config"])
    assert list(hasher.layout.primes_LH[0]) == expected["rows"]
    assert hasher.num_rows == sum(expected["rows"])


def test_the_variant_is_the_published_one(golden):
    expected, config = golden("longcat_flash_hash.json")["layouts"][0], variant_config("longcat_flash")
    hasher = hasher_for(config, 131_072)
    assert list(hasher.layout.primes_LH[0]) == expected["rows"]
    assert config.row_dim * config.total_heads == 3072
    assert config.pad_token_id == expected["config"]["eos_token_id"]


@pytest.mark.parametrize(
    ("vocabulary", "m", "splits", "largest"), [(64, 200, 1, 2), (997, 4985, 3, 5), (2**20, 2**28, 2, 16)]
)
def test_row_ids_equal_to_whole_numbers(vocabulary, m, splits, largest):
    drawn = random.Random(vocabulary)
    tokens = [drawn.choice([EOS, 0, vocabulary - 1, drawn.randrange(vocabulary)]) for _ in range(80)]
    orders = list(range(2, largest + 1))
    config = small(table_size=m, num_heads=splits, ngram_orders=orders, engram_dim=splits * len(orders))
    rows_BTH = hasher_for(config, vocabulary)(torch.tensor([tokens]))
    assert rows_BTH[0].tolist() == slow_rows(tokens, vocabulary, m, splits, largest)


def test_orders_with_a_gap_and_a_batch():
    hasher, ids_BT = hasher_for(ngram_orders=[2, 4], engram_dim=16), random_ids()
    whole = torch.tensor([slow_rows(ids_T) for ids_T in ids_BT.tolist()])
    sizes = torch.tensor([RATIO * VOCABULARY + 2 * head + 1 for head in range(HEADS)])
    bigrams = whole[..., :SPLITS]
    assert torch.equal(hasher(ids_BT)[..., :SPLITS], bigrams)
    assert hasher.num_rows == int(sizes[:4].sum())


def test_row_ids_in_parts_with_a_history():
    hasher, ids_BT = hasher_for(), random_ids()
    whole = hasher(ids_BT)
    assert whole.tolist() == [slow_rows(ids_T) for ids_T in ids_BT.tolist()]
    for cut in range(1, 30):
        history = ids_BT[:, max(0, cut - 3) : cut]
        padded = torch.cat([torch.full((3, 3 - history.shape[1]), NO_TOKEN), history], dim=1)
        assert torch.equal(hasher(ids_BT[:, cut : cut + 3], history=padded), whole[:, cut : cut + 3])


def test_behind_padding_and_in_packed_documents_as_alone():
    hasher, ids_BT = hasher_for(), random_ids(length=20, batch=2)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :6] = 0
    assert torch.equal(hasher(ids_BT, attention_mask=mask_BT)[0, 6:], hasher(ids_BT[:1, 6:])[0])
    packed = hasher(ids_BT, sequence_ids=torch.tensor([[4] * 9 + [5] * 11] * 2))
    assert torch.equal(packed, torch.cat([hasher(ids_BT[:, :9]), hasher(ids_BT[:, 9:])], dim=1))


def test_a_hash_that_would_leave_64_bits_is_refused():
    with pytest.raises(
        ValueError, match=r"^1048576 ids, heads of up to \d+ rows and n-grams of 4: the hash would leave"
    ):
        hasher_for(small(table_size=2**42), 2**20)


# --- the layer ---

HIDDEN = 24


@pytest.fixture
def layer(tmp_path):
    """Ours, with rows and projections that matter."""
    config = small(
        engram_dim=HIDDEN,
        init_std=1.0,
        storage_path=str(tmp_path / "rows.dat"),
        shadow_map_path=str(tmp_path / "m.npy"),
    )
    write_identity_map(config.shadow_map_path, VOCABULARY)
    tokenizer = EngramTokenizer(config.shadow_map_path)
    table = open_table(config, tokenizer)
    fusion = EngramFusionLayer(config, HIDDEN, 0, tokenizer=tokenizer, storage=table)
    torch.manual_seed(4)
    torch.nn.init.normal_(fusion.W_v.weight, std=0.5)
    yield fusion
    table.close()


def plain_embedding(fusion, hidden_BTC, ids_BT):
    """The mean of the token embedding and of every table's projected row, table by table, in float64."""
    rows = np.fromfile(fusion.storage.path, dtype="<f4").reshape(-1, HIDDEN // HEADS).astype(np.float64)
    projections = fusion.W_v.weight.detach().double().numpy().reshape(HIDDEN, HEADS, -1)
    out = hidden_BTC.double().numpy().copy()
    for b, ids_T in enumerate(ids_BT.tolist()):
        for t, row_ids_H in enumerate(slow_rows(ids_T)):
            for head, row in enumerate(row_ids_H):
                out[b, t] += projections[:, head] @ rows[row]
    return out / (1 + HEADS)


def test_the_layer_is_the_mean_over_the_token_and_the_tables(layer):
    ids_BT = random_ids(length=12, batch=2)
    hidden_BTC = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        fused_BTC = layer.eval()(hidden_BTC, ids_BT)
    np.testing.assert_allclose(fused_BTC.numpy(), plain_embedding(layer, hidden_BTC, ids_BT), rtol=0, atol=1e-6)


def test_masked_positions_pass_unchanged(layer):
    ids_BT, hidden_BTC = random_ids(length=9, batch=1), torch.randn(1, 9, HIDDEN)
    mask_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        fused_BTC = layer.eval()(hidden_BTC, ids_BT, mask_BT)
        alone_BTC = layer(hidden_BTC[:, 2:], ids_BT[:, 2:])
    assert torch.equal(fused_BTC[:, :2], hidden_BTC[:, :2])
    torch.testing.assert_close(fused_BTC[:, 2:], alone_BTC, rtol=0, atol=1e-6)


def test_it_has_no_keys_and_an_open_gate(layer):
    assert list(layer.state_dict()) == ["W_v.weight"]
    assert torch.equal(layer.gate(torch.randn(2, 3, 1, HIDDEN), None), torch.ones(2, 3, 1))


def test_gradients_reach_projections_and_rows_as_in_plain_torch(layer):
    """Against an embedding of torch with the same rows, one backward."""
    ids_BT, hidden_BTC = random_ids(length=10, batch=2), torch.randn(2, 10, HIDDEN)
    rows = torch.from_numpy(np.fromfile(layer.storage.path, dtype="<f4").reshape(-1, HIDDEN // HEADS).copy())
    rows.requires_grad_()
    weight = layer.W_v.weight.detach().clone().requires_grad_()
    row_ids_BTH = torch.tensor([slow_rows(ids_T) for ids_T in ids_BT.tolist()])
    target_BTC = torch.randn(2, 10, HIDDEN)
    expected = (hidden_BTC + rows[row_ids_BTH].flatten(-2) @ weight.T) / (1 + HEADS)
    (expected * target_BTC).sum().backward()
    (layer.train()(hidden_BTC, ids_BT) * target_BTC).sum().backward()
    torch.testing.assert_close(layer.W_v.weight.grad, weight.grad, rtol=0, atol=1e-5)
    ids_U, grads_UD = layer.storage.gradients()
    torch.testing.assert_close(grads_UD, rows.grad[ids_U], rtol=0, atol=1e-5)
    assert set(ids_U.tolist()) == set(row_ids_BTH.flatten().tolist())


# --- tables in a checkpoint ---

TABLES = "model.ngram_embeddings.embedders.{}.weight"
PROJECTIONS = "model.ngram_embeddings.post_projs.{}.weight"


def longcat_config(**changes):
    return {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "model_type": "longcat_flash_ngram",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "ngram_vocab_size_ratio": RATIO,
        "emb_neighbor_num": LARGEST,
        "emb_split_num": SPLITS,
        "eos_token_id": EOS,
        **changes,
    }


def released_rows(dtype=torch.bfloat16):
    """Each table's rows."""
    generator = torch.Generator().manual_seed(11)
    sizes = [RATIO * VOCABULARY + 2 * head + 1 for head in range(HEADS)]
    return [torch.randn(size, HIDDEN // HEADS, generator=generator).to(dtype) for size in sizes]


def spelled(tensor):
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "F8_E4M3"}
    return names[tensor.dtype], tuple(tensor.shape), bits(tensor)


def write_tables(folder, tables, config=None, projections=()):
    """Two files, tables in no order, and tensors of the rest of the model between them."""
    named = {TABLES.format(head): spelled(table) for head, table in tables.items()}
    named |= {PROJECTIONS.format(head): spelled(weight) for head, weight in enumerate(projections)}
    other = {"model.embed_tokens.weight": ("BF16", (3, 1), b"abcdef")}
    shards = {
        "b.safetensors": dict(list(named.items())[::2]),
        "a.safetensors": other | dict(list(named.items())[1::2]),
    }
    return write_checkpoint(folder, shards, longcat_config() if config is None else config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tables_of_a_checkpoint_are_one_in_place(tmp_path, dtype):
    tables = released_rows(dtype)
    folder = write_tables(tmp_path / "m", dict(enumerate(tables)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = open_released_table(folder)
    rows_ND = torch.cat(tables)
    assert (table.num_embeddings, table.embedding_dim, table.dtype) == (*rows_ND.shape, dtype)
    assert bits(table(torch.arange(len(rows_ND)))) == bits(rows_ND)
    assert table.config == small(engram_dim=HIDDEN)
    assert (table.facts.variant, table.facts.layer, table.facts.num_parts) == ("longcat_flash", 0, HEADS)
    assert table.belongs_to.compressed_vocab_size == VOCABULARY
    ids_BT = random_ids(length=7, batch=1)
    expected = torch.stack([rows_ND[row_ids_H] for row_ids_H in torch.tensor(slow_rows(ids_BT[0].tolist()))])
    assert torch.equal(table(hasher_for(table.config)(ids_BT))[0], expected)


def test_rows_are_those_of_transformers_own_reading(tmp_path):
    """Written by the safetensors library, in three files; opened by folder, and by the index."""
    tables = released_rows()
    folder = write_tables(tmp_path, {})
    index = {}
    for number in range(3):
        held = {TABLES.format(head): tables[head] for head in range(HEADS) if head % 3 == number}
        save_file(held, folder / f"part-{number}.safetensors")
        index |= dict.fromkeys(held, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for place in (folder, folder / "model.safetensors.index.json"):
        table = open_released_table(place, 0)
        assert bits(table(torch.arange(table.num_embeddings))) == bits(torch.cat(tables))


REFUSED = [
    ({"missing": 3}, {}, r"weight shard 3 of 6 isn't there\. Fetch the rest"),
    (
        {"missing": 5},
        {},
        r"5 tables, up to model\.ngram_embeddings\.embedders\.4\.weight; config\.json says 6, 2 for each",
    ),
    (
        {"more": 1},
        {},
        r"7 tables, up to model\.ngram_embeddings\.embedders\.6\.weight; config\.json says 6, 2 for each",
    ),
    ({"swap": (1, 4)}, {}, r"embedders\.1\.weight has 159 rows; expected 153, by the first"),
    ({}, {"ngram_vocab_size_ratio": 4}, r"936 rows, but the layout of config\.json has 1236: a part is missing"),
    ({}, {"hidden_size": 48}, r"rows of 4 values; config\.json says 8"),
    ({}, {"emb_neighbor_num": 3, "hidden_size": 16}, r"6 tables, up to .*embedders\.5\.weight; config\.json says 4"),
    ({}, {"ngram_vocab_size_ratio": float("nan")}, r"ngram_vocab_size_ratio = nan: must be above 0"),
    ({}, {"ngram_vocab_size_ratio": "3"}, r"ngram_vocab_size_ratio = 3: must be above 0"),
    ({}, {"emb_neighbor_num": 10**9}, r"emb_neighbor_num = 1000000000: must be from 1 to"),
    ({}, {"emb_split_num": None}, r"emb_split_num is null"),
    ({}, {"model_type": "longcat_next"}, r"the n-grams of model_type = 'longcat_next' may follow other rules"),
    ({"float8": True}, {}, r"embedders\.0\.weight is F8_E4M3; expected BF16 or F16 or F32"),
]


@pytest.mark.parametrize(("forged", "changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path, forged, changes, message):
    tables = dict(enumerate(released_rows()))
    tables.pop(forged.get("missing"), None)
    if "more" in forged:
        tables[HEADS] = torch.zeros(RATIO * VOCABULARY + 2 * HEADS + 1, HIDDEN // HEADS, dtype=torch.bfloat16)
    if "swap" in forged:
        one, other = forged["swap"]
        tables[one], tables[other] = tables[other], tables[one]
    if "float8" in forged:
        tables = {head: torch.zeros(table.shape, dtype=torch.uint8) for head, table in tables.items()}
    folder = write_tables(tmp_path / "m", tables, longcat_config(**changes))
    with pytest.raises(ValueError, match=message):
        open_released_table(folder)


def test_without_a_configuration_a_warning_says_what_was_not_checked(tmp_path):
    folder = write_tables(tmp_path, dict(enumerate(released_rows())))
    (folder / "config.json").unlink()
    with pytest.warns(UserWarning, match="not checked.*the number of rows against the layout"):
        assert open_released_table(folder).config is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_released_table(folder, config=small(engram_dim=HIDDEN)).facts.layout is not None


def test_at_the_released_size(tmp_path):
    """A sparse file of 122,683,536 rows of 256 values: opened at once, rows of every table where they belong."""
    sizes = [78 * 131_072 + 2 * head + 1 for head in range(12)]
    row = {size - 1: bytes([number + 1]) * 512 for number, size in enumerate(sizes)}
    tensors = {
        TABLES.format(head): ("BF16", (size, 256), {size - 1: row[size - 1]}) for head, size in enumerate(sizes)
    }
    config = longcat_config(
        vocab_size=131_072, hidden_size=3072, ngram_vocab_size_ratio=78, emb_split_num=4, eos_token_id=2
    )
    table = open_released_table(write_checkpoint(tmp_path, {"model.safetensors": tensors}, config))
    assert table.num_embeddings == sum(sizes) == 122_683_536
    found = table(torch.tensor(sizes).cumsum(0) - 1)
    assert [set(bits(one)) for one in found] == [{number + 1} for number in range(12)]
    assert not table(torch.tensor([0, sizes[0]])).any()


def test_inspect_and_lookup(tmp_path, capsys):
    tables = released_rows()
    folder = write_tables(tmp_path / "m", dict(enumerate(tables)), longcat_config(vocab_size=VOCABULARY))
    assert main(["inspect", str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tables"]
    assert (found["variant"], found["layer"], found["rows"], found["unchecked"]) == ("longcat_flash", 0, 936, [])
    assert found["primes"] == [len(table) for table in tables]
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()).save_pretrained(tmp_path / "t")
    assert main(["lookup", str(folder), "abab", "--tokenizer", str(tmp_path / "t"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["row_ids"]["0"] == slow_rows(found["token_ids"])
    norms = torch.cat(tables).float()[torch.tensor(found["row_ids"]["0"])].norm(dim=-1)
    torch.testing.assert_close(torch.tensor(found["row_norms"]["0"]), norms)


def test_convert_makes_a_table_and_weights_of_ours(tmp_path):
    tables = released_rows()
    generator = torch.Generator().manual_seed(3)
    projections = [torch.randn(HIDDEN, HIDDEN // HEADS, generator=generator).bfloat16() for _ in range(HEADS)]
    folder = write_tables(tmp_path / "m", dict(enumerate(tables)), projections=projections)
    done = import_table(folder, 0, tmp_path / "ours.dat")
    assert (tmp_path / "ours.dat").read_bytes() == bits(torch.cat(tables))
    assert done.fusion_path is not None
    weight = load_file(done.fusion_path)["W_v.weight"]
    assert torch.equal(weight, torch.cat(projections, dim=1).float())
    paths = {"storage_path": str(tmp_path / "ours.dat"), "shadow_map_path": str(tmp_path / "m.npy")}
    write_identity_map(paths["shadow_map_path"], VOCABULARY)
    opened = open_table(
        small(engram_dim=HIDDEN, dtype="bfloat16", **paths), EngramTokenizer(paths["shadow_map_path"])
    )
    assert torch.equal(opened.gather(torch.arange(936)), torch.cat(tables).float())
    opened.close()


def test_projections_that_are_not_whole_are_refused(tmp_path):
    projections = [torch.zeros(HIDDEN, HIDDEN // HEADS, dtype=torch.bfloat16) for _ in range(HEADS)]
    folder = write_tables(tmp_path / "m", dict(enumerate(released_rows())), projections=projections)
    assert released_projections(folder, HEADS)["W_v.weight"].shape == (HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"ngram_embeddings\.post_projs\.6\.weight isn't there\. Fetch the rest"):
        released_projections(folder, HEADS + 1)
    projections[2] = projections[2].T.contiguous()
    folder = write_tables(tmp_path / "n", dict(enumerate(released_rows())), projections=projections)
    with pytest.raises(ValueError, match=r"post_projs\.2\.weight has shape \[4, 24\]; expected that of the first"):
        released_projections(folder, HEADS)
