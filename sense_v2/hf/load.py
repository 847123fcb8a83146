"""A folder, or a model of the hub -> the model with its memory attached."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.gguf_models import gguf_file, read_gguf
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.overlays import add_overlay
from sense_v2.hf.saving.backbone_facts import (
    BACKBONE_FILE,
    check_backbone,
    check_tokenizer,
    may_have_weights,
    read_facts,
    tokenizer_file_differs,
)
from sense_v2.hf.saving.folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FUSION_FILE,
    FUSION_PREFIX,
    MAP_FILE,
    MEMORY_FOLDER,
    OVERLAY_FILE,
    check_folder,
    table_of,
    weights_in,
)
from sense_v2.hf.saving.model_config import MODEL_TYPE, EngramModelConfig, forget_announcement
from sense_v2.hf.saving.weights import load_weights

# Weights that could run code when they are read: never downloaded.
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def from_pretrained(
    name: str | Path,
    *,
    mode: str = "r",
    overlay: str | Path | Sequence[str | Path] | None = None,
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
    """Load a model that `save_pretrained` wrote, with its memory attached, in eval mode.

    A folder that a PEFT model saved holds an adapter and the memory: the model that the adapter names, or `backbone`,
    is given both.

    Only safetensors are read. Warns if backbone, tokenizer or versions aren't those that were saved.

    Args:
        name: A folder; or, if there is no such folder, a model of the hub, which is downloaded to the hub's cache.
        mode: "r" only reads rows. "r+" trains them in place, a referenced table where it lies.
        overlay: A delta of this table: rows that it has are looked up there. With mode "r+" all that is trained goes
            there, and the file is made if it isn't there yet. Of several each lies on top of the one before, and only
            the last is written to. A folder that was saved with an overlay has its own.
        backbone: A model to attach the memory to, in place of the saved one.
        tokenizer: Compared with the one that the memory was trained with.
        config: The backbone's configuration.
        revision: Of the hub's model, as are `cache_dir`, `token` and `local_files_only`.
        output_loading_info: True to return what transformers reports of loading the backbone as well.
        **options: Those of the backbone's own `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, …).

    Raises:
        FileNotFoundError: The folder, or a part of it, is missing.
        ValueError: Parts don't belong together or are damaged, a reference's table has gone on, the overlay is
            another table's, or backbone or tokenizer doesn't fit the memory.
    """
    if options.pop("use_safetensors", True) is False:
        raise with_way_out(
            ValueError("from_pretrained: use_safetensors = False: only safetensors are read"), "leave it out"
        )
    folder = _found_folder(
        name,
        {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only},
        mode if overlay is None else "r",
        needs_model=backbone is None,
    )
    memory_folder = folder / MEMORY_FOLDER
    if (folder / ADAPTER_FILE).is_file() and not memory_folder.is_dir():  # one of several adapters
        memory_folder = folder.parent / MEMORY_FOLDER
    storage_path = table_of(memory_folder) if memory_folder.is_dir() else None
    overlay = _overlay_of(memory_folder, overlay)
    facts = read_facts(memory_folder / BACKBONE_FILE)
    loading_info: Any = None
    if backbone is None:
        if (folder / ADAPTER_FILE).is_file():
            backbone = _load_base_of_adapter(folder, options)
        else:
            backbone, loading_info = _load_backbone(folder, config, options, facts)
        if tokenizer is None and tokenizer_file_differs(facts, folder):
            tokenizer = str(folder)
    elif attached_memory(backbone) is not None:
        raise with_way_out(
            ValueError("from_pretrained: the backbone has memory attached already"), "detach_engram(backbone) first"
        )
    forget_announcement(backbone)
    if storage_path is not None:
        memory_config = dataclasses.replace(
            EngramConfig.load(memory_folder / CONFIG_FILE),
            storage_path=str(storage_path),
            shadow_map_path=str(memory_folder / MAP_FILE),
        )
        if facts:
            check_backbone(facts, backbone, memory_folder)
        if tokenizer is not None:
            try:
                check_tokenizer(facts, tokenizer, memory_folder / MAP_FILE, memory_config.normalization)
            except OSError as error:
                raise with_way_out(
                    ValueError(f"{folder}: the tokenizer can't be loaded: {error}"), "copy its files again"
                ) from error
        attach_engram(backbone, memory_config, mode=mode if overlay is None else "r")
        load_fusion(memory_of(backbone), memory_folder)
        if overlay is not None:
            add_overlay(backbone, overlay, mode=mode)
    model: Any = backbone
    if (folder / ADAPTER_FILE).is_file():
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*memory_in_engram")
            model = PeftModel.from_pretrained(backbone, str(folder), is_trainable=mode == "r+")
    model.eval()
    return (model, loading_info) if output_loading_info else model


def load_fusion(memory: EngramMemory, folder: Path) -> None:
    """Load the fusion layers' weights that `save_memory` wrote. Raises `ValueError` if they are damaged, or of other
    layers."""
    fusion_path = folder / FUSION_FILE
    try:
        weights = load_file(fusion_path)
    except SafetensorError as error:
        raise with_way_out(
            ValueError(f"{fusion_path} can't be loaded ({type(error).__name__}: {error})"),
            "copy its files again, all of one model",
        ) from error
    try:
        memory.layers.load_state_dict(weights)
    except RuntimeError as error:
        raise with_way_out(
            ValueError(
                f"{fusion_path} doesn't hold the fusion layers that {folder / CONFIG_FILE} and the backbone ask "
                f"for: {error}"
            ),
            "copy its files again, all of one model",
        ) from error


def _overlay_of(
    memory_folder: Path, given: str | Path | Sequence[str | Path] | None
) -> str | Path | Sequence[str | Path] | None:
    saved = memory_folder / OVERLAY_FILE
    if given is not None and not memory_folder.is_dir():
        raise with_way_out(
            ValueError(f"{memory_folder.parent} has no memory that {given} could be an overlay of"), "leave it out"
        )
    if given is not None and saved.is_file():
        raise with_way_out(
            ValueError(f"{memory_folder.parent} was saved with an overlay, and {given} would be a second one"),
            f"Make them one: sense-engram delta merge {saved} {given} --output FILE, and put that in its place",
        )
    return given if given is not None else saved if saved.is_file() else None


def _found_folder(name: str | Path, download: dict[str, Any], mode: str, needs_model: bool) -> Path:
    folder = Path(name)
    if isinstance(name, str) and not folder.exists() and _HUB_NAME.fullmatch(name):
        if mode != "r":
            raise with_way_out(
                ValueError(f"{name} is a model of the hub, and its rows would be trained in the hub's cache"),
                "load it with mode='r' and save it to a folder (save_pretrained), or download it to one",
            )
        try:
            return Path(snapshot_download(name, ignore_patterns=_PICKLES, **download))
        except (OSError, ValueError) as error:  # which of many depends on how the hub can't be reached
            raise with_way_out(
                FileNotFoundError(
                    f"{name}: there is no such folder, and no model of that name came from the hub "
                    f"({type(error).__name__}: {str(error).splitlines()[0]})"
                ),
                "check the name",
            ) from error
    check_folder(folder, needs_model=needs_model)
    return folder


def _load_backbone(
    folder: Path, config: EngramModelConfig | None, options: dict[str, Any], facts: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """Load with the class that was saved: an encoder, say, is no causal model. Also return transformers' report.

    The weights are in the folder, or where `facts` names them.
    """
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
    if "reference" in facts and not weights_in(folder):
        return _load_reference(folder, facts["reference"], model_class, found, options)
    options = {"local_files_only": True, "use_safetensors": True, **options}
    if _holds_fusion_weights(folder) and issubclass(model_class, PreTrainedModel):
        model, loading_info = load_weights(
            model_class, folder, found, lambda name: not name.startswith(FUSION_PREFIX), **options
        )
    else:
        model, loading_info = model_class.from_pretrained(
            str(folder), config=found, output_loading_info=True, **options
        )
    return model.eval(), loading_info


def _load_reference(
    folder: Path, named: dict[str, Any], model_class: Any, config: Any, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    name = named["model"]
    way_out = "bring it back, or pass the model that the memory was trained on as backbone="
    file = gguf_file(name)
    if file is not None:
        model, loading_info = read_gguf(file)[0], {}
    elif Path(name).is_absolute() and not Path(name).exists():
        raise with_way_out(
            FileNotFoundError(
                f"{name}: the backbone that {folder / MEMORY_FOLDER / BACKBONE_FILE} names isn't there"
            ),
            way_out,
        )
    else:
        options = {"use_safetensors": True, "revision": named.get("revision") or "main", **options}
        model, loading_info = model_class.from_pretrained(name, config=config, output_loading_info=True, **options)
    if not may_have_weights(named, model):
        raise with_way_out(
            ValueError(f"{name} has other weights than the backbone that this memory was trained on"), way_out
        )
    if file is not None:  # compared as it is in the file
        model = _in_type(model, options.get("dtype", config.dtype))
    return model.eval(), loading_info


def _in_type(model: PreTrainedModel, dtype: Any) -> PreTrainedModel:
    """`model` in a type as transformers takes it: a torch.dtype, its name, or "auto" for that of the file."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    to: Any = model.to  # transformers wraps it in a way that mypy takes for a function of two
    moved: PreTrainedModel = to(dtype) if isinstance(dtype, torch.dtype) else model
    return moved


def _load_base_of_adapter(folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Load what the adapter was trained on, without the memory that it may have been saved with."""
    name = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise with_way_out(
            ValueError(f"{folder / ADAPTER_FILE} names no base_model_name_or_path"),
            "load the model that the adapter was trained on yourself, and pass it as backbone=",
        )
    file = gguf_file(name)
    if file is not None:
        return _in_type(read_gguf(file)[0], options.get("dtype"))
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **options)
    return base if attached_memory(base) is None else detach_engram(base)


def _holds_fusion_weights(folder: Path) -> bool:
    """True if the fusion layers' weights are among the backbone's, as in a Trainer's checkpoint."""
    for path in folder.glob("model*.safetensors"):
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            if any(name.startswith(FUSION_PREFIX) for name in file.keys()):  # noqa: SIM118  # no mapping
                return True
    return False
