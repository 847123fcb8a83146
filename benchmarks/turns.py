"""What the training benchmarks share: a prepared text, models with tables of any size, processes that take turns.

A number that is compared between tables of several sizes has to come from processes of their own, or one table's
memory would count for the other; and from the same seconds, or the machine's other work would. So every run is a
child that trains with `sense_v2.hf.training.fit.fit` and stops after each few steps until it is told to go
on: one child runs at a time, and all of them see the machine's good and bad moments alike.

Times are taken twice: on the wall, and of the processor, all threads of a process together. The second hardly moves
with what else the machine does, if torch has one thread (OMP_NUM_THREADS=1): several wait for each other by spinning,
which counts. Anonymous memory (RssAnon) is what a process can't give back: its heap, not the pages of mapped files.

This module measures nothing by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sense_v2.hf.training.plain_loop import History
from transformers import PreTrainedModel

from sense_v2.core.config import EngramConfig, TrainConfig
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.data.corpus import Batches, encode, read_corpus
from sense_v2.hf.training.fresh_model import END_OF_TEXT_ID, fresh_backbone, small_memory, train_bpe

SAMPLE_SECONDS = 0.01


@dataclass
class Text:
    """A folder with the standard library as token ids, and the shadow map of their tokenizer."""

    folder: Path
    vocab_size: int

    def batches(self, settings: TrainConfig, part: str = "train") -> Batches:
        token_ids = np.load(self.folder / f"{part}.npy", mmap_mode="r")
        shape = {"batch_size": settings.batch_size, "sequence_length": settings.sequence_length}
        return Batches(token_ids, **shape, seed=settings.seed)

    def memory(self, folder: Path, rows: int, *, width: int | None = None, **changes: Any) -> EngramConfig:
        """The demo's memory with about `rows` rows in all, its table in `folder`; `width` is another than the demo's
        for a row."""
        demo = small_memory(folder)
        if width is not None:
            changes["engram_dim"] = width * demo.total_heads
        own = {"table_size": rows, "shadow_map_path": str(self.folder / "shadow_map.npy"), **changes}
        return dataclasses.replace(demo, storage_path=str(folder / "engram_table.dat"), **own)

    def model(self, settings: TrainConfig, memory: EngramConfig | None) -> PreTrainedModel:
        model = fresh_backbone(self.vocab_size, settings.seed)
        return model if memory is None else attach_engram(model, memory)


def prepare_text(folder: Path, max_bytes: int) -> Text:
    """Reads and encodes as the demo does."""
    corpus = read_corpus(None, max_bytes=max_bytes)
    tokenizer = train_bpe(corpus.train_texts)
    builder = EngramTokenizerBuilder(tokenizer)
    builder.build_mapping(folder / "shadow_map.npy")
    for part, texts in (("train", corpus.train_texts), ("held_out", corpus.held_out_texts)):
        np.save(folder / f"{part}.npy", encode(texts, tokenizer, separator_id=END_OF_TEXT_ID))
    return Text(folder, builder.vocab_size)


# Memory


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


class MemoryPeak:
    """The largest RssAnon while it runs, looked at by a thread every 10 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self) -> None:
        """What was before doesn't count."""
        self.bytes = 0

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes())


class ProcessorClock:
    """Processor seconds of each step: from `go_on` to `step_is_done`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = time.process_time()

    def step_is_done(self) -> None:
        self.seconds.append(time.process_time() - self._since)

    def go_on(self) -> None:
        self._since = time.process_time()


# Children


class Turn:
    """A child's side: `wait` at the beginning of each turn; `on_step` does it every `steps` steps."""

    def __init__(self, connection: Any, steps: int) -> None:
        self._connection, self._steps = connection, steps
        self.wait()

    def wait(self) -> None:
        self._connection.send(("waits", None))
        self._connection.recv()

    def on_step(self, history: History) -> None:
        if len(history.steps) % self._steps == 0:
            self.wait()


def _child(work: Callable[[Turn, Any], Any], steps: int, spec: Any, connection: Any) -> None:
    connection.send(("result", work(Turn(connection, steps), spec)))


def take_turns(work: Callable[[Turn, Any], Any], specs: Sequence[Any], *, steps: int) -> list[Any]:
    """Runs `work(turn, spec)` for each spec in a process of its own, `steps` steps of one and then of the next, in an
    order that changes; what it returns, in the order of the specs. A child that fails ends all."""
    context = multiprocessing.get_context("spawn")
    children = []
    for spec in specs:
        mine, theirs = context.Pipe()
        process = context.Process(target=_child, args=(work, steps, spec, theirs))
        process.start()
        theirs.close()
        _receive(mine)  # one after the other: reading in is not measured, but it would disturb
        children.append((process, mine))
    results: dict[int, Any] = {}
    first = 0
    try:
        while len(results) < len(specs):
            for number in [*range(first, len(specs)), *range(first)]:
                if number not in results:
                    children[number][1].send("go")
                    kind, value = _receive(children[number][1])
                    if kind == "result":
                        results[number] = value
            first = (first + 1) % len(specs)
    finally:
        for process, _ in children:
            if len(results) < len(specs):
                process.terminate()
            process.join()
    return [results[number] for number in range(len(specs))]


def _receive(connection: Any) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except EOFError:
        raise SystemExit("a child process failed; its error stands above") from None
    return kind, value


# Files


def drop_from_cache(path: Path) -> None:
    """Takes a file's pages out of the page cache. Those that a process maps stay: it has to let go of them first."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[tuple[Callable[[], None], Callable[[], dict[str, int]]]]:
    """A memory cgroup below this process's own: (what a new process calls to move into it, what it has used).

    Raises `OSError` where there is no memory controller or no right to it.
    """
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    first = "memory" in groups  # version 1 of cgroups has a tree for each resource
    parent = Path(f"/sys/fs/cgroup/memory{groups['memory']}" if first else f"/sys/fs/cgroup{groups.get('', '/')}")
    group = parent / f"out_of_core_{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit_bytes))
        swap = group / ("memory.memsw.limit_in_bytes" if first else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit_bytes if first else 0))

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        def used() -> dict[str, int]:
            peak = (group / ("memory.max_usage_in_bytes" if first else "memory.peak")).read_text()
            # Not memory.failcnt: Linux 6.18 leaves it at 0 while it takes pages away at the limit.
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            refaults = int(counts["workingset_refault_file"])
            return {"peak_bytes": int(peak), "pages_read_again": refaults, "major_faults": int(counts["pgmajfault"])}

        yield enter, used
    finally:
        group.rmdir()


# What it was measured on


def machine() -> dict[str, Any]:
    load = os.getloadavg()[0]
    return {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(load, 1),
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
