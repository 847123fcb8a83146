"""Weights, their optimizer and the table of several ranks <-> what a run goes on from, at one step.

    commit            weights ──▶ FOLDER/weights-STEP, then the table's commit, which names that folder
    resume            the table's last commit ──▶ the weights it names

The table's commit is the commit of all: weights are on the disk before it, and those that it doesn't name are
forgotten. So whatever ends a run, `resume` finds weights and rows of one step.

    save_checkpoint   weights and a copy of the whole table ──▶ a folder that any number of ranks goes on from
    load_checkpoint   such a folder ──▶ the model, its optimizer, the rows

Weights go through torch.distributed.checkpoint, which saves what is sharded (FSDP2) by its owners and the same on
all ranks once, and loads into another number of ranks. FOLDER is one that all ranks see.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sense_v2.core.errors import with_way_out
from sense_v2.engram.ranks.range_copy import copy_table, restore_table
from sense_v2.hf.saving.folder import TABLE_FILE
from sense_v2.hf.training.ranks import table_of

WEIGHTS = "weights"


def commit(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path, step: int) -> None:
    """Keeps weights, their optimizer, rows and theirs together as of `step`, or nothing of it. By all ranks."""
    table, folder = table_of(model), Path(folder)
    name = f"{WEIGHTS}-{step}"
    _save_weights(model, optimizer, folder / name)
    table.commit(step, extra={WEIGHTS: name})
    if table.ranks.rank == 0:
        _remove_others(folder, name)


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> int:
    """Loads the weights that the table's last commit names, and returns its step; 0 before the first. By all ranks.

    Raises `FileNotFoundError` where they aren't in `folder`.
    """
    table, folder = table_of(model), Path(folder)
    name = table.committed_extra.get(WEIGHTS)
    if name is None:
        return 0
    if not (folder / name / ".metadata").is_file():
        raise with_way_out(
            FileNotFoundError(
                f"{folder / name} isn't there, and the table's last commit (step {table.committed_step}) was made "
                "with these weights"
            ),
            "Give the folder of that run, or begin from a checkpoint",
        )
    _load_weights(model, optimizer, folder / name)
    return int(table.committed_step or 0)


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Writes what was committed last, rows included, into a folder of its own. By all ranks, before a next step."""
    table, folder = table_of(model), Path(folder)
    _save_weights(model, optimizer, folder / WEIGHTS)
    copy_table(table, folder / TABLE_FILE)


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> int:
    """Makes weights, their optimizer and the table those of the checkpoint, and returns its step. By all ranks, of
    whatever number."""
    table, folder = table_of(model), Path(folder)
    restore_table(table, folder / TABLE_FILE)
    _load_weights(model, optimizer, folder / WEIGHTS)
    return int(table.committed_step or 0)


def _weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def _save_weights(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    with warnings.catch_warnings():
        # Alone it says that it takes itself to be alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled|.*no_dist")
        dcp.save(_weights(model, optimizer), checkpoint_id=folder, no_dist=not dist.is_initialized())


def _load_weights(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state = _weights(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled|.*no_dist")
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _remove_others(folder: Path, name: str) -> None:
    for other in folder.glob(f"{WEIGHTS}-*"):
        if other.name != name:
            shutil.rmtree(other, ignore_errors=True)
