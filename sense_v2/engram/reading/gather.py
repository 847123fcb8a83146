"""Row ids -> rows of an array in memory: one copy a row, or one row decoded, bounds checked.

The array is usually a mapped file whose pages are in memory. A small call is dominated by what Python does around
it, a large one by memory: page faults of a fresh result cost more than the copies.

Where `_gather.c` was compiled (an optional extension), it copies, large results the way that it finds to be the
fastest on this machine (`_ways.h`, `fix_way`), and a result's memory is filled again as soon as
nothing refers to it: no tensor, no view of one, no array made from it, no operation that saved it for its backward.
PyTorch tells when a tensor's storage is freed (`_results.h`). Without the extension NumPy and PyTorch copy, to the
same bytes and several times slower, and every result is new memory. So it is with the extension under a PyTorch
before 2.10, which can't be handed memory. benchmarks/lookup.py measures all of it.

N rows, D row width.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sense_v2.engram.reading.block_rows import BlockFormat, blocks_of, decode_blocks
from sense_v2.engram.table.compact_rows import decode, split
from sense_v2.engram.table.format import RAW_BYTES, ROW_DTYPES, RowDtype

# Of `_gather.c`: what it offers this version of the library.
INTERFACE = 6


def _load_compiled() -> Any:
    try:
        found = importlib.import_module("sense_v2.engram.reading._gather")
    except ImportError as error:
        warnings.warn(
            f"this installation has no compiled part ({error}): rows are read and hashed several times slower, "
            "to the same bytes. Install a C compiler and Python's headers, then sense-v2 again (pip install "
            "--force-reinstall --no-deps; -v shows why it isn't compiled). On Windows there is none",
            UserWarning,
            stacklevel=2,
        )
        return None
    if getattr(found, "INTERFACE", None) != INTERFACE:
        warnings.warn(
            f"{found.__file__} was compiled from another version's source, and isn't used: rows are read slowly. "
            "Install sense-v2 again (pip install -e . in a checkout)",
            UserWarning,
            stacklevel=2,
        )
        return None
    return found


compiled: Any = _load_compiled()

WAYS = (
    "one by one",
    "ahead",
    "2 side by side",
    "4 side by side",
    "one by one, past the cache",
    "ahead, past the cache",
    "2 side by side, past the cache",
    "4 side by side, past the cache",
)
"""How the extension can copy the rows of a large result, in `_copy.h`'s order. The bytes are the same."""

# From here on PyTorch's index_select, which has threads, is faster than NumPy's take.
MANY_IDS = 1024
_ID_BYTES = {torch.int64: 8, torch.int32: 4}
# PyTorch's table of C functions that turn memory into tensors: DLPack's, for whoever has no header of PyTorch's.
_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
# DLPack's numbers of the types that rows have.
_DLPACK_CODES = {torch.uint8: 1, torch.float16: 2, torch.float32: 2, torch.bfloat16: 4}


@dataclass(frozen=True)
class FoundWay:
    """What was found of rows of one width: see `found_ways`."""

    row_bytes: int
    past_the_cache: bool
    """Whether the results are large enough to be stored past the cache."""
    way: str | None
    """The fastest way. None while not all of them have been timed often enough."""
    ns_per_row: dict[str, float]
    """The fastest piece of those that have."""


def fix_way(way: str | None) -> None:
    """Copy the rows of large results this way from now on, in this process.

    Without it, or with None, the extension times the ways on the first large results of each row width and keeps the
    fastest (`_ways.h`). A way past the cache is taken for results that are stored past it, others its namesake.

    Args:
        way: One of `WAYS`.

    Raises:
        ValueError: There is no such way.
        RuntimeError: There is no compiled extension, without which NumPy and PyTorch copy.
    """
    if way is not None and way not in WAYS:
        raise ValueError(f"way = {way!r}: must be None or one of {', '.join(map(repr, WAYS))}")
    if compiled is None:
        raise RuntimeError(
            "the extension wasn't compiled, so NumPy and PyTorch copy rows, and there is no way to choose. "
            "Install a C compiler, and sense-v2 again"
        )
    compiled.fix_way(-1 if way is None else WAYS.index(way))


def found_ways() -> list[FoundWay]:
    """Say which way was found to be the fastest, of each row width that large results have had in this process."""
    found = [] if compiled is None else compiled.found_ways()
    return [
        FoundWay(
            row_bytes,
            bool(stream),
            None if way < 0 else WAYS[way],
            {name: ns for name, ns in zip(WAYS, medians, strict=False) if ns},
        )
        for row_bytes, stream, way, medians in found
    ]


def lookup_of(
    rows_ND: np.ndarray[Any, Any],
    dtype: torch.dtype,
    *,
    width: int | None = None,
    blocks: BlockFormat | None = None,
    fd: int = -1,
    file_bytes: int = 0,
    slow_ns: int = 0,
    slow_ns_per_row: int = 0,
) -> Any:
    """`_gather.c`'s Lookup of an array whose rows are looked up as `dtype`; rows of blocks have `width` values. None
    where it can't be made: no extension, an older PyTorch, or another DLPack."""
    if compiled is None or _exchange is None or dtype not in _DLPACK_CODES:
        return None
    of_rows = (rows_ND, len(rows_ND), width or rows_ND.shape[1], _DLPACK_CODES[dtype], 8 * dtype.itemsize)
    waits = (fd, file_bytes, slow_ns, slow_ns_per_row)
    try:
        return compiled.Lookup(*of_rows, _exchange, torch.Tensor, *waits, blocks.number if blocks else 0)
    except NotImplementedError:
        return None


class OutOfRangeError(IndexError):
    """A row id that the table doesn't have; `row_id` is the first one."""

    def __init__(self, row_id: int, num_rows: int) -> None:
        super().__init__(f"row id {row_id}: there are rows 0 to {num_rows - 1}")
        self.row_id = row_id


class RowGather:
    """Gathers rows of `rows_ND`, a C-contiguous array whose rows are of `dtype`; keeps the array alive."""

    blocks: BlockFormat | None = None

    def __init__(self, rows_ND: np.ndarray[Any, Any], dtype: RowDtype, width: int | None = None) -> None:
        # Not the memmap class: its indexing runs Python code for every result.
        self._rows_ND = np.ndarray(rows_ND.shape, rows_ND.dtype, buffer=rows_ND)
        self._tensor_ND = shared_tensor(rows_ND)
        self.num_rows, self.width = len(rows_ND), width or rows_ND.shape[1]
        self.row_bytes = rows_ND.shape[1] * rows_ND.itemsize
        self.address = int(rows_ND.ctypes.data)
        self._dtype = dtype
        self._lookup = lookup_of(rows_ND, dtype.torch, width=self.width, blocks=self.blocks)

    def __call__(self, row_ids: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """row_ids [...] of int64 or int32, on the CPU -> rows [..., D].

        `out`, [..., D], contiguous and of the rows' dtype, is filled and returned in a new result's place.
        Raises `OutOfRangeError` for an id outside 0 … N - 1, and nothing is copied then.
        """
        if not row_ids.is_contiguous():
            row_ids = row_ids.contiguous()
        num_ids = row_ids.numel()
        num_threads = torch.get_num_threads() if num_ids >= MANY_IDS else 1
        if out is None and self._lookup is not None:
            found = self._lookup.gather(row_ids, num_threads)
            if isinstance(found, torch.Tensor):
                return found
            if found is not None:
                raise self._out_of_range(row_ids, found)
        rows = (
            torch.empty((*row_ids.shape, self.width), dtype=self._dtype.torch, device="cpu") if out is None else out
        )
        array = self._as_array(rows)
        if compiled is None:
            self._plain(row_ids, array, num_ids)
        else:
            bad = compiled.gather(
                self.address,
                self.num_rows,
                self.row_bytes,
                row_ids.data_ptr(),
                num_ids,
                _ID_BYTES[row_ids.dtype],
                array,
                num_threads,
                self.width,
                self.blocks.number if self.blocks else 0,
            )
            if bad >= 0:
                raise self._out_of_range(row_ids, bad)
        return rows

    def _out_of_range(self, row_ids: torch.Tensor, position: int) -> OutOfRangeError:
        return OutOfRangeError(int(row_ids.reshape(-1)[position]), self.num_rows)

    def _as_array(self, rows: torch.Tensor) -> np.ndarray[Any, Any]:
        """The same memory. For bfloat16, which NumPy lacks, as the table's array has it."""
        array: np.ndarray[Any, Any] = rows.detach().view(self._tensor_ND.dtype).numpy()
        return array

    def _plain(self, row_ids: torch.Tensor, array: np.ndarray[Any, Any], num_ids: int) -> None:
        ids = row_ids.reshape(-1)
        numbers = ids.numpy()
        # A negative id is a large one without its sign: one comparison for both ends.
        unsigned = numbers.view(np.uint64 if numbers.itemsize == 8 else np.uint32)
        if num_ids and np.maximum.reduce(unsigned) >= self.num_rows:
            raise OutOfRangeError(int(numbers[np.argmax(unsigned >= self.num_rows)]), self.num_rows)
        self._take(ids, array.reshape(num_ids, self.width))

    def _take(self, ids: torch.Tensor, flat: np.ndarray[Any, Any]) -> None:
        """Without the extension: copies rows of ids that the table has."""
        num_ids, numbers = len(ids), ids.numpy()
        if num_ids < MANY_IDS:
            # "raise", the default, would gather into memory of its own first and copy.
            self._rows_ND.take(numbers, 0, flat, "clip")
        else:
            torch.index_select(self._tensor_ND, 0, ids, out=torch.from_numpy(flat))


class BlockGather(RowGather):
    """As `RowGather`, of `rows_NB`, uint8, rows of blocks, decoded to float32 as they are gathered. `width` is given
    where a row has fewer values than its blocks have room for."""

    def __init__(self, rows_NB: np.ndarray[Any, Any], blocks: BlockFormat, width: int | None = None) -> None:
        self.blocks = blocks
        super().__init__(rows_NB, ROW_DTYPES["float32"], width or blocks.width(rows_NB.shape[1]))

    def _as_array(self, rows: torch.Tensor) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = rows.detach().numpy()
        return array

    def _take(self, ids: torch.Tensor, flat: np.ndarray[Any, Any]) -> None:
        assert self.blocks is not None
        flat[:] = decode_blocks(self._rows_ND[ids.numpy()], self.blocks)[:, : self.width]


class CompactGather:
    """As `RowGather`, of compact rows: `rows_NB`, uint8, whose rows hold `width` values; decoded after the gather."""

    def __init__(self, rows_NB: np.ndarray[Any, Any], dtype: RowDtype, width: int) -> None:
        self._raw = RowGather(rows_NB, RAW_BYTES)
        self.num_rows, self.width = len(rows_NB), width
        self.row_bytes, self.address = self._raw.row_bytes, self._raw.address
        self._dtype = dtype

    def __call__(self, row_ids: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        raw_UB = self._raw(row_ids).view(-1, self.row_bytes)
        if out is None:
            out = torch.empty((*row_ids.shape, self.width), dtype=self._dtype.torch, device="cpu")
        decode(*split(raw_UB, self.width, self._dtype.name), out.detach().view(-1, self.width))
        return out


def gather_of(
    rows_ND: np.ndarray[Any, Any], dtype: RowDtype, width: int | None
) -> RowGather | BlockGather | CompactGather:
    """What gathers rows of that dtype; compact ones, of bytes, have `width` values."""
    if not dtype.is_compact:
        return RowGather(rows_ND, dtype)
    assert width is not None, "bytes don't say how many values a compact row has"
    blocks = blocks_of(dtype)
    return CompactGather(rows_ND, dtype, width) if blocks is None else BlockGather(rows_ND, blocks, width)


class _Memory:
    """Lends an array's memory, declared writable: torch has no read-only tensors and warns, once a process, about
    arrays that are. Keeps the array, and with it the mapping, alive."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def shared_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The same memory as a tensor, that of a read-only mapping too."""
    return torch.from_numpy(np.asarray(_Memory(array)))
