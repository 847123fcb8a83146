"""Rows of four bits a value: bytes against the specification and the package gguf, errors, what they can't hold."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sense_v2.engram.reading import gather as gather_module
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import compact_rows
from sense_v2.engram.table.compact_rows import INT4, INT4_MAX, decode_rows, encode_rows
from sense_v2.engram.table.format import file_bytes, row_dtype
from sense_v2.engram.table.row_dtypes import DtypeCoding, NotRepresentableError
from sense_v2.engram.upkeep.convert import convert_table

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def noise(num_rows=200, width=96, seed=0, std=0.02):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * std


def specified(row: bytes, width: int) -> list[float]:
    """docs/format.md, a value at a time."""
    values = []
    for value in range(width):
        block = row[value // 32 * 18 :][:18]
        (scale,) = struct.unpack("<e", block[:2])
        byte = block[2 + value % 16]
        values.append(scale * LEVELS[byte & 15 if value % 32 < 16 else byte >> 4])
    return values


@pytest.mark.parametrize("width", [1, 16, 32, 33, 64, 160])
def test_a_row_is_what_the_specification_says(width):
    rows_UB = encode_rows(noise(20, width), INT4)
    assert rows_UB.shape == (20, -(-width // 32) * 18) == (20, row_dtype(INT4).row_bytes(width))
    found = decode_rows(rows_UB, width, INT4)
    assert found.dtype == torch.float32
    for row, values in zip(rows_UB, found.tolist(), strict=True):
        assert specified(row.numpy().tobytes(), width) == values


def test_rows_of_whole_blocks_are_ggufs_iq4_nl():
    rows_UB = encode_rows(noise(), INT4)
    theirs = gguf.dequantize(rows_UB.numpy(), gguf.GGMLQuantizationType.IQ4_NL)
    assert np.array_equal(decode_rows(rows_UB, 96, INT4).numpy(), theirs)


def test_bytes_of_a_file():
    assert file_bytes(10, 64, INT4) == 10 * 36
    assert file_bytes(10, 65, INT4) == 10 * 54
    assert file_bytes(1000, 160, INT4) / file_bytes(1000, 160, "float32") < 0.16


def rms_error(values, dtype=INT4):
    return float((decode_rows(encode_rows(values, dtype), values.shape[1], dtype) - values).square().mean().sqrt())


def test_the_error_is_less_than_with_ggufs_own_four_bits():
    """And near that of the best scale of many for each block."""
    values = noise(2000)
    rms = float(values.square().mean().sqrt())
    kind = gguf.GGMLQuantizationType.Q4_0
    plain = gguf.dequantize(gguf.quantize(values.numpy(), kind), kind) - values.numpy()
    found = rms_error(values) / rms
    assert found < 0.077
    assert found < 0.9 * np.sqrt((plain**2).mean()) / rms
    blocks = values.view(-1, 32).numpy()
    best = np.full(len(blocks), np.inf)
    edges = (np.array(LEVELS[1:]) + np.array(LEVELS[:-1])) / 2
    extremes = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)][:, None]
    for divisor in (*np.linspace(-150, -100, 21), *np.linspace(100, 150, 21)):
        scale = (extremes / divisor).astype(np.float16).astype(np.float32)
        near = np.array(LEVELS)[np.searchsorted(edges, blocks / scale)] * scale
        best = np.minimum(best, ((near - blocks) ** 2).sum(1))
    assert found < 1.02 * np.sqrt(best.sum() / blocks.size) / rms


def test_scales_of_either_sign_and_values_of_any_size():
    values = torch.cat([noise(50, 64, std=std) for std in (1e-5, 1e-3, 1.0, 1e3)])
    values[7, 3], values[8, 3] = 5.0, -5.0
    found = decode_rows(encode_rows(values, INT4), 64, INT4)
    for row, (value, near) in enumerate(zip(values, found, strict=True)):
        # A scale has steps of 2⁻²⁴ at the least: below about 10⁻³ that is what is lost.
        bound = 0.15 * float(value.abs().max()) + 127 * 2.0**-24
        assert float((value - near).abs().max()) < bound, row


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=70))
def test_no_value_is_further_off_than_the_steps_between_levels(values):
    row = torch.tensor([values])
    found = decode_rows(encode_rows(row, INT4), len(values), INT4)
    for start in range(0, len(values), 32):
        part = slice(start, start + 32)
        largest = float(row[0, part].abs().max())
        assert float((row - found)[0, part].abs().max()) <= 0.2 * largest + 127 * 2.0**-24


def test_a_row_of_zeros_is_zero_bytes_and_reads_as_zeros():
    rows_UB = encode_rows(torch.zeros(3, 64), INT4)
    assert not rows_UB.any()
    assert decode_rows(rows_UB, 64, INT4).eq(0).all()
    half = torch.cat([torch.zeros(1, 32), torch.ones(1, 32)], dim=1)
    assert not encode_rows(half, INT4)[0, :18].any()


def test_no_rows():
    assert encode_rows(torch.empty(0, 64), INT4).shape == (0, 36)
    assert decode_rows(torch.empty(0, 36, dtype=torch.uint8), 64, INT4).shape == (0, 64)


def test_values_that_no_scale_reaches_are_refused():
    coding = DtypeCoding(row_dtype(INT4))
    values = noise(3, 32)
    values[1, 5] = INT4_MAX
    found = coding.decode(coding.encode(values), 32)
    assert float(found[1, 5]) == pytest.approx(INT4_MAX, rel=0.02)
    for bad, text in ((1.01 * INT4_MAX, "a value too large for int4"), (float("nan"), "NaN or an infinity")):
        values[1, 5] = bad
        with pytest.raises(NotRepresentableError, match=f"row 1 holds {text}"):
            coding.encode(values)
    with pytest.raises(ValueError, match="row 1 holds NaN or an infinity"):
        compact_rows.encode_rows(values, INT4)


@pytest.mark.parametrize("compiled", [True, False])
def test_small_batches_and_large_ones_are_the_decoded_rows(tmp_path, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(gather_module, "compiled", None)
    table = MMapEmbeddingStorage(300, 40, tmp_path / "t.dat", init_std=0.3)
    table.commit()
    values = table.weight.clone()
    table.close()
    convert_table(tmp_path / "t.dat", tmp_path / "four.dat", INT4)
    expected = decode_rows(encode_rows(values, INT4), 40, INT4)
    with_rows = MMapEmbeddingStorage(300, 40, tmp_path / "four.dat", dtype=INT4, mode="r").eval()
    for ids in (torch.tensor([299, 0, 7]), torch.arange(300).repeat(7).int(), torch.arange(6).view(2, 3)):
        assert torch.equal(with_rows(ids), expected[ids.long()])
    assert with_rows.stats().rows == 3 + 2100 + 6
    assert with_rows.dtype == torch.float32
    limited = MMapEmbeddingStorage(
        300, 40, tmp_path / "four.dat", dtype=INT4, mode="r", max_resident_bytes=8 << 20
    ).eval()
    assert torch.equal(limited(torch.arange(300)), expected)
    with pytest.raises(IndexError, match="row id 300"):
        with_rows(torch.tensor([300]))
