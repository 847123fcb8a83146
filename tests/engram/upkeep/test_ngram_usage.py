"""How rows are used, recounted with dictionaries; the birthday formula against a simulation."""

import doctest
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import tiny_config

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.upkeep import ngram_usage
from sense_v2.engram.upkeep.ngram_usage import (
    expected_rows_used,
    expected_sharing,
    head_usage,
    number_ngrams,
    rows_of,
)

VOCABULARY, PAD = 40, 3


@pytest.fixture
def texts():
    generator = np.random.default_rng(0)
    zipf = lambda *shape: np.minimum(generator.zipf(1.4, shape), VOCABULARY) - 1  # noqa: E731
    return [zipf(6, 20), zipf(1, 7)], [zipf(3, 20)]


@pytest.fixture
def hasher(tmp_path):
    config = tiny_config(tmp_path, ngram_orders=[2, 3, 4], num_heads=2, engram_dim=48, table_size=600)
    return NgramHasher.from_config(config, layer_id=1, compressed_vocab_size=VOCABULARY, pad_id=PAD)


def slow_ngrams(arrays, order):
    """(n-gram, its block's rows as the hasher gives them, place) of every position, in Python."""
    return [
        tuple(block[at - back] if at >= back else PAD for back in reversed(range(order)))
        for array in arrays
        for block in array.tolist()
        for at in range(len(block))
    ]


def test_ngrams_are_counted_as_a_dictionary_counts_them(texts):
    counted, analysed = texts
    for found in number_ngrams(counted, analysed, [2, 3, 4], pad_id=PAD):
        keys = [tuple(ids) for ids in found.ids_Un.tolist()]
        assert len(set(keys)) == len(keys)
        for arrays, counts_U in ((counted, found.counted_U), (analysed, found.analysed_U)):
            slow = Counter(slow_ngrams(arrays, found.order))
            assert {key: count for key, count in zip(keys, counts_U.tolist(), strict=True) if count} == slow
        numbered = [keys[number] for array in found.numbers for number in array.ravel()]
        assert numbered == slow_ngrams(analysed, found.order)


def test_rows_are_those_that_the_blocks_look_up(texts, hasher):
    counted, analysed = texts
    whole_BTH = hasher(torch.from_numpy(analysed[0])).numpy()
    for place, found in enumerate(number_ngrams(counted, analysed, [2, 3, 4], pad_id=PAD)):
        rows_UH = rows_of(found, hasher)
        assert np.array_equal(rows_UH[found.numbers[0]], whole_BTH[..., 2 * place : 2 * place + 2])


def test_usage_is_what_a_recount_finds(texts, hasher):
    counted, analysed = texts
    for place, found in enumerate(number_ngrams(counted, analysed, [2, 3, 4], pad_id=PAD)):
        for head in range(2):
            rows_U = rows_of(found, hasher)[:, head]
            number = 2 * place + head
            prime = hasher.layout.primes_LH[0][number]
            usage_of_head = head_usage(rows_U, found, prime)
            # The lookups themselves, position by position.
            lookups = [
                (int(row), ngram)
                for arrays in (counted,)
                for row, ngram in zip(
                    np.concatenate([hasher(torch.from_numpy(a)).numpy()[..., number].ravel() for a in arrays]),
                    slow_ngrams(arrays, found.order),
                    strict=True,
                )
            ]
            by_row: dict[int, set] = {}
            for row, ngram in lookups:
                by_row.setdefault(row, set()).add(ngram)
            seen = {ngram for _, ngram in lookups}
            rows = hasher(torch.from_numpy(analysed[0])).numpy()[..., number].ravel().tolist()
            assert usage_of_head == {
                "rows": prime,
                "ngrams": len(seen),
                "lookups": len(lookups),
                "rows_used": len(by_row),
                "expected_rows_used": pytest.approx(prime * (1 - (1 - 1 / prime) ** len(seen))),
                "sharing": sum(len(ngrams) for ngrams in by_row.values() if len(ngrams) > 1),
                "expected_sharing": pytest.approx(len(seen) * (1 - (1 - 1 / prime) ** (len(seen) - 1))),
                "hit_rate": sum(row in by_row for row in rows) / len(rows),
                "seen_rate": sum(ngram in seen for ngram in slow_ngrams(analysed, found.order)) / len(rows),
            }
            assert usage_of_head["sharing"] > 0


@pytest.mark.parametrize(("num_ngrams", "num_rows"), [(30, 7), (50, 101), (400, 1009)])
def test_the_birthday_formula_is_what_throwing_gives(num_ngrams, num_rows):
    generator = np.random.default_rng(1)
    used, sharing = [], []
    for _ in range(2000):
        counts = np.bincount(generator.integers(0, num_rows, num_ngrams), minlength=num_rows)
        used.append((counts > 0).sum())
        sharing.append(counts[counts > 1].sum())
    for found, expected in (
        (used, expected_rows_used(num_ngrams, num_rows)),
        (sharing, expected_sharing(num_ngrams, num_rows)),
    ):
        assert abs(np.mean(found) - expected) < 4 * np.std(found) / math.sqrt(len(found)) + 1e-9


def test_the_hash_collides_as_chance_does():
    hasher = NgramHasher(
        "sense",
        layer_id=1,
        layer_ids=[1],
        ngram_orders=[3],
        num_heads=2,
        table_size=10_000,
        compressed_vocab_size=1000,
        pad_id=0,
    )
    ids = np.random.default_rng(2).integers(0, 1000, (40, 100))
    found = number_ngrams([ids], [ids[:0]], [3], pad_id=0)[0]
    for head in range(2):
        usage_of_head = head_usage(rows_of(found, hasher)[:, head], found, hasher.layout.primes_LH[0][head])
        assert usage_of_head["rows_used"] == pytest.approx(usage_of_head["expected_rows_used"], rel=0.02)
        assert usage_of_head["sharing"] == pytest.approx(usage_of_head["expected_sharing"], rel=0.04)
        assert math.isnan(usage_of_head["hit_rate"])


def test_one_row_and_no_ngrams_have_their_limits():
    assert expected_rows_used(5, 1) == 1
    assert expected_sharing(5, 1) == 5
    assert expected_rows_used(0, 10) == expected_sharing(0, 10) == expected_sharing(1, 1) == 0


def test_examples_in_docstrings():
    result = doctest.testmod(ngram_usage)
    assert result.attempted > 0
    assert result.failed == 0
