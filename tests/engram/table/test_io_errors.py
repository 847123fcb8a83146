"""Lets every call of a run fail, one after the other: a clear error or none, and the last commit is there after it.

A run is counted once without faults. Then it runs again for each of its calls, which fails as on a full disk
(ENOSPC) or a broken one (EIO), writes only half of its bytes, or is interrupted (Ctrl-C); that one alone, or all from
it on. What a process that died of it leaves, and what one leaves that tried again, is opened without faults and
compared with checksums of an undisturbed run: of the commit whose manifest had been renamed last.

At the end of the module: disks that are full, and limits that are met, without any fault being made up.
"""

import contextlib
import errno
import gc
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_trainer import ROWS, TABLE, WIDTH, Run, Trainer, open_trainer, read_manifest
from disk_calls import file_of, half, watched

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk

MOST_CALLS = Run("adam", "float32", "power", steps=5, commit_every=2)
FEWEST_CALLS = Run("adagrad", "bfloat16", "process", steps=5, commit_every=2)
# (kind, whether it lasts). A write that is always cut in half is one that takes longer.
FAULTS = [("ENOSPC", False), ("ENOSPC", True), ("EIO", False), ("EIO", True), ("short", False), ("interrupt", False)]
CASES = [(MOST_CALLS, *fault) for fault in FAULTS]
CASES += [(FEWEST_CALLS, kind, False) for kind in ("ENOSPC", "EIO", "interrupt")]
# The operating system's own error names the file where the call was given a path.
WITH_PATH = ("open", "replace", "unlink")
MANIFEST_RENAMED = ("replace", "engram_table.json.tmp")


class Fault:
    """Lets call number `number` fail, and with `lasting` all after it; no number, none."""

    def __init__(self, number: int | None = None, kind: str = "", lasting: bool = False) -> None:
        self.number, self.kind, self.lasting = number, kind, lasting
        self.failed: list[tuple[str, str]] = []
        self.done: list[tuple[str, str]] = []
        self._numbers = itertools.count()

    def around(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        number, file = next(self._numbers), file_of(name, arguments)
        if not self._is_hit(number, name, arguments):
            result = call(*arguments)
            self.done.append((name, file))
            return result
        self.failed.append((name, file))
        if self.kind == "short":
            return half(name, call, arguments)
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if name == "pwrite" and self.kind == "ENOSPC":
            half(name, call, arguments)  # what still fitted
        code = getattr(errno, self.kind)
        raise OSError(code, os.strerror(code), *([str(arguments[0])] if name in WITH_PATH else []))

    def _is_hit(self, number: int, name: str, arguments: tuple[Any, ...]) -> bool:
        if self.number is None or number < self.number or (number > self.number and not self.lasting):
            return False
        if self.kind == "short":
            return name == "pwrite"
        if self.kind == "interrupt":
            # Python raises it in no other thread.
            return threading.current_thread() is threading.main_thread()
        if self.kind == "ENOSPC" and name == "open":
            return bool(arguments[1] & os.O_CREAT) and not Path(arguments[0]).exists()
        # A full disk still lets files be cut and removed; a store into a mapping has no error to report.
        return name not in (("store", "ftruncate", "unlink") if self.kind == "ENOSPC" else ("store",))


@dataclass
class Expected:
    """States of an undisturbed run: by the step of the commit, None for a new table; and at its end."""

    commits: dict[int | None, str]
    end: str


def expect(run: Run, folder: Path) -> Expected:
    trainer = open_trainer(run, folder)
    commits: dict[int | None, str] = {None: trainer.found}
    while trainer.step < run.steps:
        trainer.gradients()
        trainer.update()
        if trainer.step % run.commit_every == 0:
            commits[trainer.step] = trainer.intended
            trainer.commit()
    end = trainer.intended
    trainer.close()
    return Expected(commits, end)


class Attempt:
    """A run in actions that can be tried again: open, gradients, update, commit."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.trainer: Trainer | None = None
        self._actions: list[Callable[[], None]] = [self._open]

    def _open(self) -> None:
        self.trainer = trainer = open_trainer(self.run, self.folder)
        for step in range(trainer.step + 1, self.run.steps + 1):
            self._actions += [trainer.gradients, trainer.update]
            if step % self.run.commit_every == 0:
                self._actions += [trainer.commit]

    def go_on(self) -> tuple[type[BaseException], str] | None:
        """To the end of the run, or to an error; what failed is tried again by the next call."""
        try:
            while self._actions:
                self._actions[0]()
                self._actions.pop(0)
        except BaseException as error:
            # Not the error itself: its frames hold what should be let go.
            return type(error), str(error)
        return None

    def close(self) -> None:
        if self.trainer:
            self.trainer.close()


def assert_clear(error: tuple[type[BaseException], str] | None, folder: Path) -> None:
    if error is not None:
        assert issubclass(error[0], (OSError, ValueError, RuntimeError)), error
        assert str(folder) in error[1], f"doesn't say where: {error}"


def assert_refused(trainer: Trainer) -> None:
    """No store and no commit is possible any more, and why is said with the path."""
    storage, state, ids = trainer.storage, trainer.optimizer.state_file, torch.tensor([1])
    for call in (
        storage.commit,
        storage.flush,
        lambda: storage.protect(ids),
        lambda: storage.write(ids, torch.zeros(1, storage.embedding_dim)),
        lambda: storage.write_state(state, ids, torch.zeros(1, state.values.shape[1])),
    ):
        with pytest.raises(RuntimeError, match="an earlier sync failed") as caught:
            call()
        assert str(storage.path) in str(caught.value)


def assert_kept(run: Run, folder: Path, expected: Expected, step: int | None) -> None:
    """A fresh opening finds the commit of that step."""
    trainer = open_trainer(run, folder)
    assert (trainer.storage.committed_step, trainer.found) == (step, expected.commits[step])
    trainer.close()


def assert_died_well(run: Run, folder: Path, elsewhere: Path, expected: Expected, step: int | None) -> None:
    """As `assert_kept`, of a process that dies now."""
    shutil.copytree(folder, elsewhere)
    assert_kept(run, elsewhere, expected, step)
    shutil.rmtree(elsewhere)


@contextlib.contextmanager
def all_rows_changed(trainer: Trainer) -> Iterator[None]:
    """As if steps had changed every row since; they have their values back when the block ends."""
    ids = torch.arange(ROWS)
    trainer.storage.protect(ids)
    tables = trainer.storage.weight, trainer.optimizer.state_file.values
    before = [table.clone() for table in tables]
    for table in tables:
        disk.store(table, ids, torch.full_like(table, 7))
    yield
    for table, old in zip(tables, before, strict=True):
        disk.store(table, ids, old)


def run_with(fault: Fault, run: Run, folder: Path, expected: Expected) -> None:
    """Runs to the end, or to the error and then, without the fault, on from it."""
    is_new, first = not folder.exists(), read_manifest(folder).get("step")
    attempt = Attempt(run, folder)
    with watched(fault.around):
        error = attempt.go_on()
    if not fault.failed:
        # Not a call that fails in this way.
        assert error is None
    sync_failed = fault.kind != "interrupt" and any(name in ("fsync", "msync") for name, _ in fault.failed)
    if error is None:
        assert not sync_failed
    elif fault.kind == "interrupt":
        assert error[0] is KeyboardInterrupt
    else:
        assert fault.kind != "short"
        assert_clear(error, folder)

    # A new table's first manifest is no commit.
    num_commits = max(0, fault.done.count(MANIFEST_RENAMED) - is_new)
    steps = [first, *[step for step in expected.commits if step is not None and step > (first or 0)]]
    assert_died_well(run, folder, folder.with_name("died"), expected, steps[num_commits])

    if sync_failed and attempt.trainer:
        assert_refused(attempt.trainer)
    elif fault.kind != "interrupt" or ("store", "") not in fault.failed:  # half a step can't be taken again
        if attempt.trainer and fault.kind in ("interrupt", "EIO"):
            # A handle that goes on has a journal that can undo what it does; one that hasn't refuses.
            with contextlib.suppress(RuntimeError), all_rows_changed(attempt.trainer):
                assert_died_well(run, folder, folder.with_name("died"), expected, steps[num_commits])
        again = attempt.go_on()
        if again:
            assert again[0] is RuntimeError, again
            assert "an earlier sync failed" in again[1]
            assert all(name != "pwrite" for name, _ in fault.failed)
        else:
            assert attempt.trainer
            assert attempt.trainer.intended == expected.end
            num_commits = -1
    attempt.close()
    assert_kept(run, folder, expected, steps[num_commits])


def fail_every_call(run: Run, folder: Path, kind: str, lasting: bool, start: Path | None = None) -> None:
    """`run_with` that fault at each call in turn, on copies of `start` or from nothing."""
    expected = expect(run, folder / "expected")
    number = None
    for number in itertools.chain([None], itertools.count()):
        fault = Fault(number, kind, lasting)
        if start:
            shutil.copytree(start, folder / "run")
        try:
            run_with(fault, run, folder / "run", expected)
        except BaseException as error:
            raise AssertionError(f"call {number}: {fault.failed[:3]} after {fault.done[-3:]}") from error
        shutil.rmtree(folder / "run")
        if number is None:
            num_calls = len(fault.done)
        elif number == num_calls:
            break


@pytest.mark.parametrize(("run", "kind", "lasting"), CASES)
def test_a_new_table(quick_path: Path, run: Run, kind: str, lasting: bool) -> None:
    """Creation, an optimizer state, three steps, a commit."""
    short = Run(run.optimizer, run.dtype, run.durability, 3, 2)
    fail_every_call(short, quick_path, kind, lasting)


@pytest.mark.parametrize(("run", "kind", "lasting"), CASES)
def test_a_recovered_table(quick_path: Path, run: Run, kind: str, lasting: bool) -> None:
    """Two steps are undone, or one; then as many more, and a commit."""
    left = open_trainer(run, quick_path / "start")
    for action in (*[left.gradients, left.update] * 2, left.commit, left.gradients, left.update):
        action()
    left.close()
    fail_every_call(run, quick_path, kind, lasting, quick_path / "start")


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(("call", "file"), [("pread", "engram_table.journal"), ("fstat", "engram_table.json")])
def test_what_cannot_be_read_is_named(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, call: str, file: str
) -> None:
    """The system's own error, of a file that was open, names none."""
    left = open_trainer(MOST_CALLS, quick_path)
    left.gradients()
    left.update()
    left.close()
    before = {path.name: path.read_bytes() for path in quick_path.iterdir() if path.suffix != ".lock"}
    real = getattr(os, call)

    def fail(fd: int, *more: Any) -> Any:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=re.escape(str(quick_path / file))) as caught:
            MMapEmbeddingStorage(ROWS, WIDTH, quick_path / TABLE, mode=mode)
    assert caught.value.errno == errno.EIO
    assert {path.name: path.read_bytes() for path in quick_path.iterdir() if path.suffix != ".lock"} == before


def lookup(storage: MMapEmbeddingStorage, *ids: int) -> torch.Tensor:
    """As a batch does it: from here on the journal's thread is at work on these rows."""
    return storage(torch.tensor(ids))


def test_a_commit_waits_for_all_lookups_when_the_first_one_fails(quick_path: Path) -> None:
    """The first one hits the journal's limit, which is a reason to commit; the second one is still being written."""
    storage = MMapEmbeddingStorage(ROWS, WIDTH, quick_path / TABLE, journal_limit_bytes=300)
    committed = threading.Event()

    def around(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if name == "pwrite" and file_of(name, arguments) == "engram_table.journal":
            # Late enough for a commit that doesn't wait; one that does sees the time run out.
            committed.wait(0.3)
        return call(*arguments)

    before = (quick_path / TABLE).read_bytes()
    with watched(around):
        lookup(storage, *range(50))
        lookup(storage, 1, 2)
        storage.commit(step=1)
        committed.set()
        storage.write(torch.tensor([1, 2]), torch.ones(2, WIDTH))
    assert (quick_path / TABLE).read_bytes() != before
    shutil.copytree(quick_path, quick_path / "died", ignore=shutil.ignore_patterns("died"))
    with pytest.warns(UserWarning, match="2 rows were put back"):
        MMapEmbeddingStorage(ROWS, WIDTH, quick_path / "died" / TABLE)
    assert (quick_path / "died" / TABLE).read_bytes() == before


def test_a_sync_that_fails_while_a_commit_waits_for_it_is_not_tried_again(quick_path: Path) -> None:
    storage = MMapEmbeddingStorage(ROWS, WIDTH, quick_path / TABLE, durability="power")
    syncs = []

    def around(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if name == "fsync" and file_of(name, arguments) == "engram_table.journal":
            syncs.append(arguments)
            time.sleep(0.1)
            raise OSError(errno.EIO, "input/output error")
        return call(*arguments)

    with watched(around):
        lookup(storage, 1, 2)
        with pytest.raises(RuntimeError, match="an earlier sync failed"):
            storage.commit(step=1)
    assert len(syncs) == 1
    assert read_manifest(quick_path)["generation"] == 0


# Limits and full disks as they are


def test_a_limit_to_the_size_of_files(quick_path: Path) -> None:
    """RLIMIT_FSIZE: no table past it, and a journal only up to it. A commit empties the journal, and it goes on."""
    run = Run("adam", "float32", "power", steps=24, commit_every=12)
    expected = expect(run, quick_path / "expected")
    state_bytes = 2 * ROWS * WIDTH * 4
    folder = quick_path / "run"
    attempt = Attempt(run, folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        errors = [attempt.go_on()]
        assert list(folder.iterdir()) == []
        resource.setrlimit(resource.RLIMIT_FSIZE, (state_bytes, before[1]))
        while error := attempt.go_on():
            assert attempt.trainer
            assert attempt.trainer.step > 12, "until the first commit the state needs no journal"
            errors.append(error)
            attempt.trainer.storage.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for error in errors:
        assert error
        assert error[0] is OSError
        assert f"[Errno {errno.EFBIG}]" in error[1]
        assert_clear(error, folder)
    assert len(errors) > 1
    assert attempt.trainer
    assert attempt.trainer.intended == expected.end
    attempt.close()
    assert_kept(run, folder, expected, 24)


def on_a_full_disk(folder: Path, elsewhere: Path) -> None:
    """`folder` is a file system of its own, of 128 KiB. What is left free for a run goes from nothing to enough."""
    run = Run("adam", "float32", "power", steps=9, commit_every=4)
    expected = expect(run, elsewhere / "expected")
    page, ended = 4096, set()
    for free_pages in range(32):
        gc.collect()  # what the round before mapped takes room until it is let go
        ballast = folder / "ballast"
        ballast.write_bytes(b"x" * (shutil.disk_usage(folder).free - free_pages * page))
        attempt = Attempt(run, folder / "run")
        error = attempt.go_on()
        assert_clear(error, folder)
        assert error is None or f"[Errno {errno.ENOSPC}]" in error[1], error
        step = read_manifest(folder / "run").get("step")
        ended.add((error is None, step))
        if (folder / "run").exists():
            assert_died_well(run, folder / "run", elsewhere / "died", expected, step)
        if attempt.trainer and step:
            # A process that died of it comes back although there is still no room.
            attempt.close()
            assert_kept(run, folder / "run", expected, step)
            attempt = Attempt(run, folder / "run")
        ballast.unlink()
        assert attempt.go_on() is None
        assert attempt.trainer
        assert attempt.trainer.intended == expected.end
        attempt.close()
        shutil.rmtree(folder / "run")
    # Before the first commit, between the two, not at all.
    assert ended == {(False, None), (False, 4), (True, 8)}, ended


def sparse_on_a_full_disk(folder: Path) -> None:
    """A sparse table is larger than the disk: an error before it is full, and no SIGBUS."""
    storage = MMapEmbeddingStorage(1_000_000, WIDTH, folder / TABLE, sparse=True)
    kept: list[int] = []

    def fill() -> None:
        for first in itertools.count(0, 4096 // WIDTH // 4):
            storage.write(torch.tensor([first]), torch.full((1, WIDTH), 1.0))
            storage.commit(step=first)
            kept.append(first)

    with pytest.raises(OSError, match=str(folder)) as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    storage.close()
    assert len(kept) > 5
    storage = MMapEmbeddingStorage(1_000_000, WIDTH, folder / TABLE)
    assert storage.committed_step == kept[-1]
    assert storage.gather(torch.tensor(kept)).eq(1).all()
    assert (folder / TABLE).stat().st_size == 1_000_000 * WIDTH * 4


@pytest.mark.parametrize("call", ["on_a_full_disk(small, elsewhere)", "sparse_on_a_full_disk(small)"])
def test_a_full_disk(quick_path: Path, call: str) -> None:
    small = quick_path / "small"
    small.mkdir()
    # In a mount that only this process sees.
    mount = f"mount -t tmpfs -o size=128k tmpfs {small}"
    prefix = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr if tried else 'there is no unshare'}")
    program = "import sys; from pathlib import Path; here = Path(sys.argv[1])\n"
    program += "sys.path[:0] = [str(here), str(here.parents[1])]\nfrom test_io_errors import *\n"
    program += f"small, elsewhere = Path(sys.argv[2]), Path(sys.argv[3])\n{call}"
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(small), str(quick_path)]
    done = subprocess.run([*prefix, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
