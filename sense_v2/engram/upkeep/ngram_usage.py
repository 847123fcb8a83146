"""The n-grams of texts -> how a head's rows are used, shared and left unused.

    compressed ids of two texts ──number_ngrams──▶ distinct n-grams, each with its count in either text
    distinct n-grams ──rows_of──▶ the row of each, per head ──head_usage──▶ numbers

One text is counted (what training read, say), the other analysed. An n-gram is the tuple of its compressed ids, with
the pad id before its block's start, as the hash sees it. Each distinct one is hashed once, so memory follows the
texts' distinct n-grams and never the table.

Chance puts m n-grams into N rows so that N·(1 − (1 − 1/N)^m) rows are used, and m·(1 − (1 − 1/N)^(m−1)) n-grams share
theirs: the birthday problem's expectations (Feller, "An Introduction to Probability Theory", vol. 1, chapter II).
More sharing than that would be a hash that clusters.

B blocks, T tokens of a block, P positions of both texts, n an n-gram's order, U distinct n-grams, H heads of an
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sense_v2.engram.hashing import NgramHasher

# N-grams that are hashed at a time.
HASHED_NGRAMS = 1 << 16


@dataclass
class Ngrams:
    """The distinct n-grams of one order in two texts."""

    order: int
    ids_Un: np.ndarray[Any, Any]
    """Compressed ids, the oldest first."""
    counted_U: np.ndarray[Any, Any]
    """How often each is in the counted text."""
    analysed_U: np.ndarray[Any, Any]
    numbers: list[np.ndarray[Any, Any]]
    """Of each block array of the analysed text, [B, T]: which n-gram ends at each position."""


def number_ngrams(
    counted: Sequence[np.ndarray[Any, Any]],
    analysed: Sequence[np.ndarray[Any, Any]],
    orders: Sequence[int],
    *,
    pad_id: int,
) -> list[Ngrams]:
    """The n-grams of each order, ascending; the texts are arrays of blocks [B, T] of compressed ids.

    >>> found = number_ngrams([np.array([[5, 6, 5, 6]])], [np.array([[6, 5]])], [2], pad_id=0)[0]
    >>> found.ids_Un.tolist(), found.counted_U.tolist(), found.analysed_U.tolist()
    ([[0, 5], [6, 5], [0, 6], [5, 6]], [1, 1, 0, 2], [0, 1, 1, 0])
    >>> found.numbers[0].tolist()
    [[2, 1]]
    """
    arrays = [*counted, *analysed]
    num_counted = sum(array.size for array in counted)
    back_P = [np.concatenate([_tokens_back(array, back, pad_id) for array in arrays]) for back in range(max(orders))]
    largest = max(max((int(tokens_P.max(initial=0)) for tokens_P in back_P), default=0), pad_id) + 1
    # An n-gram is the n-gram one shorter that ends at the same place, and the token before that.
    numbers_P = np.zeros(len(back_P[0]), dtype=np.int64)
    found = []
    for order in range(1, max(orders) + 1):
        _, first_U, numbers_P = np.unique(
            numbers_P * largest + back_P[order - 1], return_index=True, return_inverse=True
        )
        if order not in orders:
            continue
        ids_Un = np.stack([back_P[back][first_U] for back in reversed(range(order))], axis=1)
        parts = np.split(numbers_P[num_counted:], np.cumsum([array.size for array in analysed])[:-1])
        found.append(
            Ngrams(
                order,
                ids_Un,
                np.bincount(numbers_P[:num_counted], minlength=len(first_U)),
                np.bincount(numbers_P[num_counted:], minlength=len(first_U)),
                [part.reshape(array.shape) for part, array in zip(parts, analysed, strict=True)],
            )
        )
    return found


def _tokens_back(ids_BT: np.ndarray[Any, Any], back: int, pad_id: int) -> np.ndarray[Any, Any]:
    """The token `back` positions before each, flat."""
    shifted_BT = np.full(ids_BT.shape, pad_id, dtype=np.int64)
    shifted_BT[:, back:] = ids_BT[:, : max(ids_BT.shape[1] - back, 0)]
    return shifted_BT.reshape(-1)


def rows_of(ngrams: Ngrams, hasher: NgramHasher) -> np.ndarray[Any, Any]:
    """row_ids_UH of each n-gram, for the heads of its order in the hasher's layer."""
    place = hasher.layout.ngram_orders.index(ngrams.order)
    heads = slice(place * hasher.layout.num_heads, (place + 1) * hasher.layout.num_heads)
    rows_UH = np.empty((len(ngrams.ids_Un), hasher.layout.num_heads), dtype=np.int64)
    for start in range(0, len(rows_UH), HASHED_NGRAMS):
        part = torch.from_numpy(ngrams.ids_Un[start : start + HASHED_NGRAMS])
        rows_UH[start : start + HASHED_NGRAMS] = hasher(part)[:, -1, heads].numpy()
    return rows_UH


def expected_rows_used(num_ngrams: int, num_rows: int) -> float:
    """How many of N rows m n-grams use, on average, where chance deals them out.

    >>> round(expected_rows_used(2, 2), 6), round(expected_rows_used(10**6, 10**9))
    (1.5, 999500)
    """
    return -num_rows * math.expm1(num_ngrams * math.log1p(-1 / num_rows)) if num_rows > 1 else min(num_ngrams, 1)


def expected_sharing(num_ngrams: int, num_rows: int) -> float:
    """How many of m n-grams have another one in their row, on average.

    >>> round(expected_sharing(2, 2), 6), expected_sharing(1, 5)
    (1.0, 0.0)
    """
    if num_rows == 1:
        return float(num_ngrams if num_ngrams > 1 else 0)
    return -num_ngrams * math.expm1((num_ngrams - 1) * math.log1p(-1 / num_rows)) if num_ngrams else 0.0


def ngrams_per_row(row_ids_U: np.ndarray[Any, Any], counted_U: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each n-gram's row: how many n-grams of the counted text have it, itself included if it is one."""
    _, inverse_U = np.unique(row_ids_U, return_inverse=True)
    counts = np.bincount(inverse_U, weights=counted_U > 0)
    found: np.ndarray[Any, Any] = counts[inverse_U].astype(np.int64)
    return found


def head_usage(row_ids_U: np.ndarray[Any, Any], ngrams: Ngrams, num_rows: int) -> dict[str, Any]:
    """The numbers of one head of `num_rows` rows, for JSON:

    ngrams and lookups of the counted text; rows_used by it, and as many as chance would use; n-grams sharing a row
    with another, and as many as chance would have; of the analysed text's lookups the share whose row the counted
    text uses (hit_rate), and the share whose n-gram itself is in it (seen_rate): the rest of the hits are another
    n-gram's row. The rates are nan where nothing was analysed.
    """
    is_counted_U = ngrams.counted_U > 0
    on_row_U = ngrams_per_row(row_ids_U, ngrams.counted_U)
    num_ngrams = int(is_counted_U.sum())
    analysed = int(ngrams.analysed_U.sum())
    return {
        "rows": num_rows,
        "ngrams": num_ngrams,
        "lookups": int(ngrams.counted_U.sum()),
        "rows_used": len(np.unique(row_ids_U[is_counted_U])),
        "expected_rows_used": expected_rows_used(num_ngrams, num_rows),
        "sharing": int((on_row_U[is_counted_U] > 1).sum()),
        "expected_sharing": expected_sharing(num_ngrams, num_rows),
        "hit_rate": int(ngrams.analysed_U[on_row_U > 0].sum()) / analysed if analysed else math.nan,
        "seen_rate": int(ngrams.analysed_U[is_counted_U].sum()) / analysed if analysed else math.nan,
    }
