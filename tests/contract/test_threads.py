"""One thread stores rows while another commits, for every table that trains: what a commit says is what is there."""

from __future__ import annotations

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from row_sources import TRAINABLE, open_kind, rows_in_files
from tables import D, N, in_a_fork, make, manifest, slow_sums

from sense_v2.engram.delta.overlay import RecentRows
from sense_v2.engram.optim import RowAdam
from sense_v2.engram.table import disk


@pytest.fixture(params=TRAINABLE)
def kind(request: Any) -> str:
    return str(request.param)


def test_a_commit_waits_for_a_store_of_another_thread(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is held up between its old bytes, which are kept, and its new ones."""
    table = open_kind(kind, tmp_path)
    storing, commits = threading.Event(), ThreadPoolExecutor(1)
    done: list[bool] = []
    place, name = (RecentRows, "write") if kind.startswith("overlay") else (disk, "store")
    real = getattr(place, name)

    def held_up(*arguments: Any) -> None:
        if not storing.is_set():
            storing.set()
            commit = commits.submit(table.commit, step=1)
            commit_came = threading.Event()
            commit.add_done_callback(lambda _: commit_came.set())
            done.append(commit_came.wait(0.2))
        real(*arguments)

    monkeypatch.setattr(place, name, held_up)
    ids, rows = torch.tensor([2, 5]), torch.ones(2, table.embedding_dim)
    table.write(ids, rows)
    commits.shutdown()
    assert done == [False]
    assert (table.committed_step, table.manifest.updates) == (1, table.updates)
    assert rows_in_files(kind, tmp_path)[ids].tolist() == rows.tolist()
    table.close()


def test_a_commit_waits_for_a_step_of_another_thread(kind: str, tmp_path: Path) -> None:
    """A step stores states, then rows; half of one is never committed."""
    table = open_kind(kind, tmp_path)
    optimizer = table.row_optimizer(RowAdam, lr=0.1)
    commits = ThreadPoolExecutor(1)
    waited: list[bool] = []

    def update(*arguments: Any) -> None:
        type(optimizer)._update(optimizer, *arguments)
        commit = commits.submit(table.commit, step=1)
        commit_came = threading.Event()
        commit.add_done_callback(lambda _: commit_came.set())
        waited.append(not commit_came.wait(0.2))

    optimizer._update = update
    table.begin(torch.tensor([3, 4]))
    table(torch.tensor([3, 4])).float().sum().backward()
    table.average_over_ranks()
    optimizer.step()
    commits.shutdown()
    assert waited == [True]
    assert table.manifest.updates == table.updates
    table.close()


@pytest.mark.parametrize("is_killed", [False, True])
def test_threads_that_store_and_a_thread_that_commits(tmp_path: Path, is_killed: bool) -> None:
    """However it ends, the next opening has the rows and states of the last commit's checksums."""
    path = tmp_path / "engram_table.dat"

    def run() -> None:
        table, stop = make(path), threading.Event()
        state = table.open_state("sum", 1)

        def store(seed: int) -> None:
            drawn = torch.Generator().manual_seed(seed)
            while not stop.is_set():
                ids = torch.randperm(N, generator=drawn)[:9]
                table.write(ids, torch.randn(9, D, generator=drawn))
                table.write_state(state, ids, torch.randn(9, 1, generator=drawn))

        threads = [threading.Thread(target=store, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for step in range(100):
            table.commit(step=step)
        if is_killed:
            os._exit(0)
        stop.set()
        for thread in threads:
            thread.join()
        table.commit(step=100)
        table.close()

    assert in_a_fork(run) == ("" if is_killed else "None")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(path).close()
    values = manifest(path)
    assert values["checksums"] == slow_sums(path)
    assert values["states"]["sum"]["checksums"] == slow_sums(path.with_name("engram_table.sum.dat"))
