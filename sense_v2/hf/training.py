"""Batches of token ids -> a trained model: a plain loop over backbone, fusion layers and rows.

Two optimizers run side by side under one schedule: AdamW for the weights (decay on the backbone's matrices only) and
a row optimizer for the rows of the batch. Gradients are clipped to one norm over both. The same loop trains a model
without memory, so that a comparison differs in the memory and nothing else.

A stop (Ctrl-C in the commands) is taken between steps: the step that runs is finished and the rows are flushed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from sense_v2.core.config import TrainConfig
from sense_v2.engram.optim import RowAdam, RowWiseAdagrad, clip_grad_norm_
from sense_v2.hf.attach import attached_memory
from sense_v2.hf.evaluation import Evaluation

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
        return statistics.median(self.step_seconds())


def rate_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """The schedule: linear from 0 over `warmup_steps`, then a cosine from 1 down to 0.1 at the last step."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizers(model: PreTrainedModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over what has a gradient, and the row optimizer where memory with trainable rows is attached."""
    memory = attached_memory(model)
    if not config.train_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("engram."))
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Norms and biases have one dimension. The fusion's W_v and convolution start at zero and are small.
            is_matrix = parameter.dim() >= 2 and not name.startswith("engram.")
            (decayed if is_matrix else plain).append(parameter)
    if not decayed and not plain:
        raise ValueError("nothing to train: train_backbone is False and the model has no memory attached")
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, betas=(0.9, 0.95))
    ]
    if memory is not None and memory.storage.rows_require_grad:
        row_optimizer = RowAdam if config.row_optimizer == "adam" else RowWiseAdagrad
        optimizers.append(row_optimizer(memory.storage, lr=config.row_learning_rate))
    return optimizers


def train(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    config: TrainConfig,
    *,
    evaluate: Callable[[PreTrainedModel], Evaluation] | None = None,
    on_step: Callable[[History], Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> History:
    """Trains `model` in place for `config.steps` batches of token ids [B, T] and flushes the table.

    `evaluate` runs every `config.eval_every` steps and after the last; `on_step` after each step; `should_stop` is
    asked before each. Raises `FloatingPointError` at a loss that isn't finite, before it reaches the weights.
    """
    optimizers = make_optimizers(model, config)
    schedules = [
        LambdaLR(optimizer, lambda step: rate_factor(step, warmup_steps=config.warmup_steps, steps=config.steps))
        for optimizer in optimizers
    ]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    memory = attached_memory(model)
    history = History()
    seconds = 0.0
    model.train()
    for step, token_ids_BT in zip(range(1, config.steps + 1), batches, strict=False):
        if should_stop():
            history.stopped = True
            break
        started = time.perf_counter()
        token_ids_BT = token_ids_BT.to(model.device)
        loss = model(input_ids=token_ids_BT, labels=token_ids_BT, use_cache=False).loss
        loss.backward()
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise FloatingPointError(
                f"the loss is {loss_value} at step {step}; the weights and rows are those of step {step - 1}. "
                "Lower learning_rate or row_learning_rate"
            )
        if memory is not None:
            clip_grad_norm_(parameters, memory.storage, config.max_grad_norm)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        seconds += time.perf_counter() - started
        history.steps.append(step)
        history.train_loss.append(loss_value)
        history.seconds.append(seconds)
        last = step == config.steps
        if evaluate is not None and (last or (config.eval_every and step % config.eval_every == 0)):
            result = evaluate(model)
            history.evals.append(
                {"step": step, "seconds": seconds, "loss": result.loss, "perplexity": result.perplexity}
            )
            model.train()
        if on_step is not None:
            on_step(history)
    if memory is not None and memory.storage.mode == "r+":
        memory.storage.flush(step=history.steps[-1] if history.steps else 0)
    return history
