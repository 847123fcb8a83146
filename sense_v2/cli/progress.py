"""What a training command shows while it runs: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from sense_v2.core.config import TrainConfig
from sense_v2.hf.training import History

LINES = 3
"""Lines a run prints where there is no terminal."""


class TrainingProgress:
    """The `on_step` of `train`: loss, tokens a second and the time left, as a context manager."""

    def __init__(self, label: str, settings: TrainConfig, *, echo: Callable[[str], Any] = print) -> None:
        self.label, self.settings, self.echo = label, settings, echo
        self.tokens_per_step = settings.batch_size * settings.sequence_length
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
        self.bar.update(1)
        every = math.ceil(self.settings.steps / LINES)
        if self.bar.disable and (step % every == 0 or step == self.settings.steps):
            left = (self.settings.steps - step) * history.seconds[-1] / step
            found = f", held-out perplexity {history.evals[-1]['perplexity']:.1f}" if history.evals else ""
            self.echo(
                f"  {self.label}: step {step}/{self.settings.steps}, loss {loss:.3f}{found}, "
                f"{rate:,.0f} tokens/s, {left:.0f} s left"
            )
