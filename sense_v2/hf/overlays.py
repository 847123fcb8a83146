"""An overlay on the table of a model with memory: rows change in a small file, and the table doesn't.

    add_overlay(model, "facts.safetensors")   from here on the model looks up, and trains, through the overlay
    remove_overlay(model)                     and without it again, bit for bit

(`sense_v2.engram.delta.overlay` is the storage.) Backbone and fusion layers stay as they are; whether they are
trained meanwhile is for who trains to say. A delta holds rows alone, and means what it meant behind the same weights.
"""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.hf.memory import memory_of


def overlay_of(model: PreTrainedModel) -> OverlayStorage | None:
    """The overlay that the model looks up through, if any. Raises `ValueError` where its layers have tables of their
    own."""
    memory = memory_of(model)
    if len(memory.storages) > 1:
        raise ValueError(
            "this memory has a table for each of its layers, and an overlay lies on one table. Attach it with them: "
            "attach_engram(model, config, tokenizer, storage={layer: OverlayStorage(table, path), …})"
        )
    (storage,) = memory.storages
    return None if storage is storage.table else storage


def add_overlay(
    model: PreTrainedModel, path: str | os.PathLike[str] | None = None, *, mode: str = "r+"
) -> OverlayStorage:
    """Puts an overlay, the delta at `path` or one in memory alone, between the model and its table.

    The table must have been opened with mode "r" (`from_pretrained` does that by itself). Raises `ValueError` where
    it wasn't, where there is an overlay already, and what `OverlayStorage` raises.
    """
    memory, there = memory_of(model), overlay_of(model)
    if there is not None:
        raise ValueError(
            f"this model has an overlay already ({there.path or 'in memory'}). Deltas of one table can be "
            "made one: sense-engram delta merge; or remove_overlay(model) first"
        )
    overlay = OverlayStorage(memory.storage, path, mode=mode)
    memory.use_storage(overlay.train(memory.training))
    return overlay


def remove_overlay(model: PreTrainedModel) -> None:
    """The model looks up its table alone again. What the overlay hadn't committed is lost; its file stays.

    Raises `ValueError` where there is none.
    """
    overlay = overlay_of(model)
    if overlay is None:
        raise ValueError("this model has no overlay. add_overlay(model) puts one on")
    memory_of(model).use_storage(overlay.release())
