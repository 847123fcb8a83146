"""A model with memory <-> a folder: the backbone as transformers saves it, and the memory beside it.

    folder/config.json, model.safetensors, …     the backbone, opens with transformers alone
    folder/tokenizer.json                        its tokenizer
    folder/engram/config.json                    EngramConfig; its paths are relative to folder/engram
    folder/engram/fusion.safetensors             the fusion layers' weights
    folder/engram/engram_table.dat, .json        the table and its manifest
    folder/engram/shadow_map.npy, .json          the shadow map

The table is never rewritten: it is where it was trained, or it is copied.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sense_v2.core.config import EngramConfig
from sense_v2.engram.tokenizer import description_path
from sense_v2.hf.attach import attach_engram, attached_memory, memory_of, own_settings

MEMORY_FOLDER = "engram"
FUSION_FILE = "fusion.safetensors"


def memory_paths(folder: str | Path) -> tuple[Path, Path]:
    """`storage_path` and `shadow_map_path` of a memory that is trained in place in `folder`."""
    memory = Path(folder) / MEMORY_FOLDER
    return memory / "engram_table.dat", memory / "shadow_map.npy"


def save_trained(model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None) -> None:
    """Writes the model, its memory (if any is attached) and its tokenizer to `folder`.

    A table that lies elsewhere is copied, without its optimizer state; one that lies in `folder/engram` stays.
    `tokenizer` is a `tokenizers.Tokenizer` or a transformers tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    memory = attached_memory(model)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("engram.")}
    with own_settings(model):
        model.save_pretrained(folder, state_dict=weights)
    if tokenizer is not None:
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        else:
            tokenizer.save(str(folder / "tokenizer.json"))
    if memory is None:
        return
    target = folder / MEMORY_FOLDER
    target.mkdir(exist_ok=True)
    if memory.storage.mode == "r+":
        memory.storage.flush()
    for source, name in (
        (memory.storage.path, "engram_table.dat"),
        (memory.storage.path.with_suffix(".json"), "engram_table.json"),
        (memory.tokenizer.path, "shadow_map.npy"),
        (description_path(memory.tokenizer.path), "shadow_map.json"),
    ):
        if source.exists() and not ((target / name).exists() and os.path.samefile(source, target / name)):
            shutil.copyfile(source, target / name)
    save_file(memory.layers.state_dict(), target / FUSION_FILE)
    relative = dataclasses.replace(memory.config, storage_path="engram_table.dat", shadow_map_path="shadow_map.npy")
    relative.save(target / "config.json")


def load_trained(folder: str | Path, *, mode: str = "r+") -> PreTrainedModel:
    """The model that `save_trained` wrote, with its memory attached, in eval mode. With mode "r" its rows can't be
    trained, and nothing in the folder changes.

    Raises `FileNotFoundError` where the folder or a part of it is missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no model there (it has no config.json); `sense-engram train` writes one")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    memory_folder = folder / MEMORY_FOLDER
    if memory_folder.is_dir():
        config = EngramConfig.load(memory_folder / "config.json")
        storage_path, shadow_map_path = memory_paths(folder)
        if not storage_path.is_file():
            raise FileNotFoundError(f"{storage_path}: the memory's table is missing; copy it back")
        config = dataclasses.replace(config, storage_path=str(storage_path), shadow_map_path=str(shadow_map_path))
        attach_engram(model, config, mode=mode)
        fusion_path = memory_folder / FUSION_FILE
        if not fusion_path.is_file():
            raise FileNotFoundError(f"{fusion_path}: the fusion layers' weights are missing; copy them back")
        memory_of(model).layers.load_state_dict(load_file(fusion_path))
    return model.eval()
