"""State by position: what the memory knows of earlier tokens, in the slots of a paged cache.

    step(starts_N1, …)       one step's new tokens, of N sequences   -> where each position lies
    tail(pages, …)           the P positions before each sequence's new tokens, read through the same block table
    write(pages, slots, …)   what the new positions leave behind, at the slots where their keys and values go

An engine that batches continuously keeps keys and values in slots of pages and gives each sequence a table of pages.
The memory's state (compressed ids, the convolution's inputs) is one more value a slot. So it follows a sequence
through whatever the engine does to its pages: a prefix shared by two requests, a fork, a prefill in chunks, a request
that loses its pages and is computed again, or is cancelled. Nothing is kept that belongs to a sequence by name.

A step's sequences lie one after another without padding, each behind its own past:

    past of sequence 0 (P) | its new tokens | past of sequence 1 (P) | its new tokens | …           Q positions

No position of a past before the sequence's first is `known`. There is no validity beside that, as engines feed no
padding. Pure functions of tensors: no engine is imported here.

N sequences, T new tokens of all of them, P positions of past (the memory's reach), Q = T + N·P, M pages a sequence,
S slots, X channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Step:
    """Where the positions of one step lie among its Q."""

    places_T: torch.Tensor
    """Of the new tokens."""
    past_places_NP: torch.Tensor
    """Of the sequences' pasts."""
    positions_NP: torch.Tensor
    """In its sequence, of each position of a past; negative before the sequence."""
    documents_Q: torch.Tensor
    """The sequence of each position, counted from 1: nothing reaches from one into the next."""
    one_each: bool
    """True if each sequence has one new token, as while it is decoded. Then all have the same P + 1 positions, and
    are the sequences of a batch."""

    def as_batch(self, values_QX: torch.Tensor) -> torch.Tensor:
        """Give values [B, Q / B, X] with a row of the batch to each sequence, or all in one."""
        return values_QX.view(len(self.past_places_NP) if self.one_each else 1, -1, *values_QX.shape[1:])

    @property
    def documents_BQ(self) -> torch.Tensor | None:
        """`documents_Q` of such a batch; None where its rows tell."""
        return None if self.one_each else self.documents_Q[None]

    @property
    def known_NP(self) -> torch.Tensor:
        """True where a sequence has such a position."""
        return self.positions_NP >= 0

    def interleave(self, past_NPX: torch.Tensor | None, new_TX: torch.Tensor) -> torch.Tensor:
        """Put values of the pasts and of the new tokens in their places, [Q, X]; zeros where nothing is known."""
        if self.one_each and past_NPX is not None:
            past_NPX = past_NPX.masked_fill(~self.known_NP.view(*self.known_NP.shape, 1), 0)
            return torch.cat([past_NPX.to(new_TX.dtype), new_TX[:, None]], dim=1).flatten(0, 1)
        values_QX = new_TX.new_zeros((len(self.documents_Q), *new_TX.shape[1:]))
        if past_NPX is not None:
            known_NP = self.known_NP.reshape(*self.known_NP.shape, *[1] * (new_TX.dim() - 1))
            past_NPX = past_NPX.masked_fill(~known_NP, 0).to(new_TX.dtype)
            values_QX[self.past_places_NP.flatten()] = past_NPX.flatten(0, 1)
        values_QX[self.places_T] = new_TX
        return values_QX

    def known(self) -> torch.Tensor:
        """Find which of the Q positions are: the new ones, and of the pasts those that there are."""
        if self.one_each:
            return F.pad(self.known_NP, (0, 1), value=True).flatten()
        known_Q = torch.ones_like(self.documents_Q, dtype=torch.bool)
        known_Q[self.past_places_NP.flatten()] = self.known_NP.flatten()
        return known_Q


def step(starts_N1: torch.Tensor, num_before_N: torch.Tensor, *, num_new: int, reach: int) -> Step:
    """Lay out a step's positions.

    Args:
        starts_N1: Where each sequence's new tokens begin among all T, and T.
        num_before_N: How many tokens each sequence has before its new ones.
        num_new: T, as a number: asking the tensor would wait for the device.
        reach: P.

    >>> step(torch.tensor([0, 2, 3]), torch.tensor([0, 7]), num_new=3, reach=1).documents_Q
    tensor([1, 1, 1, 2, 2])
    """
    device = starts_N1.device
    positions_NP = num_before_N.long()[:, None] - reach + torch.arange(reach, device=device)
    num_sequences = len(starts_N1) - 1
    if num_new == num_sequences:  # as an engine's step has no sequence without a new token
        grid_NR = torch.arange(num_sequences * (reach + 1), device=device).view(num_sequences, reach + 1)
        documents_Q = grid_NR.flatten() // (reach + 1) + 1
        return Step(grid_NR[:, reach], grid_NR[:, :reach], positions_NP, documents_Q, one_each=True)
    starts_N1 = starts_N1.long()
    numbers_N = torch.arange(num_sequences, device=device)
    sequence_T = torch.repeat_interleave(numbers_N, starts_N1.diff(), output_size=num_new)
    back_P = torch.arange(reach, device=device)
    places_T = torch.arange(num_new, device=device) + (sequence_T + 1) * reach
    past_places_NP = (starts_N1[:-1] + numbers_N * reach)[:, None] + back_P
    documents_Q = torch.empty(num_new + len(numbers_N) * reach, dtype=torch.int64, device=device)
    documents_Q[places_T] = sequence_T + 1
    documents_Q[past_places_NP.flatten()] = (numbers_N + 1).repeat_interleave(reach)
    return Step(places_T, past_places_NP, positions_NP, documents_Q, one_each=False)


def slots_in_table(block_table_NM: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """Find the slots of positions [N, …] of each sequence by its table of pages; any slot where a position is
    negative."""
    flat_NP = positions.clamp_min(0).flatten(1)
    pages_NP = block_table_NM.long().gather(1, flat_NP // page_size)
    return (pages_NP * page_size + flat_NP % page_size).view(positions.shape)


def slots_before(read_index: torch.Tensor, ends_N: torch.Tensor, known_NP: torch.Tensor) -> torch.Tensor:
    """Find the slots of the pasts [N, P] in a list of all slots that the step's attention reads, where each
    sequence's past ends before `ends_N`; any slot where none is known."""
    places_NP = ends_N.long()[:, None] - known_NP.shape[1] + torch.arange(known_NP.shape[1], device=ends_N.device)
    return read_index[places_NP.masked_fill(~known_NP, 0)]


def write(pages_SX: torch.Tensor, slots_T: torch.Tensor, values_TX: torch.Tensor) -> None:
    """Store the new tokens' values at their slots."""
    pages_SX.index_copy_(0, slots_T.long(), values_TX)


def tail(pages_SX: torch.Tensor, slots_NP: torch.Tensor) -> torch.Tensor:
    """Read the values of the pasts, [N, P, X]."""
    return pages_SX.index_select(0, slots_NP.flatten()).unflatten(0, slots_NP.shape)


def as_words(values_TX: torch.Tensor, dtype: torch.dtype, num_words: int) -> torch.Tensor:
    """Cast values bit for bit to rows of `num_words` of another type, zeros at their ends: [T, num_words]."""
    words = values_TX.contiguous().view(torch.uint8)
    words = F.pad(words, (0, num_words * dtype.itemsize - words.shape[-1]))
    return words.view(dtype)


def from_words(words: torch.Tensor, dtype: torch.dtype, num_values: int) -> torch.Tensor:
    """Get back [..., num_values] of what `as_words` made."""
    return words.contiguous().view(torch.uint8)[..., : num_values * dtype.itemsize].contiguous().view(dtype)


def words_of(dtype: torch.dtype, num_values: int, in_dtype: torch.dtype) -> int:
    """Count the words of `in_dtype` that hold `num_values` of `dtype`."""
    return -(-num_values * dtype.itemsize // in_dtype.itemsize)
