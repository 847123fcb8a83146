"""Copies of a table and the way back, the files read raw."""

import os
import shutil

import numpy as np
import pytest
import torch
from tables import DTYPES, N, make, manifest, names, slow_sums

from sense_v2.engram.optim import RowAdam, RowWiseAdagrad
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table_copy import copy_table, restore_table


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
