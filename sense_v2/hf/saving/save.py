"""A model with memory -> its folder: the backbone, and the memory beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sense_v2.core.config import SAVED_CONFIG, EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.row_source import TrainableRows
from sense_v2.engram.table.disk import WriterLock, copy_file
from sense_v2.engram.table.format import lock_name, manifest_name
from sense_v2.engram.table.opening import read_manifest
from sense_v2.engram.tokenizer import description_path
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.saving.backbone_facts import (
    BACKBONE_FILE,
    backbone_facts,
    has_weights,
    read_facts,
    tokenizer_facts,
)
from sense_v2.hf.saving.folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FUSION_FILE,
    FUSION_PREFIX,
    MAP_FILE,
    MEMORY_FOLDER,
    OVERLAY_FILE,
    REFERENCE_FILE,
    STATE_FILE,
    TABLE_FILE,
    is_same_file,
    memory_files_in,
    replace_file,
    weights_in,
)
from sense_v2.hf.saving.model_card import CARD_FILE, is_others_card, write_card
from sense_v2.hf.saving.model_config import announce_in_adapter, announce_memory
from sense_v2.hf.saving.publishing import (
    MODEL_FILE,
    built_inside,
    files_in,
    finish_interrupted,
    locked_folder,
    publish,
)

TABLE_WAYS = ("copy", "reflink", "reference")


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    table: str = "copy",
    backbone: Mapping[str, Any] | None = None,
    memory_only: bool = False,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """Save a model, its memory if any is attached, and its tokenizer.

    A table that lies in `folder/engram` already stays there. The model goes on with the table it has. All is built
    inside the folder first: what fails, or a kill, leaves what the folder held, or all that is new.

    Args:
        model: A model of transformers.
        folder: Where everything goes.
        tokenizer: A `tokenizers.Tokenizer`, or a tokenizer of transformers.
        table: What is saved of a table that lies elsewhere, without its optimizer states: "copy" (a reflink where
            the file system has them), "reflink" (refused where it hasn't), or "reference", its path and commit.
        backbone: What `backbone_reference(model)` returned before the memory was trained: the weights of a frozen
            backbone aren't saved, but named and compared when the folder is opened. None saves them.
        memory_only: True to save nothing of the backbone, as PEFT does with an adapter:
            `from_pretrained(folder, backbone=model)` loads the memory onto it. `model` may be wrapped by PEFT; its
            adapters aren't saved.
        training: Names and values for the model card.
        evaluation: More of them.
        name: The model card's title, by default the folder's name.
        state_dict: Saved in place of the model's own weights, those of the fusion layers included.
        **options: Those of the backbone's own `save_pretrained` (`max_shard_size`, `variant`, …).

    Raises:
        FileExistsError: A model without memory would be saved beside another's memory, a memory alone beside a model,
            or a reference beside a table.
        BlockingIOError: Another process writes to the table whose place would be taken.
        ValueError: `table` is something else, a PEFT adapter wraps the model, or the backbone isn't the one named.
        OSError: There is no room, or no reflink.
    """
    folder = Path(folder)
    target = folder / MEMORY_FOLDER
    if table not in TABLE_WAYS:
        raise ValueError(f"save_pretrained: table = {table!r}: must be one of {', '.join(TABLE_WAYS)}")
    if memory_only:
        model = _backbone_of_memory_alone(model, folder, backbone)
    else:
        _refuse_adapters(model)
    memory = attached_memory(model)
    if backbone is not None:
        if memory is None:
            raise with_way_out(
                ValueError("save_pretrained: backbone= names the weights of a model with memory"), "leave it out"
            )
        if not has_weights(backbone, model):
            raise with_way_out(
                ValueError(
                    f"save_pretrained: the backbone's weights have changed since {backbone['model']} was read"
                ),
                "leave backbone= out, and they are saved",
            )
    finish_interrupted(folder)
    if memory is None and target.exists():
        raise with_way_out(
            FileExistsError(
                f"{target} is another model's memory, and this one, which has none, would be loaded with it"
            ),
            "remove it, or choose another folder",
        )
    if memory is not None and memory.is_released:
        raise with_way_out(
            ValueError(
                "save_pretrained: this memory reads tables of a released checkpoint, which stay there; save "
                "model.engram.layers.state_dict() and the backbone by themselves, and attach the tables again to "
                "load them"
            ),
            "sense-engram convert makes a table of ours from each",
        )
    in_place = memory is not None and is_same_file(memory.table.path, target / TABLE_FILE)
    if table == "reference" and not in_place and (target / TABLE_FILE).exists():
        raise with_way_out(
            FileExistsError(f"{target / TABLE_FILE} is there already, and a reference would leave it without a use"),
            "remove it, or choose another folder",
        )
    with (
        contextlib.nullcontext() if in_place else _sole_writer(target / TABLE_FILE),
        built_inside(folder) as staging,
    ):
        given = model.state_dict() if state_dict is None else state_dict
        weights = {name: value for name, value in given.items() if not name.startswith("engram.")}
        if not memory_only:
            # Under the model's own names: a class that is named in code doesn't find how transformers renames others.
            options.setdefault("save_original_format", False)
            # The class's: the object's own is this function, while memory is attached.
            type(model).save_pretrained(model, staging, state_dict=dict(weights), **options)  # takes it apart
        if backbone is not None:
            for name in weights_in(staging, options.get("variant")):
                (staging / name).unlink()
        old = weights_in(folder, options.get("variant"))
        if tokenizer is not None:
            tokenizer = _save_tokenizer(tokenizer, model, staging)
        if memory is not None:
            # What is recorded of a tokenizer that isn't saved again still holds.
            facts = {
                name: value
                for name, value in read_facts(target / BACKBONE_FILE).items()
                if name in ("token_texts", "tokenizer_file") and in_place
            }
            facts |= backbone_facts(model, weights) | (
                tokenizer_facts(tokenizer, staging) if tokenizer is not None else {}
            )
            if backbone is not None:
                facts["reference"] = dict(backbone)
            write_facts(staging, facts)
            if not memory_only:
                announce(model, staging, folder)
            fusion = {
                name.removeprefix(FUSION_PREFIX): value
                for name, value in given.items()
                if name.startswith(FUSION_PREFIX)
            }
            old += _build_memory(memory, folder, staging, "stay" if in_place else table, fusion or None)
        title = name or folder.resolve().name
        if not is_others_card(folder):
            write_card(model, staging, title, training or {}, evaluation or {}, memory_only=memory_only)
        with locked_folder(folder, wait=True):
            publish(staging, folder, files_in(staging), old, gate=SAVED_CONFIG if memory_only else MODEL_FILE)


def _refuse_adapters(model: Any) -> None:
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise with_way_out(
            ValueError("save_pretrained: this model is wrapped in a PEFT adapter"),
            "model.save_pretrained(folder) saves the adapter and the memory beside it; or save "
            "model.merge_and_unload()",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise with_way_out(
            ValueError(
                "save_pretrained: this model has adapters (add_adapter), and transformers would save those alone"
            ),
            "model.delete_adapter(…) first, or use peft.get_peft_model and save model.merge_and_unload()",
        )


def _backbone_of_memory_alone(model: Any, folder: Path, backbone: Any) -> PreTrainedModel:
    """The model under PEFT's adapters, whose memory is saved alone. Raises where that would be another thing."""
    memory_of(model)
    if backbone is not None:
        raise with_way_out(
            ValueError("save_pretrained: memory_only=True saves nothing of the backbone, and backbone= names it"),
            "leave one of the two out",
        )
    for name in (MODEL_FILE, ADAPTER_FILE):
        if (folder / name).exists():
            raise with_way_out(
                FileExistsError(f"{folder} holds a model ({name}), whose memory this one would be taken for"),
                "choose another folder",
            )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_adapter(wrapper: Any, folder: Path, tokenizer: Any, backbone: Mapping[str, Any] | None) -> None:
    """Save a PEFT model's adapter, the memory if there is one, the tokenizer and the backbone's configuration. The
    adapter names its backbone: `backbone`, as `backbone_reference` returned it, or where the model was read from."""
    if backbone is not None:
        wrapper.active_peft_config.base_model_name_or_path = backbone["model"]
    wrapper.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    wrapper.get_base_model().config.save_pretrained(folder)


def save_beside_adapter(model: PreTrainedModel, folder: Path, save_adapter: Callable[[Path], Any]) -> None:
    """Save a PEFT model: its adapters, by the call that writes them to a folder, and the memory of `model` inside."""
    memory, table = memory_of(model), folder / MEMORY_FOLDER / TABLE_FILE
    if memory.is_released:
        warnings.warn(
            "the tables of a released checkpoint stay there, and an adapter's folder has no place for the fusion "
            "layers: save model.engram.layers.state_dict() yourself",
            UserWarning,
            stacklevel=4,
        )
        save_adapter(folder)
        return
    finish_interrupted(folder)
    in_place = is_same_file(memory.table.path, table)
    with contextlib.nullcontext() if in_place else _sole_writer(table), built_inside(folder) as staging:
        if (folder / CARD_FILE).exists():  # PEFT adds to it
            copy_file(folder / CARD_FILE, staging / CARD_FILE)
        save_adapter(staging)
        write_facts(staging, backbone_facts(model))
        adapters = [name for name in files_in(staging) if Path(name).name == ADAPTER_FILE]
        for name in adapters:
            announce_in_adapter(staging / name)
        old = _build_memory(memory, folder, staging, "stay" if in_place else "copy", None)
        with locked_folder(folder, wait=True):
            publish(staging, folder, files_in(staging), old, gate=min(adapters, key=len))


def _build_memory(
    memory: EngramMemory, folder: Path, staging: Path, table: str, fusion: Mapping[str, torch.Tensor] | None
) -> list[str]:
    """Write a memory to `staging`, from where it goes to `folder`; return what has to leave that."""
    target = folder / MEMORY_FOLDER
    if table in ("stay", "reference") and memory.table.has_gone_on:
        raise with_way_out(
            ValueError(
                f"{memory.table.path} has gone on since this model was copied: its rows aren't there any more"
            ),
            "Save the rows as well: choose another folder, and table='copy'",
        )
    # Several processes commit together, and one of them may save alone what was committed.
    if memory.storage.mode == "r+" and not memory.storage.needs_all_ranks:
        memory.storage.flush()
    own = _own_files(memory, target) if table == "stay" else set()
    overlay = OVERLAY_FILE not in own
    save_memory(memory, staging / MEMORY_FOLDER, table=table, states=False, fusion=fusion, overlay=overlay)
    return [
        f"{MEMORY_FOLDER}/{name}"
        for name in memory_files_in(target)
        if name not in own and not is_same_file(target / name, memory.table.path)
    ]


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    (folder / MEMORY_FOLDER).mkdir(parents=True, exist_ok=True)
    replace_file(folder / MEMORY_FOLDER / BACKBONE_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def save_before_memory(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Save a model as its class does, to a folder that is no whole model before `save_memory` has been there."""
    with built_inside(folder) as staging:
        type(model).save_pretrained(model, staging, **options)
        write_facts(staging, backbone_facts(model))
        announce(model, staging, folder)
        with locked_folder(folder, wait=True):
            publish(staging, folder, files_in(staging), weights_in(folder, options.get("variant")))


def announce(model: PreTrainedModel, folder: Path, to_be: Path) -> None:
    """Say in the folder that transformers saved `model` to that it has a memory. Its files go to `to_be`."""
    if not announce_memory(folder, model):
        warnings.warn(
            f"{type(model).__name__} is none of transformers' own models with a language head: "
            f"sense_v2.hf.from_pretrained({str(to_be)!r}) opens what was saved, the Auto classes open it "
            "without memory",
            UserWarning,
            stacklevel=3,
        )


def save_memory(
    memory: EngramMemory,
    target: Path,
    *,
    table: str,
    states: bool,
    fusion: Mapping[str, torch.Tensor] | None = None,
    overlay: bool = True,
) -> None:
    """Write a model's memory to a folder, its configuration last.

    Args:
        memory: Attached to the model.
        target: The folder.
        table: "copy" and "reflink" copy the table of the last commit, "reference" names it, and "stay" is for a table
            that lies there already. An overlay's rows are written beside it.
        states: True to copy the table's optimizer states as well.
        fusion: The fusion layers' weights, by default those that they have.
        overlay: False leaves an overlay out.
    """
    target.mkdir(parents=True, exist_ok=True)
    if table == "reference":
        _write_reference(memory.whole_table, target)
    else:
        (target / REFERENCE_FILE).unlink(missing_ok=True)
        if table != "stay":
            _copy_table(memory, target, states, reflink_only=table == "reflink")
    if overlay:
        _save_overlay(memory, target / OVERLAY_FILE, states)
    map_path = memory.tokenizer.path
    if description_path(map_path).exists():
        copy_file(description_path(map_path), description_path(target / MAP_FILE))
    else:
        description_path(target / MAP_FILE).unlink(missing_ok=True)  # of another map
    copy_file(map_path, target / MAP_FILE)
    fusion = memory.layers.state_dict() if fusion is None else fusion
    weights = {name: value.contiguous() for name, value in fusion.items()}
    replace_file(target / FUSION_FILE, to_safetensors(weights, metadata={"format": "pt"}))
    replace_file(target / CONFIG_FILE, _portable_config(memory).to_json().encode())


def _save_overlay(memory: EngramMemory, path: Path, states: bool) -> None:
    if memory.storage is memory.table:
        path.unlink(missing_ok=True)  # of another memory
    elif memory.storage.path is None or not is_same_file(memory.storage.path, path):
        memory.storage.copy_to(path, states=states, whole=True)


def _write_reference(storage: TrainableRows, target: Path) -> None:
    manifest = storage.manifest
    assert storage.path is not None
    if manifest.commit is None:
        raise with_way_out(
            ValueError(f"{storage.path} was never committed, so that nothing identifies its rows"),
            "commit() before it is referenced, or save a copy",
        )
    named = {"storage_path": str(storage.path), "commit": manifest.commit, "step": manifest.step}
    replace_file(target / REFERENCE_FILE, (json.dumps(named, indent=2) + "\n").encode())


def _save_tokenizer(tokenizer: Any, model: PreTrainedModel, folder: Path) -> Any:
    if not hasattr(tokenizer, "save_pretrained"):
        # A lone tokenizer.json wouldn't do: AutoTokenizer takes the model's type to know the rest, and for some types
        # reads other tokens from it without a word.
        eos, pad = (getattr(model.config, name, None) for name in ("eos_token_id", "pad_token_id"))
        if isinstance(eos, list):  # a configuration can list several ends, a tokenizer has one
            eos = eos[0] if eos else None
        # Only a token that was added: an ordinary one, made special, would be cut out of words.
        added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=added.get(eos), pad_token=added.get(pad)
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _portable_config(memory: EngramMemory) -> EngramConfig:
    """Make paths relative to the folder, and name the pad token: left open, it would be the loaded model's, and other
    rows would be looked up."""
    pad_token_id = memory.config.pad_token_id
    if pad_token_id is None:
        compressed_V = memory.tokenizer(torch.arange(memory.tokenizer.vocab_size))
        pad_token_id = int((compressed_V == next(iter(memory)).hasher.pad_id).nonzero()[0])
    return dataclasses.replace(
        memory.config, storage_path=TABLE_FILE, shadow_map_path=MAP_FILE, pad_token_id=pad_token_id
    )


def _own_files(memory: EngramMemory, target: Path) -> set[str]:
    """What stays in a memory's folder that is saved to itself: the table and all that belongs to it."""
    stays = {name for name in memory_files_in(target) if name.startswith("engram_table.")}
    if memory.storage.path is not None and is_same_file(memory.storage.path, target / OVERLAY_FILE):
        stays.add(OVERLAY_FILE)
    return stays


def _copy_table(memory: EngramMemory, target: Path, states: bool, *, reflink_only: bool) -> None:
    """Copy the table and its manifest, and remove an earlier table's states, which would be taken for its own."""
    memory.whole_table.copy_to(target / TABLE_FILE, states=states, reflink_only=reflink_only)
    kept = {entry.file for entry in read_manifest(target / manifest_name(TABLE_FILE)).states.values()}
    for path in target.glob("engram_table.*.dat"):
        is_table = path.with_name(manifest_name(path.name)).exists() or is_same_file(path, memory.table.path)
        if STATE_FILE.fullmatch(path.name) and not is_table and path.name not in kept:
            path.unlink()


@contextlib.contextmanager
def _sole_writer(table: Path) -> Iterator[None]:
    """Keep other writers out while a table is replaced: their next commit would put its manifest beside the new
    rows."""
    lock = WriterLock(table.with_name(lock_name(table.name)), str(table)) if table.exists() else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
