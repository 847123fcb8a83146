"""A name or a folder -> a model and its tokenizer, to train or trained with memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from sense_v2.core.errors import CommandError, one_line, with_way_out
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.pretrained_tokenizer import loaded_tokenizer
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.gguf_models import gguf_file, read_gguf
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.saving.folder import ADAPTER_FILE, MEMORY_FOLDER, OVERLAY_FILE
from sense_v2.hf.training.fresh_model import END_OF_TEXT, fresh_backbone, train_bpe


@dataclass
class Backbone:
    """A model, and what belongs to it."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    """A transformers tokenizer, or a `tokenizers.Tokenizer`."""
    tokenizer_name: str
    trained: Path | None = None
    """The folder of a model that was trained with memory: it has that memory attached, to read."""


def new_backbone(
    texts: list[str], corpus_name: str, *, seed: int, sequence_length: int, progress: Progress = no_progress
) -> Backbone:
    """A small Llama that has learned nothing, and a BPE made from `texts`."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts, progress), eos_token=END_OF_TEXT)
    model = fresh_backbone(len(tokenizer), seed, max_positions=max(512, sequence_length))
    return Backbone("a fresh llama", model, tokenizer, tokenizer_name=f"BPE of {corpus_name}")


def named_backbone(name: str, *, trained: bool = False) -> Backbone:
    """A model of the hub, of a folder or of a GGUF file, in float32; with `trained`, also one that has a memory.

    Raises `OSError` naming what was tried, `ModuleNotFoundError` where it is a package that isn't there, or
    `CommandError`.
    """
    if (Path(name) / MEMORY_FOLDER).is_dir():
        if trained:
            return _trained_backbone(Path(name))
        raise CommandError(
            f"{name} has a memory already",
            "name the model that it was made from, or the folder of one without memory",
        )
    file = gguf_file(name)
    if file is not None:
        try:
            return Backbone(name, *read_gguf(file), tokenizer_name=file.name)
        except Exception as error:  # whatever is wrong with the file
            raise _unusable(name, error) from error
    EngramTokenizerBuilder(name)  # asks the hub once, with a time limit, and says what was tried
    local = Path(name).is_dir()
    try:
        tokenizer = saved_tokenizer(Path(name)) if local else loaded_tokenizer(AutoTokenizer.from_pretrained, name)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=local, dtype=torch.float32)
    except Exception as error:  # whatever is wrong with a repository's files
        raise _unusable(name, error) from error
    return Backbone(name, model, tokenizer, tokenizer_name=name)


def _trained_backbone(folder: Path) -> Backbone:
    for file, what, way_out in (
        (ADAPTER_FILE, "an adapter beside its memory", "merge it (merge_and_unload) and save the model"),
        (f"{MEMORY_FOLDER}/{OVERLAY_FILE}", "an overlay", "apply it (sense-engram delta apply) and remove it"),
    ):
        if (folder / file).exists():
            raise CommandError(f"{folder} has {what}, with which it can't be trained further", way_out)
    model, tokenizer = open_trained(folder, device="cpu", dtype="float32")
    memory = memory_of(model)
    if memory.is_released or len(memory.storages) > 1:
        raise CommandError(
            f"{folder} has a released table, or one for each layer", "train it in Python, with EngramTrainer"
        )
    name = memory.config.tokenizer_name or str(folder)
    return Backbone(str(folder), model, tokenizer, tokenizer_name=name, trained=folder)


def open_trained(folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) that `train`, `demo` or `save_pretrained` saved, the memory attached read-only.

    `device` as `device_of` takes it; `dtype` is the weights' type, auto the saved one. Raises `CommandError` for a
    device or type that isn't there, and what loading raises.
    """
    folder, place = Path(folder), device_of(device)
    options: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    if options and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CommandError(f"--dtype {dtype}: no type of weights", "auto, float32, bfloat16 or float16")
    try:
        model = from_pretrained(folder, mode="r", **options)
    except (OSError, ValueError, IndexError):
        raise
    except Exception as error:  # a damaged weights file, a tensor of another shape
        raise _unusable(str(folder), error) from error
    try:
        model.to(place)
    except (AssertionError, RuntimeError) as error:  # what torch raises differs with its build
        raise _no_device(device, error) from error
    return model, saved_tokenizer(folder)


def device_of(name: str) -> torch.device:
    """The device of a name, as cpu or cuda:1; auto is the accelerator that torch finds (CUDA, XPU, MPS), or the CPU.

    Raises `CommandError` for a name that is none.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise _no_device(name, error) from error


def _no_device(name: str, error: Exception) -> CommandError:
    what = f"--device {name}: {one_line(str(error))[:200]}"
    return CommandError(what, "auto takes an accelerator if there is one, and cpu is always there")


def open_with_memory(folder: Path, purpose: str, **where: str) -> tuple[PreTrainedModel, Any, EngramMemory]:
    """(model, tokenizer, memory), as `open_trained`. Raises `CommandError` where there is no memory to `purpose`."""
    model, tokenizer = open_trained(folder, **where)
    memory = attached_memory(model)
    if memory is None:
        raise CommandError(f"{folder}: this model has no memory to {purpose}", "name the folder of one with memory")
    return model, tokenizer, memory


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder: a transformers tokenizer, or a `tokenizers.Tokenizer` from a lone file."""
    file = folder / "tokenizer.json"
    try:
        if (folder / "tokenizer_config.json").is_file():
            return loaded_tokenizer(AutoTokenizer.from_pretrained, folder, local_files_only=True)
        if file.is_file():
            return loaded_tokenizer(Tokenizer.from_file, str(file))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise _unusable(str(folder), error) from error
    raise with_way_out(FileNotFoundError(f"{file}: the model's tokenizer is missing"), "copy it back")


def separator_id(tokenizer: Any) -> int | None:
    """The token that ends a text, if the tokenizer has one."""
    if isinstance(tokenizer, Tokenizer):
        found: int | None = tokenizer.token_to_id(END_OF_TEXT)
        return found
    return tokenizer.eos_token_id


def token_stream(texts: Sequence[str], tokenizer: Any, progress: Progress = no_progress) -> np.ndarray:
    """Encode all texts as one int32 stream of token ids, the model's separator between them."""
    with progress("tokenising", sum(map(len, texts)), unit="characters") as advance:
        return encode(texts, tokenizer, separator_id=separator_id(tokenizer), advance=advance)


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can take at once, where it has such a limit."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def _unusable(name: str, error: Exception) -> CommandError:
    return CommandError(
        f"{name}: the model can't be loaded: {type(error).__name__}: {one_line(str(error))[:300]}",
        "copy its files again, or name another model",
    )
