"""One table, several names: links, renamed folders, replaced files. One writer, and no commit elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from tables import D, in_a_fork, make, manifest, names, on_disk, slow_sums

from sense_v2.engram.delta.apply import open_table_as_it_is
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.upkeep.check import check_table

IDS, ONES = torch.arange(3), torch.ones(3, D)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table with a commit, in a folder of its own."""
    path = tmp_path / "model" / "engram_table.dat"
    table = make(path)
    table.open_state("adam", 2)
    table.commit(step=1)
    table.close()
    return path


def another(path: Path) -> Path:
    """Another model's table, of the same shape."""
    path.parent.mkdir(exist_ok=True)
    table = make(path, seed=5)
    table.commit(step=7)
    table.close()
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".lock"}


def take_the_place(path: Path, tmp_path: Path) -> dict[str, bytes]:
    """The table's folder is renamed, and another model's gets its name. Returns that one's files."""
    path.parent.rename(tmp_path / "moved")
    another(path)
    return files(path.parent)


# Links


def test_a_link_is_another_name_of_the_table_and_of_all_its_files(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.dat"
    link.symlink_to(path)
    table = make(link)
    assert table.path == path
    for other in (path, link):
        with pytest.raises(BlockingIOError, match="open for writing in this process already"):
            make(other)
        assert in_a_fork(lambda other=other: make(other)).startswith("BlockingIOError")
    table.write(IDS, ONES)
    table.commit(step=2)
    table.close()
    assert (manifest(path)["step"], manifest(path)["checksums"]) == (2, slow_sums(path))
    assert names(tmp_path) == ["link.dat", "model"]
    assert check_table(link).path == path
    assert open_table_as_it_is(link).committed_step == 2


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_what_a_writer_left_that_came_by_a_link_is_undone_by_the_path(path: Path, tmp_path: Path) -> None:
    link, before = tmp_path / "link.dat", path.read_bytes()
    link.symlink_to(path)

    def die() -> None:
        make(link).write(IDS, ONES)
        os._exit(0)

    assert in_a_fork(die) == ""
    assert path.read_bytes() != before
    make(path).close()
    assert path.read_bytes() == before


def test_a_link_whose_files_lie_beside_it_shares_the_lock_of_the_rows(path: Path, tmp_path: Path) -> None:
    """A table on another disk: rows there, all else here."""
    disk = tmp_path / "disk" / "rows.bin"
    disk.parent.mkdir()
    path.rename(disk)
    path.symlink_to(disk)
    table = make(path)
    with pytest.raises(BlockingIOError, match="open for writing in this process already"):
        make(disk)
    assert in_a_fork(lambda: make(disk)).startswith("BlockingIOError")
    table.write(IDS, ONES)
    table.commit()
    table.close()
    assert manifest(path)["checksums"] == slow_sums(disk)


def test_a_link_and_its_table_with_a_manifest_each_are_refused(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.dat"
    link.symlink_to(path)
    shutil.copy(path.with_suffix(".json"), tmp_path / "link.json")
    for mode in ("r", "r+"):
        with pytest.raises(ValueError, match=r"each has a manifest: link\.json and .*Remove that one"):
            make(link, mode=mode)


@pytest.mark.parametrize("name", ["engram_table.dat", "engram_table.adam.dat"])
def test_a_backup_by_hard_links_is_not_trained_on(path: Path, tmp_path: Path, name: str) -> None:
    backup = tmp_path / "backup.dat"
    backup.hardlink_to(path.with_name(name))
    before = backup.read_bytes()
    with pytest.raises(OSError, match=rf"{name} has another name as well .*open it with mode='r'"):
        make(path)
    assert backup.read_bytes() == before
    make(path, mode="r").close()
    backup.unlink()
    make(path).close()


# Under a writer


def test_a_commit_never_goes_to_a_table_that_took_the_name(path: Path, tmp_path: Path) -> None:
    table = make(path)
    table.write(IDS, ONES)
    others = take_the_place(path, tmp_path)
    for call in (lambda: table.commit(step=9), lambda: table.copy_to(tmp_path / "copy.dat"), table.flush):
        with pytest.raises(OSError, match=r"isn't the file that was opened there: .*Put it back there"):
            call()
    assert files(path.parent) == others
    assert manifest(tmp_path / "moved" / path.name)["step"] == 1
    path.parent.rename(tmp_path / "other")
    (tmp_path / "moved").rename(path.parent)
    table.commit(step=9)
    table.close()
    assert (manifest(path)["step"], manifest(path)["checksums"]) == (9, slow_sums(path))


def test_no_journal_goes_there_and_none_is_removed_there(path: Path, tmp_path: Path) -> None:
    first = make(path)
    others = take_the_place(path, tmp_path)
    with pytest.raises(OSError, match=r"isn't the file that was opened there"):
        first.write(IDS, ONES)
    with pytest.raises(OSError, match=r"isn't the file that was opened there"):
        first.open_state("sum", 1)
    assert files(path.parent) == others
    (tmp_path / "third").mkdir()
    third = make(another(tmp_path / "third" / path.name))
    third.write(IDS, ONES)
    third.commit()
    (tmp_path / "third").rename(tmp_path / "third moved")
    theirs = another(tmp_path / "third" / path.name).with_suffix(".journal")
    theirs.write_bytes(b"another writer's")
    third.close()
    assert theirs.read_bytes() == b"another writer's"
    first.close()


def test_a_table_that_is_replaced_under_its_writer(path: Path, tmp_path: Path) -> None:
    table = make(path)
    table.write(IDS, ONES)
    os.replace(another(tmp_path / "new.dat"), path)
    with pytest.raises(OSError, match=r"engram_table\.dat isn't the file that was opened there"):
        table.commit(step=9)
    assert manifest(path)["step"] == 1
    with pytest.warns(UserWarning, match="closed with 1 updates"):
        table.close()


def test_a_second_writer_is_refused_where_the_lock_file_was_removed(path: Path) -> None:
    table = make(path)
    path.with_suffix(".lock").unlink()
    assert in_a_fork(lambda: make(path)).startswith("BlockingIOError")
    with pytest.raises(BlockingIOError):
        make(path)
    assert in_a_fork(lambda: check_table(path).writer) == "unknown"
    table.close()
    make(path).close()


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_a_removed_journal_is_begun_anew_with_the_next_commit(path: Path) -> None:
    def die() -> None:
        table = make(path)
        table.write(IDS, ONES)
        path.with_suffix(".journal").unlink()
        table.commit()
        table.write(IDS, 2 * ONES)
        os._exit(0)

    assert in_a_fork(die) == ""
    assert on_disk(path)[0].tolist() == [2.0] * D
    make(path).close()
    assert on_disk(path)[0].tolist() == [1.0] * D


def test_an_overlay_whose_folder_was_renamed_is_not_written_elsewhere(path: Path, tmp_path: Path) -> None:
    (tmp_path / "facts").mkdir()
    overlay = OverlayStorage(make(path, mode="r"), tmp_path / "facts" / "one.safetensors")
    overlay.write(IDS, ONES)
    (tmp_path / "facts").rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"isn't the file that was opened there"):
        overlay.commit()
    assert names(tmp_path) == ["model", "moved"]
    (tmp_path / "moved").rename(tmp_path / "facts")
    overlay.commit()
    overlay.close()
    assert len(OverlayStorage(make(path, mode="r"), tmp_path / "facts" / "one.safetensors").changed_ids) == 3
