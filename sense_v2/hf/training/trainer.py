"""EngramTrainer: transformers' Trainer for models with memory.

Beside what `EngramCallback` does in any Trainer, it gives the fusion layers parameter groups of their own, resumes
from any folder, reports the memory's metrics to whatever `report_to` names, and trains in several processes on one
host (`ranks.py`).

All of it is in `EngramTraining`, to be put before another Trainer's class: `class Mine(EngramTraining, SFTTrainer)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from sense_v2.hf.data.streaming import STREAM_FILE, ResumableStream, load_stream, save_stream
from sense_v2.hf.training.callback import EngramCallback


class StreamTraining:
    """Keeps with each checkpoint where a `ResumableStream` stands, and resumes there; to be put before a Trainer."""

    def checkpoint_of(self, resume_from_checkpoint: Any) -> str | None:
        """The folder that the argument of `train` means."""
        if resume_from_checkpoint is True:
            found: str | None = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
            return found
        return resume_from_checkpoint or None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint, stream = self.checkpoint_of(resume_from_checkpoint), self.train_dataset  # type: ignore[attr-defined]
        if checkpoint and isinstance(stream, ResumableStream) and (Path(checkpoint) / STREAM_FILE).exists():
            skips = not self.args.ignore_data_skip  # type: ignore[attr-defined]
            stream.load_state_dict(load_stream(Path(checkpoint)), skipped_again=skips)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        if isinstance(self.train_dataset, ResumableStream) and self.args.should_save:  # type: ignore[attr-defined]
            settings, step = self.args, self.state.global_step  # type: ignore[attr-defined]
            num_blocks = step * self.get_total_train_batch_size(settings)  # type: ignore[attr-defined]
            folder = Path(settings.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            save_stream(self.train_dataset.state_dict(num_blocks), folder)  # type: ignore[attr-defined]


class EngramTraining(StreamTraining):
    """What turns a Trainer's class into one for models with memory; the Trainer's own arguments, and two more.

    The callback among `callbacks` says how rows are trained; without one it is `EngramCallback()`. `fusion_rate` is
    how many times the Trainer's learning rate the fusion layers get, which have no weight decay. `value_rate` is the
    same for W_v in front of a table whose rows began as zeros (`init_std=0`, `sparse`): it began as noise that points
    everywhere, and rows that were written have to go on fitting it.
    """

    def __init__(
        self, *args: Any, fusion_rate: float = 3.0, value_rate: float = 0.3, callbacks: Any = None, **kwargs: Any
    ) -> None:
        for name, rate in (("fusion_rate", fusion_rate), ("value_rate", value_rate)):
            if not rate >= 0:
                raise ValueError(f"{type(self).__name__}: {name} = {rate}: must be 0 or more")
        self.fusion_rate, self.value_rate = fusion_rate, value_rate
        callbacks = list(callbacks or [])
        self.engram = next((one for one in callbacks if isinstance(one, EngramCallback)), None) or EngramCallback()
        if self.engram not in callbacks:
            callbacks.append(self.engram)
        self.engram.averages_ranks = True
        super().__init__(*args, callbacks=callbacks, **kwargs)  # type: ignore[call-arg]  # the Trainer's

    def create_optimizer(self, *args: Any) -> Any:
        is_given = self.optimizer is not None  # type: ignore[has-type]
        self.optimizer = super().create_optimizer(*args)  # type: ignore[misc]
        if not is_given:
            self._give_groups(self.optimizer)
        return self.optimizer

    def _give_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves the fusion layers and the rows' stand-in from the Trainer's groups to some of their own."""
        memory = self.engram.memory
        base_rate = optimizer.defaults["lr"]
        began_as_zeros = memory.storage.manifest.init_std == 0
        values = {layer.W_v.weight for layer in memory} if began_as_zeros else set()
        rows = {self.engram.stand_in} - {None}
        fusion = set(memory.parameters()) - values - rows
        for own, rate in ((fusion, self.fusion_rate), (values, self.value_rate), (rows, 1.0)):
            moved = [one for group in optimizer.param_groups for one in group["params"] if one in own]
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter not in own]
            if moved:
                optimizer.add_param_group({"params": moved, "lr": base_rate * rate, "weight_decay": 0.0})

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.engram.resume_from_checkpoint = self.checkpoint_of(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            # As DDP averages the weights' gradients, which the Trainer has divided by its accumulation steps.
            self.engram.memory.storage.average_over_ranks()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.engram.take_metrics())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class EngramTrainer(EngramTraining, Trainer):  # type: ignore[misc]  # both have `optimizer`
    """A `transformers.Trainer` that trains weights and rows; arguments as `EngramTraining` and `Trainer` say.

    >>> trainer = EngramTrainer(
    ...     model, TrainingArguments("runs/mine", learning_rate=1e-3, max_steps=200), train_dataset=blocks,
    ...     callbacks=[EngramCallback(row_rate=20)],
    ... )  # doctest: +SKIP
    """
