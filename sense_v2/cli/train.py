"""`sense-engram train`: what a run prints, and how Ctrl-C stops it."""

from __future__ import annotations

import math
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sense_v2.cli.output import progress_to
from sense_v2.cli.progress import TrainingProgress
from sense_v2.core.config import Config, TrainConfig
from sense_v2.hf.data.corpus import Corpus
from sense_v2.hf.training.counted_rows import Counted
from sense_v2.hf.training.fit import History
from sense_v2.hf.training.run import DEFAULT_OUTPUT, RunWatcher, resume_training, train_on_corpus
from sense_v2.report import wording

Echo = Callable[[str], Any]

REACHED_SHARE = 0.1
"""A table of which training can't reach this share is larger than it need be."""


def run_train(config: Config, *, echo: Echo = print, **settings: Any) -> dict[str, Any]:
    """Run `train_on_corpus` with these settings, and print what it does."""
    return _told(train_on_corpus(config, watcher=PrintingWatcher(echo), **settings), echo)


def resume_train(output: str | Path = DEFAULT_OUTPUT, *, echo: Echo = print) -> dict[str, Any]:
    """Run `resume_training`, and print what it does."""
    return _told(resume_training(output, watcher=PrintingWatcher(echo)), echo)


def _told(result: dict[str, Any], echo: Echo) -> dict[str, Any]:
    before, after = (wording.perplexity(result["perplexity"][when]) for when in ("before", "after"))
    echo(f"held-out perplexity {before} before, {after} after {wording.number_of(result['steps'], 'step')}")
    if result["damage"] is not None:
        lost = result["damage"]
        echo(
            f"damage   on {wording.number_of(lost['tokens'], 'token')} that the model wrote before: KL "
            f"{lost['divergence']:.2g} nats a token, and {wording.percent(lost['changed'])} of the likeliest tokens "
            "are others"
        )
    if result["stopped"]:
        output = result["output"]
        echo(
            f"stopped  at step {result['steps']} of {result['planned_steps']}, and saved; "
            f"sense-engram train --resume --output {shlex.quote(output)} goes on"
        )
    else:
        echo(f"saved    {result['output']}")
    return result


class PrintingWatcher(RunWatcher):
    """Prints what a run tells, shows how far it is, and stops it at Ctrl-C."""

    def __init__(self, echo: Echo) -> None:
        self.echo, self.progress = echo, progress_to(echo)
        self.memory: dict[str, Any] | None = None

    def corpus_opened(self, corpus: Corpus) -> None:
        self.echo(f"corpus   {corpus.line()}")

    def counted(self, counted: Counted) -> None:
        self.echo(
            f"counted  {wording.number_of(counted.tokens, 'token')} into {wording.number_of(counted.rows, 'row')} in "
            f"{counted.seconds:.0f} s: loss {wording.decimals(counted.loss_before)} before, "
            f"{wording.decimals(counted.loss_after)} after, on text kept back; strength {counted.strength:.2g}"
        )

    def prepared(self, facts: dict[str, Any]) -> None:
        model, memory = facts["model"], facts["memory"]
        self.memory = memory
        self.echo(
            f"model    {model['name']}, {model['layers']} layers of width {model['width']}, "
            f"{wording.short(model['parameters'])} parameters{'' if model['trains'] else ', frozen'}"
        )
        trains = facts["trainable"]
        parts = [
            (trains["backbone"], f"of a LoRA of rank {model['lora_rank']}"),
            (trains["fusion"], "of the fusion layers"),
            (trains["rows"], "of rows on disk"),
        ]
        told = [f"{wording.short(count)} {what}" for count, what in parts if count]
        if not model["trains"]:
            self.echo(f"trains   weights: {wording.listing(told)}")
        if memory is not None:
            self.echo(
                f"memory   {wording.count(memory['rows'])} rows × {memory['width']} {memory['dtype']} "
                f"({wording.size(memory['bytes'])}) before layer "
                f"{wording.listing([str(layer) for layer in memory['layers']])}, "
                f"{wording.number_of(memory['heads'], 'head')}"
            )

    @contextmanager
    def training(self, settings: TrainConfig) -> Iterator[tuple[Callable[[History], Any], Callable[[], bool]]]:
        for line in _doubts(settings, self.memory):
            self.echo(f"note     {line}")
        with StopOnInterrupt() as stop, TrainingProgress("train", settings, echo=self.echo) as progress:
            yield progress, stop.asked


def _doubts(settings: TrainConfig, memory: dict[str, Any] | None) -> Iterator[str]:
    """What a run's settings are unlikely to be meant to do."""
    steps, warmup = settings.steps, settings.warmup_steps
    if not steps:
        return
    if steps <= warmup:
        share, verb = wording.percent(steps / (warmup + 1)), "ends" if steps == 1 else "end"
        yield (
            f"{wording.number_of(steps, 'step')} {verb} within the warm-up of {warmup}: the rates reach {share} of "
            f"their peaks; --warmup-steps {steps // 10}"
        )
    if memory is None:
        return
    tokens = steps * settings.batch_size * settings.sequence_length
    reached = tokens * memory["heads"] * len(memory["layers"])
    if reached < REACHED_SHARE * memory["rows"]:
        digit = 10 ** max(0, math.floor(math.log10(reached)) - 1)
        yield (
            f"training reads {wording.number_of(tokens, 'token')}, which reach at most "
            f"{wording.percent(reached / memory['rows'])} of the table's {wording.count(memory['rows'])} rows; "
            f"--table-size {math.ceil(reached / digit) * digit} has a row for each"
        )


class StopOnInterrupt:
    """While it lasts, a first SIGINT sets `asked()`, and a second raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> StopOnInterrupt:
        # Signals are the main thread's; a run in the background, which ignores SIGINT, keeps ignoring it.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # Not print: a signal can arrive in the middle of one.
        os.write(2, b"\nstopping after this step, then saving; Ctrl-C again quits at once, without saving\n")
