"""Values for other ranks <-> values from them: collectives in named phases that count their bytes and can fail.

`Ranks` is the processes of a run as the table sees them: torch.distributed, over a gloo group of its own. Rows lie on
disks and are gathered by processors, so they travel between hosts' memories, whatever the backbone uses beside them.
A group of its own keeps these exchanges apart from the backbone's, with which they run at the same time.

Every exchange has a phase's name. A collective that fails, or waits for longer than `timeout_seconds`, ends in a
`RankFailure` that names the phase and the rank that is the cause (`sense_v2.engram.ranks.liveness`).

Alone (without a process group, or in one of a single process) it is the same class, and nothing travels.

W ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sense_v2.core.errors import with_way_out
from sense_v2.engram.ranks.liveness import SILENT_BEATS, RankFailure, Watch

T = TypeVar("T")
# All ranks make their `Ranks` in the same order, so a number is the same one on each.
_numbers = itertools.count()


def start_ranks(*, backend: str = "gloo", timeout_seconds: float = 300.0, beat_seconds: float = 1.0) -> Ranks:
    """The process group that torchrun's environment describes, and its `Ranks`; without one this process is alone.

    It is `init_process_group(backend)`, but for a restart by `torchrun --max-restarts`: torchrun keeps the store of
    the attempt before, in which gloo finds addresses of processes that are gone (pytorch/pytorch#135712). Where there
    is one torchrun, each attempt's keys get their own prefix. Several count attempts apart, and have to be started
    with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which gives each attempt a store; `RuntimeError` where that is missing.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if keeps_store and restart != "0" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            raise with_way_out(
                RuntimeError(
                    "torchrun has started this again, on several hosts, with the store of the attempt before"
                ),
                "start all of them with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun …",
            )
        store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timeout))
        if keeps_store:
            store = dist.PrefixStore(f"attempt{restart}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    return Ranks(timeout_seconds=timeout_seconds, beat_seconds=beat_seconds)


class Ranks:
    """The processes of a run. To be made by all of them at the same time, once the process group is there.

    `timeout_seconds` is how long a rank waits for the others in one exchange; who takes longer (for an evaluation, a
    checkpoint on one rank) has to be waited for. `beat_seconds` is the time between two signs of life.
    """

    def __init__(self, *, timeout_seconds: float = 300.0, beat_seconds: float = 1.0) -> None:
        self.rank, self.num_ranks = 0, 1
        self.sent_bytes: Counter[str] = Counter()
        """By phase: what this rank sent to others since `take_sent_bytes`."""
        self._group: Any = None
        self._watch: Watch | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
            # The only way to the store that the ranks met at.
            store = dist.distributed_c10d._get_default_store()
            if hasattr(store, "clone"):
                # A connection of its own: no call of another thread waits for the watch's. One that the store doesn't
                # answer must not hold it up for the usual five minutes.
                store = store.clone()
                store.set_timeout(timedelta(seconds=max(1.0, SILENT_BEATS * beat_seconds)))
            prefix = f"sense_v2/{next(_numbers)}"
            self._watch = Watch(dist.PrefixStore(prefix, store), self.rank, self.num_ranks, beat_seconds)
            self.barrier("meeting")

    def all_to_all(
        self, phase: str, values: torch.Tensor, counts: Sequence[int], their_counts: Sequence[int]
    ) -> torch.Tensor:
        """Sends `counts[r]` of the values (along their first dimension, in the ranks' order) to rank r and returns
        `their_counts[r]` of rank r's, in the ranks' order."""
        if self.num_ranks == 1:
            return values
        # As bytes: gloo lacks bfloat16.
        width = math.prod(values.shape[1:])
        raw = values.contiguous().reshape(len(values), width).view(torch.uint8)
        received = raw.new_empty((sum(their_counts), raw.shape[1]))
        with self._in(phase, raw.shape[1] * (sum(counts) - counts[self.rank])):
            dist.all_to_all_single(received, raw, list(their_counts), list(counts), group=self._group)
        return received.view(values.dtype).reshape(len(received), *values.shape[1:])

    def swap_counts(self, phase: str, counts_WK: torch.Tensor) -> torch.Tensor:
        """Row r of the result is what rank r has in its row for this rank; int64 [W, K] both."""
        if self.num_ranks == 1:
            return counts_WK
        ones = [1] * self.num_ranks
        return self.all_to_all(phase, counts_WK, ones, ones)

    def all_gather(self, phase: str, values: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor of one shape, [W, …]."""
        if self.num_ranks == 1:
            return values[None]
        raw = values.contiguous().reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(raw) for _ in range(self.num_ranks)]
        with self._in(phase, len(raw) * (self.num_ranks - 1)):
            dist.all_gather(parts, raw, group=self._group)
        return torch.stack([part.view(values.dtype).reshape(values.shape) for part in parts])

    def gather(self, phase: str, value: T) -> list[T]:
        """Every rank's value, on every rank: small things only, they are pickled."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        with self._in(phase, 0):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, phase: str, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.num_ranks == 1:
            return value
        values = [value]
        with self._in(phase, 0):
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def barrier(self, phase: str) -> None:
        """Returns when all ranks have come here."""
        self.swap_counts(phase, torch.zeros(self.num_ranks, 1, dtype=torch.int64))

    def together(self, phase: str, call: Callable[[], T], *, only: int | None = None) -> T:
        """What `call` returns, on all ranks or on rank `only` (the others get None), when it has worked everywhere.

        Where it fails on one rank, that one raises its own error and the others a `RuntimeError` that names it.
        """
        found: Any = None
        failure: BaseException | None = None
        if only is None or only == self.rank:
            try:
                found = call()
            except RankFailure:
                raise  # nobody could be told
            except Exception as error:
                failure = error
        texts = self.gather(phase, failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(texts):
            if text:
                raise RuntimeError(f"rank {rank} failed in {phase!r}: {text}")
        return found

    def take_sent_bytes(self) -> dict[str, int]:
        """`sent_bytes`, and begins to count anew."""
        taken, self.sent_bytes = dict(self.sent_bytes), Counter()
        return taken

    def close(self) -> None:
        """No more signs of life. The process group stays its maker's."""
        if self._watch is not None:
            self._watch.close()

    @contextlib.contextmanager
    def _in(self, phase: str, sent_bytes: int) -> Iterator[None]:
        assert self._watch is not None
        self._watch.enter(phase)
        try:
            yield
        except Exception as error:
            raise self._watch.explain(phase, error) from error
        self._watch.leave()
        self.sent_bytes[phase] += sent_bytes
