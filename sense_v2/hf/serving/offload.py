"""A Qwen4-Exp model of transformers whose n-gram tables stay on disk.

Its outputs are the same, without the table in memory:

    load_with_tables_on_disk(folder)    builds and loads the model, all but the tables
    offload_ngram_table(model, folder)  takes the tables out of a model that is there

Rows are changed on top of the tables, as in any model with memory: `sense_v2.hf.overlays.add_overlay`, and `teach`.

What transformers computes is left to transformers: hashing, projections, gate and convolution are its own modules,
and so is the cache. Only `ngram_embedding`, an `nn.Embedding` of 95 GiB in the released model, is replaced by one
that looks the same rows up in the checkpoint's files (`sense_v2.engram.released.released_table`).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.engram.delta.joined_tables import JoinedTables
from sense_v2.engram.released.find_tables import released_config
from sense_v2.engram.released.released_table import ReleasedTable, open_released_table
from sense_v2.engram.row_source import RowSource
from sense_v2.hf.saving.folder import MEMORY_FOLDER
from sense_v2.hf.saving.weights import load_weights


class EmbeddingOnDisk(nn.Module):
    """Takes the place of `ngram_embedding`: row ids -> rows, in the type that the layer computes in.

    With `table` None the place is still empty, and calling it raises `ValueError`.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, layer: nn.Module, table: ReleasedTable | None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.table = table
        self.first_row = 0
        """Where the table begins among several that are joined."""
        self.overlay: RowSource | None = None
        """Changed rows on top of the table, if there are any."""
        # In a tuple, so that the layer isn't a part of its own part. Its norms keep the model's type in a quantized
        # model, too.
        self._layer = (layer,)

    @property
    def layer(self) -> Any:
        """The layer that it is a part of."""
        return self._layer[0]

    @property
    def weight(self) -> torch.Tensor:
        """No rows: a shape on the meta device, from which transformers sees that ids stay where they are."""
        return torch.empty(self.num_embeddings, self.embedding_dim, device="meta")

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            raise with_way_out(
                ValueError("this model was built without its n-gram table"), "call offload_ngram_table(model, folder)"
            )
        dtype: torch.dtype = self.layer.norm_key.weight.dtype
        if self.overlay is None:
            return self.table.rows_as(row_ids, dtype)
        joined_ids = row_ids + self.first_row
        if self.overlay.training and torch.is_grad_enabled():
            return self.overlay(joined_ids).to(dtype)
        rows = self.table.rows_as(row_ids, dtype)
        is_changed = torch.isin(joined_ids.cpu(), self.overlay.changed_ids).to(row_ids.device)
        rows[is_changed] = self.overlay(joined_ids[is_changed]).to(dtype)
        return rows


class OffloadedTables:
    """The tables of a model that stay on disk, as overlays and teaching see them; `model.ngram_tables`.

    L layers with a table, B batch, T sequence, H rows a position.
    """

    def __init__(self, places: list[tuple[Any, EmbeddingOnDisk]]) -> None:
        self._places = places
        """(What calls it with row ids, the embedding), for each layer."""
        self.storage: RowSource | None = None
        """What stands for all of them, once they are joined."""

    @property
    def storages(self) -> list[Any]:
        """The tables, or what stands for all of them."""
        return [embedding.table for _, embedding in self._places] if self.storage is None else [self.storage]

    @property
    def training(self) -> bool:
        """True if the model trains."""
        return any(embedding.training for _, embedding in self._places)

    @property
    def is_heard(self) -> bool:
        """False if nothing that rows hold reaches the model."""
        layers = [embedding.layer for _, embedding in self._places]
        return any(bool(layer.value_proj.weight.any()) for layer in layers)

    @property
    def head_orders(self) -> list[tuple[int, list[int]]]:
        """See `EngramMemory.head_orders`."""
        return [
            (inner.layer_idx, [n for n in range(2, inner.ngram_size + 1) for _ in range(inner.heads_per_ngram)])
            for inner, _ in self._places
        ]

    @property
    def device(self) -> torch.device:
        """Where token ids are hashed."""
        device: torch.device = self._places[0][0].layer_multipliers.device
        return device

    def join_tables(self) -> RowSource:
        """See `EngramMemory.join_tables`."""
        if self.storage is None:
            joined = JoinedTables(self.storages)
            for _, embedding in self._places:
                assert embedding.table is not None
                embedding.first_row = joined.first_row(embedding.table)
            self.storage = joined
        return self.storage

    def use_storage(self, storage: RowSource) -> None:
        """Look up, and train, through another storage of the same rows from here on."""
        self.storage = storage
        for _, embedding in self._places:
            embedding.overlay = None if storage is storage.table else storage

    @torch.no_grad()
    def hash_tokens(self, token_ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the row ids [L, B, T, H] of token ids, as transformers hashes them; the ids come first."""
        found: list[torch.Tensor] = []
        for hashes, embedding in self._places:
            hook = embedding.register_forward_pre_hook(lambda module, args: found.append(args[0] + module.first_row))
            try:
                hashes(token_ids_BT, None)
            finally:
                hook.remove()
        return token_ids_BT, torch.stack(found)


def offload_ngram_table(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Replace the n-gram tables of a model, in place, by those in its checkpoint; return the model.

    The tables' memory is given back when nothing else refers to it. The rows aren't trained, and `save_pretrained`
    leaves them out: they are in `folder`.

    Raises `ValueError` if the model has no such table, or the folder's doesn't fit it; the model is then as it was.
    """
    places = list(_ngram_embeddings(model))
    if not places:
        raise with_way_out(
            ValueError(f"{type(model).__name__} has no n-gram table of Qwen4-Exp"),
            "For memory on other models: attach_engram",
        )
    config = released_config(model.config.get_text_config().to_dict())
    found = []
    for layer, inner in places:
        table = open_released_table(folder, int(inner.layer_idx), variant="qwen_ple", config=config)
        old = inner.ngram_embedding
        if (old.num_embeddings, old.embedding_dim) != (table.num_embeddings, table.embedding_dim):
            raise with_way_out(
                ValueError(
                    f"{table.path}, layer {inner.layer_idx}: {table.num_embeddings} rows of {table.embedding_dim}, "
                    f"but the model has {old.num_embeddings} of {old.embedding_dim}"
                ),
                "Name the model's own checkpoint",
            )
        found.append((layer, inner, table))
    for layer, inner, table in found:
        inner.ngram_embedding = EmbeddingOnDisk(table.num_embeddings, table.embedding_dim, layer, table)
    model.ngram_tables = OffloadedTables([(inner, inner.ngram_embedding) for _, inner, _ in found])  # type: ignore[assignment]  # no parameter
    return model


def load_with_tables_on_disk(
    folder: str | os.PathLike[str], *, model_class: type[PreTrainedModel] | None = None, **options: Any
) -> PreTrainedModel:
    """Load a Qwen4-Exp model without ever having an n-gram table in memory.

    Args:
        folder: The checkpoint.
        model_class: By default what `AutoModelForCausalLM` takes.
        **options: Those of the class's own `from_pretrained` (`dtype`, `device_map`, …).

    Raises:
        ValueError: As `offload_ngram_table`.
    """
    config = AutoConfig.from_pretrained(folder)
    with _tables_left_out():
        if model_class is None:
            with torch.device("meta"):
                model_class = type(AutoModelForCausalLM.from_config(config))
        model, _ = load_weights(model_class, folder, config, lambda name: "ngram_embedding." not in name, **options)
    return offload_ngram_table(model, folder)


def has_ngram_tables(folder: str | os.PathLike[str]) -> bool:
    """True for the folder of a Qwen4-Exp model with tables and without a memory of ours."""
    config = Path(folder) / "config.json"
    if (Path(folder) / MEMORY_FOLDER).is_dir() or not config.is_file():
        return False
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        return bool((settings.get("text_config") or settings).get("ple_layer_ids"))
    except (ValueError, AttributeError):  # whatever opens the folder says what is wrong
        return False


@contextlib.contextmanager
def _tables_left_out() -> Iterator[None]:
    """Give modules that are built an empty place for `ngram_embedding`, so that no table is allocated."""

    thread = threading.get_ident()

    # The module to register instead, or None. (torch's annotation of such hooks forgets the former: Any.)
    def replaced(module: nn.Module, name: str, child: nn.Module | None) -> Any:
        if name != "ngram_embedding" or isinstance(child, EmbeddingOnDisk) or threading.get_ident() != thread:
            return None
        assert isinstance(child, nn.Embedding)
        return EmbeddingOnDisk(child.num_embeddings, child.embedding_dim, module, None)

    hook = register_module_module_registration_hook(replaced)
    try:
        yield
    finally:
        hook.remove()


def _ngram_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield (layer, the module in it that has `ngram_embedding`) for each table."""
    for layer in model.modules():
        inner = getattr(layer, "ple_embedding", None)
        if isinstance(inner, nn.Module) and hasattr(inner, "ngram_embedding") and hasattr(layer, "norm_key"):
            yield layer, inner
