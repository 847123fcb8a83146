"""How a file of rows is mapped: whether the kernel may read ahead.

The rows of a batch lie anywhere in the file. Around a page that isn't in memory the kernel by default reads others,
up to 8 MiB with some disks. That brings a table which fits into memory in with a few large reads. Where it doesn't
fit, it reads, and throws out again, a thousand times what a batch needs; in a sparse table it fills memory with the
zeros of holes. So those are mapped with MADV_RANDOM (benchmarks/LOG.md has what that gains).

Reads of cold rows in batches are to come here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A table that fits leaves room for the model, and for other tables.
SHARE_THAT_FITS = 0.5


def map_rows(
    path: Path, dtype: np.dtype[Any], mode: Any, shape: tuple[int, int], *, has_holes: bool
) -> np.memmap[Any, Any]:
    """The file's rows, [N, D]; `mode` is np.memmap's. Raises `OSError` where it can't be mapped."""
    rows_ND = np.memmap(path, dtype=dtype, mode=mode, shape=shape)
    if hasattr(mmap, "MADV_RANDOM") and (has_holes or rows_ND.nbytes > SHARE_THAT_FITS * usable_memory_bytes()):
        with contextlib.suppress(OSError):  # it is advice; a file system may not take it
            rows_ND._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]  # NumPy's own name for the mapping
    return rows_ND


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or less where a cgroup (a container) limits this process."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":  # version 2 has one tree, version 1 one for each resource
                limits += _limits(root / "sys/fs/cgroup", group, "memory.max")
            elif "memory" in controllers.split(","):
                limits += _limits(root / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes")
    return min(limits)


def _limits(tree: Path, group: str, name: str) -> list[int]:
    """The limits of a group and those that it lies in. In a container, `group` may be a path of the host's, and the
    container's own limit lies at the tree's root."""
    found = []
    folder = tree / group.strip("/")
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            found.append(int((place / name).read_text(encoding="ascii")))
        if place == tree:
            break
    return found


class _Memory:
    """Lends an array's memory, declared writable: torch has no read-only tensors and warns, once a process, about
    arrays that are. Keeps the array, and with it the mapping, alive."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def shared_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The same memory as a tensor, that of a read-only mapping too."""
    return torch.from_numpy(np.asarray(_Memory(array)))
