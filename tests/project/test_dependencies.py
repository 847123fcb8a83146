"""What `pip install sense-v2` brings, and what reading a table needs of it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from hidden_packages import distribution, modules, required, run_without

from sense_v2.engram import MMapEmbeddingStorage
from sense_v2.engram.table import checksums

# Reads rows, as a small service would.
READER = """
import torch
import sense_v2.engram as engram
assert all(getattr(engram, name) for name in engram.__all__)
hasher = engram.NgramHasher("sense", layer_id=1, layer_ids=[1], ngram_orders=[2], num_heads=2, table_size=1000,
                            compressed_vocab_size=50, pad_id=0)
storage = engram.MMapEmbeddingStorage(1000, 8, arguments[0], mode="r").eval()
rows = storage(hasher(torch.tensor([[3, 1, 4, 1, 5]])))
print(*rows.shape, *sorted(hidden & set(sys.modules)))
"""


def brought_by(*names: str) -> set[str]:
    """All that these packages need, themselves included; what other systems need is not installed here."""
    found: set[str] = set()
    waiting = [distribution(name) for name in names]
    while waiting:
        name = waiting.pop()
        try:
            needs = required(name)
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += needs
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
    hidden = {top for top, homes in modules().items() if not homes & {*kept, "sense-v2", "setuptools", "pip"}}
    assert {"transformers", "tokenizers", "tqdm", "yaml", "typer", "psutil", "accelerate"} <= hidden
    assert run_without(hidden, READER, str(table)) == "1 5 2 8\n"
