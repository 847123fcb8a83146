"""A call's token ids, mask, positions and cache -> what the memory layers need of it: `EngramInputs`.

Everything here depends on the tokens alone, so it is known before the first layer runs. Of the tokens before, which
generation doesn't give again, it takes what the cache has kept: compressed ids for the n-grams, and positions, which
say where packed documents begin. Positions that go on belong to the document before, in a cache as anywhere else.

L layers with memory, B batch, T sequence, P positions of the past, Q = P + T, H rows a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from sense_v2.engram.hashing import NO_TOKEN
from sense_v2.engram.model import packed_documents
from sense_v2.hf.cache import COMPRESSED_ID, POSITION, VALID, EngramState
from sense_v2.hf.memory import EngramMemory

# The keyword argument that carries `EngramInputs` from the base model's hook through transformers' **kwargs.
CARRIER = "engram_inputs"
# Token ids for a call with `inputs_embeds`: the memory is looked up by ids.
IDS_ARGUMENT = "engram_input_ids"
# A mask [B, T] beside an attention mask that was prepared already.
MASK_ARGUMENT = "engram_attention_mask"
# What models call the state of the tokens before. 5.24 renamed past_key_values.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass
class EngramInputs:
    """What the memory layers need of one forward call."""

    row_ids_LBTH: torch.Tensor
    valid_BT: torch.Tensor | None
    documents_BQ: torch.Tensor | None
    tokens_BT3: torch.Tensor
    """What the cache keeps of these tokens."""
    num_past: int
    """P: how many positions before these the call can see."""
    state: EngramState | None
    is_kept: bool = False
    """Whether the cache has these tokens already: the first layer with memory puts them there."""


def engram_inputs(
    memory: EngramMemory,
    token_ids_BT: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    state: EngramState | None,
) -> EngramInputs:
    """Everything about a call that token ids decide: which rows each position needs, and where memory stops."""
    if token_ids_BT.dim() != 2:
        raise ValueError(f"input_ids have shape {tuple(token_ids_BT.shape)}; expected [batch, sequence]")
    length: int | torch.Tensor = 0 if state is None else state.length
    valid_BT = None if mask is None else _newest(mask.to(token_ids_BT.device), token_ids_BT, length) != 0
    positions_BT = None
    if position_ids is not None:
        num_new = token_ids_BT.shape[1]
        if tuple(position_ids.shape) not in ((1, num_new), tuple(token_ids_BT.shape)):
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}; expected that of input_ids, "
                f"{tuple(token_ids_BT.shape)}"
            )
        positions_BT = position_ids.to(token_ids_BT.device).expand_as(token_ids_BT)

    past_BP3 = None if state is None else state.recent_tokens()
    documents_BQ = documents_BT = history_BP = None
    if past_BP3 is None:
        if positions_BT is not None:
            documents_BQ = documents_BT = packed_documents(positions_BT)
    else:
        if past_BP3.shape[0] != token_ids_BT.shape[0]:
            raise ValueError(f"the cache holds {past_BP3.shape[0]} sequences, input_ids have {token_ids_BT.shape[0]}")
        past_BP3 = past_BP3.to(token_ids_BT.device)
        if positions_BT is None:
            positions_BT = _counted(token_ids_BT, length)
        reachable_BP = past_BP3[..., VALID] != 0
        documents_BQ = packed_documents(torch.cat([past_BP3[..., POSITION], positions_BT], dim=1))
        if documents_BQ is not None:
            num_past = past_BP3.shape[1]
            documents_BT = documents_BQ[:, num_past:]
            reachable_BP = reachable_BP & (documents_BQ[:, :num_past] == documents_BT[:, :1])
        history_BP = past_BP3[..., COMPRESSED_ID].masked_fill(~reachable_BP, NO_TOKEN)
    compressed_BT, row_ids_LBTH = memory.row_ids(token_ids_BT, history_BP, valid_BT, documents_BT)
    memory.begin_rows(row_ids_LBTH, valid_BT)
    is_valid_BT = torch.ones_like(compressed_BT) if valid_BT is None else valid_BT.long()
    kept_positions_BT = _counted(token_ids_BT, length) if positions_BT is None else positions_BT.long()
    return EngramInputs(
        row_ids_LBTH=row_ids_LBTH,
        valid_BT=valid_BT,
        documents_BQ=documents_BQ,
        tokens_BT3=torch.stack([compressed_BT, is_valid_BT, kept_positions_BT], dim=-1),
        num_past=0 if past_BP3 is None else past_BP3.shape[1],
        state=state,
    )


def _counted(token_ids_BT: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
    """Positions of a call that names none, as models count them: on from the cache's length."""
    return (torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device) + length).expand_as(token_ids_BT)


def _newest(mask: torch.Tensor, token_ids_BT: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
    """The new tokens' part [B, T] of a mask over them alone, or over all tokens of the cache and them."""
    num_tokens, num_new = mask.shape[1], token_ids_BT.shape[1]
    if mask.shape[0] != token_ids_BT.shape[0] or num_tokens < num_new:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [{token_ids_BT.shape[0]}, {num_new}], or as "
            "many more as the cache holds tokens, with 0 at padding"
        )
    if num_tokens == num_new:
        return mask
    if isinstance(length, torch.Tensor):
        places_T = torch.arange(num_new, device=mask.device) + length.to(mask.device)
        return mask.index_select(1, places_T)
    if num_tokens < length + num_new:
        raise ValueError(
            f"attention_mask covers {num_tokens} tokens; the cache holds {length} and input_ids {num_new} more: "
            f"expected {num_new} or {length + num_new}"
        )
    return mask[:, length : length + num_new]


def cache_in(arguments: dict[str, Any]) -> Cache | None:
    """The KV cache among a call's arguments, by its type, under whatever name; one that isn't looked for would be
    wrong tokens instead of an error. Raises `ValueError` for a state of earlier tokens that is none."""
    for value in arguments.values():
        if isinstance(value, Cache):
            return value
    for name in CACHE_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name} is a {type(arguments[name]).__name__}, no transformers Cache: the memory has no place in it "
                "for what it must know of earlier tokens; call with use_cache=False"
            )
    return None


def prepare_inputs_with_memory(
    model: Any,
    input_ids: Any,
    *args: Any,
    engram_input_ids: Any = None,
    engram_attention_mask: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """What generate calls the model with: the class's own, and ids and mask where it leaves them out."""
    inputs = type(model).prepare_inputs_for_generation(model, input_ids, *args, **kwargs)
    embeds = inputs.get("inputs_embeds")
    if embeds is not None and inputs.get("input_ids") is None:
        ids_BT = input_ids if engram_input_ids is None else engram_input_ids
        if ids_BT is not None and ids_BT.shape[1] >= embeds.shape[1]:
            inputs[IDS_ARGUMENT] = ids_BT[:, -embeds.shape[1] :]
    mask = inputs.get("attention_mask")
    if mask is not None and not is_plain_mask(mask):
        plain = engram_attention_mask if engram_attention_mask is not None else kwargs.get("attention_mask")
        if plain is None:
            new = embeds if inputs.get("input_ids") is None else inputs["input_ids"]
            plain = torch.ones(new.shape[:2], dtype=torch.int64, device=new.device)
        if is_plain_mask(plain):
            inputs[MASK_ARGUMENT] = plain
    return inputs


def is_plain_mask(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2
