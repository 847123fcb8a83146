"""Row gradients -> updated rows: optimizers that touch the batch's rows and nothing else.

The storage hands out the batch's unique rows as a small leaf and keeps the gradient that comes back to it
(`storage.gradients()`); `step()` reads those rows and their state from the mapping, updates them and writes them
back. Memory follows the batch, never the table. State is memory-mapped beside the table and survives with it.

Gradients of a row that was met several times (by heads, layers, micro-batches) are summed before anything is
squared. A row that wasn't met isn't touched, its moments don't decay: that is what makes the cost follow the batch,
and it is what `torch.optim.SparseAdam` does.

`rowwise_adagrad` and `row_adam` are the mathematics, as functions of arrays; the classes hold the files. They are
`torch.optim.Optimizer`s, so learning-rate schedulers take them; their one parameter is a stand-in of no elements
whose `.grad` is the rows' gradient, so gradient scalers and clipping take them too.

U unique rows of the batch, D row width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.row_source import TrainableRows


def rowwise_adagrad(
    rows_UD: torch.Tensor, grads_UD: torch.Tensor, sums_U1: torch.Tensor, *, lr: float, eps: float
) -> None:
    """In place: S += mean(g²) over the row; row -= lr·g / (√S + eps). One float of state a row.

    At D = 1 this is `torch.optim.Adagrad`. Source: row-wise AdaGrad as in DLRM and FBGEMM's exact rowwise Adagrad.
    """
    # One buffer for all of it: of a large batch, new memory's page faults cost more than the arithmetic.
    buffer_UD = grads_UD.square()
    sums_U1 += buffer_UD.mean(dim=1, keepdim=True)
    torch.mul(grads_UD, lr, out=buffer_UD).div_(sums_U1.sqrt().add_(eps))
    rows_UD -= buffer_UD


def row_adam(
    rows_UD: torch.Tensor,
    grads_UD: torch.Tensor,
    averages_UD: torch.Tensor,
    squares_UD: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """In place: Adam on the rows that were met; `step` counts from 1, for the table as a whole.

    Source: `torch.optim.SparseAdam`, which it equals (bias correction by the global step, eps outside the root).
    """
    beta1, beta2 = betas
    averages_UD += (grads_UD - averages_UD) * (1 - beta1)
    squares_UD += (grads_UD.square() - squares_UD) * (1 - beta2)
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    rows_UD -= step_size * averages_UD / (squares_UD.sqrt() + eps)


class RowGradients(torch.nn.Parameter):
    """A parameter of no elements whose `.grad` is what the storage has pending, float32 [U, D], or None.

    It is how code that knows only parameters reaches the rows: `clip_grad_norm_` counts and scales their gradient,
    `GradScaler.unscale_` divides it and looks for infinities, `zero_grad` forgets it. None of them compares a
    gradient's shape with its parameter's. It must not get to an optimizer's own arithmetic, which does.
    """

    _storage: TrainableRows

    def __new__(cls, storage: TrainableRows) -> RowGradients:
        stand_in = super().__new__(cls, torch.empty(0), requires_grad=True)
        stand_in._storage = storage
        return stand_in

    @property
    def grad(self) -> torch.Tensor | None:
        gradients = self._storage.gradients()
        return None if gradients is None else gradients[1]

    @grad.setter
    def grad(self, gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            raise with_way_out(
                ValueError("rows' gradients come from backward"), "they can be scaled in place or set to None"
            )
        self._storage.clear_gradients()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        # A copy of a storage only reads: it has no gradients to stand in for.
        return torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return torch.nn.Parameter, (torch.empty(0), False)


class _RowOptimizer(torch.optim.Optimizer):
    """What both have in common: one storage, its gradients, the schedulers' interface."""

    def __init__(self, storage: TrainableRows, defaults: dict[str, Any]) -> None:
        if storage.mode != "r+":
            raise with_way_out(
                ValueError(f"{storage.path} is open read-only"), "open it with mode='r+' to train its rows"
            )
        for name in ("lr", "eps"):
            if not defaults[name] >= 0:
                raise ValueError(f"{type(self).__name__}: {name} = {defaults[name]} must be 0 or more")
        # torch's base class wants a parameter; the rows aren't one (DDP and .to() must not see the table).
        super().__init__([RowGradients(storage)], defaults)
        self.storage = storage

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the rows that have a gradient; without any it does nothing. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self.storage.gradients()
        if gradients is not None:
            row_ids_U, grads_UD = gradients
            # State is stored before rows; what can go wrong has to go wrong before both.
            with self.storage.changing:
                self.storage.protect(row_ids_U)
                rows_UD = self.storage.gather(row_ids_U)
                self._update(row_ids_U, rows_UD, grads_UD, self.param_groups[0])
                self.storage.write(row_ids_U, rows_UD, stochastic=True)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients that have come in since the last call."""
        self.storage.clear_gradients()

    def _update(
        self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor, grads_UD: torch.Tensor, group: dict[str, Any]
    ) -> None:
        raise NotImplementedError  # each optimizer below has its own


class RowWiseAdagrad(_RowOptimizer):
    """Adagrad with one float of state a row, in `<table>.adagrad.dat`.

    `lr` is in units of a row's values. Raises `ValueError` for a read-only storage.
    """

    def __init__(self, storage: TrainableRows, lr: float = 0.05, eps: float = 1e-10) -> None:
        super().__init__(storage, {"lr": lr, "eps": eps})
        self.state_file = storage.open_state("adagrad", 1)

    def _update(
        self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor, grads_UD: torch.Tensor, group: dict[str, Any]
    ) -> None:
        sums_U1 = self.storage.read_state(self.state_file, row_ids_U)
        rowwise_adagrad(rows_UD, grads_UD, sums_U1, lr=group["lr"], eps=group["eps"])
        self.storage.write_state(self.state_file, row_ids_U, sums_U1)
        self.state_file.step += 1


class RowAdam(_RowOptimizer):
    """Adam on the rows that were met, two floats of state a value, in `<table>.adam.dat`.

    Raises `ValueError` for a read-only storage.
    """

    def __init__(
        self,
        storage: TrainableRows,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"RowAdam: betas = {betas} must be from 0 to below 1")
        super().__init__(storage, {"lr": lr, "betas": tuple(betas), "eps": eps})
        self.state_file = storage.open_state("adam", 2 * storage.embedding_dim)

    def _update(
        self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor, grads_UD: torch.Tensor, group: dict[str, Any]
    ) -> None:
        self.state_file.step += 1
        moments_U2D = self.storage.read_state(self.state_file, row_ids_U)
        averages_UD, squares_UD = moments_U2D.chunk(2, dim=1)
        row_adam(
            rows_UD,
            grads_UD,
            averages_UD,
            squares_UD,
            step=self.state_file.step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
        )
        self.storage.write_state(self.state_file, row_ids_U, moments_U2D)


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.Tensor], storage: TrainableRows, max_norm: float) -> torch.Tensor:
    """Scales the gradients of `parameters` and of the rows down to `max_norm` together; returns the norm before.

    `torch.nn.utils.clip_grad_norm_` alone would miss the rows, which are no parameters.
    """
    dense = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = storage.gradients()
    rows = [] if gradients is None else [gradients[1]]
    total = torch.nn.utils.get_total_norm([*dense, *rows])
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in [*dense, *rows]:
        gradient.mul_(scale.to(gradient.device))
    return total
