"""A model's folder that is whole or as it was: a run works in a folder inside it.

    runs/train/.training-x7f3/…     while it trains: table, optimizer state, shadow map, then the weights
    runs/train/…                    when all of it is there, by renames

The inner folder is inside and not beside, so that both are on one disk. Whatever ends the run before, what the outer
folder held stays. The inner folder is removed if nothing could go on from it. After a kill, or with a checkpoint in
it, it stays: `--resume` goes on there, and another run names it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sense_v2.core.errors import NO_ROOM, CommandError, one_line
from sense_v2.core.folders import missing_folders, remove_empty
from sense_v2.engram.table.disk import write_file
from sense_v2.engram.table.format import manifest_name
from sense_v2.hf.data.streaming import STREAM_FILE
from sense_v2.hf.saving.folder import MEMORY_FOLDER, TABLE_FILE
from sense_v2.hf.saving.publishing import (
    PLAN_FILE,
    REPLACED,
    finish_interrupted,
    is_notice,
    locked_folder,
    publish,
    take_out,
)

PREFIX = ".training-"
RESUMED = f"{PREFIX}resumed"
STATE_FOLDER = "training"
"""What a run goes on from: how it was called (RUN_FILE), and its last checkpoints."""
RUN_FILE = "run.json"
TRAINED_FILE = ".trained.json"
"""The model is whole: it can take its place, and that of another model if "force" is true."""
# What an earlier model may have left where the new one has no file of that name.
_PARTS = (
    MEMORY_FOLDER,
    STATE_FOLDER,
    "corpus.json",
    "model*.safetensors*",
    "adapter_*",
    "*tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
)
_MODEL = "config.json"
_MANIFEST = f"{MEMORY_FOLDER}/{manifest_name(TABLE_FILE)}"
# What a run writes last.
_COMPLETE = "config.yaml"
# With any of these, --resume puts the model in its place.
_KEPT = (_COMPLETE, TRAINED_FILE, PLAN_FILE)


@contextmanager
def staged_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Gives an empty folder inside `output`; when the block ends well, its content takes its place in `output`.

    Files in `output` that belong to no model stay. Raises `CommandError` where a model is there and `force` isn't
    given, and where the folder can't be written to.
    """
    finish_interrupted(output)
    _refuse_model(output, force)
    made = missing_folders(output)
    with ExitStack() as held:
        try:
            output.mkdir(parents=True, exist_ok=True)
            with locked_folder(
                output, wait=True
            ):  # so that nobody takes the folder for a dead run's before it is locked
                left = [path for path in output.glob(f"{PREFIX}*") if not _is_removed(path)]
                staging = Path(tempfile.mkdtemp(prefix=PREFIX, dir=output))
                # Not the folder itself, which saving locks while it moves the model there.
                (staging / STATE_FOLDER).mkdir()
                held.enter_context(locked_folder(staging / STATE_FOLDER))
        except OSError as error:
            remove_empty(made)
            raise CommandError(
                f"can't write to {output}: {error.strerror} ({error.filename})",
                "choose another --output, or make that one writable",
            ) from error
        for path in left:
            warnings.warn(
                f"{path} is from a run that ended early, or that is still at work; --resume goes on with it",
                UserWarning,
                stacklevel=3,
            )
        try:
            yield staging
            remove_empty([staging / STATE_FOLDER])
            _publish(staging, output, force=force)
        finally:
            if not _steps(staging) and not any((staging / name).exists() for name in _KEPT):
                shutil.rmtree(staging, ignore_errors=True)
            remove_empty(made)


def _is_removed(staging: Path) -> bool:
    """Remove the folder of a run from which nothing could go on, if its process is gone. True if it was."""
    if _steps(staging) or (staging / _MODEL).exists() or staging.name == RESUMED:
        return False
    state = staging / STATE_FOLDER
    with suppress(CommandError), locked_folder(state if state.is_dir() else staging) as is_held:
        if is_held:
            shutil.rmtree(staging, ignore_errors=True)
    return not staging.exists()


@contextmanager
def resumed_folder(output: Path) -> Iterator[Path]:
    """Gives the folder inside `output` in which a run that ended early can go on; when the block ends well, its
    content takes its place in `output`.

    A run that was stopped and saved is taken out of `output` for that, and no model is there until it is saved again:
    its rows change. It is back if none had changed.
    Raises `CommandError` where there is no such run, or several, or another process is at work on it.
    """
    finished = any(path.name.startswith(PREFIX) for path in finish_interrupted(output))
    for file in output.glob(f"{PREFIX}*/{TRAINED_FILE}"):
        finished |= _publish(file.parent, output, force=json.loads(file.read_text(encoding="utf-8"))["force"])
    was_saved = (output / STATE_FOLDER / RUN_FILE).is_file()
    found = [path.parent.parent for path in output.glob(f"{PREFIX}*/{STATE_FOLDER}/{RUN_FILE}")]
    found += [output] if was_saved else []
    for path in output.glob(f"{PREFIX}*/{_COMPLETE}"):
        if not found:  # it was killed when there was nothing to go on with any more, and before the model was moved
            with locked_folder(path.parent):
                remove_state(path.parent)
                _publish(path.parent, output, force=True)  # or it would have been refused when it began
            finished = True
    if not found and finished:
        raise CommandError(
            f"{output} has the model that the run had trained in its place now, and no run that could go on",
            "use it, as with `sense-engram eval`",
        )
    if not found:
        raise CommandError(
            f"{output} holds no run that could go on"
            + (
                ": the model there took all its steps"
                if (output / _MODEL).is_file() and not is_notice(output / _MODEL)
                else ""
            ),
            "leave --resume out; `sense-engram train` leaves one when it is stopped (Ctrl-C), killed, or fails",
        )
    if len(found) > 1:
        raise CommandError(
            f"{output} holds {len(found)} runs that ended early: {', '.join(sorted(path.name for path in found))}",
            "remove all but the one to go on with",
        )
    staging = output / RESUMED if was_saved else found[0]
    staging.mkdir(exist_ok=True)
    with ExitStack() as alone:
        alone.enter_context(locked_folder(found[0] / STATE_FOLDER))
        try:
            if was_saved:
                take_out(output, staging, (MEMORY_FOLDER, STATE_FOLDER), until=_MANIFEST, held=STATE_FOLDER)
            yield staging
        except BaseException:
            alone.close()
            finish_interrupted(output)
            raise
        _publish(staging, output, force=True)


def remove_state(staging: Path) -> None:
    """Remove what a run goes on from, once it has taken all its steps: first what says that it could go on. What
    reporters wrote there stays."""
    state = staging / STATE_FOLDER
    (state / RUN_FILE).unlink(missing_ok=True)
    for path in state.glob("checkpoint-*"):
        shutil.rmtree(path)
    remove_empty([state])


def _steps(staging: Path) -> list[str]:
    """The checkpoints of a run that were written to their end."""
    return sorted(path.parent.name for path in staging.glob(f"{STATE_FOLDER}/checkpoint-*/{STREAM_FILE}"))


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


def _refuse_model(output: Path, force: bool, where: str = "") -> None:
    if output.exists() and not output.is_dir():
        raise CommandError(f"{output} is a file, and --output is a folder", "choose another --output")
    found = [name for name in (_MODEL, MEMORY_FOLDER) if (output / name).exists()]
    if found and not force:
        what = "a trained memory" if MEMORY_FOLDER in found else "a model"
        raise CommandError(
            f"{output} holds {what} already ({one_line(', '.join(found))}){where}",
            "choose another --output, or start over with --force, which replaces it when the new one is trained"
            + (
                "; --resume goes on with it, which was stopped"
                if any((place / STATE_FOLDER / RUN_FILE).is_file() for place in (output, output / RESUMED))
                else ""
            ),
        )


def _publish(staging: Path, output: Path, *, force: bool) -> bool:
    """Move what was there out and the new in, and remove what was there once all of the new is in place.

    A kill in between leaves no model, and never a mixture of two, and the next call for that folder finishes. What
    fails is taken back: the old model stays, and the new one in `staging`, from where --resume puts it in place. One
    process at a time does this; False if another has done it.
    """
    with locked_folder(output, wait=True):
        if not (staging / _MODEL).is_file():
            return False
        write_file(staging / TRAINED_FILE, json.dumps({"force": force}))
        _refuse_model(output, force, f"; the new one is in {staging}")  # another run may have ended meanwhile
        old = {path.name for part in _PARTS for path in output.glob(part)}
        try:
            publish(staging, output, [path.name for path in staging.iterdir() if path.name[0] != "."], old)
        except BaseException as error:
            if not (staging / _MODEL).exists():  # it has taken its place
                raise
            left = "what was there is as it was"
            if (staging / PLAN_FILE).exists():
                left = f"what was there is in {staging / REPLACED}, and can't be put back"
            what = f"{output}: the trained model can't take its place: {one_line(str(error))}"
            way_out = f"{left}. The new one is in {staging}; `sense-engram train --resume` puts it in place"
            if not isinstance(error, Exception):  # Ctrl-C
                warnings.warn(f"{output}: the trained model isn't in its place. {way_out}", UserWarning, stacklevel=4)
                raise
            raise CommandError(what, way_out) from error
        shutil.rmtree(staging, ignore_errors=True)
        return True
