"""`OverlayStorage`: changed rows on top of a table that is only read; it trains.

    lookup    rows of the base, and in the place of those that were changed, the changed ones
    write     changed rows, in memory
    commit    all changed rows ──▶ a delta (`sense_v2.engram.delta.delta_file`), a small file that replaces the last
    one

The base is never written to: a row that wasn't changed comes from it bit for bit, and so does one that was changed
back (`forget`). What a commit has written is mapped; memory holds what was stored since, so it follows the rows that
training touches between two commits, never the base. A commit writes the whole delta to a new file, syncs it and
renames it: whatever ends the process, the next opening has the last commit. That costs what the delta weighs, which
is right for facts and for a fine-tuning that touches a small part of a table, and wrong for one that touches most of
it: copy such a table and train the copy.

Rows are kept in the type that the base's are looked up as, so that a delta put into a copy of the base gives the same
bits as the overlay. bfloat16 is rounded to as a bfloat16 table does it.

N rows of the base, D row width, U row ids of a call, W values of a row of a state.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.delta.delta_file import Delta, DeltaInfo, Source, read_delta, write_delta
from sense_v2.engram.reading import devices
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.row_source import RowSource
from sense_v2.engram.table.disk import WriterLock
from sense_v2.engram.table.format import LOCK_SUFFIX, Manifest, as_json_object, row_dtype
from sense_v2.engram.table.named_files import NamedFiles
from sense_v2.engram.table_identity import Origin, TableIdentity
from sense_v2.engram.table_module import TableModule

FORGOTTEN = -1


class RecentRows:
    """Rows by id, in memory, in the order they came; found by bisection. Some ids may be marked as forgotten."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._ids = np.empty(0, dtype=np.int64)
        """Ascending."""
        self._slots = np.empty(0, dtype=np.int64)
        """Where each one's row is, or FORGOTTEN."""
        self._rows = torch.empty(0, width, dtype=dtype, device="cpu")
        self._num_rows = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> np.ndarray[Any, Any]:
        return self._ids

    @property
    def forgotten(self) -> np.ndarray[Any, Any]:
        return self._ids[self._slots == FORGOTTEN]

    def read_into(self, row_ids_U: np.ndarray[Any, Any], rows_UW: torch.Tensor) -> None:
        """Puts the rows that it has in their places; those that were forgotten stay."""
        is_here, places = find_ids(self._ids, row_ids_U)
        slots = self._slots[places]
        at = np.flatnonzero(is_here)[slots != FORGOTTEN]
        rows_UW[torch.from_numpy(at)] = self._rows[torch.from_numpy(slots[slots != FORGOTTEN])]

    def write(self, row_ids_U: np.ndarray[Any, Any], rows_UW: torch.Tensor) -> None:
        slots_U = self._slots_of(row_ids_U)
        is_new = slots_U == FORGOTTEN
        slots_U[is_new] = np.arange(self._num_rows, self._num_rows + is_new.sum())
        self._num_rows += int(is_new.sum())
        if self._num_rows > len(self._rows):
            grown = self._rows.new_empty(max(self._num_rows, 2 * len(self._rows)), self._rows.shape[1])
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        self._rows[torch.from_numpy(slots_U)] = rows_UW
        self._mark(row_ids_U, slots_U)

    def forget(self, row_ids_U: np.ndarray[Any, Any]) -> None:
        self._mark(row_ids_U, np.full(len(row_ids_U), FORGOTTEN, dtype=np.int64))

    def _slots_of(self, row_ids_U: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        is_here, places = find_ids(self._ids, row_ids_U)
        slots_U = np.full(len(row_ids_U), FORGOTTEN, dtype=np.int64)
        slots_U[is_here] = self._slots[places]
        return slots_U

    def _mark(self, row_ids_U: np.ndarray[Any, Any], slots_U: np.ndarray[Any, Any]) -> None:
        is_here, places = find_ids(self._ids, row_ids_U)
        self._slots[places] = slots_U[is_here]
        if not is_here.all():
            ids = np.concatenate([self._ids, row_ids_U[~is_here]])
            order = np.argsort(ids, kind="stable")
            self._slots = np.concatenate([self._slots, slots_U[~is_here]])[order]
            self._ids = ids[order]


def find_ids(
    sorted_ids: np.ndarray[Any, Any], row_ids_U: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Find which of row_ids_U are among `sorted_ids` [U], and where in it those are."""
    if not len(sorted_ids):
        return np.zeros(len(row_ids_U), dtype=bool), np.empty(0, dtype=np.int64)
    places_U = np.searchsorted(sorted_ids, row_ids_U)
    places_U[places_U == len(sorted_ids)] = 0
    is_here = sorted_ids[places_U] == row_ids_U
    return is_here, places_U[is_here]


@dataclass
class OverlayState:
    """An optimizer's state of the changed rows: float32, zeros for a row that hasn't been met."""

    name: str
    width: int
    step: int
    """Steps taken; goes to the file with the next commit."""
    recent: RecentRows


class OverlayStorage(TableModule):
    """`base` with changed rows on top, which are kept in the delta at `path`; the base is only read.

    With mode "r+", a delta that isn't there is made by the first commit; "r" only reads one that is. Without a `path`
    changed rows are in memory alone, and `export` writes them where they are wanted. `base` is a table of our own,
    opened with mode "r", of any dtype, or a released one; the overlay owns it, and closes it with itself. It can be
    another overlay, opened with mode "r": the delta then has what is changed on top of it, and is of the same table.

    Raises `ValueError` if the delta is damaged, or was made on another base than this one; `BlockingIOError` if a
    process writes to it already.

    >>> import tempfile
    >>> from sense_v2.engram.storage import MMapEmbeddingStorage
    >>> folder = tempfile.TemporaryDirectory()
    >>> MMapEmbeddingStorage(100, 8, folder.name + "/engram_table.dat").close()
    >>> base = MMapEmbeddingStorage(100, 8, folder.name + "/engram_table.dat", mode="r")
    >>> overlay = OverlayStorage(base, folder.name + "/facts.safetensors")
    >>> overlay.write(torch.tensor([3]), torch.ones(1, 8))
    >>> overlay.commit()
    >>> overlay.changed_ids, overlay.gather(torch.tensor([3]))[0, 0]
    (tensor([3]), tensor(1.))
    >>> overlay.close()
    """

    # What sets it on any storage may; a commit survives a power cut whatever it says.
    durability = "power"

    def __init__(self, base: RowSource, path: str | os.PathLike[str] | None = None, *, mode: str = "r+") -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, mode=mode)
        if base.mode != "r":
            raise with_way_out(
                ValueError(f"{base.path} is open with mode={base.mode!r}, and a base is only read"),
                "Open it with mode='r'",
            )
        self.base, self.dtype, self.is_released = base, base.dtype, base.is_released
        self.path = None if path is None else Path(path).absolute()
        self._base_identity = base.identity()
        self._kept: Delta | None = None
        self._states: dict[str, OverlayState] = {}
        self._lock: WriterLock | None = None
        self._named = NamedFiles()
        if self.path is not None and mode == "r+":
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock_path = self.path.with_name(self.path.name + LOCK_SUFFIX)
            self._lock = WriterLock(lock_path, str(self.path))
            self._named.add(lock_path)
        self._let_go = weakref.finalize(self, _release, self._lock)
        try:
            if self.path is not None and (mode == "r" or self.path.exists()):
                self._kept = read_delta(self.path)
                refuse_other_base(self._kept, base, self._base_identity)
        except BaseException:
            self._let_go()
            raise
        self._info = DeltaInfo(self._base_identity) if self._kept is None else self._kept.info
        self._updates = self._info.updates
        self._recent = RecentRows(self.embedding_dim, self.dtype)

    # What it is

    @property
    def table(self) -> RowSource:
        return self.base.table

    @property
    def whole_table(self) -> Any:
        return self.base.whole_table

    @property
    def belongs_to(self) -> Origin:
        return self.base.belongs_to

    @property
    def changed_ids(self) -> torch.Tensor:
        """int64, ascending: the rows that don't come from the table."""
        return torch.cat([self.own_ids, self.base.changed_ids]).unique()

    @property
    def own_ids(self) -> torch.Tensor:
        """int64, ascending: the rows that don't come from the base, which may be an overlay itself."""
        return torch.from_numpy(self._changed_ids().copy())

    def identity(self) -> TableIdentity:
        """The base's."""
        return self._base_identity

    @property
    def _name(self) -> object:
        return self.path or self.base.path

    # Reading

    def _read(self, row_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        return devices.move(self._rows(row_ids.reshape(-1)).view(*row_ids.shape, self.embedding_dim), device)

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begins to read the base's rows of `row_ids` [...] and returns at once. Raises as `forward`."""
        self._refuse_closed()
        self.base.prefetch(row_ids)

    def stats(self) -> ReadStats:
        self._refuse_closed()
        return self.base.stats()

    @property
    def reads_the_disk(self) -> bool:
        self._refuse_closed()
        return self.base.reads_the_disk

    @torch.no_grad()
    def _rows(self, ids_U: torch.Tensor) -> torch.Tensor:
        rows_UD: torch.Tensor = self.base(ids_U)
        self._put_changed(ids_U.numpy(), rows_UD, None)
        return rows_UD

    def _put_changed(
        self, row_ids_U: np.ndarray[Any, Any], rows_UW: torch.Tensor, state: OverlayState | None
    ) -> None:
        """In the places of the rows that were changed: the changed rows, or those of `state`."""
        if self._kept is not None:
            is_here, places = find_ids(self._kept.row_ids_U, row_ids_U)
            # One that was forgotten since is the base's again; the others are overwritten below.
            stays = ~np.isin(self._kept.row_ids_U[places], self._recent.forgotten)
            kept = self._kept.rows_UD if state is None else self._kept.states.get(state.name)
            if kept is not None:
                rows_UW[torch.from_numpy(np.flatnonzero(is_here)[stays])] = kept[torch.from_numpy(places[stays])]
        (self._recent if state is None else state.recent).read_into(row_ids_U, rows_UW)

    def _changed_ids(self) -> np.ndarray[Any, Any]:
        recent = self._recent.ids
        kept = recent[:0] if self._kept is None else self._kept.row_ids_U
        return np.setdiff1d(np.union1d(kept, recent), self._recent.forgotten, assume_unique=True)

    # Training

    def _store(self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor) -> None:
        self._recent.write(row_ids_U.numpy(), rows_UD)

    def forget(self, row_ids_U: torch.Tensor) -> None:
        """Takes back all changes of these rows: they are the base's again, and their optimizer states zeros."""
        self._refuse_no_writer("forget rows")
        ids = np.unique(self._checked_ids(row_ids_U).numpy())
        with self.changing:
            for recent in (self._recent, *(state.recent for state in self._states.values())):
                recent.forget(ids)
            self._updates += 1

    def open_state(self, name: str, width: int) -> OverlayState:
        """The optimizer state of that name, `width` values a row: zeros at first, later what it was."""
        self._refuse_no_writer("open an optimizer state")
        kept = None if self._kept is None else self._kept.states.get(name)
        known = self._states.get(name)
        known_width = known.width if known else kept.shape[1] if kept is not None else width
        if known_width != width:
            raise ValueError(f"optimizer state {name!r} of {self.path} has width {known_width}, asked for {width}")
        if known is None:
            step = self._info.state_steps.get(name, 0)
            known = self._states[name] = OverlayState(name, width, step, RecentRows(width, torch.float32))
        return known

    def read_state(self, state: OverlayState, row_ids_U: torch.Tensor) -> torch.Tensor:
        """Rows of an optimizer state [U, W], in memory of their own."""
        ids_U = self._checked_ids(row_ids_U)
        values_UW = torch.zeros(len(ids_U), state.width, dtype=torch.float32, device="cpu")
        self._put_changed(ids_U.numpy(), values_UW, state)
        return values_UW

    def write_state(self, state: OverlayState, row_ids_U: torch.Tensor, values_UW: torch.Tensor) -> None:
        """Stores rows of an optimizer state, [U, W]; as `write`."""
        self._refuse_no_writer("write to an optimizer state")
        ids_U = self._checked_ids(row_ids_U)
        self._refuse_shape("state rows", values_UW, (len(ids_U), state.width))
        with self.changing:
            state.recent.write(ids_U.numpy(), values_UW)

    # Keeping

    @property
    def manifest(self) -> Manifest:
        """What a table of these rows would say of itself, as of the last commit; for reading."""
        info = self._info
        return Manifest(
            self.num_embeddings,
            self.embedding_dim,
            row_dtype(self.dtype).name,
            provenance=info.base.provenance,
            step=info.step,
            extra=info.extra,
            updates=info.updates,
        )

    def commit(self, step: int | None = None, extra: Mapping[str, Any] | None = None) -> None:
        """Keeps changed rows, their optimizer states, `step` and `extra` (any JSON object) together, on the disk when
        it returns. Without a step or an extra, those of the commit before stay. Without a path they stay in memory.

        Raises `ValueError` for rows that aren't finite, `OSError` where there is no room; the last commit stays then.
        """
        self._refuse_no_writer("commit")
        with self.changing:
            info = self._next_info(step, extra)
            if self.path is not None:
                self._named.refuse_moved()
                self._write(self.path, info, states=True)
                self._kept = read_delta(self.path)
                self._begin_anew()
            self._info = info

    def flush(self, step: int | None = None) -> None:
        """A commit."""
        self.commit(step)

    def copy_to(
        self,
        path: str | os.PathLike[str],
        *,
        states: bool = True,
        reflink_only: bool = False,
        whole: bool = False,
    ) -> None:
        """Writes the changed rows as a delta of its own, and reads it back; `whole`: with those of overlays below.
        Raises as `commit`."""
        self._refuse_closed()
        with self.changing:
            self._write(Path(path), self._next_info(None, None), states=states, whole=whole)
        read_delta(path)

    def restore_from(self, path: str | os.PathLike[str]) -> None:
        """Makes changed rows, optimizer states, step and extra those of the delta at `path`, and commits. Raises
        `ValueError` where it is damaged or of another base; nothing has changed then."""
        self._refuse_no_writer("restore rows")
        delta = read_delta(path)
        refuse_other_base(delta, self.base, self._base_identity)
        for name, values_UW in delta.states.items():
            if name in self._states and self._states[name].width != values_UW.shape[1]:
                width = self._states[name].width
                raise ValueError(f"{path}: state {name!r} has width {values_UW.shape[1]}, open with {width}")
        with self.changing:
            self._kept, self._info = delta, delta.info
            self.discard()
            self.commit()

    def discard(self) -> None:
        """Takes back what was changed since the last commit; without a path, all changes."""
        self._refuse_no_writer("discard changes")
        with self.changing:
            self._begin_anew()
            for state in self._states.values():
                state.step = self._info.state_steps.get(state.name, 0)
            self._updates = self._info.updates
            self.clear_gradients()

    def _begin_anew(self) -> None:
        """Forgets what is in memory."""
        self._recent = RecentRows(self.embedding_dim, self.dtype)
        for state in self._states.values():
            state.recent = RecentRows(state.width, torch.float32)

    def _next_info(self, step: int | None, extra: Mapping[str, Any] | None) -> DeltaInfo:
        old = self._info
        return DeltaInfo(
            self._base_identity,
            step=old.step if step is None else operator.index(step),
            extra=old.extra if extra is None else as_json_object(extra),
            updates=self._updates,
            state_steps={**old.state_steps, **{name: state.step for name, state in self._states.items()}},
        )

    def _write(self, path: Path, info: DeltaInfo, *, states: bool, whole: bool = False) -> None:
        ids_U = self.changed_ids if whole else self.own_ids
        sources = {"rows": Source(self.embedding_dim, self.dtype, lambda part: self._rows(ids_U[part]))}
        if states:
            for name in info.state_steps:
                state = self._states.get(name) or self.open_state(name, self._kept_width(name))

                def read(part: slice, state: OverlayState = state) -> torch.Tensor:
                    return self.read_state(state, ids_U[part])

                sources[f"state.{name}"] = Source(state.width, torch.float32, read)
        else:
            info = DeltaInfo(info.base, info.step, info.extra, info.updates)
        write_delta(path, info, ids_U.numpy(), sources, like=path if path.exists() else self.base.path)

    def _kept_width(self, name: str) -> int:
        assert self._kept is not None
        return self._kept.states[name].shape[1]

    def release(self) -> RowSource:
        """Lets go of the delta and gives the base back, open. What wasn't committed is lost; the overlay can't be
        used after that."""
        self._let_go()
        self._is_closed = True
        self._kept = None
        self.clear_gradients()
        return self.base

    def close(self) -> None:
        """Lets go of delta and base. What wasn't committed is lost, and a warning says so where there is a path."""
        if self.path is not None:
            self._warn_uncommitted("they are lost")
        self.release().close()

    @property
    def has_gone_on(self) -> bool:
        return self.base.has_gone_on

    def _rows_digest(self) -> str | None:
        ids_U = self.changed_ids
        digest = hashlib.sha256(f"{self._base_identity.digest} {self.dtype}".encode())
        for part in ids_U.split(1 << 16):
            digest.update(part.numpy().tobytes())
            digest.update(self._rows(part).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> OverlayStorage:
        return self.__copy__()

    def __copy__(self) -> OverlayStorage:
        """Has the rows of its moment, whatever is committed to the delta later; it only reads where there is one."""
        copied = OverlayStorage(copy.copy(self.base)).train(self.training)
        # A commit replaces the file and lets go of the arrays: what both have here stays as it is.
        copied._kept, copied._info, copied._updates = self._kept, self._info, self._updates
        copied._recent = copy.deepcopy(self._recent)
        return copied._only_reading(self.path)

    def _only_reading(self, path: Path | None) -> OverlayStorage:
        if path is not None:
            self.path, self.mode, self.collects_gradients = path, "r", False
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle has the changed rows with it."""
        return _unpickled, (self.base, self.changed_ids, self._rows(self.changed_ids), self.training, self.path)

    def extra_repr(self) -> str:
        return f"{self.path}, {len(self._changed_ids())} rows changed of {self.num_embeddings}, mode={self.mode!r}"


def refuse_other_base(delta: Delta, base: RowSource, identity: TableIdentity) -> None:
    """Raises `ValueError` where a delta wasn't made on `base`, which `identity` names."""
    delta.info.base.refuse_other(identity, delta.path, base.path)
    if delta.rows_UD.dtype != base.dtype:
        raise with_way_out(
            ValueError(
                f"{delta.path} has rows of {delta.rows_UD.dtype}, and those of {base.path} are looked up as "
                f"{base.dtype}"
            ),
            "Make the delta anew",
        )


def _unpickled(
    base: RowSource, row_ids_U: torch.Tensor, rows_UD: torch.Tensor, training: bool, path: Path | None
) -> OverlayStorage:
    overlay = OverlayStorage(base).train(training)
    overlay.write(row_ids_U, rows_UD)
    return overlay._only_reading(path)


def _release(lock: WriterLock | None) -> None:
    if lock is not None:
        lock.release()
