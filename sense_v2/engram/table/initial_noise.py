"""The rows' initial noise: the same bytes from the same seed, whatever draws them.

The file is cut into chunks of a fixed number of values, each with its own generator, so the bytes depend on the seed
alone: not on the number of threads, nor on the processor or on torch's release, as `torch.normal_` does. Normal
quantiles are looked up by 16 random bits each, and every pair (a, b) is turned into ((a + b) / √2, (a - b) / √2): two
independent normals again, out of 2³² values instead of 2¹⁶, up to 6.1 standard deviations. That takes less than half
the time of `torch.normal_`, whose generator is the bottleneck (and keeps 32 bits of a seed: with one a chunk, large
tables would repeat themselves). Everything here releases the GIL. Writing a small buffer again and again beats
drawing into a mapping, which takes a page fault for every 4 KiB.
"""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from sense_v2.engram.table.disk import write_at
from sense_v2.engram.table.format import row_dtype

# 1 MiB of float32: stays in a core's cache. Part of what a seed means; changing it changes every table.
CHUNK_VALUES = 1 << 18
# The page cache keeps what came with one write in pages of up to 2 MiB, which are mapped at once: training stores to
# a new table without a fault for every 4 KiB (benchmarks/LOG.md).
WRITE_BYTES = 1 << 21
PROGRESS_BYTES = 1_000_000_000


def fill_normal(
    fd: int,
    num_values: int,
    dtype: str,
    *,
    seed: int,
    std: float,
    first_value: int = 0,
    num_threads: int | None = None,
    progress: bool | None = None,
) -> None:
    """Writes `num_values` values of normal noise: those of a larger file from `first_value` on. `num_threads`:
    torch's own number by default."""
    from tqdm import tqdm  # of a new table alone: one that is there is read without it

    row_type = row_dtype(dtype)
    # Chunks that are written together.
    num_together = WRITE_BYTES // (CHUNK_VALUES * row_type.item_bytes)
    write_values = num_together * CHUNK_VALUES
    first_write, stop_value = first_value // write_values, first_value + num_values
    stop_write = -(-stop_value // write_values)
    writes = itertools.count(first_write)
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

    def work(working: threading.Lock) -> None:
        with working:
            fill_writes()

    def fill_writes() -> None:
        drawn = np.empty(CHUNK_VALUES, dtype=np.float32)
        noise = torch.empty(CHUNK_VALUES, dtype=torch.float32)
        values = torch.empty(num_together, CHUNK_VALUES, dtype=row_type.torch)
        raw = values.view(-1).view(torch.uint8).numpy().data
        for number in writes:
            if number >= stop_write or stop.is_set():
                return
            # What of these chunks is asked for, counted from their beginning.
            begin = number * write_values
            start, end = max(first_value - begin, 0), min(write_values, stop_value - begin)
            for chunk in range(start // CHUNK_VALUES, -(-end // CHUNK_VALUES)):
                _normal_chunk(quantiles, seed, number * num_together + chunk, drawn, noise.numpy())
                values[chunk].copy_(noise)
            part = raw[start * row_type.item_bytes : end * row_type.item_bytes]
            write_at(fd, part, (begin + start - first_value) * row_type.item_bytes)
            bar.update(len(part))

    num_threads = max(1, min(num_threads or torch.get_num_threads(), stop_write - first_write))
    with bar, ThreadPoolExecutor(num_threads, "fill") as pool:
        locks = [threading.Lock() for _ in range(num_threads)]
        try:
            threads = [pool.submit(work, lock) for lock in locks]
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            # Whatever happened here or in a thread, the others end after the chunk they are at. The pool doesn't know
            # of a thread that was interrupted while it started, so it isn't asked: nobody writes once these are free.
            stop.set()
            for lock in locks:
                with lock:
                    pass
        for thread in threads:
            thread.result()


class InitialNoise:
    """The values that `fill_normal` wrote, drawn again wherever they are asked for.

    >>> noise = InitialNoise(seed=3, std=0.02, dtype="float32")
    >>> noise.values(first=5, count=3).shape
    torch.Size([3])
    """

    def __init__(self, seed: int, std: float, dtype: str) -> None:
        self.seed, self.std = seed, std
        self._dtype = row_dtype(dtype).torch
        self._quantiles = _normal_quantiles(std)
        self._drawn = np.empty(CHUNK_VALUES, dtype=np.float32)
        self._chunk = -1
        self._noise = torch.empty(CHUNK_VALUES, dtype=torch.float32)

    def values(self, first: int, count: int) -> torch.Tensor:
        """Those from the file's value `first` on, in the table's dtype, [count]. Front to back is fastest: a chunk is
        kept until another is asked for."""
        found = torch.empty(count, dtype=self._dtype)
        if self.std == 0:
            return found.zero_()
        done = 0
        while done < count:
            chunk, at = divmod(first + done, CHUNK_VALUES)
            if chunk != self._chunk:
                _normal_chunk(self._quantiles, self.seed, chunk, self._drawn, self._noise.numpy())
                self._chunk = chunk
            taken = min(count - done, CHUNK_VALUES - at)
            found[done : done + taken].copy_(self._noise[at : at + taken])
            done += taken
        return found


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
