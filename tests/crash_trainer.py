"""A trainer of a small table that can be killed at any moment, and that knows what it must find when it comes back.

Around each commit it writes to a log of its own which state it intends to commit, and that it did: a SHA-256 of the
files' bytes, the step and `extra`. When it starts it reads the files with nothing but `open` and `json` and compares:
what it finds must have been intended, and not be older than what was done.

A step is rows, a loss on rows and a dense weight, a gradient for both. The dense weight and a hash of all losses so
far go into `extra`, so that a run goes on as if it had never ended. Ids follow from the step's number alone.

Run as a program this is the warm parent of such trainers: torch is imported, nothing is open and there is one thread,
so that a fork makes a trainer in milliseconds. It reads one JSON object a line and answers with one:

    {"call": function's name, "arguments": {…}, "kill": null | [event's name, how often, seconds after it]}
    {"ended": "finished" | "killed" | "failed", "result": …, "error": …, "events": [name, …]}
"""

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from disk_calls import file_of, half, watched

from sense_v2.engram.optim import RowAdam, RowWiseAdagrad
from sense_v2.engram.storage import MMapEmbeddingStorage

ROWS, WIDTH = 96, 8
BATCH_ROWS, REPEATED = 12, 3
SEED = 7
TABLE = "engram_table.dat"
OPTIMIZERS = {"adagrad": RowWiseAdagrad, "adam": RowAdam}
# How often trainers are killed at random moments, in all. The other crash tests take their measure from it.
KILLS = int(os.environ.get("SENSE_CRASH_KILLS", 40))
THOROUGH = KILLS >= 100
# Far above what anything here takes: only a trainer that hangs meets it.
HANGS_AFTER_SECONDS = 300.0


@dataclass(frozen=True)
class Run:
    """What a trainer does: the same from the same values, whatever interrupts it."""

    optimizer: str = "adam"
    dtype: str = "float32"
    durability: str = "power"
    steps: int = 24
    commit_every: int = 3

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.dtype}-{self.durability}"


RUNS = [
    Run(optimizer, dtype, durability)
    for optimizer in OPTIMIZERS
    for dtype in ("float32", "bfloat16")
    for durability in ("process", "power")
]


class Trainer:
    """A table in `folder`, its optimizer and a dense weight, as the last commit left them."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.storage = MMapEmbeddingStorage(
            ROWS, WIDTH, folder / TABLE, dtype=run.dtype, seed=SEED, durability=run.durability, num_threads=1
        )
        try:
            self.optimizer = OPTIMIZERS[run.optimizer](self.storage, lr=0.05)
        except BaseException:
            self.close()
            raise
        extra = self.storage.committed_extra
        self.dense = torch.tensor(extra.get("dense", [0.5] * WIDTH), dtype=torch.float32)
        self.losses = extra.get("losses", "")
        self.step = self.storage.committed_step or 0

    def gradients(self) -> None:
        """The next step's gradients, those of the dense weight applied at once."""
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        # Always as many rows, so that what an earlier journal left behind begins where a new record ends.
        ids = torch.randperm(ROWS, generator=generator)[:BATCH_ROWS]
        ids = torch.cat([ids, ids[:REPEATED]])
        target = torch.randn(len(ids), generator=generator)
        dense = self.dense.requires_grad_()
        loss = ((self.storage(ids).float() @ dense).tanh() - target).square().mean()
        loss.backward()
        assert dense.grad is not None
        self.dense = dense.detach() - 0.1 * dense.grad
        self.losses = hashlib.sha256((self.losses + loss.item().hex()).encode()).hexdigest()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def extra(self) -> dict[str, Any]:
        """Of another length each time, so that a manifest that isn't cut off would show."""
        return {"dense": self.dense.tolist(), "losses": self.losses, "filler": "x" * (37 * self.step % 300)}

    def commit(self) -> None:
        self.storage.commit(step=self.step, extra=self.extra)

    @property
    def intended(self) -> str:
        """Checksum of what a commit now would keep."""
        return checksum(self.folder, self.run, self.step, self.extra, self.optimizer.state_file.step)

    @property
    def found(self) -> str:
        """Checksum of what is there, as its manifest says it is."""
        manifest = read_manifest(self.folder)
        states = manifest.get("states", {})
        assert self.optimizer.state_file.step == states.get(self.run.optimizer, {}).get("step", 0)
        assert self.storage.committed_step == manifest.get("step")
        assert self.storage.committed_extra == manifest.get("extra", {})
        return checksum(
            self.folder,
            self.run,
            manifest.get("step"),
            manifest.get("extra", {}),
            states.get(self.run.optimizer, {}).get("step", 0),
        )

    def close(self) -> None:
        """As a process that ends without a commit."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.storage.close()


def open_trainer(run: Run, folder: Path) -> Trainer:
    """A trainer, whatever warnings there are: that something was put back, that a manifest is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(run, folder)


def checksum(folder: Path, run: Run, step: int | None, extra: dict[str, Any], state_step: int) -> str:
    """Of the files' bytes and what is kept with them."""
    sha = hashlib.sha256()
    for name in (TABLE, f"engram_table.{run.optimizer}.dat"):
        sha.update((folder / name).read_bytes())
    sha.update(json.dumps([step, extra, state_step], sort_keys=True).encode())
    return sha.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """An empty one where there is none: between its maker's two renames."""
    path = folder / "engram_table.json"
    return json.loads(path.read_text()) if path.exists() else {}


def kept(folder: Path) -> dict[str, Any]:
    """The manifest but for what is random: equal for equal rows, states and history."""
    manifest = read_manifest(folder)
    del manifest["commit"]
    return manifest


class Log:
    """Lines of what was intended and done; each is on the disk before `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str, step: int, state: str) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(fd, f"{what} {step} {state}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def lines(self) -> list[tuple[str, int, str]]:
        if not self.path.exists():
            return []
        parts = [line.split() for line in self.path.read_text().splitlines()]
        return [(what, int(step), state) for what, step, state in parts]

    def allowed(self, first: str) -> list[str]:
        """The states that may be found: the last one that was done, or `first`, and one that was intended after."""
        states = [first]
        for what, _, state in self.lines():
            states = [state] if what == "done" else [states[0], state]
        return states


def train(run: Run, folder: Path, first: str | None = None, event: Callable[[str], None] = lambda _: None) -> str:
    """Trains from the last commit to the end of the run, and returns the state before. `first` is the state of a new
    table; None says that this is one."""
    log = Log(folder.with_name(folder.name + ".log"))
    event("start")
    trainer = open_trainer(run, folder)
    event("open")
    found = trainer.found
    allowed = log.allowed(found if first is None else first)
    if found not in allowed:
        step = trainer.storage.committed_step
        raise AssertionError(f"found {found} of step {step}, not one of {allowed}: {log.lines()[-4:]}")
    if found != allowed[0]:
        # Its commit ended between the manifest's rename and the log's line. From here on it is the last one.
        log.add("done", trainer.step, found)
    while trainer.step < run.steps:
        trainer.gradients()
        trainer.update()
        event("step")
        if trainer.step % run.commit_every == 0:
            state = trainer.intended
            log.add("intended", trainer.step, state)
            event("commit")
            trainer.commit()
            log.add("done", trainer.step, state)
    trainer.close()
    return found


# What the parent calls in a fork of itself.


def undisturbed(run: dict[str, Any], folder: str, event: Callable[[str], None]) -> dict[str, Any]:
    """A run that nothing interrupts: the state of the new table, and after each commit."""
    where = Path(folder)
    first = train(Run(**run), where, None, event)
    lines = Log(where.with_name(where.name + ".log")).lines()
    states = {step: state for what, step, state in lines if what == "done"}
    return {"first": first, "states": states, "kept": kept(where)}


def trained(
    run: dict[str, Any], folder: str, first: str, die_at: tuple[int, str] | None, event: Callable[[str], None]
) -> None:
    """`train`, which dies at its call number `die_at`: "before" it, or "amid" it, when half of it is done."""
    with watched(_killer(*die_at)) if die_at else contextlib.nullcontext():
        train(Run(**run), Path(folder), first, event)


def trained_all(run: dict[str, Any], folders: list[str], first: str, event: Callable[[str], None]) -> None:
    """`train` on one folder after the other, to the end of the run."""
    for folder in folders:
        try:
            train(Run(**run), Path(folder), first)
        except BaseException as error:
            raise AssertionError(f"{folder}: {error}") from error


def counted(
    run: dict[str, Any], folder: str, first: str | None, event: Callable[[str], None]
) -> list[tuple[str, str]]:
    """`train`; returns (name, file) of every call that changes what is on the disk."""
    calls = []

    def around(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        calls.append((name, file_of(name, arguments)))
        return call(*arguments)

    with watched(around):
        train(Run(**run), Path(folder), first, event)
    return calls


def _killer(number: int, moment: str) -> Callable[..., Any]:
    numbers = itertools.count()

    def around(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if next(numbers) == number:
            if moment == "amid":
                half(name, call, arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    return around


# The parent


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Forks, kills the child where that is asked for, and says how it ended."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _be_the_child(its, request)
    os.close(its)
    with os.fdopen(ours, "rb") as pipe:
        events, message = _listen(pipe.fileno(), child, request["kill"])
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status) == signal.SIGKILL and message is None
        return {"ended": "killed" if killed else f"signal {os.WTERMSIG(status)}", "events": events}
    return {"events": events, **(message or {"ended": "failed", "error": f"ended with status {status}"})}


def _be_the_child(pipe: int, request: dict[str, Any]) -> None:
    def event(name: str) -> None:
        os.write(pipe, f"{name}\n".encode())

    try:
        result = globals()[request["call"]](**request["arguments"], event=event)
        message = {"ended": "finished", "result": result}
    except BaseException:
        message = {"ended": "failed", "error": traceback.format_exc()}
    raw = f"={json.dumps(message)}\n".encode()
    while raw:
        raw = raw[os.write(pipe, raw) :]
    os._exit(0)


def _listen(pipe: int, child: int, kill: list[Any] | None) -> tuple[list[str], dict[str, Any] | None]:
    """Reads until the child has ended, and kills it when it has told of the event often enough."""
    text, killed, hung_at = b"", False, time.monotonic() + HANGS_AFTER_SECONDS
    while True:
        if not select.select([pipe], [], [], max(0.0, hung_at - time.monotonic()))[0]:
            os.kill(child, signal.SIGABRT)
        part = os.read(pipe, 1 << 16)
        text += part
        events = [line for line in text.decode().splitlines() if not line.startswith("=")]
        if kill and not killed and events.count(kill[0]) >= kill[1]:
            time.sleep(kill[2])
            os.kill(child, signal.SIGKILL)
            killed = True
        if not part:
            messages = [line for line in text.decode().splitlines() if line.startswith("=")]
            # A message that was cut off has no line end.
            whole = messages and text.endswith(b"\n")
            return events, json.loads(messages[0][1:]) if whole else None


def serve() -> None:
    torch.set_num_threads(1)
    # What is imported at its first use: a fork would do that again and again.
    torch.optim.SGD([torch.empty(0)])
    torch.unique(torch.zeros(2, dtype=torch.int64), return_inverse=True)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


class Parent:
    """The other end: starts the parent as a program, and asks it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, call: str, kill: tuple[str, int, float] | None = None, **arguments: Any) -> dict[str, Any]:
        """Calls that function of this module in a fork and kills it there; see the top."""
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        if isinstance(arguments.get("run"), Run):
            arguments["run"] = dataclasses.asdict(arguments["run"])
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"call": call, "arguments": arguments, "kill": kill}), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert answer["ended"] in ("finished", "killed"), answer.get("error", answer)
        return answer

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def warm_parent() -> Iterator[Parent]:
    parent = Parent()
    try:
        yield parent
    finally:
        parent.close()


if __name__ == "__main__":
    serve()
