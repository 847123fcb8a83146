"""Files that were built inside a folder -> their places in it: all of them, or none.

    folder/.saving-x7f3/…                 built and synced here: until the plan is there, the folder is as it was
    folder/.saving-x7f3/.publishing.json  the plan: which files come, and which leave. From here on it goes forward
    folder/.saving-x7f3/.replaced/…       what was in their places, until all is done

What the plan says is a few renames. A notice takes the place of config.json first, and the new one comes last: in
between whatever opens the folder as a model is refused. (A class of transformers opens one without config.json, with
sizes of its own.) An error puts everything back. After a kill the next caller goes on with the plan
(`finish_interrupted`), which can be repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from sense_v2.core.folders import missing_folders, remove_empty
from sense_v2.engram.table import platform
from sense_v2.engram.table.disk import sync, write_file

PREFIX = ".saving-"
PLAN_FILE = ".publishing.json"
REPLACED = ".replaced"
NOTICE_FILE = ".notice"
MODEL_FILE = "config.json"
NOTICE = (
    "A process ended while it moved the files of a model to this folder. Nothing is lost: "
    "sense_v2.hf.from_pretrained(FOLDER), or saving to it again, moves the rest.\n"
)


@contextlib.contextmanager
def built_inside(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside `folder` to build in, which is made; both are gone again if nothing came of them.

    What a process that died left there is removed.
    """
    made = missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{PREFIX}*"):
        with _locked(left, wait=False) as is_dead:
            if is_dead:
                shutil.rmtree(left, ignore_errors=True)
    try:
        staging = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        with _locked(staging):
            try:
                yield staging
            finally:
                if not (staging / PLAN_FILE).exists():
                    shutil.rmtree(staging, ignore_errors=True)
    finally:
        remove_empty(made)


def publish(staging: Path, folder: Path, new: Iterable[str], old: Iterable[str], *, gate: str = MODEL_FILE) -> None:
    """Move `new` from `staging` to `folder`, and `old`, and whatever is in a new one's place, out of it.

    Args:
        staging: Inside `folder`.
        folder: Where they go.
        new: Files or folders, relative to `staging`; the gate is one of them.
        old: Files or folders that leave, relative to `folder`.
        gate: The file without which nobody opens the folder.
    """
    assert (staging / gate).exists(), "a folder gets a whole model"
    replaced, model = staging / REPLACED, folder / gate
    replaced.mkdir()
    if model.exists():
        shutil.copyfile(model, replaced / gate)
    (staging / NOTICE_FILE).write_text(NOTICE, encoding="utf-8")
    coming = sorted(set(new), key=lambda name: (name == gate, name))
    leaving = {name for name in (*coming, *old) if (folder / name).exists()} - {gate}
    plan = {"new": coming, "old": sorted(leaving)}
    for path in [path for name in coming for path in _files(staging / name)]:
        sync(path)
    with _locked(folder):
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


def finish_interrupted(folder: Path) -> None:
    """Go on with what a process that was killed while it published left in `folder`; waits for one that is alive.

    Raises `OSError` if the folder can't be written to.
    """
    if any(folder.glob(f".*/{PLAN_FILE}")):
        with _locked(folder):
            for path in folder.glob(f".*/{PLAN_FILE}"):
                for source, target in _left(path.parent, folder, json.loads(path.read_text(encoding="utf-8"))):
                    _move(source, target)
                os.unlink(path)
                shutil.rmtree(path.parent, ignore_errors=True)


def _left(staging: Path, folder: Path, plan: dict[str, list[str]]) -> list[tuple[Path, Path]]:
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


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder; False if another holds it. Where the file system has none, everybody has it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            platform.lock(fd, wait=wait)
        except OSError as error:
            yield error.errno not in platform.LOCK_IS_HELD
        else:
            yield True
    finally:
        os.close(fd)
