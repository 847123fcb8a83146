"""A model with memory and blocks of tokens -> what the memory did at each of them.

One forward with memory and one without give the losses. A hook on each gate sees the gates, and the hidden states
that they were computed from; with the looked up rows these say how much of what was added came from each n-gram
length:

    share of order n = |α · W_v[:, columns of n] rows_n| / |h|

the length of that order's part of the value against the hidden state's, before the convolution.

L layers with memory, O n-gram orders, B blocks, T tokens of a block, H rows a position, D row width, C hidden size,
S residual streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sense_v2.engram.model import EngramFusionLayer
from sense_v2.hf.insight.evaluation import gates_seen, token_losses
from sense_v2.hf.insight.interventions import memory_off
from sense_v2.hf.memory import EngramMemory, memory_of


@dataclass
class Observation:
    """Arrays on the CPU; memory follows the text, not the table."""

    token_ids_BT: np.ndarray[Any, Any]
    compressed_ids_BT: np.ndarray[Any, Any]
    losses_with_BT: np.ndarray[Any, Any]
    """[B, T - 1], nats: of each block's tokens but its first."""
    losses_without_BT: np.ndarray[Any, Any]
    gates_LBT: np.ndarray[Any, Any]
    """The mean over streams."""
    shares_LOBT: np.ndarray[Any, Any]
    """What each order's rows add, as a share of the hidden state's length (the mean over streams)."""
    row_ids_LBTH: np.ndarray[Any, Any]
    row_norms_LBTH: np.ndarray[Any, Any]


def observe(
    model: PreTrainedModel,
    token_ids_BT: torch.Tensor,
    *,
    batch_size: int = 8,
    advance: Callable[[int], Any] = lambda num_blocks: None,
) -> Observation:
    """Runs the blocks with memory and without; `advance` is told of each block that was computed, twice B in all.

    Nothing changes. Raises `ValueError` where the model has no memory, and as `token_losses`.
    """
    memory = memory_of(model)
    parts = []
    for part_BT in token_ids_BT.split(batch_size):
        parts.append(_observe_batch(model, memory, part_BT, advance))
    joined = {name: np.concatenate([part[name] for part in parts], axis=axis) for name, axis in _BATCH_AXES.items()}
    return Observation(**joined)


_BATCH_AXES = {
    "token_ids_BT": 0,
    "compressed_ids_BT": 0,
    "losses_with_BT": 0,
    "losses_without_BT": 0,
    "gates_LBT": 1,
    "shares_LOBT": 2,
    "row_ids_LBTH": 1,
    "row_norms_LBTH": 1,
}


def _observe_batch(
    model: PreTrainedModel, memory: EngramMemory, token_ids_BT: torch.Tensor, advance: Callable[[int], Any]
) -> dict[str, np.ndarray[Any, Any]]:
    with gates_seen(memory) as seen:
        with_BT = token_losses(model, token_ids_BT, batch_size=len(token_ids_BT))
    advance(len(token_ids_BT))
    with memory_off(memory):
        without_BT = token_losses(model, token_ids_BT, batch_size=len(token_ids_BT))
    advance(len(token_ids_BT))
    gates, shares, row_ids, row_norms = [], [], [], []
    for fusion in memory:
        alpha_BTS, hidden_BTSC = seen[fusion.layer_id]
        row_ids_BTH = fusion.row_ids(token_ids_BT)
        with torch.no_grad():
            rows_BTHD = memory.storage.gather(row_ids_BTH).view(*row_ids_BTH.shape, -1)
            hidden_norms_BTS = hidden_BTSC.float().norm(dim=-1)
            shares.append(_order_shares(fusion, rows_BTHD, alpha_BTS.float(), hidden_norms_BTS))
        gates.append(alpha_BTS.float().mean(-1).cpu().numpy())
        row_ids.append(row_ids_BTH.numpy())
        row_norms.append(rows_BTHD.norm(dim=-1).numpy())
    return {
        "token_ids_BT": token_ids_BT.numpy(),
        "compressed_ids_BT": memory.tokenizer(token_ids_BT).numpy(),
        "losses_with_BT": with_BT.numpy(),
        "losses_without_BT": without_BT.numpy(),
        "gates_LBT": np.stack(gates),
        "shares_LOBT": np.stack(shares),
        "row_ids_LBTH": np.stack(row_ids),
        "row_norms_LBTH": np.stack(row_norms),
    }


def _order_shares(
    fusion: EngramFusionLayer, rows_BTHD: torch.Tensor, alpha_BTS: torch.Tensor, hidden_norms_BTS: torch.Tensor
) -> np.ndarray[Any, Any]:
    """[O, B, T]; see the module."""
    weight_CE = fusion.W_v.weight.float()
    num_orders = len(fusion.config.ngram_orders)
    factor_BT = (alpha_BTS / hidden_norms_BTS.clamp_min(1e-12)).mean(-1)
    columns = weight_CE.shape[1] // num_orders
    found = []
    for place in range(num_orders):
        own = slice(place * columns, (place + 1) * columns)
        rows_BTE = rows_BTHD.flatten(-2)[..., own].to(weight_CE.device)
        lengths_BT = (rows_BTE @ weight_CE[:, own].T).norm(dim=-1)
        found.append((factor_BT * lengths_BT).cpu().numpy())
    return np.stack(found)
