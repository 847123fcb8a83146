"""A Trainer's checkpoint folder <-> the memory at that step.

    checkpoint-N/              what the Trainer writes: weights, optimizer, schedule, random states
    checkpoint-N/engram/       what is written here, as in a saved model (`saving/folder.py`); with the table
        engram_table.*         copied ("copy"), or
        table_reference.json   named by the commit it had then ("reference"), or
        rows_in_table.json     left where it is, at the checkpoint's step ("stay"), or
        overlay.safetensors    where an overlay is trained: its rows and their optimizer states, and no table

The table has one state, and training goes on in it. A copy can be gone back to at any time. A reference takes no
room, and holds only as long as its commit is the table's last: it is refused once another one has followed, never
taken for the rows it named. With "stay" the table's commit comes after all files of the checkpoint, so that a run
that keeps two checkpoints finds the one that fits its table whatever moment it was killed at.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.engram.table.disk import sync
from sense_v2.hf.memory import EngramMemory, memory_of
from sense_v2.hf.saving.folder import (
    CONFIG_FILE,
    MEMORY_FOLDER,
    OVERLAY_FILE,
    REFERENCE_FILE,
    TABLE_FILE,
    read_reference,
)
from sense_v2.hf.saving.save import save_memory

TABLES = ("copy", "reference", "stay")
IN_TABLE_FILE = "rows_in_table.json"


def write_checkpoint(model: PreTrainedModel, checkpoint: Path, *, table: str, states: bool = True) -> None:
    """Writes `checkpoint/engram`; the table must have nothing uncommitted. `states` False leaves the optimizer states
    out: good for going back to these rows, not for training on."""
    folder = checkpoint / MEMORY_FOLDER
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    memory = memory_of(model)
    # A table under an overlay, or a released one, is the same in all checkpoints.
    stays = memory.is_released or memory.table is not memory.storage
    if table == "stay" and not stays:  # before the rest: without it, the rest would be a checkpoint with its own rows
        folder.mkdir(exist_ok=True)
        step = {"step": step_of(checkpoint)}
        (folder / IN_TABLE_FILE).write_text(json.dumps(step) + "\n", encoding="utf-8")
    save_memory(memory, folder, table="stay" if stays else table, states=states)


def sync_checkpoint(checkpoint: Path) -> None:
    """Make all files of a checkpoint durable."""
    for path in [*checkpoint.rglob("*"), checkpoint, checkpoint.parent]:
        sync(path)


def step_of(checkpoint: Path) -> int:
    """Read the step off a checkpoint's name.

    >>> step_of(Path("runs/mine/checkpoint-300"))
    300
    """
    return int(checkpoint.name.rpartition("-")[2])


def fits_table(memory: EngramMemory, checkpoint: Path) -> bool:
    """Return True if the rows of the checkpoint can be had: its own, or those of the table as it is committed."""
    folder = checkpoint / MEMORY_FOLDER
    if not (folder / IN_TABLE_FILE).is_file():
        return (folder / CONFIG_FILE).is_file()
    return memory.storage.committed_step == step_of(checkpoint)


def restore_rows(memory: EngramMemory, checkpoint: Path) -> None:
    """Makes the table's rows and optimizer states those of the checkpoint.

    Raises `FileNotFoundError` for a checkpoint without memory and `ValueError` for one whose rows are gone, damaged,
    or of another table; nothing has changed then.
    """
    folder = checkpoint / MEMORY_FOLDER
    if not (folder / CONFIG_FILE).is_file():
        raise with_way_out(
            FileNotFoundError(
                f"{folder / CONFIG_FILE} isn't there: the checkpoint was saved without an EngramCallback, or saving "
                "was cut off"
            ),
            "Resume from an earlier one: trainer.train(resume_from_checkpoint=FOLDER)",
        )
    storage = memory.storage
    if storage is not memory.table:
        storage.restore_from(folder / OVERLAY_FILE)
        return
    if memory.is_released:  # its rows are what they were
        return
    if (folder / IN_TABLE_FILE).is_file():
        if not fits_table(memory, checkpoint) or storage.updates != storage.manifest.updates:
            raise with_way_out(
                ValueError(
                    f"{checkpoint} has no rows of its own: they are in {storage.path}, which has gone on since then "
                    f"(step {storage.manifest.step})"
                ),
                "Resume from the checkpoint of that step",
            )
        return
    if not (folder / REFERENCE_FILE).is_file():
        storage.restore_from(folder / TABLE_FILE)
        return
    named, manifest = read_reference(folder / REFERENCE_FILE), storage.manifest
    if named["commit"] != manifest.commit or storage.updates != manifest.updates:
        raise with_way_out(
            ValueError(
                f"{checkpoint} names its rows by reference: {named['storage_path']} as committed at step "
                f"{named['step']}. {storage.path} has gone on since then (step {manifest.step}), and rows that "
                "changed can't be had back"
            ),
            "Resume from the last checkpoint, or train with EngramCallback(checkpoints='copy')",
        )
