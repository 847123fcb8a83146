"""The hooks of an attached model: a call's tokens become row ids, and memory is added before the layers.

    model(input_ids) ──base model──▶ `carry_inputs`: row ids, mask, documents ride along as a keyword argument
                     ──each layer──▶ `add_memory`: hidden states + memory ──▶ the layer as it was

They travel as an argument, not as state on a module: gradient checkpointing replays a layer with the arguments it was
first called with, and two forwards (or two threads) never see each other's ids. (Mamba, BLOOM, OPT and others hand no
argument down to their layers. There they lie in a context variable while the call lasts, which a compiler doesn't
follow.)

Which rows a call needs depends on its tokens alone, so it is known before the first layer runs. What it must know of
earlier tokens is in the model's KV cache (`sense_v2.hf.cache`).

L layers with memory, B batch, T sequence, H rows a position, X channels of the convolution.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from sense_v2.core.errors import with_way_out
from sense_v2.engram.delta.chosen_rows import numbered
from sense_v2.engram.hashing import OVERLAY, TokenRows, token_rows
from sense_v2.hf.cache import EngramState, state_in
from sense_v2.hf.memory import EngramMemory
from sense_v2.hf.overlays import chosen_numbers, overlay_names
from sense_v2.hf.serving.continuous_batching import paged_call
from sense_v2.hf.serving.paged_call import PagedCall

# The keyword argument that carries `EngramInputs` from the base model's hook through transformers' **kwargs.
CARRIER = "engram_inputs"
# Token ids for a call with `inputs_embeds`: the memory is looked up by ids.
IDS_ARGUMENT = "engram_input_ids"
# A mask [B, T] beside an attention mask that was prepared already.
MASK_ARGUMENT = "engram_attention_mask"
# The overlay of each sequence: names and None, or one name for all.
OVERLAY_ARGUMENT = "overlay"
_OF_MEMORY = (IDS_ARGUMENT, MASK_ARGUMENT, OVERLAY_ARGUMENT)
# What models call the state of the tokens before. 5.24 renamed past_key_values.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass
class EngramInputs:
    """What the memory layers need of one forward call."""

    rows: TokenRows
    state: EngramState | PagedCall | None
    is_kept: bool = False
    """True if the state has these tokens already: the first layer that has the cache puts them there."""


_call: ContextVar[EngramInputs | None] = ContextVar("engram_inputs", default=None)
"""Of a model that hands nothing down, in the thread that calls it."""
_given: ContextVar[dict[str, Any]] = ContextVar("engram_arguments", default={})  # noqa: B039  # never changed in place
"""The arguments for the memory that such a model was called with."""


def carry_inputs(
    memory: EngramMemory,
    fusions: nn.ModuleDict,
    names: tuple[str, ...],
    num_embeddings: int,
    hands_down: bool,
    base: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Find ids, mask, positions and cache among the base model's arguments, and send along what the layers need.

    `fusions` are `memory.layers`, `names` the positional arguments' in their order, `num_embeddings` the model's when
    memory was attached, and `hands_down` says that its layers get the arguments that it was called with.
    """
    if memory.training and not torch.compiler.is_compiling():
        memory.refuse_adapters()
    given = kwargs if hands_down else {**_given.get(), **kwargs}
    given_ids_BT, given_mask = given.get(IDS_ARGUMENT), given.get(MASK_ARGUMENT)
    kwargs = {name: value for name, value in kwargs.items() if name not in _OF_MEMORY}
    # Of one length: before 2.8, torch.compile takes `strict=False` for True.
    arguments = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
    token_ids_BT = arguments.get("input_ids") if given_ids_BT is None else given_ids_BT
    if token_ids_BT is None:
        raise with_way_out(
            ValueError("memory is looked up by token ids, and this call has none (inputs_embeds alone)"),
            f"pass the ids along as {IDS_ARGUMENT}=…",
        )
    current = base.get_input_embeddings().weight.shape[0]
    if current != num_embeddings:
        raise with_way_out(
            ValueError(f"the vocabulary was resized from {num_embeddings} to {current} after memory was attached"),
            "detach_engram, make a shadow map of the new tokenizer, attach again",
        )
    paged = paged_call(memory, arguments)
    if paged is None:
        mask = arguments.get("attention_mask") if given_mask is None else given_mask
        inputs = _with_cache(memory, fusions, token_ids_BT, mask, arguments, given.get(OVERLAY_ARGUMENT))
    else:
        overlays_BT = None
        if memory.last_overlay:  # the prompts' ids say them (`ids_with_overlay`)
            overlays_BT, token_ids_BT = token_ids_BT // num_embeddings, token_ids_BT % num_embeddings
            args = tuple(token_ids_BT if name == "input_ids" else one for name, one in zip(names, args, strict=False))
            if "input_ids" in kwargs:
                kwargs["input_ids"] = token_ids_BT
        inputs = EngramInputs(paged.rows(memory, token_ids_BT, overlays_BT), paged, is_kept=True)
    memory.begin_rows(inputs.rows.row_ids_LBTH, inputs.rows.valid_BT)
    if hands_down:
        kwargs[CARRIER] = inputs
    else:
        _call.set(inputs)
    return args, kwargs


def _with_cache(
    memory: EngramMemory,
    fusions: nn.ModuleDict,
    token_ids_BT: torch.Tensor,
    mask: Any,
    arguments: dict[str, Any],
    overlay: Any,
) -> EngramInputs:
    """Find the rows of a call's tokens, and what a cache of transformers keeps of those before them."""
    if mask is not None and not is_plain_mask(mask):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise with_way_out(
            ValueError(
                f"attention_mask is {shape}: with memory attached it must be [batch, sequence] with 0 at padding, "
                "so that n-grams can stop there"
            ),
            f"such a mask can come along as {MASK_ARGUMENT}=…",
        )
    cache = _cache_in(arguments)
    state = None if cache is None else _state_in(cache, memory)
    length = 0 if state is None else state.length
    if mask is not None and mask.shape != token_ids_BT.shape and token_ids_BT.dim() == 2:
        mask = _newest(mask, token_ids_BT, length)
    rows = token_rows(
        memory.tokenizer,
        [fusion.hasher for fusion in fusions.values()],  # type: ignore[misc]  # a ModuleDict doesn't know its modules' type
        token_ids_BT,
        mask,
        arguments.get("position_ids"),
        past_BP4=None if state is None else state.recent_tokens(),
        num_before=length,
        handle=memory.handle,
    )
    rows.overlays_B = _overlays(memory, overlay, token_ids_BT, state)
    if rows.overlays_B is not None:
        rows.row_ids_LBTH = numbered(rows.row_ids_LBTH, rows.overlays_B[:, None, None])
    return EngramInputs(rows, state)


def _overlays(
    memory: EngramMemory, overlay: Any, token_ids_BT: torch.Tensor, state: EngramState | None
) -> torch.Tensor | None:
    """Find the number of each sequence's overlay [B]: the call's choice, or what the cache was begun with."""
    if overlay is None and memory.last_overlay == 0:
        return None
    chosen_B = None if overlay is None else chosen_numbers(memory, overlay, token_ids_BT)
    past_BP4 = None if state is None else state.recent_tokens()
    if state is None or past_BP4 is None:
        return chosen_B
    past_B = past_BP4[:, -1, OVERLAY].to(token_ids_BT.device)
    if torch.compiler.is_compiling():
        return past_B if chosen_B is None else chosen_B
    if int(state.length) == 0:
        return chosen_B
    names = overlay_names(memory, past_B)
    if chosen_B is not None and not torch.equal(chosen_B, past_B):
        raise with_way_out(
            ValueError(
                f"the cache was begun with other overlays: {names}; this call chooses "
                f"{overlay_names(memory, chosen_B)}"
            ),
            "Start with a new cache",
        )
    return past_B


def note_given(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keep the memory's arguments of a call of a model that hands nothing down, also from its base model."""
    _given.set({name: kwargs[name] for name in _OF_MEMORY if name in kwargs})
    return args, {name: value for name, value in kwargs.items() if name != OVERLAY_ARGUMENT}


def forget_call(*_: Any) -> None:
    """Let go of what such a call has left in this thread."""
    _call.set(None)
    _given.set({})


def add_memory(
    memory: EngramMemory,
    fusions: nn.ModuleDict,
    layer_id: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take what was carried off a layer's arguments and, if the layer has memory, add it to its hidden states."""
    kwargs = dict(kwargs)
    carried = kwargs.pop(CARRIER, None)
    if carried is None:
        carried = _call.get()
    has_memory = str(layer_id) in fusions
    state = None
    # Most layers of most models have no memory, and nothing to keep once an earlier one has: they look for no cache.
    if carried is not None and (has_memory or not carried.is_kept):
        state = _kept_in(carried, args, kwargs, memory)
    if not has_memory:
        return args, kwargs
    if carried is None:
        raise with_way_out(
            ValueError(f"layer {layer_id} was called without token ids"), "call the model, not its layers"
        )
    rows = carried.rows
    if state is None and rows.num_past > 0:
        raise with_way_out(
            ValueError(
                "the model was given a cache that holds tokens but its layers weren't (gradient checkpointing "
                "leaves it out)"
            ),
            "call with use_cache=False and the whole sequence",
        )
    fused = fusions[str(layer_id)](
        args[0] if args else kwargs["hidden_states"],
        row_ids_BTH=rows.row_ids_LBTH[[*fusions.keys()].index(str(layer_id))],
        valid_BT=rows.valid_BT,
        documents_BQ=rows.documents_BQ,
        remember=None if state is None else partial(state.remember, layer_id),
        places_T=rows.places_T,
    )
    if args:
        return (fused, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": fused}


def _kept_in(
    carried: EngramInputs, args: tuple[Any, ...], kwargs: dict[str, Any], memory: EngramMemory
) -> EngramState | PagedCall | None:
    """The state in the layer's cache, if it has one. The first layer to have it keeps the tokens: those before the
    first memory may be all that run (`assistant_early_exit`). A cache that the model made itself is first seen here,
    and empty."""
    if isinstance(carried.state, PagedCall):
        return carried.state
    # No generator: before 2.8, torch.compile can't ask one for its first.
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    cache = caches[0] if caches else None
    if cache is None:
        return None
    if carried.state is None:
        carried.state = _state_in(cache, memory, is_new=True)
    if not carried.is_kept:
        carried.state.append_tokens(carried.rows.to_remember())
        carried.is_kept = True
    return carried.state


def _state_in(cache: Cache, memory: EngramMemory, *, is_new: bool = False) -> EngramState:
    if not memory.config.causal:
        raise with_way_out(
            ValueError("this memory looks ahead (EngramConfig.causal = False), so it can't go on from a cache"),
            "call with use_cache=False",
        )
    return state_in(cache, memory_id=memory.id, reach=memory.reach, is_new=is_new)


def _newest(mask: torch.Tensor, token_ids_BT: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
    """Cut the new tokens' part [B, T] out of a mask over all tokens of the cache and them."""
    num_tokens, num_new = mask.shape[1], token_ids_BT.shape[1]
    if mask.shape[0] != token_ids_BT.shape[0] or num_tokens < num_new:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [{token_ids_BT.shape[0]}, {num_new}], or as "
            "many more as the cache holds tokens, with 0 at padding"
        )
    if isinstance(length, torch.Tensor):
        places_T = torch.arange(num_new, device=mask.device) + length.to(mask.device)
        return mask.index_select(1, places_T)
    if num_tokens < length + num_new:
        raise ValueError(
            f"attention_mask covers {num_tokens} tokens; the cache holds {length} and input_ids {num_new} more: "
            f"expected {num_new} or {length + num_new}"
        )
    return mask[:, length : length + num_new]


def _cache_in(arguments: dict[str, Any]) -> Cache | None:
    """Find the KV cache among a call's arguments, by its type, under whatever name: one that was missed would be
    wrong tokens instead of an error. Raises `ValueError` for a state of earlier tokens of another type."""
    for value in arguments.values():
        if isinstance(value, Cache):
            return value
    for name in CACHE_ARGUMENTS:
        if arguments.get(name) is not None:
            raise with_way_out(
                ValueError(
                    f"{name} is a {type(arguments[name]).__name__}, no transformers Cache: the memory has no place "
                    "in it for what it must know of earlier tokens"
                ),
                "call with use_cache=False",
            )
    return None


def is_plain_mask(mask: Any) -> bool:
    """True for a tensor [B, T]."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2
