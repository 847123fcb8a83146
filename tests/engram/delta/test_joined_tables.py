"""Several tables as one; what every table must do is in tests/contract."""

import pytest
import torch

from sense_v2.engram.delta.joined_tables import JoinedTables
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.storage import MMapEmbeddingStorage


def opened(folder, name, rows=10, width=8, dtype="float32", mode="r", seed=0):
    path = folder / f"{name}.dat"
    if not path.exists():
        MMapEmbeddingStorage(
            rows, width, path, dtype=dtype, init_std=1.0, seed=seed, provenance={"layer": rows}
        ).close()
    return MMapEmbeddingStorage(rows, width, path, dtype=dtype, seed=seed, mode=mode)


def test_a_delta_fits_the_same_tables_in_the_same_order_alone(tmp_path):
    first, second = opened(tmp_path, "first"), opened(tmp_path, "second", 20)
    overlay = OverlayStorage(JoinedTables([first, second]), tmp_path / "facts.safetensors")
    overlay.write(torch.tensor([9, 10]), torch.ones(2, 8))
    overlay.commit()
    named = overlay.identity().provenance["tables"]
    assert [(one["layer"], one["rows"], one["digest"]) for one in named] == [
        (10, 10, first.identity().digest),
        (20, 20, second.identity().digest),
    ]
    assert JoinedTables([first, second]).first_row(second) == 10
    again = OverlayStorage(JoinedTables([first, second]), tmp_path / "facts.safetensors", mode="r")
    assert torch.equal(again(torch.tensor([8])), first(torch.tensor([8])))
    assert torch.equal(again(torch.tensor([9, 10])), torch.ones(2, 8))
    assert torch.equal(again(torch.tensor([11])), second(torch.tensor([1])))
    for others in ([second, first], [first], [first, opened(tmp_path, "third", 20, seed=1)]):
        with pytest.raises(ValueError, match="was made on another table than"):
            OverlayStorage(JoinedTables(others), tmp_path / "facts.safetensors", mode="r")


def test_what_was_read_is_what_its_tables_read(tmp_path):
    joined = JoinedTables([opened(tmp_path, "first"), opened(tmp_path, "second", 20)])
    joined(torch.tensor([[3, 12], [29, 3]]))
    found = joined.stats()
    assert (found.calls, found.rows, found.bytes) == (2, 4, 4 * 8 * 4)
    assert [table.stats().rows for table in joined.tables] == [2, 2]


def test_tables_that_cant_be_one(tmp_path):
    first = opened(tmp_path, "first")
    with pytest.raises(ValueError, match=r"second.dat is open with mode='r\+'; open it with mode='r'"):
        JoinedTables([first, opened(tmp_path, "second", mode="r+")])
    for changes in ({"width": 16}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="they can't be one table"):
            JoinedTables([first, opened(tmp_path, str(changes), **changes)])
