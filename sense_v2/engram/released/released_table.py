"""`ReleasedTable`: rows of a released checkpoint, looked up where they are.

    deepseek_v41   layers.{i}.engram.embed.weight  F8_E4M3 [N, D], .scale  F8_E8M0 [N, D/32]: looked up as bfloat16
    qwen_ple       layers.{i}.ple.ple_embedding.ngram_embedding.weight  BF16 [N, D], looked up as such; or F8_E4M3,
                   with one .weight_scale [1] for the whole table, looked up in that scale's type
    longcat_flash  ngram_embeddings.embedders.{h}.weight  BF16 [N_h, D], one for each head, looked up as such
    GGUF           either one's table as llama.cpp has it (`gguf_tables.py`): F32, F16, BF16, or blocks
                   (`sense_v2.engram.reading.block_rows`), looked up as float32

A table may be cut into parts along its rows: `.shard_{k}` in a name, as transformers saves Qwen's, or one file a rank
(`model{r}-mp{n}.safetensors`). Nothing is copied, converted or written to; a lookup takes a row's bytes from the
files and decodes these (`row_parts.py`, `compact_rows.py`). `find_tables.py` has checked them before.

Rows are held against tests/golden/deepseek_v41_rows_expected.safetensors.

N rows, D row width, K scales of a row, U row ids of a call.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading import devices
from sense_v2.engram.reading.block_rows import BLOCK_FORMATS
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.reading.row_parts import MappedFiles, PartsReader, RowParts
from sense_v2.engram.released.find_tables import (
    TORCH_TYPES,
    ReleasedTensors,
    find_released_table,
    row_bytes,
    warn_unchecked,
)
from sense_v2.engram.table.compact_rows import BLOCK_VALUES, decode
from sense_v2.engram.table.format import Manifest
from sense_v2.engram.table_identity import SAMPLED_ROWS, Origin, TableIdentity
from sense_v2.engram.table_module import TableModule
from sense_v2.engram.tokenizer import EngramTokenizer

NUM_SAMPLES = 1024


class ReleasedTable(TableModule):
    """Rows of a released checkpoint; only read. Made by `open_released_table`."""

    is_released = True

    def __init__(self, tensors: ReleasedTensors, reader: PartsReader) -> None:
        super().__init__(tensors.facts.num_rows, tensors.facts.width, mode="r")
        self.path: Path = tensors.path
        self.tensors, self.facts = tensors, tensors.facts
        self.rows_require_grad = False
        self._reader = reader
        self._scale = None if tensors.scale is None else tensors.scale.clone()
        self.dtype = _looked_up_as(tensors)
        """Of the rows that are looked up."""

    @property
    def config(self) -> EngramConfig | None:
        """The memory that the rows belong to, as far as the checkpoint's config.json, or the caller who opened the
        table, says: for `attach_engram`."""
        return self.tensors.config

    @property
    def manifest(self) -> Manifest:
        """What a table of ours would say of itself."""
        known = {"variant": self.facts.variant, "layer": self.facts.layer}
        name = str(self.dtype).removeprefix("torch.")
        return Manifest(self.num_embeddings, self.embedding_dim, name, provenance=known)

    @property
    def belongs_to(self) -> Origin:
        tensors, facts = self.tensors, self.facts
        seed = None if tensors.config is None else tensors.config.seed
        size = tensors.compressed_vocab_size
        return Origin(facts.variant, facts.layer, seed, facts.layout, size, tensors.map_sha256)

    @property
    def whole_table(self) -> Any:
        raise with_way_out(
            ValueError(f"{self.path} is a released checkpoint, which is read where it is"),
            "sense-engram convert makes a table of ours from it",
        )

    def identity(self) -> TableIdentity:
        """By 1,024 of its rows: nothing lists checksums of all. That tells one checkpoint from another, and not a
        copy with a damaged row."""
        num_samples = min(NUM_SAMPLES, self.num_embeddings)
        rows_UD = self(torch.arange(num_samples) * self.num_embeddings // num_samples).contiguous()
        digest = hashlib.sha256(rows_UD.view(torch.uint8).numpy().tobytes()).hexdigest()
        rows, width, dtype = self.num_embeddings, self.embedding_dim, self.facts.dtype
        return TableIdentity(rows, width, dtype, digest, SAMPLED_ROWS, self.manifest.provenance)

    def rows_as(self, row_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `forward`, with rows of `dtype`. Of a table with one scale the product is computed in it, as it is in a
        model of transformers of that type."""
        self._refuse_unusable(row_ids)
        return self._read(row_ids.cpu(), row_ids.device, dtype)

    def prefetch(self, row_ids: torch.Tensor) -> None:
        self._reader.prefetch(self._checked_ids(row_ids))

    def stats(self) -> ReadStats:
        self._refuse_closed()
        return self._reader.stats()

    @property
    def reads_the_disk(self) -> bool:
        self._refuse_closed()
        return self._reader.reads_the_disk

    def requires_grad_(self, requires_grad: bool = True) -> ReleasedTable:
        """Released rows are never trained. Raises `ValueError` where that is asked for."""
        if requires_grad:
            raise with_way_out(ValueError(f"{self.path}: released rows are only read"), "Train a table of your own")
        return self

    def close(self) -> None:
        self._is_closed = True
        self._reader.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.facts.layer, self.facts.variant)

    def extra_repr(self) -> str:
        facts = self.facts
        return f"{self.path}, {facts.variant} layer {facts.layer}: {facts.num_rows:,} rows of {facts.width}"

    def _read(self, row_ids: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        ids_U = row_ids.reshape(-1).to(torch.int64)
        self._refuse_out_of_range(ids_U)
        rows_UD = self._decoded(self._reader.read(ids_U), dtype or self.dtype)
        return devices.move(rows_UD.view(*row_ids.shape, self.embedding_dim), device)

    def _decoded(self, parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes_UB, *scales_UK = parts
        if self.facts.dtype in BLOCK_FORMATS:
            return codes_UB.to(dtype)
        if not len(codes_UB):
            return torch.empty(0, self.embedding_dim, dtype=dtype, device="cpu")
        if scales_UK:
            rows_UD = torch.empty(len(codes_UB), self.embedding_dim, dtype=self.dtype, device="cpu")
            decode(codes_UB.view(torch.float8_e4m3fn), scales_UK[0], rows_UD)
            return rows_UD.to(dtype)
        if self._scale is not None:
            # Each code as a number of that type is exact; the product is rounded once.
            return codes_UB.view(torch.float8_e4m3fn).to(dtype).mul_(self._scale.to(dtype))
        return codes_UB.view(self.dtype).to(dtype)


def _looked_up_as(tensors: ReleasedTensors) -> torch.dtype:
    if tensors.scale is not None:
        return tensors.scale.dtype
    if tensors.facts.dtype == "F8_E4M3":
        return torch.bfloat16
    return torch.float32 if tensors.facts.dtype in BLOCK_FORMATS else TORCH_TYPES[tensors.facts.dtype]


def open_released_table(
    place: str | os.PathLike[str],
    layer: int | None = None,
    *,
    variant: str | None = None,
    config: EngramConfig | None = None,
    tokenizer: EngramTokenizer | None = None,
) -> ReleasedTable:
    """The table of decoder layer `layer`, counted from 0, of a checkpoint: its folder, index or one safetensors file;
    or of a GGUF file, of which other parts are found beside it. None: the only table that there is.

    `config` and `tokenizer` (the shadow map) are compared with what the checkpoint says of itself; where it has no
    config.json, `config` says which layout the rows must have. `variant` is needed only where a checkpoint has tables
    of two kinds.

    Raises `FileNotFoundError` or `ValueError` naming the file or the tensor, before anything is mapped. What could
    not be checked is a `UserWarning`.
    """
    tensors = find_released_table(place, layer, variant=variant, config=config, tokenizer=tokenizer)
    facts, files = tensors.facts, MappedFiles()
    warn_unchecked(tensors, stacklevel=3)
    width = facts.width
    parts = [RowParts(tensors.weights, row_bytes(facts), files, BLOCK_FORMATS.get(facts.dtype))]
    if tensors.scale is None and tensors.scales:
        parts.append(RowParts(tensors.scales, width // BLOCK_VALUES, files))
    return ReleasedTable(tensors, PartsReader(parts))


def _reopen(path: str, layer: int, variant: str) -> ReleasedTable:
    with warnings.catch_warnings():  # who opened it first has been told
        warnings.simplefilter("ignore", UserWarning)
        return open_released_table(path, layer, variant=variant)
