"""What `pip install sense-v2` brings, and what reading a table needs of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sense_v2.engram import MMapEmbeddingStorage
from sense_v2.engram.table import checksums

ROOT = Path(__file__).parents[2]

# Hides the packages that are named from every way of looking for a module; then reads rows, as a small service would.
READER = """
import sys
hidden, path = set(sys.argv[1].split(",")), sys.argv[2]

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
import torch
import sense_v2.engram as engram
assert all(getattr(engram, name) for name in engram.__all__)
hasher = engram.NgramHasher("sense", layer_id=1, layer_ids=[1], ngram_orders=[2], num_heads=2, table_size=1000,
                            compressed_vocab_size=50, pad_id=0)
storage = engram.MMapEmbeddingStorage(1000, 8, path, mode="r").eval()
rows = storage(hasher(torch.tensor([[3, 1, 4, 1, 5]])))
print(*rows.shape, *sorted(hidden & set(sys.modules)))
"""


def distribution(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def required_names(requirements: list[str]) -> Iterator[str]:
    """Those that are installed here, without extras."""
    for line in requirements:
        if "extra ==" not in line:
            yield distribution(re.match("[A-Za-z0-9._-]+", line)[0])


def brought_by(*names: str) -> set[str]:
    """All that these packages need, themselves included; what other systems need is not installed here."""
    found: set[str] = set()
    waiting = [distribution(name) for name in names]
    while waiting:
        name = waiting.pop()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += required_names(requirements)
    return found


def test_an_install_brings_three_packages_beyond_those_of_torch_and_transformers() -> None:
    ours = brought_by("sense-v2")
    assert {"torch", "transformers", "numpy", "tqdm"} <= ours
    assert ours - brought_by("torch", "transformers") == {"sense-v2", "accelerate", "psutil", "xxhash"}


def test_a_table_is_read_with_what_torch_numpy_and_safetensors_bring(tmp_path: Path) -> None:
    table = tmp_path / "engram_table.dat"
    storage = MMapEmbeddingStorage(1000, 8, table, init_std=0.02)
    storage.commit(step=0)
    kept = brought_by("torch", "numpy", "safetensors", *([] if checksums.compiled else ["xxhash"]))
    hidden = {
        top
        for top, homes in metadata.packages_distributions().items()
        if not {distribution(home) for home in homes} & {*kept, "sense-v2", "setuptools", "pip"}
    }
    assert {"transformers", "tokenizers", "tqdm", "yaml", "typer", "psutil", "accelerate"} <= hidden
    done = subprocess.run(
        [sys.executable, "-c", READER, ",".join(sorted(hidden)), str(table)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 5 2 8\n"
