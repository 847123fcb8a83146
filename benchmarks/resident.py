"""The peer that a table in a file is held against: the same rows in RAM, trained by the same rule.

`ResidentRows` stands where a layer expects its storage, `ResidentAdagrad` is the library's row-wise Adagrad, its
state in RAM, on the sparse gradient of `nn.Embedding(sparse=True)`. No journal, no file.

This module measures nothing by itself. N rows, D row width, U unique rows of a batch.
"""

from __future__ import annotations

import torch
from torch import nn

from sense_v2.engram.optim import rowwise_adagrad


class ResidentRows(nn.Module):
    """A table in RAM in the storage's place: `nn.Embedding(sparse=True)`. It isn't registered as a submodule, or its
    weight would go to AdamW."""

    reads_the_disk = False

    def __init__(self, table_ND: torch.Tensor) -> None:
        super().__init__()
        embedding = nn.Embedding.from_pretrained(table_ND, freeze=False, sparse=True)
        self._hidden = (embedding,)
        self.mode, self.rows_require_grad = "resident", True
        self.num_embeddings, self.embedding_dim = table_ND.shape
        self.dtype = table_ND.dtype

    @property
    def weight(self) -> nn.Parameter:
        return self._hidden[0].weight

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        return self._hidden[0](row_ids)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As the storage's: what is scaled in place counts."""
        if self.weight.grad is None:
            return None
        self.weight.grad = self.weight.grad.coalesce()
        return self.weight.grad._indices()[0], self.weight.grad._values()

    def clear_gradients(self) -> None:
        self.weight.grad = None


class ResidentAdagrad(torch.optim.Optimizer):
    """The same row-wise Adagrad, hand-written for a sparse gradient and state in RAM."""

    def __init__(self, rows: ResidentRows, lr: float, eps: float = 1e-10) -> None:
        super().__init__([torch.empty(0)], {"lr": lr, "eps": eps})
        self.rows = rows
        self.sums_N1 = torch.zeros(rows.num_embeddings, 1)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = self.rows.gradients()
        if gradients is None:
            return
        ids_U, grads_UD = gradients
        rows_UD, sums_U1 = self.rows.weight.index_select(0, ids_U), self.sums_N1.index_select(0, ids_U)
        group = self.param_groups[0]
        rowwise_adagrad(rows_UD, grads_UD, sums_U1, lr=group["lr"], eps=group["eps"])
        self.sums_N1.index_copy_(0, ids_U, sums_U1)
        self.rows.weight.index_copy_(0, ids_U, rows_UD)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.rows.clear_gradients()
