"""What all tables share: ids checked, gradients collected, misuse refused.

A table says where its rows come from (`_read`) and, if it trains, where they go (`_store`); the rest is here, behind
the interface of `sense_v2.engram.row_source`.

In training a lookup gathers the batch's unique rows into a small float32 leaf and indexes that, so autograd never
sees the table. A hook moves the leaf's gradient here when it is done, from where a row optimizer takes it. The table
holds no leaf: a forward without a backward leaves nothing behind.

U unique rows of a batch, D row width, N rows of the table.
"""

from __future__ import annotations

import abc
import operator
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from sense_v2.core.errors import with_way_out
from sense_v2.engram.reading.cold_policy import NoSmallReads, SmallReads
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.row_source import OptimizerT, RowSource
from sense_v2.engram.table.format import Manifest
from sense_v2.engram.table.row_dtypes import stochastic_bfloat16
from sense_v2.engram.table_identity import Origin, TableIdentity, identity_of

ID_DTYPES = (torch.int64, torch.int32)
MODES = ("r", "r+")

_Table = TypeVar("_Table", bound="TableModule")


class TableModule(nn.Module, abc.ABC):
    """A table as a module. Its methods are those of `RowSource` and `TrainableRows`, where docstrings are."""

    path: Path | None
    dtype: torch.dtype
    is_released = False
    is_in_shards = False
    needs_all_ranks = False

    def __init__(self, num_embeddings: int, embedding_dim: int, *, mode: str) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r}: must be 'r+' (read and train) or 'r' (read)")
        self.num_embeddings, self.embedding_dim = operator.index(num_embeddings), operator.index(embedding_dim)
        self.mode = mode
        self.rows_require_grad = True
        self.collects_gradients = mode == "r+"
        """Set to True with mode "r" in a process that hands its gradients to the one that writes."""
        self._small: SmallReads = NoSmallReads()
        """Reads small batches of a warm file, and has None for all others."""
        self._is_closed = False
        self._process = os.getpid()
        self._updates = 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pending_lock = threading.Lock()
        self.changing: AbstractContextManager[Any] = threading.RLock()

    @property
    @abc.abstractmethod
    def manifest(self) -> Manifest: ...

    @abc.abstractmethod
    def _read(self, row_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        """row_ids [...] of int64 or int32, on the CPU -> rows [..., D] on `device`. Raises `IndexError`."""

    # What it is

    @property
    def table(self) -> RowSource:
        return self

    @property
    def own(self) -> Any:
        """(Any: each table its own kind.)"""
        return self

    @property
    def whole_table(self) -> Any:
        """(Any: as `own`.)"""
        return self.table

    @property
    def is_new(self) -> bool:
        return False

    @property
    def belongs_to(self) -> Origin:
        return Origin.of_provenance(self.manifest.provenance)

    def recorded_pad_id(self, pad_id: int) -> int:
        recorded: int = self.manifest.provenance.setdefault("pad_id", pad_id)
        return recorded

    @property
    def changed_ids(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    @property
    def has_gone_on(self) -> bool:
        return False

    def rows_digest(self) -> str | None:
        return None if self._is_closed else self._rows_digest()

    def _rows_digest(self) -> str | None:
        return self.identity().digest

    def identity(self) -> TableIdentity:
        if self.updates != self.manifest.updates:
            raise with_way_out(ValueError(f"{self._name} has updates since its last commit"), "commit() first")
        return identity_of(self.manifest, self._name)

    @property
    def _name(self) -> object:
        """What errors call it."""
        return self.path

    # Reading

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows: row_ids [...] of int64 or int32 -> rows [..., D] of `dtype`, on the ids' device."""
        # One call into the extension where it can be: what Python does around a small warm batch takes longer than
        # its rows.
        rows = None if self.training else self._small.read(row_ids)
        if rows is not None:
            return rows
        self._refuse_unusable(row_ids)
        if not self._trains():
            return self._read(row_ids.cpu(), row_ids.device)
        ids_U, inverse = torch.unique(row_ids.detach().cpu().reshape(-1), return_inverse=True)
        self._refuse_out_of_range(ids_U)
        self.protect_soon(ids_U.to(torch.int64))

        def keep(grads_UD: torch.Tensor) -> None:
            with self._pending_lock:
                self._pending.append((ids_U, grads_UD))

        leaf_UD = leaf_of(self._read(ids_U, row_ids.device), keep)
        rows = F.embedding(inverse.to(row_ids.device), leaf_UD).to(self.dtype)
        return rows.reshape(*row_ids.shape, self.embedding_dim)

    def gather(self, row_ids: torch.Tensor) -> torch.Tensor:
        return self._read(self._checked_ids(row_ids), torch.device("cpu")).float()

    def begin(self, row_ids: torch.Tensor) -> None:
        self.prefetch(row_ids)

    @property
    @abc.abstractmethod
    def reads_the_disk(self) -> bool: ...

    @abc.abstractmethod
    def prefetch(self, row_ids: torch.Tensor) -> None: ...

    @abc.abstractmethod
    def stats(self) -> ReadStats: ...

    @abc.abstractmethod
    def close(self) -> None: ...

    def _trains(self) -> bool:
        """True if a lookup now has to collect gradients."""
        return self.training and self.rows_require_grad and self.collects_gradients and torch.is_grad_enabled()

    def _checked_ids(self, row_ids: torch.Tensor) -> torch.Tensor:
        """int64 [U], on the CPU, all of them of this table."""
        self._refuse_unusable(row_ids)
        ids_U = row_ids.detach().cpu().reshape(-1).to(torch.int64)
        self._refuse_out_of_range(ids_U)
        return ids_U

    def _refuse_unusable(self, row_ids: object) -> None:
        if self._is_closed:
            self._refuse_closed()
        if not (isinstance(row_ids, torch.Tensor) and row_ids.dtype in ID_DTYPES):
            found = row_ids.dtype if isinstance(row_ids, torch.Tensor) else type(row_ids).__name__
            raise TypeError(f"row ids are a tensor of int64 or int32, not {found}")

    def _refuse_out_of_range(self, ids: torch.Tensor) -> None:
        if len(ids):
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.num_embeddings:
                outside = ids[(ids < 0) | (ids >= self.num_embeddings)]
                raise IndexError(f"row id {int(outside[0])}: {self._name} has rows 0 to {self.num_embeddings - 1}")

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise with_way_out(
                RuntimeError(f"{self._name}: the storage is closed"), "make a new one to open the table again"
            )

    # Gradients

    def requires_grad_(self: _Table, requires_grad: bool = True) -> _Table:
        """False freezes the rows: lookups carry no gradient. The table has no parameters to say so for it."""
        self.rows_require_grad = requires_grad
        return self

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
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
        # Of no row at all it is a gradient, too: an optimizer then counts the step.
        with self._pending_lock:
            self._pending = [(row_ids_U, grads_UD)]

    def average_over_ranks(self) -> None:
        """One process has nothing to bring together."""

    def gradient_norm(self) -> float:
        gradients = self.gradients()
        return 0.0 if gradients is None else float(gradients[1].norm())

    def scale_gradients(self, scale: float) -> None:
        gradients = self.gradients()
        if gradients is not None:
            gradients[1].mul_(scale)

    def clear_gradients(self) -> None:
        with self._pending_lock:
            self._pending = []

    @property
    def num_rows_met(self) -> int:
        gradients = self.gradients()
        return 0 if gradients is None else len(gradients[0])

    # Updates

    @property
    def updates(self) -> int:
        return self._updates

    @updates.setter
    def updates(self, updates: int) -> None:
        self._updates = operator.index(updates)

    def row_optimizer(self, kind: Callable[..., OptimizerT], **settings: Any) -> OptimizerT:
        return kind(self, **settings)

    def step_rows(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        self.clear_gradients()

    def protect_soon(self, row_ids_U: torch.Tensor) -> None:
        """Nothing has to be made ready."""

    def protect(self, row_ids_U: torch.Tensor) -> None:
        self._refuse_no_writer("write rows")
        self._checked_ids(row_ids_U)

    def write(self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor, *, stochastic: bool = False) -> None:
        self._refuse_no_writer("write rows")
        ids_U = self._checked_ids(row_ids_U)
        self._refuse_shape("rows", rows_UD, (len(ids_U), self.embedding_dim))
        rows_UD = rows_UD.detach().cpu()
        with self.changing:
            if stochastic and self.dtype == torch.bfloat16:
                rows_UD = stochastic_bfloat16(rows_UD.float(), self.table.manifest.init_seed or 0, self._updates)
            self._store(ids_U, rows_UD.to(self.dtype))
            self._updates += 1

    def _store(self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor) -> None:
        """Rows of the table's type, for ids that were checked, go where they are kept."""
        raise NotImplementedError

    @staticmethod
    def _refuse_shape(what: str, values: torch.Tensor, expected: tuple[int, int]) -> None:
        if values.shape != expected:
            raise ValueError(f"{what} have shape {list(values.shape)}, not {list(expected)}")

    def _refuse_no_writer(self, what: str) -> None:
        if self.mode == "r":
            raise with_way_out(
                PermissionError(f"{self._name} is open with mode='r': can't {what}"), "Open it with mode='r+'"
            )
        self._refuse_closed()
        if self._process != os.getpid():
            raise with_way_out(
                RuntimeError(
                    f"{self._name} was opened by process {self._process}, of which this is a forked child: "
                    f"can't {what}"
                ),
                "Only the process that opened a table writes to it",
            )

    # Keeping

    @property
    def committed_step(self) -> int | None:
        return self.manifest.step

    @property
    def committed_extra(self) -> dict[str, Any]:
        return self.manifest.extra

    def _warn_uncommitted(self, what_becomes_of_them: str) -> None:
        """Before it is closed."""
        uncommitted = self._updates - self.manifest.updates
        if uncommitted and not self._is_closed and self.mode == "r+" and self._process == os.getpid():
            warnings.warn(
                f"{self._name} is closed with {uncommitted} updates since its last commit (step "
                f"{self.committed_step}); {what_becomes_of_them}. commit() keeps them",
                UserWarning,
                stacklevel=3,
            )


def leaf_of(rows_UD: torch.Tensor, keep: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """These rows as a float32 leaf, which hands its gradient to `keep` after each backward and forgets it."""
    leaf_UD = rows_UD.to(torch.float32).requires_grad_()

    def move(leaf_UD: torch.Tensor) -> None:
        if leaf_UD.grad is not None:
            keep(leaf_UD.grad.detach())
            leaf_UD.grad = None

    leaf_UD.register_post_accumulate_grad_hook(move)
    return leaf_UD
