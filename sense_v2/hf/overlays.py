"""Overlays on the table of a model with memory: small files change, the table never.

    add_overlay(model, "facts.safetensors")     from here on the model looks up, and trains, through the overlay
    remove_overlay(model)                       and without it again, bit for bit
    add_overlay(model, ["facts.safetensors", "corrections.safetensors"])    the second on top of the first

    load_overlay(model, "a", "facts.safetensors")   one of several, for the sequences that choose it
    model(token_ids, overlay=["a", None, "b"])      each sequence through its own; None: through none of these
    unload_overlay(model, "a")

(`sense_v2.engram.delta.overlay` is the storage of the first, `chosen_rows` there of the second.) Backbone and fusion
layers stay as they are; whether they are trained meanwhile is for who trains to say. A delta holds rows alone, and
means what it meant behind the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.overlay import OverlayStorage, refuse_other_base
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.serving.offload import OffloadedTables


def tables_of(model: PreTrainedModel) -> EngramMemory | OffloadedTables:
    """The memory of a model, or what stands for the tables of a Qwen4-Exp that stay on disk. Raises `ValueError`
    where there is neither."""
    offloaded: Any = getattr(model, "ngram_tables", None)
    return memory_of(model) if offloaded is None or attached_memory(model) is not None else offloaded


def overlay_of(model: PreTrainedModel) -> OverlayStorage | None:
    """The overlay that the model looks up through, if any."""
    storages = tables_of(model).storages
    return storages[0] if len(storages) == 1 and storages[0] is not storages[0].table else None


def add_overlay(
    model: PreTrainedModel,
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    mode: str = "r+",
) -> OverlayStorage:
    """Puts an overlay, the delta at `path` or one in memory alone, between the model and its table.

    Of several paths each lies on top of the one before; all but the last are only read, and `remove_overlay` takes
    the last away.

    The table must have been opened with mode "r" (`from_pretrained` does that by itself). Where layers have tables of
    their own, the overlay lies on all of them, joined to one (`sense_v2.engram.delta.joined_tables`); they stay
    joined. Raises `ValueError` where a table can be written to, where there is an overlay already, and what
    `OverlayStorage` raises.
    """
    tables, there = tables_of(model), overlay_of(model)
    if there is not None:
        raise with_way_out(
            ValueError(f"this model has an overlay already ({there.path or 'in memory'})"),
            "Deltas of one table can be made one: sense-engram delta merge; or remove_overlay(model) first",
        )
    paths: list[Any] = [path] if path is None or isinstance(path, (str, os.PathLike)) else list(path)
    *below, top = paths or [None]
    storage = tables.join_tables()
    for one in below:
        storage = OverlayStorage(storage, one, mode="r")
    overlay = OverlayStorage(storage, top, mode=mode)
    tables.use_storage(overlay.train(tables.training))
    return overlay


def remove_overlay(model: PreTrainedModel) -> None:
    """The model looks up its table, or the overlay below, alone again. What the overlay hadn't committed is lost; its
    file stays.

    Raises `ValueError` where there is none.
    """
    overlay = overlay_of(model)
    if overlay is None:
        raise with_way_out(ValueError("this model has no overlay"), "add_overlay(model) puts one on")
    tables_of(model).use_storage(overlay.release())


def load_overlay(model: PreTrainedModel, name: str, path: str | os.PathLike[str]) -> None:
    """Read a delta into memory, for the sequences of a batch that choose it.

    Until a call chooses it (`overlay=`), nothing changes. It lies on top of what the model looks up otherwise. What
    becomes of the file later is no matter.

    Args:
        model: With memory attached.
        name: What calls name it by.
        path: The delta, made on the model's table.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or made on another table; or there is an overlay of that name.
    """
    memory = memory_of(model)
    if name in memory.overlay_numbers:
        raise with_way_out(
            ValueError(f"an overlay {name!r} is loaded already"), f"unload_overlay(model, {name!r}) first"
        )
    delta, storage = read_delta(path), memory.join_tables()
    refuse_other_base(delta, storage.table, storage.identity())
    number = memory.last_overlay + 1
    memory.chosen_rows.add(number, delta)
    for fusion in memory:
        fusion.overlays = memory.chosen_rows
    memory.overlay_numbers[name] = memory.last_overlay = number


def unload_overlay(model: PreTrainedModel, name: str) -> None:
    """Let go of an overlay; caches that were begun with it are refused. Raises `ValueError` where there is none."""
    memory = memory_of(model)
    memory.chosen_rows.remove(_number(memory, name))
    del memory.overlay_numbers[name]


def ids_with_overlay(model: PreTrainedModel, token_ids: Iterable[int], overlay: str | None) -> list[int]:
    """Make the prompt of a request say its overlay, for `add_request` of a manager of continuous batching.

    The overlay's number stands above all token ids, so an engine that shares what requests have in common shares
    nothing between overlays. Raises `ValueError` where there is no such overlay.
    """
    memory, num_embeddings = memory_of(model), len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    number = 0 if overlay is None else _number(memory, overlay)
    if (number + 1) * num_embeddings > 2**31:  # engines keep token ids as int32
        raise with_way_out(
            ValueError(f"{number} overlays were loaded, more than a prompt can name"), "load the model again"
        )
    return [int(token_id) + number * num_embeddings for token_id in token_ids]


def chosen_numbers(memory: EngramMemory, overlay: Any, token_ids_BT: torch.Tensor) -> torch.Tensor:
    """Find the numbers [B] of what a call names. Raises `ValueError` for what it can't name."""
    batch, device = token_ids_BT.shape[0], token_ids_BT.device
    numbers = torch.as_tensor(overlay_numbers(memory, overlay), device=device)
    if numbers.dim() == 1 and len(numbers) != batch:
        raise ValueError(f"overlay names {len(numbers)} overlays for {batch} sequences; expected one for each")
    return numbers.expand(batch)


def overlay_numbers(memory: EngramMemory, overlay: Any) -> Any:
    """Find the number of a name, or those of a list of names and None; numbers in a tensor are known already."""
    if isinstance(overlay, torch.Tensor):
        return overlay
    if isinstance(overlay, str):
        return _number(memory, overlay)
    if not (isinstance(overlay, Sequence) and all(one is None or isinstance(one, str) for one in overlay)):
        raise ValueError(f"overlay is a name, or a list of names and None, one for each sequence; not {overlay!r}")
    return [0 if one is None else _number(memory, one) for one in overlay]


def overlay_names(memory: EngramMemory, numbers_B: torch.Tensor) -> str:
    """Name overlays for a message. Raises `ValueError` where one isn't loaded any more."""
    names = {0: "none", **{number: name for name, number in memory.overlay_numbers.items()}}
    numbers = numbers_B.tolist()
    if not names.keys() >= set(numbers):
        raise with_way_out(
            ValueError("the cache holds a sequence of an overlay that was unloaded"),
            "load it again and start with a new cache",
        )
    return ", ".join(names[number] for number in numbers)


def _number(memory: EngramMemory, name: str) -> int:
    if name not in memory.overlay_numbers:
        loaded = ", ".join(memory.overlay_numbers) or "none"
        raise with_way_out(
            ValueError(f"no overlay {name!r} is loaded (loaded: {loaded})"),
            f"load_overlay(model, {name!r}, FILE) does it",
        )
    return memory.overlay_numbers[name]
