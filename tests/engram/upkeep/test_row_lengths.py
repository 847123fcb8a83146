"""Lengths and drift of rows against a copy of the table as it was made."""

import numpy as np
import pytest
import torch
from tables import on_disk

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.initial_noise import CHUNK_VALUES, InitialNoise
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.upkeep.convert import convert_table
from sense_v2.engram.upkeep.row_lengths import measure_rows, num_measured


def table_of(path, rows, width, **arguments):
    return MMapEmbeddingStorage(rows, width, path, **{"seed": 7, "init_std": 0.05, **arguments})


def manifest_of(path):
    return read_manifest(TableFiles(path).manifest)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_noise_is_drawn_again_wherever_it_is_asked_for(tmp_path, dtype):
    # Two chunks and a bit, of a width that no chunk ends with.
    rows, width = 2 * CHUNK_VALUES // 24 + 100, 24
    table_of(tmp_path / "t.dat", rows, width, dtype=dtype).close()
    whole = on_disk(tmp_path / "t.dat", dtype, width).ravel()
    noise = InitialNoise(7, 0.05, dtype)
    for first, count in ((0, len(whole)), (CHUNK_VALUES - 5, 11), (5, 7), (len(whole) - 3, 3)):
        assert np.array_equal(noise.values(first, count).float().numpy(), whole[first : first + count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drift_is_the_distance_from_a_copy_of_the_beginning(tmp_path, dtype):
    path = tmp_path / "t.dat"
    table = table_of(path, 3000, 24, dtype=dtype)
    before = on_disk(path, dtype, 24)
    moved = torch.tensor([0, 17, 2999])
    table.write(moved, torch.randn(3, 24, generator=torch.Generator().manual_seed(0)))
    table.commit()
    table.close()
    after = on_disk(path, dtype, 24)
    found = measure_rows(path, manifest_of(path))
    assert not found.is_sampled
    assert np.array_equal(found.row_ids, np.arange(3000))
    assert np.allclose(found.norms, np.linalg.norm(after, axis=1), rtol=1e-5)
    assert np.allclose(found.drifts, np.linalg.norm(after - before, axis=1), rtol=1e-5)
    assert np.flatnonzero(found.drifts).tolist() == moved.tolist()


def test_a_large_table_is_sampled_evenly(tmp_path):
    path = tmp_path / "t.dat"
    rows = 5 * CHUNK_VALUES // 32
    table_of(path, rows, 32).close()
    told = []
    part = CHUNK_VALUES // 32
    found = measure_rows(path, manifest_of(path), max_rows=2 * part, advance=told.append)
    assert found.is_sampled
    assert found.row_ids.tolist() == [*range(part), *range(4 * part, 5 * part)]
    assert sum(told) == len(found.row_ids) == num_measured(manifest_of(path), max_rows=2 * part)
    assert not found.drifts.any()
    assert np.allclose(found.norms, np.linalg.norm(on_disk(path, width=32)[found.row_ids], axis=1), rtol=1e-5)


def test_a_sparse_table_began_as_zeros(tmp_path):
    path = tmp_path / "t.dat"
    table = table_of(path, 100, 8, sparse=True)
    table.write(torch.tensor([4]), torch.ones(1, 8))
    table.commit()
    table.close()
    found = measure_rows(path, manifest_of(path))
    assert np.flatnonzero(found.drifts).tolist() == np.flatnonzero(found.norms).tolist() == [4]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float16"])
def test_a_converted_table_has_lengths_and_no_known_beginning(tmp_path, dtype):
    table_of(tmp_path / "t.dat", 200, 32).close()
    convert_table(tmp_path / "t.dat", tmp_path / "other.dat", dtype)
    found = measure_rows(tmp_path / "other.dat", manifest_of(tmp_path / "other.dat"))
    assert found.drifts is None
    assert np.allclose(found.norms, np.linalg.norm(on_disk(tmp_path / "t.dat", width=32), axis=1), rtol=0.03)
