"""A model's folder that is whole or as it was: a run works in a folder inside it.

    runs/train/.training-x7f3/…     while it trains: table, optimizer state, shadow map, then the weights
    runs/train/…                    when all of it is there, by renames

The inner folder is inside and not beside, so that both are on one disk. Whatever ends the run before, what the outer
folder held stays. The inner folder is removed if nothing could go on from it. After a kill, or with a checkpoint in
it, it stays: `--resume` goes on there, and another run names it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sense_v2.core.errors import NO_ROOM, CommandError, one_line
from sense_v2.core.folders import missing_folders, remove_empty
from sense_v2.hf.data.streaming import STREAM_FILE
from sense_v2.hf.saving.folder import MEMORY_FOLDER

PREFIX = ".training-"
RESUMED = f"{PREFIX}resumed"
STATE_FOLDER = "training"
"""What a run goes on from: how it was called (RUN_FILE), and its last checkpoints."""
RUN_FILE = "run.json"
# What an earlier model may have left where the new one has no file of that name.
_PARTS = (
    MEMORY_FOLDER,
    STATE_FOLDER,
    "model*.safetensors*",
    "*tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
)
_MODEL = "config.json"


@contextmanager
def staged_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Gives an empty folder inside `output`; when the block ends well, its content takes its place in `output`.

    Files in `output` that belong to no model stay. Raises `CommandError` where a model is there and `force` isn't
    given, and where the folder can't be written to.
    """
    _refuse_model(output, force)
    made = missing_folders(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for left in output.glob(f"{PREFIX}*"):
            warnings.warn(
                f"{left} is from a run that ended early, or that is still at work; --resume goes on with it",
                UserWarning,
                stacklevel=3,
            )
        staging = Path(tempfile.mkdtemp(prefix=PREFIX, dir=output))
    except OSError as error:
        remove_empty(made)
        raise CommandError(
            f"can't write to {output}: {error.strerror} ({error.filename})",
            "choose another --output, or make that one writable",
        ) from error
    try:
        with _published(staging):
            yield staging
    finally:
        if not _steps(staging):
            shutil.rmtree(staging, ignore_errors=True)
        remove_empty(made)


@contextmanager
def resumed_folder(output: Path) -> Iterator[Path]:
    """Gives the folder inside `output` in which a run that ended early can go on; when the block ends well, its
    content takes its place in `output`.

    A run that was stopped and saved is taken out of `output` for that: until it is saved again, no model is there.
    Raises `CommandError` where there is no such run, or several.
    """
    staging = output / RESUMED
    parts = (_MODEL, MEMORY_FOLDER, STATE_FOLDER)
    was_saved = (output / STATE_FOLDER / RUN_FILE).is_file()
    if was_saved:
        staging.mkdir(exist_ok=True)
        # The state comes last: a kill in between leaves it where the next call looks for it.
        _move(parts, output, staging)
    found = [path.parent.parent for path in output.glob(f"{PREFIX}*/{STATE_FOLDER}/{RUN_FILE}")]
    if not found:
        raise CommandError(
            f"{output} holds no run that could go on"
            + (": the model there took all its steps" if (output / _MODEL).is_file() else ""),
            "leave --resume out; `sense-engram train` leaves one when it is stopped (Ctrl-C), killed, or fails",
        )
    if len(found) > 1:
        raise CommandError(
            f"{output} holds {len(found)} runs that ended early: {', '.join(sorted(path.name for path in found))}",
            "remove all but the one to go on with",
        )
    began = _steps(found[0])
    try:
        with _published(found[0]):
            yield found[0]
    except BaseException:  # what is there isn't removed: another process may be at work on it
        if was_saved and _steps(found[0]) == began:  # it got no further, so the model that is there can stay
            _move(parts[::-1], found[0], output)
            shutil.rmtree(found[0], ignore_errors=True)
        raise


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            os.replace(source / name, target / name)


def remove_state(staging: Path) -> None:
    """Remove what a run goes on from, once it has taken all its steps. What reporters wrote there stays."""
    state = staging / STATE_FOLDER
    for path in [*state.glob("checkpoint-*"), state / RUN_FILE]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    remove_empty([state])


def _steps(staging: Path) -> list[str]:
    """The checkpoints of a run that were written to their end."""
    return sorted(path.parent.name for path in staging.glob(f"{STATE_FOLDER}/checkpoint-*/{STREAM_FILE}"))


@contextmanager
def _published(staging: Path) -> Iterator[None]:
    """Moves the content of `staging` to the folder that it is in, when the block ends well."""
    yield
    _publish(staging, staging.parent)
    shutil.rmtree(staging, ignore_errors=True)


def reserve(staging: Path, size_bytes: int, output: Path) -> Path:
    """Takes the room that the weights will need, before hours of training; remove the file before they are written.

    Raises `CommandError` where there is too little.
    """
    path = staging / "reserved"
    with open(path, "wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size_bytes, 1))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            os.ftruncate(file.fileno(), 0)
            free_bytes = shutil.disk_usage(staging).free
            raise CommandError(
                f"the model's weights need {size_bytes} bytes in {output}, {free_bytes} are free: {error.strerror}",
                "make room, allow larger files (ulimit -f), or choose another --output",
            ) from error
    return path


def _refuse_model(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise CommandError(f"{output} is a file, and --output is a folder", "choose another --output")
    found = [name for name in (_MODEL, MEMORY_FOLDER) if (output / name).exists()]
    if found and not force:
        what = "a trained memory" if MEMORY_FOLDER in found else "a model"
        raise CommandError(
            f"{output} holds {what} already ({one_line(', '.join(found))})",
            "choose another --output, or start over with --force, which replaces it when the new one is trained"
            + (
                "; --resume goes on with it, which was stopped"
                if (output / STATE_FOLDER / RUN_FILE).is_file()
                else ""
            ),
        )


def _publish(staging: Path, output: Path) -> None:
    """Moves what was there aside and the new in. config.json leaves first and comes last: a kill in between leaves
    no model, and never a mixture of two."""
    replaced = staging / ".replaced"
    new = sorted(path.name for path in staging.iterdir())
    old = {name for name in (*new, _MODEL) if (output / name).exists()}
    old |= {path.name for part in _PARTS for path in output.glob(part)}
    replaced.mkdir()
    for name in sorted(old, key=lambda name: name != _MODEL):
        os.replace(output / name, replaced / name)
    for name in sorted(new, key=lambda name: name == _MODEL):
        os.replace(staging / name, output / name)
