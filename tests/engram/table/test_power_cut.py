"""Cuts the power after every call of a run, on a model of a disk: what opens then must be the last commit.

A run with durability="power" is recorded call by call, with the bytes. From the record a folder is built as a disk
may hold it after a power cut at that point: what was synced is there; of everything after a file's last sync, any
part may be. A file's unsynced writes are dropped, kept, or torn into sectors of 512 bytes that hold any of the
contents they had since; its length is any that it had since; a sector that the file gained may hold anything. What
was stored into a mapping is synced only by msync and fsync together. Of the names that were made, moved or removed
since the folder's last sync, any may have happened, each whole.

Then the folder is opened. Until the next manifest is renamed it must hold what the last commit kept; from then on
what that one or the new one keeps; and only the new one once the folder is synced. From there a run must come to the
same end as one that nothing disturbed.

What this can't show: that a disk or a file system keeps the rules above. A disk that says it has synced and hasn't, a
sector that is written in parts or takes its neighbours with it, a file system that moves names in halves, a kernel
that reports an error once and forgets it, bit rot: all outside. It shows that the calls and their order are enough
where each does what it promises. Where there are more possibilities than can be tried, it tries samples.
"""

import copy
import itertools
import os
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash_trainer import KILLS, ROWS, TABLE, WIDTH, Run, Trainer, open_trainer
from disk_calls import watched

from sense_v2.engram.storage import MMapEmbeddingStorage

pytestmark = pytest.mark.slow

SECTOR_BYTES = 512
EXHAUSTIVE_UP_TO = 16
NUM_SAMPLES = KILLS // 5
# Names that hold no data of the table.
UNIMPORTANT = ("engram_table.lock",)


@dataclass
class File:
    """A file of the modelled disk: what is surely there, and what has been done to it since."""

    durable: bytes = b""
    pending: list["Change"] = field(default_factory=list)

    def versions(self) -> list[bytes]:
        """The contents that it had since its last sync, the last one as a reader sees it."""
        versions = [self.durable]
        for change in self.pending:
            versions.append(change.made_to(versions[-1]))
        return versions


@dataclass
class Change:
    """A write at an offset, or with `size` a change of length."""

    offset: int = 0
    data: bytes = b""
    size: int | None = None
    mapped: bool = False
    """Stored into a mapping: fsync alone needn't make it durable."""

    def made_to(self, content: bytes) -> bytes:
        if self.size is not None:
            return content[: self.size].ljust(self.size, b"\0")
        return content[: self.offset].ljust(self.offset, b"\0") + self.data + content[self.offset + len(self.data) :]


class Disk:
    """A folder on a disk whose power may go: files by number, names, and names since the folder's last sync."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = [File(content) for content in (files or {}).values()]
        self.names: dict[str, int] = {name: number for number, name in enumerate(files or {})}
        self.renamed: list[dict[str, int | None]] = []

    def seen(self) -> dict[str, int]:
        """Names as a reader sees them."""
        return _with(self.names, self.renamed)

    def make(self, name: str) -> int:
        self.files.append(File())
        self.renamed.append({name: len(self.files) - 1})
        return len(self.files) - 1

    def rename(self, old: str, new: str) -> None:
        self.renamed.append({old: None, new: self.seen()[old]})

    def sync_names(self) -> None:
        self.names, self.renamed = self.seen(), []

    def msync(self, number: int) -> None:
        for change in self.files[number].pending:
            change.mapped = False

    def sync(self, number: int) -> None:
        file = self.files[number]
        for change in file.pending:
            file.durable = file.durable if change.mapped else change.made_to(file.durable)
        file.pending = [change for change in file.pending if change.mapped]

    # What a power cut may leave

    def choices(self) -> list[int]:
        """How many possibilities there are, one by one: for each change of names, each sector, each length."""
        counts = [2] * len(self.renamed)
        for file in self.files:
            sectors, sizes = _possible(file)
            counts += [len(sector) for sector in sectors] + [len(sizes)]
        return counts

    def after_cut(self, chosen: list[int]) -> dict[str, bytes]:
        """The folder's files; `chosen` has a number for each of `choices()`. All 0 drops what isn't durable."""
        numbers = iter(chosen)
        names = _with(self.names, [change for change in self.renamed if next(numbers)])
        contents = []
        for file in self.files:
            sectors, sizes = _possible(file)
            content = b"".join([sector[next(numbers)] for sector in sectors])
            size = sizes[next(numbers)]
            contents.append(content[:size].ljust(size, b"\0"))
        return {name: contents[number] for name, number in names.items() if name not in UNIMPORTANT}


def _with(names: dict[str, int], changes: list[dict[str, int | None]]) -> dict[str, int]:
    after: dict[str, int | None] = dict(names)
    for change in changes:
        after.update(change)
    return {name: number for name, number in after.items() if number is not None}


def _possible(file: File) -> tuple[list[list[bytes]], list[int]]:
    """The contents that each sector may have, and the file's lengths; the durable one first, the last one last."""
    versions = file.versions()
    sizes = list(dict.fromkeys(reversed([len(version) for version in versions])))[::-1]
    sectors = []
    for start in range(0, max(sizes), SECTOR_BYTES):
        found = [version[start : start + SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0") for version in versions]
        if start >= len(file.durable) and len(versions) > 1:
            found.insert(1, random.Random(start).randbytes(SECTOR_BYTES))
        sectors.append(list(dict.fromkeys(reversed(found)))[::-1])
    return sectors, sizes


MANIFEST = "engram_table.json"


@dataclass
class Cut:
    """A moment between two calls: the disk, and the states of which one must be found."""

    after: str
    disk: Disk
    allowed: list[str]


class Recorder:
    """Puts what is done to a real folder into the model, and holds that the two are the same after each call."""

    def __init__(self, folder: Path, committed: str) -> None:
        self.folder = folder
        self.cuts: list[Cut] = []
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self._disk = Disk(files)
        self._numbers = {(folder / name).stat().st_ino: number for name, number in self._disk.names.items()}
        self._lock = threading.Lock()
        self._allowed, self._intended, self._renamed = [committed], "", False

    def intend(self, state: str) -> None:
        """The commit that comes next keeps this state."""
        self._intended, self._renamed = state, False

    def around(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        # One after the other, those of the thread that writes the journal as well.
        with self._lock:
            is_new = name == "open" and not Path(arguments[0]).exists()
            result = call(*arguments)
            if name != "open" or is_new:
                getattr(self, f"_{name}")(result, *arguments)
                self._compare()
                self.cuts.append(Cut(f"{len(self.cuts)} {name}", copy.deepcopy(self._disk), self._allowed))
            return result

    def _compare(self) -> None:
        """What went around the recorder shows here."""
        seen = {name: self._disk.files[number].versions()[-1] for name, number in self._disk.seen().items()}
        assert {path.name: path.read_bytes() for path in self.folder.iterdir()} == seen

    def _number(self, fd: int) -> int | None:
        """None: the folder itself."""
        inode = os.fstat(fd).st_ino
        return None if inode == self.folder.stat().st_ino else self._numbers[inode]

    def _change(self, fd: int, change: Change) -> None:
        number = self._number(fd)
        assert number is not None
        self._disk.files[number].pending.append(change)

    def _open(self, fd: int, path: Path, *_: Any) -> None:
        self._numbers[os.fstat(fd).st_ino] = self._disk.make(Path(path).name)

    def _pwrite(self, written: int, fd: int, data: Any, offset: int) -> None:
        self._change(fd, Change(offset, bytes(data[:written])))

    def _ftruncate(self, _: None, fd: int, size: int) -> None:
        self._change(fd, Change(size=size))

    def _posix_fallocate(self, _: None, fd: int, offset: int, size: int) -> None:
        self._change(fd, Change(size=offset + size))

    def _replace(self, _: None, old: Path, new: Path) -> None:
        self._disk.rename(Path(old).name, Path(new).name)
        if Path(new).name == MANIFEST and self._intended:
            self._allowed, self._renamed = [*self._allowed, self._intended], True

    def _unlink(self, _: None, path: Path) -> None:
        self._disk.renamed.append({Path(path).name: None})

    def _fsync(self, _: None, fd: int) -> None:
        number = self._number(fd)
        if number is not None:
            self._disk.sync(number)
            return
        self._disk.sync_names()
        if self._renamed:
            self._allowed, self._intended, self._renamed = [self._intended], "", False

    def _msync(self, _: None, mapping: np.memmap[Any, Any]) -> None:
        self._disk.msync(self._disk.seen()[Path(mapping.filename).name])

    def _store(self, _: None, *__: Any) -> None:
        """Which file that was, its bytes say."""
        for name, number in self._disk.seen().items():
            file = self._disk.files[number]
            old = np.frombuffer(file.versions()[-1], dtype=np.uint8)
            new = np.frombuffer((self.folder / name).read_bytes(), dtype=np.uint8)
            if len(old) == len(new):
                changed = np.flatnonzero(old != new)
                for part in np.split(changed, np.flatnonzero(np.diff(changed) > 1) + 1):
                    if len(part):
                        file.pending.append(Change(int(part[0]), new[part].tobytes(), mapped=True))


# Runs


def train(trainer: Trainer, until: int, recorder: Recorder | None = None) -> None:
    while trainer.step < until:
        trainer.gradients()
        trainer.update()
        if trainer.step % trainer.run.commit_every == 0:
            if recorder:
                recorder.intend(trainer.intended)
            trainer.commit()


def undisturbed(run: Run, folder: Path) -> tuple[str, str]:
    """The states of a new table, and of one at the end of the run."""
    trainer = open_trainer(run, folder)
    first = trainer.found
    train(trainer, run.steps)
    last = trainer.intended
    trainer.close()
    return first, last


def record(run: Run, folder: Path, committed: str, *stops: int) -> list[Cut]:
    """Trains to each of the stops and leaves there, whether it is a commit's turn or not; opens it again for more."""
    folder.mkdir(exist_ok=True)
    recorder = Recorder(folder, committed)
    with watched(recorder.around):
        for stop in stops:
            trainer = open_trainer(run, folder)
            train(trainer, stop, recorder)
            trainer.close()
    return recorder.cuts


# What a cut leaves


def left_after(cut: Cut) -> Iterator[list[int]]:
    """Choices for `after_cut`: all there are where they are few, or else none and all of what isn't durable, and
    samples."""
    counts = cut.disk.choices()
    nothing, everything = [0] * len(counts), [count - 1 for count in counts]
    if np.prod(np.array(counts, dtype=np.float64)) <= EXHAUSTIVE_UP_TO:
        yield from (list(chosen) for chosen in itertools.product(*map(range, counts)))
        return
    yield nothing
    yield everything
    chance = random.Random(cut.after)
    for _ in range(NUM_SAMPLES):
        # From one sector that differs to all of them.
        share, usual = chance.choice((0.02, 0.1, 0.5, 1.0)), chance.choice((nothing, everything))
        yield [
            chance.randrange(count) if chance.random() < share else number
            for count, number in zip(counts, usual, strict=True)
        ]


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check(run: Run, folder: Path, files: dict[str, bytes], allowed: list[str], end: str | None) -> None:
    """Opens the files: they must be one of these states, and come to the same end as an undisturbed run."""
    write_files(folder, files)
    trainer = open_trainer(run, folder)
    assert trainer.found in allowed
    if end is not None:
        train(trainer, run.steps)
        assert trainer.intended == end
    trainer.close()


def check_all(run: Run, folder: Path, cuts: list[Cut], end: str) -> int:
    """Every cut, and what it may leave; returns how many folders that were."""
    seen = set()
    for cut in cuts:
        for number, chosen in enumerate(left_after(cut)):
            files = cut.disk.after_cut(chosen)
            key = (tuple(sorted(files.items())), tuple(cut.allowed))
            if key in seen:
                continue
            seen.add(key)
            try:
                # Training on takes longer than all the rest.
                check(run, folder, files, cut.allowed, end if number < 2 else None)
            except BaseException as error:
                sizes = {name: len(content) for name, content in files.items()}
                raise AssertionError(f"power cut after call {cut.after}, choices {chosen}: {sizes}") from error
    return len(seen)


RUNS = [Run("adam", "float32", "power", 9, 2), Run("adagrad", "bfloat16", "power", 9, 2)]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_power_cut_after_every_call(quick_path: Path, run: Run) -> None:
    """A table is made and trained; left with a step that isn't committed; recovered; left with none; trained on."""
    first, end = undisturbed(run, quick_path / "undisturbed")
    cuts = record(run, quick_path / "recorded", first, 5, 8, 9)
    assert len({cut.allowed[-1] for cut in cuts}) == 5
    assert check_all(run, quick_path / "left", cuts, end) > len(cuts)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_power_cut_in_the_recovery_from_a_power_cut(quick_path: Path, run: Run) -> None:
    first, end = undisturbed(run, quick_path / "undisturbed")
    before = record(run, quick_path / "recorded", first, 5)
    # Cuts that leave a journal with something to undo: rows stored after the last commit, torn.
    live = [cut for cut in before[-20:] if cut.after.endswith("store")]
    chance = random.Random(str(run))
    for cut in live:
        folder = quick_path / "torn"
        write_files(folder, cut.disk.after_cut([chance.randrange(count) for count in cut.disk.choices()]))
        (committed,) = cut.allowed
        cuts = record(run, folder, committed, 6)
        undone = next(n for n, after in enumerate(cuts) if "engram_table.json.tmp" in after.disk.seen())
        assert check_all(run, quick_path / "left", cuts[:undone], end) > undone


def test_a_flush_survives_a_power_cut_whatever_the_durability(quick_path: Path) -> None:
    """Until the next store, which "process" doesn't keep from the disk."""
    run = Run("adam", "float32", "process", 9, 9)
    folder = quick_path / "recorded"
    folder.mkdir()
    first, end = undisturbed(run, quick_path / "undisturbed")
    recorder = Recorder(folder, first)
    with watched(recorder.around):
        trainer = open_trainer(run, folder)
        train(trainer, 5)
        trainer.commit()
        num_cuts = len(recorder.cuts)
        recorder.intend(trainer.intended)
        trainer.storage.flush(step=trainer.step)
    cuts = [cut for cut in recorder.cuts[num_cuts:] if len(cut.allowed) == 1 and cut.allowed != [first]]
    trainer.close()
    assert [cut.after.split()[1] for cut in cuts] == ["fsync", "ftruncate"]
    assert check_all(run, quick_path / "left", cuts, end) >= 1


def test_a_power_cut_at_the_first_commit_of_a_raw_table(quick_path: Path) -> None:
    """It has no manifest before; the states here are the table's own bytes."""
    raw, folder, left = np.zeros((ROWS, WIDTH), dtype="<f4"), quick_path / "recorded", quick_path / "left"
    write_files(folder, {TABLE: raw.tobytes()})
    recorder = Recorder(folder, raw.tobytes().hex())
    with watched(recorder.around), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = MMapEmbeddingStorage(ROWS, WIDTH, folder / TABLE, durability="power")
        for number in (1, 2):
            raw[number:50] = number
            storage.write(torch.arange(number, 50), torch.from_numpy(raw[number:50]))
            recorder.intend(raw.tobytes().hex())
            storage.commit(step=number)
        storage.write(torch.arange(50), torch.ones(50, WIDTH))
        storage.close()
    assert len({cut.allowed[-1] for cut in recorder.cuts}) == 3
    for cut in recorder.cuts:
        for chosen in left_after(cut):
            write_files(left, cut.disk.after_cut(chosen))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                MMapEmbeddingStorage(ROWS, WIDTH, left / TABLE).close()
            assert (left / TABLE).read_bytes().hex() in cut.allowed, f"after call {cut.after}, choices {chosen}"
