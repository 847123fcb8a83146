"""The lookup as two operators of torch, which `torch.compile` keeps in its graph without looking inside.

    sense_v2::hash_tokens    token ids [B, T], history [B, P] -> compressed ids [B, T], row ids [L, B, T, H]
    sense_v2::read_rows      row ids [B, T, H] -> memory [B, T, E]

Both need what is no tensor of the graph: a map and a table on disk, and checks that wait for a value. They compute
what runs without a compiler, value for value; without one they aren't used. Neither carries a gradient: rows that are
trained are looked up outside of the graph.

An operator takes tensors and numbers only. So the object that answers it goes by a number, its handle, which
`handle_of` gives it for as long as it lives. It is made of what the object's table and map are, so that an exported
program finds them in another process, and no others.

L layers with memory, B batch, T sequence, P positions of history, H rows a position, E width of the memory vector.
"""

from __future__ import annotations

import hashlib
import inspect
import secrets
import weakref
from typing import Any

import torch

# Any: a memory or a fusion layer answers, whose modules import this one.
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle_of(answering: Any, identity: str | None) -> int:
    """Give an object a new handle. It answers by its methods `hash_tokens` and `read_rows`.

    `identity` says what it answers with; None if nothing can: the handle is then of this process alone. Of several
    with one identity, the first to come has the same handle in every process.
    """
    digest = secrets.token_bytes(8) if identity is None else hashlib.sha256(identity.encode()).digest()
    handle = int.from_bytes(digest[:8], "big") >> 2
    while handle in _objects:
        handle += 1
    _objects[handle] = answering
    return handle


def release(handle: int) -> None:
    """Let nobody answer by this handle, whether its object lives or not."""
    _objects.pop(handle, None)


def _find(handle: int) -> Any:
    try:
        return _objects[handle]
    except KeyError:
        raise RuntimeError(
            "a compiled graph asks for a memory that isn't here: it was detached, or its model deleted (compile "
            "again), or an exported program runs where no model with its table is open, at the commit that it was "
            "exported from (open that model first)"
        ) from None


# A CUDA graph replays kernels and can't read the disk: the tag tells the compiler to leave the operators out. Older
# versions of torch have no such tag, or give custom operators none.
_TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(torch.library.custom_op).parameters:
    _TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)}


@torch.library.custom_op(
    "sense_v2::hash_tokens",
    mutates_args=(),
    schema=(
        "(Tensor token_ids, Tensor? history, Tensor? valid, Tensor? documents, int num_layers, int num_rows, "
        "int handle) -> (Tensor, Tensor)"
    ),
    **_TAGS,
)
def hash_tokens(
    token_ids_BT: torch.Tensor,
    history_BP: torch.Tensor | None,
    valid_BT: torch.Tensor | None,
    documents_BT: torch.Tensor | None,
    num_layers: int,
    num_rows: int,
    handle: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute compressed ids and row ids of the new tokens, for L = `num_layers` and H = `num_rows`."""
    found: tuple[torch.Tensor, torch.Tensor] = _find(handle).hash_tokens(
        token_ids_BT, history_BP, valid_BT, documents_BT
    )
    return found


@hash_tokens.register_fake
def _(
    token_ids_BT: torch.Tensor,
    history_BP: torch.Tensor | None,
    valid_BT: torch.Tensor | None,
    documents_BT: torch.Tensor | None,
    num_layers: int,
    num_rows: int,
    handle: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    compressed_BT = token_ids_BT.new_empty(token_ids_BT.shape, dtype=torch.int64)
    return compressed_BT, compressed_BT.new_empty((num_layers, *token_ids_BT.shape, num_rows))


@torch.library.custom_op(
    "sense_v2::read_rows",
    mutates_args=(),
    schema="(Tensor row_ids, Tensor? valid, int width, ScalarType dtype, int handle) -> Tensor",
    **_TAGS,
)
def read_rows(
    row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None, width: int, dtype: torch.dtype, handle: int
) -> torch.Tensor:
    """Read the memory of each position, its rows one behind the other: E = `width` values of `dtype`."""
    rows: torch.Tensor = _find(handle).read_rows(row_ids_BTH, valid_BT)
    return rows


@read_rows.register_fake
def _(
    row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None, width: int, dtype: torch.dtype, handle: int
) -> torch.Tensor:
    return row_ids_BTH.new_empty((*row_ids_BTH.shape[:-1], width), dtype=dtype)
