"""The reader's counts, against the lookups that were made."""

import pytest
import torch

from sense_v2.engram.reading import gather, reader
from sense_v2.engram.reading.read_stats import NUM_BUCKETS, ReadStats, bucket_of
from sense_v2.engram.storage import MMapEmbeddingStorage


@pytest.fixture
def table(tmp_path):
    made = MMapEmbeddingStorage(
        path=tmp_path / "t.dat", num_embeddings=5000, embedding_dim=16, dtype="float32"
    ).eval()
    yield made
    made.close()


def test_lookups_small_and_large_are_counted(table):
    before = table.stats()
    assert (before.calls, before.rows) == (0, 0)
    for _ in range(10):
        table(torch.arange(16))
    table(torch.arange(4000))
    table(torch.zeros(0, dtype=torch.int64))
    found = table.stats()
    assert (found.calls, found.rows, found.bytes) == (12, 4160, 4160 * 64)
    with pytest.raises(IndexError):
        table(torch.tensor([5000]))
    assert table.stats().rows == 4160


def test_slow_lookups_are_counted_by_how_long_they_took(table, monkeypatch):
    table(torch.arange(4000))
    slow = table.stats().slow

    def late(self, row_ids, out):
        import time

        time.sleep(0.05)
        return self._gather(row_ids, out=out)

    monkeypatch.setattr(reader.RowReader, "_gather_rows", late)
    for _ in range(3):
        table(torch.arange(2000))
    found = table.stats()
    assert found.slow == slow + 3
    assert found.wait_seconds >= 0.15
    assert 0.05 <= found.wait_percentile(0.99) < 0.3


@pytest.mark.skipif(gather.compiled is None or gather._exchange is None, reason="nothing is read by the extension")
def test_small_lookups_that_wait(table):
    """Every one does, if nothing may take any time."""
    table(torch.arange(16))
    for _ in range(70):
        table(torch.arange(16))
    before = table.stats()
    table._small.slow_ns = -(10**9)
    table(torch.arange(16))
    found = table.stats()
    assert found.calls == before.calls + 1
    assert found.slow == before.slow + 1
    assert found.wait_seconds > before.wait_seconds


def test_percentiles_of_waits():
    stats = ReadStats()
    assert stats.wait_percentile(0.5) == 0
    for nanoseconds in [3_000] * 9 + [10**9]:
        stats.note(1, nanoseconds, asked=False, slow=True)
    assert stats.wait_percentile(0.5) == stats.wait_percentile(0.9) == 4e-6
    assert 1 <= stats.wait_percentile(0.95) < 2.2
    assert bucket_of(2**62) == NUM_BUCKETS - 1
