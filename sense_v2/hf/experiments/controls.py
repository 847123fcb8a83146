"""Controls: the same training with one thing taken away, to see where a gain comes from.

`freeze_rows`: the rows stay the random noise they started as; the fusion layers learn. What gain remains comes from
more weights and from random features of n-grams, not from anything stored in the table.

`permute_rows`: rows are learned, but every batch hands them to positions at random, drawn anew. What gain remains
comes from more parameters and updates, not from looking the right rows up.

B batch, T sequence, H rows a position, P positions that aren't padding.
"""

from __future__ import annotations

from typing import Any

import torch

from sense_v2.engram.hashing import NgramHasher
from sense_v2.hf.memory import EngramMemory


def freeze_rows(memory: EngramMemory) -> None:
    """The table keeps its initial noise."""
    memory.storage.requires_grad_(False)


def permute_rows(memory: EngramMemory, seed: int) -> None:
    """Row ids are permuted over all positions of a batch, anew at each call, in training and evaluation.

    Not for gradient checkpointing, which computes a layer twice and must find the same rows.
    """
    for layer in memory:
        layer.hasher = PermutedHasher(layer.hasher, seed + layer.layer_id)  # type: ignore[assignment]


class PermutedHasher:
    """A hasher whose row ids [B, T, H] are dealt to other positions; a position's H rows stay together, and padding
    is dealt none."""

    def __init__(self, hasher: NgramHasher, seed: int) -> None:
        self.hasher = hasher
        self.layout, self.layer_id = hasher.layout, hasher.layer_id
        self.pad_id, self.look_back = hasher.pad_id, hasher.look_back
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, compressed_ids_BT: torch.Tensor, *, attention_mask: torch.Tensor | None = None, **masks: Any
    ) -> torch.Tensor:
        row_ids_BTH = self.hasher(compressed_ids_BT, attention_mask=attention_mask, **masks)
        valid_BT = torch.ones_like(compressed_ids_BT) if attention_mask is None else attention_mask
        valid_BT = valid_BT.to(row_ids_BTH.device) != 0
        dealt_PH = row_ids_BTH[valid_BT]
        order_P = torch.randperm(len(dealt_PH), generator=self.generator).to(dealt_PH.device)
        return row_ids_BTH.masked_scatter(valid_BT[..., None], dealt_PH[order_P])
