"""A model with memory <-> a folder: the backbone as transformers saves it, and the memory beside it.

    folder/config.json                           the backbone's, announced as one with memory (`auto.py`)
    folder/model.safetensors, …                  the backbone's weights
    folder/tokenizer.json, tokenizer_config.json its tokenizer
    folder/README.md                             the model card (`card.py`)
    folder/engram/config.json                    EngramConfig; its paths are relative to folder/engram
    folder/engram/fusion.safetensors             the fusion layers' weights
    folder/engram/engram_table.dat, .json        the table and its manifest, or
    folder/engram/table_reference.json           where the table is, and its commit
    folder/engram/overlay.safetensors            rows that were changed on top of the table, where any were
    folder/engram/shadow_map.npy, .json          the shadow map
    folder/engram/backbone.json                  what the memory was trained on (`backbone.py`)

The table is never rewritten: it is where it was trained, or it is copied. A reference takes no room and holds as long
as its commit is the table's last: it is refused once another one has followed, never taken for the rows it named.
Every file of the memory is written under another name first, so that a process that reads the old one keeps it.
engram/config.json comes last and is taken away before a table is replaced: a folder without it was not saved to its
end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sense_v2.core.config import EngramConfig
from sense_v2.engram.convert import Conversion, convert_table
from sense_v2.engram.disk import WriterLock, copy_file, new_file
from sense_v2.engram.format import journal_name, lock_name, manifest_name
from sense_v2.engram.opening import read_manifest
from sense_v2.engram.overlay import OverlayStorage
from sense_v2.engram.sharding import ShardedTable
from sense_v2.engram.snapshot import copy_table
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.tokenizer import description_path
from sense_v2.hf.attach import EngramMemory, attach_engram, attached_memory, memory_of
from sense_v2.hf.auto import MODEL_TYPE, EngramModelConfig, announce_memory
from sense_v2.hf.backbone import (
    BACKBONE_FILE,
    backbone_facts,
    check_backbone,
    check_tokenizer,
    read_facts,
    tokenizer_facts,
    tokenizer_file_differs,
)
from sense_v2.hf.card import write_card
from sense_v2.hf.overlay import add_overlay

TABLES = ("copy", "reflink", "reference")
MEMORY_FOLDER = "engram"
CONFIG_FILE = "config.json"
FUSION_FILE = "fusion.safetensors"
TABLE_FILE = "engram_table.dat"
REFERENCE_FILE = "table_reference.json"
OVERLAY_FILE = "overlay.safetensors"
MAP_FILE = "shadow_map.npy"

# What the fusion layers' weights are called in the model's own state.
_FUSION_PREFIX = "engram.layers."
# Weights that could run code when they are read: never downloaded.
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Optimizer state of a table of that name, as sense_v2.engram.format calls it.
_STATE_FILE = re.compile(r"engram_table\.[A-Za-z0-9_-]{1,64}\.dat")
# That, and what `sense-engram delta apply` keeps: of no use to a table of other bytes.
_OF_THIS_TABLE = re.compile(rf"{_STATE_FILE.pattern}|engram_table\.undo-[0-9a-f]{{12}}\.safetensors")


def memory_paths(folder: str | Path) -> tuple[Path, Path]:
    """`storage_path` and `shadow_map_path` of a memory that is trained in place in `folder`."""
    memory = Path(folder) / MEMORY_FOLDER
    return memory / TABLE_FILE, memory / MAP_FILE


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    table: str = "copy",
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """Writes the model, its memory (if any is attached) and its tokenizer to `folder`.

    A table that lies in `folder/engram` stays. For one that lies elsewhere `table` says what is saved, without its
    optimizer states: "copy" (a reflink where the file system has them), "reflink" (refused where it hasn't), or
    "reference", its path and commit. `model` goes on with the table it has. `tokenizer` is a `tokenizers.Tokenizer`
    or a transformers tokenizer. `training` and `evaluation`, names and values, go into the model card, whose title is
    `name`, by default the folder's. `state_dict` is saved in place of the model's own weights, those of the fusion
    layers included; `options` (`max_shard_size`, `variant`, …) are those of the backbone's own `save_pretrained`.

    Raises `FileExistsError` where a model without memory would be saved beside the memory of another, or a reference
    beside a table, `BlockingIOError` where somebody writes to the table whose place would be taken, `ValueError` for
    another `table` and for a model that a PEFT adapter wraps, `OSError` where there is no room or no reflink.
    """
    folder = Path(folder)
    target = folder / MEMORY_FOLDER
    if table not in TABLES:
        raise ValueError(f"save_pretrained: table = {table!r}: must be one of {', '.join(TABLES)}")
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise ValueError(
            "save_pretrained: this model is wrapped in a PEFT adapter, whose weights wouldn't be saved in a form "
            "that loads; save model.merge_and_unload()"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "save_pretrained: this model has adapters (add_adapter), and transformers would save those alone; "
            "model.delete_adapter(…) first, or use peft.get_peft_model and save model.merge_and_unload()"
        )
    memory = attached_memory(model)
    if memory is None and target.exists():
        raise FileExistsError(
            f"{target} is another model's memory, and this one, which has none, would be loaded with it; "
            "remove it, or choose another folder"
        )
    if memory is not None and memory.is_released:
        raise ValueError(
            "save_pretrained: this memory reads tables of a released checkpoint, which stay there; save "
            "model.engram.layers.state_dict() and the backbone by themselves, and attach the tables again to load "
            "them. sense-engram convert makes a table of ours from each"
        )
    in_place = memory is not None and _is_same_file(memory.table.path, target / TABLE_FILE)
    if table == "reference" and not in_place and (target / TABLE_FILE).exists():
        raise FileExistsError(
            f"{target / TABLE_FILE} is there already, and a reference would leave it without a use; remove it, or "
            "choose another folder"
        )
    with contextlib.nullcontext() if in_place else _sole_writer(target / TABLE_FILE):
        if not in_place:
            (target / CONFIG_FILE).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        given = model.state_dict() if state_dict is None else state_dict
        weights = {name: value for name, value in given.items() if not name.startswith("engram.")}
        # The class's: the object's own is this function, while memory is attached.
        type(model).save_pretrained(model, folder, state_dict=dict(weights), **options)  # takes it apart
        if tokenizer is not None:
            tokenizer = _save_tokenizer(tokenizer, model, folder)
        if memory is not None:
            # Several processes commit together, and one of them may save alone what was committed.
            if memory.storage.mode == "r+" and not isinstance(memory.storage, ShardedTable):
                memory.storage.flush()
            # What is recorded of a tokenizer that isn't saved again still holds.
            facts = {
                name: value
                for name, value in read_facts(target / BACKBONE_FILE).items()
                if name in ("token_texts", "tokenizer_file") and in_place
            }
            facts |= backbone_facts(model, weights) | (
                tokenizer_facts(tokenizer, folder) if tokenizer is not None else {}
            )
            describe_backbone(model, folder, facts)
            fusion = {
                name.removeprefix(_FUSION_PREFIX): value
                for name, value in given.items()
                if name.startswith(_FUSION_PREFIX)
            }
            save_memory(memory, target, table="stay" if in_place else table, states=False, fusion=fusion or None)
        write_card(model, folder, name or folder.resolve().name, training=training or {}, evaluation=evaluation or {})


def describe_backbone(model: PreTrainedModel, folder: Path, facts: Mapping[str, Any]) -> None:
    """Says in `folder`, to which transformers has saved `model`, that it is one with memory, and what the memory was
    trained on."""
    (folder / MEMORY_FOLDER).mkdir(parents=True, exist_ok=True)
    with _replaced(folder / MEMORY_FOLDER / BACKBONE_FILE) as file:
        file.write((json.dumps(facts, indent=2) + "\n").encode())
    if not announce_memory(folder, model):
        warnings.warn(
            f"{type(model).__name__} is none of transformers' own models with a language head: "
            f"sense_v2.hf.from_pretrained({str(folder)!r}) opens what was saved, the Auto classes open it "
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
) -> None:
    """Writes what of a model is memory to the folder `target`, as above, its configuration last. `fusion` are the
    fusion layers' weights, by default those that they have.

    `table`: "copy" and "reflink" copy the table of the last commit, with its optimizer states where `states`;
    "reference" names it; "stay" is for one that lies there already. An overlay's rows are written beside it.
    """
    target.mkdir(parents=True, exist_ok=True)
    if table == "reference":
        _write_reference(memory.whole_table, target)
    else:
        (target / REFERENCE_FILE).unlink(missing_ok=True)
        if table != "stay":
            _copy_table(memory, target, states, reflink_only=table == "reflink")
    _save_overlay(memory, target / OVERLAY_FILE, states)
    map_path = memory.tokenizer.path
    if description_path(map_path).exists():
        copy_file(description_path(map_path), description_path(target / MAP_FILE))
    else:
        description_path(target / MAP_FILE).unlink(missing_ok=True)  # of another map
    copy_file(map_path, target / MAP_FILE)
    fusion = memory.layers.state_dict() if fusion is None else fusion
    weights = {name: value.contiguous() for name, value in fusion.items()}
    with _replaced(target / FUSION_FILE) as file:
        file.write(to_safetensors(weights, metadata={"format": "pt"}))
    with _replaced(target / CONFIG_FILE) as file:
        file.write(_portable_config(memory).to_json().encode())


def _save_overlay(memory: EngramMemory, path: Path, states: bool) -> None:
    overlay: Any = memory.storage
    if not isinstance(overlay, OverlayStorage):
        path.unlink(missing_ok=True)  # of another memory
    elif overlay.path is None or not _is_same_file(overlay.path, path):
        overlay.export(path, states=states)


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


def from_pretrained(
    name: str | Path,
    *,
    mode: str = "r",
    overlay: str | Path | None = None,
    backbone: PreTrainedModel | None = None,
    tokenizer: Any = None,
    config: EngramModelConfig | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """The model that `save_pretrained` wrote, with its memory attached, in eval mode.

    `name` is a folder, or (a string where no folder of that name is) a model of the hub, downloaded to the hub's
    cache by `revision`, `cache_dir`, `token`, `local_files_only`. With mode "r" its rows can't be trained, and
    nothing in the folder changes; "r+" trains them in place, a referenced table where it lies.

    `overlay` is a delta that was made on this table: rows that it has are looked up there, and with mode "r+" all
    that is trained goes there (it is made, if it isn't there yet), while the table is only read. A folder that was
    saved with an overlay has its own.

    `backbone` is a model to attach the memory to, in place of the saved one. `tokenizer` is compared with the one
    that the memory was trained with. `config` and `options` (`dtype`, `device_map`, `attn_implementation`,
    …) are those of the backbone's own `from_pretrained`. Only safetensors are read.

    Warns where backbone, tokenizer or versions aren't those that were saved. Raises `FileNotFoundError` where the
    folder or a part of it is missing, `ValueError` where parts don't belong together, the fusion layers' weights are
    damaged, a reference's table has gone on, the overlay is another table's, or backbone or tokenizer can't do.
    """
    if options.pop("use_safetensors", True) is False:
        raise ValueError("from_pretrained: use_safetensors = False: only safetensors are read; leave it out")
    folder = _found_folder(
        name,
        {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only},
        mode if overlay is None else "r",
    )
    memory_folder = folder / MEMORY_FOLDER
    has_memory = memory_folder.is_dir()
    if has_memory:
        storage_path = _table_of(memory_folder)
    overlay = _overlay_of(memory_folder, overlay)
    loading_info: Any = None
    if backbone is None:
        backbone, loading_info = _load_backbone(folder, config, options)
        if tokenizer is None and tokenizer_file_differs(read_facts(memory_folder / BACKBONE_FILE), folder):
            tokenizer = str(folder)
    elif attached_memory(backbone) is not None:
        raise ValueError("from_pretrained: the backbone has memory attached already; detach_engram(backbone) first")
    if has_memory:
        memory_config = dataclasses.replace(
            EngramConfig.load(memory_folder / CONFIG_FILE),
            storage_path=str(storage_path),
            shadow_map_path=str(memory_folder / MAP_FILE),
        )
        facts = read_facts(memory_folder / BACKBONE_FILE)
        if facts:
            check_backbone(facts, backbone, memory_folder)
        if tokenizer is not None:
            try:
                check_tokenizer(facts, tokenizer, memory_folder / MAP_FILE, memory_config.normalization)
            except OSError as error:
                raise ValueError(f"{folder}: the tokenizer can't be loaded: {error}; copy its files again") from error
        attach_engram(backbone, memory_config, mode=mode if overlay is None else "r")
        load_fusion(memory_of(backbone), memory_folder)
        if overlay is not None:
            add_overlay(backbone, overlay, mode=mode)
    model = backbone.eval()
    return (model, loading_info) if output_loading_info else model


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
    if (memory / OVERLAY_FILE).exists():
        raise ValueError(
            f"{folder} was saved with an overlay, which is of the table as it is and of no other. Put it into the "
            f"table first: sense-engram delta apply {memory / OVERLAY_FILE} {folder}, and remove it"
        )
    if (output / CONFIG_FILE).exists() and not (target / TABLE_FILE).exists():
        raise FileExistsError(f"{output} holds another model already; choose another --output")
    is_reference = (memory / REFERENCE_FILE).is_file()
    table = _referenced_table(memory) if is_reference else memory / TABLE_FILE
    conversion = convert_table(table, target / TABLE_FILE, dtype, advance=advance)
    of_table = {TABLE_FILE, manifest_name(TABLE_FILE), journal_name(TABLE_FILE), lock_name(TABLE_FILE), CONFIG_FILE}
    of_table.add(REFERENCE_FILE)
    for file in sorted(memory.iterdir()):
        if file.is_file() and not (
            file.name in of_table or file.suffix == ".tmp" or _OF_THIS_TABLE.fullmatch(file.name)
        ):
            copy_file(file, target / file.name)
    with _replaced(target / CONFIG_FILE) as to:
        to.write(dataclasses.replace(config, dtype=dtype).to_json().encode())
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
        if file.is_file():
            copy_file(file, output / file.name)
    return conversion


def _overlay_of(memory_folder: Path, given: str | Path | None) -> Path | None:
    saved = memory_folder / OVERLAY_FILE
    if given is not None and not memory_folder.is_dir():
        raise ValueError(f"{memory_folder.parent} has no memory that {given} could be an overlay of; leave it out")
    if given is not None and saved.is_file():
        raise ValueError(
            f"{memory_folder.parent} was saved with an overlay, and {given} would be a second one. Make them one: "
            f"sense-engram delta merge {saved} {given} --output FILE, and put that in its place"
        )
    return Path(given) if given is not None else saved if saved.is_file() else None


def memory_parts(folder: str | Path) -> tuple[EngramConfig, Path, dict[int, dict[str, torch.Tensor]]]:
    """(configuration, table, weights of the fusion layers by layer) of the model that was saved to `folder`, to write
    them in another form. Raises as `from_pretrained`."""
    memory = Path(folder) / MEMORY_FOLDER
    table = _table_of(memory)
    fusion: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(memory / FUSION_FILE).items():
        layer, _, rest = name.partition(".")
        fusion.setdefault(int(layer), {})[rest] = value
    return EngramConfig.load(memory / CONFIG_FILE), table, fusion


def _found_folder(name: str | Path, download: dict[str, Any], mode: str) -> Path:
    folder = Path(name)
    if isinstance(name, str) and not folder.exists() and _HUB_NAME.fullmatch(name):
        if mode != "r":
            raise ValueError(
                f"{name} is a model of the hub, and its rows would be trained in the hub's cache; load it with "
                "mode='r' and save it to a folder (save_pretrained), or download it to one"
            )
        try:
            return Path(snapshot_download(name, ignore_patterns=_PICKLES, **download))
        except (OSError, ValueError) as error:  # which of many depends on how the hub can't be reached
            raise FileNotFoundError(
                f"{name}: there is no such folder, and no model of that name came from the hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); check the name"
            ) from error
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> dict[str, Any]:
    """The config.json of a saved model, after a look at whether all parts of it are there. Raises `FileNotFoundError`
    naming the one that isn't, `ValueError` where the file is damaged or a reference's table has gone on."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no model there (it has no config.json); `sense-engram train` writes one")
    if (folder / MEMORY_FOLDER).is_dir():
        _table_of(folder / MEMORY_FOLDER)
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; copy it again") from error
    return values


def _table_of(memory_folder: Path) -> Path:
    """The table's path, after a look at whether all parts of the memory are there."""
    is_reference = (memory_folder / REFERENCE_FILE).is_file()
    for name, what in (
        (CONFIG_FILE, "configuration is missing: it was not saved to its end, so save it again"),
        (REFERENCE_FILE if is_reference else TABLE_FILE, "table is missing; copy it back"),
        (MAP_FILE, "shadow map is missing; copy it back, or make it from the tokenizer with `sense-engram setup`"),
        (FUSION_FILE, "fusion layers' weights are missing; copy them back"),
    ):
        if not (memory_folder / name).is_file():
            raise FileNotFoundError(f"{memory_folder / name}: the memory's {what}")
    return _referenced_table(memory_folder) if is_reference else memory_folder / TABLE_FILE


def _write_reference(storage: MMapEmbeddingStorage, target: Path) -> None:
    if storage.manifest.commit is None:
        raise ValueError(
            f"{storage.path} was never committed, so that nothing identifies its rows; commit() before it is "
            "referenced, or save a copy"
        )
    named = {
        "storage_path": str(storage.path.absolute()),
        "commit": storage.manifest.commit,
        "step": storage.manifest.step,
    }
    with _replaced(target / REFERENCE_FILE) as file:
        file.write((json.dumps(named, indent=2) + "\n").encode())


def read_reference(path: Path) -> dict[str, Any]:
    """storage_path, commit and step of a referenced table. Raises `ValueError` where the file is damaged."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(named[name], str) for name in ("storage_path", "commit")):
            raise ValueError("storage_path and commit must be strings")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no reference to a table: {error}; save the model again") from error
    return {"step": None, **named}


def _referenced_table(memory_folder: Path) -> Path:
    named = read_reference(memory_folder / REFERENCE_FILE)
    path = Path(named["storage_path"])
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the table that {memory_folder / REFERENCE_FILE} names isn't there (on another machine?); bring "
            "it back, or save the model with table='copy'"
        )
    manifest = read_manifest(path.with_name(manifest_name(path.name)))
    if manifest.commit != named["commit"]:
        raise ValueError(
            f"{memory_folder / REFERENCE_FILE} names {path} as committed at step {named['step']} (commit "
            f"{named['commit']}). The table has gone on since then (step {manifest.step}, commit {manifest.commit}), "
            "and rows that changed can't be had back; save the model again"
        )
    return path


def _load_backbone(
    folder: Path, config: EngramModelConfig | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """With the class that it was saved from: an encoder, say, is no causal model. And what loading reported."""
    found: Any = config
    if found is None:
        code = {name: options[name] for name in ("trust_remote_code",) if name in options}
        found = AutoConfig.from_pretrained(str(folder), local_files_only=True, **code)
    if found.model_type == MODEL_TYPE:
        found = found.backbone()
        # The Auto classes have put what they knew into their own configuration; the rest is for this one.
        for name in [name for name in options if name not in ("dtype", "torch_dtype") and hasattr(found, name)]:
            setattr(found, name, options.pop(name))
    names = found.architectures or [""]
    model_class: Any = getattr(transformers, names[0], AutoModelForCausalLM)
    is_checkpoint = _holds_fusion_weights(folder) and issubclass(model_class, PreTrainedModel)
    model, loading_info = (_without_fusion(model_class) if is_checkpoint else model_class).from_pretrained(
        str(folder), config=found, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )
    if is_checkpoint:
        model.__class__ = model_class
    return model.eval(), loading_info


def _holds_fusion_weights(folder: Path) -> bool:
    """Whether the fusion layers' weights are among the backbone's, as in a checkpoint that a Trainer resumes from."""
    for path in folder.glob("model*.safetensors"):
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            if any(name.startswith(_FUSION_PREFIX) for name in file.keys()):  # noqa: SIM118  # no mapping
                return True
    return False


def _without_fusion(model_class: type[PreTrainedModel]) -> Any:
    """The class, whose models don't report weights of fusion layers that lie among their own as unexpected."""
    ignored = [*(model_class._keys_to_ignore_on_load_unexpected or ()), rf"^{re.escape(_FUSION_PREFIX)}"]
    fields = {"__module__": model_class.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(model_class.__name__, (model_class,), fields)


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
    """Paths relative to the folder, and the pad token by name: left open, it would be the one that the model has when
    it is loaded, and other rows would be looked up."""
    pad_token_id = memory.config.pad_token_id
    if pad_token_id is None:
        compressed_V = memory.tokenizer(torch.arange(memory.tokenizer.vocab_size))
        pad_token_id = int((compressed_V == next(iter(memory)).hasher.pad_id).nonzero()[0])
    return dataclasses.replace(
        memory.config, storage_path=TABLE_FILE, shadow_map_path=MAP_FILE, pad_token_id=pad_token_id
    )


def _copy_table(memory: EngramMemory, target: Path, states: bool, *, reflink_only: bool) -> None:
    """The table and its manifest. State that an earlier table left there would be taken for its own."""
    copy_table(memory.whole_table, target / TABLE_FILE, states=states, reflink_only=reflink_only)
    kept = {entry.file for entry in read_manifest(target / manifest_name(TABLE_FILE)).states.values()}
    for path in target.glob("engram_table.*.dat"):
        is_table = path.with_name(manifest_name(path.name)).exists() or _is_same_file(path, memory.table.path)
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
