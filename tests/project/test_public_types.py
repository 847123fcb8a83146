"""Public names have types: mypy on a file of uses, as the project of a user would have it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sense_v2.engram
import sense_v2.hf

ROOT = Path(__file__).parents[2]
PACKAGES = (sense_v2.engram, sense_v2.hf)

# A line's comment names the error that mypy must find there; no comment: none.
USES = """
from transformers import LlamaConfig, LlamaForCausalLM

from sense_v2.engram import MMapEmbeddingStorage, RowAdam
from sense_v2.engram import nonsense  # E: attr-defined
from sense_v2.hf import EngramConfig, attach_engram, detach_engram, memory_of
from sense_v2.hf import nonsense  # E: attr-defined

config = EngramConfig(table_size=1000, layer_indices=[1])
model = attach_engram(LlamaForCausalLM(LlamaConfig()), config, "deepseek-tokenizer")
rows: int = memory_of(model).config.table_size
optimizer = RowAdam(MMapEmbeddingStorage(1000, 16, "rows.dat"), lr=0.1)
detach_engram(model)

attach_engram(model, 2, 3)  # E: arg-type
attach_engram(model, config, nonsense=5)  # E: call-arg
EngramConfig(table_sise=1000)  # E: call-arg
rows = memory_of(model)  # E: assignment
RowAdam(lr="much")  # E: call-arg, arg-type
"""


@pytest.mark.slow
def test_a_type_checker_knows_every_public_name_and_finds_wrong_uses(tmp_path):
    public = [f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__]
    lines = [*USES.splitlines(), "import sense_v2.engram, sense_v2.hf", *(f"reveal_type({name})" for name in public)]
    file = tmp_path / "uses.py"
    file.write_text("\n".join(lines) + "\n")
    # With the settings and the cache of `make lint`, which makes this a matter of seconds.
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--hide-error-context", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors: dict[int, list[str]] = {}
    types = []
    for line in found.stdout.splitlines():
        if match := re.match(r".*uses\.py:(\d+): error: .*\[([\w-]+)\]$", line):
            errors.setdefault(int(match[1]), []).append(match[2])
        elif match := re.match(r'.*note: Revealed type is "(.*)"$', line):
            types.append(match[1])
    expected = {
        number: comment.split(", ")
        for number, (_, _, comment) in enumerate((line.partition("  # E: ") for line in lines), start=1)
        if comment
    }
    assert {number: sorted(codes) for number, codes in errors.items()} == {
        number: sorted(codes) for number, codes in expected.items()
    }, found.stdout
    assert len(types) == len(public), found.stdout
    assert [name for name, kind in zip(public, types, strict=True) if kind == "Any"] == []


def test_public_names_are_imported_on_first_use():
    for package in PACKAGES:
        assert all(getattr(package, name).__name__ == name for name in package.__all__)
        assert dir(package) == package.__all__
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            _ = package.nonsense
    assert {"EngramConfig", "memory_of"} <= set(sense_v2.hf.__all__)
