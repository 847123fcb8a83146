"""Stochastic rounding to bfloat16, against NumPy on the bits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import D, N, make

from sense_v2.engram.table.row_dtypes import stochastic_bfloat16

EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def neighbours(value: float) -> tuple[float, float]:
    """The bfloat16 values towards zero and away from it, of which one may be the value."""
    raw = int(np.float32(value).view(np.uint32)) & 0xFFFF0000
    towards, away = (float(np.uint32(n).view(np.float32)) for n in (raw, raw + 0x10000))
    return (towards, towards) if towards == value else (towards, away)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**70), st.integers(0, 2**40))
def test_a_value_becomes_one_of_its_two_neighbours(value: float, seed: int, draw: int) -> None:
    found = stochastic_bfloat16(torch.full((3, 4), value), seed, draw)
    assert (found.shape, found.dtype) == ((3, 4), torch.bfloat16)
    assert set(found.float().flatten().tolist()) <= set(neighbours(value))


def test_every_value_that_bfloat16_has_stays_what_it_is() -> None:
    """Zeros of both signs, subnormal values and infinities included."""
    values = EVERY_BFLOAT16[~EVERY_BFLOAT16.isnan()]
    for draw in range(20):
        assert np.array_equal(bits(stochastic_bfloat16(values.float(), 3, draw)), bits(values))


@pytest.mark.parametrize("raw", [0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0xFFC01234])
def test_what_is_no_number_stays_none(raw: int) -> None:
    """Also one whose bits say so in the half that gets lost."""
    values = torch.from_numpy(np.full(1000, raw, dtype=np.uint32).view(np.float32))
    assert stochastic_bfloat16(values, 0, 0).isnan().all()


def test_the_mean_of_many_draws_is_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator) * 10 ** torch.randint(-20, 20, (500,), generator=generator).float()
    num_draws = 4000
    away = torch.stack([stochastic_bfloat16(values, 7, draw).float() for draw in range(num_draws)]).double()
    lower, upper = (
        torch.tensor(side, dtype=torch.float64) for side in zip(*map(neighbours, values.tolist()), strict=True)
    )
    chance = (values.double() - lower) / (upper - lower)
    share = ((away - lower) / (upper - lower)).mean(dim=0)
    error = (chance * (1 - chance) / num_draws).sqrt()
    # Five standard errors of each value, and of all of them together.
    assert ((share - chance).abs() <= 5 * error + 1e-12).all()
    assert abs((share - chance).sum()) < 5 * error.square().sum().sqrt()


def test_draws_repeat_with_seed_and_number_and_differ_else() -> None:
    values = torch.full((10_000,), 1 + 2.0**-9)
    first = stochastic_bfloat16(values, 3, 5)
    assert torch.equal(first, stochastic_bfloat16(values, 3, 5))
    for seed, draw in ((3, 6), (4, 5), (5, 3), (3 + 2**32, 5)):
        other = stochastic_bfloat16(values, seed, draw)
        # A quarter of each is away from 1; independent ones agree in 5/8.
        agreement = (first == other).float().mean().item()
        assert abs(agreement - 0.625) < 5 * math.sqrt(0.625 * 0.375 / len(values))


def test_any_memory_layout_and_no_values() -> None:
    values = torch.randn(6, 8)
    before = values.clone()
    for view in (values.T, values[::2, 1::3], values[0].expand(5, 8), torch.empty(0, 8)):
        assert torch.equal(stochastic_bfloat16(view, 1, 2), stochastic_bfloat16(view.clone(), 1, 2))
        assert stochastic_bfloat16(view, 1, 2).shape == view.shape
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_row_types_are_rounded_to_the_nearest(tmp_path: Path, dtype: str) -> None:
    tables = [make(tmp_path / f"{stochastic}.dat", dtype=dtype) for stochastic in (False, True)]
    rows = torch.randn(N, D)
    for stochastic, table in enumerate(tables):
        table.write(torch.arange(N), rows, stochastic=bool(stochastic))
    assert torch.equal(tables[0].weight, tables[1].weight)
    for table in tables:
        table.commit()


def test_rows_of_bfloat16_are_rounded_at_random_only_where_that_is_asked_for(tmp_path: Path) -> None:
    table, rows = make(tmp_path / "t.dat", dtype="bfloat16"), torch.full((N, D), 1 + 2.0**-8)
    table.write(torch.arange(N), rows)
    assert (table.weight == 1).all()  # to the nearest, ties to even
    found = []
    for _ in range(2):
        table.write(torch.arange(N), rows, stochastic=True)
        found.append(table.weight.clone())
        assert set(found[-1].flatten().tolist()) == {1.0, 1 + 2.0**-7}
    assert not torch.equal(*found)
    table.commit()


def test_draws_follow_the_tables_seed_and_its_updates(tmp_path: Path) -> None:
    """So that a run repeats, and one that goes on from a commit does too."""
    rows = torch.full((N, D), 1 + 2.0**-8)

    def written(name: str, seed: int, reopened: bool) -> torch.Tensor:
        table = make(tmp_path / name, dtype="bfloat16", seed=seed)
        for number in range(4):
            table.write(torch.arange(N), rows, stochastic=True)
            table.commit()
            if reopened and number == 1:
                table.close()
                table = make(tmp_path / name, dtype="bfloat16")
        return table.weight.clone()

    expected = written("a.dat", 1, False)
    assert torch.equal(written("b.dat", 1, False), expected)
    assert torch.equal(written("c.dat", 1, True), expected)
    assert not torch.equal(written("d.dat", 2, False), expected)
