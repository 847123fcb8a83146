"""Two tokenizations of one text -> which rows of a new tokenizer's table are which of the old one's.

    where tokens end, twice ──same_cuts──▶ positions where the last n tokens of both span the same characters
    ──carry_ngrams──▶ n-grams of the new tokenizer, and the old one's n-gram that each of them is
    ──rows_to_copy──▶ (new row, old row), head by head

A token's end counts the characters of the whole text up to it. Ends alone are compared: whether a space belongs to a
token's beginning differs between tokenizers, and an end is also where the next token begins. A token that ends where
its neighbour does is a part of a character, and no text.

An n-gram that meets several old ones (tokens that share a compressed id in one tokenizer and not in the other) is the
one that it meets most. Where n-grams share a row, the most frequent one of the text gets it: rows follow Zipf's law,
so that is most of what is looked up there.

T tokens of the new tokenizer, S of the old one, M matching positions, U n-grams, n their order, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.upkeep.ngram_usage import Ngrams, number_ngrams, rows_of

Positions = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tokens:
    """A text as one tokenizer cuts it."""

    compressed_T: np.ndarray[Any, Any]
    ends_T: np.ndarray[Any, Any]
    """The number of characters up to each token's end, ascending."""


@dataclass(frozen=True)
class CarriedNgrams:
    """The n-grams of one order that the old tokenizer has as well, the most frequent first."""

    order: int
    new_ids_Un: np.ndarray[Any, Any]
    """Compressed ids of the new tokenizer, the oldest first."""
    old_ids_Un: np.ndarray[Any, Any]
    """What the old tokenizer has for the same text."""
    counts_U: np.ndarray[Any, Any]
    """How often each is in the text."""
    num_ngrams: int
    """All distinct n-grams of the text."""
    num_positions: int

    @property
    def share_of_positions(self) -> float:
        """The share of the text's positions whose n-gram is carried over."""
        return int(self.counts_U.sum()) / self.num_positions if self.num_positions else 0.0


def same_cuts(
    new_ends_T: np.ndarray[Any, Any], old_ends_S: np.ndarray[Any, Any], orders: Sequence[int]
) -> dict[int, tuple[Positions, Positions]]:
    """For each order, the positions (new, old) at which the last tokens of both span the same characters.

    The first tokens of a text aren't among them: an n-gram there begins before it.

    >>> cuts = same_cuts(np.array([2, 3, 5, 6, 8]), np.array([3, 5, 6, 7, 8]), [1, 2])
    >>> [(new.tolist(), old.tolist()) for new, old in cuts.values()]
    [([2, 3], [1, 2]), ([3], [2])]
    """
    whole_T, whole_S = _ends_alone(new_ends_T), _ends_alone(old_ends_S)
    places_T, places_S = np.flatnonzero(whole_T), np.flatnonzero(whole_S)
    _, at_T, at_S = np.intersect1d(
        new_ends_T[places_T], old_ends_S[places_S], assume_unique=True, return_indices=True
    )
    new_M, old_M = places_T[at_T], places_S[at_S]
    found = {}
    for back in range(1, max(orders) + 1):
        reach_M = (new_M >= back) & (old_M >= back)
        new_M, old_M = new_M[reach_M], old_M[reach_M]
        same_M = new_ends_T[new_M - back] == old_ends_S[old_M - back]
        new_M, old_M = new_M[same_M], old_M[same_M]
        if back in orders:
            found[back] = (new_M, old_M)
        # From here on that token is one of the n-gram.
        whole_M = whole_T[new_M - back] & whole_S[old_M - back]
        new_M, old_M = new_M[whole_M], old_M[whole_M]
    return found


def _ends_alone(ends_T: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    differs_T = np.diff(ends_T) > 0
    ends_alone_T: np.ndarray[Any, Any] = np.concatenate([[True], differs_T]) & np.concatenate([differs_T, [True]])
    return ends_alone_T


def carry_ngrams(
    new: Tokens, old: Tokens, orders: Sequence[int], *, new_pad_id: int, old_pad_id: int
) -> list[CarriedNgrams]:
    """Find the n-grams of each order that both tokenizers have, ascending. `new` and `old` are of one text."""
    cuts = same_cuts(new.ends_T, old.ends_T, orders)
    found = []
    for of_new, of_old in zip(
        number_ngrams([], [new.compressed_T[None]], orders, pad_id=new_pad_id),
        number_ngrams([], [old.compressed_T[None]], orders, pad_id=old_pad_id),
        strict=True,
    ):
        new_M, old_M = cuts[of_new.order]
        pairs_M = of_new.numbers[0][0, new_M] * len(of_old.ids_Un) + of_old.numbers[0][0, old_M]
        pairs, times = np.unique(pairs_M, return_counts=True)
        pairs = pairs[np.argsort(-times, kind="stable")]
        new_numbers, old_numbers = np.divmod(pairs, len(of_old.ids_Un))
        new_U, first_U = np.unique(new_numbers, return_index=True)
        counts_U = of_new.analysed_U[new_U]
        order_U = np.argsort(-counts_U, kind="stable")
        found.append(
            CarriedNgrams(
                of_new.order,
                of_new.ids_Un[new_U[order_U]],
                of_old.ids_Un[old_numbers[first_U[order_U]]],
                counts_U[order_U],
                len(of_new.ids_Un),
                len(new.ends_T),
            )
        )
    return found


def rows_to_copy(
    carried: CarriedNgrams, new_hasher: NgramHasher, old_hasher: NgramHasher
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return (new row ids, old row ids) [R] of the hashers' layer; no new one is there twice."""
    new_UH, old_UH = (
        rows_of(Ngrams(carried.order, ids_Un, carried.counts_U, carried.counts_U, []), hasher)
        for ids_Un, hasher in ((carried.new_ids_Un, new_hasher), (carried.old_ids_Un, old_hasher))
    )
    new_parts, old_parts = [], []
    for new_U, old_U in zip(new_UH.T, old_UH.T, strict=True):
        rows_R, first_R = np.unique(new_U, return_index=True)  # the first is the most frequent
        new_parts.append(rows_R)
        old_parts.append(old_U[first_R])
    return np.concatenate(new_parts), np.concatenate(old_parts)
