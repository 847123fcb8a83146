"""Which rows of a table belong to which head of which layer: ranges of prime size, side by side.

And what a layer's hash multiplies ids by (`sense_v2.engram.hashing`), which is as fixed by the variant as these are.
In the variant `longcat_flash` sizes aren't prime, and go by the name all the same.

Source: Engram (arXiv 2601.07372) and its demo, transformers' models/qwen4_exp, and LongCat-Flash-Lite (arXiv
2601.21204).

L layers, H heads in all (orders × heads per order), K the largest n-gram order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from sympy import nextprime, prevprime

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.variants import VARIANTS


@dataclass(frozen=True)
class HeadLayout:
    """The ranges of rows: head h of layer l owns rows offsets_LH[l, h] to offsets_LH[l, h] + primes_LH[l, h] - 1.

    Heads are ordered by n-gram order, then by number, as the concatenated memory vector is.
    """

    layer_ids: tuple[int, ...]
    ngram_orders: tuple[int, ...]
    num_heads: int
    """Per order; H = len(ngram_orders) × num_heads."""
    primes_LH: tuple[tuple[int, ...], ...]
    offsets_LH: tuple[tuple[int, ...], ...]
    num_rows_L: tuple[int, ...]
    """Rows of the table that each layer reads; all equal where the layers share one."""

    @classmethod
    def build(
        cls,
        variant: str,
        *,
        layer_ids: Sequence[int],
        ngram_orders: Sequence[int],
        num_heads: int,
        table_size: int,
    ) -> HeadLayout:
        """Lay out a variant's heads. Raises `ValueError` if `table_size` has no room for distinct primes.

        >>> layout = HeadLayout.build("sense", layer_ids=[1], ngram_orders=[2, 3], num_heads=2, table_size=100)
        >>> layout.primes_LH, layout.offsets_LH
        (((23, 19, 17, 13),), ((0, 23, 42, 59),))
        """
        rules = VARIANTS[variant]
        heads_per_layer = len(ngram_orders) * num_heads
        count = len(layer_ids) * heads_per_layer
        if rules.head_sizes == "budget":
            primes = _primes_below(table_size // count + 1, count, table_size)
        elif rules.head_sizes == "by_twos":
            primes = [table_size + 2 * head + 1 for head in range(heads_per_layer)] * len(layer_ids)
        else:
            following = accumulate(range(count), lambda prime, _: int(nextprime(prime)), initial=table_size - 1)
            primes = list(following)[1:]
        primes_LH = tuple(
            tuple(primes[start : start + heads_per_layer]) for start in range(0, count, heads_per_layer)
        )
        offsets_LH, first_row = [], 0
        for primes_H in primes_LH:
            first_row = first_row if rules.one_table else 0
            ends_H = np.cumsum(primes_H)
            offsets_LH.append(
                tuple(int(first_row + end - prime) for end, prime in zip(ends_H, primes_H, strict=True))
            )
            first_row += int(ends_H[-1])
        if rules.head_sizes == "budget":
            num_rows_L = [table_size] * len(layer_ids)
        elif rules.one_table:
            num_rows_L = [first_row] * len(layer_ids)
        else:
            num_rows_L = [round_up(sum(primes_H), rules.row_multiple) for primes_H in primes_LH]
        return cls(tuple(layer_ids), tuple(ngram_orders), num_heads, primes_LH, tuple(offsets_LH), tuple(num_rows_L))

    @classmethod
    def from_config(cls, config: EngramConfig) -> HeadLayout:
        """Lay out the heads that `config` describes."""
        return cls.build(
            config.variant,
            layer_ids=config.layer_indices,
            ngram_orders=config.ngram_orders,
            num_heads=config.num_heads,
            table_size=config.table_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: lists and numbers only."""
        return {
            "layer_ids": list(self.layer_ids),
            "ngram_orders": list(self.ngram_orders),
            "num_heads": self.num_heads,
            "primes": [list(primes_H) for primes_H in self.primes_LH],
            "offsets": [list(offsets_H) for offsets_H in self.offsets_LH],
        }


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple that is not below `number`.

    >>> round_up(257, 128)
    384
    """
    return -(-number // multiple) * multiple


def _primes_below(start: int, count: int, table_size: int) -> list[int]:
    primes: list[int] = []
    while len(primes) < count:
        limit = primes[-1] if primes else start
        if limit <= 2:
            raise with_way_out(
                ValueError(
                    f"table_size = {table_size} has no room for {count} heads (layers × orders × heads) with "
                    f"distinct primes of at most {start - 1} rows each"
                ),
                "use a larger table_size, or fewer heads, orders or layers",
            )
        primes.append(int(prevprime(limit)))
    return primes


def hash_multipliers(layer_id: int, *, largest_order: int, compressed_vocab_size: int, seed: int) -> np.ndarray:
    """Draw odd int64 multipliers m[0..largest_order-1] of one layer; m[k] belongs to the token k positions back.

    They are below (2**63 - 1) / compressed_vocab_size, so that id × multiplier fits int64; they depend on the
    compressed size for that reason. The generator and the factor 10007 are the published ones.
    """
    half_bound = max(1, (np.iinfo(np.int64).max // compressed_vocab_size) // 2)
    generator = np.random.default_rng(seed + 10007 * layer_id)
    return generator.integers(low=0, high=half_bound, size=(largest_order,), dtype=np.int64) * 2 + 1


def splitmix_multipliers(
    place: int, *, largest_order: int, compressed_vocab_size: int, seed: int
) -> np.ndarray[Any, Any]:
    """Draw as `hash_multipliers`, from SplitMix64, for the layer at that `place` among those with memory."""
    bits, gamma = 2**64 - 1, 0x9E3779B97F4A7C15
    half_bound = max(1, (np.iinfo(np.int64).max // compressed_vocab_size) // 2)
    multipliers = []
    for number in range(largest_order):
        # The published code adds gamma once to number the multipliers and once more as SplitMix64 itself does.
        z = (seed + 10007 * place + gamma * (number + 2)) & bits
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & bits
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & bits
        multipliers.append(2 * ((z ^ (z >> 31)) % half_bound) + 1)
    return np.array(multipliers, dtype=np.int64)


def power_multipliers(layout: HeadLayout, layer: int, *, compressed_vocab_size: int) -> np.ndarray[Any, Any]:
    """Powers of the vocabulary's size, [K, H]: of the token k positions back, modulo the head's rows; 0 beyond the
    head's order. Raises `ValueError` where a sum of K products could leave int64."""
    largest_order, largest_size = max(layout.ngram_orders), max(layout.primes_LH[layer])
    if largest_order * compressed_vocab_size * largest_size > np.iinfo(np.int64).max:
        raise with_way_out(
            ValueError(
                f"{compressed_vocab_size} ids, heads of up to {largest_size} rows and n-grams of {largest_order}: "
                "the hash would leave 64 bits"
            ),
            "use a smaller table_size",
        )
    orders_H = np.repeat(layout.ngram_orders, layout.num_heads)
    powers_HK = [
        [pow(compressed_vocab_size, back, size) if back < order else 0 for back in range(largest_order)]
        for order, size in zip(orders_H.tolist(), layout.primes_LH[layer], strict=True)
    ]
    return np.array(powers_HK, dtype=np.int64).T.copy()
