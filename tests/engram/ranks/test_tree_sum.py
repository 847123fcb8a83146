"""Sums over micro-batches: the brackets are fixed, whoever adds what; and exact sums."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from sense_v2.engram.ranks.tree_sum import TreeSum, add_row_grads, exact_sum, node_sizes, row_squares, total_of


def brackets(left: str, right: str) -> str:
    return f"({left}{right})"


@pytest.mark.parametrize("count", range(1, 20))
def test_the_brackets_are_the_same_for_every_number_of_ranks(count: int) -> None:
    letters = "abcdefghijklmnopqrst"[:count]
    alone: TreeSum[str] = TreeSum(brackets)
    for letter in letters:
        alone.push(letter)
    for num_ranks in [ranks for ranks in range(1, count + 1) if count % ranks == 0]:
        together: TreeSum[str] = TreeSum(brackets)
        own = count // num_ranks
        for rank in range(num_ranks):
            part: TreeSum[str] = TreeSum(brackets, rank * own)
            for letter in letters[rank * own : (rank + 1) * own]:
                part.push(letter)
            assert [node.size for node in part.nodes] == node_sizes(rank * own, own)
            for node in part.nodes:
                together.push(node.value, node.size)
        assert together.total() == alone.total()


def test_a_power_of_two_is_a_balanced_tree() -> None:
    tree: TreeSum[str] = TreeSum(brackets)
    for letter in "abcdefgh":
        tree.push(letter)
    assert tree.total() == "(((ab)(cd))((ef)(gh)))"


def test_row_gradients_are_added_by_row() -> None:
    left = torch.tensor([1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    right = torch.tensor([0, 4]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    row_ids_U, grads_UD = add_row_grads(left, right)
    assert row_ids_U.tolist() == [0, 1, 4]
    assert grads_UD.tolist() == [[5.0, 6.0], [1.0, 2.0], [10.0, 12.0]]


def test_the_exact_sum_is_that_of_fractions() -> None:
    chance = random.Random(0)
    values = [chance.uniform(-1, 1) * 2.0 ** chance.randrange(-300, 300) for _ in range(500)]
    assert exact_sum(np.array(values)) == sum(map(Fraction, values), Fraction(0))
    assert exact_sum(np.array([])) == 0
    assert exact_sum(np.array([0.0, 5e-324])) == Fraction(5e-324)
    parts = [exact_sum(np.array(part)) for part in (values[:7], values[7:300], values[300:])]
    assert total_of(parts) == math.fsum(values)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 65])
def test_a_rows_square_depends_on_the_row_alone(width: int) -> None:
    grads_UD = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    squares_U = row_squares(grads_UD)
    np.testing.assert_allclose(squares_U, (grads_UD.double() ** 2).sum(dim=1), rtol=1e-14)
    for row in range(40):
        assert row_squares(grads_UD[row : row + 1]).item() == squares_U[row].item()
