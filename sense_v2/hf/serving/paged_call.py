"""One step of an engine that batches continuously, as the memory layers see it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from sense_v2.engram.hashing import TokenRows
from sense_v2.hf.memory import EngramMemory
from sense_v2.hf.serving.paged_state import Step

# Compressed ids as they are kept: a vocabulary has fewer.
ID_DTYPE = torch.int32


class PagedCall(ABC):
    """A step of N sequences, whose engine keeps their state in its pages.

    N sequences, T new tokens of all of them, Q positions with their pasts, X channels, H rows a position.
    """

    step: Step

    @abstractmethod
    def exchange(self, layer_id: int | None, values_TX: torch.Tensor) -> torch.Tensor:
        """Keep values of the new tokens (of a layer's convolution; None: their compressed ids). Return them in their
        places behind those of the pasts, [Q, X]."""

    def rows(self, memory: EngramMemory, token_ids_BT: torch.Tensor) -> TokenRows:
        """Find the rows of the step's tokens [1, T], by their own sequences' pasts."""
        compressed_BT = memory.tokenizer(token_ids_BT)
        ids_1Q = self.exchange(None, compressed_BT[0, :, None].to(ID_DTYPE))[None, :, 0].long()
        masks = {"attention_mask": self.step.known()[None], "sequence_ids": self.step.documents_Q[None]}
        row_ids_LBQH = torch.stack([fusion.hasher(ids_1Q, **masks) for fusion in memory])
        return TokenRows(
            row_ids_LBTH=row_ids_LBQH[:, :, self.step.places_T],
            valid_BT=None,
            documents_BQ=self.step.documents_Q[None],
            compressed_BT=compressed_BT,
            positions_BT=None,
            num_past=0,
            places_T=self.step.places_T,
        )

    def remember(self, layer_id: int, inputs_BTX: torch.Tensor) -> torch.Tensor:
        """Do what `EngramState.remember` does, for Q positions."""
        return self.exchange(layer_id, inputs_BTX[0])[None]
