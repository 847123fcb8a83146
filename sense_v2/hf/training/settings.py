"""TrainConfig, and any other field of `TrainingArguments`, -> the TrainingArguments of a run.

`TrainConfig` has the few settings that most runs need, and their names hold for every backbone. All others keep
transformers' own names and meaning: `Config.trainer` in a configuration file, `--set NAME=VALUE` on a command line.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sense_v2.core.config import TrainConfig, matches, nearest, type_name, yaml_value
from sense_v2.core.errors import CommandError

HISTORY_ENTRIES = 1000
"""A longer run logs the mean over several steps, so that its history stays small."""

_IN_FILE = "set train.{} in a configuration file (--config)"
# Fields that TrainConfig or the run itself decides -> what to use in their place.
OWNED = {
    "output_dir": "use --output",
    "max_steps": "use --steps or --tokens",
    "num_train_epochs": "use --steps or --tokens",
    "per_device_train_batch_size": "use --batch-size, the sequences of a whole step",
    "auto_find_batch_size": "use --batch-size",
    "learning_rate": "use --learning-rate",
    "seed": "use --seed",
    "resume_from_checkpoint": "use --resume",
    **{name: _IN_FILE.format(name) for name in ("weight_decay", "warmup_steps", "max_grad_norm")},
    **dict.fromkeys(("eval_strategy", "eval_steps"), _IN_FILE.format("eval_every")),
    **dict.fromkeys(("save_strategy", "save_steps"), _IN_FILE.format("commit_every")),
    "save_total_limit": "a run keeps two checkpoints, so that a kill at any moment leaves a whole one",
    "save_only_model": "a run keeps what --resume needs",
}


def parse_set(assignments: Sequence[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` arguments of `--set` by the types of the fields they name.

    Raises `CommandError` as `checked_trainer`, and where there is no `=`.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise CommandError(f"--set {assignment} has no value", "write --set NAME=VALUE, as in --set bf16=true")
        value = yaml_value(text)
        hint = _hint(name)
        if not matches(value, hint) and matches(text, hint):
            value = text  # a name that reads as a number, or as "none"
        values[name] = value
    return checked_trainer(values)


def checked_trainer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, fields of `TrainingArguments` by name.

    Raises `CommandError` for an unknown field, a value of another type, and a field that the run decides.
    """
    for name, value in values.items():
        hint = _hint(name)
        if name in OWNED:
            raise CommandError(f"{name} isn't set this way", OWNED[name])
        if not matches(value, hint):
            raise CommandError(
                f"TrainingArguments.{name} = {value!r}: must be of type {type_name(hint)}",
                "transformers' documentation of TrainingArguments says what is allowed",
            )
    return dict(values)


def _hint(name: str) -> Any:
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    if name not in known:
        raise CommandError(f"TrainingArguments has no field {name!r}", nearest(name, sorted(known)))
    return typing.get_type_hints(TrainingArguments)[name]


def training_arguments(
    config: TrainConfig, folder: str | Path, trainer: Mapping[str, Any], *, saves: bool, evaluates: bool
) -> TrainingArguments:
    """Make the TrainingArguments of a run.

    Args:
        config: The run's settings.
        folder: Where checkpoints and what reporters write go.
        trainer: Further fields of TrainingArguments, as `checked_trainer` returns them. They win over what is chosen
            here. With `gradient_accumulation_steps` a step still has `config.batch_size` sequences, in parts.
        saves: Whether there are checkpoints, one every `config.commit_every` steps and one at the end.
        evaluates: Whether there are evaluations, one every `config.eval_every` steps and one at the end.

    Raises:
        CommandError: A batch that can't be divided, or several GPUs in one process.
    """
    parts = trainer.get("gradient_accumulation_steps", 1)
    if parts < 1 or config.batch_size % parts:
        raise CommandError(
            f"batch_size = {config.batch_size} sequences a step can't be taken in gradient_accumulation_steps = "
            f"{parts} equal parts",
            "choose a --batch-size that it divides",
        )
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size // parts,
        "learning_rate": config.learning_rate,
        "adam_beta2": 0.99,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup_steps,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed % 2**32,
        "logging_steps": math.ceil(config.steps / HISTORY_ENTRIES),
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_every or config.steps,
        "save_strategy": "steps" if saves else "no",
        "save_steps": config.commit_every or config.steps,
        # The newest is whole only once the table is committed, so the one before has to be there until then.
        "save_total_limit": 2,
        "report_to": "none",
        # Without it bf16 is refused where there is no GPU.
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        # Each process reads its own text; a dispatched stream may not be empty, as that of a finished run is.
        "accelerator_config": {"dispatch_batches": False},
        **trainer,
    }
    arguments = TrainingArguments(**values)
    if arguments.n_gpu > 1:
        raise CommandError(
            f"{arguments.n_gpu} GPUs are visible, and this process trains on one",
            "choose it with CUDA_VISIBLE_DEVICES=0, or start several processes with torchrun (docs/distributed.md)",
        )
    return arguments
