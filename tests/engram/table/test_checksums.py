"""checksums.py against a slow form of docs/format.md's hashes (tables.py), and golden values."""

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

# Of version 2, from a program that was written for it from the specification alone; a release that changes one can't
# check an older one's tables.
GOLDEN_OF_WORDS = [
    (0, bytes(range(8)), 0xC37AED4101BE30D3),
    (1, bytes(range(8)), 0xA8CA0C04044598C1),
    (5, bytes(range(1, 17)), 0xF449F40908436B95),
    (2**40, b"\x01\x00\x00\x00", 0xA61666D250592F66),
    (3, b"\xff" * 6, 0xE841260D1DF18F6E),
    (3, b"abc", 0x0EC1596D96DB7B94),
]
# XXH3's own test vectors (xxHash 0.8.3, its sanity check): length, hash with seed 0, hash with seed 2⁶⁴/φ.
PUBLISHED = [
    (6, 0x27B56A84CD2D7325, 0x84589C116AB59AB9),
    (12, 0xA713DAF0DFBB77E7, 0xE7303E1B2336DE0E),
    (48, 0x397DA259ECBA1F11, 0xADC2CBAA44ACC616),
    (195, 0xCD94217EE362EC3A, 0xBA68003D370CB3D9),
    (512, 0x617E49599013CB6B, 0x3CE457DE14C27708),
    (2367, 0xCB37AEB9E5D361ED, 0xD2DB3415B942B42A),
]


@pytest.fixture(params=["compiled", "package"])
def either_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row hashes by the extension and by the package xxhash."""
    if request.param == "package":
        monkeypatch.setattr(checksums, "compiled", None)
    elif checksums.compiled is None:
        pytest.skip("_row_hashes.c isn't compiled here")


def as_rows(*rows: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)


def hash_of(row_id: int, row: bytes, version: int = 3) -> int:
    return int(row_hashes(np.array([row_id]), as_rows(row), version)[0])


@pytest.mark.parametrize(("row_id", "row", "expected"), GOLDEN_OF_WORDS)
def test_golden_hashes_of_version_2(row_id: int, row: bytes, expected: int) -> None:
    assert (hash_of(row_id, row, 2), slow_row_hash(row_id, row, 2)) == (expected, expected)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize(("length", "with_seed_0", "with_a_seed"), PUBLISHED)
def test_hashes_are_xxh3s_own(length: int, with_seed_0: int, with_a_seed: int) -> None:
    state, row = 2654435761, bytearray()
    for _ in range(length):
        row.append(state >> 56)
        state = state * 0x9E3779B185EBCA8D % 2**64
    seeds = np.array([0, 0x9E3779B185EBCA8D], dtype=np.uint64).view(np.int64)
    assert row_hashes(seeds, as_rows(bytes(row), bytes(row))).tolist() == [with_seed_0, with_a_seed]


@pytest.mark.parametrize("version", [2, 3])
def test_two_signs_that_change_change_the_hash(version: int) -> None:
    """Version 2's hash didn't see them: the top bits of two 8-byte words."""
    values = np.random.default_rng(0).standard_normal((2, 8)).astype("<f4")
    changed = values.copy()
    changed[0, [1, 3]] *= -1
    ids = np.arange(2)
    before, after = (row_hashes(ids, rows.view(np.uint8), version) for rows in (values, changed))
    assert (before != after).tolist() == [version == 3, False]


def test_the_mixing_step_is_splitmix64() -> None:
    """The first outputs for seed 0, as Vigna's reference implementation prints them."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(np.arange(3, dtype=np.uint64)).tolist() == published
    assert [splitmix(x) for x in range(3)] == published


rows_of_one_length = st.integers(1, 40).flatmap(
    lambda length: st.lists(st.binary(min_size=length, max_size=length), min_size=1, max_size=6)
)


@given(rows_of_one_length, st.sampled_from([2, 3]), st.data())
def test_hashes_are_those_of_the_slow_oracle(rows: list[bytes], version: int, data: st.DataObject) -> None:
    """Of words of 8, 4, 2 and 1 bytes, in any order of ids."""
    ids = data.draw(st.lists(st.integers(0, 2**62), min_size=len(rows), max_size=len(rows)))
    found = row_hashes(np.array(ids), as_rows(*rows), version)
    assert found.dtype == np.uint64
    assert found.tolist() == [slow_row_hash(row_id, row, version) for row_id, row in zip(ids, rows, strict=True)]


@pytest.mark.usefixtures("either_form")
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
    for version in (2, 3):
        assert not row_hashes(np.array(ids), np.zeros((len(ids), length), dtype=np.uint8), version).any()


def test_what_is_compiled_refuses_buffers_that_do_not_fit() -> None:
    if checksums.compiled is None:
        pytest.skip("_row_hashes.c isn't compiled here")
    for ids, rows, hashes in ((2, 2, 1), (3, 2, 3), (1, 0, 1)):
        with pytest.raises(ValueError, match="aren't equally many"):
            checksums.compiled(np.zeros(ids, np.int64), np.zeros((rows, 8), np.uint8), np.zeros(hashes, np.uint64))


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
