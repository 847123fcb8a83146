"""`model.engram`: the layers that memory is added by, the table they read and the map they hash through.

L layers with memory, B batch, T sequence, P positions of history, H rows a position.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sense_v2.core.config import EngramConfig
from sense_v2.engram import operators
from sense_v2.engram.model import EngramFusionLayer, open_table
from sense_v2.engram.sharding import ShardedTable
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.tokenizer import EngramTokenizer


class EngramMemory(nn.Module):
    """What `attach_engram` adds to a model: `layers` (by layer number), and the table and map they share."""

    def __init__(
        self,
        config: EngramConfig,
        hidden_size: int,
        tokenizer: EngramTokenizer,
        pad_token_id: int | None,
        mode: str = "r+",
        storage: ShardedTable | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        # Both have what a model needs; their common type would be a list of that.
        self.storage: Any = open_table(config, tokenizer, mode=mode) if storage is None else storage
        self.layers = nn.ModuleDict(
            {
                str(layer_id): EngramFusionLayer(
                    config,
                    hidden_size,
                    layer_id,
                    tokenizer=tokenizer,
                    storage=self.storage,
                    pad_token_id=pad_token_id,
                )
                for layer_id in config.layer_indices
            }
        )
        self.id = uuid.uuid4().hex
        """Says in a cache whose tokens it holds; a copy of the memory has the same."""
        self._undo: list[Any] = []
        self._handle = operators.handle_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = operators.handle_of(self)

    @property
    def reach(self) -> int:
        """How many positions back the memory of a position depends on."""
        return max(fusion.reach for fusion in self)

    @property
    def row_ids_per_position(self) -> tuple[int, int]:
        """(L, H)."""
        return len(self.layers), self.config.num_heads * len(self.config.ngram_orders)

    def row_ids(
        self,
        token_ids_BT: torch.Tensor,
        history_BP: torch.Tensor | None,
        valid_BT: torch.Tensor | None,
        documents_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compressed ids [B, T] and every layer's row ids [L, B, T, H]. `history_BP` are compressed ids, `NO_TOKEN`
        where no n-gram may reach. Raises `IndexError` for an id that no token has."""
        if torch.compiler.is_compiling():
            return operators.hash_tokens(token_ids_BT, history_BP, valid_BT, documents_BT, self._handle)
        return self.hash_tokens(token_ids_BT, history_BP, valid_BT, documents_BT)

    def hash_tokens(
        self,
        token_ids_BT: torch.Tensor,
        history_BP: torch.Tensor | None,
        valid_BT: torch.Tensor | None,
        documents_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `row_ids` does, as it is without a compiler."""
        compressed_BT = self.tokenizer(token_ids_BT)
        masks = {"attention_mask": valid_BT, "sequence_ids": documents_BT, "history": history_BP}
        return compressed_BT, torch.stack([fusion.hasher(compressed_BT, **masks) for fusion in self])

    @property
    def own_storage(self) -> MMapEmbeddingStorage:
        """The file that this process stores to: the whole table, or a rank's shard of it."""
        storage: MMapEmbeddingStorage = self.storage.own if isinstance(self.storage, ShardedTable) else self.storage
        return storage

    @property
    def whole_table(self) -> MMapEmbeddingStorage:
        """The file that has all rows. Raises `ValueError` where no file has: a table in shards."""
        if isinstance(self.storage, ShardedTable) and self.storage.layout == "shards":
            raise ValueError(
                f"{self.storage.path} lies in shards, so there is no file to copy: copy_table(table, path) of "
                "sense_v2.engram.range_copy makes one, on all ranks"
            )
        return self.own_storage

    def begin_rows(self, row_ids_LBTH: torch.Tensor, valid_BT: torch.Tensor | None) -> None:
        """A forward needs these rows, but for those of masked positions: they begin to come."""
        if not isinstance(self.storage, ShardedTable):
            self.prefetch_rows(row_ids_LBTH)
        elif not torch.compiler.is_compiling():
            self.storage.begin(row_ids_LBTH if valid_BT is None else row_ids_LBTH[:, valid_BT])

    def prefetch(self, token_ids_BT: torch.Tensor) -> None:
        """Begins to read the rows of these token ids [B, T], the first layer's first, and returns at once. Does
        nothing where rows were in memory lately."""
        if self.storage.reads_the_disk:
            self.prefetch_rows(self.hash_tokens(token_ids_BT, None, None, None)[1])

    def prefetch_rows(self, row_ids_LBTH: torch.Tensor) -> None:
        """As `prefetch`, of rows that are known already."""
        if not torch.compiler.is_compiling() and self.storage.reads_the_disk:
            for row_ids_BTH in row_ids_LBTH:
                self.storage.prefetch(row_ids_BTH)

    def __iter__(self) -> Iterator[EngramFusionLayer]:
        return iter(self.layers.values())  # type: ignore[arg-type]  # a ModuleDict doesn't know its modules' type


def memory_of(model: nn.Module) -> EngramMemory:
    """`model.engram`, typed. Raises `ValueError` where nothing is attached."""
    memory = attached_memory(model)
    if memory is None:
        raise ValueError("this model has no memory attached; attach_engram(model, config) does it")
    return memory


def attached_memory(model: nn.Module) -> EngramMemory | None:
    """`model.engram`, or None where nothing is attached."""
    memory = getattr(model, "engram", None)
    return memory if isinstance(memory, EngramMemory) else None
