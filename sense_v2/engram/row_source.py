"""The interface of every table: `RowSource` is looked up, `TrainableRows` is trained as well.

`MMapEmbeddingStorage` (a file of ours), `OverlayStorage` (changed rows on a table that stays as it is),
`ReleasedTable` (another project's checkpoint, only read) and `ShardedTable` (one table over several processes)
implement it, and tests/contract holds all of them to it. Code that looks up or trains rows knows these protocols and
no class: where tables differ, the difference is a property here, which every table answers.

All of them are `nn.Module`s without parameters or buffers, called as such: `rows = table(row_ids)`.
`sense_v2.engram.table_module` has what they share.

N rows of the table, D row width, U unique row ids of a call, W values of a row of an optimizer state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.table.format import Manifest
from sense_v2.engram.table_identity import Origin, TableIdentity

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


class RowSource(Protocol):
    """A table of rows that is looked up by row id."""

    num_embeddings: int
    """N."""
    embedding_dim: int
    """D."""
    dtype: torch.dtype
    """Of the rows that are looked up."""
    mode: str
    """"r+" if this process may store rows, "r" if it only reads."""
    training: bool
    rows_require_grad: bool
    """False if the rows are frozen: `requires_grad_` sets it."""
    collects_gradients: bool
    """True if training collects row gradients here."""

    # What it is, and where

    @property
    def path(self) -> Path | None:
        """What was opened; None for changes that lie in memory alone."""

    @property
    def manifest(self) -> Manifest:
        """What the table says of itself, as of its last commit."""

    @property
    def belongs_to(self) -> Origin:
        """The memory that the rows were trained for."""

    def recorded_pad_id(self, pad_id: int) -> int:
        """The compressed pad id that the rows were trained with, as the manifest names it; where it names none, this
        one, which the next commit records."""

    @property
    def is_new(self) -> bool:
        """True if no row has been stored since the table was made."""

    @property
    def is_released(self) -> bool:
        """True if the rows lie in a released checkpoint: read in place, and never copied or trained."""

    @property
    def is_in_shards(self) -> bool:
        """True if no file has all rows: each rank's disk has some of them."""

    @property
    def needs_all_ranks(self) -> bool:
        """True if several processes train the table together. `begin`, `average_over_ranks`, `row_optimizer`,
        `step_rows`, `commit`, `restore_from` and, of shards, `copy_to` are then calls that all of them make."""

    @property
    def table(self) -> RowSource:
        """The table that changes lie on; without any, the table itself."""

    @property
    def changed_ids(self) -> torch.Tensor:
        """Ids of the rows that differ from `table`'s: int64, ascending."""

    @property
    def whole_table(self) -> TrainableRows:
        """The table of ours, in one file, that has all rows. Raises `ValueError` if there is none."""

    def identity(self) -> TableIdentity:
        """Names `table` as it was last committed. Raises `ValueError` if nothing can: its manifest has no checksums,
        or rows were stored since."""

    @property
    def has_gone_on(self) -> bool:
        """True for a copy whose file has other rows by now."""

    def rows_digest(self) -> str | None:
        """Names the rows as they are now, committed or not; None if nothing can, or the table is closed."""

    # Reading

    def __call__(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows: row_ids [...] of int64 or int32 -> rows [..., D] of `dtype`, on the ids' device.

        Rows that were returned stay as they are, whatever is looked up or stored later. In training, with gradients
        enabled and `collects_gradients`, the rows' gradients reach `TrainableRows.gradients`.

        Raises:
            IndexError: An id is outside 0 … N - 1.
            TypeError: The ids are no tensor, or of another dtype.
            RuntimeError: The table is closed.
            OSError: A file was cut since it was opened.
        """

    def gather(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Rows as float32 [U, D] in memory of their own, without gradient: what a row update computes with. Raises as
        a lookup does."""

    def begin(self, row_ids: torch.Tensor) -> None:
        """Says that the next forward needs these rows [...]; they begin to come, and this returns at once."""

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begins to read these rows [...] from the disk, and returns at once. Raises as a lookup does."""

    @property
    def reads_the_disk(self) -> bool:
        """True if lookups met the disk lately, so that `prefetch` pays. At first that isn't known: True."""

    def stats(self) -> ReadStats:
        """What this process has read of the file since it was opened. Of a table across ranks: of this rank's own
        file; of an overlay: of what lies under it."""

    def close(self) -> None:
        """Lets go of files and threads. Rows that were looked up stay valid; any other use is a `RuntimeError`."""


class RowState(Protocol):
    """An optimizer's state: float32 [N, W], zeros at first."""

    name: str
    step: int
    """Steps taken; kept by the next commit."""

    @property
    def width(self) -> int:
        """W."""


class TrainableRows(RowSource, Protocol):
    """A table whose rows a row optimizer updates (`sense_v2.engram.optim`), and commits keep."""

    durability: str
    """What commits survive: "process" or "power"."""
    updates: int
    """Calls of `write` since the table was made; the draws of stochastic rounding depend on it."""
    changing: AbstractContextManager[Any]
    """Held, reentrantly, while rows and states are stored, committed, copied or closed. A thread that holds it over
    several stores keeps another one's commit from coming between them, as the row optimizers' `step` does."""

    # Gradients

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """False freezes the rows: lookups carry no gradient. (Any: nn.Module's own returns Self.)"""

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(ids_U ascending, int64; grads_UD, float32) of every backward since the last clear; None if there was none.

        The tensors are the stored ones: scaling grads_UD in place (clipping) counts. Of a table over several ranks
        another tensor stands in for grads_UD, with the norm of all ranks' rows (`ShardedTable.gradients`).
        """

    def replace_gradients(self, row_ids_U: torch.Tensor, grads_UD: torch.Tensor) -> None:
        """Puts other gradients in place of those that were collected."""

    def average_over_ranks(self) -> None:
        """After the last backward of a step: gradients become the mean over all ranks."""

    def gradient_norm(self) -> float:
        """The norm of all rows' gradients; 0 if there are none."""

    def scale_gradients(self, scale: float) -> None:
        """Multiplies all rows' gradients."""

    def clear_gradients(self) -> None:
        """Forgets the gradients that were collected."""

    @property
    def num_rows_met(self) -> int:
        """How many rows have a gradient, over all ranks."""

    # Updates

    @property
    def own(self) -> TrainableRows:
        """The table that this process stores to: itself, or the rank's file."""

    def row_optimizer(self, kind: Callable[..., OptimizerT], **settings: Any) -> OptimizerT:
        """`RowWiseAdagrad` or `RowAdam` over the rows that this process stores to."""

    def step_rows(self, optimizer: torch.optim.Optimizer) -> None:
        """Updates the rows that have a gradient, by such an optimizer, and clears the gradients."""

    def protect_soon(self, row_ids_U: torch.Tensor) -> None:
        """Begins to make these rows (unique, int64) ready to be stored to, and returns at once."""

    def protect(self, row_ids_U: torch.Tensor) -> None:
        """Makes these rows ready to be stored to, in the table and in all open states. Raises what `write` would
        raise, before anything is stored."""

    def write(self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor, *, stochastic: bool = False) -> None:
        """Stores rows, rounded to the table's type.

        Args:
            row_ids_U: Unique ids. Of two rows for one id, either may stay.
            rows_UD: Rows of any float type, on any device.
            stochastic: Rounds to bfloat16 up or down at random, on average to the value itself, so that updates
                smaller than half a step of bfloat16 aren't lost. The draws depend on the table's seed and on
                `updates`, and so repeat with a run.

        Raises:
            PermissionError: The table is open with mode "r", or the row is another process's.
            ValueError: The rows have another shape.
            OSError: Old rows couldn't be kept, or there is no room. Nothing is stored then.
        """

    # Optimizer states. `Any` because each table has a state of its own, and takes no other's.

    def open_state(self, name: str, width: int) -> Any:
        """The optimizer state of that name, a `RowState`: zeros at first, later what it was. Raises `ValueError` for
        another width than it had."""

    def read_state(self, state: Any, row_ids_U: torch.Tensor) -> torch.Tensor:
        """Rows of an optimizer state [U, W], in memory of their own."""

    def write_state(self, state: Any, row_ids_U: torch.Tensor, values_UW: torch.Tensor) -> None:
        """Stores rows of an optimizer state, [U, W]; as `write`."""

    # Keeping

    @property
    def committed_step(self) -> int | None:
        """The step that the last commit to name one was given; None before that."""

    @property
    def committed_extra(self) -> dict[str, Any]:
        """What the last commit was given as `extra`: any JSON object."""

    def commit(self, step: int | None = None, extra: Mapping[str, Any] | None = None) -> None:
        """Keeps rows, open optimizer states, `step` and `extra` (any JSON object) together, as `durability` says.
        Without a step or an extra, those of the commit before stay."""

    def flush(self, step: int | None = None) -> None:
        """Commits so that it is on the disk when this returns, whatever `durability` says."""

    def copy_to(self, path: str | os.PathLike[str], *, states: bool = True, reflink_only: bool = False) -> None:
        """Writes what was committed last to files of its own: a table, or of an overlay its changed rows.

        Args:
            path: Where to; what lies there is replaced.
            states: Copies the optimizer states, too.
            reflink_only: Raises `OSError` if the file system would have to copy a table's data.
        """

    def restore_from(self, path: str | os.PathLike[str]) -> None:
        """Makes rows, optimizer states, step and extra those of such a copy, in one commit. Raises `ValueError` for a
        copy of another table, or a damaged one; nothing has changed then."""
