"""A Qwen4-Exp model of transformers whose n-gram tables stay on disk.

Its outputs are the same, without the table in memory:

    load_with_tables_on_disk(folder)    builds and loads the model, all but the tables
    offload_ngram_table(model, folder)  takes the tables out of a model that is there

What transformers computes is left to transformers: hashing, projections, gate and convolution are its own modules,
and so is the cache. Only `ngram_embedding`, an `nn.Embedding` of 95 GiB in the released model, is replaced by one
that looks the same rows up in the checkpoint's files (`sense_v2.engram.released.released_table`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sense_v2.engram.released.find_tables import released_config
from sense_v2.engram.released.released_table import ReleasedTable, open_released_table
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
        # In a tuple, so that the layer isn't a part of its own part. Its norms keep the model's type in a quantized
        # model, too.
        self._layer = (layer,)

    @property
    def weight(self) -> torch.Tensor:
        """No rows: a shape on the meta device, from which transformers sees that ids stay where they are."""
        return torch.empty(self.num_embeddings, self.embedding_dim, device="meta")

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            raise ValueError("this model was built without its n-gram table; call offload_ngram_table(model, folder)")
        layer: Any = self._layer[0]
        return self.table.rows_as(row_ids, layer.norm_key.weight.dtype)


def offload_ngram_table(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Replace the n-gram tables of a model, in place, by those in its checkpoint; return the model.

    The tables' memory is given back when nothing else refers to it. The rows aren't trained, and `save_pretrained`
    leaves them out: they are in `folder`.

    Raises `ValueError` if the model has no such table, or the folder's doesn't fit it; the model is then as it was.
    """
    places = list(_ngram_embeddings(model))
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no n-gram table of Qwen4-Exp. For memory on other models: attach_engram"
        )
    config = released_config(model.config.get_text_config().to_dict())
    found = []
    for layer, inner in places:
        table = open_released_table(folder, int(inner.layer_idx), variant="qwen_ple", config=config)
        old = inner.ngram_embedding
        if (old.num_embeddings, old.embedding_dim) != (table.num_embeddings, table.embedding_dim):
            raise ValueError(
                f"{table.path}, layer {inner.layer_idx}: {table.num_embeddings} rows of {table.embedding_dim}, but "
                f"the model has {old.num_embeddings} of {old.embedding_dim}. Name the model's own checkpoint"
            )
        found.append((layer, inner, table))
    for layer, inner, table in found:
        inner.ngram_embedding = EmbeddingOnDisk(table.num_embeddings, table.embedding_dim, layer, table)
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
