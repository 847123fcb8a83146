"""Controls: the same model and training with one thing taken away, to see where a gain comes from.

`freeze_rows`: the rows stay the random noise they started as; the fusion layers learn. What gain remains comes from
more weights and from random features of n-grams, not from anything stored in the table.

`permute_rows`: rows are learned, but every batch hands them to positions at random, drawn anew. What gain remains
comes from more parameters and updates, not from looking the right rows up.
"""

from __future__ import annotations

from typing import Any

import torch

from sense_v2.engram.hashing import NgramHasher
from sense_v2.hf.attach import EngramMemory


def freeze_rows(memory: EngramMemory) -> None:
    """The table keeps its initial noise."""
    memory.storage.requires_grad_(False)


def permute_rows(memory: EngramMemory, seed: int) -> None:
    """Row ids are permuted over all positions of a batch, anew at each call, in training and evaluation."""
    for layer in memory:
        layer.hasher = PermutedHasher(layer.hasher, seed + layer.layer_id)  # type: ignore[assignment]


class PermutedHasher:
    """A hasher whose row ids [B, T, H] are dealt to the wrong positions; a position's H rows stay together."""

    def __init__(self, hasher: NgramHasher, seed: int) -> None:
        self.hasher = hasher
        self.layout = hasher.layout
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, compressed_ids_BT: torch.Tensor, **masks: Any) -> torch.Tensor:
        row_ids_BTH = self.hasher(compressed_ids_BT, **masks)
        positions = row_ids_BTH.flatten(0, 1)
        order = torch.randperm(len(positions), generator=self.generator).to(positions.device)
        return positions[order].view_as(row_ids_BTH)
