"""Methods of transformers' models that must know of the memory, put on the one object while it is attached.

    generate, generate_batch         take the overlay of each prompt
    prepare_inputs_for_generation    its inputs come with ids, mask and overlays for the memory
    save_pretrained                  saves the memory as well, so that whatever calls it (`push_to_hub`, a Trainer's
                                     save_model) loses nothing
    init_continuous_batching         its paged cache has a place for the memory
    disable_memory                   of no class: `memory_off`, where PEFT's models have `disable_adapter`

The class and its other objects stay as they are. Transformers has no extension point for the first four. Those of
generation would go if generate handed its own ids and mask on to the model beside `inputs_embeds` and prepared masks,
the one that saves with a hook of `save_pretrained` for files that belong to a model, the last with a way to say what
a model's paged cache holds beside keys and values.
"""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.hf.forward_hooks import IDS_ARGUMENT, MASK_ARGUMENT, OVERLAY_ARGUMENT, is_plain_mask
from sense_v2.hf.insight.interventions import memory_off
from sense_v2.hf.memory import memory_of, refuse_other_rows
from sense_v2.hf.overlays import ids_with_overlay, overlay_numbers
from sense_v2.hf.serving.continuous_batching import manager_with_memory


class OwnMethod:
    """Puts a function on one object in place of a method; `remove()` gives back what was there, as a handle does."""

    def __init__(self, owner: Any, name: str, function: Any) -> None:
        self.owner, self.name = owner, name
        self.replaced = {key: value for key, value in vars(owner).items() if key == name}
        # generate asks the signature which arguments it may pass on.
        theirs = list(inspect.signature(getattr(type(owner), name, function)).parameters.values())
        ours = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        ours = [p for p in ours if p.name not in {theirs_p.name for theirs_p in theirs}]
        named = [p for p in theirs[1:] if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in theirs if p.kind is p.VAR_KEYWORD]
        # Not a bound method: a deep copy and a pickle make one of these for the copy.
        method = partial(function, owner)
        parameters = [p.replace(annotation=p.empty) for p in (*named, *ours, *rest)]
        method.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        setattr(owner, name, method)

    def remove(self) -> None:
        self.owner.__dict__.pop(self.name, None)
        self.owner.__dict__.update(self.replaced)


def replace_methods(model: PreTrainedModel) -> list[Any]:
    """Put them on `model`; return what takes them off again."""
    return [
        model.register_load_state_dict_pre_hook(refuse_other_rows),
        OwnMethod(model, "disable_memory", memory_off),
        *(
            OwnMethod(model, name, function)
            for name, function in (
                ("generate", _generate_with_overlays),
                ("generate_batch", _generate_batch_with_overlays),
                ("prepare_inputs_for_generation", _prepare_inputs_with_memory),
                ("save_pretrained", _save_with_memory),
                ("init_continuous_batching", manager_with_memory),
            )
            if hasattr(model, name)
        ),
    ]


def _generate_with_overlays(model: Any, *args: Any, overlay: Any = None, **kwargs: Any) -> Any:
    """Do what the class's own does. Overlays go as a tensor, which it repeats for the beams of a prompt."""
    if overlay is not None:
        numbers = overlay_numbers(memory_of(model), overlay)
        kwargs[OVERLAY_ARGUMENT] = (
            torch.tensor(numbers, device=model.device) if isinstance(numbers, list) else overlay
        )
    return type(model).generate(model, *args, **kwargs)


def _generate_batch_with_overlays(
    model: Any, inputs: Any, *args: Any, overlay: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Do what the class's own does, with prompts that say their overlays."""
    if overlay is None:
        return dict(type(model).generate_batch(model, inputs, *args, **kwargs))
    overlay_numbers(memory_of(model), overlay)  # refuses what it can't name
    overlays = [overlay] * len(inputs) if isinstance(overlay, str) else overlay
    if len(overlays) != len(inputs):
        raise ValueError(f"overlay names {len(overlays)} overlays for {len(inputs)} sequences; expected one for each")
    prompts = [ids_with_overlay(model, ids, one) for ids, one in zip(inputs, overlays, strict=True)]
    found = dict(type(model).generate_batch(model, prompts, *args, **kwargs))
    num_embeddings = len(model.get_input_embeddings().weight)
    for one in found.values():
        one.prompt_ids = [token_id % num_embeddings for token_id in one.prompt_ids]
    return found


def _prepare_inputs_with_memory(
    model: Any,
    input_ids: Any,
    *args: Any,
    engram_input_ids: Any = None,
    engram_attention_mask: Any = None,
    overlay: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Make what generate calls the model with: the class's own, overlays, and ids and mask if it leaves them out."""
    inputs = type(model).prepare_inputs_for_generation(model, input_ids, *args, **kwargs)
    if overlay is not None:
        inputs[OVERLAY_ARGUMENT] = overlay
    embeds = inputs.get("inputs_embeds")
    if embeds is not None and inputs.get("input_ids") is None:
        ids_BT = input_ids if engram_input_ids is None else engram_input_ids
        if ids_BT is not None and ids_BT.shape[1] >= embeds.shape[1]:
            inputs[IDS_ARGUMENT] = _newest(ids_BT, embeds.shape[1])
    mask = inputs.get("attention_mask")
    if mask is not None and not is_plain_mask(mask):
        plain = engram_attention_mask if engram_attention_mask is not None else kwargs.get("attention_mask")
        new = embeds if inputs.get("input_ids") is None else inputs["input_ids"]
        if plain is None:
            plain = torch.ones(new.shape[:2], dtype=torch.int64, device=new.device)
        if is_plain_mask(plain):
            inputs[MASK_ARGUMENT] = _newest(plain, new.shape[1])
    return inputs


def _newest(values_BT: torch.Tensor, count: int) -> torch.Tensor:
    """Copy the last `count`: for a tensor that grows, or strides that do, a step is compiled once for each token."""
    return values_BT[:, -count:].clone(memory_format=torch.contiguous_format)


def _save_with_memory(
    model: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    *,
    memory_only: bool = False,
    **options: Any,
) -> None:
    """Do what `sense_v2.hf.save_pretrained` does, called as the class's own, which gets all but `push_to_hub`'s."""
    from sense_v2.hf.saving.save import save_before_memory, save_pretrained

    own = type(model).save_pretrained
    if options.get("distributed_checkpoint"):
        raise with_way_out(
            ValueError("distributed_checkpoint=True writes a format that holds no memory"),
            "save without it, or detach_engram(model) and save the backbone alone",
        )
    memory = memory_of(model)
    if memory.is_released and not memory_only:
        warnings.warn(
            "the tables of a released checkpoint stay there; what is saved are the weights, the fusion layers' among "
            "them (engram.layers.…): attach the tables again to load these",
            UserWarning,
            stacklevel=2,
        )
    # EngramCallback adds the memory to a checkpoint when the Trainer is done; it resumes from all weights in one.
    is_other = memory.is_released or memory.checkpoint == Path(save_directory) or not is_main_process
    if is_other and not (memory_only and is_main_process):
        # A Trainer resumes by the model's own names, and takes no other.
        options.setdefault("save_original_format", False)
        # Its rows are, or come, from elsewhere.
        given = model.state_dict() if state_dict is None else state_dict
        state_dict = {name: value for name, value in given.items() if not name.endswith("engram._extra_state")}
        if memory.is_released or not is_main_process:
            own(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
        else:
            save_before_memory(model, Path(save_directory), state_dict=state_dict, **options)
        return
    if not push_to_hub:
        save_pretrained(model, save_directory, state_dict=state_dict, memory_only=memory_only, **options)
        return
    from sense_v2.hf.saving.hub import push_to_hub as push

    # What save_pretrained of the class doesn't name is push_to_hub's, as there.
    saved = {name: options.pop(name) for name in inspect.signature(own).parameters if name in options}
    save_pretrained(model, save_directory, state_dict=state_dict, memory_only=memory_only, **saved)
    options.setdefault("token", saved.get("token"))
    push(save_directory, options.pop("repo_id", Path(save_directory).name), **options)
