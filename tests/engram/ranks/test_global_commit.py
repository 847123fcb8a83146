"""Ranks that are killed, stopped or fail: the whole is always at one commit, and the error names the rank.

Each kill is followed by an opening of all ranks, which must find the last commit that was decided, or the one that
was being decided; the training that goes on from there must end with the bits of one that nobody disturbed.

SENSE_RANK_KILLS is how many of each of the four kinds there are (`make ranks`: 15, so 60 in all; otherwise 3).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_runs import Server, rank_server

from sense_v2.engram.ranks.global_commit import GlobalManifest
from sense_v2.engram.ranks.shards import shard_name
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.opening import TableFiles
from sense_v2.engram.upkeep.check import check_table, repair_table

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SENSE_RANK_KILLS", "3"))
LAST_STEP = 6
LAYOUTS = ("file", "shards")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with rank_server() as one:
        yield one


class Undisturbed:
    """What a run finds that nobody disturbs, by layout and number of ranks."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.results: dict[tuple[str, int], list[Any]] = {}

    def __call__(self, layout: str, num_ranks: int) -> list[Any]:
        key = layout, num_ranks
        if key not in self.results:
            folder = self.folder / f"{layout}{num_ranks}"
            self.results[key] = self.server.results(
                "train", num_ranks, folder, layout=layout, last_step=LAST_STEP, optimizer="adam"
            )
        return self.results[key]


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: Any) -> Undisturbed:
    return Undisturbed(server, tmp_path_factory.mktemp("undisturbed"))


def names_rank(answers: list[dict[str, Any]], killed: int) -> None:
    """Of the ranks that weren't killed, each ended with an error that names the one that was, or with none."""
    for rank, answer in enumerate(answers):
        if rank != killed:
            assert "killed" not in answer, answer
            if "error" in answer:
                assert answer["error"].startswith("RankFailure"), answer.get("trace", answer)
                assert f"rank {killed} is gone" in answer["error"] or "no sign of life of any" in answer["error"]


def goes_on(server: Server, folder: Path, expected: list[Any], layout: str, num_ranks: int) -> None:
    """All ranks open what is there at one commit and train to the end."""
    found = server.results("train", num_ranks, folder, layout=layout, last_step=LAST_STEP, optimizer="adam")
    steps = {result["found"]["step"] for result in found}
    generations = {result["found"]["generation"] for result in found}
    assert len(steps) == len(generations) == 1, "one commit"
    (step,) = steps
    assert generations == {step // 2}
    for result, whole in zip(found, expected, strict=True):
        assert result["losses"] == whole["losses"][step:]
        for key in ("rows", "states", "state_steps", "step", "generation"):
            assert result[key] == whole[key], key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_at_random_moments(server: Server, quick_path: Path, undisturbed: Undisturbed, layout: str) -> None:
    chance = random.Random(layout)
    for number in range(KILLS):
        num_ranks = (2, 3, 4)[number % 3] if layout == "shards" else (2, 4)[number % 2]
        killed = chance.randrange(num_ranks)
        event = chance.choice(("open", "exchanged", "stepped", "commit", "commit", "committed"))
        count = 1 if event == "open" else chance.randrange(1, 3)
        delay = chance.uniform(0, chance.choice((0.0, 0.003, 0.02)))
        folder = quick_path / str(number)
        answers = server.ask(
            "train",
            num_ranks,
            folder,
            send=(killed, event, count, delay, signal.SIGKILL),
            layout=layout,
            last_step=LAST_STEP,
            optimizer="adam",
        )
        names_rank(answers, killed)
        goes_on(server, folder, undisturbed(layout, num_ranks), layout, num_ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_at_calls_of_a_commit(server: Server, quick_path: Path, undisturbed: Undisturbed, layout: str) -> None:
    """Every call that changes the disk, from the last step's stores before a commit to the first one's after it."""
    num_ranks = 2
    settings = {"layout": layout, "last_step": LAST_STEP, "optimizer": "adam", "durability": "power"}
    calls = server.results("count_calls", num_ranks, quick_path / "counted", **settings)
    moments = []
    for rank, names in enumerate(calls):
        # Opening makes files with the same calls: what is between the second step's and the third step's stores.
        stores = [number for number, name in enumerate(names) if name == "store"]
        moments += [(rank, number) for number in range(stores[4], stores[9])]
        assert "replace" in names[stores[4] : stores[9]] or (rank and layout == "file")
    chance = random.Random(layout)
    chance.shuffle(moments)
    for rank, number in moments[:KILLS]:
        folder = quick_path / f"{rank}-{number}"
        die = [rank, number, chance.choice(("before", "amid"))]
        answers = server.ask("train", num_ranks, folder, die=die, **settings)
        assert answers[rank] == {"killed": signal.SIGKILL}
        names_rank(answers, rank)
        goes_on(server, folder, undisturbed(layout, num_ranks), layout, num_ranks)


def test_a_rank_that_hangs_is_named_within_the_time(
    server: Server, quick_path: Path, undisturbed: Undisturbed
) -> None:
    started = time.monotonic()
    answers = server.ask(
        "train",
        2,
        quick_path / "table",
        send=(1, "exchanged", 3, 0.0, signal.SIGSTOP),
        timeout_seconds=2.0,
        layout="shards",
        last_step=LAST_STEP,
        optimizer="adam",
    )
    assert time.monotonic() - started < 60
    assert "rank 1 is gone: no sign of life" in answers[0]["error"]
    goes_on(server, quick_path / "table", undisturbed("shards", 2), "shards", 2)


def test_a_rank_that_is_busy_elsewhere_is_named(server: Server, quick_path: Path) -> None:
    """It is alive and doesn't come."""
    answers = server.ask("come_late", 2, quick_path, timeout_seconds=1.0, layout="file")
    assert "rank 1 didn't come: it is alive" in answers[0]["error"]


def test_an_error_on_one_rank_is_an_error_on_all(server: Server, quick_path: Path) -> None:
    answers = server.ask("fail_to_prepare", 2, quick_path, layout="file")
    assert answers[1]["error"] == "OSError: [Errno 28] no room: here"
    assert (
        answers[0]["error"] == "RuntimeError: rank 1 failed in 'commit: prepare': OSError: [Errno 28] no room: here"
    )


# What is left behind


def test_a_shard_that_is_in_doubt_isnt_opened_alone(server: Server, quick_path: Path) -> None:
    """Rank 1 has prepared, rank 0 decided: alone, the shard can't know."""
    answers = server.ask("die_before_finishing", 2, quick_path, layout="shards")
    assert answers[1] == {"killed": signal.SIGKILL}
    path = quick_path / shard_name("table.dat", 1, 2)
    files = TableFiles(path)
    assert files.prepared.exists()
    assert any(finding.file == files.prepared.name and finding.is_wrong for finding in check_table(path).findings)
    num_rows = 97 - GlobalManifest.read(quick_path / "table.shards.json").bounds[1]
    for mode in ("r", "r+"):
        with pytest.raises(ValueError, match="is a shard whose last commit was cut off"):
            MMapEmbeddingStorage(num_rows, 8, path, mode=mode)
    found = server.results("train", 2, quick_path, layout="shards", last_step=2)
    assert [result["found"] for result in found] == [{"step": 2, "generation": 1}] * 2
    assert not files.prepared.exists()


def test_a_shard_of_another_moment_is_refused(server: Server, quick_path: Path) -> None:
    server.results("train", 2, quick_path, layout="shards", last_step=2)
    old = quick_path.with_name(quick_path.name + "-old")
    shutil.copytree(quick_path, old)
    server.results("train", 2, quick_path, layout="shards", last_step=4)
    for path in old.glob(shard_name("table.*", 1, 2).replace(".*", "*")):
        shutil.copy(path, quick_path)
    for path in old.glob("table.1-of-2.*"):
        shutil.copy(path, quick_path)
    shutil.rmtree(old)
    answers = server.ask("train", 2, quick_path, layout="shards", last_step=6)
    assert "they are of different moments, or the shard was trained on alone" in answers[1]["error"]
    assert answers[0]["error"].startswith("RuntimeError: rank 1 failed in 'open: shards'")


def test_another_number_of_ranks_is_refused_for_shards(server: Server, quick_path: Path) -> None:
    server.results("train", 2, quick_path, layout="shards", last_step=2)
    answers = server.ask("train", 4, quick_path, layout="shards", last_step=4)
    for answer in answers:
        assert "ties 2 shards" in answer["error"]
        assert "Go on with 2 ranks" in answer["error"]


def test_journals_of_all_ranks_are_undone_by_who_opens_alone(server: Server, quick_path: Path) -> None:
    """A run in one file died between two commits; the table is then opened as any other."""
    server.ask(
        "train",
        2,
        quick_path,
        send=(1, "stepped", 3, 0.0, signal.SIGKILL),
        layout="file",
        last_step=LAST_STEP,
    )
    shutil.copytree(quick_path, quick_path / "copy")
    with pytest.raises(ValueError, match="a writer ended between two commits"):
        MMapEmbeddingStorage(97, 8, quick_path / "table.dat", mode="r")
    with pytest.warns(UserWarning, match="rows were put back"):
        table = MMapEmbeddingStorage(97, 8, quick_path / "table.dat")
    expected = server.results("train", 2, quick_path / "other", layout="file", last_step=2)
    rows = expected[0]["rows"] + expected[1]["rows"]
    assert table.committed_step == 2
    assert table.weight.tolist() == rows
    assert not list(quick_path.glob("table.share*.journal"))
    table.close()
    # And by `sense-engram verify --repair`.
    copy = quick_path / "copy" / "table.dat"
    (finding,) = [finding for finding in check_table(copy).findings if finding.is_wrong]
    assert "a writer ended between two commits: it puts back" in finding.text
    done, check = repair_table(copy)
    assert "rows put back as they were at generation 1, step 2" in done[0]
    assert check.num_wrong == 0
    assert np.fromfile(copy, "<f4").reshape(-1, 8).tolist() == rows


def test_while_a_share_is_written_nobody_else_opens_the_table(tmp_path: Path) -> None:
    from sense_v2.engram.table.opening import Share

    first = MMapEmbeddingStorage(10, 4, tmp_path / "t.dat", share=Share(0, 0, 5))
    second = MMapEmbeddingStorage(10, 4, tmp_path / "t.dat", share=Share(1, 5, 10))
    ids = torch.tensor([5])
    with pytest.raises(PermissionError, match="row id 5: this process stores to rows 0 to 4"):
        first.write(ids, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="commit together"):
        first.commit(step=1)
    second.write(ids, torch.zeros(1, 4))
    assert first.weight[5].tolist() == [0.0] * 4, "one file"
    second.close()
    first.close()
