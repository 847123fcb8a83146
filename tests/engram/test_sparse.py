"""Tables that take disk space where they are written to, and disks that are full in the middle of training."""

import errno
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tables import D, N, make, manifest, names, run_python, slow_sums

from sense_v2.engram.optim import RowAdam
from sense_v2.engram.storage import MMapEmbeddingStorage

PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engram_table.dat"


def taken_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def let_go(table: MMapEmbeddingStorage) -> None:
    """As a process that dies does."""
    table._let_go()


class Disk:
    """A disk with this much room, less what the journal takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.journal = path.with_suffix(".journal")
        self.room = 0
        usage = shutil.disk_usage(path.parent)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: usage._replace(free=max(0, self.room - self.journal_bytes()))
        )

    def journal_bytes(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0


def test_a_sparse_table_is_zeros_and_takes_hardly_any_room(path: Path) -> None:
    num_rows, width = 2**22, 64  # 1 GiB
    table = MMapEmbeddingStorage(num_rows, width, path, sparse=True)
    assert path.stat().st_size == 2**30
    assert taken_bytes(path) < 2**20
    found = manifest(path)
    assert (found["init_std"], set(found["checksums"]), len(found["checksums"])) == (0.0, {"0" * 16}, 1024)
    assert not table.weight[[0, 12_345, num_rows - 1]].any()
    optimizer = RowAdam(table, lr=0.5)
    state_path = path.with_name("engram_table.adam.dat")
    assert (state_path.stat().st_size, taken_bytes(state_path) < 2**20) == (2**31, True)
    table.train()(torch.tensor([0, 12_345, num_rows - 1])).sum().backward()
    optimizer.step()
    table.commit(step=1)
    # A few pages; how many is the file system's matter.
    assert taken_bytes(path) + taken_bytes(state_path) < 2**22
    assert table.weight[[0, 12_345, num_rows - 1], 0].tolist() == pytest.approx([-0.5] * 3)
    assert not table.weight[[1, 12_344, num_rows - 2]].any()
    sums = [int(text, 16) for text in manifest(path)["checksums"]]
    assert [block for block, value in enumerate(sums) if value] == [0, 12_345 // 4096, 1023]
    table.close()
    assert MMapEmbeddingStorage(num_rows, width, path, mode="r").weight[12_345, 0].item() == pytest.approx(-0.5)


def test_its_commits_are_those_of_any_table(path: Path) -> None:
    table = make(path, sparse=True)
    table.write(torch.tensor([3]), torch.ones(1, D))
    table.commit()
    assert manifest(path)["checksums"] == slow_sums(path)
    table.write(torch.tensor([4]), torch.ones(1, D))
    let_go(table)
    with pytest.warns(UserWarning, match="1 row was put back"):
        table = make(path, sparse=True)
    assert table.weight.any(dim=1).nonzero().flatten().tolist() == [3]


def needed_bytes(num_ids: int, row_bytes: int) -> int:
    """Every row in a hole of its own, on as many pages as it can touch."""
    return num_ids * (-(-row_bytes // PAGE) + 1) * PAGE


def test_no_room_is_an_error_before_anything_is_stored(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path, sparse=True)
    table.write(torch.tensor([1]), torch.ones(1, D))
    table.commit(step=1)
    before = path.read_bytes()
    disk = Disk(monkeypatch, path)
    ids, rows = torch.arange(10), torch.ones(10, D)
    disk.room = needed_bytes(10, 4 * D) - 1
    error = rf"engram_table\.dat is sparse: 10 rows may need {needed_bytes(10, 4 * D)} bytes of disk, .* Make room"
    for call in (lambda: table.write(ids, rows), lambda: table.protect(ids)):
        with pytest.raises(OSError, match=error) as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before
    # The journal's own bytes count: they are written before the rows are stored.
    disk.room = needed_bytes(10, 4 * D) + disk.journal_bytes() - 1
    with pytest.raises(OSError, match=error):
        table.write(ids, rows)
    disk.room += 1
    table.write(ids, rows)
    table.commit(step=2)
    disk.room = 0
    with pytest.raises(OSError, match="is sparse"):
        table.write(ids, rows)
    table.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(path, mode="r").committed_step == 2


def test_the_journal_is_counted_before_the_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path, sparse=True)
    table.commit()
    disk = Disk(monkeypatch, path)
    disk.room = needed_bytes(10, 4 * D)  # enough, until the old bytes have taken of it
    with pytest.raises(OSError, match="is sparse"):
        table.write(torch.arange(10), torch.ones(10, D))
    assert disk.journal_bytes() > 0
    assert not table.weight.any()


def test_a_step_finds_room_for_rows_and_state_or_changes_neither(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path, sparse=True).train()
    optimizer = RowAdam(table, lr=0.5)
    table.commit()
    state_path = path.with_name("engram_table.adam.dat")
    disk = Disk(monkeypatch, path)
    table(torch.arange(10)).sum().backward()
    rows, state = needed_bytes(10, 4 * D), needed_bytes(10, 8 * D)
    table.protect(torch.tensor([], dtype=torch.int64))  # the journal's thread is done
    disk.room = disk.journal_bytes() + rows + state - 1  # for one of them it would do
    with pytest.raises(OSError, match=f"may need {rows + state} bytes"):
        optimizer.step()
    assert (optimizer.state_file.step, any(path.read_bytes()), any(state_path.read_bytes())) == (0, False, False)
    disk.room += 1
    optimizer.step()
    assert (optimizer.state_file.step, any(path.read_bytes()), any(state_path.read_bytes())) == (1, True, True)
    table.commit()


def test_a_state_with_holes_beside_a_table_without(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows have been written to by now, not all of their state."""
    num_rows, width = 64, 1024
    table = MMapEmbeddingStorage(num_rows, width, path, sparse=True)
    table.open_state("adam", 2 * width)
    table.write(torch.arange(num_rows), torch.ones(num_rows, width))
    table.flush()
    table.close()
    table = MMapEmbeddingStorage(num_rows, width, path)
    assert taken_bytes(path) >= num_rows * width * 4
    state = table.open_state("adam", 2 * width)
    disk = Disk(monkeypatch, path)
    with pytest.raises(OSError, match="is sparse"):
        table.write_state(state, torch.tensor([5]), torch.ones(1, 2 * width))
    disk.room = 2**30
    table.write_state(state, torch.tensor([5]), torch.ones(1, 2 * width))
    table.commit()


def test_a_table_whose_space_is_reserved_asks_for_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path)
    state = table.open_state("adam", 2)
    Disk(monkeypatch, path)
    table.write(torch.arange(N), torch.ones(N, D))
    table.write_state(state, torch.arange(N), torch.ones(N, 2))
    table.commit()


FULL = """
import sys, torch
from pathlib import Path
from sense_v2.engram.storage import MMapEmbeddingStorage
path = Path(sys.argv[1])
table = MMapEmbeddingStorage(2**16, 64, path, sparse=True)
step = 0
try:
    while True:
        ids = torch.randperm(2**16, generator=torch.Generator().manual_seed(step))[:8]
        table.write(ids, torch.full((8, 64), float(step)))
        step += 1
        if step % 5 == 0:
            table.commit(step=step)
            committed = path.read_bytes()
except OSError as error:
    print(error.errno, step)
table.close()
table = MMapEmbeddingStorage(2**16, 64, path)
assert path.read_bytes() == committed
print(table.committed_step)
"""


def test_a_disk_that_gets_full_kills_nobody(tmp_path: Path) -> None:
    """16 MB in a file system of 4 MB, which only the child sees, where mounting is allowed."""
    mount = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}"
    prefix = ("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    child = run_python(FULL, tmp_path / "engram_table.dat", prefix=prefix)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, (child.returncode, err)  # -7 is SIGBUS
    number, step, committed = (int(word) for word in out.split())
    assert number == errno.ENOSPC
    # Until hardly any room was left: 8 rows take 8 pages of 4 KB at most.
    assert step > 3 * 2**20 // (8 * 4096)
    assert committed == step // 5 * 5


def test_what_does_not_fit_at_all_is_no_sparse_table(path: Path) -> None:
    arguments: dict[str, Any] = {"sparse": True}
    with pytest.raises(ValueError, match="more than a file can have"):
        MMapEmbeddingStorage(2**60, 64, path, **arguments)
    assert names(path.parent) == []
    table = make(path, sparse=True, init_std=0.5)
    assert np.array_equal(table.weight.numpy(), np.zeros((N, D), dtype=np.float32))
