"""Folders of a table, whole, mixed and damaged, made from a string of bytes.

    history()          what a folder held after every call of a run that made a table, trained, committed and died
    make_case(bytes)   a folder of one such moment, in which files come from other moments or another table, are
                       missing, cut, longer, changed, forged with right checksums, or links, pipes and folders

The bytes are choices, so that a fuzzer which knows nothing but bytes finds its way, and a failure is repeated from
them alone. Bytes that have run out choose the first of everything: nothing changed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from disk_calls import half, watched
from forge import HEADER_BYTES, Old, forged_journal, whole_records

from sense_v2.engram.storage import MMapEmbeddingStorage

N, D, STATE_WIDTH = 24, 4, 2
TABLE, STATE, MANIFEST = "engram_table.dat", "engram_table.adam.dat", "engram_table.json"
JOURNAL, LOCK = "engram_table.journal", "engram_table.lock"
NEW_TABLE, NEW_MANIFEST, NEW_STATE = TABLE + ".tmp", MANIFEST + ".tmp", STATE + ".tmp"
NAMES = (MANIFEST, JOURNAL, TABLE, STATE, NEW_MANIFEST, NEW_TABLE, NEW_STATE, LOCK)

Files = dict[str, bytes]


# A run


@dataclass
class History:
    """What a folder held after each call that changed something, and what each commit kept."""

    moments: list[Files] = field(default_factory=list)
    commits: dict[str, Files] = field(default_factory=dict)
    """By the manifest's `commit`: the table, and the state if the manifest lists it."""


@functools.cache
def history(seed: int = 0) -> History:
    """The same bytes each time. A run of another seed is another table of the same shape."""
    found = History()
    with quick_folder() as folder:

        def around(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
            if name in ("pwrite", "store"):
                half(name, call, arguments)
                found.moments.append(files_of(folder))
            result = call(*arguments)
            found.moments.append(files_of(folder))
            return result

        bits = random.Random(seed)
        with mock.patch("secrets.randbits", bits.getrandbits), watched(around), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _train(folder, found, seed)
    moments = found.moments
    found.moments = [moment for n, moment in enumerate(moments) if n == 0 or moment != moments[n - 1]]
    return found


def _train(folder: Path, found: History, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    table = open_table(folder, "r+", seed)
    _keep(found, folder)
    for step in range(4):
        if step == 1:
            state = table.open_state("adam", STATE_WIDTH)
        for _ in range(2):
            ids = torch.randperm(N, generator=chance)[:5]
            table.write(ids, torch.randn(5, D, generator=chance))
            if step >= 1:
                table.write_state(state, ids, torch.randn(5, STATE_WIDTH, generator=chance))
        if step < 3:
            table.commit(step=step, extra={"step": step})
            _keep(found, folder)
    table._let_go()  # as a process that dies does
    open_table(folder, "r+", seed).close()


def _keep(found: History, folder: Path) -> None:
    files = files_of(folder)
    manifest = json.loads(files[MANIFEST])
    listed = [TABLE, *(entry["file"] for entry in manifest["states"].values())]
    found.commits[manifest["commit"]] = {name: files[name] for name in listed}


def open_table(folder: Path, mode: str, seed: int = 0) -> MMapEmbeddingStorage:
    return MMapEmbeddingStorage(N, D, folder / TABLE, mode=mode, seed=seed)


def files_of(folder: Path) -> Files:
    """What there is to read, through links too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A temporary folder, in memory where there is some."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


# A case


class Choices:
    """Numbers from bytes, 0 when they have run out."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        size = 1 if count <= 256 else 2
        raw = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(raw, "little") % count

    def one_of(self, values: Iterable[Any]) -> Any:
        values = list(values)
        return values[self.below(len(values))]

    def some_bytes(self, count: int) -> bytes:
        return random.Random(self.below(256)).randbytes(count)


@dataclass
class Case:
    """A folder to open, and what is known of it."""

    folder: Path
    moment: Files
    """What it was made from."""
    changes: dict[str, str] = field(default_factory=dict)
    """By file, what isn't as at that moment."""
    outside: Files = field(default_factory=dict)
    """Files in the folder beside it, to which links lead: by name, what must stay in them."""

    def write(self, files: Files) -> None:
        self.folder.mkdir()
        for name, raw in files.items():
            (self.folder / name).write_bytes(raw)


def make_case(data: bytes, folder: Path) -> Case:
    """In `folder`, which is empty and has nothing beside it."""
    choices = Choices(data)
    moments = history().moments
    case = Case(folder / "table", moments[choices.below(len(moments))])
    files: dict[str, bytes | None] = {name: case.moment.get(name) for name in NAMES}
    for _ in range(choices.below(4)):
        name = choices.one_of(NAMES)
        change, files[name] = _changed(choices, name, files[name])
        if files[name] != case.moment.get(name):
            case.changes[name] = case.changes.get(name, "") + change + " "
    case.write({name: raw for name, raw in files.items() if raw is not None})
    if choices.below(8) == 7:
        _put_no_file(choices, case)
    return case


def _changed(choices: Choices, name: str, raw: bytes | None) -> tuple[str, bytes | None]:
    """(what was done, the file's bytes after it or None for no file)."""
    change = choices.one_of(("moment", "absent", "empty", "other", "bytes", "forged", "sibling"))
    if change == "moment":
        return change, choices.one_of(history().moments).get(name)
    if change == "absent":
        return change, None
    if change == "empty":
        return change, b""
    if change == "other":
        return change, choices.one_of(history(1).moments).get(name)
    if change == "sibling":
        return change, choices.one_of(history().moments).get(choices.one_of(NAMES))
    if change == "forged" and raw and name in (MANIFEST, NEW_MANIFEST):
        return change, _forged_manifest(choices, raw)
    if change == "forged" and raw and name == JOURNAL:
        return change, _forged_journal(choices, raw)
    return "bytes", _changed_bytes(choices, raw or b"")


def _changed_bytes(choices: Choices, raw: bytes) -> bytes:
    at = choices.below(len(raw) + 1)
    end = min(len(raw), at + 1 + choices.below(64))
    new = choices.some_bytes(1 + choices.below(80))
    how = choices.below(7)
    return (
        raw[:at],
        raw + bytes(1 + choices.below(300)),
        raw + new,
        raw[:at] + new[: end - at] + raw[at + len(new[: end - at]) :],
        raw[:at] + raw[end:],
        raw[:at] + bytes(end - at) + raw[end:],
        raw[:at] + bytes(byte ^ 1 << choices.below(8) for byte in raw[at : at + 1]) + raw[at + 1 :],
    )[how]


HOSTILE = (
    None, 0, 1, -1, 2**63 - 1, 2**63, 2**70, 1.5, True, "", "x", "../x", "/x", "a\0b", [], {}, [None], N, N + 1, D,
    STATE_WIDTH, STATE, TABLE, MANIFEST, JOURNAL, LOCK, NEW_TABLE, "float16", "float32", "big", "0" * 16, ["0" * 16],
    {"adam": {"file": TABLE, "width": D}}, {"adam": {"file": "../x", "width": 2}},
)  # fmt: skip


def _forged_manifest(choices: Choices, raw: bytes) -> bytes:
    try:
        values = json.loads(raw)
        others = [json.loads(moment[MANIFEST]) for moment in history().moments if MANIFEST in moment]
        owner = values
        state = values.get("states", {}).get("adam")
        if choices.below(2) and state is not None:
            owner, others = state, [other["states"].get("adam", {}) for other in others]
        name = choices.one_of([*owner, "unknown", "commit"])
        how = choices.below(3)
        if how == 0:
            owner[name] = choices.one_of(others).get(name)
        elif how == 1:
            owner[name] = choices.one_of(HOSTILE)
        else:
            owner.pop(name, None)
        return json.dumps(values).encode()
    except (ValueError, AttributeError, TypeError):  # it has been damaged before
        return raw


def _forged_journal(choices: Choices, raw: bytes) -> bytes:
    """With checksums that are right."""
    if len(raw) < HEADER_BYTES:
        return raw
    generation, commit, salt, num_rows = struct.unpack("<8x4Q8x", raw[:HEADER_BYTES])
    records, _ = whole_records(raw)
    how = choices.below(8)
    if how == 0:
        generation = choices.one_of((0, 1, 2, 3, 4, 2**64 - 1))
    elif how == 1:
        commit = choices.one_of([0, *(int(commit, 16) for commit in history().commits)])
    elif how == 2:
        num_rows = choices.one_of((0, N - 1, N + 1, 2**40))
    elif records:
        at = choices.below(len(records))
        one = records[at]
        if how == 3:
            del records[at]
        elif how == 4:
            records.insert(choices.below(len(records) + 1), one)
        elif how == 5:
            ids = list(one.row_ids)
            ids[choices.below(len(ids))] = choices.one_of((-1, N, 0, N - 1, 2**62, ids[0]))
            records[at] = Old(one.file, ids, one.rows)
        elif how == 6:
            name = choices.one_of((TABLE, STATE, MANIFEST, "../outside", "x", LOCK))
            records[at] = Old(name, one.row_ids, one.rows)
        else:
            row_bytes = choices.one_of((D * 4, STATE_WIDTH * 4, 1, 3))
            records[at] = Old(one.file, one.row_ids, [choices.some_bytes(row_bytes) for _ in one.row_ids])
    return forged_journal(generation, commit, num_rows, *records, salt=salt)


def _put_no_file(choices: Choices, case: Case) -> None:
    """A link, a pipe, a folder in place of a file."""
    name = choices.one_of(NAMES)
    what = choices.one_of(("link", "link to nothing", "hard link", "pipe", "folder"))
    path, outside = case.folder / name, case.folder.parent / f"outside {name}"
    raw = path.read_bytes() if path.exists() else b"outside"
    path.unlink(missing_ok=True)
    case.changes[name] = what
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "link to nothing":
        path.symlink_to(outside)
    else:
        outside.write_bytes(raw)
        case.outside[outside.name] = raw
        if what == "link":
            path.symlink_to(outside)
        else:
            os.link(outside, path)
