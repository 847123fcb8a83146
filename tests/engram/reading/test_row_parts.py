"""Rows in parts of files: their pages are looked at, and asked for before they are touched, as `RowReader` does."""

import os

import numpy as np
import pytest
import torch
from checkpoints import deepseek_rows, write_shard

from sense_v2.engram.reading import cold_policy, pages
from sense_v2.engram.reading.cold_policy import ASKED_BATCHES
from sense_v2.engram.reading.pages import page_runs
from sense_v2.engram.reading.row_parts import MappedFiles, PartsReader, RowParts
from sense_v2.engram.reading.safetensors_headers import read_header

N_ROWS, CUT = 6000, 2500


@pytest.fixture
def opened(tmp_path):
    """Codes in two files, scales in the first: (reader, what its rows are, the spans)."""
    codes, scales = deepseek_rows(N_ROWS)
    write_shard(
        tmp_path / "a.safetensors",
        {
            "odd": ("U8", (3,), b"abc"),
            "codes0": ("F8_E4M3", (CUT, 256), codes[:CUT].tobytes()),
            "scales": ("F8_E8M0", (N_ROWS, 8), scales.tobytes()),
        },
    )
    write_shard(tmp_path / "b.safetensors", {"codes1": ("F8_E4M3", (N_ROWS - CUT, 256), codes[CUT:].tobytes())})
    spans = {**read_header(tmp_path / "a.safetensors"), **read_header(tmp_path / "b.safetensors")}
    files = MappedFiles()
    tensors = [RowParts([spans["codes0"], spans["codes1"]], 256, files), RowParts([spans["scales"]], 8, files)]
    reader = PartsReader(tensors)
    yield reader, (codes, scales), spans
    reader.close()


def asked(monkeypatch, in_memory):
    """Runs of pages that are asked for from here on, by file; `in_memory` is what the kernel says of every page."""
    runs = []

    def will_need(self, runs_R2):
        runs.append((self.address, runs_R2.tolist()))

    monkeypatch.setattr(pages.Pages, "will_need", will_need)
    monkeypatch.setattr(pages.Pages, "in_memory", lambda self, offsets: in_memory)
    return runs


@pytest.mark.parametrize("num_ids", [0, 1, 16, 2000])
@pytest.mark.parametrize("in_memory", [True, False, None])
@pytest.mark.parametrize("batches_to_ask", [0, 9])
def test_rows_are_the_same_asked_for_or_not(opened, monkeypatch, num_ids, in_memory, batches_to_ask):
    reader, stored, _ = opened
    monkeypatch.setattr(pages.Pages, "in_memory", lambda self, offsets: in_memory)
    reader._cold.small.batches_to_ask = batches_to_ask
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, N_ROWS, num_ids))
    reader.prefetch(ids)
    for found, expected in zip(reader.read(ids), stored, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected[ids.numpy()])


def test_every_page_of_a_cold_batch_is_asked_for_before_the_first_is_touched(opened, monkeypatch):
    reader, _, spans = opened
    order = []
    monkeypatch.setattr(pages.Pages, "in_memory", lambda self, offsets: False)
    monkeypatch.setattr(pages.Pages, "will_need", lambda self, runs: order.append(runs.tolist()))
    gather = RowParts.gather
    monkeypatch.setattr(RowParts, "gather", lambda self, ids: order.append("touch") or gather(self, ids))
    ids = np.array([5, 2499, 2500, 5999, 5])
    reader.read(torch.from_numpy(ids))
    expected = [
        page_runs(ids[ids < CUT], 256, first_byte=spans["codes0"].offset).tolist(),
        page_runs(ids[ids >= CUT] - CUT, 256, first_byte=spans["codes1"].offset).tolist(),
        page_runs(ids, 8, first_byte=spans["scales"].offset).tolist(),
        "touch",
        "touch",
    ]
    assert order == expected


def test_a_warm_table_is_never_asked_for(opened, monkeypatch):
    reader, _, _ = opened
    monkeypatch.setattr(cold_policy, "SLOW_NS", 10**12)
    runs = asked(monkeypatch, in_memory=True)
    for num_ids in (16, 16, 5000, 16):
        ids = torch.arange(num_ids)
        reader.prefetch(ids)
        reader.read(ids)
    assert runs == []
    assert not reader.reads_the_disk


def test_a_slow_batch_that_read_the_disk_is_followed_by_asking(opened, monkeypatch):
    reader, _, _ = opened
    runs, ids = asked(monkeypatch, in_memory=False), torch.tensor([1, 5])
    reader._cold.small.batches_to_ask, reads = 0, reader._cold.disk_reads
    monkeypatch.setattr(cold_policy, "disk_reads", lambda: reads)
    monkeypatch.setattr(cold_policy, "SLOW_NS", -(10**12))
    reader.read(ids)  # slow, but not because of the disk
    assert reader._cold.small.batches_to_ask == 0
    monkeypatch.setattr(cold_policy, "disk_reads", lambda: reads + 1)
    reader.read(ids)
    assert (reader._cold.small.batches_to_ask, runs) == (ASKED_BATCHES, [])
    reader.read(ids)
    assert len(runs) == 2  # the one file's codes, and scales


def test_asking_ends_when_nothing_is_slow_any_more(opened, monkeypatch):
    reader, _, _ = opened
    monkeypatch.setattr(cold_policy, "SLOW_NS", 10**12)
    runs = asked(monkeypatch, in_memory=None)
    reader._cold.small.batches_to_ask = ASKED_BATCHES
    for _ in range(ASKED_BATCHES + 20):
        reader.read(torch.tensor([1]))
    assert len(runs) == 2 * ASKED_BATCHES


def test_of_files_of_somebody_elses_the_kernel_isnt_asked_what_is_in_memory(opened, tmp_path, monkeypatch):
    """It says of each page that it is, and a cold batch would be touched page by page."""
    reader, _, spans = opened
    ids = np.array([3, 4000])
    assert [tensor.in_memory(ids) for tensor in reader.tensors] == [True, True]  # just written
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    theirs = RowParts([spans["codes0"], spans["codes1"]], 256, MappedFiles())
    assert theirs.in_memory(ids) is None
    runs = []
    monkeypatch.setattr(pages.Pages, "will_need", lambda self, runs_R2: runs.append(len(runs_R2)))
    PartsReader([theirs]).read(torch.from_numpy(ids))
    assert runs == [1, 1]
