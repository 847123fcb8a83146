"""A system without `fcntl` and `resource`, as Windows is: the library is imported, and tables are made and read."""

from pathlib import Path

from tables import run_python

CODE = """
import sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # an import of it fails
import numpy as np, os, torch
for name in ("register_at_fork", "posix_fadvise", "posix_fallocate", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
    if hasattr(os, name):
        delattr(os, name)
from sense_v2.engram.storage import MMapEmbeddingStorage
path = sys.argv[1]
table = MMapEmbeddingStorage(3000, 8, path)
table.write(torch.tensor([5]), torch.ones(1, 8))
table.commit()
table.close()
table = MMapEmbeddingStorage(3000, 8, path, mode="r")
for ids in (torch.tensor([5, 2999]), torch.arange(3000)):
    table.prefetch(ids)
    expected = np.fromfile(path, "<f4").reshape(3000, 8)[ids.numpy()]
    assert np.array_equal(table(ids).numpy(), expected)
assert table(torch.tensor([5])).tolist() == [[1.0] * 8]
"""


def test_tables_without_fcntl_and_resource(tmp_path: Path) -> None:
    out, error = run_python(CODE, tmp_path / "engram_table.dat").communicate(timeout=300)
    assert (out, error) == ("", "")
