"""attach_engram and detach_engram: memory for a transformers model, in place.

Hooks on the base model and on its layers add the memory (`sense_v2.hf.forward_hooks`); what generation needs of
earlier tokens is in the model's KV cache (`sense_v2.hf.cache`). No weight of the backbone is touched, moved or
renamed; `detach_engram` removes the hooks, and the model is what it was.

What was attached lies in `model.engram` (`EngramMemory`): one table, one shadow map, one fusion layer per index.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram import operators
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.variants import VARIANTS
from sense_v2.hf.adapters import follow_wrapper, refuse_virtual_tokens
from sense_v2.hf.forward_hooks import CARRIER, MASK_ARGUMENT, add_memory, carry_inputs, forget_call, note_given
from sense_v2.hf.given_tables import identity_map, placed_tables, refuse_another_map
from sense_v2.hf.memory import EngramMemory, MemoryOfSeveralTables, attached_memory, memory_of
from sense_v2.hf.model_methods import replace_methods
from sense_v2.hf.saving.model_config import forget_announcement

# An embedding is often padded; with more rows without a token than this, and than a sixteenth of the tokens, the map
# is another tokenizer's.
MAX_PADDED_ROWS = 1024


def attach_engram(
    model: PreTrainedModel,
    config: EngramConfig,
    tokenizer: Any = None,
    *,
    mode: str = "r+",
    storage: Any = None,
) -> PreTrainedModel:
    """Put memory before the decoder layers named by `config.layer_indices`, in place.

    The fusion layers get the backbone's dtype and device. A fresh memory changes no output, except in the variant
    `longcat_flash`, which divides what it is added to. A KV cache also keeps what the memory needs of earlier tokens;
    one that the model filled without this memory is refused.

    Args:
        model: A model of transformers, or a PEFT model around one.
        config: The memory. `enabled=False` attaches nothing and warns.
        tokenizer: Whatever `EngramTokenizerBuilder` takes. It makes the shadow map if there is none at
            `config.shadow_map_path`; a map that exists is checked against it.
        mode: With "r+" a table that doesn't exist is created. With "r" nothing on disk changes, and the folder need
            not be writable.
        storage: A table that is open already, in place of the one at `config.storage_path`; the caller that opened it
            closes it. If each layer has its own, {layer of the model: table}. A released table (its rows are read
            while the fusion layers train) may stand before any layer; `config` is then `table.config`, with
            `num_streams` as the model has them.

    Returns:
        `model`.

    Raises:
        ValueError: The model has no such layer, a table or map doesn't match, or memory is attached already.
        FileNotFoundError: There is neither a shadow map nor a tokenizer to make one.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = attach_engram(LlamaForCausalLM(...), EngramConfig(layer_indices=[1]), tokenizer)  # doctest: +SKIP
    """
    config.validate()
    wrapped = _wrapped_by_peft(model)
    if wrapped is not None:
        refuse_virtual_tokens(model, model.base_model is wrapped)
        attach_engram(wrapped, config, tokenizer, mode=mode, storage=storage)
        if attached_memory(wrapped) is not None:
            follow_wrapper(model, memory_of(wrapped))
        return model
    if attached_memory(model) is not None:
        raise with_way_out(ValueError("this model has memory attached already"), "call detach_engram(model) first")
    if not config.enabled:
        warnings.warn("EngramConfig.enabled is False: no memory is attached", UserWarning, stacklevel=2)
        return model
    forget_announcement(model)
    named, config = config.storage_path, with_paths(config, tokenizer)
    layers = decoder_layers(model)
    depth = len(layers)
    text_config = model.config.get_text_config()
    if config.num_streams > 1 and not (getattr(text_config, "hc_mult", 0) or getattr(text_config, "hc_count", 0)):
        raise with_way_out(
            ValueError(
                f"EngramConfig.num_streams = {config.num_streams}, and {type(model).__name__} has one residual stream"
            ),
            "pass dataclasses.replace(config, num_streams=1)",
        )
    given = None if storage is None else placed_tables(storage, config)
    places = config.layer_indices if given is None else sorted(given)
    for layer_id in places:
        if not 0 <= layer_id < depth:
            where = "EngramConfig.layer_indices" if given is None else "storage"
            raise ValueError(
                f"{where} holds {layer_id}, but this {type(model).__name__} has {depth} layers (0 to {depth - 1})"
            )
    base, hands_down = _judge_layers(model, layers, int(text_config.hidden_size), config)
    tables = [] if given is None else [table for _, table in given.values()]
    num_embeddings = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # transformers says Module
    shadow_map = shadow_map_of(config, tokenizer, tables, num_embeddings)
    _check_vocabulary(shadow_map, num_embeddings)
    refuse_another_map(tables, shadow_map)
    hidden_size, pad_token_id = int(text_config.hidden_size), getattr(model.config, "pad_token_id", None)
    kind = EngramMemory if len({id(table) for table in tables}) < 2 else MemoryOfSeveralTables
    memory = kind(config, hidden_size, shadow_map, pad_token_id, mode, given)
    if named is None and given is None and memory.storage.committed_step:
        warnings.warn(
            f"{memory.storage.path} was trained before, up to step {memory.storage.committed_step}, and this memory "
            "goes on with its rows; EngramConfig.storage_path names another table",
            UserWarning,
            stacklevel=2,
        )
    memory.to(**_compute_type(model, layers[places[0]]))
    memory.train(model.training)

    model.engram = memory
    # Not closures: a deep copy of the model copies what partial objects hold, so that its hooks are its own.
    names = tuple(inspect.signature(base.forward).parameters)
    carry = partial(carry_inputs, memory, memory.layers, names, num_embeddings, hands_down)
    memory.undo.append(base.register_forward_pre_hook(carry, with_kwargs=True))
    if not hands_down:
        memory.undo += [
            model.register_forward_pre_hook(note_given, with_kwargs=True),
            base.register_forward_hook(forget_call, always_call=True),
        ]
    for layer_id, layer in enumerate(layers):
        hook = partial(add_memory, memory, memory.layers, layer_id)
        memory.undo.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    memory.undo += replace_methods(model)
    torch.compiler.reset()  # what was compiled without these hooks has no guard on them
    return model


def detach_engram(model: PreTrainedModel) -> PreTrainedModel:
    """Take the memory off again; the model is what it was before, bit for bit. The table stays on disk.

    Rows that were trained since the last `storage.flush()` are flushed first. Raises `ValueError` if nothing is
    attached.
    """
    memory = memory_of(model)
    wrapped = _wrapped_by_peft(model)
    if wrapped is not None:
        detach_engram(wrapped)
        return model
    for storage in memory.storages:
        if storage.mode == "r+":
            storage.flush()
    for change in memory.undo:
        change.remove()
    for answering in (memory, *memory):
        operators.release(answering.handle)
    torch.compiler.reset()
    del model.engram
    if memory.owns_tables:
        memory.storage.close()
    return model


class _Reached(Exception):
    """The first layer was called, with these arguments."""


def _judge_layers(
    model: PreTrainedModel, layers: nn.ModuleList, hidden_size: int, config: EngramConfig
) -> tuple[nn.Module, bool]:
    """Call the model with two sequences of three tokens, as far as its first layer.

    Returns:
        The module around the layers that the model calls with token ids (some pass the base model by), and whether
        all hand down what they were called with besides.

    Raises:
        ValueError: The layers' hidden states aren't what memory is added to.
    """
    called: list[tuple[nn.Module, bool]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        called.append((module, MASK_ARGUMENT in kwargs))
        return (args, {**kwargs, CARRIER: None}) if len(called) == 1 and _takes_more(module) else None

    def stop(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    owner = next(module for module in model.modules() if any(child is layers for child in module.children()))
    device: Any = model.get_input_embeddings().weight.device
    is_padding = getattr(model.config, "pad_token_id", None) == 0
    token_ids_BT = torch.full((2, 3), int(is_padding), device="cpu" if device.type == "meta" else device)
    given: dict[str, Any] = {MASK_ARGUMENT: None} if _takes_more(model) else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in {model.base_model, owner}]
    hooks.append(layers[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True))
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            model(token_ids_BT, **given)
    except _Reached as reached:
        args, kwargs = reached.args
    except Exception:
        args = None  # it takes more than token ids, and its first call says what is wrong
    else:
        args = None
    finally:
        for hook in hooks:
            hook.remove()
    if args is None or not called:
        return model.base_model, _takes_more(model.base_model)
    hidden = args[0] if args else kwargs.get("hidden_states")
    found = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else None
    streams = (config.num_streams,) if config.num_streams > 1 else ()
    if found != (2, 3, *streams, hidden_size):
        way_out = "this model type isn't supported"
        if found is not None and len(found) == 4 and found[:2] == (2, 3) and found[3] == hidden_size:
            way_out = f"pass dataclasses.replace(config, num_streams={found[2]}), with a variant that has streams"
        raise with_way_out(
            ValueError(
                f"{type(model).__name__} calls its layers with hidden states {found} for 2 sequences of 3 tokens, "
                f"and memory of EngramConfig.num_streams = {config.num_streams} is added to "
                f"{(2, 3, *streams, hidden_size)}"
            ),
            way_out,
        )
    base, is_given = called[0]
    return base, CARRIER in kwargs and (is_given or MASK_ARGUMENT not in given)


def _takes_more(module: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def _compute_type(model: PreTrainedModel, layer: nn.Module) -> dict[str, Any]:
    """Find the dtype and the device that a layer computes with: those of its weights, unless they are codes of a
    quantized model, or lie elsewhere until accelerate's hooks bring them."""
    weights = [*layer.parameters(), *model.get_input_embeddings().parameters(), *model.parameters()]
    hooks = [getattr(module, "_hf_hook", None) for module in layer.modules()]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    devices += [weight.device for weight in weights if not weight.is_meta]
    if weights[0].itemsize == 1:  # its scales can be of another type than what flows between layers
        weights = weights[len(list(layer.parameters())) :]
    return {
        "device": next((device for device in devices if device is not None), weights[0].device),
        "dtype": next(weight.dtype for weight in weights if weight.is_floating_point() and weight.itemsize > 1),
    }


def _wrapped_by_peft(model: Any) -> PreTrainedModel | None:
    """Return the model inside a PEFT one, which hands `engram` on; None for any other."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the backbone's layers: the one `ModuleList` of the base model as long as the configuration says.

    Raises `ValueError` if there is none, or more than one.
    """
    config = model.config.get_text_config()
    depth = int(config.num_hidden_layers)
    outer = _lists_of(model.base_model, depth)
    # LongCat-Flash counts two for each: a layer has two attentions.
    if len(outer) != 1 and isinstance(getattr(config, "num_layers", None), int):
        outer = _lists_of(model.base_model, config.num_layers)
    if len(outer) != 1:
        names = ", ".join(outer) or "none"
        raise ValueError(f"can't tell the {depth} layers of {type(model).__name__} apart: candidates are {names}")
    return next(iter(outer.values()))


def with_paths(config: EngramConfig, tokenizer: Any) -> EngramConfig:
    """Name the files that `config` leaves open, after `tokenizer` in any of the forms that `attach_engram` takes."""
    name = tokenizer if isinstance(tokenizer, (str, os.PathLike)) else None
    for attribute in ("tokenizer_name", "name_or_path"):
        name = name or getattr(tokenizer, attribute, None)
    storage_path, shadow_map_path = config.paths(None if name is None else os.fspath(name))
    return dataclasses.replace(config, storage_path=storage_path, shadow_map_path=shadow_map_path)


def _lists_of(base: nn.Module, depth: int) -> dict[str, nn.ModuleList]:
    found = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and not name.startswith("engram.")
    }
    # A list inside another's layers (experts, say) is not the backbone's.
    return {name: found[name] for name in found if not any(name.startswith(f"{other}.") for other in found)}


def shadow_map_of(
    config: EngramConfig, tokenizer: Any, tables: Sequence[Any], num_embeddings: int
) -> EngramTokenizer:
    """Open the map at `config.shadow_map_path`, made from `tokenizer` if there is none, else checked against it."""
    path = Path(with_paths(config, tokenizer).paths()[1])
    if isinstance(tokenizer, EngramTokenizer):
        return tokenizer
    if not VARIANTS[config.variant].compresses:
        return identity_map(config, tables, num_embeddings)
    if not path.exists():
        if tokenizer is None:
            raise with_way_out(
                FileNotFoundError(f"{path}: no shadow map there"),
                "pass attach_engram(..., tokenizer=...) to make one, or run `sense-engram setup`",
            )
        EngramTokenizerBuilder(tokenizer, normalization=config.normalization).build_mapping(path)
        return EngramTokenizer(path)
    shadow_map = EngramTokenizer(path)
    if shadow_map.normalization not in (None, config.normalization):
        raise ValueError(
            f"EngramConfig.normalization = {config.normalization!r}, but the shadow map {path} was made with "
            f"{shadow_map.normalization!r}"
        )
    if tokenizer is not None:
        expected = EngramTokenizerBuilder(tokenizer, normalization=config.normalization).description().sha256
        if shadow_map.sha256 != expected:
            raise with_way_out(
                ValueError(
                    f"the shadow map {path} (tokenizer {shadow_map.tokenizer_name}, SHA-256 {shadow_map.sha256}) "
                    f"was not made from this tokenizer (its map's SHA-256 is {expected})"
                ),
                "use the tokenizer it was made from, or another EngramConfig.shadow_map_path",
            )
    return shadow_map


def _check_vocabulary(shadow_map: EngramTokenizer, num_embeddings: int) -> None:
    """A few tokens may lack a row: one that was added for other models of the family, or for padding."""
    size, spare = shadow_map.vocab_size, num_embeddings - shadow_map.vocab_size
    if not -1 - size // 1000 <= spare <= max(MAX_PADDED_ROWS, size // 16):
        raise with_way_out(
            ValueError(
                f"the shadow map {shadow_map.path} covers {size} token ids, the model embeds "
                f"{num_embeddings}: it was made from another tokenizer"
            ),
            "make one with `sense-engram setup --tokenizer …`",
        )
    shadow_map.cover(num_embeddings)
