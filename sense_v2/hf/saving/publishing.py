"""Files that were built inside a folder -> their places in it: all of them, or none.

    folder/.saving-x7f3/…                 built and synced here: until the plan is there, the folder is as it was
    folder/.saving-x7f3/.publishing.json  the plan: which files come, and which leave. From here on it goes forward
    folder/.saving-x7f3/.replaced/…       what was in their places, until all is done

What the plan says is a few renames. A notice takes the place of config.json first, and the new one comes last: in
between whatever opens the folder as a model is refused. (A class of transformers opens one without config.json, with
sizes of its own.) An error puts everything back. After a kill the next caller goes on with the plan
(`finish_interrupted`), which can be repeated.

A run that goes on with a saved model works on it in a folder inside, too (`take_out`): the notice stays, and so does
a plan that brings the model back. It holds until the model is another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sense_v2.core.errors import CommandError, with_way_out
from sense_v2.core.folders import missing_folders, remove_empty
from sense_v2.engram.table.disk import sync, write_file
from sense_v2.engram.table.platform import LOCK_IS_HELD, NO_LOCKS, lock, open_folder

PREFIX = ".saving-"
PLAN_FILE = ".publishing.json"
REPLACED = ".replaced"
NOTICE_FILE = ".notice"
MODEL_FILE = "config.json"
NOTICE = (
    "The files of a model are on their way to this folder, or a training goes on with them. Nothing is lost: "
    "sense_v2.hf.from_pretrained(FOLDER), or saving to it again, moves the rest; a training that ended early goes on "
    "with `sense-engram train --resume --output FOLDER`.\n"
)


@contextmanager
def locked_folder(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder's lock; give False where the system or its file system has none. Raises `CommandError` if another
    process holds it."""
    fd, is_held = open_folder(folder), True
    if fd is None:
        yield False
        return
    try:
        try:
            lock(fd, wait=wait)
        except OSError as error:
            if error.errno in LOCK_IS_HELD:
                what = f"{folder}: another process is at work there"
                raise CommandError(what, "wait for it, or end it") from error
            if error.errno not in NO_LOCKS:
                raise
            is_held = False
        yield is_held
    finally:
        os.close(fd)


@contextmanager
def built_inside(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside `folder` to build in, which is made; both are gone again if nothing came of them.

    What a process that died left there is finished, or removed.
    """
    made = missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_interrupted(folder)
    for left in folder.glob(f"{PREFIX}*"):
        with suppress(CommandError, FileNotFoundError), locked_folder(left) as is_held:
            if is_held:
                shutil.rmtree(left, ignore_errors=True)
    try:
        staging = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        with locked_folder(staging):
            try:
                yield staging
            finally:
                if not (staging / PLAN_FILE).exists():
                    shutil.rmtree(staging, ignore_errors=True)
    finally:
        remove_empty(made)


def publish(staging: Path, folder: Path, new: Iterable[str], old: Iterable[str], *, gate: str = MODEL_FILE) -> None:
    """Move `new` from `staging` to `folder`, and `old`, and whatever is in a new one's place, out of it.

    The caller holds the folder's lock.

    Args:
        staging: Inside `folder`.
        folder: Where they go.
        new: Files or folders, relative to `staging`; the gate is one of them.
        old: Files or folders that leave, relative to `folder`.
        gate: The file without which nobody opens the folder.
    """
    assert (staging / gate).exists(), "a folder gets a whole model"
    replaced, model = staging / REPLACED, folder / gate
    (replaced / gate).parent.mkdir(parents=True, exist_ok=True)
    (replaced / gate).unlink(missing_ok=True)  # of an attempt that was taken back
    if model.exists():
        shutil.copyfile(model, replaced / gate)
    coming = sorted(set(new), key=lambda name: (name == gate, name))
    leaving = {name for name in (*coming, *old) if (folder / name).exists()} - {gate}
    plan = {"new": coming, "old": sorted(leaving)}
    for path in [path for name in coming for path in _files(staging / name)]:
        sync(path)
    (staging / NOTICE_FILE).write_text(NOTICE, encoding="utf-8")
    write_file(staging / PLAN_FILE, json.dumps(plan))
    began: list[tuple[Path, Path]] = []
    try:
        for source, target in _left(staging, folder, plan):
            began.append((source, target))
            _move(source, target)
    except BaseException:
        if began and (staging / gate).exists():
            _put_back(began, replaced / gate)
        os.unlink(staging / PLAN_FILE)
        raise
    for changed in {target.parent for _, target in began}:
        sync(changed)
    os.unlink(staging / PLAN_FILE)


def take_out(folder: Path, staging: Path, names: Iterable[str], *, until: str, held: str) -> None:
    """Move a saved model's parts from `folder` to `staging`, to change them there.

    As long as they aren't changed, the next caller brings them back, unless a living process holds the lock.

    Args:
        folder: Of the model.
        staging: Inside `folder`.
        names: Files or folders, relative to `folder`; config.json isn't one of them, and goes with them.
        until: The file that tells whether the model is the same.
        held: The one of `names` whose lock the caller holds.
    """
    names = [name for name in names if (folder / name).exists()]
    with locked_folder(folder, wait=True):
        shutil.copyfile(folder / MODEL_FILE, staging / MODEL_FILE)
        sync(staging / MODEL_FILE)
        (staging / NOTICE_FILE).write_text(NOTICE, encoding="utf-8")
        back = {"until": until, "is": _digest(folder / until), "held": held}
        write_file(staging / PLAN_FILE, json.dumps({"new": [*names, MODEL_FILE], "old": [], "back": back}))
        _move(staging / NOTICE_FILE, folder / MODEL_FILE)
        for name in names:
            _move(folder / name, staging / name)


def is_notice(path: Path) -> bool:
    """True if the file is the notice that stands in the place of config.json while a folder is no model."""
    return path.is_file() and path.stat().st_size == len(NOTICE) and path.read_text(encoding="utf-8") == NOTICE


def _put_back(began: list[tuple[Path, Path]], old_model: Path) -> None:
    """Undo what was begun of a plan. Whatever fails here leaves the plan, and all files of both."""
    (notice, model), *moves = began
    for source, target in reversed(moves):
        if not source.exists():
            os.replace(target, source)
    if old_model.exists():
        os.replace(old_model, model)
    elif not notice.exists():
        os.unlink(model)


def files_in(staging: Path) -> list[str]:
    """The names of all files in a folder and the folders in it, relative to it."""
    return [str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()]


def finish_interrupted(folder: Path) -> list[Path]:
    """Go on with what processes that were killed left in `folder`, and return the folders inside it that did;
    waits for one that publishes.

    Raises `OSError` if the folder can't be written to, `ValueError` if a plan names files outside of it.
    """
    finished = []
    for path in folder.glob(f".*/{PLAN_FILE}"):
        with locked_folder(folder, wait=True), suppress(CommandError):  # at work with what was taken out
            if path.is_file():  # else another process has finished
                _finish(path.parent, folder, _read_plan(path))
                finished.append(path.parent)
    return finished


def _read_plan(path: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    back = plan.get("back", {"held": ".", "until": "."})
    for name in map(Path, (*plan["new"], *plan["old"], back["held"], back["until"])):
        if name.is_absolute() or ".." in name.parts:
            raise with_way_out(
                ValueError(f"{path} names a file outside of its folder ({str(name)!r})"), f"remove {path.parent}"
            )
    return plan


def _finish(staging: Path, folder: Path, plan: dict[str, Any]) -> None:
    """Go on with a plan; one that brings back what was taken out is dropped if that has changed. Raises
    `CommandError` while a process works on what was taken out."""
    back = plan.get("back")
    with ExitStack() as alone:
        if back is not None:
            held, until = (
                next((place / back[part] for place in (staging, folder) if (place / back[part]).exists()), staging)
                for part in ("held", "until")
            )
            alone.enter_context(locked_folder(held))
        # Without the notice nothing was moved yet, or another model has come.
        if back is None or (is_notice(folder / plan["new"][-1]) and _digest(until) == back["is"]):
            for source, target in _left(staging, folder, plan):
                _move(source, target)
        os.unlink(staging / PLAN_FILE)
        if back is None or not (staging / back["held"]).exists():
            shutil.rmtree(staging, ignore_errors=True)


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _left(staging: Path, folder: Path, plan: dict[str, Any]) -> list[tuple[Path, Path]]:
    """What is left of a plan, as (from, to)."""
    notice = (staging / NOTICE_FILE, folder / plan["new"][-1])
    coming = [(staging / name, folder / name) for name in plan["new"]]
    # What has come already lies in the place of what has left.
    arrived = {target for source, target in coming if not source.exists()}
    leaving = [(folder / name, staging / REPLACED / name) for name in plan["old"] if folder / name not in arrived]
    return [(source, target) for source, target in (notice, *leaving, *coming) if source.exists()]


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _files(path: Path) -> list[Path]:
    """A file; or a folder and all that is in it, the innermost first."""
    return [*sorted(path.rglob("*"), reverse=True), path] if path.is_dir() else [path]
