"""How files are mapped, asked of the kernel (/proc/self/smaps); memory limits, in a made-up tree of cgroups."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sense_v2.engram import reader
from sense_v2.engram.reader import map_rows, usable_memory_bytes
from sense_v2.engram.storage import MMapEmbeddingStorage

needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks /proc/self/smaps")
MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reads_ahead(path: Path) -> bool:
    """Whether the kernel may read around a page of this file's one mapping: flag rr says that it may not."""
    found = []
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if entry.splitlines() and entry.splitlines()[0].endswith(f" {path}"):
            found.append(re.search(r"^VmFlags: (.*)$", entry, re.MULTILINE).group(1).split())
    assert len(found) == 1
    return "rr" not in found[0]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "rows.dat"
    np.arange(4096 * 8, dtype="<f4").tofile(path)
    return path


@needs_smaps
@pytest.mark.parametrize(("memory_bytes", "has_holes"), [(4 << 20, False), (4 << 20, True), (4096 * 8 * 4, False)])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_reading_ahead_stays_where_the_file_fits_and_has_no_holes(path, monkeypatch, memory_bytes, has_holes, mode):
    monkeypatch.setattr(reader, "usable_memory_bytes", lambda: memory_bytes)
    rows_ND = map_rows(path, np.dtype("<f4"), mode, (4096, 8), has_holes=has_holes)
    assert reads_ahead(path) == (memory_bytes == 4 << 20 and not has_holes)
    np.testing.assert_array_equal(rows_ND, np.arange(4096 * 8).reshape(4096, 8))


@needs_smaps
@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_and_its_states_are_mapped_so(tmp_path, sparse):
    path = tmp_path / "engram_table.dat"
    storage = MMapEmbeddingStorage(65_536, 64, path, sparse=sparse)
    state = storage.open_state("sums", 64)
    assert reads_ahead(path) == reads_ahead(state.path) == (not sparse)
    storage.write(torch.tensor([5]), torch.ones(1, 64))
    assert storage.gather(torch.tensor([5])).tolist() == [[1.0] * 64]
    storage.commit()
    storage.close()


def cgroups(root: Path, line: str, limits: dict[str, str]) -> int:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpuset:/elsewhere\n{line}\n")
    for file, text in limits.items():
        target = root / "sys/fs/cgroup" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return usable_memory_bytes(root)


LIMIT = 1 << 20


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("0::/user/one", {"user/one/memory.max": f"{LIMIT}\n", "user/memory.max": "max\n"}),
        ("0::/user/one", {"user/one/memory.max": "max\n", "user/memory.max": f"{LIMIT}\n"}),
        ("0::/user/one", {"user/one/memory.max": f"{2 * LIMIT}\n", "user/memory.max": f"{LIMIT}\n"}),
        ("0::/", {"memory.max": f"{LIMIT}\n"}),
        ("0::/the/hosts/path", {"memory.max": f"{LIMIT}\n"}),
        ("4:memory:/one", {"memory/one/memory.limit_in_bytes": f"{LIMIT}\n"}),
        ("4:memory,hugetlb:/one", {"memory/memory.limit_in_bytes": f"{LIMIT}\n"}),
    ],
)
def test_the_least_limit_counts(tmp_path, line, limits):
    assert cgroups(tmp_path, line, limits) == LIMIT


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("0::/one", {}),
        ("0::/one", {"one/memory.max": "max\n"}),
        ("4:memory:/one", {"memory/one/memory.limit_in_bytes": f"{2**63 - 4096}\n"}),
        ("4:memory:/one", {"memory/two/memory.limit_in_bytes": f"{LIMIT}\n"}),
        ("4:cpu:/one", {"memory/one/memory.limit_in_bytes": f"{LIMIT}\n"}),
    ],
)
def test_without_a_limit_it_is_the_machines_memory(tmp_path, line, limits):
    assert cgroups(tmp_path, line, limits) == MACHINE_BYTES


def test_where_nothing_tells_of_cgroups(tmp_path):
    assert usable_memory_bytes(tmp_path) == MACHINE_BYTES
