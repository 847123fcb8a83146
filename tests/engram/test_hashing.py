"""Hashing against the public implementations' numbers, and against a slow oracle written from the formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sense_v2.core.config import EngramConfig
from sense_v2.engram import hashing
from sense_v2.engram.hashing import NO_TOKEN, NgramHasher
from sense_v2.engram.head_layout import HeadLayout, hash_multipliers

PAPER = {"layer_ids": [1, 15], "ngram_orders": [2, 3], "num_heads": 8, "table_size": 646_400}
RELEASED = {"layer_ids": [1, 14], "ngram_orders": [2, 3, 4], "num_heads": 8, "table_size": 16_000_000}
PUBLISHED = {"compressed_vocab_size": 99_092, "pad_id": 2}


COMPILED = hashing.compiled


@pytest.fixture(scope="module", params=["compiled", "plain"], autouse=True)
def way(request):
    """Every test of this module runs with the compiled part, and with operators of torch alone."""
    if request.param == "plain":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hashing, "compiled", None)
            yield request.param
    elif COMPILED is None:
        pytest.skip("_ngrams.c isn't compiled here")
    else:
        yield request.param


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


# --- the public implementations' numbers ---


@pytest.mark.parametrize("layer", [0, 1])
def test_released_layout_is_reproduced(golden, layer):
    expected = golden("deepseek_v41_hash.json")
    hasher = NgramHasher("deepseek_v41", layer_id=RELEASED["layer_ids"][layer], **RELEASED, **PUBLISHED)
    assert hasher.multipliers.tolist() == expected["multipliers"][layer]
    assert list(hasher.layout.primes_LH[layer]) == expected["primes"][layer]
    assert list(hasher.layout.offsets_LH[layer]) == expected["offsets"][layer]
    assert hasher.num_rows == expected["config"]["num_embeddings"][layer]


def released_rows(deepseek_map, input_ids, **masks) -> np.ndarray:
    """[B, T, layer, H] of token ids [B, T]."""
    compressed_ids_BT = deepseek_map[np.array(input_ids)]
    layers = [NgramHasher("deepseek_v41", layer_id=i, **RELEASED, **PUBLISHED) for i in RELEASED["layer_ids"]]
    return np.stack([hasher(compressed_ids_BT, **masks) for hasher in layers], axis=2)


@pytest.mark.parametrize("case", range(6))
def test_released_row_ids(golden, deepseek_map, case):
    expected = golden("deepseek_v41_hash.json")["cases"][case]
    rows = released_rows(deepseek_map, [expected["input_ids"]])
    np.testing.assert_array_equal(rows[0], expected["row_ids"])


def test_released_row_ids_of_packed_documents(golden, deepseek_map):
    expected = golden("deepseek_v41_hash.json")["packed_and_masked"]
    rows = released_rows(deepseek_map, expected["input_ids"], sequence_ids=np.array(expected["sequence_ids"]))
    np.testing.assert_array_equal(rows, expected["row_ids_packed"])


def test_released_row_ids_of_masked_tokens(golden, deepseek_map):
    expected = golden("deepseek_v41_hash.json")["packed_and_masked"]
    rows = released_rows(deepseek_map, expected["input_ids"], attention_mask=np.array(expected["token_mask"]))
    np.testing.assert_array_equal(rows, expected["row_ids_masked"])


@pytest.mark.parametrize("layer_id", [1, 15])
def test_paper_head_ids(golden, deepseek_map, layer_id):
    expected = golden("paper_demo_hash.json")
    hasher = NgramHasher("paper", layer_id=layer_id, **PAPER, **PUBLISHED)
    layer = PAPER["layer_ids"].index(layer_id)
    assert hasher.multipliers.tolist() == expected["multipliers"][str(layer_id)]
    assert list(hasher.layout.primes_LH[layer]) == [p for order in expected["primes"][str(layer_id)] for p in order]
    for case in expected["cases"]:
        rows_BTH = hasher(deepseek_map[np.array([case["input_ids"]])])
        head_ids = rows_BTH[0] - np.array(hasher.layout.offsets_LH[layer])
        np.testing.assert_array_equal(head_ids, case["head_ids"][str(layer_id)])


# --- the layout ---


@pytest.mark.parametrize(("table_size", "layers", "orders", "heads"), [(10_000_000, 2, 2, 8), (4_000, 3, 1, 4)])
def test_sense_primes_are_distinct_lie_below_the_budget_and_fill_it(table_size, layers, orders, heads):
    layout = HeadLayout.build(
        "sense",
        layer_ids=range(layers),
        ngram_orders=range(2, 2 + orders),
        num_heads=heads,
        table_size=table_size,
    )
    primes = [prime for primes_H in layout.primes_LH for prime in primes_H]
    count = layers * orders * heads
    assert len(set(primes)) == len(primes) == count
    assert all(is_prime(prime) and prime <= table_size // count for prime in primes)
    below = [number for number in range(table_size // count, min(primes) - 1, -1) if is_prime(number)]
    assert primes == below, "a prime was left out, so the heads could have filled more of the table"
    assert layout.num_rows_L == (table_size,) * layers


def test_ranges_of_all_heads_of_all_layers_follow_each_other():
    layout = HeadLayout.build("sense", layer_ids=[0, 3], ngram_orders=[2, 3], num_heads=2, table_size=1_000)
    next_row = 0
    for primes_H, offsets_H in zip(layout.primes_LH, layout.offsets_LH, strict=True):
        for prime, offset in zip(primes_H, offsets_H, strict=True):
            assert offset == next_row
            next_row += prime
    assert next_row <= 1_000


def test_too_small_a_budget_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"table_size = 100 has no room for 32 heads.*larger table_size, or fewer"):
        HeadLayout.build("sense", layer_ids=[2, 15], ngram_orders=[2, 3], num_heads=8, table_size=100)


def test_smallest_budget_that_has_room():
    layout = HeadLayout.build("sense", layer_ids=[0], ngram_orders=[2], num_heads=3, table_size=15)
    assert layout.primes_LH == ((5, 3, 2),)


def test_largest_product_stays_in_int64():
    for size in (2, 3, 1_000, 99_092, 2**31):
        multipliers = hash_multipliers(7, largest_order=4, compressed_vocab_size=size, seed=3)
        assert multipliers.min() > 0
        assert (multipliers % 2 == 1).all()
        assert all(int(m) * (size - 1) < 2**63 for m in multipliers)


# --- a slow oracle, from DESIGN's formula: one position at a time, Python integers ---


def oracle_rows(ids, valid, documents, history, hasher, orders, heads_per_order):
    """Row ids [T][H] of one sequence. `history` is a list of compressed ids or None entries, `ids` likewise."""
    tokens = [None if token == NO_TOKEN else (token, documents[0]) for token in history]
    tokens += [(i, d) if ok and d != 0 else None for i, ok, d in zip(ids, valid, documents, strict=True)]
    layer = hasher.layout.layer_ids.index(hasher.layer_id)
    result = []
    for t in range(len(history), len(tokens)):
        window = []
        open_ = tokens[t] is not None
        for back in range(max(orders)):
            at = t - back
            open_ = open_ and at >= 0 and tokens[at] is not None and tokens[at][1] == tokens[t][1]
            window.append(tokens[at][0] if open_ else hasher.pad_id)
        row = []
        for which, order in enumerate(orders):
            mix = 0
            for back in range(order):
                mix ^= window[back] * int(hasher.multipliers[back])
            for head in range(heads_per_order):
                h = which * heads_per_order + head
                row.append(mix % hasher.layout.primes_LH[layer][h] + hasher.layout.offsets_LH[layer][h])
        result.append(row)
    return result


VOCABULARY = 40


def make_hasher(orders=(2, 3), heads=2, layer_id=2) -> NgramHasher:
    return NgramHasher(
        "sense",
        layer_id=layer_id,
        layer_ids=[0, 2],
        ngram_orders=list(orders),
        num_heads=heads,
        table_size=3_000,
        compressed_vocab_size=VOCABULARY,
        pad_id=5,
        seed=11,
    )


@st.composite
def batches(draw):
    batch, length, past = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 4))
    grid = lambda values, columns: np.array(  # noqa: E731
        draw(st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=batch, max_size=batch)),
        dtype=np.int64,
    ).reshape(batch, columns)
    return {
        "ids": grid(st.integers(0, VOCABULARY - 1), length),
        "mask": draw(st.none() | st.just(grid(st.integers(0, 1), length))),
        "documents": draw(st.none() | st.just(grid(st.integers(0, 3), length))),
        "history": grid(st.integers(NO_TOKEN, VOCABULARY - 1), past) if past else None,
    }


@given(batches(), st.sampled_from([(2,), (3,), (2, 3), (2, 4), (3, 5)]))
@settings(max_examples=150, deadline=None)
def test_equal_to_the_slow_oracle_in_numpy_and_torch(batch, orders):
    hasher = make_hasher(orders)
    ids, mask, documents, history = batch["ids"], batch["mask"], batch["documents"], batch["history"]
    rows = hasher(ids, attention_mask=mask, sequence_ids=documents, history=history)
    as_torch = lambda x: None if x is None else torch.from_numpy(x)  # noqa: E731
    rows_torch = hasher(
        as_torch(ids), attention_mask=as_torch(mask), sequence_ids=as_torch(documents), history=as_torch(history)
    )
    expected = [
        oracle_rows(
            ids[b].tolist(),
            [True] * len(ids[b]) if mask is None else mask[b].tolist(),
            [1] * len(ids[b]) if documents is None else documents[b].tolist(),
            [] if history is None else history[b].tolist(),
            hasher,
            orders,
            2,
        )
        for b in range(len(ids))
    ]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(rows_torch.numpy(), expected)
    assert rows.dtype == np.int64


ENDING = {"ngram_orders": [2, 3], "num_heads": 2, "table_size": 3_000, "compressed_vocab_size": VOCABULARY}


@pytest.mark.skipif(COMPILED is None, reason="_ngrams.c isn't compiled here")
@pytest.mark.parametrize("variant", ["sense", "qwen_ple", "longcat_flash"])
@given(batch=batches(), pad_id=st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_compiled_part_gives_the_operators_bits(variant, batch, pad_id):
    """Also where n-grams end at a token, where digits are added up, and where products of spare ids wrap around."""
    hasher = NgramHasher(variant, layer_id=0, layer_ids=[0], pad_id=pad_id, num_spare_ids=2**50, **ENDING)
    ids, history = batch["ids"].copy(), batch["history"]
    ids[0, 0] += 2**49
    masks = {"attention_mask": batch["mask"], "sequence_ids": batch["documents"], "history": history}
    found = []
    for compiled in (COMPILED, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hashing, "compiled", compiled)
            found.append(hasher(ids, **masks))
    np.testing.assert_array_equal(*found)


@pytest.mark.skipif(COMPILED is None, reason="_ngrams.c isn't compiled here")
def test_buffers_that_do_not_fit_are_refused():
    """Nobody calls it so; but a mistake in Python must not become a write outside the result."""
    ids, found = np.zeros((2, 3), np.int64), np.zeros((2, 2, 3), np.int64)
    look_back = COMPILED.look_back
    for valid, documents, history, batch, out in (
        (np.ones((2, 2), bool), None, None, 2, found),
        (None, ids[:1], None, 2, found),
        (None, None, np.zeros(3, np.int64), 2, found),
        (None, None, None, 5, found),
        (None, None, None, 2, found.ravel()[:-1].copy()),
    ):
        with pytest.raises(ValueError, match="aren't of one batch"):
            look_back(ids, valid, documents, history, batch, 10, NO_TOKEN, 0, out)
    heads = np.ones(4, np.int64)
    for ids_KN, multipliers, sizes, out in (
        (found, np.ones((3, 4), np.int64), heads, np.zeros((2, 3, 4), np.int64)),
        (found, np.ones((2, 4), np.int64), heads[:3].copy(), np.zeros((2, 3, 4), np.int64)),
        (found, np.ones((2, 4), np.int64), heads, np.zeros((2, 3, 3), np.int64)),
        (found, np.ones((2, 4), np.int64), heads * 0, np.zeros((2, 3, 4), np.int64)),
    ):
        with pytest.raises(ValueError, match="aren't of one layer's heads"):
            COMPILED.hash_rows(ids_KN, multipliers, False, sizes, heads, 0, out)


@given(batches())
@settings(max_examples=50, deadline=None)
def test_a_heads_rows_stay_in_its_range(batch):
    for layer, layer_id in enumerate([0, 2]):
        hasher = make_hasher(layer_id=layer_id)
        rows_BTH = hasher(batch["ids"], attention_mask=batch["mask"])
        first = np.array(hasher.layout.offsets_LH[layer])
        assert (rows_BTH >= first).all()
        assert (rows_BTH < first + np.array(hasher.layout.primes_LH[layer])).all()


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=12), st.data())
@settings(max_examples=50, deadline=None)
def test_any_split_with_history_equals_the_whole(ids, data):
    hasher = make_hasher((2, 4))
    whole = np.array([ids])
    cut = data.draw(st.integers(1, len(ids) - 1))
    start = max(0, cut - 3)
    tail = hasher(whole[:, cut:], history=whole[:, start:cut])
    np.testing.assert_array_equal(tail, hasher(whole)[:, cut:])


def test_int32_ids_and_boolean_masks_are_taken():
    hasher = make_hasher()
    ids = np.array([[1, 2, 3, 4]])
    mask = np.array([[0, 1, 1, 1]])
    expected = hasher(ids, attention_mask=mask)
    np.testing.assert_array_equal(hasher(ids.astype(np.int32), attention_mask=mask.astype(bool)), expected)


def test_the_current_token_is_in_every_window():
    """A 2-gram window that leaves out the current token has bitten a public project."""
    hasher = make_hasher()
    one, other = hasher(np.array([[1, 2, 3]])), hasher(np.array([[1, 2, 4]]))
    assert (one[0, 2] != other[0, 2]).all()
    np.testing.assert_array_equal(one[0, :2], other[0, :2])


def test_from_config_hashes_like_the_written_out_call():
    config = EngramConfig(table_size=3_000, engram_dim=16, num_heads=2, layer_indices=[0, 2], seed=11)
    ids = np.arange(12).reshape(2, 6)
    hasher = NgramHasher.from_config(config, layer_id=2, compressed_vocab_size=VOCABULARY, pad_id=5)
    np.testing.assert_array_equal(hasher(ids), make_hasher()(ids))


# --- bad input ---


def test_ids_outside_the_compressed_range_are_named():
    hasher = make_hasher()
    with pytest.raises(IndexError, match=r"hold 40, outside 0 to 39"):
        hasher(np.array([[1, 40]]))
    with pytest.raises(IndexError, match=r"hold -1, outside 0 to 39"):
        hasher(np.array([[1, -1]]))
    with pytest.raises(TypeError, match="float64"):
        hasher(np.array([[1.0]]))


def test_shapes_that_do_not_fit_are_named():
    hasher = make_hasher()
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \[batch, sequence\]"):
        hasher(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\); expected \(1, 3\)"):
        hasher(np.array([[1, 2, 3]]), attention_mask=np.ones((1, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"history has shape \(2, 2\)"):
        hasher(np.array([[1, 2, 3]]), history=np.ones((2, 2), dtype=np.int64))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="no variant 'papper'"):
        NgramHasher("papper", layer_id=1, **PAPER, **PUBLISHED)
    with pytest.raises(ValueError, match="layer_id = 2 is not among"):
        NgramHasher("paper", layer_id=2, **PAPER, **PUBLISHED)
    with pytest.raises(ValueError, match="pad_id = 99092"):
        NgramHasher("paper", layer_id=1, **PAPER, compressed_vocab_size=99_092, pad_id=99_092)
