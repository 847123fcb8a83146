"""One step of an engine that batches continuously, as the memory layers see it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from sense_v2.engram.delta.chosen_rows import numbered
from sense_v2.engram.hashing import TokenRows, hash_layers
from sense_v2.hf.memory import EngramMemory
from sense_v2.hf.serving.paged_state import Step

# Compressed ids and the numbers of overlays as they are kept: there are fewer.
ID_DTYPE = torch.int32
TOKEN_VALUES = 2
"""What is kept of a token beside what convolutions read: its compressed id, and the number of its overlay."""


class PagedCall(ABC):
    """A step of N sequences, whose engine keeps their state in its pages.

    N sequences, T new tokens of all of them, Q positions with their pasts, X channels, H rows a position.
    """

    step: Step

    @abstractmethod
    def exchange(self, layer_id: int | None, values_TX: torch.Tensor) -> torch.Tensor:
        """Keep values of the new tokens (of a layer's convolution; None: their `TOKEN_VALUES`). Return them in their
        places behind those of the pasts, [Q, X]."""

    def rows(
        self, memory: EngramMemory, token_ids_BT: torch.Tensor, overlays_BT: torch.Tensor | None = None
    ) -> TokenRows:
        """Find the rows of the step's tokens [1, T], by their own sequences' pasts.

        Args:
            memory: Of the model.
            token_ids_BT: The tokens.
            overlays_BT: The number of each one's overlay; a token that was generated may have 0.
        """
        step, compressed_BT = self.step, memory.tokenizer(token_ids_BT)
        given_BT = torch.zeros_like(compressed_BT) if overlays_BT is None else overlays_BT
        kept_T2 = torch.stack([compressed_BT[0], given_BT[0]], dim=-1).to(ID_DTYPE)
        found_Q2 = self.exchange(None, kept_T2).long()
        hashers = [fusion.hasher for fusion in memory]
        known_BQ, found_BQ = step.as_batch(step.known()), step.as_batch(found_Q2[:, 0])
        row_ids_LBQH = hash_layers(hashers, found_BQ, known_BQ, step.documents_BQ)
        row_ids_LBTH = row_ids_LBQH.flatten(1, 2)[:, None, step.places_T]
        if overlays_BT is not None:
            # A sequence has one overlay: a token that doesn't name it has that of the tokens before.
            of_each = torch.zeros_like(step.documents_Q).scatter_reduce(0, step.documents_Q, found_Q2[:, 1], "amax")
            overlays_T = of_each[step.documents_Q[step.places_T]]
            row_ids_LBTH = numbered(row_ids_LBTH, overlays_T[:, None])
            self.exchange(None, torch.stack([kept_T2[:, 0], overlays_T.to(ID_DTYPE)], dim=-1))
        return TokenRows(
            row_ids_LBTH=row_ids_LBTH,
            valid_BT=None,
            documents_BQ=step.documents_BQ,
            compressed_BT=compressed_BT,
            positions_BT=None,
            num_past=0,
            places_T=step.places_T,
        )

    def remember(self, layer_id: int, inputs_BTX: torch.Tensor) -> torch.Tensor:
        """Do what `EngramState.remember` does, for Q positions, as `Step.as_batch` lays them out."""
        return self.step.as_batch(self.exchange(layer_id, inputs_BTX[0]))
