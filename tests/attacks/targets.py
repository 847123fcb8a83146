"""The table that is attacked, a file that must stay as it is, and a limit on how long anything may take."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sense_v2.engram.storage import MMapEmbeddingStorage

N, D, STATE_WIDTH = 60, 4, 4
TABLE, STATE = "engram_table.dat", "engram_table.adam.dat"
MANIFEST, JOURNAL, LOCK = "engram_table.json", "engram_table.journal", "engram_table.lock"
# Far more than anything here takes, and far less than forever.
HANGS_AFTER_SECONDS = 60


def make_table(folder: Path, *, seed: int = 0, commits: int = 2) -> Path:
    """A table with a state; the path of its file."""
    table = MMapEmbeddingStorage(N, D, folder / TABLE, seed=seed)
    state = table.open_state("adam", STATE_WIDTH)
    for step in range(commits):
        table.write(torch.arange(5), torch.full((5, D), step + 1.0))
        table.write_state(state, torch.arange(5), torch.full((5, STATE_WIDTH), step + 1.0))
        table.commit(step=step)
    table.close()
    return folder / TABLE


def open_table(path: Path, mode: str = "r+") -> MMapEmbeddingStorage:
    return MMapEmbeddingStorage(N, D, path, mode=mode)


def open_all(path: Path, mode: str = "r+") -> None:
    """Opens the table, and its state where that can be."""
    table = open_table(path, mode)
    try:
        if mode == "r+":
            table.open_state("adam", STATE_WIDTH)
    finally:
        table.close()


def manifest_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_suffix(".json").read_text()))


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    path.with_suffix(".json").write_text(json.dumps(values))


def with_state_file(path: Path, file: Any, **changes: Any) -> None:
    """Lets the manifest say that the state lies there."""
    values = manifest_of(path)
    values["states"]["adam"] = {**values["states"]["adam"], "file": file, **changes}
    write_manifest(path, values)


def content(folder: Path) -> dict[str, bytes]:
    """Every file, of all folders below; but for the lock, which whoever tries to write takes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """A `TimeoutError` where the block waits for something that never comes."""

    def stop(*_: Any) -> None:
        raise TimeoutError("this would have waited forever")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
