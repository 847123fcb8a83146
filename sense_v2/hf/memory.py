"""`model.engram`: the layers that memory is added by, the table they read and the map they hash through.

L layers with memory, B batch, T sequence, P positions of history, H rows a position.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sense_v2.core.config import EngramConfig
from sense_v2.engram import operators
from sense_v2.engram.hashing import hash_tokens
from sense_v2.engram.model import EngramFusionLayer, open_table
from sense_v2.engram.row_source import RowSource, TrainableRows
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
        given: Mapping[int, tuple[int, RowSource]] | None = None,
    ) -> None:
        """`given`: by layer of the model, the layer of `config` whose rows it reads, and the table that has them;
        without it `config`'s table is opened."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.owns_tables = given is None
        if given is None:
            table: RowSource = open_table(config, tokenizer, mode=mode)
            given = {layer_id: (layer_id, table) for layer_id in config.layer_indices}
        if len({id(table) for _, table in given.values()}) == 1:
            self.storage: Any = next(iter(given.values()))[1]
        self.layers = nn.ModuleDict(
            {
                str(place): EngramFusionLayer(
                    config,
                    hidden_size,
                    layer_id,
                    tokenizer=tokenizer,
                    storage=table,
                    pad_token_id=pad_token_id,
                    place=place,
                )
                for place, (layer_id, table) in sorted(given.items())
            }
        )
        commits = [table.manifest.commit for table in self.storages]
        self.id = uuid.uuid4().hex if None in commits else f"{self._hashes} {commits}"
        """Says in a cache whose tokens it holds: those of tables as they were opened. A copy of the memory has the
        same; so has one in another process, if the tables have commits."""
        self.checkpoint: Path | None = None
        """The folder of a Trainer's checkpoint that is about to be saved, to which its callback adds the memory."""
        self.undo: list[Any] = []
        self.handle = operators.handle_of(self, self._hashes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = operators.handle_of(self, self._hashes)

    @property
    def _hashes(self) -> str:
        """Identifies what token ids are hashed by."""
        hashers = [
            (f.layer_id, f.hasher.multipliers.tolist(), f.hasher.layout.to_dict(), f.hasher.pad_id) for f in self
        ]
        return hashlib.sha256(f"{self.tokenizer.sha256} {hashers}".encode()).hexdigest()

    def use_storage(self, storage: RowSource) -> None:
        """Looks up, and trains, through another storage of the same rows from here on."""
        self.storage = storage
        for fusion in self:
            fusion.use_storage(storage)

    @property
    def table(self) -> Any:
        """The table itself: the storage, or what its overlay lies on."""
        return self.storage.table

    @property
    def storages(self) -> list[Any]:
        """The tables, each once."""
        one = getattr(self, "storage", None)
        if one is not None:
            return [one]
        return list({id(fusion.storage): fusion.storage for fusion in self}.values())

    @property
    def is_released(self) -> bool:
        """True if a table is a released checkpoint's, by itself or under an overlay: nobody's to copy."""
        return any(storage.is_released for storage in self.storages)

    @property
    def reach(self) -> int:
        """How many positions back the memory of a position depends on."""
        return max(fusion.reach for fusion in self)

    def hash_tokens(
        self, token_ids_BT: torch.Tensor, *masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute compressed ids [B, T] and every layer's row ids [L, B, T, H]; as `hashing.hash_tokens`."""
        return hash_tokens(self.tokenizer, [fusion.hasher for fusion in self], token_ids_BT, *masks)

    @property
    def whole_table(self) -> TrainableRows:
        """The file that has all rows. Raises `ValueError` if no file has: a table in shards."""
        table: TrainableRows = self.storage.whole_table
        return table

    def begin_rows(self, row_ids_LBTH: torch.Tensor, valid_BT: torch.Tensor | None) -> None:
        """A forward needs these rows, but for those of masked positions: they begin to come."""
        table = self.storages[0]
        if not table.needs_all_ranks:
            self.prefetch_rows(row_ids_LBTH)
        elif not torch.compiler.is_compiling():
            table.begin(row_ids_LBTH if valid_BT is None else row_ids_LBTH[:, valid_BT])

    def prefetch(self, token_ids_BT: torch.Tensor) -> None:
        """Begins to read the rows of these token ids [B, T], the first layer's first, and returns at once. Does
        nothing where rows were in memory lately."""
        if any(storage.reads_the_disk for storage in self.storages):
            self.prefetch_rows(self.hash_tokens(token_ids_BT)[1])

    def prefetch_rows(self, row_ids_LBTH: torch.Tensor) -> None:
        """As `prefetch`, of rows that are known already."""
        if torch.compiler.is_compiling():
            return
        one = getattr(self, "storage", None)
        for fusion, row_ids_BTH in zip(self, row_ids_LBTH, strict=True):
            storage = fusion.storage if one is None else one
            if storage.reads_the_disk:
                storage.prefetch(row_ids_BTH)

    def __iter__(self) -> Iterator[EngramFusionLayer]:
        return iter(self.layers.values())  # type: ignore[arg-type]  # a ModuleDict doesn't know its modules' type


class MemoryOfSeveralTables(EngramMemory):
    """Where layers have tables of their own: `storages` has them, and there is no `storage`."""

    def __getattr__(self, name: str) -> Any:
        if name == "storage":
            raise AttributeError(
                f"this memory has a table for each of its layers, {', '.join(self.layers)}: "
                "model.engram.layers[…].storage is one of them, model.engram.storages all. What saves or trains rows "
                "takes a memory of one table"
            )
        return super().__getattr__(name)


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
