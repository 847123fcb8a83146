"""Signs of life: what a rank knows of the others when a collective doesn't end, so that the error can name one.

A collective that fails says that a connection was closed, or that time is up; not whose fault it is. So each rank
puts a sign of life into the process group's store every `beat_seconds`, from a thread: how many exchanges it has
entered, and which one it is in. A rank that waits for long, or fails, reads the others' signs. Who gives none is
gone (killed, stopped, its host cut off); where all give some, who has entered the fewest exchanges is the one that
the others wait for. What a rank found out it leaves in its own sign before it ends: the ranks that fail because it
ended say the same.

While nothing is slow, a rank writes one short value a beat and reads nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from dataclasses import dataclass
from typing import Any

# So many beats without a sign are no accident of scheduling.
SILENT_BEATS = 4


class RankFailure(RuntimeError):
    """A rank is gone, or the others waited for it in vain. The message names it."""


@dataclass
class Sign:
    """What is known of another rank."""

    text: str = ""
    changed: float = 0.0
    """When this rank saw it change last."""

    @property
    def num_entered(self) -> int:
        return int(self.text.split(" ", 2)[1]) if self.text else 0

    @property
    def phase(self) -> str:
        return self.text.split(" ", 2)[2].split("\n")[0] if self.text else "its start"

    @property
    def verdict(self) -> str:
        """What that rank ended with; "" while it hasn't."""
        return self.text.partition("\n")[2]


class Watch:
    """The signs of all ranks, and this one's; `store` is a `torch.distributed.Store` that all share."""

    def __init__(self, store: Any, rank: int, num_ranks: int, beat_seconds: float) -> None:
        self._store, self._rank, self._num_ranks = store, rank, num_ranks
        self.beat_seconds = beat_seconds
        self._entered, self._phase, self._since = 0, "its start", time.monotonic()
        self._verdict = ""
        self._others = {other: Sign() for other in range(num_ranks) if other != rank}
        self._looking = threading.Event()
        self._stopped = threading.Event()
        self._looks = 0
        self._store_answered = time.monotonic()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="sense-v2-watch", daemon=True)
        self._thread.start()
        # A thread that is in a call of torch's when the interpreter ends would take the process down with an error.
        atexit.register(self.close)

    def enter(self, phase: str) -> None:
        """From here on this rank is in that phase."""
        self._entered, self._phase, self._since = self._entered + 1, phase, time.monotonic()

    def leave(self) -> None:
        self._since = float("inf")

    def explain(self, phase: str, error: BaseException) -> RankFailure:
        """What to raise for a collective that failed: whoever seems to be the cause, and how to go on."""
        self._looking.set()
        waited = time.monotonic() + (SILENT_BEATS + 3) * self.beat_seconds
        looks = self._looks
        while time.monotonic() < waited:
            # Somebody else may have found out first.
            if self._looks > looks and any(sign.verdict for sign in self._others.values()):
                break
            time.sleep(self.beat_seconds / 4)
        cause = self._cause()
        self._verdict = cause
        told = self._looks
        while self._looks < told + 2 and time.monotonic() < waited + 2 * self.beat_seconds:
            time.sleep(self.beat_seconds / 4)
        return RankFailure(
            f"rank {self._rank} of {self._num_ranks}, in {phase!r}: {cause}. The table stays as of its last commit; "
            f"torchrun --max-restarts goes on from there. ({type(error).__name__}: {str(error).splitlines()[0]})"
        )

    def close(self) -> None:
        self._stopped.set()
        # One that waits for a store that is gone isn't waited for.
        self._thread.join(timeout=2 * self.beat_seconds)
        atexit.unregister(self.close)

    def _cause(self) -> str:
        now = time.monotonic()
        for sign in self._others.values():
            if sign.verdict:
                return sign.verdict
        silent_after = SILENT_BEATS * self.beat_seconds
        silent = [rank for rank, sign in self._others.items() if now - sign.changed > silent_after]
        store_is_silent = now - self._store_answered > silent_after
        if silent and len(silent) == len(self._others) and (store_is_silent or len(silent) > 1):
            names = ", ".join(map(str, silent))
            return (
                f"no sign of life of any other rank ({names}) for {silent_after:.1f} s: the host of rank 0, which "
                "has the store, is gone, or this host was cut off"
            )
        if silent:
            rank = silent[0]
            return (
                f"rank {', '.join(map(str, silent))} is gone: no sign of life for {silent_after:.1f} s, the last one "
                f"in {self._others[rank].phase!r}"
            )
        slowest, sign = min(self._others.items(), key=lambda item: item[1].num_entered)
        return (
            f"rank {slowest} didn't come: it is alive, in {sign.phase!r}, exchange {sign.num_entered}, where this "
            f"rank is at {self._entered}"
        )

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(self.beat_seconds):
            beat += 1
            self._beat(beat)
            if self._looking.is_set() or time.monotonic() - self._since > 2 * self.beat_seconds:
                self._look()
            else:
                # Unknown is not silent.
                self._store_answered = now = time.monotonic()
                for sign in self._others.values():
                    sign.changed = now
            self._looks += 1

    def _beat(self, beat: int) -> None:
        # A store that is gone shows in what is read.
        with contextlib.suppress(Exception):
            self._store.set(str(self._rank), f"{beat} {self._entered} {self._phase}\n{self._verdict}")

    def _look(self) -> None:
        try:
            texts = self._store.multi_get([str(rank) for rank in self._others])
        except Exception:
            return
        self._store_answered = now = time.monotonic()
        for sign, raw in zip(self._others.values(), texts, strict=True):
            text = raw.decode()
            if text != sign.text:
                sign.text, sign.changed = text, now
