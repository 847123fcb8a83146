"""What is observed of a memory, and the numbers made of it, recounted: from the model, the table's file, by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sense_v2.engram.upkeep.hot_rows import RowCounts
from sense_v2.engram.upkeep.ngram_usage import number_ngrams, rows_of
from sense_v2.engram.upkeep.row_lengths import measure_rows
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.data.token_texts import CLASSES, Words
from sense_v2.hf.insight import analysis
from sense_v2.hf.insight.evaluation import gate_strengths, token_losses
from sense_v2.hf.insight.observation import observe
from sense_v2.hf.memory import memory_of

LAYERS, ORDERS, HEADS, WIDTH, T = [0, 2], [2, 3], 2, 8, 20


def zipf_ids(*shape, seed):
    drawn = np.random.default_rng(seed).zipf(1.3, shape)
    return np.minimum(drawn + 2, VOCABULARY - 1).astype(np.int64)


class Case:
    """A model, texts, and all that `analyze` makes of them."""

    def __init__(self, folder):
        torch.manual_seed(1)
        self.model = attach_engram(tiny_model("llama"), tiny_config(folder, layer_indices=LAYERS), tiny_tokenizer())
        wake(memory_of(self.model))
        self.memory = memory_of(self.model)
        self.memory.storage.flush()
        # A row of layer 0's first head moves on its own.
        self.began = np.fromfile(self.memory.storage.path, dtype="<f4").reshape(-1, WIDTH)
        self.ids_BT = torch.from_numpy(zipf_ids(5, T, seed=1))
        self.counted = [zipf_ids(30, T, seed=2), zipf_ids(1, 7, seed=3)]
        self.seen = observe(self.model, self.ids_BT, batch_size=2)
        self.layout = next(iter(self.memory)).hasher.layout
        pad_id = next(iter(self.memory)).hasher.pad_id
        self.compressed = [self.memory.tokenizer(torch.from_numpy(part)).numpy() for part in self.counted]
        self.ngrams = number_ngrams(self.compressed, [self.seen.compressed_ids_BT], ORDERS, pad_id=pad_id)
        self.rows_LO = [[rows_of(own, fusion.hasher) for own in self.ngrams] for fusion in self.memory]
        self.lengths = measure_rows(self.memory.storage.path, self.memory.storage.manifest)
        self.words = Words(tiny_tokenizer())
        self.gain_BT = self.seen.losses_without_BT - self.seen.losses_with_BT

    def ngram_at(self, order, block, at):
        """Compressed ids, by hand; the pad id before the block."""
        ids = self.seen.compressed_ids_BT[block]
        pad_id = next(iter(self.memory)).hasher.pad_id
        return tuple(int(ids[at - back]) if at >= back else pad_id for back in reversed(range(order)))

    def counted_ngrams(self, order):
        pad_id = next(iter(self.memory)).hasher.pad_id
        return Counter(
            tuple(int(block[at - back]) if at >= back else pad_id for back in reversed(range(order)))
            for array in self.compressed
            for block in array
            for at in range(len(block))
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


# --- what is observed ---


def test_losses_are_with_and_without(case, tmp_path):
    assert np.allclose(case.seen.losses_with_BT, token_losses(case.model, case.ids_BT), atol=1e-6)
    bare = Case(tmp_path)
    detach_engram(bare.model)
    assert np.allclose(case.seen.losses_without_BT, token_losses(bare.model, case.ids_BT), atol=1e-6)
    assert np.abs(case.gain_BT).max() > 0.1


def test_gates_are_the_layers_own(case):
    for block in range(5):
        expected = gate_strengths(case.model, case.ids_BT[block])
        for number, layer in enumerate(LAYERS):
            assert np.allclose(case.seen.gates_LBT[number, block], expected[layer], atol=1e-6)
    assert case.seen.gates_LBT.std() > 0.01


def test_rows_and_norms_are_the_files(case):
    for number, fusion in enumerate(case.memory):
        ids_BTH = fusion.row_ids(case.ids_BT).numpy()
        assert np.array_equal(case.seen.row_ids_LBTH[number], ids_BTH)
        norms = np.linalg.norm(case.began[ids_BTH], axis=-1)
        assert np.allclose(case.seen.row_norms_LBTH[number], norms, rtol=1e-5)


def test_shares_are_lengths_of_what_the_rows_add(case):
    hidden = {}
    fusions = list(case.memory)
    handles = [
        fusion.gate.register_forward_hook(lambda gate, inputs, alpha, at=at: hidden.update({at: (inputs[0], alpha)}))
        for at, fusion in enumerate(fusions)
    ]
    with torch.no_grad():
        case.model(case.ids_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    for number, fusion in enumerate(fusions):
        h_BTC, alpha_BT = hidden[number][0][:, :, 0].numpy(), hidden[number][1][..., 0].numpy()
        weight = fusion.W_v.weight.detach().numpy()
        for place in range(2):
            rows_BTE = case.began[fusion.row_ids(case.ids_BT).numpy()][:, :, 2 * place : 2 * place + 2]
            added = rows_BTE.reshape(5, T, 16) @ weight[:, 16 * place : 16 * place + 16].T
            expected = alpha_BT * np.linalg.norm(added, axis=-1) / np.linalg.norm(h_BTC, axis=-1)
            assert np.allclose(case.seen.shares_LOBT[number, place], expected, rtol=1e-4)


def test_observing_changes_nothing_and_no_batch_matters(case):
    whole = observe(case.model, case.ids_BT, batch_size=5)
    for name in ("gates_LBT", "shares_LOBT", "losses_with_BT", "row_ids_LBTH"):
        assert np.allclose(getattr(whole, name), getattr(case.seen, name), atol=1e-5), name
    assert all(not fusion.gate._forward_hooks and not fusion._forward_hooks for fusion in case.memory)
    now = np.fromfile(case.memory.storage.path, dtype="<f4").reshape(-1, WIDTH)
    assert np.array_equal(now, case.began)


# --- words ---


BEGIN, INSIDE, NUMBER, PUNCTUATION, SPACE, PART, SPECIAL = range(len(CLASSES))


def words_of(tokens, decoder):
    tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(tokens)}, unk_token="</s>"))
    tokenizer.decoder = decoder
    return Words(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


def test_tokens_are_of_their_kind():
    tokens = ["Ġdef", "ine", "42", "Ġ7", "):", "ĊĊ", "ĠĠĠ", "x9", "Ã©", "Ã", "_", "</s>"]
    words = words_of(tokens, decoders.ByteLevel())
    assert [words.of(at) for at in range(12)][:9] == [" def", "ine", "42", " 7", "):", "\n\n", "   ", "x9", "é"]
    expected = [
        (" def", BEGIN, "ine", INSIDE, "42", NUMBER, "ine", INSIDE, "):", PUNCTUATION, "\n\n", SPACE),
        ("ine", BEGIN, " 7", NUMBER, "x9", INSIDE, "é", INSIDE, "_", PUNCTUATION, "ine", INSIDE),
        ("   ", SPACE, "x9", BEGIN, " def", BEGIN, "</s>", SPECIAL, "ine", BEGIN, "\ufffd", PART),
    ]
    texts = {words.of(at): at for at in range(12)}
    ids = np.array([[texts[text] for text in line[::2]] for line in expected])
    assert words.classes(ids).tolist() == [list(line[1::2]) for line in expected]


@pytest.mark.parametrize(
    ("tokens", "decoder", "texts", "classes"),
    [
        (["▁def", "ine", "</s>"], decoders.Metaspace(), [" def", "ine"], [BEGIN, INSIDE, BEGIN]),
        (["def", "##ine", "</s>"], decoders.WordPiece(), ["def", "##ine"], [BEGIN, INSIDE, BEGIN]),
        # Whole words.
        (["def", "ine", "</s>"], None, ["def", "ine"], [BEGIN, BEGIN, BEGIN]),
    ],
)
def test_where_a_word_goes_on_depends_on_the_tokenizer(tokens, decoder, texts, classes):
    words = words_of(tokens, decoder)
    assert [words.of(0), words.of(1)] == texts
    assert words.classes(np.array([[0, 1, 0]])).tolist() == [classes]


def test_classes_hold_all_tokens_and_their_means(case):
    found = analysis.token_classes(case.seen, case.words)
    assert sum(one["tokens"] for one in found) == 5 * T
    classes_BT = case.words.classes(case.seen.token_ids_BT)
    for one in found:
        is_it = classes_BT == CLASSES.index(one["class"])
        assert one["gates"] == pytest.approx([float(gates[is_it].mean()) for gates in case.seen.gates_LBT])
        assert one["gain"] == pytest.approx(case.gain_BT[is_it[:, 1:]].mean())


# --- numbers ---


def test_gates_by_layer_and_position(case):
    found = analysis.gates(case.seen, LAYERS)
    assert [one["layer"] for one in found] == LAYERS
    for one, gates_BT in zip(found, case.seen.gates_LBT, strict=True):
        assert sum(one["histogram"]) == 5 * T
        assert one["quantiles"]["0.5"] == pytest.approx(float(np.median(gates_BT)))
        assert [(point["from"], point["to"]) for point in one["by_position"]] == [(at, at) for at in range(T)]
        assert [point["gate"] for point in one["by_position"]] == pytest.approx(gates_BT.mean(axis=0).tolist())


def test_groups_by_frequency_are_a_recount(case):
    found = analysis.by_frequency(case.seen, case.ngrams)
    for order in ORDERS:
        counted = case.counted_ngrams(order)
        groups = [one for one in found if one["order"] == order]
        assert sum(one["tokens"] for one in groups) == 5 * (T - 1)
        assert sum(one["part"] for one in groups) == pytest.approx(1)
        for one in groups:
            high = math.inf if one["high"] is None else one["high"]
            gains = [
                case.gain_BT[block, at]
                for block in range(5)
                for at in range(T - 1)
                if one["low"] <= counted[case.ngram_at(order, block, at)] <= high
            ]
            assert one["tokens"] == len(gains)
            assert one["gain"] == pytest.approx(np.mean(gains))
            assert one["gain"] == pytest.approx(one["loss_without"] - one["loss_with"])
            low, high = one["interval"]
            assert low <= one["gain"] <= high or math.isnan(low)
    assert {one["low"] for one in found} >= {0, 1, 2, 16}


def test_the_interval_of_a_group_is_over_its_blocks_and_holds_the_mean_as_often_as_it_says(case):
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        # All tokens of a block gain alike: 40 draws and not 800.
        gain_BT = np.repeat(generator.normal(0.3, 1.0, (40, 1)), 20, axis=1)
        group_BT = generator.random((40, 20)) < 0.5
        low, high = analysis.mean_interval(gain_BT, group_BT)
        held += low <= 0.3 <= high
    assert 85 <= held <= 99
    one_block = np.zeros((40, 20), dtype=bool)
    one_block[3] = True
    assert all(map(math.isnan, analysis.mean_interval(gain_BT, one_block)))


def test_the_losses_of_single_tokens_are_those_of_the_text(case, monkeypatch):
    found = analysis.scattered(case.seen)
    assert found["with"] == pytest.approx(case.seen.losses_with_BT.ravel(), abs=6e-4)
    assert found["without"] == pytest.approx(case.seen.losses_without_BT.ravel(), abs=6e-4)
    monkeypatch.setattr(analysis, "SCATTERED", 7)
    assert [len(losses) for losses in analysis.scattered(case.seen).values()] == [7, 7]


@pytest.mark.parametrize("harm", [False, True])
def test_the_tokens_that_gain_or_lose_most(case, harm):
    found = analysis.extreme_tokens(case.seen, case.ngrams, case.words, count=7, harm=harm)
    gains = [one["gain"] for one in found]
    assert gains == sorted(gains, reverse=not harm)
    assert len(gains) == 7
    assert gains[0] == (case.gain_BT.min() if harm else case.gain_BT.max())
    keys = set()
    for one in found:
        block, at = one["block"], one["position"] - 1
        assert one["token"] == case.words.of(case.seen.token_ids_BT[block, at + 1])
        assert one["context"].split()[-1] == case.words.of(case.seen.token_ids_BT[block, at])
        assert one["counted"] == [case.counted_ngrams(order)[case.ngram_at(order, block, at)] for order in ORDERS]
        assert one["gain"] == one["loss_without"] - one["loss_with"] == case.gain_BT[block, at]
        keys.add((case.ngram_at(3, block, at), one["token"]))
    assert len(keys) == 7


def test_the_ngrams_leaned_on_are_a_recount(case):
    found = analysis.leaned_on(case.seen, case.ngrams, LAYERS, case.words, count=5)
    assert [(one["layer"], one["order"]) for one in found] == [(0, 2), (0, 3), (2, 2), (2, 3)]
    for one in found:
        number, place, order = LAYERS.index(one["layer"]), ORDERS.index(one["order"]), one["order"]
        shares: dict[tuple, list] = {}
        for block in range(5):
            for at in range(T):
                shares.setdefault(case.ngram_at(order, block, at), []).append(
                    case.seen.shares_LOBT[number, place, block, at]
                )
        frequent = {key: values for key, values in shares.items() if len(values) >= 3}
        best = sorted(frequent, key=lambda key: -np.mean(frequent[key]))[:5]
        assert [entry["share"] for entry in one["ngrams"]] == pytest.approx([np.mean(frequent[key]) for key in best])
        assert [entry["times"] for entry in one["ngrams"]] == [len(frequent[key]) for key in best]
        assert [entry["counted"] for entry in one["ngrams"]] == [case.counted_ngrams(order)[key] for key in best]


def test_the_coloured_text_says_what_each_token_looked_up(case):
    found = analysis.coloured_text(case.seen, case.ngrams, case.rows_LO, LAYERS, case.words, num_tokens=9)
    assert len(found["tokens"]) == 9
    at, number, head = 6, 1, 1
    token = found["tokens"][at]
    assert token["text"] == case.words.of(case.seen.token_ids_BT[0, at])
    assert token["loss_with"] == case.seen.losses_with_BT[0, at - 1]
    assert found["tokens"][0]["loss_with"] is None
    fusion = case.memory.layers["2"]
    for place, order in enumerate(ORDERS):
        ngram = token["layers"][number][place]
        own = case.ngram_at(order, 0, at)
        row = int(fusion.row_ids(case.ids_BT)[0, at, 2 * place + head])
        assert ngram["rows"][head] == row
        assert ngram["norms"][head] == pytest.approx(np.linalg.norm(case.began[row]), rel=1e-5)
        assert ngram["counted"] == case.counted_ngrams(order)[own]
        assert len(ngram["text"].split()) == order
        others = {
            key
            for key in case.counted_ngrams(order)
            if key != own and int(fusion.hasher(np.array([key]))[0, -1, 2 * place + head]) == row
        }
        assert ngram["others"][head] == len(others)
    every = [n for t in found["tokens"] for layer in t["layers"] for ngram in layer for n in ngram["others"]]
    assert max(every) > 0, "no collision to count"


def test_rows_are_counted_as_profile_counts_them(case):
    ids_R, counted_R, analysed_R = analysis.row_counts(case.ngrams, case.rows_LO)
    assert (np.diff(ids_R) > 0).all()
    counts, held_out = RowCounts(), RowCounts()
    for fusion in case.memory:
        for part in case.counted:
            counts.add(fusion.row_ids(torch.from_numpy(part)).numpy())
        held_out.add(fusion.row_ids(case.ids_BT).numpy())
    hot_ids, hot_counts = counts.hottest()
    order = np.argsort(-counted_R, kind="stable")[: len(hot_ids)]
    assert np.array_equal(ids_R[order], hot_ids)
    assert np.array_equal(counted_R[order], hot_counts)
    assert analysed_R.sum() == held_out.lookups
    for one in analysis.hot_sets(counted_R, analysed_R, 1500):
        kept = hot_ids[: math.ceil(one["share"] * 1500)]
        assert one["rows"] == len(kept)
        assert one["serves"] == pytest.approx(held_out.served_by(kept))


def test_the_zipf_curve_is_the_sorted_counts(case):
    for one in analysis.zipf(case.ngrams, points=10):
        counts = sorted(case.counted_ngrams(one["order"]).values(), reverse=True)
        assert one["counts"] == [counts[rank - 1] for rank in one["ranks"]]
        assert (one["ranks"][0], one["ranks"][-1]) == (1, len(counts))


def test_moved_rows_are_found_by_head_and_by_count(tmp_path):
    case = Case(tmp_path)
    # All rows were scaled, which moves them; these go back to where they began.
    found = analysis.heads(case.ngrams, case.rows_LO, case.layout, case.lengths)
    assert [one["unmoved"] for one in found] == [0.0] * 8
    noise = np.fromfile(case.memory.storage.path, dtype="<f4").reshape(-1, WIDTH) / 50
    layout = case.layout
    first, rows = layout.offsets_LH[1][2], layout.primes_LH[1][2]
    put_back = torch.arange(first, first + rows // 2)
    lengths = case.lengths
    lengths.drifts = lengths.drifts.copy()
    lengths.drifts[put_back.numpy()] = 0
    found = analysis.heads(case.ngrams, case.rows_LO, layout, lengths)
    assert [(one["layer"], one["order"], one["head"]) for one in found if one["unmoved"]] == [(2, 3, 0)]
    assert found[6]["unmoved"] == pytest.approx((rows // 2) / rows)
    ids_R, counted_R, _ = analysis.row_counts(case.ngrams, case.rows_LO)
    told = analysis.rows(lengths, layout, ids_R, counted_R)
    in_heads = sum(map(sum, layout.primes_LH))
    assert told["rows_of_no_head"] == 1500 - in_heads
    assert sum(group["rows"] for group in told["groups"]) == sum(group["rows"] for group in told["by_lookups"])
    assert sum(told["norm_histogram"]["counts"]) == in_heads
    group = told["groups"][3]
    assert (group["layer"], group["order"]) == (2, 3)
    assert group["unmoved"] == pytest.approx((rows // 2) / group["rows"])
    never = told["by_lookups"][0]
    assert never["rows"] == in_heads - (counted_R > 0).sum()
    looked_up = set(ids_R[counted_R > 0].tolist())
    part = [row for row in range(in_heads) if row not in looked_up]
    assert never["norm"]["0.5"] == pytest.approx(np.median(np.linalg.norm(50 * noise[part], axis=1)), rel=1e-4)
