"""Which n-grams two tokenizations share, against a slow look at the characters that each token spans."""

import doctest
from collections import Counter

import numpy as np
import pytest
from tiny import tiny_config

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.upkeep import carried_ngrams
from sense_v2.engram.upkeep.carried_ngrams import Tokens, carry_ngrams, rows_to_copy, same_cuts

ORDERS = [2, 3]


def random_tokens(seed, length=4000, vocabulary=12):
    """Tokens of one to three characters, some of which end where the one before does, as parts of a character do."""
    generator = np.random.default_rng(seed)
    ends_T = np.cumsum(generator.choice([1, 1, 2, 3], length))
    ends_T = np.repeat(ends_T[ends_T <= length], generator.choice([1, 1, 1, 1, 2], (ends_T <= length).sum()))
    return Tokens(generator.integers(0, vocabulary, len(ends_T)), ends_T)


def spans(tokens, last, order):
    """The characters of each of the last `order` tokens at a position; None where one is no text of its own."""
    found = []
    for place in range(last - order + 1, last + 1):
        if place < 1 or tokens.ends_T[place] == tokens.ends_T[place - 1]:
            return None
        if place + 1 < len(tokens.ends_T) and tokens.ends_T[place + 1] == tokens.ends_T[place]:
            return None
        found.append((int(tokens.ends_T[place - 1]), int(tokens.ends_T[place])))
    return found


def slow_pairs(new, old, order):
    where = {}
    for place in range(len(old.ends_T)):
        found = spans(old, place, order)
        if found is not None:
            where[tuple(found)] = place
    pairs = []
    for place in range(len(new.ends_T)):
        found = spans(new, place, order)
        if found is not None and tuple(found) in where:
            pairs.append((place, where[tuple(found)]))
    return pairs


@pytest.mark.parametrize("seed", range(5))
def test_cuts_are_shared_where_the_characters_are(seed):
    new, old = random_tokens(seed), random_tokens(seed + 100)
    cuts = same_cuts(new.ends_T, old.ends_T, ORDERS)
    for order in ORDERS:
        assert list(zip(*(part.tolist() for part in cuts[order]), strict=True)) == slow_pairs(new, old, order)
        assert len(cuts[order][0]) > 0


def ngram(tokens, last, order):
    return tuple(tokens.compressed_T[last - order + 1 : last + 1].tolist())


def test_an_ngram_is_the_old_one_that_it_meets_most():
    new, old = random_tokens(1), random_tokens(2, vocabulary=3)
    for carried in carry_ngrams(new, old, ORDERS, new_pad_id=99, old_pad_id=99):
        order = carried.order
        met, pairs = {}, slow_pairs(new, old, order)
        for place, other in pairs:
            met.setdefault(ngram(new, place, order), Counter())[ngram(old, other, order)] += 1
        counts = Counter(ngram(new, place, order) for place in range(order - 1, len(new.ends_T)))
        found = dict(
            zip(map(tuple, carried.new_ids_Un.tolist()), map(tuple, carried.old_ids_Un.tolist()), strict=True)
        )
        assert found.keys() == met.keys()
        assert all(met[one][other] == max(met[one].values()) for one, other in found.items())
        assert carried.counts_U.tolist() == [counts[one] for one in found]
        assert carried.counts_U.tolist() == sorted(carried.counts_U.tolist(), reverse=True)
        assert carried.num_positions == len(new.ends_T)
        assert carried.num_ngrams >= len(counts)


def test_the_most_frequent_ngram_gets_the_row(tmp_path):
    new, old = random_tokens(1), random_tokens(2)
    config = tiny_config(tmp_path, table_size=40, num_heads=2)
    hashers = [NgramHasher.from_config(config, layer_id=1, compressed_vocab_size=size, pad_id=0) for size in (12, 13)]
    for carried in carry_ngrams(new, old, ORDERS, new_pad_id=0, old_pad_id=0):
        new_R, old_R = rows_to_copy(carried, *hashers)
        place = ORDERS.index(carried.order)
        expected = {}
        for ids, old_ids in zip(carried.new_ids_Un, carried.old_ids_Un, strict=True):  # the most frequent first
            rows, old_rows = (
                hasher(one[None])[0, -1, 2 * place : 2 * place + 2]
                for hasher, one in zip(hashers, (ids, old_ids), strict=True)
            )
            for row, old_row in zip(rows.tolist(), old_rows.tolist(), strict=True):
                expected.setdefault(row, old_row)
        assert len(expected) < 2 * len(carried.counts_U)  # some share a row
        assert dict(zip(new_R.tolist(), old_R.tolist(), strict=True)) == expected
        assert len(new_R) == len(expected)


def test_docstrings():
    assert doctest.testmod(carried_ngrams).failed == 0
