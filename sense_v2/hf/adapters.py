"""PEFT around a model with memory: its adapter is saved with the memory, and what can't work is refused.

    with_lora(model, rank)         a LoRA on the backbone, as `train --lora-rank` trains it
    get_peft_model(model, …)       model.save_pretrained(folder) saves the memory beside the adapter; with the
                                   adapter off, the memory stays on, and a warning says so once it was trained,
                                   or, for TRL's references, is what it was before training
    prompt, prefix, p-tuning       refused: their virtual tokens have no ids
    an adapter inside the memory   refused: the memory's weights are trained themselves

PEFT has no extension point for what an adapter goes with. A wrapper is met where torch registers the model as its
part, whether memory was attached before or after.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from sense_v2.core.errors import CommandError, with_way_out
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.model_methods import OwnMethod


def with_lora(model: PreTrainedModel, rank: int) -> Any:
    """Return a PEFT model around `model`, with a LoRA on each linear layer of the backbone, to train beside the
    memory; `model` itself for rank 0. Raises `CommandError` where peft isn't installed."""
    if not rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise CommandError("a LoRA needs the package peft", "pip install peft") from error
    memory = attached_memory(model)
    trained = [parameter for parameter in memory.parameters() if parameter.requires_grad] if memory else []
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=r"(.*\.)?engram\..*" if memory else None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a name that it deprecates, which is nothing a user can mend.
        warnings.simplefilter("ignore", FutureWarning)
        wrapper = get_peft_model(model, config)
    for parameter in trained:  # which PEFT has frozen
        parameter.requires_grad_(True)
    return wrapper


def watch_wrappers() -> None:
    """Meet every PEFT model that is made around a model with memory; importing `sense_v2.hf` does it."""
    register_module_module_registration_hook(_meet_wrapper)


def _meet_wrapper(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    peft = sys.modules.get("peft") if name == "base_model" else None
    if peft is None or not isinstance(parent, getattr(peft, "PeftModel", ())):
        return
    # Prompt learning puts nothing between.
    model = module if isinstance(module, PreTrainedModel) else getattr(module, "model", None)
    memory = attached_memory(model) if isinstance(model, nn.Module) else None
    if memory is not None:
        refuse_virtual_tokens(parent, module is model)
        follow_wrapper(parent, memory)


def refuse_virtual_tokens(wrapper: Any, is_prompt_learning: bool) -> None:
    """Raises `ValueError` for prompt, prefix and p-tuning."""
    if is_prompt_learning:
        raise with_way_out(
            ValueError(
                f"{wrapper.peft_type.value} puts virtual tokens before the text, which have no ids, and memory is "
                "looked up by ids"
            ),
            "Use an adapter in the layers (peft.LoraConfig, IA3Config, …) beside the memory, or "
            "detach_engram(model) first",
        )


def follow_wrapper(wrapper: Any, memory: EngramMemory) -> None:
    """Put methods that know of the memory on a PEFT model, until the memory is detached."""
    for name, method in (
        ("save_pretrained", _save_with_memory),
        ("disable_adapter", _disable_adapter),
        ("set_adapter", _set_adapter),
    ):
        memory.undo.append(OwnMethod(wrapper, name, method))


class MemoryOfReference:
    """The memory as it was when a Trainer was made, for the moments in which its adapter is off.

    TRL takes a PEFT model with its adapter off, or with a copy of the adapter ("ref"), for the reference.
    """

    def __init__(self, wrapper: Any, memory: EngramMemory) -> None:
        self.trained_adapter = wrapper.active_adapter
        self.error: Exception | None = None
        """Why it isn't known, if it isn't."""
        self._memory = memory
        memo: dict[int, Any] = {}  # the layers' table, copied once
        try:
            self._others = {name: copy.deepcopy(layer, memo).eval() for name, layer in memory.layers.items()}
        except ValueError as error:
            self.error = error
        self._is_on = False

    def switch(self, is_on: bool) -> None:
        """Puts the memory of the reference in the place of the one that trains, or takes it off again."""
        if is_on == self._is_on:
            return
        if self.error is not None:
            raise self.error
        now = dict(self._memory.layers.items())
        self._memory.layers.update(self._others)
        self._others, self._is_on = now, is_on
        self._memory.storage = next(iter(self._memory)).storage


def _save_with_memory(
    wrapper: Any, save_directory: Any, *args: Any, is_main_process: bool = True, **more: Any
) -> None:
    """Save the adapter, and the memory beside it; `sense_v2.hf.from_pretrained` opens both."""
    from sense_v2.hf.saving.save import save_beside_adapter

    def save_adapter(folder: Any) -> None:
        type(wrapper).save_pretrained(wrapper, folder, *args, is_main_process=is_main_process, **more)

    # EngramCallback adds the memory to a checkpoint when the Trainer is done.
    if is_main_process and memory_of(wrapper).checkpoint != Path(save_directory):
        save_beside_adapter(wrapper.get_base_model(), Path(save_directory), save_adapter)
    else:
        save_adapter(save_directory)


@contextlib.contextmanager
def _disable_adapter(wrapper: Any) -> Iterator[None]:
    memory = memory_of(wrapper)
    reference = memory.reference
    if reference is not None:
        reference.switch(True)
    elif any(storage.mode == "r+" and not storage.is_new for storage in memory.storages):
        warnings.warn(
            "the adapter is off, and the memory stays on as it is trained by now. For the model as it was before "
            "training keep a copy: copy.deepcopy(model)",
            UserWarning,
            stacklevel=3,
        )
    try:
        with type(wrapper).disable_adapter(wrapper):
            yield
    finally:
        if reference is not None:
            reference.switch(False)


def _set_adapter(wrapper: Any, adapter_name: str, *args: Any, **more: Any) -> None:
    type(wrapper).set_adapter(wrapper, adapter_name, *args, **more)
    reference = memory_of(wrapper).reference
    if reference is not None:
        reference.switch(adapter_name != reference.trained_adapter)
