"""A run of `train` between two steps <-> a file, from which it goes on bit for bit.

    folder/step-300.safetensors    the weights that are trained, AdamW's state, buffers, the random generator;
                                   the place in the data and the history of the run

The rows and their optimizer's state are in the table, as committed at that step, and aren't copied. So the file is
written just before the table's commit, beside that of the commit before: whichever of the two the table is found at
after a kill, its file is there. What is older is removed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import AdamW
from transformers import PreTrainedModel

from sense_v2.engram.table.disk import sync
from sense_v2.hf.memory import attached_memory
from sense_v2.hf.training.plain_loop import History

_NAME = re.compile(r"step-(\d+)\.safetensors")
_RNG = "random_state"


class Resumable(Protocol):
    """Batches that can say where they stand: `Batches` of a text in memory, `StreamBatches` of one that isn't."""

    def __iter__(self) -> Iterator[torch.Tensor]: ...

    def state_dict(self, num_batches: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Where they stand after the first `num_batches`: what JSON can hold, and tensors."""

    def load_state_dict(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """The next iteration goes on there. Raises `ValueError` where they are of another text."""


def save_step(
    folder: Path,
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    history: History,
    batches: Resumable,
) -> None:
    """Writes the file of the last step in `history`; to be called before the table is committed at that step."""
    step = len(history.steps)
    data, data_tensors = batches.state_dict(step)
    tensors = {f"data.{name}": value for name, value in data_tensors.items()}
    tensors |= {f"weight.{name}": value for name, value in _trained(model, optimizers).items()}
    for number, optimizer in enumerate(optimizers):
        if isinstance(optimizer, AdamW):  # a row optimizer's state is the table's
            for parameter, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{parameter}.{name}": value for name, value in state.items()}
    tensors[_RNG] = torch.get_rng_state()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.safetensors"
    temporary = path.with_suffix(".tmp")
    metadata = {"history": json.dumps(dataclasses.asdict(history)), "data": json.dumps(data)}
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(folder)
    committed = _committed(model)
    for other, found in _steps(folder).items():
        if other not in (
            step,
            committed if committed is not None else max(_steps(folder).keys() - {step}, default=0),
        ):
            found.unlink()


def resumable_step(folder: Path, model: PreTrainedModel) -> int | None:
    """The step that a run can go on from: the table's last commit, or, without memory, the last file; None where
    there is no file of it."""
    steps = _steps(folder)
    step = max(steps, default=None) if attached_memory(model) is None else _committed(model)
    return step if step in steps else None


def load_step(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Resumable,
) -> History:
    """Gives weights, optimizers, the random generator and `batches` what `save_step` kept; returns the history.

    Raises `ValueError` where the file is of other weights or another text.
    """
    path = folder / f"step-{step}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    history = History(**json.loads(metadata["history"]))
    weights = _trained(model, optimizers)
    found = {name.removeprefix("weight."): value for name, value in tensors.items() if name.startswith("weight.")}
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in weights.items()}:
        differs = sorted(found.keys() ^ weights.keys()) or ["a shape"]
        raise ValueError(f"{path} is of another model or of other settings: {differs[0]} differs")
    data = {name.removeprefix("data."): value for name, value in tensors.items() if name.startswith("data.")}
    batches.load_state_dict(json.loads(metadata["data"]), data)
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(found[name])
    for number, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, AdamW):
            continue
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            kind, *rest = name.split(".", 3)
            if kind == "optimizer" and int(rest[0]) == number:
                state.setdefault(int(rest[1]), {})[rest[2]] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(tensors[_RNG])
    return history


def _trained(model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Parameters of the optimizers, and buffers that a model's state has, by name."""
    held = {parameter for one in optimizers for group in one.param_groups for parameter in group["params"]}
    kept = model.state_dict().keys()
    found = {name: value.data for name, value in model.named_parameters() if value in held}
    return found | {name: value for name, value in model.named_buffers() if name in kept}


def _committed(model: PreTrainedModel) -> int | None:
    memory = attached_memory(model)
    return None if memory is None else memory.storage.committed_step


def _steps(folder: Path) -> dict[int, Path]:
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("step-*.safetensors"))
    return {int(match[1]): path for path, match in found if match}
