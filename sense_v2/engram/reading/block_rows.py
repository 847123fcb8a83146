"""Rows of blocks, as GGUF files have them: what each format's bytes stand for.

A row is a whole number of blocks. A block is one or two float16 numbers, in the formats of 256 values small scales of
groups of 16 or 32 values as well, and codes of 2 to 8 bits:

    value = scale of its group × code  [- or + minimum of its group]

`decode_blocks` is the definition in NumPy, with the roundings that ggml's code has: each product and each sum is
rounded to float32, and none is fused. `_blocks.h` decodes the same bits faster, where it was compiled
(`sense_v2.engram.reading.gather`). Source: ggml's block layouts (ggml-org/llama.cpp, ggml/src/ggml-common.h).

R blocks, B bytes of a block, U rows, S bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sense_v2.engram.table.compact_rows import INT4, decode_int4
from sense_v2.engram.table.format import RowDtype

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BlockFormat:
    """One of GGUF's types of blocks."""

    name: str
    """As llama.cpp spells it."""
    number: int
    """Of the type in a GGUF file."""
    block_values: int
    block_bytes: int
    decode: Callable[[Array], Array]
    """Blocks, uint8 [R, B] -> float32 [R, values of a block]."""

    def width(self, row_bytes: int) -> int:
        """Values of a row of that many bytes."""
        return row_bytes // self.block_bytes * self.block_values


def decode_blocks(rows_US: Array, blocks: BlockFormat) -> Array:
    """Rows as bytes, uint8 [U, S], each a whole number of blocks -> float32 [U, D]."""
    values_UD = np.empty((len(rows_US), blocks.width(rows_US.shape[1])), np.float32)
    if len(rows_US):
        values_UD[:] = blocks.decode(rows_US.reshape(-1, blocks.block_bytes)).reshape(values_UD.shape)
    return values_UD


def _half(blocks_RB: Array, at: int) -> Array:
    """[R, 1], the float16 at that byte."""
    return np.ascontiguousarray(blocks_RB[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(codes_RB: Array, run: int, bits: int) -> Array:
    """Codes of `bits` bits, [R, values]: the lowest ones of `run` bytes first, then the next ones of the same bytes,
    then those of the next run."""
    shifts_S1 = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes_RNSB = (codes_RB.reshape(len(codes_RB), -1, 1, run) >> shifts_S1) & np.uint8((1 << bits) - 1)
    return codes_RNSB.reshape(len(codes_RB), -1)


def _float(codes: Array, lowest: int = 0) -> Array:
    """Unsigned codes, the lowest of which stands for that number."""
    return codes.astype(np.float32) + np.float32(lowest)


def _of_groups(codes_RV: Array, scales_RG: Array) -> Array:
    """Codes times the scale of their group, [R, G, values of a group]."""
    return scales_RG[:, :, None] * codes_RV.reshape(*scales_RG.shape, -1)


def _q4_0(b: Array) -> Array:
    return _half(b, 0) * _float(_fields(b[:, 2:], 16, 4), -8)


def _q4_1(b: Array) -> Array:
    return _half(b, 0) * _float(_fields(b[:, 4:], 16, 4)) + _half(b, 2)


def _five_bits(b: Array, at: int) -> Array:
    """Four bytes with the fifth bits, in the values' order, and 16 with the lower four."""
    fifth_RV = np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little")
    return _fields(b[:, at + 4 :], 16, 4) | fifth_RV << np.uint8(4)


def _q5_0(b: Array) -> Array:
    return _half(b, 0) * _float(_five_bits(b, 2), -16)


def _q5_1(b: Array) -> Array:
    return _half(b, 0) * _float(_five_bits(b, 4)) + _half(b, 2)


def _q8_0(b: Array) -> Array:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(b: Array) -> Array:
    scales_RG, minima_RG = _half(b, 80) * _float(b[:, :16] & 15), _half(b, 82) * _float(b[:, :16] >> 4)
    return _of_groups(_float(_fields(b[:, 16:80], 32, 2)), scales_RG) - minima_RG[:, :, None]


def _q3_k(b: Array) -> Array:
    small_RG = _fields(b[:, 96:104], 8, 4) | _fields(b[:, 104:108], 4, 2) << np.uint8(4)
    # The highest bit takes 4 off where it isn't set.
    codes_RV = _float(_fields(b[:, 32:96], 32, 2) | _fields(b[:, :32], 32, 1) << np.uint8(2), -4)
    return _of_groups(codes_RV, _half(b, 108) * _float(small_RG, -32))


def _scales_and_minima(b: Array) -> tuple[Array, Array]:
    """Of Q4_K and Q5_K, [R, 8] each: six bits a number in twelve bytes. The first four scales and minima are the
    lower six bits of a byte; of the last four, those bytes have the upper two bits and the last bytes the others."""
    first_R4, second_R4, last_R4 = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales_RG = np.concatenate([first_R4 & 63, last_R4 & 15 | first_R4 >> 6 << 4], axis=1)
    minima_RG = np.concatenate([second_R4 & 63, last_R4 >> 4 | second_R4 >> 6 << 4], axis=1)
    return _half(b, 0) * _float(scales_RG), _half(b, 2) * _float(minima_RG)


def _q4_k(b: Array) -> Array:
    scales_RG, minima_RG = _scales_and_minima(b)
    return _of_groups(_float(_fields(b[:, 16:], 32, 4)), scales_RG) - minima_RG[:, :, None]


def _q5_k(b: Array) -> Array:
    scales_RG, minima_RG = _scales_and_minima(b)
    codes_RV = _fields(b[:, 48:], 32, 4) | _fields(b[:, 16:48], 32, 1) << np.uint8(4)
    return _of_groups(_float(codes_RV), scales_RG) - minima_RG[:, :, None]


def _q6_k(b: Array) -> Array:
    codes_RV = _fields(b[:, :128], 64, 4) | _fields(b[:, 128:192], 32, 2) << np.uint8(4)
    return _of_groups(_float(codes_RV, -32), _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32))


BLOCK_FORMATS = {
    blocks.name: blocks
    for blocks in (
        BlockFormat("Q4_0", 2, 32, 18, _q4_0),
        BlockFormat("Q4_1", 3, 32, 20, _q4_1),
        BlockFormat("Q5_0", 6, 32, 22, _q5_0),
        BlockFormat("Q5_1", 7, 32, 24, _q5_1),
        BlockFormat("Q8_0", 8, 32, 34, _q8_0),
        BlockFormat("Q2_K", 10, 256, 84, _q2_k),
        BlockFormat("Q3_K", 11, 256, 110, _q3_k),
        BlockFormat("Q4_K", 12, 256, 144, _q4_k),
        BlockFormat("Q5_K", 13, 256, 176, _q5_k),
        BlockFormat("Q6_K", 14, 256, 210, _q6_k),
        BlockFormat("IQ4_NL", 20, 32, 18, decode_int4),
    )
}


@dataclass(frozen=True)
class BlockCoding:
    """Rows of blocks, as a conversion reads them."""

    blocks: BlockFormat

    @property
    def name(self) -> str:
        return self.blocks.name

    def row_bytes(self, width: int) -> int:
        return width // self.blocks.block_values * self.blocks.block_bytes

    def decode(self, rows_US: Array, width: int) -> torch.Tensor:
        return torch.from_numpy(decode_blocks(rows_US, self.blocks))


def blocks_of(dtype: RowDtype) -> BlockFormat | None:
    """The blocks that rows of our own dtype are; None for the others."""
    return BLOCK_FORMATS["IQ4_NL"] if dtype.name == INT4 else None
