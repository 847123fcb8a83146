"""The lookup as two operators of torch, so that `torch.compile` keeps it in its graph and looks at nothing inside.

    sense_v2::hash_tokens    token ids [B, T], history [B, P] -> compressed ids [B, T], row ids [L, B, T, H]
    sense_v2::read_rows      row ids [B, T, H] -> memory [B, T, H·D]

Both reach memory that is no tensor of the graph: a map and a table on disk, checks that wait for a value. Each has a
fake kernel, which says shapes and dtypes and reads nothing. They run what runs without a compiler, value for value;
without one they aren't used at all. Neither carries a gradient: rows that are being trained are looked up outside of
the graph.

An operator's arguments are tensors and numbers, so the object that answers goes by a number, which `handle_of` gives
it for as long as it lives.

L layers with memory, B batch, T sequence, P positions of history, H rows a position, D row width.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch


class Hashing(Protocol):
    """Answers `hash_tokens`."""

    @property
    def row_ids_per_position(self) -> tuple[int, int]:
        """(L, H)."""

    def hash_tokens(
        self,
        token_ids_BT: torch.Tensor,
        history_BP: torch.Tensor | None,
        valid_BT: torch.Tensor | None,
        documents_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Reading(Protocol):
    """Answers `read_rows`."""

    @property
    def memory_width(self) -> int: ...

    @property
    def rows_dtype(self) -> torch.dtype: ...

    def read_rows(self, row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None) -> torch.Tensor: ...


_numbers = itertools.count()
_objects: weakref.WeakValueDictionary[int, Hashing | Reading] = weakref.WeakValueDictionary()


def handle_of(answering: Hashing | Reading) -> int:
    """A new number for it."""
    handle = next(_numbers)
    _objects[handle] = answering
    return handle


def _find(handle: int) -> Hashing | Reading:
    try:
        return _objects[handle]
    except KeyError:
        raise RuntimeError(
            "a compiled graph asks for a memory that is gone: it was detached, or its model deleted; compile again"
        ) from None


# A CUDA graph replays kernels, and what reads the disk is none: these tell the compiler to leave the operators out.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


@torch.library.custom_op(
    "sense_v2::hash_tokens",
    mutates_args=(),
    schema="(Tensor token_ids, Tensor? history, Tensor? valid, Tensor? documents, int handle) -> (Tensor, Tensor)",
    tags=_TAGS,
)
def hash_tokens(
    token_ids_BT: torch.Tensor,
    history_BP: torch.Tensor | None,
    valid_BT: torch.Tensor | None,
    documents_BT: torch.Tensor | None,
    handle: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compressed ids and row ids of the T new tokens."""
    found = _find(handle)
    return found.hash_tokens(token_ids_BT, history_BP, valid_BT, documents_BT)  # type: ignore[union-attr]


@hash_tokens.register_fake
def _(
    token_ids_BT: torch.Tensor,
    history_BP: torch.Tensor | None,
    valid_BT: torch.Tensor | None,
    documents_BT: torch.Tensor | None,
    handle: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_layers, num_rows = _find(handle).row_ids_per_position  # type: ignore[union-attr]
    compressed_BT = token_ids_BT.new_empty(token_ids_BT.shape, dtype=torch.int64)
    return compressed_BT, compressed_BT.new_empty((num_layers, *token_ids_BT.shape, num_rows))


@torch.library.custom_op(
    "sense_v2::read_rows",
    mutates_args=(),
    schema="(Tensor row_ids, Tensor? valid, int handle) -> Tensor",
    tags=_TAGS,
)
def read_rows(row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None, handle: int) -> torch.Tensor:
    """Memory of each position: its rows, one behind the other."""
    return _find(handle).read_rows(row_ids_BTH, valid_BT)  # type: ignore[union-attr]


@read_rows.register_fake
def _(row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None, handle: int) -> torch.Tensor:
    found = _find(handle)
    return row_ids_BTH.new_empty((*row_ids_BTH.shape[:-1], found.memory_width), dtype=found.rows_dtype)  # type: ignore[union-attr]
