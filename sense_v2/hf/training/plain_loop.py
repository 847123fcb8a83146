"""Batches of token ids -> a trained model: a plain loop over backbone, fusion layers and rows.

Two optimizers run side by side: AdamW for the weights (decay on the backbone's matrices only) and a row optimizer for
the rows of the batch. They warm up together; then the weights' rates fall and the rows' stays. Gradients are clipped
to one norm over both. The same loop trains a model without memory, so that a comparison differs in the memory alone.

A stop (Ctrl-C in the commands) is taken between steps: the step that runs is finished and the rows are committed. A
run that dies leaves the table as it was at the last commit, `config.commit_every` steps apart.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from sense_v2.core.config import TrainConfig
from sense_v2.engram.optim import RowAdam, RowWiseAdagrad, clip_grad_norm_
from sense_v2.hf.insight.evaluation import Evaluation
from sense_v2.hf.memory import EngramMemory, attached_memory

FINAL_RATE_SHARE = 0.1


@dataclass
class History:
    """What a run did: one entry a step, one in `evals` an evaluation. Seconds are the steps' own, evaluations and
    everything else left out."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Training seconds up to and with each step."""
    evals: list[dict[str, float]] = field(default_factory=list)
    """step, seconds (as above), loss, perplexity."""
    stopped: bool = False
    """Whether it ended before its last step."""

    def step_seconds(self) -> list[float]:
        """How long each step took."""
        return [now - before for before, now in zip([0.0, *self.seconds], self.seconds, strict=False)]

    def median_step_seconds(self) -> float:
        """nan before the first step."""
        return statistics.median(self.step_seconds()) if self.steps else math.nan


def rate_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """The schedule at `step` (from 0): linear from near 0 over `warmup_steps`, then a cosine from 1 down to 0.1 at
    the last step, `steps` - 1. With no more steps than `warmup_steps` it never gets to 1.

    >>> [round(rate_factor(step, warmup_steps=1, steps=4), 3) for step in range(4)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def row_rate_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """The rows' schedule: the same warm-up, then 1. Most rows are met a few times, some late for the first time;
    Adagrad lowers the rate of the others by itself."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def make_optimizers(model: PreTrainedModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over the weights that are trained, and the row optimizer where memory with trainable rows is attached.

    Raises `ValueError` where nothing is trained.
    """
    memory = attached_memory(model)
    fusion = set() if memory is None else set(memory.parameters())
    began_as_noise = memory is not None and memory.storage.manifest.init_std == 0
    values = {layer.W_v.weight for layer in memory} if memory is not None and began_as_noise else set()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not config.train_backbone:
        weights = [parameter for parameter in weights if parameter in fusion]
    backbone = [parameter for parameter in weights if parameter not in fusion]
    groups: list[dict[str, Any]] = [
        # Norms and biases have one dimension.
        {
            "params": [parameter for parameter in backbone if parameter.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [parameter for parameter in backbone if parameter.dim() < 2]},
        # Small, and most of it starts at zero.
        {"params": [p for p in weights if p in fusion - values], "lr": config.fusion_learning_rate},
        {"params": [p for p in weights if p in values], "lr": config.value_learning_rate},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if weights:
        groups = [group for group in groups if group["params"]]
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0))
    if memory is not None and memory.storage.rows_require_grad:
        row_optimizer = RowAdam if config.row_optimizer == "adam" else RowWiseAdagrad
        optimizers.append(row_optimizer(memory.storage, lr=config.row_learning_rate))
    if not optimizers:
        frozen = "" if config.train_backbone else ": TrainConfig.train_backbone is False"
        found = "no memory is attached" if memory is None else "its memory is frozen"
        raise ValueError(f"nothing to train{frozen}, the model's other weights are frozen and {found}")
    return optimizers


def train(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    config: TrainConfig,
    *,
    evaluate: Callable[[PreTrainedModel], Evaluation] | None = None,
    on_step: Callable[[History], Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    resume: Callable[[Sequence[torch.optim.Optimizer]], History] | None = None,
    before_commit: Callable[[Sequence[torch.optim.Optimizer], History], Any] | None = None,
) -> History:
    """Trains `model` in place for `config.steps` batches of token ids [B, T] and commits the table every
    `config.commit_every` of them and at the end, with the number of steps taken as its step.

    `evaluate` runs every `config.eval_every` steps and after the last; `on_step` after each step and its evaluation;
    `should_stop` is asked before each. A run that is stopped, or whose batches end (which warns), is committed too.

    `before_commit` is called before each commit (with or without memory), to keep what the table doesn't hold;
    `resume`, at the beginning, to bring it back: it returns the history of the steps that were taken, behind which
    `batches` go on.

    Raises `ValueError` where nothing is trained, and `FloatingPointError` at a loss or gradient that isn't finite,
    before it reaches the weights and the rows; it commits nothing.
    """
    optimizers = make_optimizers(model, config)
    history = History() if resume is None else resume(optimizers)
    history.stopped = False
    taken = len(history.steps)
    shape = {"warmup_steps": config.warmup_steps, "steps": config.steps}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])  # a schedule that goes on asks for it
    schedules = [
        LambdaLR(
            optimizer,
            partial(rate_factor if isinstance(optimizer, AdamW) else row_rate_factor, **shape),
            last_epoch=taken - 1,
        )
        for optimizer in optimizers
    ]
    memory = attached_memory(model)
    writes = memory is not None and memory.storage.mode == "r+"
    if memory is not None:
        memory.storage.durability = config.durability
    seconds = history.seconds[-1] if taken else 0.0
    kept = taken

    def keep(history: History) -> None:
        nonlocal kept
        if before_commit is not None and len(history.steps) > kept:
            kept = len(history.steps)
            before_commit(optimizers, history)

    model.train()
    with _only_trained(model, optimizers):
        for token_ids_BT in _ahead(batches, memory, config.steps - taken):
            if should_stop():
                history.stopped = True
                break
            step = len(history.steps) + 1
            started = time.perf_counter()
            loss = _step(model, token_ids_BT, optimizers, config.max_grad_norm, step)
            for schedule in schedules:
                schedule.step()
            seconds += time.perf_counter() - started
            history.steps.append(step)
            history.train_loss.append(loss)
            history.seconds.append(seconds)
            last = step == config.steps
            if evaluate is not None and (last or (config.eval_every and step % config.eval_every == 0)):
                result = evaluate(model)
                history.evals.append(
                    {"step": step, "seconds": seconds, "loss": result.loss, "perplexity": result.perplexity}
                )
                model.train()
            if config.commit_every and step % config.commit_every == 0:
                started = time.perf_counter()
                keep(history)
                if memory is not None and writes:
                    memory.storage.commit(step=step)
                seconds += time.perf_counter() - started
                history.seconds[-1] = seconds
            if on_step is not None:
                on_step(history)
            if last:
                break
        else:
            if taken < config.steps:
                history.stopped = True
                warnings.warn(
                    f"the batches ended after {len(history.steps)} of {config.steps} steps (Batches repeats its text "
                    "without end)",
                    UserWarning,
                    stacklevel=2,
                )
    keep(history)
    if memory is not None and writes:
        memory.storage.flush(step=history.steps[-1] if history.steps else None)
    return history


def _ahead(batches: Iterable[torch.Tensor], memory: EngramMemory | None, steps: int) -> Iterator[torch.Tensor]:
    """The first `steps` batches; while one is trained on, the next one's rows are on their way from the disk."""
    waiting: torch.Tensor | None = None
    for token_ids_BT in itertools.islice(batches, steps):
        if waiting is not None:
            if memory is not None:
                memory.prefetch(token_ids_BT)
            yield waiting
        waiting = token_ids_BT
    if waiting is not None:
        yield waiting


def _step(
    model: PreTrainedModel,
    token_ids_BT: torch.Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    max_grad_norm: float,
    step: int,
) -> float:
    """One batch: forward, backward, clipping over weights and rows, update. Returns the loss."""
    memory = attached_memory(model)
    token_ids_BT = token_ids_BT.to(model.device)
    loss = model(input_ids=token_ids_BT, labels=token_ids_BT, use_cache=False).loss
    loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if memory is None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    else:
        norm = clip_grad_norm_(parameters, memory.storage, max_grad_norm)
    for name, value in (("loss", loss.item()), ("gradient's norm", norm.item())):
        if not math.isfinite(value):
            before = f"the weights and rows are those of step {step - 1}; lower learning_rate or row_learning_rate"
            untrained = "nothing was updated yet, so look for the cause in the weights that training began with"
            raise FloatingPointError(f"the {name} is {value} at step {step}: {before if step > 1 else untrained}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@contextmanager
def _only_trained(model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """While it lasts, no weight but the optimizers' asks for a gradient, and at neither end is there any: what an
    earlier backward, or a step that failed, left behind must not reach an update."""
    trained = {
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(parameter in trained)
    _forget_gradients(model)
    try:
        yield
    finally:
        _forget_gradients(model)
        for parameter in asked:
            parameter.requires_grad_(True)


def _forget_gradients(model: PreTrainedModel) -> None:
    model.zero_grad()
    memory = attached_memory(model)
    if memory is not None:
        memory.storage.clear_gradients()
