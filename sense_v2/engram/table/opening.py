"""Opens a table: its files checked, whole, and as the last commit left them.

What stands between a path and a mapping, in the order in which it happens:

    create_table        where there is none: made whole, or not at all
    lock_table          one process writes
    checked_manifest    what is there is what the caller wants, or an error by field
    recover             what a dead writer stored after the last commit is undone; refuse_live_journal where that
                        isn't allowed
    make_state_ready    an optimizer state's file, when one is asked for

docs/format.md, "Opening" and "Making a table", says what each finds and does. Functions of paths and a manifest; the
storage keeps what they return.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import mmap
import os
import stat
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sense_v2.core.errors import what_and_way_out, with_way_out
from sense_v2.engram.table import disk, platform
from sense_v2.engram.table.checksums import block_sums, num_blocks, to_hex
from sense_v2.engram.table.disk import (
    MadeMeanwhileError,
    WriterLock,
    allocate,
    finish_new_file,
    new_file,
    wait_for_new_file,
)
from sense_v2.engram.table.format import (
    MAX_MANIFEST_BYTES,
    STATE_DTYPE,
    Manifest,
    StateEntry,
    file_bytes,
    journal_name,
    lock_name,
    manifest_name,
    merge_provenance,
    new_commit,
    prepared_name,
    provenance_differences,
    state_file_name,
)
from sense_v2.engram.table.initial_noise import PROGRESS_BYTES, fill_normal
from sense_v2.engram.table.journal import has_journal, look_at_journal, refuse_rows_of_another_commit, roll_back

# Warnings point at who made the storage: this module, the storage's constructor, its caller.
_CONSTRUCTORS_CALLER = 3


@dataclass(frozen=True)
class Share:
    """What one of several processes of a host may store to of a table that all of them map. Each keeps a journal of
    its own, and they commit together (`sense_v2.engram.ranks.global_commit`)."""

    number: int
    """0 makes, recovers and commits the table; the others come and go while it has it open."""
    first_row: int
    stop_row: int


@dataclass(frozen=True)
class TableFiles:
    """The files of the table at `table`, by what they are; `share` is the number of the process's share of it."""

    table: Path
    share: int = 0

    @cached_property
    def manifest(self) -> Path:
        return self.table.with_name(manifest_name(self.table.name))

    @cached_property
    def journal(self) -> Path:
        return self.table.with_name(journal_name(self.table.name, self.share))

    @cached_property
    def lock(self) -> Path:
        return self.table.with_name(lock_name(self.table.name, self.share))

    @cached_property
    def prepared(self) -> Path:
        return self.table.with_name(prepared_name(self.table.name))

    @property
    def other_journals(self) -> list[Path]:
        """Those of further processes that stored to this table."""
        return _numbered(self.table, journal_name(self.table.name, "*"))

    @property
    def other_locks(self) -> list[Path]:
        return _numbered(self.table, lock_name(self.table.name, "*"))

    def state(self, name: str, manifest: Manifest) -> Path:
        """Where the manifest says that optimizer state is, or where a new one goes."""
        entry = manifest.states.get(name)
        return self.table.with_name(entry.file if entry else state_file_name(self.table.name, name))

    def lack_manifest(self) -> bool:
        return self.table.exists() and not self.manifest.exists()


def real_table(path: str | os.PathLike[str]) -> Path:
    """The absolute path that the names of a table's other files are made from. A link to a table that has its
    manifest beside it is another name of that table. Raises `ValueError` where the link has a manifest of its own as
    well, and for the name of another of a table's files."""
    path = Path(path).absolute()
    own = path.with_name(manifest_name(path.name))
    if path.is_symlink():
        with contextlib.suppress(OSError, RuntimeError):  # a link to itself
            target = path.resolve()
            theirs = target.with_name(manifest_name(target.name))
            if theirs.exists():
                if own.exists() and not own.samefile(theirs):
                    raise with_way_out(
                        ValueError(
                            f"{path} links to {target}, and each has a manifest: {own.name} and {theirs}. One of "
                            "them isn't the rows'"
                        ),
                        "Remove that one, once sense-engram verify has said which",
                    )
                return target
    return path


def _numbered(table: Path, name: str) -> list[Path]:
    """The files of shares 1, 2, …: `name` has a star for the number."""
    before, after = name.split("*")
    found = table.parent.glob(f"{glob.escape(before)}*{glob.escape(after)}")
    return sorted(path for path in found if path.name[len(before) : -len(after)].isdigit())


# Making


def create_table(
    files: TableFiles,
    manifest: Manifest,
    num_threads: int | None,
    progress: bool | None,
    *,
    sparse: bool,
    first_row: int = 0,
) -> None:
    """Makes the table, then its manifest; a process that finds another one at it waits and makes neither. Its noise
    is that of a larger table's rows from `first_row` on.

    Both are synced under temporary names before the table is renamed, and the manifest last: a kill leaves nothing,
    or a whole table, in the worst case with the manifest still under its temporary name, where the next opening finds
    it.
    """
    path = files.table
    if path.is_symlink():
        # Most likely a disk that isn't mounted: a new table would take the link's place, on this disk.
        raise FileNotFoundError(f"{path} links to {os.readlink(path)}, which isn't there")
    keep = files.lack_manifest
    with contextlib.suppress(MadeMeanwhileError), new_file(files.manifest, keep=keep) as manifest_fd:
        refuse_leftovers(files)
        with new_file(path) as fd:
            if sparse:
                disk.os.ftruncate(fd, manifest.table_bytes)
                sums = np.zeros(num_blocks(manifest.rows), dtype=np.uint64)
            else:
                allocate(fd, manifest.table_bytes, path)
                fill_normal(
                    fd,
                    manifest.rows * manifest.width,
                    manifest.dtype,
                    seed=manifest.init_seed or 0,
                    std=manifest.init_std or 0.0,
                    first_value=first_row * manifest.width,
                    num_threads=num_threads,
                    progress=progress,
                )
                with mmap.mmap(fd, manifest.table_bytes, access=mmap.ACCESS_READ) as data:
                    raw = np.frombuffer(data, dtype=np.uint8).reshape(manifest.rows, -1)
                    sums = block_sums(raw)
                    del raw  # or the mapping couldn't be closed
            manifest.checksums = to_hex(sums)
            # So that another new table's journal isn't taken for this one's.
            manifest.commit = new_commit()
            disk.write_at(manifest_fd, manifest.to_json().encode(), 0)
            disk.sync_fd(manifest_fd, files.manifest)
            # Its temporary name, too: from the table's rename on it must be found.
            disk.sync(path.parent)
    if not path.exists():
        raise with_way_out(
            FileNotFoundError(f"{files.manifest} describes a table, but {path} isn't there"),
            "Put it back, or remove the manifest to make a new one",
        )


def refuse_leftovers(files: TableFiles) -> None:
    """A new table must not be trained on with an old table's optimizer state; nor be made, to be refused at once,
    beside a journal that can't be its own."""
    path = files.table
    pattern = glob.escape(state_file_name(path.name, "_")).replace("._.", ".*.")
    left = [found for found in path.parent.glob(pattern) if found != path and not _is_table(found)]
    if left:
        names = ", ".join(sorted(found.name for found in left))
        what = f"{path} isn't there, but optimizer state of an earlier table is: {names}"
        raise with_way_out(ValueError(what), "Remove it")
    if has_journal(files.journal):
        what = f"{path} isn't there, but the journal of an earlier table is: {files.journal.name}"
        raise with_way_out(ValueError(what), "Remove it")


# Who writes


def lock_table(files: TableFiles, *, write: bool) -> WriterLock | None:
    """The right to write. Raises `BlockingIOError` naming who has it, `OSError` where it can't be taken. Who only
    reads gets None, and a warning beside a writer."""
    if write:
        try:
            table = None if files.share else files.table
            lock = WriterLock(files.lock, str(files.table), table)
        except BlockingIOError:
            raise
        except OSError as error:
            raise cant_write(files.table, error) from error
        # Who has the table's own lock sees all others: a share is taken only while share 0 has it.
        for path in files.other_locks if files.share == 0 else ():
            holder = WriterLock.holder(path)
            if holder is not None:
                lock.release()
                what = f"process {holder} of an earlier run of several still writes to its share of {files.table}"
                raise with_way_out(BlockingIOError(errno.EAGAIN, what), "end it first")
        return lock
    # A maker holds the lock of what is not yet a table, until its manifest is there.
    holder = WriterLock.holder(files.lock, files.table if files.manifest.exists() else None)
    if holder is not None:
        warnings.warn(
            f"process {holder} is writing to {files.table}: rows are read as they are stored, which may be ahead of "
            "its last commit",
            UserWarning,
            stacklevel=_CONSTRUCTORS_CALLER,
        )
    return None


def cant_write(path: Path, error: OSError) -> OSError:
    way_out = "mode='r' opens a table that can't be written to"
    where = f" ({error.filename})" if error.filename else ""
    return with_way_out(OSError(error.errno, f"can't open {path} to write: {error.strerror}{where}"), way_out)


# What is there


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`. Raises `ValueError` naming the path for what isn't one, `OSError` where it can't be
    read."""
    with disk.naming(path), open(path, "rb", opener=_open_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} isn't a regular file")
        if found.st_size > MAX_MANIFEST_BYTES:
            raise with_way_out(
                ValueError(f"{path}: a manifest has {MAX_MANIFEST_BYTES} bytes at most, this has {found.st_size}"),
                "Put the table's own there",
            )
        text = file.read(found.st_size)
    try:
        return Manifest.from_json(text.decode())
    except ValueError as error:
        what, way_out = what_and_way_out(error)
        raise with_way_out(ValueError(f"{path}: {what}"), way_out) from error


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK a pipe would be waited for forever.
    return platform.open_file(path, flags | platform.NO_WAITING)


def is_committed(files: TableFiles, manifest: Manifest) -> bool:
    """Whether the manifest on disk is this one."""
    try:
        found = read_manifest(files.manifest)
    except FileNotFoundError:
        return manifest.generation == 0
    except (OSError, ValueError):
        return False
    return found.commit == manifest.commit


def checked_manifest(files: TableFiles, wanted: Manifest, *, write: bool) -> Manifest:
    """The manifest on disk, once it and the table agree with what the caller wants; with `write`, one that a dead
    maker left under its temporary name is finished. Raises `ValueError` naming each field that differs."""
    path = files.table
    if not path.is_file():
        raise ValueError(f"{path} isn't a regular file")
    found_bytes = path.stat().st_size
    if not files.manifest.exists():
        # Its maker may be between the two renames, or have died there.
        wait_for_new_file(files.manifest)
        if write and files.lack_manifest():
            finish_new_file(files.manifest, lambda temporary: _is_manifest_of(temporary, path))
    if not files.manifest.exists():
        if found_bytes != wanted.table_bytes:
            raise ValueError(
                f"{path}: expected {wanted.table_bytes} bytes ({wanted.rows} rows × {wanted.width} {wanted.dtype}), "
                f"found {found_bytes}, and there is no manifest {files.manifest}"
            )
        warnings.warn(
            f"{path} has no manifest: its size fits, what its rows mean isn't known. It gets a manifest with its "
            "first commit",
            UserWarning,
            stacklevel=_CONSTRUCTORS_CALLER,
        )
        return Manifest(wanted.rows, wanted.width, wanted.dtype, provenance=wanted.provenance)
    manifest = read_manifest(files.manifest)
    recorded = {name: getattr(manifest, name) for name in ("rows", "width", "dtype")}
    given = {name: getattr(wanted, name) for name in recorded}
    differences = provenance_differences(recorded, given)
    differences += provenance_differences(manifest.provenance, wanted.provenance)
    if differences:
        found = "; ".join(f"{name} is {old!r}, asked for {new!r}" for name, old, new in differences)
        raise with_way_out(
            ValueError(f"{files.manifest} describes another table: {found}"),
            "Open it with the configuration it was made with, or choose another path",
        )
    if found_bytes != manifest.table_bytes:
        raise ValueError(
            f"{path}: expected {manifest.table_bytes} bytes ({manifest.rows} rows × {manifest.width} "
            f"{manifest.dtype}), found {found_bytes}: the file was cut, or isn't the manifest's"
        )
    manifest.provenance = merge_provenance(manifest.provenance, wanted.provenance)
    return manifest


def _is_manifest_of(manifest_path: Path, path: Path) -> bool:
    """Whether a manifest that wasn't renamed is that of the new table here, all of which is read to know."""
    try:
        manifest = read_manifest(manifest_path)
    except ValueError:
        return False
    if manifest.generation or manifest.checksums is None or manifest.table_bytes != path.stat().st_size:
        return False
    rows = np.memmap(path, dtype=np.uint8, mode="r").reshape(manifest.rows, -1)
    return to_hex(block_sums(rows, manifest.format_version)) == manifest.checksums


# What a dead writer left


def recover(files: TableFiles, manifest: Manifest) -> None:
    """Undoes what was stored after the last commit by a writer, or several, that aren't there any more."""
    refuse_prepared(files)
    _refuse_foreign_states(files, manifest)
    others = files.other_journals if files.share == 0 else []
    num_restored = roll_back(files.journal, manifest.committed(files.table.name), others)
    for path in others:
        with contextlib.suppress(OSError):
            disk.os.unlink(path)
    if num_restored:
        were = "row was put back as it was" if num_restored == 1 else "rows were put back as they were"
        warnings.warn(
            f"{files.table}: a writer ended between two commits; {num_restored} {were} at the last "
            f"commit (generation {manifest.generation}, step {manifest.step})",
            UserWarning,
            stacklevel=_CONSTRUCTORS_CALLER,
        )


def refuse_live_journal(files: TableFiles, manifest: Manifest) -> None:
    """Read-only callers must not see rows that a dead writer had not committed."""
    if WriterLock.is_held(files.lock, files.table):
        return
    refuse_prepared(files)
    for path in (files.journal, *files.other_journals):
        _refuse_live_journal(files, path, manifest)


def refuse_prepared(files: TableFiles) -> None:
    """For a shard that doesn't know whether its last commit counts: the global manifest does."""
    if files.prepared.exists():
        raise with_way_out(
            ValueError(
                f"{files.table} is a shard whose last commit was cut off, and {files.prepared.name} is what it has "
                "if all shards committed"
            ),
            "Open the shards together once: they ask the global manifest, and go forward or back",
        )


def _refuse_live_journal(files: TableFiles, path: Path, manifest: Manifest) -> None:
    at = manifest.committed(files.table.name)
    is_there, found = look_at_journal(path, at)
    if not is_there:
        return
    if found is None:
        if sum(at.row_bytes_of.values()) * manifest.rows > PROGRESS_BYTES:
            warnings.warn(
                f"{path} is of an earlier commit: all rows of {files.table} are read to know that they are "
                "the last one's. Opening once with mode='r+' removes it",
                UserWarning,
                stacklevel=_CONSTRUCTORS_CALLER,
            )
        refuse_rows_of_another_commit(path, at)
    elif found.num_rows_of or found.torn_bytes:
        raise with_way_out(
            ValueError(
                f"{files.table}: a writer ended between two commits, and {path} says how to undo what it had not "
                "committed, which mode='r' may not"
            ),
            f"Open it once with mode='r+', or run: sense-engram verify --repair {files.table}",
        )


# Optimizer states


def make_state_ready(files: TableFiles, manifest: Manifest, name: str, width: int, *, sparse: bool) -> StateEntry:
    """What the manifest says of that optimizer state, whose file is there and as long as it must be; where it lists
    none, a new one of zeros. Raises `ValueError` or `FileNotFoundError`."""
    entry = manifest.states.get(name)
    path = files.state(name, manifest)
    expected_bytes = file_bytes(manifest.rows, width, STATE_DTYPE)
    _refuse_as_state(files, name, path)
    for other, listed in manifest.states.items():
        if entry is None and listed.file == path.name:
            raise with_way_out(
                ValueError(f"{files.manifest} says that {path} is optimizer state {other!r}, and lists no {name!r}"),
                f"open {other!r}",
            )
    if entry is None and path.exists() and not files.manifest.exists():
        raise with_way_out(
            ValueError(f"{path} is there, but without a manifest nothing says what it holds"),
            "Remove it to begin with zeros",
        )
    if not path.exists() or not (entry or files.share):  # share 0 has made it for the others
        if entry:
            raise with_way_out(
                FileNotFoundError(f"{files.manifest} lists optimizer state {path}, which isn't there"),
                f"Put it back, or remove the entry states.{name} to begin with zeros",
            )
        # One that the manifest doesn't list was never committed: it is made anew.
        with new_file(path, replace=True, like=files.table) as fd:
            if sparse:
                disk.os.ftruncate(fd, expected_bytes)
            else:
                allocate(fd, expected_bytes, path)
    found_bytes = path.stat().st_size
    if found_bytes != expected_bytes:
        raise ValueError(
            f"optimizer state {path}: expected {expected_bytes} bytes ({manifest.rows} rows × {width} "
            f"{STATE_DTYPE}), found {found_bytes}"
        )
    return entry or StateEntry(path.name, width, checksums=to_hex(np.zeros(num_blocks(manifest.rows), np.uint64)))


def _refuse_foreign_states(files: TableFiles, manifest: Manifest) -> None:
    """What the manifest calls a state is written to, by undoing and by training: it must be a file of its own."""
    seen = {disk.identity(files.table): files.table}
    for name in manifest.states:
        path = files.state(name, manifest)
        _refuse_as_state(files, name, path)
        if path.exists():
            first = seen.setdefault(disk.identity(path), path)
            if first is not path:
                what = f"optimizer state {path} and {first} are one file"
                raise with_way_out(ValueError(what), "put a copy in its place")
    for path in seen.values():
        if path.stat().st_nlink > 1:
            raise with_way_out(
                OSError(
                    errno.EMLINK,
                    f"{path} has another name as well (a hard link: a backup, perhaps), which training would change "
                    "too",
                ),
                "Put a copy in the place of one of them, or open it with mode='r'",
            )


def _refuse_as_state(files: TableFiles, name: str, path: Path) -> None:
    if _is_table(path) or path == files.table:
        raise ValueError(f"{path} is a table: optimizer state {name!r} can't be there")
    if path.is_symlink():
        raise with_way_out(ValueError(f"optimizer state {path} is a link"), "put the file itself there")
    if path.exists() and not path.is_file():
        raise with_way_out(ValueError(f"optimizer state {path} isn't a regular file"), "put the file itself there")


def _is_table(path: Path) -> bool:
    """Whether a file that could be a state, by its name, is a table with a manifest of its own."""
    return path.with_name(manifest_name(path.name)).exists()
