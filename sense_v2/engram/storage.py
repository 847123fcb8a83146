"""Row ids -> rows: `MMapEmbeddingStorage`, a table on disk that reads, and trains, like an embedding.

The file is mapped, never loaded: memory follows the rows a batch touches. Nothing of it is a parameter or a buffer,
so `.to()`, `.half()` and `state_dict()` leave it alone.

Reading is `index_select` on the mapping. Training gathers the batch's unique rows into a small float32 leaf and
indexes that, so autograd never sees the table; when the leaf has its gradient, a hook moves it to the storage, from
where a row optimizer takes it (`gradients`), updates those rows (`gather`, `write`) and clears it. The storage holds
no leaf: a forward without a backward leaves nothing behind.

What is written is visible at once to every process that maps the file, and durable after `flush`.

B batch, T sequence, H rows a position, D row width, N rows of the table, U unique rows of a batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import operator
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sense_v2.engram.fill import MadeMeanwhileError, allocate, fill_normal, new_file, sync, wait_for_new_file
from sense_v2.engram.format import (
    STATE_DTYPE,
    Manifest,
    StateEntry,
    as_json_object,
    file_bytes,
    manifest_name,
    merge_provenance,
    provenance_differences,
    row_dtype,
    state_file_name,
)


@dataclass
class RowState:
    """An optimizer's state: float32, one row for each row of the table, in a file of its own."""

    name: str
    path: Path
    values: torch.Tensor
    """[N, width], sharing the mapping."""
    step: int
    """Steps taken; goes to the manifest with the next flush."""


class MMapEmbeddingStorage(nn.Module):
    """A table of `num_embeddings` rows of `embedding_dim` values in the file at `path`.

    With mode "r+", a table that isn't there is made: normal noise of `init_std`, the same bytes from the same `seed`
    whatever `num_threads`. One that is there must have this number of rows, width and dtype, and its manifest must
    agree with `provenance` in every field that both have. Mode "r" only reads.

    `provenance` is any JSON object that says what the rows mean; `progress` None shows a bar past 1 GB.

    A copy (deepcopy, pickle) opens the same file again, read-only.

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
    ) -> None:
        super().__init__()
        if mode not in ("r", "r+"):
            raise ValueError(f"mode = {mode!r}: must be 'r+' (read and train) or 'r' (read)")
        self.num_embeddings, self.embedding_dim = operator.index(num_embeddings), operator.index(embedding_dim)
        self.path, self.mode = Path(path), mode
        self._row_dtype = row_dtype(dtype)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pending_lock = threading.Lock()
        self.rows_require_grad = True
        self._states: dict[str, RowState] = {}
        self._state_maps: dict[str, np.memmap[Any, Any]] = {}
        self._sync_failed = False
        wanted = Manifest(
            self.num_embeddings,
            self.embedding_dim,
            self._row_dtype.name,
            init_seed=operator.index(seed),
            init_std=float(init_std),
            provenance=as_json_object(provenance),
        )
        wanted.validate()
        self._manifest_path = self.path.with_name(manifest_name(self.path.name))
        if not self.path.exists():
            self._create(wanted, num_threads, progress)
        self._manifest = self._checked_manifest(wanted)
        self._mmap: np.memmap[Any, Any] | None = self._map(self.path, self.embedding_dim, self._row_dtype.numpy)
        self._weight: torch.Tensor | None = _shared_tensor(self._mmap).view(self._row_dtype.torch)

    # Opening

    def _create(self, manifest: Manifest, num_threads: int | None, progress: bool | None) -> None:
        """Makes the table, then its manifest; a process that finds another one at it waits and makes neither.

        Both are synced under temporary names before the table is renamed, and the manifest last: a kill leaves
        nothing, or a whole table, in the worst case without the manifest.
        """
        if self.mode == "r":
            raise FileNotFoundError(f"{self.path}: no table there. mode='r+' makes one; mode='r' only reads")
        if self.path.is_symlink():
            # Most likely a disk that isn't mounted: a new table would take the link's place, on this disk.
            raise FileNotFoundError(f"{self.path} links to {os.readlink(self.path)}, which isn't there")
        with contextlib.suppress(MadeMeanwhileError), new_file(self._manifest_path) as manifest_fd:
            self._refuse_left_states()
            os.pwrite(manifest_fd, manifest.to_json().encode(), 0)
            os.fsync(manifest_fd)
            with new_file(self.path) as fd:
                allocate(fd, manifest.table_bytes, self.path)
                fill_normal(
                    fd,
                    manifest.rows * manifest.width,
                    manifest.dtype,
                    seed=manifest.init_seed or 0,
                    std=manifest.init_std or 0.0,
                    num_threads=num_threads,
                    progress=progress,
                )
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self._manifest_path} describes a table, but {self.path} isn't there. Put it back, or remove "
                "the manifest to make a new one"
            )

    def _refuse_left_states(self) -> None:
        """A new table must not be trained on with an old table's optimizer state."""
        pattern = glob.escape(state_file_name(self.path.name, "_")).replace("._.", ".*.")
        left = [path for path in self.path.parent.glob(pattern) if path != self.path and not _is_table(path)]
        if left:
            names = ", ".join(sorted(path.name for path in left))
            raise ValueError(
                f"{self.path} isn't there, but optimizer state of an earlier table is: {names}. Remove it"
            )

    def _checked_manifest(self, wanted: Manifest) -> Manifest:
        """The manifest on disk, once it and the file agree with what the caller wants."""
        if not self.path.is_file():
            raise ValueError(f"{self.path} isn't a regular file")
        found_bytes = self.path.stat().st_size
        if not self._manifest_path.exists():
            # Its maker may be between the two renames.
            wait_for_new_file(self._manifest_path)
        if not self._manifest_path.exists():
            if found_bytes != wanted.table_bytes:
                raise ValueError(
                    f"{self.path}: expected {wanted.table_bytes} bytes ({wanted.rows} rows × {wanted.width} "
                    f"{wanted.dtype}), found {found_bytes}, and there is no manifest {self._manifest_path}"
                )
            warnings.warn(
                f"{self.path} has no manifest: its size fits, what its rows mean isn't known. "
                "It gets a manifest with its first flush",
                UserWarning,
                stacklevel=3,
            )
            return Manifest(wanted.rows, wanted.width, wanted.dtype, provenance=wanted.provenance)
        try:
            manifest = Manifest.from_json(self._manifest_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self._manifest_path}: {error}") from error
        recorded = {name: getattr(manifest, name) for name in ("rows", "width", "dtype")}
        given = {name: getattr(wanted, name) for name in recorded}
        differences = provenance_differences(recorded, given)
        differences += provenance_differences(manifest.provenance, wanted.provenance)
        if differences:
            found = "; ".join(f"{name} is {old!r}, asked for {new!r}" for name, old, new in differences)
            raise ValueError(
                f"{self._manifest_path} describes another table: {found}. Open it with the configuration it was made "
                "with, or choose another path"
            )
        if found_bytes != manifest.table_bytes:
            raise ValueError(
                f"{self.path}: expected {manifest.table_bytes} bytes ({manifest.rows} rows × {manifest.width} "
                f"{manifest.dtype}), found {found_bytes}: the file was cut, or isn't the manifest's"
            )
        manifest.provenance = merge_provenance(manifest.provenance, wanted.provenance)
        return manifest

    def _map(self, path: Path, width: int, dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
        mode: Any = self.mode
        try:
            return np.memmap(path, dtype=dtype, mode=mode, shape=(self.num_embeddings, width))
        except OSError as error:
            if self.mode == "r":
                raise
            way_out = "mode='r' opens a table that can't be written to"
            raise OSError(error.errno, f"can't open {path} to write: {error.strerror}. {way_out}") from error

    # Reading

    @property
    def dtype(self) -> torch.dtype:
        return self._row_dtype.torch

    @property
    def weight(self) -> torch.Tensor:
        """[N, D], sharing the mapping. In mode "r" a write to it is a segmentation fault."""
        self._refuse_closed()
        assert self._weight is not None
        return self._weight

    @property
    def mmap(self) -> np.memmap[Any, Any]:
        """[N, D]; a bfloat16 table's bits as uint16."""
        self._refuse_closed()
        assert self._mmap is not None
        return self._mmap

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """row_ids [...] of int64 or int32 -> rows [..., D] in the table's dtype, on the ids' device.

        In training, with gradients enabled and mode "r+", the rows' gradients reach `gradients()`.
        Raises `IndexError` for an id outside 0 … N - 1, `TypeError` for other dtypes.
        """
        ids = self._checked_ids(row_ids)
        shape = (*row_ids.shape, self.embedding_dim)
        trained = self.training and self.rows_require_grad and self.mode == "r+"
        if not (trained and torch.is_grad_enabled()):
            return self._select(ids).to(row_ids.device).reshape(shape)
        ids_U, inverse = torch.unique(ids, return_inverse=True)
        leaf_UD = self._select(ids_U).to(row_ids.device, torch.float32).requires_grad_()
        leaf_UD.register_post_accumulate_grad_hook(self._gradient_hook(ids_U))
        return F.embedding(inverse.to(row_ids.device), leaf_UD).to(self.dtype).reshape(shape)

    def gather(self, row_ids_U: torch.Tensor) -> torch.Tensor:
        """Rows as float32 [U, D] in memory of their own, without gradient: what a row update computes with."""
        return self._select(self._checked_ids(row_ids_U)).float()

    def _checked_ids(self, row_ids: torch.Tensor) -> torch.Tensor:
        if not isinstance(row_ids, torch.Tensor) or row_ids.dtype not in (torch.int64, torch.int32):
            found = row_ids.dtype if isinstance(row_ids, torch.Tensor) else type(row_ids).__name__
            raise TypeError(f"row ids are a tensor of int64 or int32, not {found}")
        return row_ids.detach().cpu().reshape(-1)

    def _select(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        try:
            return torch.index_select(weight, 0, ids)
        except IndexError:
            # index_select checks every id anyway; which one it was is only looked for when there is one.
            self._refuse_out_of_range(ids)
            raise

    def _refuse_out_of_range(self, ids: torch.Tensor) -> None:
        outside = ids[(ids < 0) | (ids >= self.num_embeddings)]
        if len(outside):
            raise IndexError(f"row id {int(outside[0])}: {self.path} has rows 0 to {self.num_embeddings - 1}")

    # Training

    def requires_grad_(self, requires_grad: bool = True) -> MMapEmbeddingStorage:
        """False freezes the rows: lookups carry no gradient. The table has no parameters to say so for it."""
        self.rows_require_grad = requires_grad
        return self

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

    def clear_gradients(self) -> None:
        with self._pending_lock:
            self._pending = []

    def write(self, row_ids_U: torch.Tensor, rows_UD: torch.Tensor) -> None:
        """Stores rows, rounded to the table's dtype. Ids must be unique: of two rows for one id, either may stay."""
        self._refuse_read_only("write rows")
        ids_U = self._checked_ids(row_ids_U)
        if rows_UD.shape != (len(ids_U), self.embedding_dim):
            raise ValueError(f"rows have shape {list(rows_UD.shape)}, not [{len(ids_U)}, {self.embedding_dim}]")
        self._refuse_out_of_range(ids_U)
        self.weight.index_copy_(0, ids_U.to(torch.int64), rows_UD.detach().to("cpu", self.dtype))

    def open_state(self, name: str, width: int) -> RowState:
        """The optimizer state of that name, [N, width] float32: zeros at first, later what it was."""
        self._refuse_read_only("open an optimizer state")
        self._refuse_closed()
        entry = self._manifest.states.get(name)
        path = self.path.with_name(entry.file if entry else state_file_name(self.path.name, name))
        expected_bytes = file_bytes(self.num_embeddings, width, STATE_DTYPE)
        state = self._states.get(name)
        known_width = state.values.shape[1] if state else entry.width if entry else width
        if known_width != width:
            raise ValueError(f"optimizer state {path} has width {known_width}, asked for {width}")
        if state:
            return state
        if _is_table(path) or path == self.path:
            raise ValueError(f"{path} is a table: optimizer state {name!r} can't be there")
        if not path.exists():
            if entry:
                raise FileNotFoundError(
                    f"{self._manifest_path} lists optimizer state {path}, which isn't there. Put it back, or remove "
                    f"the entry states.{name} to begin with zeros"
                )
            with contextlib.suppress(MadeMeanwhileError), new_file(path) as fd:
                allocate(fd, expected_bytes, path)
        found_bytes = path.stat().st_size
        if found_bytes != expected_bytes:
            raise ValueError(
                f"optimizer state {path}: expected {expected_bytes} bytes ({self.num_embeddings} rows × {width} "
                f"{STATE_DTYPE}), found {found_bytes}"
            )
        mapping = self._map(path, width, np.dtype("<f4"))
        state = RowState(name, path, _shared_tensor(mapping), entry.step if entry else 0)
        self._states[name], self._state_maps[name] = state, mapping
        return state

    # Keeping

    @property
    def manifest(self) -> Manifest:
        """As of the last flush, or of opening; for reading."""
        return self._manifest

    @property
    def committed_step(self) -> int | None:
        """The step that the last flush to name one was given; None before that."""
        return self._manifest.step

    def flush(self, step: int | None = None) -> None:
        """Makes rows and states durable, then the manifest that says so, one generation on.

        After a sync that failed no flush can succeed: the kernel may have dropped what it couldn't write, and says so
        only once.
        """
        self._refuse_read_only("flush")
        self._refuse_closed()
        if self._sync_failed:
            raise RuntimeError(f"{self.path}: an earlier flush failed, so what is on disk isn't known. Open it again")
        states = dict(self._manifest.states)
        for name, state in self._states.items():
            states[name] = StateEntry(state.path.name, state.values.shape[1], step=operator.index(state.step))
        manifest = dataclasses.replace(
            self._manifest,
            generation=self._manifest.generation + 1,
            step=self._manifest.step if step is None else operator.index(step),
            states=states,
        )
        manifest.validate()
        try:
            for mapping in (self.mmap, *self._state_maps.values()):
                mapping.flush()
            for path in (self.path, *(state.path for state in self._states.values())):
                sync(path)
        except OSError:
            self._sync_failed = True
            raise
        with new_file(self._manifest_path, replace=True) as fd:
            os.pwrite(fd, manifest.to_json().encode(), 0)
        self._manifest = manifest

    def close(self) -> None:
        """Lets go of the mappings, without a flush. The storage can't be used after that."""
        self._mmap = self._weight = None
        self._states, self._state_maps = {}, {}
        self.clear_gradients()

    def _refuse_read_only(self, what: str) -> None:
        if self.mode == "r":
            raise PermissionError(f"{self.path} is open with mode='r': can't {what}. Open it with mode='r+'")

    def _refuse_closed(self) -> None:
        if self._mmap is None:
            raise RuntimeError(f"{self.path}: the storage is closed; make a new one to open the table again")

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.num_embeddings, self.embedding_dim, str(self.path.absolute()), self._row_dtype.name)
        return _reopen, (*arguments, self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {str(self.path)!r}, dtype={self.dtype}, mode={self.mode!r}"
        )


def _reopen(num_embeddings: int, embedding_dim: int, path: str, dtype: str, training: bool) -> MMapEmbeddingStorage:
    return MMapEmbeddingStorage(num_embeddings, embedding_dim, path, dtype=dtype, mode="r").train(training)


def _is_table(path: Path) -> bool:
    """Whether a file that could be a state, by its name, is a table with a manifest of its own."""
    return path.with_name(manifest_name(path.name)).exists()


class _Memory:
    """Lends an array's memory, declared writable: torch has no read-only tensors and warns, once a process, about
    arrays that are. Keeps the array, and with it the mapping, alive."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _shared_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(_Memory(array)))
