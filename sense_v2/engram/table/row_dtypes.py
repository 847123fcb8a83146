"""Rows as bytes on disk <-> float32 values: `Coding`, and the codings there are.

    DtypeCoding    a row type of our own tables; float8_e4m3fn has the bytes of DeepSeek-V4.1's codes and scales
    ScaledCodes    float8 codes with one scale for the whole table, as transformers has Qwen's
    BlockCoding    blocks of a GGUF file, which are only read (`sense_v2.engram.reading.block_rows`)

`stochastic_bfloat16` rounds trained rows so that small updates aren't lost, on average.

U rows of a part, D row width, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sense_v2.engram.table import compact_rows
from sense_v2.engram.table.compact_rows import FLOAT8_MAX
from sense_v2.engram.table.format import RowDtype


class ReadCoding(Protocol):
    """How rows of bytes are values."""

    @property
    def name(self) -> str: ...

    def row_bytes(self, width: int) -> int: ...

    def decode(self, rows_UB: np.ndarray[Any, Any], width: int) -> torch.Tensor:
        """Rows as bytes, uint8 [U, B] -> float32 [U, D]."""


class Coding(ReadCoding, Protocol):
    """How values are rows of bytes, both ways."""

    def encode(self, values_UD: torch.Tensor) -> np.ndarray[Any, Any]:
        """float32 [U, D] -> rows as bytes, uint8 [U, B]. Raises `NotRepresentableError`."""


class NotRepresentableError(Exception):
    """A row that a coding can't hold: its number among those given, and why."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row} {what}")
        self.row, self.what = row, what


@dataclass(frozen=True)
class DtypeCoding:
    """Rows as our own tables have them."""

    dtype: RowDtype

    @property
    def name(self) -> str:
        return self.dtype.name

    def row_bytes(self, width: int) -> int:
        return self.dtype.row_bytes(width)

    def decode(self, rows_UB: np.ndarray[Any, Any], width: int) -> torch.Tensor:
        raw_UB = torch.from_numpy(rows_UB)
        if self.dtype.is_compact:
            return compact_rows.decode_rows(raw_UB, width, self.name)
        return raw_UB.view(self.dtype.torch).float()

    def encode(self, values_UD: torch.Tensor) -> np.ndarray[Any, Any]:
        refuse_not_finite(values_UD, "holds NaN or an infinity")
        if self.dtype.is_compact:
            if self.name == compact_rows.INT4:
                _refuse(values_UD.abs() <= compact_rows.INT4_MAX, f"holds a value too large for {self.name}")
            rows_UB: np.ndarray[Any, Any] = compact_rows.encode_rows(values_UD, self.name).numpy()
            return rows_UB
        new_UD = values_UD.to(self.dtype.torch)
        refuse_not_finite(new_UD, f"holds a value too large for {self.name}")
        new_UB: np.ndarray[Any, Any] = new_UD.view(torch.uint8).numpy()
        return new_UB


def refuse_not_finite(values_UD: torch.Tensor, what: str) -> None:
    _refuse(values_UD.isfinite(), what)


def _refuse(fits_UD: torch.Tensor, what: str) -> None:
    """Raises `NotRepresentableError` for the first row with a value that doesn't fit."""
    fits_U = fits_UD.all(dim=1)
    if not fits_U.all():
        raise NotRepresentableError(int(fits_U.logical_not().nonzero()[0]), what)


@dataclass(frozen=True)
class ScaledCodes:
    """Float8 codes with one bfloat16 scale for all rows, as transformers has Qwen's: looked up as code × scale in
    bfloat16."""

    scale: float
    """A number of the type `scale_type`."""
    scale_type: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"float8_e4m3fn × {self.scale}"

    def row_bytes(self, width: int) -> int:
        return width

    def decode(self, rows_UB: np.ndarray[Any, Any], width: int) -> torch.Tensor:
        codes_UD = torch.from_numpy(rows_UB).view(torch.float8_e4m3fn)
        return (codes_UD.to(self.scale_type) * torch.tensor(self.scale, dtype=self.scale_type)).float()

    def encode(self, values_UD: torch.Tensor) -> np.ndarray[Any, Any]:
        refuse_not_finite(values_UD, "holds NaN or an infinity")
        codes_UB: np.ndarray[Any, Any] = (
            (values_UD / self.scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        )
        return codes_UB


def stochastic_bfloat16(values: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """float32 -> bfloat16 of the same shape: up or down at random, so that the mean is the value. The same result
    from the same `seed` and `draw`. What isn't finite stays what it is.

    Rounding to the nearest bfloat16 swallows every change below 2⁻⁹ of a value, which most updates of a trained row
    are. (Stochastic rounding for training in low precision: Gupta et al. 2015, arXiv 1502.02551.)
    """
    bits = values.contiguous().view(torch.int32)
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(draw,))))
    noise = generator.integers(0, 1 << 16, values.numel(), dtype=np.uint16)
    # The lower half of the bits is what gets lost; noise carries into the upper half as often as that is large.
    carried = bits + torch.from_numpy(noise.astype(np.int32)).view(values.shape)
    rounded = (carried & -65536).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))
