"""How a file of the table comes to be: allocated, filled, synced, and only then under its own name.

`new_file` gives a temporary in the same folder and renames it when the block ends well; whatever interrupts it, the
final name holds nothing or a whole file. There is one temporary name per file, and its maker holds a lock on it: a
second process that wants the same file waits for the first one, and the leftover of a process that died, which
nobody holds a lock on, is taken over.

`allocate` reserves the space first, so that a full disk is an error now and no SIGBUS when the mapping is written.

`fill_normal` writes the rows' initial noise. The file is cut into chunks of a fixed number of values, each with its
own generator, so the bytes depend on the seed alone: not on the number of threads, nor on the processor or on torch's
release, as `torch.normal_` does. Normal quantiles are looked up by 16 random bits each, and every pair (a, b) is
turned into ((a + b) / √2, (a - b) / √2): two independent normals again, out of 2³² values instead of 2¹⁶, up to 6.1
standard deviations. That takes less than half the time of `torch.normal_`, whose generator is the bottleneck (and
keeps 32 bits of a seed: with one a chunk, large tables would repeat themselves). Everything here releases the GIL.
Writing a small buffer again and again beats drawing into a mapping, which takes a page fault for every 4 KiB.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import math
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sense_v2.engram.format import row_dtype

# 1 MiB of float32: stays in a core's cache. Part of what a seed means; changing it changes every table.
CHUNK_VALUES = 1 << 18
PROGRESS_BYTES = 1_000_000_000
TEMPORARY_SUFFIX = ".tmp"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the process (ulimit -f) or the file system allows no file of that size",
}


class MadeMeanwhileError(Exception):
    """Another process has made the file since the caller looked."""


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[int]:
    """Gives the descriptor of an empty temporary; when the block ends well it is synced and renamed to `path`.

    Without `replace`, a `path` that exists once the lock is held is a `MadeMeanwhileError`. A folder that can't be
    made or written to is an `OSError` (`PermissionError`, …) naming the path and the way out.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _open_locked(temporary)
    except OSError as error:
        raise OSError(
            error.errno,
            f"can't write {path}: {error.strerror} ({error.filename}). "
            "Make its folder writable, or choose another path",
        ) from error
    try:
        if path.exists() and not replace:
            raise MadeMeanwhileError(path)
        os.ftruncate(fd, 0)
        yield fd
        os.fsync(fd)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        # After the rename there is none; until then nobody else can have made it anew, because of the lock.
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def wait_for_new_file(path: Path) -> None:
    """Waits while another process is at making `path`."""
    with contextlib.suppress(FileNotFoundError), open(path.with_name(path.name + TEMPORARY_SUFFIX), "rb") as file:
        _lock(file.fileno(), fcntl.LOCK_SH)


def _open_locked(temporary: Path) -> int:
    """Creates the file, or takes over what a dead process left; waits while a living one holds it."""
    while True:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(fd, fcntl.LOCK_EX)
            # Its holder may have renamed or removed it while this call waited: then the lock is on another file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(temporary), os.fstat(fd)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, operation: int) -> None:
    """Waits for the file's lock. Some network file systems have none: there, two makers at once aren't kept apart."""
    try:
        fcntl.flock(fd, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def sync(path: Path) -> None:
    """Makes a file durable, or, of a folder, the renames in it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocate(fd: int, size_bytes: int, path: Path) -> None:
    """Reserves the file's space, zeroed; `OSError` naming the bytes needed and free where there is too little."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
        elif shutil.disk_usage(path.parent).free < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        # Given back before counting, since a failed allocation may have taken what there was.
        os.ftruncate(fd, 0)
        free_bytes = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"{path} needs {size_bytes} bytes, {free_bytes} are free in {path.parent}: {_NO_ROOM[error.errno]}. "
            "Make room, choose another path, or a smaller table (fewer rows, float16)",
        ) from None


def fill_normal(
    fd: int,
    num_values: int,
    dtype: str,
    *,
    seed: int,
    std: float,
    num_threads: int | None = None,
    progress: bool | None = None,
) -> None:
    """Writes `num_values` values of normal noise. `num_threads`: torch's own number by default."""
    row_type = row_dtype(dtype)
    num_chunks = -(-num_values // CHUNK_VALUES)
    chunks = itertools.count()
    stop = threading.Event()
    total_bytes = num_values * row_type.item_bytes
    bar = tqdm(
        total=total_bytes,
        unit="B",
        unit_scale=True,
        desc="filling the table",
        # None: drawn in a terminal only, or it would fill a log.
        disable=not progress if progress is not None else (None if total_bytes > PROGRESS_BYTES else True),
    )

    quantiles = _normal_quantiles(std)

    def work() -> None:
        drawn = np.empty(CHUNK_VALUES, dtype=np.float32)
        noise = torch.empty(CHUNK_VALUES, dtype=torch.float32)
        values = noise if row_type.torch == torch.float32 else torch.empty_like(noise, dtype=row_type.torch)
        raw = values.view(torch.uint8).numpy().data
        for chunk in chunks:
            if chunk >= num_chunks or stop.is_set():
                return
            _normal_chunk(quantiles, seed, chunk, drawn, noise.numpy())
            if values is not noise:
                values.copy_(noise)
            count = min(CHUNK_VALUES, num_values - chunk * CHUNK_VALUES)
            _write(fd, raw[: count * row_type.item_bytes], chunk * CHUNK_VALUES * row_type.item_bytes)
            bar.update(count * row_type.item_bytes)

    num_threads = max(1, min(num_threads or torch.get_num_threads(), num_chunks))
    with bar, ThreadPoolExecutor(num_threads, "fill") as pool:
        threads = [pool.submit(work) for _ in range(num_threads)]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            # Whatever happened here or in a thread, the others end after the chunk they are at.
            stop.set()
        for thread in threads:
            thread.result()


def _normal_quantiles(std: float) -> np.ndarray[Any, Any]:
    """Normal quantiles in the middle of 65,536 equal parts, so that the sum of two has `std`."""
    middles = (torch.arange(1 << 16, dtype=torch.float64, device="cpu") + 0.5) / (1 << 16)
    quantiles = torch.special.ndtri(middles).numpy()
    # The middle of a part stands for all of it, which takes 1e-5 off the deviation.
    quantiles *= std / math.sqrt(2 * np.mean(quantiles**2))
    return quantiles.astype(np.float32)


def _normal_chunk(
    quantiles: np.ndarray[Any, Any], seed: int, chunk: int, drawn: np.ndarray[Any, Any], noise: np.ndarray[Any, Any]
) -> None:
    """Fills `noise` with the values of that chunk; `drawn` is a buffer of the same size."""
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(chunk,))))
    # Whole 64-bit words, four draws each, in the order they have in a little-endian memory.
    words = generator.integers(0, 2**64 - 1, len(drawn) // 4, dtype=np.uint64, endpoint=True)
    np.take(quantiles, words.view(np.uint16), out=drawn, mode="clip")
    half = len(drawn) // 2
    np.add(drawn[:half], drawn[half:], out=noise[:half])
    np.subtract(drawn[:half], drawn[half:], out=noise[half:])


def _write(fd: int, raw: memoryview, offset: int) -> None:
    while raw:
        written = os.pwrite(fd, raw, offset)
        raw, offset = raw[written:], offset + written
