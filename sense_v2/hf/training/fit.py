"""`fit`: a model and batches -> the model trained by EngramTrainer, and its history.

It is what `sense-engram train`, the demo, the controls and the benchmarks run. AdamW trains the weights (decay on the
backbone's matrices only) and a row optimizer the rows of the batch. Both warm up together; then the weights' rates
fall and the rows' stays. Gradients are clipped to one norm over both. A model without memory is trained in the same
way, so that a comparison differs in the memory alone.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sense_v2.core.config import TrainConfig
from sense_v2.core.errors import with_way_out
from sense_v2.hf.data.streaming import STREAM_FILE, ResumableStream
from sense_v2.hf.insight.evaluation import Evaluation
from sense_v2.hf.memory import EngramMemory, attached_memory
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.checkpoint import fits_table, step_of
from sense_v2.hf.training.settings import training_arguments
from sense_v2.hf.training.trainer import EngramTrainer, StreamTraining

FINAL_RATE_SHARE = 0.1


@dataclass
class History:
    """What a run did: one entry a step (of a long run, one every few steps), one in `evals` an evaluation."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Training seconds up to and with each step. Evaluations, checkpoints and reading text are left out."""
    evals: list[dict[str, float]] = field(default_factory=list)
    """step, seconds (as above), loss, perplexity."""
    stopped: bool = False
    """Whether it ended before its last step."""

    @classmethod
    def from_log(cls, entries: Iterable[Mapping[str, float]]) -> History:
        """Make it from a Trainer's `state.log_history`."""
        history = cls()
        for entry in entries:
            history.add(entry)
        return history

    def add(self, entry: Mapping[str, float]) -> None:
        """Take what a Trainer logs, if it is of a step or an evaluation."""
        if "loss" in entry:
            self.steps.append(int(entry["step"]))
            self.train_loss.append(entry["loss"])
            self.seconds.append(entry["seconds"])
        elif "eval_loss" in entry:
            names = {"step": "step", "seconds": "seconds", "eval_loss": "loss", "eval_perplexity": "perplexity"}
            self.evals.append({own: entry[name] for name, own in names.items()})

    @property
    def num_steps(self) -> int:
        return self.steps[-1] if self.steps else 0

    def step_seconds(self) -> list[float]:
        """How long each step took, the mean where several have one entry."""
        steps, seconds = [0, *self.steps], [0.0, *self.seconds]
        return [(seconds[i] - seconds[i - 1]) / (steps[i] - steps[i - 1]) for i in range(1, len(steps))]


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


class ResumableBatches(Protocol):
    """Batches that know where they stand: `Batches` of a text in memory, `StreamBatches` of one that isn't."""

    def __iter__(self) -> Iterator[torch.Tensor]: ...

    def state_dict(self, num_batches: int) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fit(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor] | ResumableBatches,
    config: TrainConfig,
    *,
    trainer: Mapping[str, Any] | None = None,
    evaluate: Callable[[PreTrainedModel], Evaluation] | None = None,
    on_step: Callable[[History], Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    folder: Path | None = None,
    resumes: bool = False,
) -> History:
    """Train `model` in place.

    The table is committed every `config.commit_every` steps and at the end, with the number of steps taken as its
    step. A run that is stopped, or whose batches end (which warns), is committed too. A run that fails or dies leaves
    the table as it was at the last commit.

    Args:
        model: With memory or without.
        batches: Token ids [B, T], B = `config.batch_size`. For a `folder`, such that know where they stand.
        config: Steps, rates, and how often to evaluate and commit.
        trainer: Further fields of TrainingArguments, as `settings.checked_trainer` returns them.
        evaluate: Runs every `config.eval_every` steps and after the last.
        on_step: Called when a step, its evaluation and its commit are done.
        should_stop: Asked before the first step and after each.
        folder: Keeps a Trainer's checkpoints, one with each commit, from which a run can go on bit for bit.
        resumes: Whether to go on from the checkpoint in `folder` that `resumable_checkpoint` finds.

    Returns:
        The history, that of the steps before a resumed run included.

    Raises:
        ValueError: Nothing is trained, the table is open read-only, or the checkpoint is of another run.
        FloatingPointError: A loss or gradient isn't finite. It reached neither weights nor rows.
        CommandError: As `training_arguments`.
    """
    memory = attached_memory(model)
    _refuse_nothing(model, memory, config)
    if should_stop():
        return History(stopped=True)
    if config.steps == 0:
        return History()
    trainer = trainer or {}
    checkpoint = resumable_checkpoint(folder, model) if folder is not None and resumes else None
    with nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as output:
        arguments = training_arguments(
            config, output, trainer, saves=folder is not None, evaluates=evaluate is not None
        )
        dataset = _Sequences(batches, memory, config)
        run = _Run(config, on_step, should_stop)
        rows: EngramCallback | None = None
        with _left_as_it_was(model, lambda: rows):
            shared: dict[str, Any] = {
                "args": arguments,
                "train_dataset": dataset,
                "callbacks": [run],
                "eval_dataset": [],
            }
            fitting: _Fitting
            if memory is None:
                fitting = _PlainFit(model, **shared)
            else:
                best = arguments.load_best_model_at_end
                rows = EngramCallback(
                    row_rate=config.row_learning_rate / config.learning_rate,
                    row_optimizer=config.row_optimizer,
                    checkpoints="stay" if folder is not None and not best else "copy",
                    commit_steps=config.commit_every,
                    durability=config.durability,
                    train_backbone=config.trains_beside_memory,
                )
                shared["callbacks"].insert(0, rows)
                fitting = _EngramFit(
                    model,
                    fusion_rate=config.fusion_learning_rate / config.learning_rate,
                    value_rate=config.value_learning_rate / config.learning_rate,
                    **shared,
                )
            fitting.run, fitting.measure = run, evaluate
            # A gradient scaler meets infinities on its way, and skips their steps.
            run.checks = fitting.accelerator.scaler is None
            fitting.has_own_schedule = "lr_scheduler_type" not in trainer
            fitting.remove_callback(PrinterCallback)
            fitting.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    run.history.stopped = run.history.num_steps < config.steps
    if dataset.ended_early:
        warnings.warn(
            f"the batches ended after {run.history.num_steps} of {config.steps} steps (Batches repeats its text "
            "without end)",
            UserWarning,
            stacklevel=2,
        )
    return run.history


def resumable_checkpoint(folder: Path, model: PreTrainedModel) -> Path | None:
    """Return the newest checkpoint in `folder` that is whole and whose rows are at hand; None where there is none."""
    memory = attached_memory(model)
    # What is written last of a checkpoint, but for the memory.
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STREAM_FILE}")]
    fitting = [path for path in whole if memory is None or fits_table(memory, path)]
    return max(fitting, key=step_of, default=None)


def _refuse_nothing(model: PreTrainedModel, memory: EngramMemory | None, config: TrainConfig) -> None:
    fusion = set() if memory is None else set(memory.parameters())
    trained = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and (config.trains_beside_memory or parameter in fusion)
    ]
    if trained or (memory is not None and memory.storage.rows_require_grad):
        return
    frozen = "" if config.trains_beside_memory else ": TrainConfig.train_backbone is False"
    found = "no memory is attached" if memory is None else "its memory is frozen"
    raise ValueError(f"nothing to train{frozen}, the model's other weights are frozen and {found}")


@contextmanager
def _left_as_it_was(model: PreTrainedModel, rows: Callable[[], EngramCallback | None]) -> Iterator[None]:
    """Afterwards the weights that asked for a gradient do so again, none has any, and the rows' callback is gone."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    use_cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        callback = rows()
        if callback is not None:
            callback.let_go()
        model.zero_grad()
        for parameter in asked:
            parameter.requires_grad_(True)
        if use_cache is not None:  # the Trainer turns it off
            model.config.use_cache = use_cache


class _Sequences(ResumableStream):
    """The sequences of the batches of a run, one by one: a DataLoader puts them together again.

    It looks one batch ahead, and so a batch's rows are on their way from the disk while the one before is trained on.
    """

    def __init__(self, batches: Any, memory: EngramMemory | None, config: TrainConfig) -> None:
        self.batches, self.memory, self.config = batches, memory, config
        self.taken, self.placeholders = 0, 0
        self.ended_early = False

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if torch.utils.data.get_worker_info() is not None:
            raise with_way_out(ValueError("each worker would read all of the text"), "use dataloader_num_workers=0")
        placeholders, self.placeholders = self.placeholders, 0
        nothing = torch.zeros(self.config.sequence_length, dtype=torch.int64)
        for _ in range(placeholders):
            yield {"input_ids": nothing, "labels": nothing}
        stream = iter(self.batches if not self.ended_early else [])
        first = True
        while self.taken < self.config.steps:
            token_ids_BT = next(stream, None)
            if token_ids_BT is None:
                self.ended_early = True
                return
            if len(token_ids_BT) != self.config.batch_size:
                raise ValueError(
                    f"a batch of {len(token_ids_BT)} sequences, and TrainConfig.batch_size = {self.config.batch_size}"
                )
            if self.memory is not None and not first:
                self.memory.prefetch(token_ids_BT)
            first = False
            self.taken += 1
            for token_ids_T in token_ids_BT:
                yield {"input_ids": token_ids_T, "labels": token_ids_T}

    def state_dict(self, num_blocks: int) -> dict[str, Any]:
        num_batches = num_blocks // self.config.batch_size
        state: dict[str, Any] = self.batches.state_dict(num_batches)
        return {**state, "num_batches": num_batches}

    def load_state_dict(self, state: dict[str, Any], *, skipped_again: bool = False) -> None:
        self.batches.load_state_dict(state)
        self.taken = state["num_batches"]
        # A Trainer that resumes at its last step skips nothing.
        if skipped_again and self.taken < self.config.steps:
            self.placeholders = self.taken * self.config.batch_size


class _Run(TrainerCallback):
    """Times the steps, keeps the history, and asks after each step whether to stop."""

    def __init__(
        self, config: TrainConfig, on_step: Callable[[History], Any] | None, should_stop: Callable[[], bool]
    ) -> None:
        self.config, self.on_step, self.should_stop = config, on_step, should_stop
        self.history = History()
        self.seconds = 0.0
        self.checks = True
        """Whether losses and gradients have to be finite."""
        self._step, self._told = 0, -1
        self._began: float | None = None

    def begin_step(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def check(self, what: str, value: float) -> None:
        """Raise `FloatingPointError` where a value of the step at hand isn't finite."""
        if self.checks and not math.isfinite(value):
            found = f"the {what} is {value} at step {self._step + 1}"
            if not self._step:
                raise with_way_out(
                    FloatingPointError(f"{found}: nothing was updated yet"),
                    "look for the cause in the weights that training began with",
                )
            raise with_way_out(
                FloatingPointError(f"{found}: the weights and rows are those of step {self._step}"),
                "lower learning_rate or row_learning_rate",
            )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.history = History.from_log(state.log_history)
        self.seconds = self.history.seconds[-1] if self.history.seconds else 0.0
        self._step = state.global_step

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        # Asked once each: the rows' gradient is collected when it is asked for.
        gradients = [found for parameter in model.parameters() if (found := parameter.grad) is not None]
        self.check("gradient's norm", float(torch.nn.utils.get_total_norm(gradients)))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._began is not None
        self.seconds += time.perf_counter() - self._began
        self._began = None
        self._step = state.global_step
        if state.global_step == self.config.steps:
            control.should_log = True
        self._after(args, control)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        self.history.add({**logs, "step": state.global_step})
        if "loss" in logs:
            self._after(args, control)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._after(args, control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._after(args, control, is_saved=True)

    def _after(self, args: Any, control: TrainerControl, *, is_saved: bool = False) -> None:
        """What follows the last event of a step, when nothing is to be logged, evaluated or saved any more."""
        if control.should_log or control.should_evaluate or control.should_save or self._told == self._step:
            return
        is_logged = self.history.num_steps == self._step
        if is_logged:
            self._told = self._step
            if self.on_step is not None:
                self.on_step(self.history)
        if not control.should_training_stop and self.should_stop():
            control.should_training_stop = True
            control.should_log = not is_logged
            control.should_save = args.save_strategy != "no" and not is_saved


class _Fitting(StreamTraining):
    """What TrainConfig asks of a Trainer beyond its arguments; to be put before a Trainer's class."""

    run: _Run
    control: TrainerControl
    lr_scheduler: Any
    measure: Callable[[PreTrainedModel], Evaluation] | None
    has_own_schedule: bool

    @property
    def stand_in(self) -> Any:
        """What the rows are among the parameters."""
        return None

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        # Norms and biases have one dimension.
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if not self.has_own_schedule:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        optimizer = self.optimizer if optimizer is None else optimizer  # type: ignore[attr-defined]
        config = self.run.config
        shape = {"warmup_steps": config.warmup_steps, "steps": config.steps}
        stand_in = self.stand_in
        is_rows = [any(one is stand_in for one in group["params"]) for group in optimizer.param_groups]
        factors: list[Callable[[int], float]] = [
            partial(row_rate_factor if rows else rate_factor, **shape) for rows in is_rows
        ]
        self.lr_scheduler = LambdaLR(optimizer, factors)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.run.begin_step()
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.run.check("loss", float(loss))
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self.measure is not None
        found = self.measure(self.model)  # type: ignore[attr-defined]
        self.model.train()  # type: ignore[attr-defined]
        metrics = {"eval_loss": found.loss, "eval_perplexity": found.perplexity}
        self.log(dict(metrics))
        handler = self.callback_handler  # type: ignore[attr-defined]
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[attr-defined]
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "eval_loss" in logs:
            logs["seconds"] = self.run.seconds
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint has the weights that are trained: the others are where the run began."""
        model = self.model  # type: ignore[attr-defined]
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        if frozen and state_dict is None:
            state_dict = {name: value for name, value in model.state_dict().items() if name not in frozen}
        super()._save(output_dir, state_dict)  # type: ignore[misc]


class _PlainFit(_Fitting, Trainer):
    """Without memory."""


class _EngramFit(_Fitting, EngramTrainer):
    """With memory."""

    @property
    def stand_in(self) -> Any:
        return self.engram.stand_in
