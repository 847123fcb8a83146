"""Row gradients between a backward and the row optimizer that takes them.

A storage gives the batch's unique rows as a small float32 leaf, whose gradient a hook moves here when it is done;
from here a row optimizer takes it. The storage holds no leaf: a forward without a backward leaves nothing behind.

U unique rows of a batch, D row width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

_Storage = TypeVar("_Storage", bound="GradientCollector")


class GradientCollector(nn.Module):
    """What every storage that trains has in common: rows as a leaf, and the gradients that came back."""

    embedding_dim: int

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pending_lock = threading.Lock()
        self.rows_require_grad = True

    def requires_grad_(self: _Storage, requires_grad: bool = True) -> _Storage:
        """False freezes the rows: lookups carry no gradient. The table has no parameters to say so for it."""
        self.rows_require_grad = requires_grad
        return self

    def _rows_with_gradient(
        self, ids_U: torch.Tensor, inverse: torch.Tensor, rows_UD: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows [..., D] of `dtype`, taken by `inverse` [...] from `rows_UD`, whose gradient comes here."""
        leaf_UD = rows_UD.to(torch.float32).requires_grad_()
        leaf_UD.register_post_accumulate_grad_hook(self._gradient_hook(ids_U))
        return F.embedding(inverse.to(rows_UD.device), leaf_UD).to(dtype)

    def _gradient_hook(self, ids_U: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def move(leaf_UD: torch.Tensor) -> None:
            if leaf_UD.grad is not None:
                with self._pending_lock:
                    self._pending.append((ids_U, leaf_UD.grad.detach()))
                leaf_UD.grad = None

        return move

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(ids_U ascending, int64; grads_UD, float32), both on the CPU, of every backward since the last clear.

        None where there was none. The tensors are the stored ones: scaling grads_UD in place (clipping) counts.
        """
        with self._pending_lock:
            if not self._pending:
                return None
            if len(self._pending) > 1:
                ids_U, inverse = torch.unique(torch.cat([ids for ids, _ in self._pending]), return_inverse=True)
                grads = torch.cat([grads.cpu() for _, grads in self._pending])
                shape = (len(ids_U), self.embedding_dim)
                grads_UD = torch.zeros(shape, dtype=torch.float32, device="cpu").index_add_(0, inverse, grads)
            else:
                ids_U, grads_UD = self._pending[0]
            self._pending = [(ids_U.to(torch.int64), grads_UD.cpu())]
            return self._pending[0]

    def replace_gradients(self, row_ids_U: torch.Tensor, grads_UD: torch.Tensor) -> None:
        """Puts gradients that were summed over several processes in place of this one's own. None for no row at all
        is a gradient: an optimizer then counts the step, as it does where it updates rows."""
        with self._pending_lock:
            self._pending = [(row_ids_U, grads_UD)]

    def clear_gradients(self) -> None:
        with self._pending_lock:
            self._pending = []
