"""Deltas and tables: git for memory, where a delta is a commit that can be sent.

    export_delta   a table and its base ──▶ the rows that differ, as a delta
    apply_delta    a delta ──▶ its base, in place, in one commit; what it replaces is kept in an undo beside the table
    revert_delta   that undo ──▶ the table, and the table's bytes are what they were
    merge_deltas   several deltas of one base ──▶ one; rows that two of them changed differently are conflicts

A delta that was applied changes the table's digest, so the next one applies only where it was made on that table.
Who wants two deltas of one base merges them. Undos are deltas too, a stack: they have numbers, and the digest of the
table that they fit, in their names.

Each function reads again what it has written and compares: rows bit for bit, and the table's block checksums with
what they have to become.

N rows, U row ids, D row width.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.delta.delta_file import (
    Delta,
    DeltaInfo,
    Source,
    read_delta,
    write_delta,
)
from sense_v2.engram.delta.kept_facts import Collision, as_extra, colliding_facts, facts_in, together
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.checksums import PART_BYTES, add_to_blocks, block_rows, from_hex, row_hashes, to_hex
from sense_v2.engram.table.format import FORMAT_VERSION, provenance_differences, row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest, real_table
from sense_v2.engram.table_identity import digest_of_blocks, meaning_of

PREFERENCES = ("first", "last", "mean")
REVERTS_TO = "reverts_to"
_UNDO = re.compile(r"\.undo-(?:(\d{1,9})-)?[0-9a-f]{12}\.safetensors$")


@dataclass(frozen=True)
class Applied:
    """What `apply_delta` or `revert_delta` has done to a table."""

    table: Path
    num_rows: int
    digest_before: str
    digest: str
    """Of the table's block checksums, as it is now."""
    undo: Path | None
    """Where what was replaced is kept; None where nothing was, and after a revert."""
    states: tuple[str, ...]
    """The table's optimizer states, which a delta doesn't change."""
    is_new: bool = True
    """False if an earlier call had done it, and this one found it done."""


@dataclass(frozen=True)
class Merged:
    """What `merge_deltas` has made."""

    delta: Delta
    num_shared: int
    """Rows that more than one has."""
    num_conflicts: int
    """Those of them that differ."""


def open_table_as_it_is(path: Path, *, mode: str = "r") -> MMapEmbeddingStorage:
    """The table at `path`, as its manifest describes it. Raises `FileNotFoundError` where it has none."""
    path = real_table(path)
    manifest = read_manifest(TableFiles(path).manifest)
    return MMapEmbeddingStorage(manifest.rows, manifest.width, path, dtype=manifest.dtype, mode=mode).eval()


# Making


def export_delta(trained: Path, base: Path, output: Path) -> Delta:
    """Writes the rows of the table `trained` that aren't as in `base` to `output`; both are only read.

    Of two tables of one dtype only blocks whose checksums differ are read. Raises `ValueError` where the tables
    aren't of one kind, `OSError` where there is no room.
    """
    ours, theirs = open_table_as_it_is(trained), open_table_as_it_is(base)
    try:
        _refuse_other_kind(ours, theirs)
        info = DeltaInfo(theirs.identity(), ours.manifest.step)
        ours.identity()  # refuses a table without checksums
        row_ids_U = np.concatenate([np.empty(0, np.int64), *_differing_ids(ours, theirs)])
        ids_U = torch.from_numpy(row_ids_U)
        rows = Source(ours.embedding_dim, ours.dtype, lambda part: ours(ids_U[part]))
        write_delta(output, info, row_ids_U, {"rows": rows}, like=ours.path)
        delta = read_delta(output)
        _check_leads_to(delta, theirs, ours)
        return delta
    finally:
        ours.close()
        theirs.close()


def strip_delta(path: Path, output: Path) -> Delta:
    """Writes the delta at `path` without its optimizer states: what is sent."""
    delta = read_delta(path)
    info = dataclasses.replace(delta.info, state_steps={})
    write_delta(output, info, delta.row_ids_U, {"rows": _rows_of(delta)}, like=path)
    return read_delta(output)


def _refuse_other_kind(ours: MMapEmbeddingStorage, theirs: MMapEmbeddingStorage) -> None:
    differences = [
        ("rows", theirs.num_embeddings, ours.num_embeddings),
        ("width", theirs.embedding_dim, ours.embedding_dim),
        ("type that rows are looked up as", theirs.dtype, ours.dtype),
        *provenance_differences(meaning_of(theirs.manifest), meaning_of(ours.manifest)),
    ]
    found = "; ".join(f"{name} {old!r}, here {new!r}" for name, old, new in differences if old != new)
    if found:
        raise with_way_out(
            ValueError(f"{ours.path} can't have been made from {theirs.path}: {found}"),
            "Name the table that it was trained from",
        )


def _differing_ids(ours: MMapEmbeddingStorage, theirs: MMapEmbeddingStorage) -> Iterator[np.ndarray[Any, Any]]:
    """Ids of the rows whose bits aren't the same, ascending, in parts."""
    num_rows = ours.num_embeddings
    size = block_rows(num_rows)
    blocks = list(range(-(-num_rows // size)))
    ours_sums, their_sums = ours.manifest.checksums, theirs.manifest.checksums
    # Version 2's checksums can be the same of blocks that aren't.
    kinds = {(one.manifest.dtype, one.manifest.format_version) for one in (ours, theirs)}
    if kinds == {(ours.manifest.dtype, FORMAT_VERSION)} and ours_sums is not None and their_sums is not None:
        blocks = [block for block in blocks if ours_sums[block] != their_sums[block]]
    part_rows = max(1, PART_BYTES // (ours.embedding_dim * ours.dtype.itemsize))
    for block in blocks:
        end = min((block + 1) * size, num_rows)
        for start in range(block * size, end, part_rows):
            ids = torch.arange(start, min(start + part_rows, end))
            differ = _bits(ours(ids)) != _bits(theirs(ids))
            yield ids.numpy()[differ.any(axis=1)]


def _check_leads_to(delta: Delta, base: MMapEmbeddingStorage, trained: MMapEmbeddingStorage) -> None:
    """Base and delta together are the trained table: by all its checksums, or where rows are coded otherwise, by the
    delta's rows."""
    is_same = torch.equal(delta.rows_UD, trained(torch.from_numpy(delta.row_ids_U)))
    kinds = {(one.manifest.dtype, one.manifest.format_version) for one in (base, trained)}
    if len(kinds) == 1 and not row_dtype(base.manifest.dtype).is_compact:
        assert trained.manifest.checksums is not None
        is_same = is_same and _digest_with(base, delta) == digest_of_blocks(trained.manifest.checksums)
    if not is_same:
        raise with_way_out(
            ValueError(
                f"{delta.path} doesn't lead from {base.path} to {trained.path}: one of them isn't what its manifest "
                "says"
            ),
            f"Check both: sense-engram verify {trained.path}",
        )


# In place, and back


def apply_delta(path: Path, table: Path) -> Applied:
    """Stores the delta's rows into the table, its base, in one commit; the rows they replace are kept beside it.

    A kill at any moment leaves the table as it was, or with all of the delta, and the same call again finds which.
    Raises `ValueError` where the table isn't the delta's base or is only read (compact rows), `BlockingIOError` where
    a process writes to it.
    """
    delta, table = read_delta(path), real_table(table)
    storage = _open_to_change(table, path)
    try:
        before, base = storage.identity(), delta.info.base
        states = tuple(storage.manifest.states)
        number, top = (_undos(table) or [(0, table)])[-1]
        if _leads_back(top, before.digest, base.digest, delta.row_ids_U) and _has(storage, delta):
            return Applied(table, len(delta.row_ids_U), base.digest, before.digest, top, states, is_new=False)
        base.refuse_other(before, path, table)
        _refuse_other_dtype(delta, storage)
        digest = _digest_with(storage, delta)
        undo = None
        if digest != before.digest:  # or the rows are there already
            undo = table.with_name(f"{table.stem}.undo-{number + 1}-{digest[:12]}.safetensors")
            if _leads_back(top, digest, before.digest, delta.row_ids_U):  # by a call that was killed
                undo = top
            _write_undo(undo, storage, delta, digest)
            _store(storage, delta, updates=None)
        _check_is(storage, delta, digest)
        return Applied(table, len(delta.row_ids_U), before.digest, digest, undo, states)
    finally:
        storage.close()


def revert_delta(table: Path) -> Applied:
    """Undoes the `apply_delta` that made the table what it is: its rows' bytes are what they were, and the undo is
    removed. One that was killed in between is finished by the same call again.

    Raises `ValueError` where no undo fits the table as it is now, `BlockingIOError` where a process writes to it.
    """
    table = real_table(table)
    storage = _open_to_change(table, Path("a delta"))
    try:
        before, undos = storage.identity().digest, [path for _, path in _undos(table)]
        # Where the last one leads back to the table as it is, a call was killed in between; nothing is left to undo.
        is_done = bool(undos) and _leads_back(undos[-1], None, before)
        fitting = undos[-1:] if is_done else [path for path in undos if path.stem.endswith(f"-{before[:12]}")]
        if not fitting:
            there = ", ".join(path.name for path in undos) or "none"
            raise with_way_out(
                ValueError(
                    f"{table} has nothing to revert: its rows have digest {before}, and the undos beside it are "
                    f"{there}. An undo fits the table as the delta left it, and rows that were changed since aren't "
                    "in it"
                ),
                "Go back to a copy of the table",
            )
        undo = fitting[-1]
        delta = read_delta(undo)
        digest = str(delta.info.extra.get(REVERTS_TO))
        if not is_done:
            delta.info.base.refuse_other(storage.identity(), undo, table)
            _refuse_other_dtype(delta, storage)
            if _digest_with(storage, delta) != digest:
                raise with_way_out(
                    ValueError(f"{undo} doesn't lead back to what it says ({digest})"),
                    f"Go back to a copy of {table}",
                )
            _store(storage, delta, updates=delta.info.updates)
        _check_is(storage, delta, digest)
        was, states = delta.info.base.digest, tuple(storage.manifest.states)
    finally:
        storage.close()
    undo.unlink(missing_ok=True)
    return Applied(table, len(delta.row_ids_U), was, digest, None, states, is_new=not is_done)


def _leads_back(path: Path, digest: str | None, to: str, row_ids_U: np.ndarray[Any, Any] | None = None) -> bool:
    """True if `path` is an undo of the table of that digest, or of any, leads back to the table of the other, and is
    of those rows, or of any."""
    if _UNDO.search(path.name) is None or not (digest is None or path.stem.endswith(f"-{digest[:12]}")):
        return False
    undo = read_delta(path)
    found = (undo.info.base.digest, undo.info.extra.get(REVERTS_TO))
    return found == (digest or found[0], to) and (row_ids_U is None or np.array_equal(undo.row_ids_U, row_ids_U))


def _undos(table: Path) -> list[tuple[int, Path]]:
    """The undos beside the table with their numbers, lowest first; 0 for those of earlier releases."""
    found = table.parent.glob(f"{glob.escape(table.stem)}.undo-*.safetensors")
    matches = [(_UNDO.search(path.name), path) for path in found]
    return sorted((int(match[1] or 0), path) for match, path in matches if match)


def _open_to_change(table: Path, delta: Path) -> MMapEmbeddingStorage:
    manifest = read_manifest(TableFiles(table).manifest)
    if row_dtype(manifest.dtype).is_compact:
        raise with_way_out(
            ValueError(f"{table} has rows of {manifest.dtype}, which are only read"),
            f"Look them up through {delta}: from_pretrained(folder, overlay=…)",
        )
    return open_table_as_it_is(table, mode="r+")


def _refuse_other_dtype(delta: Delta, storage: MMapEmbeddingStorage) -> None:
    if delta.rows_UD.dtype != storage.dtype:
        raise with_way_out(
            ValueError(f"{delta.path} has rows of {delta.rows_UD.dtype}, {storage.path} has {storage.dtype}"),
            "Make the delta anew",
        )


def _write_undo(undo: Path, storage: MMapEmbeddingStorage, delta: Delta, digest: str) -> None:
    base = dataclasses.replace(storage.identity(), digest=digest)
    info = DeltaInfo(base, extra={REVERTS_TO: storage.identity().digest}, updates=storage.updates)
    ids_U = torch.from_numpy(delta.row_ids_U)
    rows = Source(storage.embedding_dim, storage.dtype, lambda part: storage(ids_U[part]))
    write_delta(undo, info, delta.row_ids_U, {"rows": rows}, like=storage.path)


def _store(storage: MMapEmbeddingStorage, delta: Delta, *, updates: int | None) -> None:
    """In one commit, however many rows."""
    with storage.one_commit():
        for part in _parts(delta):
            storage.write(torch.from_numpy(delta.row_ids_U[part]), delta.rows_UD[part])
        if updates is not None:
            storage.updates = updates
        storage.flush()


def _has(storage: MMapEmbeddingStorage, delta: Delta) -> bool:
    return all(
        np.array_equal(_bits(storage(torch.from_numpy(delta.row_ids_U[part]))), _bits(delta.rows_UD[part]))
        for part in _parts(delta)
    )


def _check_is(storage: MMapEmbeddingStorage, delta: Delta, digest: str) -> None:
    if not _has(storage, delta):
        raise with_way_out(
            ValueError(f"{storage.path}: rows that were stored read otherwise"), "Check it: sense-engram verify"
        )
    if storage.identity().digest != digest:
        raise with_way_out(
            ValueError(
                f"{storage.path} has digest {storage.identity().digest} now, expected {digest}: rows outside of "
                f"{delta.path} aren't what they were"
            ),
            f"Check it: sense-engram verify {storage.path}",
        )


def _digest_with(storage: MMapEmbeddingStorage, delta: Delta) -> str:
    """Digest that the table will have with the delta's rows in it."""
    assert storage.manifest.checksums is not None
    sums, version = from_hex(storage.manifest.checksums), storage.manifest.format_version
    for part in _parts(delta):
        row_ids_U = delta.row_ids_U[part]
        old, new = (
            row_hashes(row_ids_U, _bits(rows_UD), version)
            for rows_UD in (storage(torch.from_numpy(row_ids_U)), delta.rows_UD[part])
        )
        add_to_blocks(sums, row_ids_U, new - old, storage.num_embeddings)
    return digest_of_blocks(to_hex(sums))


# Merging


def merge_deltas(paths: Sequence[Path], output: Path, *, prefer: str | None = None) -> Merged:
    """Makes one delta of several of the same base. Optimizer states are left out.

    A row that several changed to different bits is a conflict: `prefer` "first" or "last" takes it from the first or
    last of them in the order of `paths`, "mean" the mean of them (which is the base and the mean of their changes).
    Raises `ValueError` without it, naming the facts that collide, and where bases differ.
    """
    if prefer is not None and prefer not in PREFERENCES:
        raise ValueError(f"prefer = {prefer!r}: must be one of {', '.join(PREFERENCES)}")
    deltas = _of_one_base(paths)
    first = deltas[0]
    row_ids_U, counts_U = np.unique(np.concatenate([delta.row_ids_U for delta in deltas]), return_counts=True)
    shared_ids = row_ids_U[counts_U > 1]
    conflicts = _conflicts(deltas, shared_ids)
    if len(conflicts) and prefer is None:
        met, *more = colliding_facts(deltas, conflicts.tolist())
        facts_met = f": {met.facts_text()}{', and others' * bool(more)}" if any(met.facts.values()) else ""
        raise with_way_out(
            ValueError(
                f"{len(conflicts)} of {len(row_ids_U)} rows were changed by more than one of "
                f"{', '.join(path.name for path in paths)}, to different values (row {met.row_ids[0]} first)"
                f"{facts_met}"
            ),
            "Choose whose are taken: --prefer first, last or mean",
        )
    is_mean = prefer == "mean"
    order = deltas[::-1] if prefer == "first" else deltas  # who comes later wins
    extra: dict[str, Any] = {"merged": [path.name for path in paths]}
    facts = [facts_in(delta) for delta in order]
    if any(facts):
        # Of a mean no fact corrects another.
        extra |= as_extra(functools.reduce(together, [[], [*chain(*facts)]] if is_mean else facts))
    info = DeltaInfo(first.info.base, extra=extra)

    def read(part: slice) -> torch.Tensor:
        rows_UD = torch.empty(part.stop - part.start, first.rows_UD.shape[1], dtype=first.rows_UD.dtype)
        for delta in order:
            _put(delta, row_ids_U[part], rows_UD)
        if is_mean:
            of_part = np.flatnonzero(np.isin(row_ids_U[part], conflicts))
            rows_UD[torch.from_numpy(of_part)] = _mean(deltas, row_ids_U[part][of_part]).to(rows_UD.dtype)
        return rows_UD

    rows = Source(first.rows_UD.shape[1], first.rows_UD.dtype, read)
    write_delta(output, info, row_ids_U, {"rows": rows}, like=first.path)
    return Merged(read_delta(output), len(shared_ids), len(conflicts))


def collisions(paths: Sequence[Path]) -> list[Collision]:
    """Find rows that deltas of one base changed to different values, by the facts that they are of; nothing is
    written. Raises `ValueError` where bases differ."""
    deltas = _of_one_base(paths)
    row_ids_U, counts_U = np.unique(np.concatenate([delta.row_ids_U for delta in deltas]), return_counts=True)
    return colliding_facts(deltas, _conflicts(deltas, row_ids_U[counts_U > 1]).tolist())


def _of_one_base(paths: Sequence[Path]) -> list[Delta]:
    deltas = [read_delta(path) for path in paths]
    if len(deltas) < 2:
        raise with_way_out(ValueError(f"{len(deltas)} delta to merge"), "name two or more")
    first = deltas[0]
    for other in deltas[1:]:
        first.info.base.refuse_other(other.info.base, first.path, f"that of {other.path}")
        if other.rows_UD.dtype != first.rows_UD.dtype:
            raise ValueError(f"{other.path} has rows of {other.rows_UD.dtype}, {first.path} of {first.rows_UD.dtype}")
    return deltas


def _conflicts(deltas: Sequence[Delta], shared_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Those of the ids whose rows aren't the same bits in all that have them."""
    differ = np.zeros(len(shared_ids), dtype=bool)
    hashes = np.zeros(len(shared_ids), dtype=np.uint64)
    is_known = np.zeros(len(shared_ids), dtype=bool)
    for delta in deltas:
        places, at = _places(delta, shared_ids)
        for start in range(0, len(places), 4096):
            some, ids = slice(start, start + 4096), places[start : start + 4096]
            found = row_hashes(shared_ids[ids], _bits(delta.rows_UD[torch.from_numpy(at[some])]))
            differ[ids] |= is_known[ids] & (hashes[ids] != found)
            hashes[ids], is_known[ids] = found, True
    return shared_ids[differ]


def _put(delta: Delta, row_ids_U: np.ndarray[Any, Any], rows_UD: torch.Tensor) -> None:
    places, at = _places(delta, row_ids_U)
    rows_UD[torch.from_numpy(places)] = delta.rows_UD[torch.from_numpy(at)]


def _mean(deltas: Sequence[Delta], row_ids_U: np.ndarray[Any, Any]) -> torch.Tensor:
    sums_UD = torch.zeros(len(row_ids_U), deltas[0].rows_UD.shape[1])
    counts_U1 = torch.zeros(len(row_ids_U), 1)
    for delta in deltas:
        places, at = (torch.from_numpy(one) for one in _places(delta, row_ids_U))
        sums_UD[places] += delta.rows_UD[at].float()
        counts_U1[places] += 1
    return sums_UD / counts_U1


def _places(delta: Delta, row_ids_U: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(where in row_ids_U, where in the delta) of the ids that both have."""
    _, here, there = np.intersect1d(row_ids_U, delta.row_ids_U, assume_unique=True, return_indices=True)
    return here, there


def _rows_of(delta: Delta) -> Source:
    return Source(delta.rows_UD.shape[1], delta.rows_UD.dtype, lambda part: delta.rows_UD[part])


def _parts(delta: Delta) -> Iterator[slice]:
    part_rows = max(1, PART_BYTES // (delta.rows_UD.shape[1] * delta.rows_UD.element_size()))
    for start in range(0, len(delta.row_ids_U), part_rows):
        yield slice(start, min(start + part_rows, len(delta.row_ids_U)))


def _bits(rows_UD: torch.Tensor) -> np.ndarray[Any, Any]:
    """Rows as bytes: -0.0 equals 0.0, and these are told apart."""
    return rows_UD.contiguous().view(torch.uint8).numpy()
