"""What a memory is looked up in: `RowSource`, the interface that every table has, whatever its files are.

U unique row ids of a call, D row width, N rows of the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from sense_v2.engram.table.format import Manifest


class RowSource(Protocol):
    """A table of `num_embeddings` rows [N, D] that is looked up by row id."""

    num_embeddings: int
    embedding_dim: int
    mode: str
    rows_require_grad: bool

    @property
    def path(self) -> Path | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def is_new(self) -> bool: ...

    @property
    def reads_the_disk(self) -> bool: ...

    def __call__(self, row_ids: torch.Tensor) -> torch.Tensor: ...

    def prefetch(self, row_ids: torch.Tensor) -> None: ...
