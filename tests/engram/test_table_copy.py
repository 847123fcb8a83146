"""Copies of a table and the way back, the files read raw."""

import errno
import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from disk_calls import watched
from tables import DTYPES, D, N, in_a_fork, make, manifest, names, slow_sums

from sense_v2.engram import table_copy
from sense_v2.engram.optim import RowAdam, RowWiseAdagrad
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table_copy import copy_table, restore_table
from sense_v2.engram.upkeep.check import check_table


def train(table, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table.train()
    for _ in range(steps):
        table(torch.randint(N, (9,), generator=generator)).float().sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(folder, stem="engram_table"):
    """Bytes of the table and its states, and what the manifest says of the moment."""
    files = {name: (folder / name).read_bytes() for name in names(folder) if name.endswith(".dat")}
    said = manifest(folder / f"{stem}.dat")
    moment = {name: said[name] for name in ("step", "extra", "updates", "checksums")}
    return files, moment, {name: (state["step"], state["checksums"]) for name, state in said["states"].items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [RowWiseAdagrad, RowAdam])
def test_back_to_a_copy_and_on_is_as_if_nothing_had_been(tmp_path, dtype, kind):
    live, copy = tmp_path / "live", tmp_path / "copy"
    table = make(live / "engram_table.dat", dtype=dtype)
    optimizer = kind(table, lr=0.1)
    train(table, optimizer, 3, seed=1)
    table.commit(step=3, extra={"epoch": 0.5})
    copy_table(table, copy / "engram_table.dat")
    at_3 = contents(live)
    assert contents(copy) == at_3
    train(table, optimizer, 4, seed=2)
    table.commit(step=7)
    at_7 = contents(live)
    assert contents(copy) == at_3, "rows that changed later leaked into the copy"
    train(table, optimizer, 2, seed=3)  # and some that nobody commits
    restore_table(table, copy / "engram_table.dat")
    assert contents(live) == at_3
    assert manifest(live / "engram_table.dat")["checksums"] == slow_sums(live / "engram_table.dat")
    train(table, optimizer, 4, seed=2)
    table.commit(step=7)
    assert contents(live) == at_7


def test_a_restore_that_is_not_finished_is_undone(tmp_path, monkeypatch):
    live, copy = tmp_path / "live", tmp_path / "copy"
    table = make(live / "engram_table.dat")
    optimizer = RowWiseAdagrad(table, lr=0.1)
    copy_table(table, copy / "engram_table.dat")
    train(table, optimizer, 4)
    table.commit(step=4)
    at_4 = contents(live)

    def fail(*_args, **_values):
        raise OSError("cut off")

    monkeypatch.setattr(table, "commit", fail)
    with pytest.raises(OSError, match="cut off"):
        restore_table(table, copy / "engram_table.dat")
    assert contents(live)[0] != at_4[0]
    with pytest.warns(UserWarning, match="closed with"):
        table.close()
    with pytest.warns(UserWarning, match="put back"):
        make(live / "engram_table.dat").close()
    assert contents(live) == at_4


def test_what_the_copy_lacks_becomes_zeros(tmp_path):
    table = make(tmp_path / "live" / "engram_table.dat")
    copy_table(table, tmp_path / "copy" / "engram_table.dat")
    train(table, RowWiseAdagrad(table, lr=0.1), 3)
    table.commit(step=3)
    copy_table(table, tmp_path / "rows" / "engram_table.dat", states=False)
    assert names(tmp_path / "rows") == ["engram_table.dat", "engram_table.json"]
    restore_table(table, tmp_path / "copy" / "engram_table.dat")
    state = np.fromfile(tmp_path / "live" / "engram_table.adagrad.dat", dtype="<f4")
    assert not state.any()
    assert table.open_state("adagrad", 1).step == 0


def test_a_table_that_is_where_the_copy_was_taken_is_left_alone(tmp_path):
    table = make(tmp_path / "live" / "engram_table.dat")
    train(table, RowWiseAdagrad(table), 2)
    table.commit(step=2)
    copy_table(table, tmp_path / "copy" / "engram_table.dat")
    generation = table.manifest.generation
    restore_table(table, tmp_path / "copy" / "engram_table.dat")
    assert table.manifest.generation == generation


def test_uncommitted_rows_are_not_copied(tmp_path):
    table = make(tmp_path / "engram_table.dat")
    train(table, RowWiseAdagrad(table), 1)
    with pytest.raises(ValueError, match=r"commit\(\) before"):
        copy_table(table, tmp_path / "copy" / "engram_table.dat")
    assert not (tmp_path / "copy").exists()


def test_a_copy_takes_the_place_of_an_older_one(tmp_path):
    table = make(tmp_path / "live" / "engram_table.dat")
    copy_table(table, tmp_path / "copy" / "other.dat")
    train(table, RowWiseAdagrad(table), 1)
    table.commit()
    copy_table(table, tmp_path / "copy" / "other.dat")
    assert names(tmp_path / "copy") == ["other.adagrad.dat", "other.dat", "other.json"]
    make(tmp_path / "copy" / "other.dat", mode="r").close()
    restore_table(table, tmp_path / "copy" / "other.dat")


@pytest.mark.parametrize("what", ["table", "state", "cut", "unfinished", "seed"])
def test_a_copy_that_does_not_fit_is_refused_before_anything_changes(tmp_path, what):
    live, copy = tmp_path / "live", tmp_path / "copy"
    table = make(live / "engram_table.dat")
    optimizer = RowWiseAdagrad(table, lr=0.1)
    train(table, optimizer, 2)
    table.commit(step=2)
    copy_table(table, copy / "engram_table.dat")
    train(table, optimizer, 2)
    table.commit(step=4)
    before = contents(live)
    error, message = ValueError, "damaged"
    if what in ("table", "state"):
        path = copy / ("engram_table.dat" if what == "table" else "engram_table.adagrad.dat")
        raw = bytearray(path.read_bytes())
        raw[17] ^= 4
        path.write_bytes(raw)
    elif what == "cut":
        os.truncate(copy / "engram_table.dat", 100)
    elif what == "unfinished":
        (copy / "engram_table.json").unlink()
        error, message = FileNotFoundError, "not made to its end"
    else:
        shutil.rmtree(copy)
        make(copy / "engram_table.dat", seed=5).close()
        message = "init_seed is 5, here 0"
    with pytest.raises(error, match=message):
        restore_table(table, copy / "engram_table.dat")
    assert contents(live) == before
    assert table.updates == table.manifest.updates


# --- copying a file ---


@pytest.mark.parametrize(
    "parts", [[], [b"x" * 5000], [None, b"end"], [b"start", None], [b"a" * 70_000, None, b"b" * 9, None, None]]
)
def test_data_is_copied_and_holes_stay_holes(tmp_path, parts):
    source, path = tmp_path / "source", tmp_path / "copy"
    hole = 1 << 20
    with open(source, "wb") as file:
        for part in parts:
            if part is None:
                file.seek(hole, os.SEEK_CUR)
            else:
                file.write(part)
        file.truncate()
    path.write_bytes(b"old")
    disk.copy_file(source, path)
    assert path.read_bytes() == source.read_bytes()
    assert path.stat().st_blocks <= source.stat().st_blocks + 16
    assert names(tmp_path) == ["copy", "source"]


def test_blocks_are_shared_where_the_file_system_can(tmp_path, monkeypatch):
    source, path = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"data" * 100)
    asked = []

    def clone(fd, request, source_fd):
        asked.append(request)
        os.write(fd, b"shared")

    monkeypatch.setattr(platform.fcntl, "ioctl", clone)
    disk.copy_file(source, path)
    assert asked == [0x40049409]  # FICLONE of linux/fs.h
    assert path.read_bytes() == b"shared"


def test_a_file_system_that_does_not_tell_holes_is_read_whole(tmp_path, monkeypatch):
    source, path = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(bytes(5000) + b"end")

    def unknown(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(disk.os, "lseek", unknown)
    disk.copy_file(source, path)
    assert path.read_bytes() == source.read_bytes()


# Beside a writer


def trained(path):
    """A writer with a commit and rows and states stored since, and a reader."""
    table = make(path)
    state = table.open_state("sum", 1)
    table.write(torch.arange(9), torch.ones(9, D))
    table.write_state(state, torch.arange(9), torch.ones(9, 1))
    table.commit(step=1)
    committed = {file: path.with_name(file).read_bytes() for file in ("engram_table.dat", "engram_table.sum.dat")}
    store(table, state)
    return table, state, make(path, mode="r"), committed


def store(table, state, value=2.0):
    table.write(torch.arange(3, 20), torch.full((17, D), value))
    table.write_state(state, torch.arange(3, 20), torch.full((17, 1), value))


@pytest.mark.parametrize("states", [True, False])
def test_a_copy_beside_a_writer_is_of_its_last_commit(tmp_path, states):
    (tmp_path / "copy").mkdir()
    table, _, reader, committed = trained(tmp_path / "engram_table.dat")
    copy = tmp_path / "copy" / "rows.dat"
    reader.copy_to(copy, states=states)
    assert copy.read_bytes() == committed["engram_table.dat"]
    assert names(copy.parent) == ["rows.dat", "rows.json", *["rows.sum.dat"] * states]
    assert (manifest(copy)["step"], manifest(copy)["checksums"]) == (1, slow_sums(copy))
    if states:
        assert (tmp_path / "copy" / "rows.sum.dat").read_bytes() == committed["engram_table.sum.dat"]
    assert check_table(copy).findings == []
    table.commit(step=2)
    reader.copy_to(copy)
    assert (manifest(copy)["step"], copy.read_bytes()) == (2, (tmp_path / "engram_table.dat").read_bytes())
    table.close()


@pytest.mark.parametrize("num_commits", [0, 1, 9])
def test_a_writer_that_goes_on_while_a_copy_is_made(tmp_path, monkeypatch, num_commits):
    """It stores before each file is copied, and commits some of these times."""
    table, state, reader, committed = trained(tmp_path / "engram_table.dat")
    left = [num_commits]
    real = table_copy.copy_file

    def copy_file(*arguments, **options):
        store(table, state, 5.0 + left[0])
        if left[0]:
            left[0] -= 1
            table.commit(step=10 + left[0])
            committed.update({file: (tmp_path / file).read_bytes() for file in committed})
            store(table, state, 100.0)
        real(*arguments, **options)

    monkeypatch.setattr(table_copy, "copy_file", copy_file)
    copy = tmp_path / "copy.dat"
    if num_commits == 9:
        with pytest.raises(BlockingIOError, match="was committed to 3 times while it was copied"):
            reader.copy_to(copy)
        assert not copy.with_suffix(".json").exists()
    else:
        reader.copy_to(copy)
        assert copy.read_bytes() == committed["engram_table.dat"]
        assert copy.with_name("copy.sum.dat").read_bytes() == committed["engram_table.sum.dat"]
        assert check_table(copy).findings == []
    table.commit()
    table.close()


def test_a_copy_of_what_a_writer_left_that_died_is_of_its_commit(tmp_path):
    path = tmp_path / "engram_table.dat"
    make(path).close()
    reader, before = make(path, mode="r"), path.read_bytes()

    def die():
        make(path).write(torch.arange(9), torch.ones(9, D))
        os._exit(0)

    assert in_a_fork(die) == ""
    assert path.read_bytes() != before
    reader.copy_to(tmp_path / "copy.dat")
    assert (tmp_path / "copy.dat").read_bytes() == before
    assert path.with_suffix(".journal").stat().st_size


def test_rows_that_were_stored_around_the_journal_are_no_copy(tmp_path):
    table, _, reader, _ = trained(tmp_path / "engram_table.dat")
    table.weight[40] = 7
    with pytest.raises(ValueError, match="doesn't have the checksums of its manifest"):
        reader.copy_to(tmp_path / "copy.dat")
    table.commit()
    table.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("is_lasting", [False, True])
def test_each_call_of_a_copy_fails_in_turn(tmp_path, code, is_lasting):
    """Of a copy beside a writer, over another one: what is there then is a copy of the commit, or says that it is
    none; and the next attempt makes it."""
    table, _, reader, committed = trained(tmp_path / "engram_table.dat")
    copy, num_calls = tmp_path / "copy.dat", None
    for failing in itertools.count():
        numbers = itertools.count()

        def around(name, call, *arguments, numbers=numbers, failing=failing):
            number = next(numbers)
            if number == failing or (is_lasting and number > failing):
                raise OSError(code, os.strerror(code))
            return call(*arguments)

        try:
            with watched(around):
                reader.copy_to(copy)
            failed = None
        except OSError as error:
            failed = error.errno
        num_calls = next(numbers)
        if copy.with_suffix(".json").exists():
            restored = make(tmp_path / "restored.dat")
            restored.restore_from(copy)
            restored.close()
            assert copy.read_bytes() == committed["engram_table.dat"]
        else:
            assert failed == code
        if failing >= num_calls:
            break
    assert num_calls > 20
    assert (failed, copy.with_name("copy.sum.dat").read_bytes()) == (None, committed["engram_table.sum.dat"])
    assert check_table(copy).findings == []
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    table.commit()
    table.close()
