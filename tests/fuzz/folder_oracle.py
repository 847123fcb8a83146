"""Opens a folder of `folder_cases` and holds what comes of it against docs/format.md, read without the library.

Opening may raise `ValueError` or `OSError` with a path in this folder, and then leaves every file as it was, or as
far put back as the journal says. Or it gives the rows of the manifest's commit, and from there on the table trains,
commits and opens again. Where opening can't tell (docs/format.md, "What a crash leaves"), `check_table` must.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from folder_cases import (
    JOURNAL,
    LOCK,
    MANIFEST,
    NEW_MANIFEST,
    NEW_STATE,
    NEW_TABLE,
    STATE,
    STATE_WIDTH,
    TABLE,
    Case,
    D,
    Files,
    N,
    files_of,
    history,
    open_table,
)
from forge import HEADER_BYTES, Refused, undone, whole_records
from tables import slow_row_hash

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.upkeep.check import check_table

# A thousand times what opening so small a table takes.
HANGS_AFTER_SECONDS = 30

T = TypeVar("T")


def open_case(case: Case) -> str:
    """Opens it to read and to write, trains on it and opens it again. Says what came of it; `AssertionError` for
    what must not."""
    with _no_hang(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = _open_to_read(case)
        # Reading has changed nothing, so this is still the same folder.
        written = _open_to_write(case)
    for name, raw in case.outside.items():
        # The table may lie on another disk, and a hard link to it or to a state is the file itself.
        if name not in (f"outside {TABLE}", f"outside {STATE}"):
            assert (case.folder.parent / name).read_bytes() == raw, f"{name} was written to"
    beside = {path.name for path in case.folder.parent.iterdir()} - {case.folder.name}
    assert beside == set(case.outside), "something was made outside of the folder"
    return f"{read} to read, {written} to write"


def _open_to_read(case: Case) -> str:
    before = _everything(case)
    try:
        table = _named(case, lambda: open_table(case.folder, "r"))
        if table is None:
            return "refused"
        expected = expect(files_of(case.folder), write=False)
        assert table.weight.numpy().tobytes() == expected.files[TABLE], "rows that aren't the manifest's commit"
        _assert_promise(case, expected)
        table.close()
        return "opened"
    finally:
        assert _everything(case) == before, "mode r has changed something"


def _open_to_write(case: Case) -> str:
    before = files_of(case.folder)
    table = _named(case, lambda: open_table(case.folder, "r+"))
    if table is None:
        _assert_left_alone(case, before)
        return "refused"
    with contextlib.closing(table):
        finished = files_of(case.folder).get(MANIFEST) if MANIFEST not in before else None
        expected = expect(before, write=True, finished=finished) if TABLE in before else new_table(before)
        assert table.weight.numpy().tobytes() == expected.files[TABLE], "rows that aren't the manifest's commit"
        _assert_promise(case, expected)
        has_state = _open_state(case, table, expected)
        rows = table.weight.numpy().copy()
        table.write(torch.tensor([1]), torch.ones(1, D))
        done = _named(case, lambda: table.commit(step=99) or True)
    if not done:  # its temporary can't be written: what wasn't committed is undone
        again = open_table(case.folder, "r+")
        assert again.weight.numpy().tobytes() == rows.tobytes(), "a commit that failed left something"
        again.close()
        return "opened, not committed"
    rows[1] = 1.0
    with contextlib.closing(open_table(case.folder, "r")) as again:
        assert again.weight.numpy().tobytes() == rows.tobytes(), "a commit isn't there any more"
        assert again.committed_step == 99
    wrong = {finding.kind for finding in check_table(case.folder / TABLE).findings if finding.is_wrong}
    lengths = {TABLE: N * D * 4, **{entry["file"]: N * entry["width"] * 4 for entry in expected.states.values()}}
    whole = {name: raw for name, raw in expected.files.items() if len(raw) == lengths[name]}
    assert ("checksum" in wrong) != expected.is_committed(whole), f"verify finds {wrong}"
    assert ("state" in wrong) == (set(whole) != set(lengths)), f"verify finds {wrong}"
    assert not wrong - {"checksum", "state", "not finite"}, f"verify finds {wrong}"
    return "opened" if has_state else "opened without its state"


def _open_state(case: Case, table: MMapEmbeddingStorage, expected: Expected) -> bool:
    state = _named(case, lambda: table.open_state("adam", STATE_WIDTH))
    if state is None:
        return False
    entry = expected.states.get("adam")
    values = state.values.numpy().tobytes()
    assert values == (expected.files[entry["file"]] if entry else bytes(len(values))), "state of another commit"
    return True


def _named(case: Case, call: Callable[[], T]) -> T | None:
    """None where it was refused, by an error that says which file it is about."""
    try:
        return call()
    except (ValueError, OSError) as error:
        refused = error
    assert str(case.folder) in f"{refused} {getattr(refused, 'filename', '')}", f"which file? {refused!r}"
    return None


def _everything(case: Case) -> list[Any]:
    """What lies in the folder, links and pipes as such."""
    found: list[Any] = []
    for path in sorted(case.folder.iterdir()):
        link = os.readlink(path) if path.is_symlink() else None
        found.append((path.name, path.lstat().st_mode, link, path.read_bytes() if path.is_file() else None))
    return found


@contextlib.contextmanager
def _no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError("this would have waited forever")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# What is right


@dataclass
class Expected:
    """A table as an opening must find it."""

    manifest: dict[str, Any]
    files: Files
    """The table, and the states that the manifest lists and that are there."""

    @property
    def states(self) -> dict[str, Any]:
        return dict(self.manifest.get("states", {}))

    def is_committed(self, files: Files | None = None) -> bool:
        """Whether the files have the manifest's checksums, as far as it has some."""
        sums = {entry["file"]: entry.get("checksums") for entry in self.states.values()}
        sums[TABLE] = self.manifest.get("checksums")
        files = self.files if files is None else files
        return all(sums[name] is None or checksums(raw) == sums[name] for name, raw in files.items())


@functools.lru_cache(4096)
def checksums(raw: bytes) -> list[str]:
    """All rows are in one block."""
    row_bytes = len(raw) // N
    rows = [raw[at : at + row_bytes] for at in range(0, N * row_bytes, row_bytes)] if row_bytes else []
    return [f"{sum(slow_row_hash(row_id, row) for row_id, row in enumerate(rows)) % 2**64:016x}"]


def expect(before: Files, *, write: bool, finished: bytes | None = None) -> Expected:
    """Of a folder in which the table is there; `finished` is a left manifest that was given its name. Raises
    `AssertionError` where it should have been refused."""
    expected = Expected(_manifest(before, finished), {TABLE: before[TABLE]})
    manifest = expected.manifest
    assert (manifest["rows"], manifest["width"], manifest["dtype"]) == (N, D, "float32")
    assert len(before[TABLE]) == N * D * 4
    listed = [entry["file"] for entry in expected.states.values()]
    expected.files.update({name: before[name] for name in listed if name in before})
    try:
        after = _undone(before, expected)
    except Refused:
        raise AssertionError("this journal must be refused") from None
    assert write or after == expected.files, "mode r has opened rows that have to be undone"
    expected.files = after
    return expected


def _undone(before: Files, expected: Expected) -> Files:
    commit = int(expected.manifest.get("commit") or "0", 16)
    generation = expected.manifest.get("generation", 0)
    return undone(before.get(JOURNAL, b""), generation, commit, N, expected.files, expected.is_committed)


def _manifest(before: Files, finished: bytes | None) -> dict[str, Any]:
    if MANIFEST in before:
        return dict(json.loads(before[MANIFEST]))
    if finished is not None:
        values = dict(json.loads(finished))
        assert finished == before[NEW_MANIFEST], "a manifest from nowhere"
        assert not values.get("generation"), "a new table has no commits"
        assert values["checksums"] == checksums(before[TABLE]), "a manifest of another table"
        return values
    return {"rows": N, "width": D, "dtype": "float32"}


def new_table(before: Files) -> Expected:
    """Where there was none."""
    assert MANIFEST not in before, "a manifest without its table must be refused"
    first = next(iter(history().commits.values()))
    return Expected({}, {TABLE: first[TABLE]})


def _assert_promise(case: Case, expected: Expected) -> None:
    """Nothing of the format's rules, only what they are for: where rows and journal are of one moment, or no more
    than the journal is damaged, an opening gives the manifest's commit."""
    commit = history().commits.get(expected.manifest.get("commit") or "")
    changed = set(case.changes) - {NEW_MANIFEST, NEW_TABLE, NEW_STATE, LOCK}
    is_finished = MANIFEST not in case.moment and NEW_MANIFEST in case.changes
    if commit is None or is_finished:  # a forged one of a new table may have any commit's mark
        return
    journal = case.moment.get(JOURNAL, b"")
    # A forged manifest may have lost its checksums.
    is_of_the_run = set(case.changes.get(MANIFEST, "").split()) <= {"moment"}
    if changed <= {MANIFEST} and is_of_the_run and (journal or not changed):
        assert expected.files == commit, f"rows of another commit: {case.changes}"
    path = case.folder / JOURNAL
    if changed == {JOURNAL} and set(case.changes[JOURNAL].split()) <= {"bytes", "empty", "absent"}:
        left = path.read_bytes() if path.is_file() else b""
        is_cut_between_records = journal.startswith(left) and (
            not left or (len(left) >= HEADER_BYTES and whole_records(left)[1] == len(left))
        )
        assert is_cut_between_records or expected.files == commit, "a damaged journal has hidden what to undo"


def _assert_left_alone(case: Case, before: Files) -> None:
    """After a refusal."""
    restored: Files = {}
    with contextlib.suppress(AssertionError, KeyError, ValueError, TypeError, AttributeError):
        finished = files_of(case.folder).get(MANIFEST) if MANIFEST not in before else None
        found = Expected(_manifest(before, finished), {TABLE: before[TABLE]})
        listed = [entry["file"] for entry in found.states.values()]
        found.files.update({name: before[name] for name in listed if name in before})
        try:
            restored = _undone(before, found)
        except Refused as refused:
            restored = refused.files
    after = files_of(case.folder)
    is_new = TABLE not in before and MANIFEST not in before
    for name, raw in before.items():
        if name == LOCK or (name.endswith(".tmp") and (is_new or name == NEW_MANIFEST)):
            continue  # taken over; a whole manifest of a new table is given its name
        assert after.get(name) in (raw, restored.get(name, raw)), f"{name} was changed by an opening that failed"
    made = set(after) - set(before) - {LOCK}
    allowed = {MANIFEST} if NEW_MANIFEST in before else set()
    if is_new and LOCK in case.changes:
        allowed = {TABLE, MANIFEST}  # the lock is taken when there is a table to lock
    assert made <= allowed, f"{made} made by an opening that failed"
