"""The folder of a saved model: the names of its files, and whether all of them are there.

    folder/config.json                           the backbone's, announced as one with memory (`auto.py`)
    folder/model.safetensors, …                  the backbone's weights
    folder/tokenizer.json, tokenizer_config.json its tokenizer
    folder/adapter_config.json, …                in place of both, PEFT's adapter, which names its backbone
    folder/README.md                             the model card (`model_card.py`)
    folder/engram/config.json                    EngramConfig; its paths are relative to folder/engram
    folder/engram/fusion.safetensors             the fusion layers' weights
    folder/engram/engram_table.dat, .json        the table and its manifest, or
    folder/engram/table_reference.json           where the table is, and its commit
    folder/engram/overlay.safetensors            rows that were changed on top of the table, where any were
    folder/engram/shadow_map.npy, .json          the shadow map
    folder/engram/backbone.json                  what the memory was trained on (`backbone_facts.py`)

The table is never rewritten: it is where it was trained, or it is copied. A reference takes no room and holds as long
as its commit is the table's last: it is refused once another one has followed, never taken for the rows it named.
A model is built inside the folder and moved to its places by renames, so that a process that reads the old files
keeps them (`publishing.py`). A checkpoint's memory is written where it lies, engram/config.json last: a folder that
lacks it was not saved to its end.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sense_v2.core.config import SAVED_CONFIG, EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.table.disk import new_file, write_at
from sense_v2.engram.table.format import journal_name, manifest_name
from sense_v2.engram.table.opening import read_manifest
from sense_v2.engram.tokenizer import description_path
from sense_v2.hf.saving.publishing import finish_interrupted, is_notice

MEMORY_FOLDER, CONFIG_FILE = SAVED_CONFIG.split("/")
FUSION_FILE = "fusion.safetensors"
TABLE_FILE = "engram_table.dat"
REFERENCE_FILE = "table_reference.json"
OVERLAY_FILE = "overlay.safetensors"
ADAPTER_FILE = "adapter_config.json"
MAP_FILE = "shadow_map.npy"
# What the fusion layers' weights are called in the model's own state.
FUSION_PREFIX = "engram.layers."
# Optimizer state of a table of that name, as sense_v2.engram.table.format calls it.
STATE_FILE = re.compile(r"engram_table\.[A-Za-z0-9_-]{1,64}\.dat")
# That, and what `sense-engram delta apply` keeps: of no use to a table of other bytes.
OF_THE_TABLE = re.compile(rf"{STATE_FILE.pattern}|engram_table\.undo-(?:\d+-)?[0-9a-f]{{12}}\.safetensors")


def memory_paths(folder: str | Path) -> tuple[Path, Path]:
    """Return `storage_path` and `shadow_map_path` of a memory that is trained in place in `folder`."""
    memory = Path(folder) / MEMORY_FOLDER
    return memory / TABLE_FILE, memory / MAP_FILE


def check_folder(folder: Path, *, needs_model: bool = True) -> dict[str, Any]:
    """Check that all parts of a saved model are there, and return its config.json, or its adapter's; {} of a memory
    without a model, if `needs_model` is False.

    Raises `FileNotFoundError` naming a missing part, `ValueError` if the file is damaged or a reference's table has
    gone on.
    """
    finish_interrupted(folder)
    path = folder / "config.json"
    if not path.is_file() and (folder / ADAPTER_FILE).is_file():
        path = folder / ADAPTER_FILE
    if is_notice(path):
        raise with_way_out(
            ValueError(f"{folder}: a training goes on with the model that was there; wait for its end"),
            f"One that ended early goes on with `sense-engram train --resume --output {folder}`",
        )
    if not path.is_file() and (folder / MEMORY_FOLDER).is_dir():
        if needs_model:
            raise with_way_out(
                FileNotFoundError(f"{folder}: a memory, and no model there (it has no config.json)"),
                "`sense-engram train` writes both; to attach the memory to the model that it is for, pass that model "
                "as backbone=",
            )
        table_of(folder / MEMORY_FOLDER)
        return {}
    if not path.is_file():
        raise with_way_out(
            FileNotFoundError(f"{folder}: no model there (it has no config.json)"), "`sense-engram train` writes one"
        )
    if (folder / MEMORY_FOLDER).is_dir():
        table_of(folder / MEMORY_FOLDER)
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise with_way_out(ValueError(f"{path}: not valid JSON: {error}"), "copy it again") from error
    return values


def table_of(memory_folder: Path) -> Path:
    """Check that all parts of the memory are there, and return the table's path."""
    is_reference = (memory_folder / REFERENCE_FILE).is_file()
    for name, what, way_out in (
        (CONFIG_FILE, "configuration is missing: it was not saved to its end", "save it again"),
        (REFERENCE_FILE if is_reference else TABLE_FILE, "table is missing", "copy it back"),
        (MAP_FILE, "shadow map is missing", "copy it back, or make it from the tokenizer with `sense-engram setup`"),
        (FUSION_FILE, "fusion layers' weights are missing", "copy them back"),
    ):
        if not (memory_folder / name).is_file():
            raise with_way_out(FileNotFoundError(f"{memory_folder / name}: the memory's {what}"), way_out)
    return referenced_table(memory_folder) if is_reference else memory_folder / TABLE_FILE


def memory_parts(folder: str | Path) -> tuple[EngramConfig, Path, dict[int, dict[str, torch.Tensor]]]:
    """Return a saved model's (configuration, table, fusion layers' weights by layer), to write them in another form.
    Raises as `from_pretrained`."""
    memory = Path(folder) / MEMORY_FOLDER
    table = table_of(memory)
    fusion: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(memory / FUSION_FILE).items():
        layer, _, rest = name.partition(".")
        fusion.setdefault(int(layer), {})[rest] = value
    return EngramConfig.load(memory / CONFIG_FILE), table, fusion


def weights_in(folder: Path, variant: str | None = None) -> list[str]:
    """The names of the files of a backbone's weights, of a variant or of none."""
    own = f".{variant}" if variant else ""
    patterns = (f"model{own}.safetensors", f"model{own}-*-of-*.safetensors", f"model.safetensors.index{own}.json")
    return [path.name for pattern in patterns for path in folder.glob(pattern)]


def memory_files_in(memory_folder: Path) -> list[str]:
    """The names of the files of a memory, and of a table of its name and all that belongs to that."""
    names = {CONFIG_FILE, FUSION_FILE, REFERENCE_FILE, OVERLAY_FILE, MAP_FILE, "backbone.json"}
    names |= {description_path(Path(MAP_FILE)).name, TABLE_FILE, manifest_name(TABLE_FILE), journal_name(TABLE_FILE)}
    return [
        path.name
        for path in (memory_folder.iterdir() if memory_folder.is_dir() else ())
        if path.name in names or (OF_THE_TABLE.fullmatch(path.name) and not is_table(path))
    ]


def is_table(path: Path) -> bool:
    """True for a table of another name, which could be a state by its name: it has a manifest of its own."""
    return path.with_name(manifest_name(path.name)).exists()


def read_reference(path: Path) -> dict[str, Any]:
    """Return storage_path, commit and step of a referenced table. Raises `ValueError` if the file is damaged."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(named[name], str) for name in ("storage_path", "commit")):
            raise ValueError("storage_path and commit must be strings")
    except (ValueError, KeyError, TypeError) as error:
        raise with_way_out(
            ValueError(f"{path} is no reference to a table: {error}"), "save the model again"
        ) from error
    return {"step": None, **named}


def referenced_table(memory_folder: Path) -> Path:
    named = read_reference(memory_folder / REFERENCE_FILE)
    path = Path(named["storage_path"])
    if not path.is_file():
        raise with_way_out(
            FileNotFoundError(
                f"{path}: the table that {memory_folder / REFERENCE_FILE} names isn't there (on another machine?)"
            ),
            "bring it back, or save the model with table='copy'",
        )
    manifest = read_manifest(path.with_name(manifest_name(path.name)))
    if manifest.commit != named["commit"]:
        raise with_way_out(
            ValueError(
                f"{memory_folder / REFERENCE_FILE} names {path} as committed at step {named['step']} (commit "
                f"{named['commit']}). The table has gone on since then (step {manifest.step}, commit "
                f"{manifest.commit}), and rows that changed can't be had back"
            ),
            "save the model again",
        )
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that takes the place of the one at `path` once it is whole."""
    with new_file(path, replace=True) as fd:
        write_at(fd, content, 0)


def is_same_file(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and os.path.samefile(path, other)
