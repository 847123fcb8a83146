"""How a file of the table comes to be: allocated, filled, synced, and only then under its own name.

`new_file` gives a temporary in the same folder and renames it when the block ends well; whatever interrupts it, the
final name holds nothing or a whole file. There is one temporary name per file, and its maker holds a lock on it: a
second process that wants the same file waits for the first one, and the leftover of a process that died, which
nobody holds a lock on, is taken over.

`allocate` reserves the space first, so that a full disk is an error now and no SIGBUS when the mapping is written.

`fill_normal` writes the rows' initial noise. The file is cut into chunks of a fixed number of values, each with its
own generator, so the bytes depend on the seed alone and not on the number of threads. `torch.normal_` and `pwrite`
release the GIL. Writing a small buffer again and again beats drawing into the mapping, which takes a page fault
for every 4 KiB.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sense_v2.engram.format import row_dtype

# 1 MiB of float32: stays in a core's L2 cache. Part of what a seed means; changing it changes every table.
CHUNK_VALUES = 1 << 18
PROGRESS_BYTES = 1_000_000_000
TEMPORARY_SUFFIX = ".tmp"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the process (ulimit -f) or the file system allows no file of that size",
}


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[int | None]:
    """Gives the descriptor of an empty temporary; on success it is synced and renamed to `path`.

    Without `replace`, gives None where `path` exists once the lock is held: another process made it meanwhile.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    fd = _open_locked(temporary)
    try:
        if path.exists() and not replace:
            temporary.unlink()
            yield None
            return
        try:
            os.ftruncate(fd, 0)
            yield fd
            os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    finally:
        os.close(fd)


def _open_locked(temporary: Path) -> int:
    """Creates the file, or takes over what a dead process left; waits while a living one holds it."""
    while True:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(fd)
            # Its holder may have renamed or removed it while this call waited: then the lock is on another file.
            found, held = os.stat(temporary), os.fstat(fd)
            if (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def lock(fd: int, *, shared: bool = False) -> None:
    """Waits for the file's lock. Some network file systems have none: there, two makers at once aren't kept apart."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
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
        disable=not (total_bytes > PROGRESS_BYTES if progress is None else progress),
    )

    def work() -> None:
        noise = torch.empty(min(CHUNK_VALUES, num_values))
        # Rounded from float32: drawn as float16 or bfloat16, the uniforms behind the noise have 11 or 8 bits.
        values = torch.empty_like(noise, dtype=row_type.torch) if row_type.item_bytes < 4 else noise
        raw = values.view(torch.uint8).numpy().data
        for chunk in chunks:
            if chunk >= num_chunks or stop.is_set():
                return
            count = min(CHUNK_VALUES, num_values - chunk * CHUNK_VALUES)
            generator = torch.Generator().manual_seed(chunk_seed(seed, chunk))
            noise[:count].normal_(0.0, std, generator=generator)
            if values is not noise:
                values[:count].copy_(noise[:count])
            _write(fd, raw[: count * row_type.item_bytes], chunk * CHUNK_VALUES * row_type.item_bytes)
            bar.update(count * row_type.item_bytes)

    num_threads = max(1, min(num_threads or torch.get_num_threads(), num_chunks))
    with bar, ThreadPoolExecutor(num_threads, "fill") as pool:
        try:
            for worker in [pool.submit(work) for _ in range(num_threads)]:
                worker.result()
        finally:
            # Whatever happened here or in a thread, the others end after the chunk they are at.
            stop.set()


def chunk_seed(seed: int, chunk: int) -> int:
    """A 32-bit seed per chunk, no two chunks of a table alike.

    torch's CPU generator keeps 32 bits of its seed. Independent 32-bit draws would give a table of 40 GB (39,000
    chunks) two equal chunks in one of six cases; so the chunk's number goes through a bijection (the finalizer of
    MurmurHash3) whose offsets come from NumPy's `SeedSequence`.
    """
    before, after = (int(word) for word in np.random.SeedSequence(seed).generate_state(2, np.uint32))
    mixed = (chunk + before) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)) ^ after


def _write(fd: int, raw: memoryview, offset: int) -> None:
    while raw:
        written = os.pwrite(fd, raw, offset)
        raw, offset = raw[written:], offset + written
