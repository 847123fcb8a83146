"""Values of micro-batches -> their sum, in an order that timing and ranks never change.

Addition of floats isn't associative, so a sum over micro-batches that are spread over ranks depends on where the
brackets are. Here they are fixed by the micro-batch's number alone: two neighbours (0 and 1, 2 and 3, …) are added,
then two such pairs, and so on; what is left at the end, where the number isn't a power of two, is added from the
right. A rank sums what of that tree lies within its own micro-batches and sends only that.

    rank 0: 0 1 2 3 ──▶ ((0+1)+(2+3)) ┐
    rank 1: 4 5 6 7 ──▶ ((4+5)+(6+7)) ┴──▶ the same bits as one rank gets that has all eight

`exact_sum` is for numbers of which there are many and whose order differs: their exact sum, rounded once.

U unique row ids, D row width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, TypeVar

import numpy as np
import torch

T = TypeVar("T")
RowGrads = tuple[torch.Tensor, torch.Tensor]
"""(row_ids_U ascending, grads_UD float32)."""


@dataclass(frozen=True)
class Node(Generic[T]):
    """The sum of micro-batches `first` to `first + size - 1`; size is a power of two that divides first."""

    first: int
    size: int
    value: T


class TreeSum(Generic[T]):
    """Takes values in the order of their micro-batches and adds neighbours as soon as both are there.

    >>> text = TreeSum(lambda a, b: f"({a}+{b})")
    >>> for name in "abcdefg":
    ...     text.push(name)
    >>> text.total()
    '(((a+b)+(c+d))+((e+f)+g))'
    """

    def __init__(self, add: Callable[[T, T], T], first: int = 0) -> None:
        self._add = add
        self._next = first
        self.nodes: list[Node[T]] = []

    def push(self, value: T, size: int = 1) -> None:
        """The next value: a micro-batch's, or the sum that another TreeSum has of the next `size` of them."""
        node = Node(self._next, size, value)
        assert node.first % size == 0, "a node begins where its size says"
        self._next += size
        while self.nodes and self.nodes[-1].size == node.size and self.nodes[-1].first % (2 * node.size) == 0:
            left = self.nodes.pop()
            node = Node(left.first, 2 * node.size, self._add(left.value, node.value))
        self.nodes.append(node)

    def total(self) -> T:
        """The sum of all. Only of a tree that begins with micro-batch 0 is it the same everywhere."""
        total = self.nodes[-1].value
        for node in reversed(self.nodes[:-1]):
            total = self._add(node.value, total)
        return total


def node_sizes(first: int, count: int) -> list[int]:
    """Sizes of the nodes that a TreeSum from `first` on has after `count` micro-batches.

    >>> node_sizes(0, 4), node_sizes(3, 3)
    ([4], [1, 2])
    """
    tree: TreeSum[None] = TreeSum(lambda left, right: None, first)
    for _ in range(count):
        tree.push(None)
    return [node.size for node in tree.nodes]


def add_row_grads(left: RowGrads, right: RowGrads) -> RowGrads:
    """The gradients of all rows of both; a row that one side lacks has a zero there."""
    row_ids_U, inverse = torch.unique(torch.cat([left[0], right[0]]), return_inverse=True)
    grads = torch.cat([left[1], right[1]])
    # Two terms and a zero: their order in here can't matter.
    sums_UD = grads.new_zeros((len(row_ids_U), grads.shape[1])).index_add_(0, inverse, grads)
    return row_ids_U, sums_UD


def row_squares(grads_UD: torch.Tensor) -> torch.Tensor:
    """The square of each row's norm, float64 [U], the same whatever other rows there are.

    `sum(dim=1)` may cut a row differently for another number of rows; halving doesn't.
    """
    squares = grads_UD.double().square()
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        rest = squares[:, 2 * half :]
        squares = torch.cat([squares[:, :half] + squares[:, half : 2 * half], rest], dim=1)
    return squares.reshape(len(grads_UD))


def exact_sum(values: np.ndarray[Any, Any]) -> Fraction:
    """The sum of finite float64 values, without any rounding.

    >>> float(exact_sum(np.array([1e300, 1.0, -1e300])))
    1.0
    """
    mantissas, exponents = np.frexp(values)
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    # In halves: 2³⁶ of them may be added up in 64 bits.
    high, low = whole >> 27, whole & (2**27 - 1)
    total = Fraction(0)
    for exponent in np.unique(exponents).tolist():
        same = exponents == exponent
        total += Fraction((int(high[same].sum()) << 27) + int(low[same].sum())) * Fraction(2) ** (exponent - 53)
    return total


def total_of(parts: Sequence[Fraction]) -> float:
    """The exact sum of ranks' exact sums, rounded once.

    >>> total_of([Fraction(1, 4), Fraction(1, 2)])
    0.75
    """
    return float(sum(parts, Fraction(0)))
