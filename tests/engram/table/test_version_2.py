"""Tables of format version 2, whose block checksums miss two signs that change at once, and what finds that now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forge import Old, forged_header
from tables import D, N, make, manifest, on_disk, slow_sums

from sense_v2.engram.delta.apply import apply_delta, export_delta, open_table_as_it_is, revert_delta
from sense_v2.engram.table_copy import copy_table
from sense_v2.engram.upkeep.check import check_table, repair_table
from sense_v2.engram.upkeep.convert import convert_table


def flipped(rows_UD: torch.Tensor) -> torch.Tensor:
    """With the signs of values 1 and 3: the top bits of two words."""
    return rows_UD * torch.tensor([1.0, -1.0, 1.0, -1.0] + [1.0] * (D - 4))


def make_version_2(path: Path) -> None:
    """A table as the releases before wrote it."""
    table = make(path)
    table.open_state("adam", 2)
    table.commit(step=1)
    table.close()
    values = manifest(path)
    values["states"]["adam"]["checksums"] = slow_sums(path.with_name("table.adam.dat"), version=2)
    values |= {"format_version": 2, "checksums": slow_sums(path, version=2)}
    path.with_suffix(".json").write_text(json.dumps(values))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_version_2(tmp_path / "table.dat")
    return tmp_path / "table.dat"


def test_a_new_table_sees_two_signs_that_change(tmp_path: Path) -> None:
    path, base = tmp_path / "table.dat", tmp_path / "base.dat"
    table = make(path)
    copy_table(table, base)
    before = manifest(path)["checksums"]
    ids = torch.arange(3)
    table.write(ids, flipped(table.gather(ids)))
    table.commit()
    table.close()
    assert manifest(path)["checksums"] == slow_sums(path) != before
    assert len(export_delta(path, base, tmp_path / "delta.safetensors").row_ids_U) == 3
    raw = np.memmap(base, dtype="<f4", mode="r+", shape=(N, D))
    raw[5, [1, 3]] *= -1
    raw.flush()
    assert [finding.kind for finding in check_table(base).findings if finding.is_wrong] == ["checksum"]


def test_a_table_of_version_2_is_trained_and_checked_with_its_own_checksums(path: Path) -> None:
    table = open_table_as_it_is(path, mode="r+")
    state = table.open_state("adam", 2)
    table.write(torch.arange(4), torch.ones(4, D))
    table.write_state(state, torch.arange(2), torch.ones(2, 2))
    table.commit(step=2)
    table.close()
    written = manifest(path)
    assert (written["format_version"], written["step"]) == (2, 2)
    assert written["checksums"] == slow_sums(path, version=2)
    assert written["states"]["adam"]["checksums"] == slow_sums(path.with_name("table.adam.dat"), version=2)
    found = check_table(path)
    assert found.num_wrong == 0
    assert any("--repair writes better ones" in finding.text for finding in found.findings)


def test_repair_makes_it_a_table_of_version_3(path: Path) -> None:
    done, found = repair_table(path)
    assert done == ["checksums written of table.dat, table.adam.dat, as the rows are now"]
    assert [finding.kind for finding in found.findings] == []
    written = manifest(path)
    assert (written["format_version"], written["checksums"]) == (3, slow_sums(path))
    assert written["states"]["adam"]["checksums"] == slow_sums(path.with_name("table.adam.dat"))
    assert check_table(path).findings == []


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_what_a_dead_writer_of_version_2_left_is_undone(path: Path) -> None:
    """Its journal's hashes are version 2's."""
    before, values = path.read_bytes(), manifest(path)
    old = Old(path.name, [7], [before[7 * 4 * D : 8 * 4 * D]])
    head = forged_header(values["generation"], int(values["commit"], 16), N, magic=b"SENSEjr1")
    path.with_suffix(".journal").write_bytes(head + old.pack(1, version=2))
    raw = np.memmap(path, dtype="<f4", mode="r+", shape=(N, D))
    raw[7] = 3
    raw.flush()
    open_table_as_it_is(path, mode="r+").close()
    assert path.read_bytes() == before


def test_its_journal_is_undone_by_this_release(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    table = open_table_as_it_is(path, mode="r+")
    table.write(torch.arange(4), torch.ones(4, D))
    journal = path.with_suffix(".journal").read_bytes()
    assert journal[:8] == b"SENSEjr1"
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in path.parent.glob("table.*"):
        (copied / file.name).write_bytes(file.read_bytes())
    with pytest.warns(UserWarning, match="4 rows were put back"):
        open_table_as_it_is(copied / path.name, mode="r+").close()
    assert (copied / path.name).read_bytes() == before
    table.commit()
    table.close()


def test_deltas_between_tables_of_both_versions(path: Path, tmp_path: Path) -> None:
    """Blocks are compared by rows where the checksums are version 2's; the undo leads back."""
    trained, delta = tmp_path / "trained.dat", tmp_path / "delta.safetensors"
    base = open_table_as_it_is(path)
    copy_table(base, trained)
    base.close()
    table = open_table_as_it_is(trained, mode="r+")
    table.write(torch.arange(3), flipped(table.gather(torch.arange(3))))
    table.commit()
    table.close()
    rows = on_disk(trained)
    for _ in range(2):  # with version 2's checksums, then with version 3's
        assert len(export_delta(trained, path, delta).row_ids_U) == 3
        repair_table(trained)
    before = path.read_bytes()
    repair_table(path)
    export_delta(trained, path, delta)
    apply_delta(delta, path)
    assert np.array_equal(on_disk(path), rows)
    revert_delta(path)
    assert path.read_bytes() == before


def test_a_copy_of_version_2_is_restored(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.dat"
    table = open_table_as_it_is(path, mode="r+")
    table.open_state("adam", 2)
    table.copy_to(copy)
    before = path.read_bytes()
    table.close()
    repair_table(path)
    table = open_table_as_it_is(path, mode="r+")
    table.write(torch.arange(4), torch.ones(4, D))
    table.commit()
    table.restore_from(copy)
    table.close()
    assert path.read_bytes() == before
    assert (manifest(path)["format_version"], manifest(path)["checksums"]) == (3, slow_sums(path))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_is_converted_to_version_3(path: Path, tmp_path: Path, dtype: str) -> None:
    made = convert_table(path, tmp_path / "converted.dat", dtype)
    assert made.manifest.format_version == 3
    assert made.manifest.checksums == slow_sums(tmp_path / "converted.dat")
