"""Compact rows against what the formats say, value by value in Python's own numbers, and the released rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sense_v2.engram.table import compact_rows
from sense_v2.engram.table.compact_rows import FLOAT8, INT8, decode, encode, join, num_scales, split

DTYPES = (FLOAT8, INT8)
NAN_CODES = (0x7F, 0xFF)


def float8_value(code):
    """OCP 8-bit floating point, E4M3: sign, 4 bits of exponent with bias 7, 3 of fraction; no infinity."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = code >> 3 & 0xF, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def scale_value(byte):
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def nearest_float8(value):
    """The code nearest to `value`; of two, the even one."""
    codes = [
        code for code in range(256) if code not in NAN_CODES and bool(code & 0x80) == (math.copysign(1, value) < 0)
    ]
    return min(codes, key=lambda code: (abs(float8_value(code) - value), code & 1))


def decoded(codes, scales, dtype=torch.float32):
    return decode(codes, scales, torch.full(codes.shape, 7.0, dtype=dtype))


def same_bits(found, expected):
    """Bit for bit, with one NaN as good as another."""
    is_nan = expected.isnan()
    assert torch.equal(found.isnan(), is_nan)
    as_bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    zero = torch.zeros((), dtype=found.dtype)
    assert torch.equal(found.where(~is_nan, zero).view(as_bits), expected.where(~is_nan, zero).view(as_bits))


def rows(num_rows=40, width=96, seed=0, scale=0.02):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * scale


# Decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_float8_code_with_every_scale_is_what_the_formats_say(dtype):
    codes_UD = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scales_UK = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    # In float64 every product is exact; then one rounding to float32, and one from there.
    codes = np.array([float8_value(code) for code in range(256)])
    scales = np.array([scale_value(byte) for byte in range(256)])
    with np.errstate(over="ignore"):
        expected = torch.from_numpy((codes[None] * scales[:, None]).astype(np.float32)).to(dtype)
    same_bits(decoded(codes_UD.view(torch.float8_e4m3fn), scales_UK, dtype), expected)


def test_every_float8_code_is_torchs_own_conversion():
    codes_UD = torch.arange(256, dtype=torch.uint8)[None].view(torch.float8_e4m3fn)
    found = decoded(codes_UD, torch.full((1, 8), 127, dtype=torch.uint8))
    same_bits(found, codes_UD.float())
    assert found.isnan().nonzero()[:, 1].tolist() == list(NAN_CODES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_int8_code_times_its_rows_scale(dtype):
    codes_UD = torch.arange(-128, 128).to(torch.int8).expand(5, 256).contiguous()
    scales_U1 = torch.tensor([[0.0], [0.1], [2.0**-149], [3e36], [math.nan]])
    with np.errstate(over="ignore"):
        expected = codes_UD.numpy().astype(np.float32) * scales_U1.numpy()
    same_bits(decoded(codes_UD, scales_U1, dtype), torch.from_numpy(expected).to(dtype))


def test_the_released_rows_bit_for_bit(golden_folder):
    shard = load_file(golden_folder / "deepseek_v41_rows_shard.safetensors")
    expected = load_file(golden_folder / "deepseek_v41_rows_expected.safetensors")
    ids = expected["in.row_ids"].flatten()
    codes = shard["layers.1.engram.embed.weight"].view(torch.uint8)[ids].view(torch.float8_e4m3fn)
    scales = shard["layers.1.engram.embed.scale"].view(torch.uint8)[ids]
    found = decoded(codes, scales, torch.bfloat16)
    assert torch.equal(found.view(torch.int16), expected["out.rows"].reshape(-1, 256).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_values", [1, 100, 1000])
def test_tiles_make_no_difference(dtype, tile_values, monkeypatch):
    codes, scales = encode(rows(), dtype)
    whole = decoded(codes, scales)
    monkeypatch.setattr(compact_rows, "TILE_VALUES", tile_values)
    assert torch.equal(decoded(codes, scales), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype):
    codes, scales = encode(torch.empty(0, 40), dtype)
    assert decoded(codes, scales).shape == (0, 40)
    assert scales.shape == (0, num_scales(40, dtype))


def test_other_codes_are_refused():
    with pytest.raises(TypeError, match=r"codes are float8_e4m3fn or int8, not torch\.uint8"):
        decode(torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, 1), torch.zeros(1, 32))


# Encoding


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.sampled_from([1.0, 2.0**-20, 2.0**-120]),
)
def test_float8_takes_the_smallest_scale_that_fits_and_the_nearest_code(values, factor):
    values_UD = torch.tensor([values]) * factor
    codes, scales = encode(values_UD, FLOAT8)
    for block in range(num_scales(len(values), FLOAT8)):
        part = [float(value) for value in values_UD[0, 32 * block : 32 * block + 32]]
        largest = max(map(abs, part))
        byte = int(scales[0, block])
        assert largest <= 448 * scale_value(byte)
        assert byte == 0 or largest > 448 * scale_value(byte - 1)
        found = codes.view(torch.uint8)[0, 32 * block : 32 * block + 32].tolist()
        assert found == [nearest_float8(value / scale_value(byte)) for value in part]


def test_float8_halves_go_to_the_even_code():
    codes = list(range(0x7E))
    halves = [(float8_value(code) + float8_value(code + 1)) / 2 for code in codes]
    for sign in (1, -1):
        # 448 first, so that every block has scale 1.
        values = torch.tensor([[448.0, *halves[at : at + 31]] for at in range(0, len(halves) - 30, 31)]) * sign
        found, scales = encode(values, FLOAT8)
        assert (scales == 127).all()
        even = [code + code % 2 for code in codes][: values.shape[0] * 31]
        found = found.view(torch.uint8)[:, 1:].flatten().tolist()
        assert found == [code | (0x80 if sign < 0 else 0) for code in even]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.sampled_from([1.0, 2.0**-20, 2.0**-140]),
)
def test_int8_takes_the_smallest_scale_that_fits_and_the_nearest_code(values, factor):
    values_UD = torch.tensor([values]) * factor
    codes, scales = encode(values_UD, INT8)
    part = [float(value) for value in values_UD[0]]
    largest, scale = max(map(abs, part)), float(scales[0, 0])
    assert scale * 127 >= largest
    assert scale == 0 or float(np.nextafter(np.float32(scale), np.float32(0))) * 127 < largest
    assert codes[0].tolist() == [round(value / scale) if scale else 0 for value in part]
    assert codes.abs().max() <= 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_zero_bytes(dtype):
    """So that holes of a sparse file stay rows of zeros."""
    values = rows(4)
    values[1:3] = 0
    on_disk = join(*encode(values, dtype))
    assert on_disk.any(dim=1).tolist() == [True, False, False, True]
    assert decoded(*split(on_disk, 96, dtype))[1:3].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused_by_row(dtype, bad):
    values = rows(4)
    values[2, 95] = bad
    with pytest.raises(ValueError, match=f"^row 2 holds NaN or an infinity, for which {dtype} rows have no scale"):
        encode(values, dtype)


@pytest.mark.parametrize(("dtype", "step"), [(FLOAT8, 1 / 16), (INT8, 1 / 254)])
def test_the_error_is_at_most_half_a_step(dtype, step):
    values = rows(200, 64)
    error = (decoded(*encode(values, dtype)) - values).abs()
    # float8: of the value, but for those under the smallest normal code; int8: of the row's largest.
    limit = values.abs().amax(1, keepdim=True) * step if dtype == INT8 else values.abs() * step + 0.02 * 2**-14
    assert (error <= limit * (1 + 1e-6)).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_what_was_decoded_changes_no_value(dtype):
    once = decoded(*encode(rows(), dtype))
    again = decoded(*encode(once, dtype))
    assert torch.allclose(once, again, rtol=0 if dtype == FLOAT8 else 1e-6, atol=0)


# Rows on disk


@pytest.mark.parametrize("width", [1, 8, 31, 32, 33, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_on_disk_is_its_codes_and_then_its_scales(dtype, width):
    codes, scales = encode(rows(5, width), dtype)
    on_disk = join(codes, scales)
    expected = [
        codes.view(torch.uint8)[row].numpy().tobytes()
        + scales.numpy().astype(scales.numpy().dtype.newbyteorder("<"))[row].tobytes()
        for row in range(5)
    ]
    assert [row.numpy().tobytes() for row in on_disk] == expected
    for part in (on_disk, on_disk[3:4]):  # a single row's scale needn't be where a float32 may lie
        found_codes, found_scales = split(part, width, dtype)
        first = 0 if len(part) == 5 else 3
        assert torch.equal(decoded(found_codes, found_scales), decoded(codes, scales)[first : first + len(part)])


@pytest.mark.parametrize("code", NAN_CODES)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_one_nan_among_other_tiles_is_one_nan(code, row, monkeypatch):
    monkeypatch.setattr(compact_rows, "TILE_VALUES", 64)
    codes = torch.full((3, 64), 0x7E, dtype=torch.uint8)
    codes[:, ::2] = 0xFE
    codes[row, 33] = code
    found = decoded(codes.view(torch.float8_e4m3fn), torch.full((3, 2), 127, dtype=torch.uint8))
    assert found.isnan().nonzero().tolist() == [[row, 33]]
    assert (found.abs().nan_to_num(448) == 448).all()
