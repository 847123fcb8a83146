"""`model.engram`: the layers that memory is added by, the table they read and the map they hash through.

L layers with memory, B batch, T sequence, P positions of history, H rows a position.
"""

from __future__ import annotations

import copy
import hashlib
import json
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram import operators
from sense_v2.engram.delta.chosen_rows import ChosenRows, plain
from sense_v2.engram.delta.joined_tables import JoinedTables
from sense_v2.engram.hashing import hash_tokens
from sense_v2.engram.model import EngramFusionLayer, open_table
from sense_v2.engram.row_source import RowSource, TrainableRows
from sense_v2.engram.tokenizer import EngramTokenizer

_living: weakref.WeakSet[EngramMemory] = weakref.WeakSet()


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
            table: RowSource = open_table(config, tokenizer, mode=mode, hold=mode == "r")
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
        self.reference: Any = None
        """A `MemoryOfReference`, while TRL trains an adapter against the model without it."""
        self.overlay_numbers: dict[str, int] = {}
        """Overlays that sequences may choose (`load_overlay`), and how row ids name them."""
        self.chosen_rows = ChosenRows()
        """Their rows."""
        self.last_overlay = 0
        """The largest number so far; none is given twice, as caches remember them."""
        self.undo: list[Any] = []
        self.handle = operators.handle_of(self, self._hashes)
        _living.add(self)
        self.register_state_dict_post_hook(_leave_out_none)
        self.register_load_state_dict_post_hook(_not_missing)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = operators.handle_of(self, self._hashes)
        _living.add(self)

    @property
    def _hashes(self) -> str:
        """Identifies what token ids are hashed by."""
        hashers = [
            (f.layer_id, f.hasher.multipliers.tolist(), f.hasher.layout.to_dict(), f.hasher.pad_id) for f in self
        ]
        return hashlib.sha256(f"{self.tokenizer.sha256} {hashers}".encode()).hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> EngramMemory:
        owners = [change.owner for change in self.undo if hasattr(change, "owner")]
        owners += [owner.base_model for owner in owners]
        if owners and not any(id(owner) in memo for owner in owners):
            raise with_way_out(
                ValueError(
                    "a memory is copied with its model, copy.deepcopy(model): alone, or with a layer, nothing would "
                    "call it"
                ),
                "PEFT: leave modules_to_save=['engram'] out, as the memory is trained beside an adapter and "
                "saved with it; use layer_replication before attach_engram",
            )
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def refuse_adapters(self) -> None:
        """Raises `ValueError` if an adapter lies on a weight of the memory."""
        adapted = [name for name, module in self.layers.named_modules() if hasattr(module, "base_layer")]
        if adapted:
            raise with_way_out(
                ValueError(
                    f"the PEFT adapter reaches into the memory (engram.layers.{adapted[0]}), whose weights are "
                    "trained themselves"
                ),
                "keep it to the backbone, LoraConfig(..., exclude_modules=r'(.*\\.)?engram\\..*')",
            )

    # What a state dict says of the rows, which it doesn't hold

    def get_extra_state(self) -> torch.Tensor | None:
        """A checksum of the table's rows, and the step of its last commit, as JSON. It is the same for the same rows,
        however many commits they took. None if nothing names them."""
        digests = [storage.rows_digest() for storage in self.storages]
        if None in digests:
            return None
        rows = {"step": self.storages[0].committed_step, "rows": digests}
        return torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Raises `ValueError` if the weights that come with it belong to other rows than the table's."""
        recorded = json.loads(bytes(state.cpu().tolist()))
        if recorded["rows"] != [storage.rows_digest() for storage in self.storages]:
            storage = self.storages[0]
            raise with_way_out(
                ValueError(
                    f"these weights were kept beside other rows than the table at {storage.path} has now (after "
                    f"step {recorded['step']}; the table is at step {storage.committed_step}). A state dict holds "
                    "no rows"
                ),
                "Keep a moment by save_pretrained(model, FOLDER) or copy.deepcopy(model); to load the weights "
                "all the same, remove engram._extra_state from them",
            )

    def use_storage(self, storage: RowSource) -> None:
        """Looks up, and trains, through another storage of the same rows from here on."""
        self.storage = storage
        for fusion in self:
            fusion.use_storage(storage)

    def join_tables(self) -> RowSource:
        """Look up all tables as one from here on: that of a memory of one is what it was. Raises `ValueError` for
        tables that can't be one."""
        if len(self.storages) > 1:
            joined = JoinedTables(self.storages)
            for fusion in self:
                fusion.hasher.first_row = joined.first_row(fusion.storage)
            self.use_storage(joined)
        storage: RowSource = self.storage
        return storage

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
    def is_heard(self) -> bool:
        """False if nothing that rows hold reaches the model."""
        return any(bool(fusion.W_v.weight.any()) for fusion in self)

    @property
    def head_orders(self) -> list[tuple[int, list[int]]]:
        """Each layer's number, and the length of the n-grams of each of its heads."""
        layouts = [(fusion.layer_id, fusion.hasher.layout) for fusion in self]
        return [(layer, [n for n in one.ngram_orders for _ in range(one.num_heads)]) for layer, one in layouts]

    @property
    def device(self) -> torch.device:
        """Where token ids are hashed."""
        return next(self.parameters()).device

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
            table.begin(plain(row_ids_LBTH if valid_BT is None else row_ids_LBTH[:, valid_BT]))

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
                storage.prefetch(plain(row_ids_BTH))

    def __iter__(self) -> Iterator[EngramFusionLayer]:
        return iter(self.layers.values())  # type: ignore[arg-type]  # a ModuleDict doesn't know its modules' type


class MemoryOfSeveralTables(EngramMemory):
    """Where layers have tables of their own: `storages` has them, and there is no `storage` until they are joined."""

    def __getattr__(self, name: str) -> Any:
        if name == "storage" and name not in self._modules:  # they aren't joined
            raise AttributeError(
                f"this memory has a table for each of its layers, {', '.join(self.layers)}: "
                "model.engram.layers[…].storage is one of them, model.engram.storages all. What saves or trains rows "
                "takes a memory of one table"
            )
        return super().__getattr__(name)


def _leave_out_none(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if state.get(f"{prefix}_extra_state", 0) is None:
        del state[f"{prefix}_extra_state"]


def _not_missing(module: nn.Module, incompatible: Any) -> None:
    """Weights without it are a checkpoint's, or an earlier version's."""
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name != "_extra_state" and not name.endswith("engram._extra_state")]


def living_memories() -> list[EngramMemory]:
    """Every memory of this process: of models, their copies and references."""
    return list(_living)


def refuse_other_rows(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a model's weights are loaded: afterwards, half of them would be others."""
    rows, memory = state.get(f"{prefix}engram._extra_state"), attached_memory(model)
    if rows is not None and memory is not None:
        memory.set_extra_state(rows)


def memory_of(model: nn.Module) -> EngramMemory:
    """`model.engram`, typed. Raises `ValueError` where nothing is attached."""
    memory = attached_memory(model)
    if memory is None:
        raise with_way_out(ValueError("this model has no memory attached"), "attach_engram(model, config) does it")
    return memory


def attached_memory(model: nn.Module) -> EngramMemory | None:
    """`model.engram`, or None where nothing is attached."""
    memory = getattr(model, "engram", None)
    return memory if isinstance(memory, EngramMemory) else None


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Count the values that training would change.

    Returns:
        "backbone": weights that ask for a gradient, an adapter's among them. "fusion": those of the fusion layers.
        "rows": values of the table's rows on disk, which `model.parameters()` doesn't have.
    """
    memory = attached_memory(model)
    fusion = set() if memory is None else set(memory.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = [
        table for table in (memory.storages if memory else []) if table.rows_require_grad and table.mode == "r+"
    ]
    return {
        "backbone": sum(parameter.numel() for parameter in trained if parameter not in fusion),
        "fusion": sum(parameter.numel() for parameter in trained if parameter in fusion),
        "rows": sum(table.num_embeddings * table.embedding_dim for table in tables),
    }
