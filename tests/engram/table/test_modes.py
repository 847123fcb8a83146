"""Files made for a table let nobody read or write more than the table itself does."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from tables import D, make, names

from sense_v2.engram.delta.apply import apply_delta, export_delta, merge_deltas, strip_delta
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.upkeep.check import repair_table
from sense_v2.engram.upkeep.convert import convert_table

IDS = torch.arange(3)


def modes(folder: Path) -> dict[str, int]:
    return {name: stat.S_IMODE((folder / name).stat().st_mode) for name in names(folder)}


@pytest.fixture(params=[0o600, 0o660, 0o640], ids=oct)
def mode(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def path(tmp_path: Path, mode: int) -> Path:
    """A table whose owner has changed its mode."""
    path = tmp_path / "table.dat"
    make(path).close()
    path.chmod(mode)
    return path


def train(path: Path, value: float) -> None:
    table = make(path)
    state = table.open_state("sum", 1)
    table.write(IDS, torch.full((3, D), value))
    table.write_state(state, IDS, torch.ones(3, 1))
    assert (path.with_suffix(".journal").stat().st_mode & 0o777) == (path.stat().st_mode & 0o777)
    table.commit()
    table.close()


def test_journal_lock_manifest_states_copies_and_undos(path: Path, mode: int, tmp_path: Path) -> None:
    train(path, 1.0)
    table = make(path, mode="r")
    table.copy_to(tmp_path / "copy.dat")
    train(path, 2.0)
    table.copy_to(tmp_path / "earlier.dat", states=False)
    table.close()
    for name in ("facts", "others"):
        export_delta(path, tmp_path / "copy.dat", tmp_path / f"{name}.safetensors")
    strip_delta(tmp_path / "facts.safetensors", tmp_path / "stripped.safetensors")
    merge_deltas([tmp_path / f"{name}.safetensors" for name in ("facts", "others")], tmp_path / "merged.safetensors")
    apply_delta(tmp_path / "facts.safetensors", tmp_path / "copy.dat")
    convert_table(path, tmp_path / "small.dat", "int8")
    convert_table(path, tmp_path / "half.dat", "float16")
    repair_table(path)
    overlay = OverlayStorage(make(path, mode="r"), tmp_path / "overlay.safetensors")
    overlay.write(IDS, torch.ones(3, D))
    overlay.commit()
    overlay.close()
    found = modes(tmp_path)
    assert {
        "table.lock",
        "table.json",
        "table.sum.dat",
        "copy.json",
        "copy.sum.dat",
        "small.dat",
        "earlier.json",
    } <= found.keys()
    assert any(".undo-" in name for name in found)
    no_rows = {"overlay.safetensors.lock", "small.lock", "half.lock"}
    assert {name: bits for name, bits in found.items() if bits != mode and name not in no_rows} == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to a group that isn't its own")
def test_the_group_is_the_tables_and_gets_nothing_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.dat"
    make(path).close()
    path.chmod(0o660)
    os.chown(path, -1, 12345)
    train(path, 1.0)
    manifest = path.with_suffix(".json")
    assert (manifest.stat().st_gid, stat.S_IMODE(manifest.stat().st_mode)) == (12345, 0o660)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    table = make(path)
    table.commit()
    table.close()
    assert (manifest.stat().st_gid, stat.S_IMODE(manifest.stat().st_mode)) == (os.getegid(), 0o600)
