"""Commits as storage.py makes them: what one keeps, what is undone, who else may look or write meanwhile."""

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tables import D, N, gradients_of, in_a_fork, make, manifest, names, on_disk, slow_sums
from torch.utils.data import DataLoader, Dataset

from sense_v2.engram.optim import RowAdam
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk


def undone(num_rows, generation):
    rows = "1 row was put back as it was" if num_rows == 1 else f"{num_rows} rows were put back as they were"
    return rf"a writer ended between two commits; {rows} at the last commit \(generation {generation}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engram_table.dat"


def fill(table: MMapEmbeddingStorage, row_id: int, value: float) -> None:
    table.write(torch.tensor([row_id]), torch.full((1, D), value))


def fill_state(table: MMapEmbeddingStorage, name: str, row_id: int, value: float) -> None:
    """A step of a state of one float a row."""
    state = table.open_state(name, 1)
    table.write_state(state, torch.tensor([row_id]), torch.full((1, 1), value))
    state.step += 1


def leave(table: MMapEmbeddingStorage) -> None:
    """As a process that dies leaves it."""
    table._let_go()


def journal_of(path: Path) -> Path:
    return path.with_suffix(".journal")


# What a commit keeps


def test_what_was_not_committed_is_undone_by_the_next_opening(path: Path) -> None:
    table = make(path)
    fill(table, 3, 1.0)
    table.commit(step=1)
    committed = path.read_bytes()
    fill(table, 3, 2.0)
    fill(table, 4, 2.0)
    fill(table, 3, 3.0)
    assert table.weight[[3, 4], 0].tolist() == [3.0, 2.0]
    del table
    gc.collect()
    assert path.read_bytes() != committed
    with pytest.warns(UserWarning, match=undone(2, 1) + ", step 1") as caught:
        table = MMapEmbeddingStorage(N, D, path)
    assert [warning.filename for warning in caught] == [__file__]
    assert path.read_bytes() == committed
    assert (table.committed_step, table.manifest.generation, table.manifest.updates) == (1, 1, 1)
    table.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(path).close()


def test_closing_says_how_much_will_be_undone(path: Path) -> None:
    table = MMapEmbeddingStorage(N, D, path)
    fill(table, 1, 1.0)
    table.commit(step=5)
    fill(table, 2, 1.0)
    fill(table, 2, 2.0)
    error = (
        r"engram_table\.dat is closed with 2 updates since its last commit \(step 5\); the next opening undoes them"
    )
    with pytest.warns(UserWarning, match=error) as caught:
        table.close()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.close()
    with pytest.warns(UserWarning, match=undone(1, 1)):
        make(path)


def test_rows_and_all_states_go_back_together(path: Path) -> None:
    table = make(path)
    for name in ("adam", "sums"):
        fill_state(table, name, 7, 0.5)
    fill(table, 7, 0.5)
    table.commit(step=1)
    before = {file.name: file.read_bytes() for file in path.parent.glob("*.dat")}
    assert len(before) == 3
    for name in ("adam", "sums"):
        fill_state(table, name, 8, 1.5)
    fill(table, 9, 1.5)
    leave(table)
    after = {file.name: file.read_bytes() for file in path.parent.glob("*.dat")}
    assert not [name for name in before if after[name] == before[name]]
    with pytest.warns(UserWarning, match=undone(3, 1)):
        table = make(path)
    # Also those of states that nobody has opened again.
    assert {file.name: file.read_bytes() for file in path.parent.glob("*.dat")} == before
    assert [table.open_state(name, 1).step for name in ("adam", "sums")] == [1, 1]


def test_a_commit_keeps_the_states_that_nobody_opened(path: Path) -> None:
    table = make(path)
    fill_state(table, "adam", 7, 0.5)
    table.commit()
    table.close()
    entry = manifest(path)["states"]["adam"]
    assert entry["checksums"] == slow_sums(path.with_name("engram_table.adam.dat"))
    table = make(path)
    fill(table, 7, 0.5)
    table.commit()
    assert manifest(path)["states"] == {"adam": entry}
    assert table.open_state("adam", 1).values[7].item() == 0.5


def test_a_state_that_was_never_committed_begins_anew(path: Path) -> None:
    table = make(path)
    table.commit()
    fill_state(table, "adam", 7, 0.5)
    fill(table, 7, 0.5)
    leave(table)
    assert np.fromfile(path.with_name("engram_table.adam.dat"), dtype="<f4")[7] == 0.5
    with pytest.warns(UserWarning, match=undone(1, 1)):
        table = make(path)
    state = table.open_state("adam", 1)
    assert (state.step, state.values.any().item()) == (0, False)


def test_a_run_that_is_interrupted_ends_as_one_that_is_not(path: Path, tmp_path: Path) -> None:
    """Bit for bit, and so do the draws of bfloat16's rounding: they count from the last commit."""

    def train(table: MMapEmbeddingStorage, steps: range) -> None:
        optimizer = RowAdam(table, lr=0.1)
        for step in steps:
            ids = torch.from_numpy(np.random.default_rng(step).integers(0, N, 12))
            table.train()(ids).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 2:
                table.commit(step=step)

    undisturbed = make(tmp_path / "other" / path.name, dtype="bfloat16")
    train(undisturbed, range(9))
    table = make(path, dtype="bfloat16")
    for steps in (range(5), range(3, 8), range(6, 9)):
        train(table, steps)
        leave(table)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(was|were) put back", UserWarning)
            table = make(path, dtype="bfloat16")
    for name in ("engram_table.dat", "engram_table.adam.dat"):
        assert (path.parent / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    expected, found = manifest(undisturbed.path), manifest(path)
    for values in (expected, found):
        del values["commit"]
    assert found == expected


def test_extra_is_kept_with_its_commit(path: Path) -> None:
    table = make(path)
    assert table.committed_extra == {}
    extra: dict[str, Any] = {"loss": 2.5, "schedule": {"rates": (0.1, None)}, "ä": "漢"}
    table.commit(step=1, extra=extra)
    extra["loss"] = 0
    kept = {"loss": 2.5, "schedule": {"rates": [0.1, None]}, "ä": "漢"}
    assert (table.committed_extra, manifest(path)["extra"]) == (kept, kept)
    table.commit(step=2)
    table.flush(step=3)
    assert (table.committed_extra, table.committed_step) == (kept, 3)
    table.close()
    table = make(path)
    assert table.committed_extra == kept
    table.commit(extra={})
    assert (table.committed_extra, manifest(path)["extra"], table.committed_step) == ({}, {}, 3)


@pytest.mark.parametrize(
    "extra", [{"a": {1}}, {"a": float("nan")}, {"a": float("inf")}, {"a": torch.ones(1)}, {"a": b""}]
)
def test_an_extra_that_is_no_json_is_refused_and_nothing_is_committed(path: Path, extra: Any) -> None:
    table = make(path)
    table.commit(step=1, extra={"kept": True})
    before = path.with_suffix(".json").read_text()
    fill(table, 1, 1.0)
    with pytest.raises(ValueError, match="must be a JSON object"):
        table.commit(step=2, extra=extra)
    for step in (-1, 2**63):
        with pytest.raises(ValueError, match=f"step = {step}"):
            table.commit(step=step)
    assert path.with_suffix(".json").read_text() == before
    assert (table.committed_step, table.committed_extra) == (1, {"kept": True})
    # The row is still one to be committed, or undone.
    table.commit(step=2)
    table.close()
    assert make(path).weight[1].tolist() == [1.0] * D


# Durability


class Recorder:
    """The `os` module, and stores into the mapping: in which order the disk is changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        real_store, real_flush = disk.store, np.memmap.flush

        def store(table_ND: torch.Tensor, *arguments: torch.Tensor) -> None:
            self.events.append(f"store {table_ND.shape[1]}")
            real_store(table_ND, *arguments)

        def flush(mapping: Any) -> None:
            self.events.append(f"msync {os.path.basename(mapping.filename)}")
            real_flush(mapping)

        monkeypatch.setattr(disk, "os", self)
        monkeypatch.setattr(disk, "store", store)
        monkeypatch.setattr(np.memmap, "flush", flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        self.events.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
        os.fsync(fd)

    def replace(self, old: Any, new: Any) -> None:
        self.events.append(f"rename {os.path.basename(new)}")
        os.replace(old, new)

    def taken(self) -> list[str]:
        events, self.events = self.events, []
        return events


def test_against_power_cuts_old_bytes_are_on_the_disk_before_new_ones_are_stored(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make(path, durability="power")
    state = table.open_state("adam", 1)
    table.commit()
    recorder = Recorder(monkeypatch)
    table.write_state(state, torch.tensor([1]), torch.ones(1, 1))
    fill(table, 1, 1.0)
    folder = f"fsync {path.parent.name}"
    journal = "fsync engram_table.journal"
    assert recorder.taken() == [journal, folder, "store 1", journal, f"store {D}"]
    # Once they are there, nothing is waited for.
    fill(table, 1, 2.0)
    assert recorder.taken() == [f"store {D}"]
    # A lookup says early which rows it will be: of all files at once.
    table.train()(torch.tensor([2]))
    table.protect(torch.tensor([2]))
    assert recorder.taken() == [journal]
    table.write_state(state, torch.tensor([2]), torch.ones(1, 1))
    fill(table, 2, 1.0)
    assert recorder.taken() == ["store 1", f"store {D}"]
    files = ["engram_table.dat", "engram_table.adam.dat"]
    synced = [f"{call} {name}" for name in files for call in ("msync", "fsync")]
    manifest_events = ["fsync engram_table.json.tmp", "rename engram_table.json", folder]
    table.commit()
    assert recorder.taken() == [*synced, *manifest_events]


def test_against_the_death_of_the_process_rows_need_no_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path)
    recorder = Recorder(monkeypatch)
    fill(table, 1, 1.0)
    table.train()(torch.tensor([2]))
    table.protect(torch.tensor([2]))
    assert recorder.taken() == [f"store {D}"]
    table.commit()
    # The manifest is always synced before it takes the old one's place: an empty one would be worse than an old one.
    assert recorder.taken()[:2] == ["fsync engram_table.json.tmp", "rename engram_table.json"]
    fill(table, 1, 2.0)
    recorder.taken()
    table.flush()
    assert recorder.taken()[:4] == [
        "fsync engram_table.journal",
        f"fsync {path.parent.name}",
        "msync engram_table.dat",
        "fsync engram_table.dat",
    ]


def test_durability_can_be_changed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="durability = 'fast': must be one of 'process', 'power'"):
        make(path, durability="fast")
    table = make(path)
    assert table.durability == "process"
    with pytest.raises(ValueError, match="durability = None: must be one of"):
        table.durability = None  # type: ignore[assignment]
    recorder = Recorder(monkeypatch)
    fill(table, 1, 1.0)
    table.durability = "power"
    assert (table.durability, recorder.taken()) == ("power", [f"store {D}"])
    # What was kept before is synced with the next.
    fill(table, 1, 2.0)
    assert recorder.taken() == ["fsync engram_table.journal", f"fsync {path.parent.name}", f"store {D}"]
    table.commit()


def test_the_journals_limit_is_an_error_before_anything_is_stored(path: Path) -> None:
    table = make(path, journal_limit_bytes=1000)
    fill(table, 1, 1.0)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"past its limit of 1000 bytes: .*Call commit\(\) more often, or open"):
        table.write(torch.arange(N), torch.ones(N, D))
    assert path.read_bytes() == before
    table.commit()
    for row_id in range(N):
        fill(table, row_id, 2.0)
        if row_id % 5 == 0:
            table.commit()
    table.commit()
    assert (on_disk(path) == 2.0).all()


# Forks


def test_a_forked_child_reads_and_its_writes_are_refused(path: Path) -> None:
    table = make(path)
    state = table.open_state("adam", 1)
    fill(table, 1, 1.0)
    table.commit(step=1)
    fill(table, 2, 2.0)
    before = {name: (path.parent / name).read_bytes() for name in names(path.parent)}
    error = f"RuntimeError: {path} was opened by process {os.getpid()}, of which this is a forked child: can't "
    ids = torch.tensor([3])
    for what, call in (
        ("write rows", lambda: fill(table, 3, 3.0)),
        ("write rows", lambda: table.protect(ids)),
        ("write to an optimizer state", lambda: table.write_state(state, ids, torch.ones(1, 1))),
        ("open an optimizer state", lambda: table.open_state("new", 1)),
        ("commit", table.commit),
        ("commit", table.flush),
    ):
        assert in_a_fork(call) == f"{error}{what}. Only the process that opened a table writes to it"
    assert in_a_fork(lambda: table.gather(torch.tensor([2])).tolist()) == str([[2.0] * D])

    def look_up() -> object:
        """As if it trained: gradients come, rows aren't kept, and what ends with the child ends nothing else."""
        table.train()(torch.tensor([3, 1])).sum().backward()
        found = gradients_of(table)[0].tolist()
        table.close()
        gc.collect()
        return found

    assert in_a_fork(look_up) == "[1, 3]"
    assert {name: (path.parent / name).read_bytes() for name in names(path.parent)} == before
    assert table.gradients() is None
    # The parent goes on.
    fill(table, 4, 4.0)
    table.commit(step=2)
    assert in_a_fork(lambda: make(path)).startswith("BlockingIOError")
    table.close()
    assert make(path).weight[[1, 2, 4], 0].tolist() == [1.0, 2.0, 4.0]


def test_a_forked_child_that_closes_the_table_leaves_the_parents_journal(path: Path) -> None:
    """The parent has looked rows up and stored none yet: for itself it would remove the journal now."""
    table = make(path)
    before = path.read_bytes()
    table.protect(torch.tensor([3]))
    kept = journal_of(path).read_bytes()
    assert kept
    assert in_a_fork(table.close) == "None"
    assert journal_of(path).read_bytes() == kept
    fill(table, 3, 1.0)
    leave(table)
    with pytest.warns(UserWarning, match=undone(1, 0)):
        make(path)
    assert path.read_bytes() == before


def test_a_forked_child_opens_the_table_itself_when_the_parent_has_closed_it(path: Path) -> None:
    table = make(path)
    fill(table, 1, 1.0)
    table.commit()
    table.close()

    def child() -> None:
        own = make(path)
        fill(own, 1, 2.0)
        own.commit()
        own.close()

    assert in_a_fork(child) == "None"
    assert make(path).weight[1, 0].item() == 2.0


class RowsOfIds(Dataset[torch.Tensor]):
    def __init__(self, table: MMapEmbeddingStorage) -> None:
        self.table = table

    def __len__(self) -> int:
        return N

    def __getitem__(self, row_id: int) -> torch.Tensor:
        return self.table.gather(torch.tensor([row_id]))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_of_a_data_loader_read_beside_the_writer(path: Path) -> None:
    table = make(path)
    expected = on_disk(path)
    journal_before: bytes | None = None
    for epoch in range(2):
        loader = DataLoader(RowsOfIds(table), batch_size=10, num_workers=2, multiprocessing_context="fork")
        seen = []
        for rows in loader:
            seen.append(rows)
            fill(table, 49, float(epoch))  # while the workers are there
        expected[49] = epoch
        assert np.array_equal(torch.cat(seen).numpy()[:49], expected[:49])
        kept = journal_of(path).read_bytes()
        assert journal_before in (None, kept), "row 49 is kept once, by this process alone"
        journal_before = kept
    table.commit(step=1)
    table.close()
    assert (on_disk(path) == expected).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(path)


# Readers


def opened_to_read(path: Path) -> list[str]:
    """Row 1's first value and what is warned of, in another process."""

    def read() -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = make(path, mode="r")
        return json.dumps([str(table.weight[1, 0].item()), *(str(warning.message) for warning in caught)])

    found = in_a_fork(read)
    return list(json.loads(found)) if found.startswith("[") else [found]


def test_a_reader_beside_a_writer_is_told_so(path: Path) -> None:
    table = make(path)
    fill(table, 1, 1.0)
    table.commit()
    fill(table, 1, 2.0)
    warning = f"process {os.getpid()} is writing to {path}: rows are read as they are stored, which may be ahead of"
    assert opened_to_read(path) == ["2.0", f"{warning} its last commit"]
    # In the writer's own process it is known.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(path, mode="r").weight[1, 0].item() == 2.0
    table.commit()
    table.close()
    assert opened_to_read(path) == ["2.0"]


def test_after_a_writer_that_died_somebody_has_to_undo_before_anybody_reads(path: Path) -> None:
    table = make(path)
    fill(table, 1, 1.0)
    table.commit()
    fill(table, 1, 2.0)
    leave(table)
    before = {name: (path.parent / name).read_bytes() for name in names(path.parent)}
    error = (
        rf"a writer ended between two commits, and {journal_of(path)} says how to undo what it had not committed, "
        rf"which mode='r' may not\. Open it once with mode='r\+', or run: sense-engram verify --repair {path}"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=error):
            make(path, mode="r")
    assert {name: (path.parent / name).read_bytes() for name in names(path.parent)} == before
    with pytest.warns(UserWarning, match=undone(1, 1)):
        make(path).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(path, mode="r").weight[1, 0].item() == 1.0


def test_a_journal_that_holds_nothing_to_undo_is_no_hindrance(path: Path) -> None:
    table = make(path)
    fill(table, 1, 1.0)
    earlier = journal_of(path).read_bytes()
    table.commit()
    table.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for left in (b"", earlier):
            journal_of(path).write_bytes(left)
            assert make(path, mode="r").weight[1, 0].item() == 1.0
            assert journal_of(path).read_bytes() == left
        # One that was cut in its header may be damaged: only who can compare the checksums tells.
        for left in (b"", earlier, earlier[:30]):
            journal_of(path).write_bytes(left)
            make(path).close()
            assert make(path, mode="r").weight[1, 0].item() == 1.0


# The first release's tables

VERSION_1 = """{
  "format_version": 1,
  "byte_order": "little",
  "rows": 50,
  "width": 8,
  "dtype": "bfloat16",
  "init_seed": 7,
  "init_std": 0.02,
  "provenance": {
    "variant": "sense"
  },
  "generation": 3,
  "step": 120,
  "states": {
    "adam": {
      "file": "engram_table.adam.dat",
      "width": 2,
      "dtype": "float32",
      "step": 119
    }
  }
}
"""


@pytest.fixture
def first_release(path: Path) -> Path:
    """Files as version 0.1.0 left them."""
    values = np.arange(N * D, dtype="<f4").reshape(N, D) % 256
    path.write_bytes((values.view("<u4") >> 16).astype("<u2").tobytes())
    path.with_name("engram_table.adam.dat").write_bytes(np.arange(2 * N, dtype="<f4").tobytes())
    path.with_suffix(".json").write_text(VERSION_1)
    return path


def test_a_table_of_the_first_release_opens_and_becomes_version_2_with_its_next_commit(first_release: Path) -> None:
    path, before = first_release, first_release.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("r", "r+"):
            table = make(path, dtype="bfloat16", mode=mode, provenance={"variant": "sense"})
            assert table.weight.float().flatten().tolist() == [n % 256 for n in range(N * D)]
            assert (table.committed_step, table.committed_extra, table.is_new) == (120, {}, True)
            if mode == "r+":
                state = table.open_state("adam", 2)
                assert (state.step, state.values.flatten().tolist()) == (119, list(range(2 * N)))
            table.close()
    assert path.with_suffix(".json").read_text() == VERSION_1
    assert path.read_bytes() == before
    table = make(path, dtype="bfloat16")
    fill(table, 3, 0.5)
    table.commit(step=121, extra={"now": 2})
    found = manifest(path)
    assert len(found.pop("commit")) == 16
    assert found == json.loads(VERSION_1) | {
        "format_version": 3,
        "generation": 4,
        "step": 121,
        "states": {"adam": json.loads(VERSION_1)["states"]["adam"] | {"checksums": None}},
        "extra": {"now": 2},
        "updates": 1,
        "checksums": None,
    }


def test_what_was_not_committed_to_a_table_of_the_first_release_is_undone(first_release: Path) -> None:
    path, before = first_release, first_release.read_bytes()
    table = make(path, dtype="bfloat16")
    fill(table, 3, 0.5)
    table.write_state(table.open_state("adam", 2), torch.tensor([4]), torch.ones(1, 2))
    leave(table)
    with pytest.warns(UserWarning, match=undone(2, 3) + ", step 120"):
        make(path, dtype="bfloat16")
    assert path.read_bytes() == before
    assert path.with_name("engram_table.adam.dat").read_bytes() == np.arange(2 * N, dtype="<f4").tobytes()
    assert path.with_suffix(".json").read_text() == VERSION_1


def test_what_was_not_committed_to_a_file_without_a_manifest_is_undone(path: Path) -> None:
    before = np.arange(N * D, dtype="<f4").tobytes()
    path.write_bytes(before)
    with pytest.warns(UserWarning, match="has no manifest"):
        table = make(path)
    fill(table, 3, 0.5)
    leave(table)
    with pytest.warns(UserWarning, match="put back") as caught:
        table = make(path)
    assert ["put back" in str(warning.message) for warning in caught] == [False, True]
    assert path.read_bytes() == before
    fill(table, 3, 0.5)
    table.commit()
    assert (manifest(path)["generation"], manifest(path)["checksums"]) == (1, None)
