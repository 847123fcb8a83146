"""A model's folder that is whole or as it was: everything is made in a folder inside it, and moved at the end.

    runs/train/.training-x7f3/…     while it trains: table, optimizer state, shadow map, then the weights
    runs/train/…                    when all of it is there, by renames

Inside, and not beside, so that both are on one disk. Whatever ends the run before, what the folder held stays, and
the inner folder is removed; only a kill leaves it, and the next run names it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sense_v2.cli.errors import NO_ROOM, CommandError, one_line
from sense_v2.cli.folders import missing_folders, remove_empty
from sense_v2.hf.pretrained import MEMORY_FOLDER

PREFIX = ".training-"
# What an earlier model may have left where the new one has no file of that name.
_PARTS = (MEMORY_FOLDER, "model*.safetensors*", "*tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")
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
                f"{left} is from a run that was killed, or that is still at work", UserWarning, stacklevel=2
            )
        staging = Path(tempfile.mkdtemp(prefix=PREFIX, dir=output))
    except OSError as error:
        remove_empty(made)
        raise CommandError(
            f"can't write to {output}: {error.strerror} ({error.filename})",
            "choose another --output, or make that one writable",
        ) from error
    try:
        yield staging
        _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        remove_empty(made)


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
            f"{output} holds {what} already ({one_line(', '.join(found))}), and this version can't resume a run",
            "choose another --output, or start over with --force, which replaces it when the new one is trained",
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
