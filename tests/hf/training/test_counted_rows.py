"""Rows by counting: those of a dictionary of n-grams, however the text is cut, and what the model makes of them."""

from collections import defaultdict
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_fit import repeating, same, weights_of
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.insight.damage import damage, untouched
from sense_v2.hf.insight.evaluation import token_losses
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training import counted_rows
from sense_v2.hf.training.counted_rows import Counted, count_rows

TEXT = np.concatenate([repeating(repeats=10), repeating(period=60, repeats=3, seed=1)]).astype(np.uint16)
MEASURED = torch.from_numpy(repeating(repeats=2).astype(np.int64)).reshape(4, 20)


def fresh(folder, kind="llama", model=None, **changes):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = tiny_model(kind) if model is None else model
    config = tiny_config(folder, **{"init_std": 0.0, "table_size": 60_000, "layer_indices": [2], **changes})
    return attach_engram(model, config, tiny_tokenizer())


def table_of(model) -> np.ndarray:
    return memory_of(model).storage.weight.float().numpy().copy()


def slow_values(model, ids, num_directions) -> np.ndarray:
    """Every token's vector in the main directions, each over the fourth root of its variance; their mean square 1."""
    embeddings = model.get_output_embeddings().weight.detach().double().numpy()
    embeddings = embeddings - embeddings[ids].mean(0)
    _, sizes, directions = np.linalg.svd(embeddings[ids], full_matrices=False)
    spread = (sizes**2 / len(ids))[:num_directions]
    values = embeddings @ directions[:num_directions].T / spread**0.25
    return values / np.sqrt((values[ids] ** 2).mean())


def compressed(token_id: int) -> int:
    """word, Word and WORD are one."""
    return 0 if token_id == 0 else 1 + (token_id - 1) // 3


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3", {}),
        ("gpt2", {}),
    ],
)
@pytest.mark.parametrize("max_memory_bytes", [1 << 30, 100_000])
def test_rows_are_those_of_a_dictionary_of_n_grams(tmp_path, monkeypatch, kind, extra, max_memory_bytes):
    monkeypatch.setattr(counted_rows, "CHUNK_TOKENS", 77)
    model = fresh(tmp_path, model=tiny_model(kind, **extra))
    before = weights_of(model)
    counted = count_rows(model, TEXT, measured_BT=MEASURED, max_memory_bytes=max_memory_bytes)
    (fusion,) = memory_of(model)
    changed = before.keys() - same(before, model)
    assert changed == {"engram.layers.2.W_v.weight"}

    values = slow_values(model, TEXT.astype(int), num_directions=16)
    sums, counts = defaultdict(lambda: np.zeros(16)), defaultdict(int)
    ids = [compressed(token_id) for token_id in TEXT.tolist()]
    for at in range(2, len(ids) - 1):
        for order in (2, 3):
            ngram = tuple(ids[at - order + 1 : at + 1])
            sums[ngram] += values[TEXT[at + 1]]
            counts[ngram] += 1
    table, met = table_of(model), defaultdict(set)
    places = {}
    for ngram in sums:
        # Any token of the compressed id will do, with nothing before them that the row depends on.
        token_ids = torch.tensor([[1 + 3 * (one - 1) if one else 0 for one in ngram]])
        rows_H = fusion.row_ids(token_ids)[0, -1].tolist()
        places[ngram] = rows_H[:2] if len(ngram) == 2 else rows_H[2:]
        for row in places[ngram]:
            met[row].add(ngram)
    compared = 0
    for ngram, rows in places.items():
        expected = sums[ngram] / (counts[ngram] + 3)
        for head, row in enumerate(rows):
            if len(met[row]) == 1 and ngram[:2] != tuple(ids[:2]):  # the text's first n-grams have nothing before
                # A direction may point either way.
                np.testing.assert_allclose(np.abs(table[row]), np.abs(expected[head::2]), rtol=2e-3, atol=2e-3)
                compared += 1
    assert compared > 1.8 * len(places)
    assert counted.rows == (table.any(1)).sum()
    starts = {
        row for at in (0, 1) for row in fusion.row_ids(torch.as_tensor(TEXT[None, :2].astype(int)))[0, at].tolist()
    }
    assert set(np.flatnonzero(table.any(1))) - starts <= set(met)
    assert counted.tokens == len(TEXT)


def test_the_same_rows_in_one_pass_and_in_many_and_of_a_file(tmp_path):
    TEXT.tofile(tmp_path / "ids")
    from_disk = np.memmap(tmp_path / "ids", TEXT.dtype, "r")
    tables = [
        (count_rows(model := fresh(tmp_path / str(number)), text, **how), table_of(model))
        for number, (text, how) in enumerate(
            [(TEXT, {}), (from_disk, {}), (torch.from_numpy(TEXT.astype(int)), {"max_memory_bytes": 40_000})]
        )
    ]
    first = tables[0]
    for other in tables[1:]:
        assert np.array_equal(other[1], first[1])
        assert other[0].strength == first[0].strength


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_table_of_any_type_is_filled_and_committed(tmp_path, dtype):
    model = fresh(tmp_path, dtype=dtype)
    counted = count_rows(model, TEXT)
    table = table_of(model)
    again = tiny_config(tmp_path, init_std=0.0, table_size=60_000, layer_indices=[2], dtype=dtype)
    detach_engram(model)
    attach_engram(model, again)
    assert np.array_equal(table_of(model), table)
    assert 0 < counted.rows == table.any(1).sum()


def test_text_that_was_not_counted_is_foretold(tmp_path):
    """Of the same sentences, in another order."""
    generator = np.random.default_rng(5)
    sentences = [generator.integers(3, VOCABULARY, 9) for _ in range(12)]
    text = np.concatenate([sentences[which] for which in generator.integers(0, 12, 200)])
    other_BT = torch.from_numpy(np.concatenate([sentences[which] for which in range(11, -1, -1)])).reshape(4, -1)
    model = fresh(tmp_path)
    with untouched(model):
        bare = float(token_losses(model, other_BT).mean())
    counted = count_rows(model, text)
    assert isinstance(counted, Counted)
    assert counted.strength > 0
    assert counted.loss_after < counted.loss_before - 0.4
    assert float(token_losses(model, other_BT).mean()) < bare - 0.4
    unlike_BT = torch.from_numpy(generator.integers(3, VOCABULARY, (4, 20)))
    assert damage(model, lambda: untouched(model), unlike_BT).divergence < 0.2 * (bare - counted.loss_after)
    assert all(torch.isfinite(parameter).all() for parameter in memory_of(model).parameters())


def test_what_does_not_help_does_not_speak(tmp_path):
    """The same n-grams, and other tokens behind them."""
    text, measured_BT = np.tile([10, 13, 16, 19], 60), torch.tensor([[10, 13] * 8])
    model = fresh(tmp_path)
    expected = model(measured_BT).logits
    counted = count_rows(model, text, measured_BT=measured_BT)
    assert counted.strength == 0
    assert counted.loss_before == counted.loss_after
    assert torch.equal(model(measured_BT).logits, expected)


def test_layers_have_rows_of_their_own(tmp_path):
    model = fresh(tmp_path, layer_indices=[1, 2])
    counted = count_rows(model, TEXT, max_memory_bytes=50_000)
    layers = list(memory_of(model))
    assert all(layer.W_v.weight.any() for layer in layers)
    table = table_of(model)
    for layer in layers:
        rows = layer.row_ids(torch.from_numpy(TEXT[None, :300].astype(int))).unique()
        assert table[rows.numpy()].any(1).all()
    assert counted.strength > 0


def test_rows_wider_than_the_embeddings_end_in_zeros(tmp_path):
    model = fresh(tmp_path, engram_dim=160)  # 2 heads of 40, and embeddings of 32
    count_rows(model, TEXT)
    table = table_of(model)
    assert table.any()
    assert not table[:, 16:].any()


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"init_std": 0.02}, TEXT, "began as noise, and rows are counted into a fresh table of zeros"),
        ({}, TEXT[:7], "the text has 7 tokens; counting takes 12 at least"),
        ({"causal": False}, TEXT, "EngramConfig.causal = False"),
    ],
)
def test_what_cannot_be_counted_is_refused(tmp_path, changes, text, message):
    model = fresh(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        count_rows(model, text)


def test_a_table_that_was_written_to_is_refused_and_so_is_a_second_count(tmp_path):
    model = fresh(tmp_path)
    count_rows(model, TEXT)
    table = table_of(model)
    with pytest.raises(ValueError, match="has rows that were written before") as error:
        count_rows(model, TEXT)
    assert "storage_path" in str(error.value)
    assert np.array_equal(table_of(model), table)


def test_a_count_that_is_cut_off_leaves_a_fresh_table(tmp_path):
    model = fresh(tmp_path)

    class Stop(Exception):
        pass

    def progress(label, total, *, unit="B"):
        def advance(count):
            if label == "finding their strength":
                return
            raise Stop

        return nullcontext(advance)

    with pytest.raises(Stop):
        count_rows(model, TEXT, progress=progress)
    assert memory_of(model).storage.is_new
    count_rows(model, TEXT)


def test_progress_tells_of_every_token_of_every_pass(tmp_path):
    told = defaultdict(int)
    totals = {}

    def progress(label, total, *, unit="B"):
        totals[label] = total

        def advance(count):
            told[label] += count

        return nullcontext(advance)

    count_rows(fresh(tmp_path), TEXT, measured_BT=MEASURED, progress=progress, max_memory_bytes=100_000)
    assert totals["counting n-grams"] % len(TEXT) == 0
    assert totals["counting n-grams"] > len(TEXT)
    passes = totals["counting n-grams"] // len(TEXT)
    assert told["counting n-grams"] == totals["counting n-grams"] - passes  # the last token is followed by nothing
