"""checksums.py against docs/format.md's hash in Python's own integers (tables.py), and golden values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import slow_row_hash, slow_sums, splitmix

from sense_v2.engram.table import checksums
from sense_v2.engram.table.checksums import (
    add_to_blocks,
    block_rows,
    block_sums,
    from_hex,
    num_blocks,
    row_hashes,
    splitmix64,
    to_hex,
)

# From a program that was written for it from the specification alone; a release that changes one can't check an older
# one's tables.
GOLDEN = [
    (0, bytes(range(8)), 0xC37AED4101BE30D3),
    (1, bytes(range(8)), 0xA8CA0C04044598C1),
    (5, bytes(range(1, 17)), 0xF449F40908436B95),
    (2**40, b"\x01\x00\x00\x00", 0xA61666D250592F66),
    (3, b"\xff" * 6, 0xE841260D1DF18F6E),
    (3, b"abc", 0x0EC1596D96DB7B94),
]


def as_rows(*rows: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)


def hash_of(row_id: int, row: bytes) -> int:
    return int(row_hashes(np.array([row_id]), as_rows(row))[0])


@pytest.mark.parametrize(("row_id", "row", "expected"), GOLDEN)
def test_golden_hashes(row_id: int, row: bytes, expected: int) -> None:
    assert (hash_of(row_id, row), slow_row_hash(row_id, row)) == (expected, expected)


def test_the_mixing_step_is_splitmix64() -> None:
    """The first outputs for seed 0, as Vigna's reference implementation prints them."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(np.arange(3, dtype=np.uint64)).tolist() == published
    assert [splitmix(x) for x in range(3)] == published


rows_of_one_length = st.integers(1, 40).flatmap(
    lambda length: st.lists(st.binary(min_size=length, max_size=length), min_size=1, max_size=6)
)


@given(rows_of_one_length, st.data())
def test_hashes_are_those_of_the_slow_oracle(rows: list[bytes], data: st.DataObject) -> None:
    """Of words of 8, 4, 2 and 1 bytes, in any order of ids."""
    ids = data.draw(st.lists(st.integers(0, 2**62), min_size=len(rows), max_size=len(rows)))
    found = row_hashes(np.array(ids), as_rows(*rows))
    assert found.dtype == np.uint64
    assert found.tolist() == [slow_row_hash(row_id, row) for row_id, row in zip(ids, rows, strict=True)]


@pytest.mark.parametrize("length", [256, 2 * 1024 + 4, 514, 999])
def test_long_rows(length: int) -> None:
    rows = np.random.default_rng(length).integers(0, 256, (3, length), dtype=np.uint8)
    ids = np.array([7, 2**33, 0])
    assert row_hashes(ids, rows).tolist() == [
        slow_row_hash(int(row_id), row.tobytes()) for row_id, row in zip(ids, rows, strict=True)
    ]


@given(st.binary(min_size=1, max_size=24), st.integers(0, 2**40), st.data())
def test_any_changed_bit_changes_the_hash(row: bytes, row_id: int, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * len(row) - 1))
    changed = bytearray(row)
    changed[bit // 8] ^= 1 << bit % 8
    assert hash_of(row_id, row) != hash_of(row_id, bytes(changed))


def test_every_bit_of_one_table() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (5, 12), dtype=np.uint8)
    sums = {int(block_sums(raw)[0])}
    for bit in range(raw.size * 8):
        changed = raw.copy()
        changed.flat[bit // 8] ^= np.uint8(1 << bit % 8)
        sums.add(int(block_sums(changed)[0]))
    assert len(sums) == 1 + raw.size * 8


@pytest.mark.parametrize("length", [1, 2, 4, 6, 8, 24])
def test_swapped_rows_and_swapped_words_change_the_sum(length: int) -> None:
    rows = np.random.default_rng(length).permutation(256)[: 4 * length].astype(np.uint8).reshape(4, length)
    before = block_sums(rows)[0]
    assert block_sums(rows[[1, 0, 2, 3]])[0] != before
    assert block_sums(rows[::-1].copy())[0] != before
    word = next(size for size in (8, 4, 2, 1) if length % size == 0)
    if length > word:
        swapped = rows.copy()
        swapped[0, :word], swapped[0, word : 2 * word] = rows[0, word : 2 * word], rows[0, :word]
        assert block_sums(swapped)[0] != before


@given(st.integers(1, 40), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_rows_of_zeros_hash_to_0(length: int, ids: list[int]) -> None:
    assert not row_hashes(np.array(ids), np.zeros((len(ids), length), dtype=np.uint8)).any()


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [
        (1, (4096, 1)),
        (4096, (4096, 1)),
        (4097, (4096, 2)),
        (4096 * 1024, (4096, 1024)),
        (4096 * 1024 + 1, (8192, 513)),
        (2**40, (2**30, 1024)),
        (384_006_168, (2**19, 733)),
    ],
)
def test_blocks(num_rows: int, expected: tuple[int, int]) -> None:
    assert (block_rows(num_rows), num_blocks(num_rows)) == expected


@pytest.mark.parametrize("row_bytes", [8, 6])
@pytest.mark.parametrize("part_bytes", [1, 1000, 1 << 22])
def test_the_sums_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_bytes: int, part_bytes: int) -> None:
    """Two blocks and a part of one, however much is hashed at once."""
    monkeypatch.setattr(checksums, "PART_BYTES", part_bytes)
    num_rows = 2 * 4096 + 5
    raw = np.random.default_rng(0).integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
    raw.tofile(tmp_path / "table.dat")
    mapped = np.memmap(tmp_path / "table.dat", dtype=np.uint8, mode="r", shape=(num_rows, row_bytes))
    assert to_hex(block_sums(mapped)) == slow_sums(tmp_path / "table.dat", num_rows)


@given(st.lists(st.tuples(st.integers(0, 9999), st.binary(min_size=6, max_size=6)), max_size=20))
def test_a_difference_of_sums_is_what_changed(changes: list[tuple[int, bytes]]) -> None:
    """Old hashes out, new ones in: as if all rows had been read again."""
    rows = np.zeros((10_000, 6), dtype=np.uint8)
    rows[::7] = 9
    sums = block_sums(rows)
    for row_id, row in changes:
        ids = np.array([row_id])
        add_to_blocks(sums, ids, np.uint64(0) - row_hashes(ids, rows[ids]), len(rows))
        rows[row_id] = np.frombuffer(row, dtype=np.uint8)
        add_to_blocks(sums, ids, row_hashes(ids, rows[ids]), len(rows))
    assert sums.tolist() == block_sums(rows).tolist()


def test_several_rows_of_a_block_are_all_added() -> None:
    sums = np.array([2**64 - 1, 5, 0], dtype=np.uint64)
    add_to_blocks(sums, np.array([0, 4095, 4096, 1, 8192]), np.array([1, 2, 3, 4, 5], dtype=np.uint64), 9000)
    assert sums.tolist() == [6, 8, 5]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_hexadecimal_digits(values: list[int]) -> None:
    texts = to_hex(np.array(values, dtype=np.uint64))
    assert all(len(text) == 16 and int(text, 16) == value for text, value in zip(texts, values, strict=True))
    assert from_hex(texts).tolist() == values
    assert from_hex(texts).dtype == np.uint64
