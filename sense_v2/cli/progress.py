"""What a command shows while it runs: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from sense_v2.core.config import TrainConfig
from sense_v2.report import wording

if TYPE_CHECKING:
    from sense_v2.hf.training.fit import History

LINES = 3
"""Lines a run prints where there is no terminal."""
TELL_SECONDS = 2.0


class TrainingProgress:
    """The `on_step` of `fit`: loss, tokens a second and the time left, as a context manager."""

    def __init__(self, label: str, settings: TrainConfig, *, echo: Callable[[str], Any] = print) -> None:
        self.label, self.settings, self.echo = label, settings, echo
        self.tokens_per_step = settings.batch_size * settings.sequence_length
        self.told: int | None = None
        self.bar = tqdm(total=settings.steps, desc=label, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def __call__(self, history: History) -> None:
        step = history.steps[-1]
        rate = step * self.tokens_per_step / history.seconds[-1]
        loss = history.train_loss[-1]
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update(step - self.bar.n)  # a run that was resumed begins further on
        every = math.ceil(self.settings.steps / LINES)
        if self.told is None:
            self.told = step - 1
        if self.bar.disable and (step // every > self.told // every or step == self.settings.steps):
            self.told = step
            left = (self.settings.steps - step) * history.seconds[-1] / step
            found = f", held-out perplexity {history.evals[-1]['perplexity']:.1f}" if history.evals else ""
            self.echo(
                f"  {self.label}: step {step}/{self.settings.steps}, loss {loss:.3f}{found}, "
                f"{rate:,.0f} tokens/s, {left:.0f} s left"
            )


class TokenProgress:
    """The `streamer` of transformers' `generate`: how many of at most `total` new tokens there are. As a context
    manager; only in a terminal, since the text that comes of it goes to stdout alone."""

    def __init__(self, label: str, total: int) -> None:
        self.progress = ByteProgress(label, total, unit="tokens", echo=lambda line: None)
        self.prompt_is_next = True

    def __enter__(self) -> TokenProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def put(self, token_ids: torch.Tensor) -> None:
        if not self.prompt_is_next:
            self.progress(token_ids.numel())
        self.prompt_is_next = False

    def end(self) -> None:
        self.progress.bar.close()


class ByteProgress:
    """The `advance` of what reads and writes files: how far it is, how fast, the time left. As a context manager.

    `unit` is "B" for bytes, else what is counted.
    """

    def __init__(self, label: str, total: int, *, unit: str = "B", echo: Callable[[str], Any] = print) -> None:
        self.label, self.total, self.unit, self.echo = label, total, unit, echo
        self.done = 0
        self.started = self.told = time.perf_counter()
        self.bar = tqdm(
            total=total,
            desc=label,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            leave=False,
            delay=2,
        )

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def __call__(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        now = time.perf_counter()
        # The first line after two seconds, the next ones ever further apart: a few, however long it takes.
        if (
            self.bar.disable
            and self.done < self.total
            and now - self.told > max(TELL_SECONDS, 0.5 * (now - self.started))
        ):
            self.told = now
            rate = self.done / (now - self.started)
            short = f"{rate:.3g}" if rate < 100 else wording.short(rate)
            counted = self.unit.removesuffix("s") if short == "1" else self.unit
            per_second = wording.size(rate) if self.unit == "B" else f"{short} {counted}"
            left = wording.duration((self.total - self.done) / rate if rate else None)
            self.echo(f"  {self.label}: {self.done / self.total:.0%}, {per_second}/s, {left} left")
