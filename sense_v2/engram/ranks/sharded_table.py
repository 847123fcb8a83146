"""`ShardedTable`: one table over several ranks, looked up and trained like one alone.

    begin(row_ids) ──▶ lookup: counts ──▶ lookup: ids ──▶ owners read ──▶ lookup: rows      in a thread, while the
    forward(row_ids) waits for them, and indexes one small leaf                             first layers compute
    backward ──▶ the leaf's gradient, kept by micro-batch
    exchange_gradients ──▶ gradients: counts ──▶ gradients: ids ──▶ gradients: rows ──▶ owners sum, in a fixed order
    step_rows ──▶ each owner's row optimizer, on its own rows
    commit ──▶ all of it, or none (`sense_v2.engram.ranks.global_commit`)

What travels is a micro-batch's unique ids, 8 bytes each, and rows of D values: not tokens × heads. Gradients of a
rank's micro-batches are summed before they travel, as far as that is part of the fixed order
(`sense_v2.engram.ranks.tree_sum`): the sum at an owner has the same bits whatever the number of ranks.

Two layouts. "file": one host, one table, which all ranks map; a lookup then reads the mapping and nothing travels
but gradients. "shards": each rank has a table of its rows on its own disk. Alone, either is a table in one file, and
the same class moves nothing.

Long because one class answers the model (lookups on their way), the trainer (gradients of all ranks) and whoever
keeps the table (commits of all ranks).

B batch, T sequence, H rows a position, D row width, U unique rows of a micro-batch, W ranks, M micro-batches of a
step over all ranks.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.model import table_settings
from sense_v2.engram.ranks import global_commit, range_copy
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.global_commit import GlobalManifest
from sense_v2.engram.ranks.gradient_sum import summed_at_owners
from sense_v2.engram.ranks.ownership import LocalIds, Ownership, OwnFile, RowIds
from sense_v2.engram.ranks.shards import global_manifest_path, open_shards
from sense_v2.engram.ranks.tree_sum import (
    RowGrads,
    TreeSum,
    add_row_grads,
    exact_sum,
    row_squares,
    total_of,
)
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.row_source import OptimizerT
from sense_v2.engram.storage import MMapEmbeddingStorage, RowState
from sense_v2.engram.table.format import Manifest
from sense_v2.engram.table.opening import Share
from sense_v2.engram.table_identity import Origin
from sense_v2.engram.table_module import TableModule, leaf_of
from sense_v2.engram.tokenizer import EngramTokenizer

LAYOUTS = ("file", "shards")


@dataclass(frozen=True)
class Fetch:
    """The rows of one forward."""

    row_ids_U: RowIds
    leaf_UD: torch.Tensor
    """float32; requires a gradient where rows are trained."""


@dataclass
class Traffic:
    """What a step moved and waited for, on this rank."""

    sent_bytes: dict[str, int]
    """By phase, to other ranks."""
    exchange_seconds: float
    """The lookups', begin to end."""
    waited_seconds: float
    """What of that the model stood still for."""

    def __str__(self) -> str:
        total = sum(self.sent_bytes.values())
        parts = ", ".join(f"{phase} {count:,}" for phase, count in self.sent_bytes.items() if count)
        return (
            f"{total:,} bytes sent ({parts or 'nothing'}); lookups took {1e3 * self.exchange_seconds:.1f} ms, of "
            f"which the model waited {1e3 * self.waited_seconds:.1f} ms"
        )


class ShardedTable(TableModule):
    """A table of `num_rows` rows of `width` values that all of `ranks` read and train; to be made by all of them,
    with the same arguments.

    With layout "file", `path` is one file of this host; with "shards", each rank's rows are in a table of their own
    beside that path, on its own disk, and rank 0 keeps the manifest that ties them. `head_rows` are the heads' first
    rows, for ranges that cut none. `table` is what `MMapEmbeddingStorage` takes besides (dtype, seed, provenance, …).

    A forward needs its rows to be on their way: `begin` with all row ids of the call, on every rank. In training one
    forward is one micro-batch, and every rank has equally many between two steps.

    Raises `ValueError` for shards of another number of ranks, and what the storage raises, on all ranks where one
    fails.
    """

    needs_all_ranks = True

    def __init__(
        self,
        num_rows: int,
        width: int,
        path: str | Path,
        *,
        ranks: Ranks,
        layout: str = "file",
        head_rows: Sequence[int] = (),
        mode: str = "r+",
        provenance: Mapping[str, Any] | None = None,
        **table: Any,
    ) -> None:
        super().__init__(num_rows, width, mode=mode)
        if layout not in LAYOUTS:
            raise ValueError(f"layout = {layout!r}: must be one of {', '.join(map(repr, LAYOUTS))}")
        self.path: Path = Path(path).absolute()
        self.ranks, self.layout, self.is_in_shards = ranks, layout, layout == "shards"
        self.ownership = Ownership.split(num_rows, ranks.num_ranks, head_rows)
        self.own_rows = self.ownership.rows_of(ranks.rank)
        self._global: GlobalManifest | None = None
        """Of shards."""
        settings = {"mode": mode, **table}
        if layout == "file":
            self.own_file = OwnFile(0)
            self._own = self._open_one_file({**settings, "provenance": provenance})
        else:
            self.own_file = OwnFile(self.own_rows.start)
            self._own, self._global = open_shards(
                self.path, num_rows, width, ranks, self.ownership, {**settings, "provenance": dict(provenance or {})}
            )
        self.dtype, self.changing = self._own.dtype, self._own.changing
        self._moves_rows = self.is_in_shards and ranks.num_ranks > 1
        self._pool = ThreadPoolExecutor(1, "sense-v2-exchange")
        self._running: Future[torch.Tensor] | None = None
        self._started: tuple[RowIds, int | None, torch.device] | None = None
        self._fetch: Fetch | None = None
        self._num_micro_batches = 0
        self._sums: dict[int, RowGrads] = {}
        """Gradients of this rank's micro-batches since the last step, by their numbers."""
        self._norm = 0.0
        self._stand_in: torch.Tensor | None = None
        self._num_rows_met = 0
        self._exchange_seconds = self._waited_seconds = 0.0

    # Opening

    def _open_one_file(self, settings: dict[str, Any]) -> MMapEmbeddingStorage:
        ranks = self.ranks

        def opened() -> MMapEmbeddingStorage:
            share = None
            if ranks.num_ranks > 1 and self.mode == "r+":
                share = Share(ranks.rank, self.own_rows.start, self.own_rows.stop)
            return MMapEmbeddingStorage(self.num_embeddings, self.embedding_dim, self.path, share=share, **settings)

        return self._in_turn("open", opened)

    def _in_turn(self, phase: str, call: Callable[[], Any]) -> Any:
        """`call` on rank 0, which makes what isn't there, then on the others; on all at once for shards."""
        if self.is_in_shards:
            return self.ranks.together(phase, call)
        made = self.ranks.together(f"{phase}: rank 0", call, only=0)
        if self.ranks.num_ranks == 1:
            return made
        return self.ranks.together(f"{phase}: others", lambda: call() if self.ranks.rank else made)

    @property
    def global_path(self) -> Path:
        """The manifest that ties shards; on rank 0's disk."""
        return global_manifest_path(self.path)

    # What it is

    @property
    def own(self) -> MMapEmbeddingStorage:
        """The file that this rank stores to."""
        return self._own

    @property
    def whole_table(self) -> MMapEmbeddingStorage:
        if self.is_in_shards:
            raise with_way_out(
                ValueError(f"{self.path} lies in shards, so no file has all rows"),
                "On all ranks, table.copy_to(path) makes one",
            )
        return self._own

    @property
    def belongs_to(self) -> Origin:
        return self._own.belongs_to

    # Reading

    def begin(self, row_ids: torch.Tensor) -> None:
        """The rows of `row_ids` [...] begin to come, from their owners where those are others, and this returns at
        once. By all ranks, before each forward; what an earlier call brought is forgotten. Raises as `forward`."""
        ids_U = RowIds(torch.unique(self._checked_ids(row_ids)))
        self._forget_fetch()
        number = None
        if self._trains():
            number = self._num_micro_batches
            self._num_micro_batches += 1
        self._started = ids_U, number, row_ids.device
        self._running = self._pool.submit(self._fetched, ids_U, number is not None)

    def _fetched(self, row_ids_U: RowIds, trains: bool) -> torch.Tensor:
        """rows_UD of these ids; in the exchange's thread."""
        started = time.perf_counter()
        rows_UD = self._from_owners(row_ids_U, trains) if self._moves_rows else self._from_disk(row_ids_U)
        if trains and not self._moves_rows:
            first, stop = self.own_rows.start, self.own_rows.stop
            own_ids = RowIds(row_ids_U[(row_ids_U >= first) & (row_ids_U < stop)])
            self._own.protect_soon(self.own_file.to_local(own_ids))
        self._exchange_seconds += time.perf_counter() - started
        return rows_UD

    def _from_disk(self, row_ids_U: RowIds) -> torch.Tensor:
        return self._own.gather(self.own_file.to_local(row_ids_U)).to(self.dtype)

    def _from_owners(self, row_ids_U: RowIds, trains: bool) -> torch.Tensor:
        counts = self.ownership.counts(row_ids_U)
        theirs = self.ranks.swap_counts("lookup: counts", torch.tensor(counts)[:, None])[:, 0].tolist()
        asked = RowIds(self.ranks.all_to_all("lookup: ids", row_ids_U, counts, theirs))
        if trains:
            self._own.protect_soon(self.own_file.to_local(RowIds(torch.unique(asked))))
        return self.ranks.all_to_all("lookup: rows", self._from_disk(asked), theirs, counts)

    def _current(self) -> Fetch | None:
        """What `begin` brought, waited for."""
        if self._running is not None:
            assert self._started is not None
            ids_U, number, device = self._started
            started = time.perf_counter()
            running, self._running = self._running, None
            rows_UD = running.result()
            self._waited_seconds += time.perf_counter() - started
            leaf_UD = rows_UD.to(device).float()
            if number is not None:
                leaf_UD = leaf_of(leaf_UD, partial(self._add_gradient, number, ids_U))
            self._fetch = Fetch(ids_U, leaf_UD)
        return self._fetch

    def _forget_fetch(self) -> None:
        running, self._running, self._fetch = self._running, None, None
        if running is not None:
            running.result()

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows that were among those of the last `begin`. In training their gradient is kept for
        `exchange_gradients`.

        Raises as every table's, and `ValueError` for rows that `begin` wasn't called with; where nothing has to
        travel, it is called here.
        """
        self._refuse_unusable(row_ids)
        found = self._found(row_ids)
        if found is None:
            self._checked_ids(row_ids)
            if self._moves_rows:
                raise ValueError(
                    f"rank {self.ranks.rank} has rows at hand only of its last begin(row_ids), which all ranks call "
                    "before a forward; a model with memory attached does so when it is called"
                )
            self.begin(row_ids)
            found = self._found(row_ids)
            assert found is not None
        fetch, places = found
        rows = F.embedding(places.to(row_ids.device), fetch.leaf_UD).to(self.dtype)
        return rows.reshape(*row_ids.shape, self.embedding_dim)

    def _found(self, row_ids: torch.Tensor) -> tuple[Fetch, torch.Tensor] | None:
        """The fetch, and where in it these rows are; None where one isn't there."""
        fetch = self._current()
        ids = row_ids.detach().cpu().reshape(-1).long()
        if fetch is None or (len(ids) and not len(fetch.row_ids_U)):
            return None
        places = torch.searchsorted(fetch.row_ids_U, ids).clamp_(max=max(0, len(fetch.row_ids_U) - 1))
        return (fetch, places) if bool((fetch.row_ids_U[places] == ids).all()) else None

    def _read(self, row_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise NotImplementedError  # rows come by `begin`

    def gather(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Rows as float32 [U, D]; of shards, those that this rank owns."""
        return self._own.gather(self._local_ids(row_ids) if self._moves_rows else self._checked_ids(row_ids))

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begins to read rows from a mapping that is here. Elsewhere owners read when they are asked."""
        ids = RowIds(self._checked_ids(row_ids))
        if not self._moves_rows:
            self._own.prefetch(self.own_file.to_local(ids))

    def stats(self) -> ReadStats:
        return self._own.stats()

    @property
    def reads_the_disk(self) -> bool:
        return not self._moves_rows and self._own.reads_the_disk

    # Training

    def _add_gradient(self, number: int, row_ids_U: RowIds, grads_UD: torch.Tensor) -> None:
        new: RowGrads = (row_ids_U, grads_UD.cpu())
        with self._pending_lock:
            old = self._sums.get(number)
            self._sums[number] = new if old is None else add_row_grads(old, new)

    def average_over_ranks(self) -> None:
        """As DDP averages weights' gradients: their losses are means already."""
        self.exchange_gradients(divide_by=self.ranks.num_ranks)

    def exchange_gradients(self, divide_by: float | None = None) -> None:
        """Every owner gets the sum of its rows' gradients over all micro-batches since the last step, divided by
        `divide_by`, or by their number: the mean. By all ranks, after the last backward.

        Raises `RuntimeError` where ranks had different numbers of micro-batches.
        """
        self._forget_fetch()
        num_own = self._num_micro_batches
        numbers = self.ranks.all_gather("gradients: micro-batches", torch.tensor([num_own])).reshape(-1).tolist()
        if len(set(numbers)) != 1:
            raise RuntimeError(f"ranks took different numbers of micro-batches since the last step: {numbers}")
        own = self._sum_of_own(num_own)
        total = summed_at_owners(self.ranks, self.ownership, own, num_own, self.embedding_dim)
        self.clear_gradients()
        if num_own == 0:
            return
        row_ids_U, grads_UD = total
        divisor = num_own * self.ranks.num_ranks if divide_by is None else divide_by
        grads_UD = grads_UD / divisor
        self._own.replace_gradients(self.own_file.to_local(RowIds(row_ids_U)), grads_UD)
        self._norm = self._gather_norm(grads_UD)
        self._stand_in = torch.tensor([self._norm])

    def _sum_of_own(self, num_own: int) -> TreeSum[RowGrads]:
        with self._pending_lock:
            pending, self._sums = self._sums, {}
        tree: TreeSum[RowGrads] = TreeSum(add_row_grads, self.ranks.rank * num_own)
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, self.embedding_dim)
        for number in range(num_own):
            # A row that a micro-batch met without a gradient has a zero.
            tree.push(pending.get(number, nothing))
        return tree

    def _gather_norm(self, grads_UD: torch.Tensor) -> float:
        """The norm of all ranks' gradients, rounded to float32: the same bits on all of them."""
        squares_U = row_squares(grads_UD)
        finite = bool(torch.isfinite(squares_U).all())
        mine: Fraction | None = exact_sum(squares_U.numpy()) if finite else None
        found = self.ranks.gather("gradients: norms", (mine, len(grads_UD)))
        self._num_rows_met = sum(count for _, count in found)
        parts = [part for part, _ in found if part is not None]
        norm = total_of(parts) ** 0.5 if len(parts) == len(found) else float("nan")
        return float(torch.tensor(norm, dtype=torch.float64).float())

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what stands in for the rows' gradients where code knows only parameters (`RowGradients`).

        That is the ids of the rows that this rank owns, and a tensor of one element, the norm of all ranks' rows. It
        is the same on all ranks, so that what clips or unscales it does the same on each. It scales no row: the
        factor goes to `scale_gradients`. None before `exchange_gradients`.
        """
        gradients = self._own.gradients()
        return None if gradients is None or self._stand_in is None else (gradients[0], self._stand_in)

    def replace_gradients(self, row_ids_U: torch.Tensor, grads_UD: torch.Tensor) -> None:
        """Puts others in place of this rank's rows' own. By all ranks."""
        self._own.replace_gradients(self._local_ids(row_ids_U), grads_UD)
        self._norm = self._gather_norm(grads_UD)
        self._stand_in = torch.tensor([self._norm])

    @property
    def num_rows_met(self) -> int:
        """Rows that had a gradient in the last `exchange_gradients`, over all ranks."""
        return self._num_rows_met

    def gradient_norm(self) -> float:
        """Return the norm of all ranks' rows together, as `exchange_gradients` left them; 0 where there are none.

        It is the same bits on all ranks, whatever their number.
        """
        return self._norm

    def scale_gradients(self, scale: float) -> None:
        """Multiply the gradients of the rows that this rank owns."""
        gradients = self._own.gradients()
        if gradients is not None and scale != 1.0:
            gradients[1].mul_(scale)

    def clear_gradients(self) -> None:
        """Forgets them, and which micro-batches there were."""
        self._forget_fetch()
        with self._pending_lock:
            self._sums = {}
        self._num_micro_batches = 0
        self._norm, self._stand_in = 0.0, None
        self._own.clear_gradients()

    def row_optimizer(self, kind: Callable[..., OptimizerT], **settings: Any) -> OptimizerT:
        """`RowWiseAdagrad` or `RowAdam` over the rows that this rank owns. By all ranks."""
        optimizer: OptimizerT = self._in_turn("optimizer", lambda: kind(self._own, **settings))
        return optimizer

    def open_state(self, name: str, width: int) -> RowState:
        """The optimizer state of that name, of the file that this rank stores to. By all ranks."""
        state: RowState = self._in_turn("state", lambda: self._own.open_state(name, width))
        return state

    def read_state(self, state: RowState, row_ids_U: torch.Tensor) -> torch.Tensor:
        """Of rows that this rank owns."""
        return self._own.read_state(state, self._local_ids(row_ids_U))

    def write_state(self, state: RowState, row_ids_U: torch.Tensor, values_UW: torch.Tensor) -> None:
        """Of rows that this rank owns."""
        self._own.write_state(state, self._local_ids(row_ids_U), values_UW)

    def protect(self, row_ids_U: torch.Tensor) -> None:
        """Rows that this rank owns."""
        self._own.protect(self._local_ids(row_ids_U))

    def write(self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor, *, stochastic: bool = False) -> None:
        """Rows that this rank owns. What `begin` brought before isn't changed."""
        self._own.write(self._local_ids(row_ids_U), rows_UD, stochastic=stochastic)

    def _local_ids(self, row_ids: torch.Tensor) -> LocalIds:
        """Of rows that this rank owns."""
        ids_U = RowIds(self._checked_ids(row_ids))
        others = ids_U[(ids_U < self.own_rows.start) | (ids_U >= self.own_rows.stop)]
        if len(others):
            raise PermissionError(
                f"row id {int(others[0])}: rank {self.ranks.rank} owns rows {self.own_rows.start} to "
                f"{self.own_rows.stop - 1} of {self.path}; the others are other ranks'"
            )
        return self.own_file.to_local(ids_U)

    def step_rows(self, optimizer: torch.optim.Optimizer) -> None:
        """The owner's update of its rows, and in one file the wait for all others'. By all ranks."""
        if self.gradients() is not None:
            optimizer.step()
        self.clear_gradients()
        if not self.is_in_shards:
            self.ranks.barrier("rows stored")  # nobody reads rows that are being stored

    def take_traffic(self) -> Traffic:
        """What was moved since the last call, on this rank."""
        traffic = Traffic(self.ranks.take_sent_bytes(), self._exchange_seconds, self._waited_seconds)
        self._exchange_seconds = self._waited_seconds = 0.0
        return traffic

    # Keeping

    @property
    def manifest(self) -> Manifest:
        """Of the file that this rank stores to, as of the last commit."""
        return self._own.manifest

    @property
    def generation(self) -> int:
        """Commits of the whole so far."""
        return self.manifest.generation if self._global is None else self._global.generation

    @property
    def updates(self) -> int:
        return self._own.updates

    @updates.setter
    def updates(self, updates: int) -> None:
        self._own.updates = updates

    @property
    def is_new(self) -> bool:
        return self._own.is_new

    @property
    def durability(self) -> str:
        return self._own.durability

    @durability.setter
    def durability(self, durability: str) -> None:
        self._own.durability = durability

    def commit(self, step: int | None = None, extra: Mapping[str, Any] | None = None) -> None:
        """Keeps what all ranks stored, their optimizer states, `step` and `extra` (any JSON object) together, or
        nothing of it. By all ranks. What fails on one is an error on all, and the table is opened again."""
        self._commit(step, extra, durable=self._own.durability == "power")

    def flush(self, step: int | None = None) -> None:
        """A commit that is on the disks when this returns."""
        self._commit(step, None, durable=True)

    def _commit(self, step: int | None, extra: Mapping[str, Any] | None, *, durable: bool) -> None:
        if self._global is not None:
            self._global = global_commit.commit_shards(
                self._own, self.ranks, self.global_path, self._global, step, extra, durable=durable
            )
        elif self.ranks.num_ranks > 1:
            global_commit.commit_one_file(self._own, self.ranks, step, extra, durable=durable)
        elif durable and extra is None:
            # Alone in one file: its manifest is the global one.
            self._own.flush(step)
        else:
            self._own.commit(step, extra)

    def copy_to(self, path: str | os.PathLike[str], *, states: bool = True, reflink_only: bool = False) -> None:
        """Copies all ranks' rows to one ordinary table; see `sense_v2.engram.ranks.range_copy`. By all ranks."""
        if reflink_only:
            raise with_way_out(
                OSError(f"{self.path} lies on several ranks, so a copy can't be a reflink"), "Leave reflink_only out"
            )
        range_copy.copy_table(self, path, states=states)

    def restore_from(self, path: str | os.PathLike[str]) -> None:
        """See `sense_v2.engram.ranks.range_copy`. By all ranks."""
        range_copy.restore_table(self, path)

    def rows_digest(self) -> None:
        """No rank has all rows as they are now."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.__copy__()

    def __copy__(self) -> Any:
        return copy.copy(self._copied())

    def __reduce__(self) -> Any:
        return self._copied().__reduce__()

    def _copied(self) -> MMapEmbeddingStorage:
        """What a copy is one of: alone, of the storage."""
        if self.ranks.num_ranks > 1:
            raise with_way_out(
                ValueError(
                    f"{self.path} is stored to by {self.ranks.num_ranks} ranks, so a copy wouldn't keep the rows of "
                    "its moment"
                ),
                "Save the model (save_pretrained), and open what was saved: from_pretrained(FOLDER)",
            )
        return self._own

    def close(self) -> None:
        """Lets go of the files; no other rank is waited for."""
        self._forget_fetch()
        self._fetch = None
        self._is_closed = True
        self._pool.shutdown()
        self._own.close()


def open_sharded_table(
    config: EngramConfig, tokenizer: EngramTokenizer, ranks: Ranks, *, layout: str, mode: str = "r+"
) -> ShardedTable:
    """`open_table` for a table that all ranks share, by all of them; `layout` as `ShardedTable` has it."""
    settings = table_settings(config, tokenizer)
    num_rows, width = settings.pop("num_embeddings"), settings.pop("embedding_dim")
    head_rows = [row for offsets_H in HeadLayout.from_config(config).offsets_LH for row in offsets_H]
    path, _ = config.paths(tokenizer.tokenizer_name)
    return ShardedTable(num_rows, width, path, ranks=ranks, layout=layout, head_rows=head_rows, mode=mode, **settings)
