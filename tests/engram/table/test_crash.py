"""Kills a trainer at random moments and at every call it makes: each time it must come back as if nothing had been.

The trainer (crash_trainer.py) compares what it finds with a log of its own and refuses to go on from anything but the
last commit. In the end rows, states, losses and manifest, and every commit on the way, are those of a run that nobody
disturbed.

SENSE_CRASH_KILLS is the number of random kills (`make crash`: 500; otherwise 40). From 100 on, every kind of run is
killed at every call as well; below it is the one that makes the most calls.
"""

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash_trainer import KILLS, ROWS, RUNS, TABLE, THOROUGH, WIDTH, Log, Parent, Run, kept, read_manifest

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.checksums import block_sums

EVENTS = ("start", "open", "step", "commit")
# Long enough for each call to be met with the journal new, longer, and left by the commit before.
SHORT_RUNS = [Run(run.optimizer, run.dtype, run.durability, 5 if THOROUGH else 3, 2) for run in RUNS]
SHORT_RUNS = SHORT_RUNS if THOROUGH else SHORT_RUNS[-1:]


def assert_undisturbed(folder: Path, expected: dict[str, Any]) -> None:
    """Every commit on the way, and what is there at the end."""
    logged = {(str(step), state) for _, step, state in Log(folder.with_name(folder.name + ".log")).lines()}
    assert logged == set(expected["states"].items())
    assert kept(folder) == expected["kept"]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_kills_at_random_moments(crash_parent: Parent, tmp_path: Path, run: Run) -> None:
    expected = crash_parent.ask("undisturbed", run=run, folder=tmp_path / "undisturbed")["result"]
    chance = random.Random(str(run))
    kills, finished = 0, 0
    while kills * len(RUNS) < KILLS:
        folder = tmp_path / str(finished)
        # Many near the start, where the table is made or recovered.
        kill = chance.choice(EVENTS), chance.choice((1, 1, 1, 2, 3)), chance.uniform(0, chance.choice((0.002, 0.03)))
        answer = crash_parent.ask("trained", run=run, folder=folder, first=expected["first"], die_at=None, kill=kill)
        if answer["ended"] == "killed":
            kills += 1
        else:
            assert_undisturbed(folder, expected)
            finished += 1
    folder = tmp_path / str(finished)
    crash_parent.ask("trained", run=run, folder=folder, first=expected["first"], die_at=None)
    assert_undisturbed(folder, expected)


def die_at_every_call(
    parent: Parent, run: Run, folder: Path, first: str, calls: list[list[str]], start: Path | None = None
) -> list[Path]:
    """The folders that trainers leave who died before, or amid, one of these calls each; they began with copies of
    `start`, or with nothing."""
    left = []
    for number, (name, _) in enumerate(calls):
        for moment in ("before", "amid") if name in ("pwrite", "store") else ("before",):
            left.append(folder / f"{moment}-{number}-{name}")
            if start:
                copy(start, left[-1])
            answer = parent.ask("trained", run=run, folder=left[-1], first=first, die_at=(number, moment))
            assert answer["ended"] == "killed"
    return left


def copy(folder: Path, other: Path) -> None:
    """With the trainer's log."""
    shutil.copytree(folder, other)
    shutil.copy(f"{folder}.log", f"{other}.log")


def assert_all_come_back(parent: Parent, run: Run, folders: list[Path], expected: dict[str, Any]) -> None:
    parent.ask("trained_all", run=run, folders=[str(folder) for folder in folders], first=expected["first"])
    for folder in folders:
        assert_undisturbed(folder, expected)


@pytest.mark.parametrize("run", SHORT_RUNS, ids=str)
def test_killed_at_every_call(crash_parent: Parent, quick_path: Path, run: Run) -> None:
    expected = crash_parent.ask("undisturbed", run=run, folder=quick_path / "undisturbed")["result"]
    calls = crash_parent.ask("counted", run=run, folder=quick_path / "counted", first=None)["result"]
    # Creation, stores, the journal, commits: all there to be cut off.
    counts = Counter(f"{name} {file}".strip() for name, file in calls)
    assert counts["posix_fallocate engram_table.dat.tmp"] == 1
    assert counts["replace engram_table.json.tmp"] == 1 + run.steps // run.commit_every
    assert counts["store"] == 2 * run.steps
    assert counts["pwrite engram_table.journal"] >= 4 * run.steps
    left = die_at_every_call(crash_parent, run, quick_path, expected["first"], calls)
    assert_all_come_back(crash_parent, run, left, expected)


@pytest.mark.parametrize("run", SHORT_RUNS, ids=str)
def test_killed_at_every_call_of_a_recovery(crash_parent: Parent, quick_path: Path, run: Run) -> None:
    """And once more in the recovery from that."""
    expected = crash_parent.ask("undisturbed", run=run, folder=quick_path / "undisturbed")["result"]
    calls = crash_parent.ask("counted", run=run, folder=quick_path / "counted", first=None)["result"]
    # Amid the last store: half of the last step's rows, and all of its state, have to be undone.
    start = quick_path / "start"
    last_store = max(number for number, (name, _) in enumerate(calls) if name == "store")
    crash_parent.ask("trained", run=run, folder=start, first=expected["first"], die_at=(last_store, "amid"))
    copy(start, quick_path / "again")
    calls = crash_parent.ask("counted", run=run, folder=quick_path / "again", first=expected["first"])["result"]
    emptied = next(n for n, call in enumerate(calls) if call == ["ftruncate", "engram_table.journal"])
    assert ["store", ""] in calls[:emptied]
    left = die_at_every_call(crash_parent, run, quick_path, expected["first"], calls[: emptied + 6], start)
    chance = random.Random(str(run))
    for folder in left[:emptied]:
        die_at = chance.randrange(emptied), chance.choice(("before", "amid"))
        crash_parent.ask("trained", run=run, folder=folder, first=expected["first"], die_at=die_at)
    assert_all_come_back(crash_parent, run, left, expected)


def test_rows_that_are_given_twice_are_undone_as_well(quick_path: Path) -> None:
    """`write` leaves open which of two rows for one id stays; the journal must not."""
    storage = MMapEmbeddingStorage(ROWS, WIDTH, quick_path / "alive" / TABLE)
    before = (quick_path / "alive" / TABLE).read_bytes()
    storage.write(torch.tensor([5, 1, 5, 2, 1]), torch.arange(5.0)[:, None].expand(5, WIDTH))
    shutil.copytree(quick_path / "alive", quick_path / "died")
    with pytest.warns(UserWarning, match="3 rows were put back"):
        MMapEmbeddingStorage(ROWS, WIDTH, quick_path / "died" / TABLE)
    assert (quick_path / "died" / TABLE).read_bytes() == before
    storage.commit()
    rows = np.fromfile(quick_path / "alive" / TABLE, dtype=np.uint8).reshape(ROWS, -1)
    assert read_manifest(quick_path / "alive")["checksums"] == [f"{value:016x}" for value in block_sums(rows)]
