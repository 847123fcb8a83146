"""A model with memory <-> a folder: the backbone as transformers saves it, and the memory beside it.

    folder/config.json, model.safetensors, …     the backbone, opens with transformers alone
    folder/tokenizer.json, tokenizer_config.json its tokenizer
    folder/engram/config.json                    EngramConfig; its paths are relative to folder/engram
    folder/engram/fusion.safetensors             the fusion layers' weights
    folder/engram/engram_table.dat, .json        the table and its manifest
    folder/engram/shadow_map.npy, .json          the shadow map

The table is never rewritten: it is where it was trained, or it is copied. Every file of the memory is written under
another name first, so that a process that reads the old one keeps it. engram/config.json comes last and is taken
away before a table is replaced: a folder without it was not saved to its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sense_v2.core.config import EngramConfig
from sense_v2.engram.convert import Conversion, convert_table
from sense_v2.engram.disk import WriterLock, copy_file, new_file
from sense_v2.engram.format import journal_name, lock_name, manifest_name
from sense_v2.engram.opening import read_manifest
from sense_v2.engram.snapshot import copy_table
from sense_v2.engram.tokenizer import description_path
from sense_v2.hf.attach import EngramMemory, attach_engram, attached_memory, memory_of

MEMORY_FOLDER = "engram"
CONFIG_FILE = "config.json"
FUSION_FILE = "fusion.safetensors"
TABLE_FILE = "engram_table.dat"
MAP_FILE = "shadow_map.npy"

# Optimizer state of a table of that name, as sense_v2.engram.format calls it.
_STATE_FILE = re.compile(r"engram_table\.[A-Za-z0-9_-]{1,64}\.dat")


def memory_paths(folder: str | Path) -> tuple[Path, Path]:
    """`storage_path` and `shadow_map_path` of a memory that is trained in place in `folder`."""
    memory = Path(folder) / MEMORY_FOLDER
    return memory / TABLE_FILE, memory / MAP_FILE


def save_trained(model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None) -> None:
    """Writes the model, its memory (if any is attached) and its tokenizer to `folder`.

    A table that lies elsewhere is copied, without its optimizer state, and takes the place of one that is there; one
    that lies in `folder/engram` stays. `model` goes on with the table it has. `tokenizer` is a `tokenizers.Tokenizer`
    or a transformers tokenizer.

    Raises `FileExistsError` where a model without memory would be saved beside the memory of another,
    `BlockingIOError` where somebody writes to the table whose place would be taken, `OSError` where there is no room.
    """
    folder = Path(folder)
    target = folder / MEMORY_FOLDER
    memory = attached_memory(model)
    if memory is None and target.exists():
        raise FileExistsError(
            f"{target} is another model's memory, and this one, which has none, would be loaded with it; "
            "remove it, or choose another folder"
        )
    in_place = memory is not None and _is_same_file(memory.storage.path, target / TABLE_FILE)
    with contextlib.nullcontext() if in_place else _sole_writer(target / TABLE_FILE):
        if not in_place:
            (target / CONFIG_FILE).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value for name, value in model.state_dict().items() if not name.startswith("engram.")}
        model.save_pretrained(folder, state_dict=weights)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, model, folder)
        if memory is None:
            return
        if memory.storage.mode == "r+":
            memory.storage.flush()
        save_memory(memory, target, table="stay" if in_place else "copy", states=False)


def save_memory(memory: EngramMemory, target: Path, *, table: str, states: bool) -> None:
    """Writes what of a model is memory to the folder `target`, as above, its configuration last.

    `table`: "copy" copies the table of the last commit, with its optimizer states where `states`; "stay" is for one
    that lies there already, and for one that isn't to lie there.
    """
    target.mkdir(parents=True, exist_ok=True)
    if table == "copy":
        _copy_table(memory, target, states)
    map_path = memory.tokenizer.path
    if description_path(map_path).exists():
        copy_file(description_path(map_path), description_path(target / MAP_FILE))
    else:
        description_path(target / MAP_FILE).unlink(missing_ok=True)  # of another map
    copy_file(map_path, target / MAP_FILE)
    weights = {name: value.contiguous() for name, value in memory.layers.state_dict().items()}
    with _replaced(target / FUSION_FILE) as file:
        file.write(to_safetensors(weights, metadata={"format": "pt"}))
    with _replaced(target / CONFIG_FILE) as file:
        file.write(_portable_config(memory).to_json().encode())


def load_fusion(memory: EngramMemory, folder: Path) -> None:
    """Gives the fusion layers the weights that `save_memory` wrote to `folder`. Raises `ValueError` where they are
    damaged, or of other layers."""
    fusion_path = folder / FUSION_FILE
    try:
        weights = load_file(fusion_path)
    except SafetensorError as error:
        raise ValueError(
            f"{fusion_path} can't be loaded ({type(error).__name__}: {error}); copy its files again, all of one model"
        ) from error
    try:
        memory.layers.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{fusion_path} doesn't hold the fusion layers that {folder / CONFIG_FILE} and the backbone ask "
            f"for: {error}; copy its files again, all of one model"
        ) from error


def load_trained(folder: str | Path, *, mode: str = "r+") -> PreTrainedModel:
    """The model that `save_trained` wrote, with its memory attached, in eval mode. With mode "r" its rows can't be
    trained, and nothing in the folder changes.

    Raises `FileNotFoundError` where the folder or a part of it is missing, `ValueError` where parts don't belong
    together or the fusion layers' weights are damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no model there (it has no config.json); `sense-engram train` writes one")
    memory_folder = folder / MEMORY_FOLDER
    if not memory_folder.is_dir():
        return _load_backbone(folder)
    for name, what in (
        (CONFIG_FILE, "configuration is missing: it was not saved to its end, so save it again"),
        (TABLE_FILE, "table is missing; copy it back"),
        (MAP_FILE, "shadow map is missing; copy it back, or make it from the tokenizer with `sense-engram setup`"),
        (FUSION_FILE, "fusion layers' weights are missing; copy them back"),
    ):
        if not (memory_folder / name).is_file():
            raise FileNotFoundError(f"{memory_folder / name}: the memory's {what}")
    storage_path, shadow_map_path = memory_paths(folder)
    config = dataclasses.replace(
        EngramConfig.load(memory_folder / CONFIG_FILE),
        storage_path=str(storage_path),
        shadow_map_path=str(shadow_map_path),
    )
    model = attach_engram(_load_backbone(folder), config, mode=mode)
    load_fusion(memory_of(model), memory_folder)
    return model.eval()


def convert_trained(
    folder: str | Path,
    output: str | Path,
    dtype: str,
    *,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> Conversion:
    """Copies the model in `folder` to `output` with its table's rows in another dtype; `folder` is only read. Ended
    early, the same call goes on; config.json comes last, so that until then there is no model to load.

    Raises what `sense_v2.engram.convert.convert_table` raises, and `FileExistsError` where another model is there.
    """
    folder, output = Path(folder), Path(output)
    memory, target = folder / MEMORY_FOLDER, output / MEMORY_FOLDER
    config = EngramConfig.load(memory / CONFIG_FILE)
    if (output / CONFIG_FILE).exists() and not (target / TABLE_FILE).exists():
        raise FileExistsError(f"{output} holds another model already; choose another --output")
    conversion = convert_table(memory / TABLE_FILE, target / TABLE_FILE, dtype, advance=advance)
    of_table = {TABLE_FILE, manifest_name(TABLE_FILE), journal_name(TABLE_FILE), lock_name(TABLE_FILE), CONFIG_FILE}
    for file in sorted(memory.iterdir()):
        if file.is_file() and not (
            file.name in of_table or file.suffix == ".tmp" or _STATE_FILE.fullmatch(file.name)
        ):
            copy_file(file, target / file.name)
    with _replaced(target / CONFIG_FILE) as to:
        to.write(dataclasses.replace(config, dtype=dtype).to_json().encode())
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
        if file.is_file():
            copy_file(file, output / file.name)
    return conversion


def _load_backbone(folder: Path) -> PreTrainedModel:
    """With the class that it was saved from: an encoder, say, is no causal model."""
    names = AutoConfig.from_pretrained(folder, local_files_only=True).architectures or [""]
    model_class = getattr(transformers, names[0], AutoModelForCausalLM)
    return model_class.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


def _save_tokenizer(tokenizer: Any, model: PreTrainedModel, folder: Path) -> None:
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


def _portable_config(memory: EngramMemory) -> EngramConfig:
    """Paths relative to the folder, and the pad token by name: left open, it would be the one that the model has when
    it is loaded, and other rows would be looked up."""
    pad_token_id = memory.config.pad_token_id
    if pad_token_id is None:
        compressed_V = memory.tokenizer(torch.arange(memory.tokenizer.vocab_size))
        pad_token_id = int((compressed_V == next(iter(memory)).hasher.pad_id).nonzero()[0])
    return dataclasses.replace(
        memory.config, storage_path=TABLE_FILE, shadow_map_path=MAP_FILE, pad_token_id=pad_token_id
    )


def _copy_table(memory: EngramMemory, target: Path, states: bool) -> None:
    """The table and its manifest. State that an earlier table left there would be taken for its own."""
    copy_table(memory.storage, target / TABLE_FILE, states=states)
    kept = {entry.file for entry in read_manifest(target / manifest_name(TABLE_FILE)).states.values()}
    for path in target.glob("engram_table.*.dat"):
        is_table = path.with_name(manifest_name(path.name)).exists() or _is_same_file(path, memory.storage.path)
        if _STATE_FILE.fullmatch(path.name) and not is_table and path.name not in kept:
            path.unlink()


@contextlib.contextmanager
def _sole_writer(table: Path) -> Iterator[None]:
    """While a table that is there is replaced, nobody else writes to it: the next commit would put its own manifest
    beside the new rows."""
    lock = WriterLock(table.with_name(lock_name(table.name)), str(table)) if table.exists() else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of the one at `path` once it is whole."""
    with new_file(path, replace=True) as fd, open(fd, "wb", closefd=False) as file:
        yield file


def _is_same_file(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and os.path.samefile(path, other)
