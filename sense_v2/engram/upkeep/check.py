"""A table's files -> what is wrong with them, as findings: what `sense-engram verify` says.

`check_table` changes nothing. It looks at manifest, lengths, lock and journal first, and then reads table and states
once, front to back, in parts of a few MiB whatever their size; holes of a sparse file are skipped. Every block's
checksum is computed anew and compared with the manifest's, and values that are no numbers and rows of zeros are
counted on the way.

`repair_table` undoes what a writer left uncommitted, as opening with mode "r+" would, and computes checksums where a
table that is otherwise clean has none. It touches nothing else: what is damaged comes back only from a copy.

N rows, B bytes of a row.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sense_v2.core.errors import are, number_of
from sense_v2.engram.table import disk
from sense_v2.engram.table.checksums import block_rows, to_hex
from sense_v2.engram.table.disk import WriterLock
from sense_v2.engram.table.format import (
    FORMAT_VERSION,
    Manifest,
    RowDtype,
    journal_name,
    lock_name,
    manifest_name,
    row_dtype,
    state_file_name,
)
from sense_v2.engram.table.initial_noise import PROGRESS_BYTES
from sense_v2.engram.table.journal import LiveJournal, look_at_journal, roll_back
from sense_v2.engram.table.opening import TableFiles, read_manifest, real_table
from sense_v2.engram.table.row_scan import Scan, scan_rows

# Row ranges that are written out before "and … more".
RANGES_SHOWN = 8
UNDOES_NOTHING = "undoes nothing any more; the next opening to write removes it"


@dataclass(frozen=True)
class Finding:
    """One thing to say about a table."""

    kind: str
    """manifest, table, state, journal, writer, checksum, not finite, zeros: for programs that read it."""
    file: str
    text: str
    is_wrong: bool = True
    """False for what is only good to know."""


@dataclass(frozen=True)
class TableFile:
    """A file of rows, as the manifest describes it."""

    path: Path
    kind: str
    width: int
    dtype: RowDtype
    checksums: list[str] | None

    @property
    def row_bytes(self) -> int:
        return self.dtype.row_bytes(self.width)


@dataclass
class Check:
    """What a check of the table at `path` has found."""

    path: Path
    manifest: Manifest | None = None
    findings: list[Finding] = field(default_factory=list)
    writer: str | None = None
    """The process id of who writes to it."""
    journal: LiveJournal | None = None
    """What a writer that isn't there any more left to be undone."""
    has_old_journal: bool = False
    """Whether there is one of an earlier commit."""
    files: list[TableFile] = field(default_factory=list)
    """Those that are there and as long as they must be."""
    checksums: dict[str, list[str]] = field(default_factory=dict)
    """Of each of them, as it is now."""

    @property
    def num_wrong(self) -> int:
        return sum(finding.is_wrong for finding in self.findings)

    @property
    def num_bytes(self) -> int:
        return sum(self.manifest.rows * file.row_bytes for file in self.files) if self.manifest else 0

    def add(self, kind: str, path: Path, text: str, *, is_wrong: bool = True) -> None:
        self.findings.append(Finding(kind, path.name, text, is_wrong))


def check_table(path: str | os.PathLike[str], *, progress: bool | None = None) -> Check:
    """Everything that can be found out about the table at `path` without changing it.

    `progress` None shows a bar past 1 GB. Raises `OSError` where a file can't be read at all.
    """
    path = real_table(path)
    before = _versions(path)
    check = _check_around(path)
    _check_rows(check, progress=progress)
    if check.writer is None and _versions(path) != before:
        # What was compared belongs to different moments.
        check.findings = [finding for finding in check.findings if finding.kind not in ("checksum", "journal")]
        note = "a writer came while this was read: its rows aren't judged. Check again when it has ended"
        check.add("writer", _beside(path, lock_name), note, is_wrong=False)
    return check


def repair_table(path: str | os.PathLike[str], *, progress: bool | None = None) -> tuple[list[str], Check]:
    """(what was done, a check after it), under the writer's lock.

    Raises `BlockingIOError` where a process writes, `OSError` where the files can't be written to, and `ValueError`
    for a journal that turns out to be damaged.
    """
    path = real_table(path)
    done: list[str] = []
    lock = WriterLock(_beside(path, lock_name), str(path), path)
    try:
        check = _check_around(path, is_own=True)
        manifest = check.manifest
        # Anything else that is wrong may be why there is a journal at all: a person has to look at it first.
        if manifest is not None and check.journal is not None and check.num_wrong == 1:
            at, others = manifest.committed(path.name), TableFiles(path).other_journals
            num_rows = roll_back(_beside(path, journal_name), at, others)
            done.append(f"{number_of(num_rows or 0, 'row')} put back as they were at {_commit_of(manifest)}")
            check = _check_around(path, is_own=True)
        _check_rows(check, progress=progress)
        is_old = check.manifest is not None and check.manifest.format_version < FORMAT_VERSION
        missing = [file.path.name for file in check.files if is_old or file.checksums is None]
        if missing and not check.num_wrong and check.manifest is not None:
            if is_old:
                check.manifest.format_version = FORMAT_VERSION
                check.checksums = {file.path.name: to_hex(_scan(file, check.manifest).sums) for file in check.files}
            _write_checksums(path, check.manifest, check.checksums)
            done.append(f"checksums written of {', '.join(missing)}, as the rows are now")
            check.manifest = read_manifest(_beside(path, manifest_name))
            check.findings = [finding for finding in check.findings if finding.kind != "checksum"]
    finally:
        lock.release()
    return done, check


# What is around the rows


def _check_around(path: Path, *, is_own: bool = False) -> Check:
    """Manifest, lock, lengths, journal. `is_own`: the writer's lock is the caller's."""
    check = Check(path)
    manifest_path = _beside(path, manifest_name)
    try:
        check.manifest = read_manifest(manifest_path)
    except FileNotFoundError:
        check.add(
            "manifest",
            manifest_path,
            "isn't there: nothing says what the table holds. Put it back, or open the table with its configuration "
            "and commit()",
        )
    except (OSError, ValueError) as error:
        check.add("manifest", manifest_path, _text_of(error, manifest_path))
    if not is_own:
        _check_writer(check)
    if check.manifest is None:
        return check
    check.files = [file for file in _files(path, check.manifest) if _check_file(check, file)]
    _check_one_file_each(check)
    _note_unlisted_states(check)
    if check.writer is None:
        _check_journal(check)
    return check


def _check_writer(check: Check) -> None:
    lock_path = _beside(check.path, lock_name)
    try:
        if not WriterLock.is_held(lock_path, check.path):
            return
        # Nobody else: then this process has it itself.
        check.writer = WriterLock.holder(lock_path, check.path) or str(os.getpid())
    except OSError as error:
        check.add("writer", lock_path, _text_of(error, lock_path))
        return
    check.add(
        "writer",
        lock_path,
        f"process {check.writer} is writing: rows may be ahead of the last commit, their checksums aren't judged",
        is_wrong=False,
    )


def _files(path: Path, manifest: Manifest) -> Iterator[TableFile]:
    yield TableFile(path, "table", manifest.width, row_dtype(manifest.dtype), manifest.checksums)
    for entry in manifest.states.values():
        yield TableFile(path.with_name(entry.file), "state", entry.width, row_dtype(entry.dtype), entry.checksums)


def _check_file(check: Check, file: TableFile) -> bool:
    """Whether it is there and as long as it must be."""
    assert check.manifest is not None
    try:
        found = file.path.stat() if file.kind == "table" else file.path.lstat()
    except FileNotFoundError:
        check.add(file.kind, file.path, "the manifest describes it, and it isn't there. Put it back")
        return False
    expected_bytes = check.manifest.rows * file.row_bytes
    if not stat.S_ISREG(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no regular file"
        check.add(file.kind, file.path, f"is {what}; put the file itself there")
    elif file.kind == "state" and file.path.with_name(manifest_name(file.path.name)).exists():
        check.add(file.kind, file.path, "has a manifest of its own: it is a table, and no optimizer state")
    elif found.st_size != expected_bytes:
        check.add(
            file.kind,
            file.path,
            f"expected {expected_bytes:,} bytes ({check.manifest.rows:,} rows × {file.width} {file.dtype.name}), "
            f"found {found.st_size:,}: the file was cut, or isn't the manifest's",
        )
    else:
        return True
    return False


def _check_one_file_each(check: Check) -> None:
    seen: dict[tuple[int, int], TableFile] = {}
    for file in check.files:
        found = file.path.stat()
        first = seen.setdefault((found.st_dev, found.st_ino), file)
        if first is not file:
            what = f"is one file with {first.path.name}: what is stored to one changes the other"
            check.add(file.kind, file.path, what)


def _note_unlisted_states(check: Check) -> None:
    assert check.manifest is not None
    listed = {entry.file for entry in check.manifest.states.values()} | {check.path.name}
    before, after = state_file_name(check.path.name, "_").split("._.")
    for path in sorted(check.path.parent.iterdir()):
        is_state = path.name.startswith(f"{before}.") and path.name.endswith(f".{after}")
        if is_state and path.name not in listed and not path.with_name(manifest_name(path.name)).exists():
            name = path.name.removeprefix(f"{before}.").removesuffix(f".{after}")
            check.add(
                "state",
                path,
                "the manifest doesn't list it: it was made after the last commit, or is left over. Training with an "
                f"optimizer state {name!r} makes it anew",
                is_wrong=False,
            )


def _check_journal(check: Check) -> None:
    """All journals of the table together: several processes may have stored to it, each with one of its own."""
    files = TableFiles(check.path)
    manifest, path = check.manifest, files.journal
    assert manifest is not None
    if files.prepared.exists():
        text = "is what this shard has if all shards committed: open them together once, and they go forward or back"
        check.add("journal", files.prepared, text)
    live = []
    for one in (path, *files.other_journals):
        try:
            is_there, found = look_at_journal(one, manifest.committed(check.path.name))
        except (OSError, ValueError) as error:
            check.add("journal", one, _text_of(error, one))
            return
        if found is not None:
            live.append(found)
        elif is_there:
            check.has_old_journal = True  # what to say of it depends on the rows
    if not live:
        return
    counts: Counter[str] = Counter()
    for found in live:
        counts.update(found.num_rows_of)
    check.journal = LiveJournal(dict(counts), sum(found.torn_bytes for found in live))
    if not (check.journal.num_rows_of or check.journal.torn_bytes):
        check.journal = None
        check.add("journal", path, UNDOES_NOTHING, is_wrong=False)
        return
    rows = ", ".join(f"{number_of(count, 'row')} of {file}" for file, count in check.journal.num_rows_of.items())
    torn = f", and ends in {check.journal.torn_bytes:,} bytes that are no whole record" * (
        check.journal.torn_bytes > 0
    )
    check.add(
        "journal",
        path,
        f"a writer ended between two commits: it puts back {rows or 'nothing'}, as at {_commit_of(manifest)}{torn}. "
        "--repair does that, and so does opening with mode='r+'; until then checksums aren't judged",
    )


# The rows


def _check_rows(check: Check, *, progress: bool | None) -> None:
    """Reads the files that are whole."""
    bar = tqdm(
        total=check.num_bytes,
        unit="B",
        unit_scale=True,
        desc="checking",
        disable=not progress if progress is not None else (None if check.num_bytes > PROGRESS_BYTES else True),
    )
    with bar:
        for file in check.files:
            assert check.manifest is not None
            try:
                scan = _scan(file, check.manifest, advance=bar.update)
            except OSError as error:
                check.add(file.kind, file.path, f"can't be read: {_text_of(error, file.path)}")
                continue
            check.checksums[file.path.name] = to_hex(scan.sums)
            _compare_checksums(check, file)
            _report_values(check, file, scan)
    _note_old_journal(check)
    if check.manifest is not None and check.manifest.format_version < FORMAT_VERSION:
        text = "has checksums of version 2, which changes of two signs at once can pass. --repair writes better ones"
        check.add("checksum", _beside(check.path, manifest_name), text, is_wrong=False)


def _scan(file: TableFile, manifest: Manifest, advance: Callable[[int], Any] = lambda num_bytes: None) -> Scan:
    of = (file.path, manifest.rows, file.width, file.dtype)
    return scan_rows(*of, version=manifest.format_version, is_link_allowed=file.kind == "table", advance=advance)


def _note_old_journal(check: Check) -> None:
    if check.has_old_journal:
        rows_differ = any(finding.kind == "checksum" and finding.is_wrong for finding in check.findings)
        text = "is of an earlier commit, and the rows aren't the last one's: no opening takes them for that"
        check.add(
            "journal", _beside(check.path, journal_name), text if rows_differ else UNDOES_NOTHING, is_wrong=False
        )


def _compare_checksums(check: Check, file: TableFile) -> None:
    """Judged where the rows have to be those of the last commit: nobody writes, and nothing is left to be undone."""
    assert check.manifest is not None
    if file.checksums is None:
        text = "has no checksums: nothing says whether its rows are those that were stored. --repair adds them"
        check.add("checksum", file.path, text, is_wrong=False)
        return
    if check.writer is not None or check.journal is not None:
        return
    found = check.checksums[file.path.name]
    bad = [block for block, (old, new) in enumerate(zip(file.checksums, found, strict=True)) if old != new]
    if bad:
        ranges = row_ranges(bad, check.manifest.rows)
        shown = ", ".join(f"{first:,} to {last:,}" for first, last in ranges[:RANGES_SHOWN])
        more = f" and {len(ranges) - RANGES_SHOWN:,} more ranges" if len(ranges) > RANGES_SHOWN else ""
        check.add(
            "checksum",
            file.path,
            f"{len(bad):,} of {len(found):,} blocks don't have the checksum of {_commit_of(check.manifest)}: rows "
            f"{shown}{more}. Put the table's files back from a copy",
        )


def row_ranges(blocks: list[int], num_rows: int) -> list[tuple[int, int]]:
    """(first row, last row) of each run of blocks that follow one another.

    >>> row_ranges([0, 2, 3], 15_000)
    [(0, 4095), (8192, 14999)]
    """
    size = block_rows(num_rows)
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        first, last = block * size, min((block + 1) * size, num_rows) - 1
        if ranges and ranges[-1][1] == first - 1:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((first, last))
    return ranges


def _report_values(check: Check, file: TableFile, scan: Scan) -> None:
    assert check.manifest is not None
    num_rows = check.manifest.rows
    if scan.num_bad_rows:
        check.add(
            "not finite",
            file.path,
            f"{scan.num_nan:,} values are NaN and {scan.num_infinite:,} infinite, in {scan.num_bad_rows:,} of "
            f"{num_rows:,} rows; the first is row {scan.first_bad_row:,}. Go back to a copy from before",
        )
    if scan.num_zero_rows and file.kind == "table":
        found = file.path.stat()
        on_disk = found.st_blocks * 512
        sparse = f"; the file is sparse, {on_disk:,} of its {found.st_size:,} bytes are on the disk"
        check.add(
            "zeros",
            file.path,
            f"{scan.num_zero_rows:,} of {num_rows:,} rows ({scan.num_zero_rows / num_rows:.1%}) "
            f"{are(scan.num_zero_rows)} all zeros" + sparse * (on_disk < found.st_size),
            is_wrong=False,
        )


# Helpers of both


def _beside(path: Path, name_of: Callable[[str], str]) -> Path:
    return path.with_name(name_of(path.name))


def _commit_of(manifest: Manifest) -> str:
    return f"generation {manifest.generation}" + (f", step {manifest.step:,}" if manifest.step is not None else "")


def _text_of(error: OSError | ValueError, path: Path) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.removeprefix(str(path)).removeprefix(":").strip()


def _versions(path: Path) -> list[Any]:
    """What is another one after a commit, a store or an opening for writing."""
    found: list[Any] = []
    for name_of in (manifest_name, journal_name, lock_name):
        try:
            status = _beside(path, name_of).lstat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            found.append(None)
    return found


def _write_checksums(path: Path, manifest: Manifest, checksums: dict[str, list[str]]) -> None:
    """Adds them to the manifest: no commit, since nothing of the rows changes."""
    states = {
        name: dataclasses.replace(entry, checksums=checksums[entry.file]) for name, entry in manifest.states.items()
    }
    manifest = dataclasses.replace(manifest, checksums=checksums[path.name], states=states)
    manifest.validate()
    disk.write_file(_beside(path, manifest_name), manifest.to_json(), like=path)
