"""Rows of 32-bit values <-> rows of 8 or 4 bits a value with scales (docs/format.md).

    float8_e4m3fn   a scale byte for each 32 values, which stands for 2^(byte - 127), as in DeepSeek-V4.1's tables
    int8            a float32 scale for the whole row
    int4            blocks of 32 values: a float16 scale, and a code for one of 16 levels; GGUF's IQ4_NL

A row is a quarter of its float32 size, or a seventh, and is only read: an update smaller than a step of its codes
would be lost.

`encode_rows` and `decode_rows` are the whole way. Of the types of 8 bits, `encode` and `decode` work on values and
scales as two tensors, which is how released checkpoints have them; on our disk a row's scales lie behind its values
(`join`, `split`), so that a cold row is one read. Decoding goes through
buffers that stay in the processor's cache, a few rows at a time. What torch's own `copy_` does a value at a time for
float8 is done here on the bits: shifted left by seven, with bit 14 cleared, a code is a float16 of 1/256 the value.
The two codes for NaN would come out as ±480: where a tile holds one, a carry from 0x7F sets the exponent's last bit.

U rows, D row width, K scales of a row, B bytes of a row, R blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sense_v2.core.config import COMPACT_DTYPES

FLOAT8, INT8, INT4 = COMPACT_DTYPES
# Values that share a scale in float8 and int4 rows.
BLOCK_VALUES = 32
FLOAT8_MAX, INT8_MAX = 448.0, 127.0
# What a code of four bits stands for, before its scale. Finer near zero, where most values are.
INT4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
INT4_BLOCK_BYTES = 18
# The largest value of which some scale, at most the largest float16, reaches the nearest level.
INT4_MAX = 65504.0 * INT4_LEVELS[-1]
# Values decoded at a time: what is between two passes over them stays in the second-level cache, and there are enough
# for torch to hand to several threads.
TILE_VALUES = 1 << 20

_BIAS = 127
# 2^(byte - 127) for each scale byte; 255 is NaN. In float32, byte 0 is a subnormal.
_SCALES = torch.tensor(
    [2.0 ** (byte - _BIAS) for byte in range(255)] + [float("nan")], dtype=torch.float32, device="cpu"
)
# What the float16 that a code's bits make is multiplied with; past byte 247 that is too large for a float32.
_FROM_HALF = _SCALES.double().mul(256).float()
_LAST_FROM_HALF = 247


# For each whole number from -128 on, the code of the nearest level.
_NEAREST_CODE = np.abs(np.arange(-128, 128)[:, None] - np.array(INT4_LEVELS)).argmin(axis=1).astype(np.uint8)
# The scale is tried that makes a block's largest value one of these: where the levels end, and a little beyond, which
# makes all steps smaller. Each is then fitted once to the codes that it gave.
_INT4_EXTREMES = (-127.0, 113.0, -140.0, 125.0)


def num_scales(width: int, dtype: str) -> int:
    """K, of a row of `width` values.

    >>> num_scales(256, "float8_e4m3fn"), num_scales(40, "int4"), num_scales(40, "int8")
    (8, 2, 1)
    """
    return 1 if dtype == INT8 else -(-width // BLOCK_VALUES)


def encode_rows(values_UD: torch.Tensor, dtype: str) -> torch.Tensor:
    """float32 rows -> rows as they lie on disk, uint8 [U, B]. Raises `ValueError` as `encode`."""
    if dtype != INT4:
        return join(*encode(values_UD, dtype))
    _refuse_not_finite(values_UD, dtype)
    padded = torch.nn.functional.pad(values_UD, (0, -values_UD.shape[1] % BLOCK_VALUES))
    blocks_RB = _encode_int4(padded.numpy().reshape(-1, BLOCK_VALUES))
    return torch.from_numpy(blocks_RB).view(len(values_UD), num_scales(values_UD.shape[1], dtype) * INT4_BLOCK_BYTES)


def _encode_int4(values_RV: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[R, 32] -> [R, 18]: of a few scales for each block the one with the least error."""
    extreme_R1 = np.take_along_axis(values_RV, np.abs(values_RV).argmax(axis=1, keepdims=True), axis=1)
    best_R1 = np.full((len(values_RV), 1), np.inf, np.float32)
    scales_R1, codes_RV = np.zeros((len(values_RV), 1), np.float16), np.zeros(values_RV.shape, np.uint8)
    levels = np.array(INT4_LEVELS, np.float32)
    # Of scales that overflow the error is infinite or NaN, and never the least.
    with np.errstate(all="ignore"):
        for multiple in _INT4_EXTREMES:
            tried_R1 = (extreme_R1 / np.float32(multiple)).astype(np.float16)
            for _ in range(2):
                scale_R1 = tried_R1.astype(np.float32)
                steps_RV = np.nan_to_num(np.rint(values_RV / scale_R1).clip(-128, 127))
                near_RV = _NEAREST_CODE[steps_RV.astype(np.int16) + 128]
                levels_RV = levels[near_RV]
                error_R1 = np.square(levels_RV * scale_R1 - values_RV).sum(axis=1, keepdims=True)
                is_better_R1 = (error_R1 < best_R1) & (scale_R1 != 0)
                best_R1 = np.where(is_better_R1, error_R1, best_R1)
                scales_R1 = np.where(is_better_R1, tried_R1, scales_R1)
                codes_RV = np.where(is_better_R1, near_RV, codes_RV)
                # The scale with the least error for these codes.
                fitted_R1 = (values_RV * levels_RV).sum(axis=1, keepdims=True)
                tried_R1 = (fitted_R1 / np.square(levels_RV).sum(axis=1, keepdims=True)).astype(np.float16)
    halves = codes_RV.reshape(-1, 2, BLOCK_VALUES // 2)
    return np.concatenate([scales_R1.view(np.uint8), halves[:, 0] | halves[:, 1] << np.uint8(4)], axis=1)


def decode_int4(blocks_RB: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Blocks, uint8 [R, 18] -> float32 [R, 32]."""
    scales_R1 = np.ascontiguousarray(blocks_RB[:, :2]).view("<f2").astype(np.float32)
    codes_RV = np.concatenate([blocks_RB[:, 2:] & 15, blocks_RB[:, 2:] >> 4], axis=1)
    values_RV: np.ndarray[Any, Any] = scales_R1 * np.array(INT4_LEVELS, np.float32)[codes_RV]
    return values_RV


def _refuse_not_finite(values_UD: torch.Tensor, dtype: str) -> None:
    finite_U = values_UD.isfinite().all(dim=1)
    if not finite_U.all():
        row = int(finite_U.logical_not().nonzero()[0])
        raise ValueError(f"row {row} holds NaN or an infinity, for which {dtype} rows have no scale")


def encode(values_UD: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 rows -> (codes_UD of that dtype; scales_UK: uint8 exponents for float8_e4m3fn, float32 for int8).

    The scale is the smallest that the largest value fits under: with float8 the smallest 2^n with 448 × 2^n at or
    above it, with int8 the smallest float32 with 127 times it at or above. Values are rounded to the nearest code,
    halves to the even one. Zeros have scale and code 0.

    Raises `ValueError` naming the first row with a value that is no finite number.
    """
    _refuse_not_finite(values_UD, dtype)
    return _encode_float8(values_UD) if dtype == FLOAT8 else _encode_int8(values_UD)


def _encode_float8(values_UD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = values_UD.shape[1]
    padded = torch.nn.functional.pad(values_UD, (0, -width % BLOCK_VALUES))
    blocks_UKV = padded.unflatten(1, (-1, BLOCK_VALUES))
    # max = mantissa × 2^exponent with a mantissa from 0.5 on, and 448 = 0.875 × 2^9.
    mantissa_UK, exponent_UK = torch.frexp(blocks_UKV.abs().amax(dim=2))
    exponent_UK = exponent_UK - 9 + (mantissa_UK > 0.875).int() + _BIAS
    # Where the block is too small for the smallest scale, or all zeros, that one serves.
    scales_UK = exponent_UK.clamp(min=0).where(mantissa_UK > 0, 0).to(torch.uint8)
    # A power of two: exact, but where the result is far below the smallest code.
    inverse_UK = torch.index_select(_SCALES.reciprocal(), 0, scales_UK.flatten().int()).view(scales_UK.shape)
    codes = (blocks_UKV * inverse_UK[..., None]).flatten(1)[:, :width].to(torch.float8_e4m3fn)
    return codes.contiguous(), scales_UK


def _encode_int8(values_UD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest_U1 = values_UD.abs().amax(dim=1, keepdim=True).double()
    scales_U1 = (largest_U1 / INT8_MAX).float()
    next_up = torch.nextafter(scales_U1, torch.full((), torch.inf))
    scales_U1 = torch.where(scales_U1.double() * INT8_MAX < largest_U1, next_up, scales_U1)
    # In float64, where no quotient that isn't a half can become one.
    quotients_UD = values_UD.double() / scales_U1.double().where(scales_U1 > 0, 1.0)
    return quotients_UD.round().to(torch.int8), scales_U1


def decode(codes_UD: torch.Tensor, scales_UK: torch.Tensor, out_UD: torch.Tensor) -> torch.Tensor:
    """Code × scale into `out_UD`, float32 or bfloat16 (the float32 product, rounded), which is returned.

    `codes_UD` are float8_e4m3fn or int8; their scales are as `encode` gives them (a byte of torch.float8_e8m0fnu is
    one of uint8). A NaN, as code or as scale, is NaN. Rows may lie apart in memory, values of a row may not.
    """
    if codes_UD.dtype not in (torch.float8_e4m3fn, torch.int8):
        raise TypeError(f"codes are float8_e4m3fn or int8, not {codes_UD.dtype}")
    num_rows, width = codes_UD.shape
    tile_rows = max(1, min(num_rows, TILE_VALUES // width))
    work = _Float8Work(tile_rows, width) if codes_UD.dtype == torch.float8_e4m3fn else None
    is_float32 = out_UD.dtype == torch.float32
    values = None if is_float32 else torch.empty(tile_rows, width, dtype=torch.float32, device="cpu")
    for start in range(0, num_rows, tile_rows):
        tile = slice(start, min(start + tile_rows, num_rows))
        to_UD = out_UD[tile]
        values_UD = to_UD if values is None else values[: len(to_UD)]
        if work is None:
            values_UD.copy_(codes_UD[tile]).mul_(scales_UK[tile])
        else:
            work.decode(codes_UD[tile].view(torch.int8), scales_UK[tile].view(torch.uint8), values_UD)
        if values is not None:
            to_UD.copy_(values_UD)
    return out_UD


class _Float8Work:
    """Buffers for a tile of float8 rows."""

    def __init__(self, num_rows: int, width: int) -> None:
        self.bits = torch.empty(num_rows, width, dtype=torch.int16, device="cpu")
        self.blocks = width // BLOCK_VALUES

    def decode(self, codes_UD: torch.Tensor, exponents_UK: torch.Tensor, to_UD: torch.Tensor) -> None:
        num_rows = len(codes_UD)
        bits = self.bits[:num_rows]
        bits.copy_(codes_UD).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        if _has_nan(codes_UD):
            bits.bitwise_or_((bits + 0x80).bitwise_and_(0x4000))
        to_UD.copy_(bits.view(torch.float16))
        exponents = exponents_UK.flatten().int()
        scale_of = _FROM_HALF
        if int(exponents.max()) > _LAST_FROM_HALF:
            to_UD.mul_(256)
            scale_of = _SCALES
        scales_UK = torch.index_select(scale_of, 0, exponents).view(num_rows, -1)
        whole = self.blocks * BLOCK_VALUES
        if whole:
            to_UD[:, :whole].unflatten(1, (self.blocks, BLOCK_VALUES)).mul_(scales_UK[:, : self.blocks, None])
        if whole < to_UD.shape[1]:
            to_UD[:, whole:].mul_(scales_UK[:, self.blocks :])


def _has_nan(codes_UD: torch.Tensor) -> bool:
    """Whether one of the codes, as int8, is 0x7F, the largest of int8, or 0xFF, the largest of uint8. NumPy compares
    32 at a time."""
    codes = codes_UD.numpy()
    return bool(codes.max() == 0x7F or codes.view(np.uint8).max() == 0xFF)


def join(codes_UD: torch.Tensor, scales_UK: torch.Tensor) -> torch.Tensor:
    """Rows as they lie on disk, uint8 [U, B]: the codes, and behind them the scales, little-endian."""
    return torch.cat([codes_UD.view(torch.uint8), scales_UK.contiguous().view(torch.uint8)], dim=1)


def split(rows_UB: torch.Tensor, width: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes_UD, scales_UK) of rows as they lie on disk, uint8 [U, B]; the codes share their memory."""
    codes_UD, scales_UB = rows_UB[:, :width], rows_UB[:, width:]
    if dtype == FLOAT8:
        return codes_UD.view(torch.float8_e4m3fn), scales_UB
    # A float32 may begin anywhere in a row of bytes: it is copied to where one can be read.
    return codes_UD.view(torch.int8), scales_UB.clone(memory_format=torch.contiguous_format).view(torch.float32)


def decode_rows(
    rows_UB: torch.Tensor, width: int, dtype: str, *, as_type: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows as they lie on disk -> their values in memory of their own, [U, D]."""
    if dtype == INT4:
        blocks_RB = rows_UB.contiguous().numpy().reshape(-1, INT4_BLOCK_BYTES)
        whole_UD = torch.from_numpy(decode_int4(blocks_RB)).view(
            len(rows_UB), num_scales(width, dtype) * BLOCK_VALUES
        )
        return whole_UD[:, :width].to(as_type).contiguous()
    values_UD = torch.empty(len(rows_UB), width, dtype=as_type, device="cpu")
    return decode(*split(rows_UB, width, dtype), values_UD)
