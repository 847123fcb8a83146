"""What reading a table has cost: lookups, rows, and the waits for the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# A wait is counted as below 1 us, 2, 4, … : those of _gather.c.
NUM_BUCKETS = 24


def bucket_of(nanoseconds: int) -> int:
    """Find a wait's bucket.

    >>> [bucket_of(ns) for ns in (999, 1000, 3_999_999, 10**12)]
    [0, 1, 12, 23]
    """
    return min((nanoseconds // 1000).bit_length(), NUM_BUCKETS - 1)


@dataclass
class ReadStats:
    """Counts since a table was opened, of this process.

    A lookup is *slow* if it took longer than rows in memory can: it waited for the disk, or for other work of the
    machine. Nothing is timed beyond what the reader measures anyway to tell warm from cold.
    """

    calls: int = 0
    """Lookups."""
    rows: int = 0
    bytes: int = 0
    """Of those rows."""
    asked: int = 0
    """Lookups whose pages the kernel was asked for first, as some weren't in memory."""
    waits: list[int] = field(default_factory=lambda: [0] * NUM_BUCKETS)
    """Slow lookups by how long they took: below 1 us, 2, 4, …"""
    wait_seconds: float = 0.0
    """Of all slow lookups."""

    @property
    def slow(self) -> int:
        """Slow lookups."""
        return sum(self.waits)

    def wait_percentile(self, share: float) -> float:
        """Seconds that a `share` of the slow lookups took at most, to a factor of two; 0 without any."""
        left = share * self.slow
        for bucket, count in enumerate(self.waits):
            left -= count
            if count and left <= 0:
                return float((1 << bucket) / 1e6)
        return 0.0

    def summary(self) -> dict[str, float]:
        """Say it as JSON holds it, with the longest wait of all but one slow lookup in a hundred."""
        counted = {name: getattr(self, name) for name in ("calls", "rows", "bytes", "asked", "slow", "wait_seconds")}
        return {**counted, "wait_seconds_p99": self.wait_percentile(0.99)}

    def note(self, num_rows: int, nanoseconds: int, *, asked: bool, slow: bool) -> None:
        """Count a lookup."""
        self.calls += 1
        self.rows += num_rows
        self.asked += asked
        if slow:
            self.waits[bucket_of(nanoseconds)] += 1
            self.wait_seconds += nanoseconds / 1e9

    def with_those_of(self, other: ReadStats) -> ReadStats:
        """Add what another table has counted."""
        return ReadStats(
            calls=self.calls + other.calls,
            rows=self.rows + other.rows,
            bytes=self.bytes + other.bytes,
            asked=self.asked + other.asked,
            waits=[own + more for own, more in zip(self.waits, other.waits, strict=True)],
            wait_seconds=self.wait_seconds + other.wait_seconds,
        )

    def plus(self, counts: tuple[int, int, int, Sequence[int], int], row_bytes: int) -> ReadStats:
        """Add what `Lookup.counts` of the extension says; and find the bytes of all."""
        calls, rows, asked, waits, waited_ns = counts
        return ReadStats(
            calls=self.calls + calls,
            rows=self.rows + rows,
            bytes=(self.rows + rows) * row_bytes,
            asked=self.asked + asked,
            waits=[own + more for own, more in zip(self.waits, waits, strict=True)],
            wait_seconds=self.wait_seconds + waited_ns / 1e9,
        )
