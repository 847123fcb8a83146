"""Row ids -> rows: `MMapEmbeddingStorage`, a table on disk that reads, and trains.

The file is mapped, never loaded: memory follows the rows a batch touches. Nothing of it is a parameter or a buffer,
so `.to()`, `.half()` and `state_dict()` leave it alone.

Reading is `sense_v2.engram.reading.reader`'s. Training gathers the batch's unique rows into a small float32 leaf and
indexes that, so autograd never sees the table. The leaf's gradient comes back to the storage, from where a row
optimizer takes it (`sense_v2.engram.table_module`), updates those rows (`gather`, `write`) and clears it.

What is written is visible at once to every process that maps the file, and kept by `commit`: rows, states and step
together. Whatever ends the process, the next opening goes back to the last commit (`sense_v2.engram.table.journal`).

Long because reading, storing, committing and copying are methods on one mapping, its journal and its lock.

B batch, T sequence, H rows a position, D row width, N rows of the table, U unique rows of a batch.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.config import DURABILITIES
from sense_v2.core.errors import with_way_out
from sense_v2.engram import table_copy
from sense_v2.engram.reading import devices
from sense_v2.engram.reading.cold_policy import NoSmallReads
from sense_v2.engram.reading.earlier_rows import EarlierRows, file_id, put_aside
from sense_v2.engram.reading.gather import shared_tensor
from sense_v2.engram.reading.read_stats import ReadStats
from sense_v2.engram.reading.reader import RowReader, map_rows
from sense_v2.engram.table import disk, opening
from sense_v2.engram.table.checksums import from_hex, to_hex
from sense_v2.engram.table.disk import SyncError, WriterLock, has_holes
from sense_v2.engram.table.format import Manifest, StateEntry, as_json_object, row_dtype
from sense_v2.engram.table.journal import Journal
from sense_v2.engram.table.named_files import NamedFiles
from sense_v2.engram.table.opening import Share
from sense_v2.engram.table.undo_log import THREAD_NAME, TrackedFile, UndoLog
from sense_v2.engram.table_identity import digest_of_blocks
from sense_v2.engram.table_module import TableModule

JOURNAL_LIMIT_BYTES = 4 * 2**30


@dataclass
class RowState:
    """An optimizer's state: float32, one row for each row of the table, in a file of its own."""

    name: str
    path: Path
    values: torch.Tensor
    """[N, width], sharing the mapping."""
    step: int
    """Steps taken; goes to the manifest with the next commit."""

    @property
    def width(self) -> int:
        return self.values.shape[1]


class MMapEmbeddingStorage(TableModule):
    """A table of `num_embeddings` rows of `embedding_dim` values in the file at `path`.

    With mode "r+", a table that isn't there is made: normal noise of `init_std`, the same bytes from the same `seed`
    whatever `num_threads`. One that is there must have this number of rows, width and dtype, and its manifest must
    agree with `provenance` (any JSON object that says what the rows mean) in every field that both have. Mode "r"
    only reads. `progress` None shows a bar past 1 GB.

    `durability` says what a commit survives: "process" the death of the process at any moment, "power" a power cut as
    well, which takes a sync of the journal a step and one of the rows a commit. Between commits the journal may take
    `journal_limit_bytes`.

    `sparse=True` makes a table of zeros that takes disk space only where it is written to. `write` raises `OSError`
    where the disk is full; where another process takes the room in the same moment, the kernel kills this one
    (SIGBUS). (On a tmpfs rows that are only read take room as well.)

    `max_resident_bytes` bounds what of the table stays mapped into this process's memory: pages that were read are
    let go of, and mapped again when they are read again.

    `share` and `first_row` are for one of several processes that store to one table (`Share`), and for a table that
    holds the rows of a larger one from there on: `sense_v2.engram.ranks.sharded_table`.

    Mode "r+" makes this process the table's only writer until `close`, or until the storage is collected
    (`BlockingIOError` names the process that writes already). Its threads may store and commit at once. A forked
    child may read, not write.

    Mode "r" sees what is stored at once. With `hold`, rows stay what they are at opening, whatever this process
    stores to the file (`sense_v2.engram.reading.earlier_rows`). A copy (`copy.deepcopy`) is of this kind: read-only,
    with the rows of its moment. A pickle is of a commit, and refused once the table has gone on.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> table = MMapEmbeddingStorage(100, 8, folder.name + "/engram_table.dat")
    >>> rows_BTHD = table(torch.tensor([[[3, 99]]]))
    >>> rows_BTHD.shape, rows_BTHD.requires_grad
    (torch.Size([1, 1, 2, 8]), True)
    >>> rows_BTHD.sum().backward()
    >>> ids_U, grads_UD = table.gradients()
    >>> ids_U
    tensor([ 3, 99])
    >>> table.close()
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "float32",
        mode: str = "r+",
        seed: int = 0,
        init_std: float = 0.02,
        provenance: Mapping[str, Any] | None = None,
        num_threads: int | None = None,
        progress: bool | None = None,
        durability: str = "process",
        journal_limit_bytes: int = JOURNAL_LIMIT_BYTES,
        sparse: bool = False,
        max_resident_bytes: int | None = None,
        share: Share | None = None,
        first_row: int = 0,
        hold: bool = False,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, mode=mode)
        self.path: Path = opening.real_table(path)
        self._row_dtype = row_dtype(dtype)
        self.dtype = self._row_dtype.torch
        """Of looked-up rows; a compact table's lie on disk as bytes."""
        self._states: dict[str, RowState] = {}
        self._state_maps: dict[str, np.memmap[Any, Any]] = {}
        self._failed = self._sparse = False
        wanted = Manifest(
            self.num_embeddings,
            self.embedding_dim,
            self._row_dtype.name,
            init_seed=operator.index(seed),
            init_std=0.0 if sparse else float(init_std),
            provenance=as_json_object(provenance),
        )
        wanted.validate()
        if self._row_dtype.is_compact and mode == "r+":
            raise with_way_out(
                ValueError(
                    f"{self.path}: rows of {self._row_dtype.name} are only read: an update would be lost in their "
                    "rounding"
                ),
                "Open them with mode='r', or, to train, make a table of others from them: sense-engram convert "
                "TABLE --dtype float32 --output OTHER",
            )
        self._share = share
        self._files = files = opening.TableFiles(self.path, share.number if share else 0)
        if not self.path.exists():
            if mode == "r":
                raise with_way_out(
                    FileNotFoundError(f"{self.path}: no table there"), "mode='r+' makes one; mode='r' only reads"
                )
            opening.create_table(files, wanted, num_threads, progress, sparse=sparse, first_row=first_row)
        lock = opening.lock_table(files, write=mode == "r+")
        self._named = NamedFiles()
        self._undo = UndoLog(Journal(files.journal, self.num_embeddings, journal_limit_bytes, self._named))
        # Runs when the storage is collected, too; it must not refer to it.
        self._let_go = weakref.finalize(self, _let_go, self._undo, lock)
        self.durability = durability
        try:
            self._manifest = opening.checked_manifest(files, wanted, write=mode == "r+")
            if mode == "r":
                opening.refuse_live_journal(files, self._manifest)
            else:
                opening.recover(files, self._manifest)
                at = self._manifest
                self._undo.journal.begin(at.generation, at.commit_number, at.format_version)
            row_items = self._row_dtype.row_items(self.embedding_dim)
            self._mmap: np.memmap[Any, Any] | None = self._map(self.path, row_items, self._row_dtype.numpy)
            self._reader: RowReader | None = RowReader(
                self._mmap,
                self._row_dtype,
                self.path,
                width=self.embedding_dim,
                max_resident_bytes=max_resident_bytes,
            )
        except BaseException:
            self._let_go()
            raise
        self._small = self._reader.small
        rows = shared_tensor(self._mmap)
        self._weight: torch.Tensor | None = rows if self._row_dtype.is_compact else rows.view(self._row_dtype.torch)
        self._updates = self._manifest.updates
        self._track(self.path.name, self._weight, self._manifest.checksums, committed=True)
        self._file = file_id(self.path)
        self._earlier: EarlierRows | None = None
        self._earlier_digest: str | None = None
        if hold and mode == "r" and not self._row_dtype.is_compact:  # nobody stores compact rows
            self._hold(EarlierRows(self.path, self._weight))

    @property
    def durability(self) -> str:
        """What commits survive from here on: "process" or "power"."""
        return "power" if self._undo.durable else "process"

    @durability.setter
    def durability(self, durability: str) -> None:
        if durability not in DURABILITIES:
            raise ValueError(f"durability = {durability!r}: must be one of {', '.join(map(repr, DURABILITIES))}")
        self._undo.durable = durability == "power"

    def _map(self, path: Path, width: int, dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
        is_sparse = has_holes(path)
        self._sparse = self._sparse or is_sparse
        self._named.add(path)
        try:
            return map_rows(path, dtype, self.mode, (self.num_embeddings, width), has_holes=is_sparse)
        except OSError as error:
            if self.mode == "r":
                raise
            raise opening.cant_write(path, error) from error

    # Reading

    @property
    def weight(self) -> torch.Tensor:
        """[N, D], sharing the mapping. In mode "r" a write to it is a segmentation fault."""
        self._refuse_other_bytes()
        if self._row_dtype.is_compact:
            raise with_way_out(
                ValueError(f"{self.path}: rows of {self._row_dtype.name} are codes and scales"),
                "storage(row_ids) gives their values, storage.mmap their bytes",
            )
        assert self._weight is not None
        return self._weight

    @property
    def mmap(self) -> np.memmap[Any, Any]:
        """[N, D]; a bfloat16 table's bits as uint16. Of a compact table, [N, bytes of a row]."""
        self._refuse_other_bytes()
        assert self._mmap is not None
        return self._mmap

    def _read(self, row_ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        reader = self._opened_reader()
        if self._earlier is not None and self.has_gone_on:
            return devices.move(self._earlier.put_back(row_ids, reader.read(row_ids)), device)
        return reader.read(row_ids) if device.type == "cpu" else reader.read_to(row_ids, device)

    def prefetch(self, row_ids: torch.Tensor) -> None:
        """Begins to read these rows [...] from the disk, and returns at once. Rows in memory cost nearly nothing."""
        if not self._small.prefetch(row_ids):
            self._refuse_unusable(row_ids)
            self._opened_reader().prefetch(row_ids.detach().cpu())

    def stats(self) -> ReadStats:
        return self._opened_reader().stats()

    @property
    def reads_the_disk(self) -> bool:
        """True if batches came from the disk lately, so that `prefetch` pays."""
        # Every forward asks, and nearly always the answer needs no look at the kernel's counts.
        reader, small = self._opened_reader(), self._small
        return reader.reads_the_disk if small.slow else small.batches_to_ask > 0

    def _opened_reader(self) -> RowReader:
        if self._is_closed:
            self._refuse_closed()
        assert self._reader is not None
        return self._reader

    # Training

    def protect_soon(self, row_ids_U: torch.Tensor) -> None:
        """Begins to make these rows (unique, int64) ready to be stored to, and returns at once."""
        if self.mode == "r+" and self._process == os.getpid() and not self._failed:
            self._undo.protect_soon(row_ids_U)

    def protect(self, row_ids_U: torch.Tensor) -> None:
        """Makes these rows ready to be stored to, in the table and in all open states, or raises `OSError`."""
        self._refuse_no_writer("write rows")
        ids_U = self._checked_ids(row_ids_U)
        self._refuse_others_rows(ids_U)
        self._undo.protect(list(self._undo.files), ids_U)
        self._refuse_full_disk(ids_U, [self.weight, *(state.values for state in self._states.values())])

    def _store(self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor) -> None:
        self._store_to(self.path.name, self.weight, row_ids_U, rows_UD)

    def read_state(self, state: RowState, row_ids_U: torch.Tensor) -> torch.Tensor:
        """Rows of an optimizer state [U, width], in memory of their own."""
        return state.values.index_select(0, self._checked_ids(row_ids_U))

    def write_state(self, state: RowState, row_ids_U: torch.Tensor, values_UW: torch.Tensor) -> None:
        """Stores rows of an optimizer state, [U, width]; as `write`."""
        self._refuse_no_writer("write to an optimizer state")
        ids_U = self._checked_ids(row_ids_U)
        self._refuse_shape("state rows", values_UW, (len(ids_U), state.width))
        with self.changing:
            self._store_to(state.path.name, state.values, ids_U, values_UW)

    def _store_to(self, name: str, table_ND: torch.Tensor, ids_U: torch.Tensor, rows_UD: torch.Tensor) -> None:
        if not len(ids_U):
            return
        self._refuse_others_rows(ids_U)
        self._undo.protect([name], ids_U)
        self._refuse_full_disk(ids_U, [table_ND])
        if table_ND is self._weight:
            put_aside(self._file, ids_U)
        self._undo.stored = True
        disk.store(table_ND, ids_U, rows_UD)
        self._opened_reader().trim()

    def _refuse_others_rows(self, ids_U: torch.Tensor) -> None:
        share = self._share
        if share is not None:
            others = ids_U[(ids_U < share.first_row) | (ids_U >= share.stop_row)]
            if len(others):
                raise PermissionError(
                    f"row id {int(others[0])}: this process stores to rows {share.first_row} to {share.stop_row - 1} "
                    f"of {self.path}, its share {share.number}; the others are other processes'"
                )

    def _refuse_full_disk(self, ids_U: torch.Tensor, tables: list[torch.Tensor]) -> None:
        """Asked when the journal has what it needs of the same disk."""
        if self._sparse:
            row_bytes = [table_ND.shape[1] * table_ND.element_size() for table_ND in tables]
            disk.refuse_full_disk(self.path, len(ids_U), row_bytes)

    def open_state(self, name: str, width: int) -> RowState:
        """The optimizer state of that name, [N, width] float32: zeros at first, later what it was."""
        self._refuse_no_writer("open an optimizer state")
        listed = self._manifest.states.get(name)
        path = self._files.state(name, self._manifest)
        state = self._states.get(name)
        known_width = state.width if state else listed.width if listed else width
        if known_width != width:
            raise ValueError(f"optimizer state {path} has width {known_width}, asked for {width}")
        if state:
            return state
        self.refuse_moved()
        entry = opening.make_state_ready(self._files, self._manifest, name, width, sparse=self._sparse)
        mapping = self._map(path, width, np.dtype("<f4"))
        state = RowState(name, path, shared_tensor(mapping), entry.step)
        self._states[name], self._state_maps[name] = state, mapping
        self._track(path.name, state.values, entry.checksums, committed=listed is not None)
        return state

    def _track(self, name: str, values_NW: torch.Tensor, texts: list[str] | None, *, committed: bool) -> None:
        sums = None if texts is None else from_hex(texts)
        self._undo.track(TrackedFile(name, values_NW, sums, committed, self._manifest.format_version))

    # Keeping

    @property
    def manifest(self) -> Manifest:
        """As of the last commit, or of opening; for reading."""
        return self._manifest

    @property
    def is_new(self) -> bool:
        return self._updates == 0 and self._manifest.init_std is not None

    @property
    def journal_limit_bytes(self) -> int:
        """What the journal may grow to between two commits."""
        return self._undo.journal.limit_bytes

    @journal_limit_bytes.setter
    def journal_limit_bytes(self, limit_bytes: int) -> None:
        self._undo.journal.limit_bytes = limit_bytes

    @contextlib.contextmanager
    def one_commit(self) -> Iterator[None]:
        """Lets the journal grow to whatever one commit takes, however many rows it changes."""
        limit_bytes, self.journal_limit_bytes = self.journal_limit_bytes, 2**63 - 1
        try:
            yield
        finally:
            self.journal_limit_bytes = limit_bytes

    def commit(self, step: int | None = None, extra: Mapping[str, Any] | None = None) -> None:
        """Keeps rows, open optimizer states, `step` and `extra` together. After a sync that failed none succeeds: the
        kernel may have dropped what it couldn't write, and says so only once."""
        self._commit(step, extra, durable=self._undo.durable)

    def flush(self, step: int | None = None) -> None:
        """A commit that is on the disk when this returns, whatever `durability` says."""
        self._commit(step, None, durable=True)

    def _commit(self, step: int | None, extra: Mapping[str, Any] | None, *, durable: bool) -> None:
        self._refuse_no_writer("commit")
        if self._share is not None:
            raise ValueError(
                f"{self.path} is shared by several processes, which commit together: ShardedTable.commit"
            )
        with self.changing, self._undo.settled():
            old = self._manifest
            self.refuse_moved()
            self._refuse_unknown()  # the thread may just have failed to sync
            try:
                manifest, sums = self._synced_manifest(step, extra, durable=durable)
                disk.write_file(self._files.manifest, manifest.to_json(), like=self.path)
                self._adopt(manifest, sums)
            except BaseException as error:
                # Before the rename nothing has happened, if it wasn't a sync. After it the commit may or may not be
                # on the disk, and the journal still belongs to the one before: stores that it protects would stay.
                self._failed = isinstance(error, SyncError) or not opening.is_committed(self._files, old)
                raise

    @contextlib.contextmanager
    def prepared_commit(
        self, step: int | None, extra: Mapping[str, Any] | None, *, durable: bool
    ) -> Iterator[tuple[Manifest, Callable[[Manifest], None]]]:
        """A commit in which somebody else writes the manifest: everything is stored, and synced where `durable`, and
        the journal still undoes it. Gives the manifest to be, and what to call with the one that was written; where
        the block ends before that call, what is on disk isn't known, and the storage can't commit any more."""
        self._refuse_no_writer("commit")
        with self.changing, self._undo.settled():
            self.refuse_moved()
            self._refuse_unknown()
            failed, self._failed = self._failed, True
            manifest, _ = self._synced_manifest(step, extra, durable=durable)
            yield manifest, self._adopt_as_written
            if self._manifest.generation != manifest.generation:
                raise RuntimeError(f"{self.path}: a commit was prepared and not ended")
            self._failed = failed

    def _synced_manifest(
        self, step: int | None, extra: Mapping[str, Any] | None, *, durable: bool
    ) -> tuple[Manifest, dict[str, np.ndarray[Any, Any] | None]]:
        """The manifest of rows and states as they are now, and their block sums; `durable`: all on the disk."""
        if durable:
            self._undo.journal.sync()
            disk.sync_mapping(self.mmap, self.path)
            for name, mapping in self._state_maps.items():
                disk.sync_mapping(mapping, self._states[name].path)
        old, sums = self._manifest, self._undo.new_sums()
        texts = {file: None if values is None else to_hex(values) for file, values in sums.items()}
        open_states = {
            name: StateEntry(
                state.path.name, state.width, step=operator.index(state.step), checksums=texts[state.path.name]
            )
            for name, state in self._states.items()
        }
        manifest = old.next_commit(
            step=old.step if step is None else operator.index(step),
            extra=old.extra if extra is None else as_json_object(extra),
            updates=self._updates,
            checksums=texts[self.path.name],
            states={**old.states, **open_states},
        )
        return manifest, sums

    def _adopt(self, manifest: Manifest, sums: dict[str, np.ndarray[Any, Any] | None]) -> None:
        """This manifest is on the disk: everything from here on is undone to it."""
        self._manifest = manifest
        self._undo.committed(sums, manifest)

    def _adopt_as_written(self, manifest: Manifest) -> None:
        """As `_adopt`, of a manifest whose checksums may be others than this process's."""
        texts = manifest.checksums_of(self.path.name)
        self._adopt(manifest, {name: from_hex(texts[name]) if name in texts else None for name in self._undo.files})

    def close(self) -> None:
        """Lets go of the mappings and of the right to write. The next opening undoes what wasn't committed."""
        self._warn_uncommitted("the next opening undoes them")
        with self.changing if self._process == os.getpid() else contextlib.nullcontext():
            self._is_closed = True
            self._let_go()
            if self._reader is not None:
                self._reader.close()
            self._mmap = self._weight = self._reader = self._earlier = None
            self._small = NoSmallReads()
            self._states, self._state_maps = {}, {}
            self.clear_gradients()

    def copy_to(self, path: str | os.PathLike[str], *, states: bool = True, reflink_only: bool = False) -> None:
        """Copies the table of the last commit to `path`; see `sense_v2.engram.table_copy`."""
        with self.changing:
            table_copy.copy_table(self, path, states=states, reflink_only=reflink_only, earlier=self._earlier)

    def restore_from(self, path: str | os.PathLike[str]) -> None:
        """Makes the rows those of the copy at `path`, in one commit; see `sense_v2.engram.table_copy`."""
        with self.changing:
            table_copy.restore_table(self, path)

    def refuse_moved(self) -> None:
        """Raises `OSError` where table and states aren't at their paths any more: manifest and copies go by these."""
        self._named.refuse_moved()

    def _refuse_no_writer(self, what: str) -> None:
        super()._refuse_no_writer(what)
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        if self._failed or self._undo.failed:
            raise with_way_out(
                RuntimeError(
                    f"{self.path}: an earlier sync failed, or a commit was interrupted, so what is on disk isn't "
                    "known"
                ),
                "Open it again: that goes back to the last commit",
            )

    # Copies

    def _hold(self, earlier: EarlierRows) -> None:
        self._earlier = earlier
        earlier.tell.append(weakref.WeakMethod(self._read_in_python))
        if self.has_gone_on:
            self._read_in_python()

    def _read_in_python(self) -> None:
        self._small = NoSmallReads()

    @property
    def has_gone_on(self) -> bool:
        return self._earlier is not None and bool(self._earlier.row_ids)

    def _refuse_other_bytes(self) -> None:
        self._refuse_closed()
        if self.has_gone_on:
            raise ValueError(
                f"{self.path} has gone on since this copy of the table was made: storage(row_ids) gives the copy's "
                "rows, copy_to(…) writes them to a file"
            )

    def _rows_digest(self) -> str | None:
        if self.mode == "r+":
            with self.changing, self._undo.settled():
                sums = self._undo.new_sums()[self.path.name]
            return None if sums is None else digest_of_blocks(to_hex(sums))
        checksums = self._manifest.checksums
        return self._earlier_digest or (None if checksums is None else digest_of_blocks(checksums))

    def __deepcopy__(self, memo: dict[int, Any]) -> MMapEmbeddingStorage:
        return self.__copy__()

    def __copy__(self) -> MMapEmbeddingStorage:
        copied = _reopen(*self._arguments(), hold=True)
        if copied._file != self._file:
            raise with_way_out(
                ValueError(f"{self.path} isn't the file any more that was opened"), "open the table again to copy it"
            )
        copied._manifest, copied._updates = self._manifest, self._updates
        if self._updates != self._manifest.updates:
            copied._earlier_digest = self.rows_digest()
        if self._earlier is not None:
            copied._hold(self._earlier)
            copied._earlier_digest = self._earlier_digest
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        if self._updates != self._manifest.updates:
            raise with_way_out(
                ValueError(f"{self.path} has updates since its last commit"), "commit() before it is pickled"
            )
        return _unpickled, (self._arguments(), self._manifest.commit)

    def _arguments(self) -> tuple[Any, ...]:
        return self.num_embeddings, self.embedding_dim, str(self.path), self._row_dtype.name, self.training

    def extra_repr(self) -> str:
        shape = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{shape}, {str(self.path)!r}, dtype={self.dtype}, mode={self.mode!r}"


def _reopen(
    num_embeddings: int, embedding_dim: int, path: str, dtype: str, training: bool, *, hold: bool
) -> MMapEmbeddingStorage:
    storage = MMapEmbeddingStorage(num_embeddings, embedding_dim, path, dtype=dtype, mode="r", hold=hold)
    return storage.train(training)


def _unpickled(arguments: tuple[Any, ...], commit: str | None) -> MMapEmbeddingStorage:
    storage = _reopen(*arguments, hold=True)
    if storage.manifest.commit != commit:
        raise ValueError(
            f"{storage.path} has gone on since it was pickled (commit {commit}, now {storage.manifest.commit}), and "
            "rows that changed can't be had back: pickle it again, or keep a copy (copy_to, save_pretrained)"
        )
    return storage


def _let_go(undo: UndoLog, lock: WriterLock | None) -> None:
    if threading.current_thread().name.startswith(THREAD_NAME):
        # Collected by the journal's own thread, in the middle of a record: another one has to wait for its end.
        threading.Thread(target=_let_go, args=(undo, lock), name="sense-v2-close").start()
        return
    undo.close()
    if lock is not None:
        lock.release()
