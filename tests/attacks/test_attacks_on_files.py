"""Links, pipes, folders and cut files in place of a table's own: nothing outside is touched, and nothing hangs."""

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forge import Old, forged_journal
from targets import (
    JOURNAL,
    LOCK,
    MANIFEST,
    STATE,
    STATE_WIDTH,
    TABLE,
    D,
    N,
    content,
    make_table,
    manifest_of,
    no_hang,
    open_all,
    open_table,
)

from sense_v2.cli import main
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.engram.upkeep.check import check_table, repair_table

# The files that belong to a table alone, and when each is opened for writing.
OWN = {
    JOURNAL: "a journal",
    LOCK: "a lock",
    f"{MANIFEST}.tmp": "a commit's temporary",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_table(tmp_path / "table")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file of somebody else's, as long as a state is: no check of lengths would save it."""
    path = tmp_path / "outside" / "diary.dat"
    path.parent.mkdir()
    path.write_bytes(bytes(range(N * STATE_WIDTH)) * 4)
    return path


def use(path: Path, mode: str) -> None:
    """Opens the table, and where that may be stores to everything and commits."""
    table = open_table(path, mode)
    try:
        if mode == "r+":
            state = table.open_state("adam", STATE_WIDTH)
            table.write(torch.arange(9), torch.ones(9, D))
            table.write_state(state, torch.arange(9), torch.ones(9, STATE_WIDTH))
            table.commit()
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is closed without a commit, where one was refused
            table.close()


def crash(path: Path) -> None:
    """Leaves rows and states that weren't committed, and the journal that undoes them."""
    alive = path.parent.with_name("alive")
    shutil.copytree(path.parent, alive)
    table = open_table(alive / TABLE)
    state = table.open_state("adam", STATE_WIDTH)
    table.write(torch.arange(9), torch.full((9, D), 7.0))
    table.write_state(state, torch.arange(9), torch.full((9, STATE_WIDTH), 7.0))
    for name in (TABLE, STATE, JOURNAL):
        shutil.copy(alive / name, path.with_name(name))
    table.commit()
    table.close()
    shutil.rmtree(alive)


# Links


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_in_place_of_a_file_of_the_tables_own(path: Path, outside: Path, name: str, is_there: bool) -> None:
    if not is_there:
        outside.unlink()
    link = path.with_name(name)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    before = content(path.parent.parent)
    with pytest.raises(OSError, match=rf"{re.escape(str(link))} is a link; a file of this name belongs to the table"):
        use(path, "r+")
    assert link.is_symlink()
    assert outside.exists() == is_there
    outside_now = {name: raw for name, raw in content(path.parent.parent).items() if name.startswith("outside")}
    assert outside_now == {name: raw for name, raw in before.items() if name.startswith("outside")}


@pytest.mark.parametrize("name", [JOURNAL, LOCK])
def test_a_reader_does_not_follow_them_either(path: Path, outside: Path, name: str) -> None:
    link = path.with_name(name)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    with pytest.raises(OSError, match="is a link; a file of this name belongs to the table alone"):
        use(path, "r")
    (finding,) = (finding for finding in check_table(path).findings if finding.is_wrong)
    assert (finding.file, finding.text[:9]) == (name, "is a link")


@pytest.mark.parametrize("name", [f"{MANIFEST}.tmp", f"{TABLE}.tmp"])
def test_a_link_where_a_new_table_is_made(tmp_path: Path, outside: Path, name: str) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(
        OSError, match=rf"{re.escape(name)} is a link; a file of this name belongs to the table alone"
    ):
        MMapEmbeddingStorage(N, D, tmp_path / "new" / TABLE)
    assert outside.read_bytes() == before
    assert not (tmp_path / "new" / TABLE).exists()


def test_a_link_where_a_new_state_is_made(path: Path, outside: Path) -> None:
    before = outside.read_bytes()
    table = open_table(path)
    for name in ("engram_table.sum.dat", "engram_table.sum.dat.tmp"):
        path.with_name(name).symlink_to(outside)
        with pytest.raises((OSError, ValueError), match=rf"{re.escape(name)} is a link"):
            table.open_state("sum", 1)
        path.with_name(name).unlink()
    table.close()
    assert outside.read_bytes() == before


@pytest.mark.parametrize("is_crashed", [False, True])
def test_a_link_in_place_of_a_state(path: Path, outside: Path, is_crashed: bool) -> None:
    """With a live journal, undoing alone would write to it."""
    if is_crashed:
        crash(path)
    path.with_name(STATE).unlink()
    path.with_name(STATE).symlink_to(outside)
    before = content(path.parent.parent)
    with pytest.raises(ValueError, match=r"optimizer state .*engram_table\.adam\.dat is a link; put the file itself"):
        use(path, "r+")
    repair_table(path)
    assert content(path.parent.parent) == before
    assert "is a link; put the file itself there" in [finding.text for finding in check_table(path).findings]


def test_a_link_to_the_table_or_the_manifest_is_somebodys_disk(path: Path, tmp_path: Path) -> None:
    """Those may be links: a table on another disk, a hub's cache. A commit writes into the one and replaces the
    other, whose target stays."""
    for name, blob in ((TABLE, "3f1c"), (MANIFEST, "77ab")):
        path.with_name(name).rename(tmp_path / blob)
        path.with_name(name).symlink_to(tmp_path / blob)
    before = (tmp_path / "77ab").read_bytes()
    use(path, "r")
    use(path, "r+")
    assert (tmp_path / "77ab").read_bytes() == before
    assert path.is_symlink()
    assert not path.with_name(MANIFEST).is_symlink()
    assert check_table(path).findings == []


@pytest.mark.parametrize("name", OWN)
def test_a_second_name_of_somebody_elses_file(path: Path, outside: Path, name: str) -> None:
    """A hard link can't be told from the file itself, but it can be counted."""
    path.with_name(name).unlink(missing_ok=True)
    path.with_name(name).hardlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(OSError, match=rf"{re.escape(name)} is a file that has another name as well \(a hard link\)"):
        use(path, "r+")
    assert outside.read_bytes() == before


def test_a_lock_that_is_the_table_under_a_second_name(path: Path) -> None:
    path.with_name(LOCK).unlink()
    path.with_name(LOCK).hardlink_to(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"engram_table\.lock is a file that has another name as well"):
        use(path, "r+")
    assert path.read_bytes() == before


@pytest.mark.parametrize("is_crashed", [False, True])
def test_a_state_that_is_the_table_under_a_second_name(path: Path, is_crashed: bool) -> None:
    if is_crashed:
        crash(path)
    path.with_name(STATE).unlink()
    path.with_name(STATE).hardlink_to(path)
    before = content(path.parent)
    with pytest.raises(ValueError, match=r"optimizer state .*adam\.dat and .*engram_table\.dat are one file"):
        use(path, "r+")
    assert content(path.parent) == before
    assert "is one file with engram_table.dat: what is stored to one changes the other" in [
        finding.text for finding in check_table(path).findings
    ]


# What is no file at all


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.mkdir()


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's name may have a hundred letters
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


NO_FILES: dict[str, Callable[[Path], None]] = {"pipe": as_pipe, "folder": as_folder, "socket": as_socket}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", [TABLE, STATE, MANIFEST, JOURNAL, LOCK, f"{MANIFEST}.tmp"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_what_is_no_file_is_named_and_not_waited_for(path: Path, kind: str, name: str, mode: str) -> None:
    place = path.with_name(name)
    place.unlink(missing_ok=True)
    NO_FILES[kind](place)
    status = place.lstat()
    with no_hang():
        if mode == "r" and name in (STATE, f"{MANIFEST}.tmp"):
            use(path, mode)  # of no concern to a reader
        else:
            with pytest.raises((OSError, ValueError), match=re.escape(str(place))):
                use(path, mode)
        check = check_table(path)
        # Without a temporary no commit: what was stored is to be undone.
        wrong = name if ".tmp" not in name else JOURNAL if mode == "r+" else None
        assert [finding.file for finding in check.findings if finding.is_wrong] == ([wrong] if wrong else [])
        if name == MANIFEST:
            assert main.main(["verify", str(path)]) == 1
    assert (place.lstat().st_ino, place.lstat().st_mode) == (status.st_ino, status.st_mode)


@pytest.mark.parametrize("kind", NO_FILES)
def test_no_file_in_place_of_a_state_beside_a_journal(path: Path, kind: str) -> None:
    """It is seen before the first row is put back, also where the journal speaks of the table alone."""
    with_no_file = path.with_name(STATE)
    with_no_file.unlink()
    NO_FILES[kind](with_no_file)
    values = manifest_of(path)
    old = Old(TABLE, [0], [bytes(D * 4)])
    path.with_name(JOURNAL).write_bytes(
        forged_journal(values["generation"], int(values["commit"], 16), N, old) + b"torn"
    )
    before = content(path.parent)
    with no_hang(), pytest.raises(ValueError, match=rf"optimizer state .*{STATE} isn't a regular file"):
        open_table(path)
    assert content(path.parent) == before


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_where_a_table_is_made(tmp_path: Path, kind: str) -> None:
    for name in (MANIFEST, f"{MANIFEST}.tmp", f"{TABLE}.tmp"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        NO_FILES[kind](folder / name)
        with no_hang(), pytest.raises((OSError, ValueError), match=re.escape(name)):
            MMapEmbeddingStorage(N, D, folder / TABLE)


def test_a_pipe_where_a_reader_waits_for_the_manifest(path: Path) -> None:
    path.with_name(MANIFEST).unlink()
    os.mkfifo(path.with_name(f"{MANIFEST}.tmp"))
    with no_hang(), pytest.raises(OSError, match=r"json\.tmp isn't a regular file"):
        use(path, "r")


# Lengths


@pytest.mark.parametrize("size", [0, 1, N * D * 4 - 1, N * D * 4 - D * 4, N * D * 4 + 1, 2 * N * D * 4])
def test_rows_that_were_cut_or_added(path: Path, size: int) -> None:
    os.truncate(path, size)
    before = content(path.parent)
    for mode in ("r", "r+"):
        with pytest.raises(
            ValueError, match=rf"{TABLE}: expected {N * D * 4} bytes .*, found {size}: the file was cut"
        ):
            use(path, mode)
    assert content(path.parent) == before
    assert [finding.file for finding in check_table(path).findings] == [TABLE]


@pytest.mark.parametrize("name", [TABLE, STATE])
def test_a_journal_does_not_write_into_a_file_that_was_cut(path: Path, name: str) -> None:
    """Beyond its end a mapping kills the process (SIGBUS)."""
    crash(path)
    os.truncate(path.with_name(name), 16)
    before = content(path.parent)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected 960 bytes.*, found 16"):
        open_all(path)
    assert content(path.parent) == before


def test_a_state_as_long_as_a_file_can_be(path: Path) -> None:
    """The state's length is what the manifest says, and no mapping is made of another."""
    with open(path.with_name(STATE), "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"adam\.dat: expected 960 bytes .*, found 1099511627776"):
        open_all(path)


def test_rows_in_another_byte_order_are_found_by_their_checksums(path: Path) -> None:
    np.fromfile(path, "<f4").astype(">f4").tofile(path)
    kinds = {finding.kind for finding in check_table(path).findings if finding.is_wrong}
    assert "checksum" in kinds


# What a file says to a terminal


@pytest.mark.parametrize("text", [b"\x1b[2J\x1b]0;owned\x07", b"12; rm -rf /", b"\xff\xfe", b"", b"9" * 31 + b"x"])
def test_a_lock_speaks_to_nobody(path: Path, text: bytes) -> None:
    table = open_table(path)
    # By another process: the holder would lose its lock with the file's closing.
    code = f"open({str(path.with_name(LOCK))!r}, 'wb').write({text!r})\n"
    code += f"import sys; from sense_v2.cli.main import main; sys.exit(main(['verify', {str(path)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    table.close()
    assert done.stderr == ""
    assert f"note      {LOCK}: process unknown is writing" in done.stdout
    assert done.stdout.replace("\n", "").isprintable()


# The shadow map


class Trap:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_in_a_shadow_map_is_not_run(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "trapped")
    array = np.empty(1, dtype=object)
    array[0] = trap
    np.save(tmp_path / "object.npy", array, allow_pickle=True)
    np.savez(tmp_path / "archive", map=array)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(trap))
    for name, error in [
        ("object.npy", "is not a whole .npy file .*objects"),
        ("archive.npy", "is an archive of arrays, not one .npy file"),
        ("pickle.npy", "is not a whole .npy file .*pickled"),
    ]:
        with pytest.raises(ValueError, match=rf"{name} {error}"):
            EngramTokenizer(tmp_path / name)
    assert not (tmp_path / "trapped").exists()
    np.load(tmp_path / "object.npy", allow_pickle=True)
    assert (tmp_path / "trapped").exists(), "the trap works"


@pytest.mark.parametrize(
    "header",
    [
        f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**70},)}}",
        f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**60},)}}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (%s)}" % ("(" * 500 + ")" * 500),
        "{'descr': " + "('<i8', " * 300 + ")" * 300,
        "__import__('os').mkdir('trapped')",
        "",
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, on its way to the error
def test_a_shadow_map_with_a_forged_header(tmp_path: Path, header: str) -> None:
    text = header.ljust(4096).encode() + b"\n"
    (tmp_path / "map.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))
    with pytest.raises(ValueError, match=r"map\.npy is not a whole \.npy file"):
        EngramTokenizer(tmp_path / "map.npy")


def test_a_pipe_in_place_of_a_shadow_map(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "map.npy")
    with no_hang(), pytest.raises(ValueError, match=r"map\.npy is a device or a pipe"):
        EngramTokenizer(tmp_path / "map.npy")


def test_the_table_that_is_attacked_here_is_a_clean_one(path: Path) -> None:
    use(path, "r+")
    use(path, "r")
    assert manifest_of(path)["generation"] == 3
    assert check_table(path).findings == []
