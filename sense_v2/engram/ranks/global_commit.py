"""Several processes' rows and states -> one commit, or none: two phases around one rename.

    prepare    every rank: everything stored is synced, its next manifest is known, its journal still undoes it all
    decide     rank 0: one rename. Before it the commit doesn't exist; after it, it does
    finish     every rank: its journal is of an earlier commit now, and emptied

Whatever dies in between, the next opening looks at the file that the rename put in place. In one file that all ranks
map it is the table's own manifest, and every journal whose commit it names is undone. Of shards it is the global
manifest, which says of each shard which commit counts: a shard that has it is as it should be (its journal undoes
what came after); one that has prepared it (`engram_table.0-of-2.prepared`) goes forward to it; one that has prepared
another goes back.

docs/distributed.md has the protocol as a contract; docs/format.md the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sense_v2.core.errors import with_way_out
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk
from sense_v2.engram.table.checksums import from_hex, to_hex
from sense_v2.engram.table.format import MAX_MANIFEST_BYTES, Manifest, new_commit
from sense_v2.engram.table.opening import TableFiles, read_manifest

GLOBAL_VERSION = 1


@dataclass(frozen=True)
class GlobalManifest:
    """What ties shards into one table, and says which commit of each counts."""

    rows: int
    bounds: list[int]
    """First rows of the shards, and the number of all rows."""
    files: list[str]
    commits: list[str]
    """Of each shard's manifest."""
    generation: int = 0
    """Global commits so far."""
    step: int | None = None
    commit: str = ""
    """Drawn for each global commit."""

    def to_json(self) -> str:
        return json.dumps({"format_version": GLOBAL_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> GlobalManifest:
        """Raises `ValueError` naming the path for what isn't one, `FileNotFoundError` where there is none."""
        with open(path, "rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES)
        try:
            values = json.loads(raw)
            if not isinstance(values, dict) or values.pop("format_version", None) != GLOBAL_VERSION:
                raise ValueError(f"format_version must be {GLOBAL_VERSION}")
            manifest = cls(**values)
            manifest.validate()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} isn't the global manifest of a table in shards: {error}") from error
        return manifest

    def validate(self) -> None:
        """Raises `ValueError` for what can't be."""
        numbers = [self.rows, self.generation, *self.bounds]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("rows, generation and bounds are integers of 0 or more")
        ascending = sorted(self.bounds) == self.bounds
        if not (self.bounds and ascending and self.bounds[0] == 0 and self.bounds[-1] == self.rows):
            raise ValueError(f"bounds go from 0 up to rows, not {self.bounds}")
        if not len(self.files) == len(self.commits) == len(self.bounds) - 1:
            raise ValueError("files and commits are one for each shard")
        if not all(isinstance(text, str) for text in [*self.files, *self.commits, self.commit]):
            raise ValueError("files and commits are texts")


# One file that all ranks map


def commit_one_file(
    storage: MMapEmbeddingStorage, ranks: Ranks, step: int | None, extra: Mapping[str, Any] | None, *, durable: bool
) -> None:
    """Commits what all ranks stored to the file that all of them map. To be called by all."""
    with contextlib.ExitStack() as stack:
        manifest, adopt = ranks.together(
            "commit: prepare", lambda: stack.enter_context(storage.prepared_commit(step, extra, durable=durable))
        )
        texts = ranks.gather("commit: manifests", manifest.to_json())
        merged = merged_manifest(storage.manifest, [Manifest.from_json(text) for text in texts])
        path = TableFiles(storage.path).manifest
        ranks.together("commit: decide", lambda: disk.write_file(path, merged.to_json(), storage.path), only=0)
        adopt(merged)


def merged_manifest(old: Manifest, parts: Sequence[Manifest]) -> Manifest:
    """Rank 0's, with the checksums of what all ranks changed: a block's sum changes by the sum of the changes."""
    first = parts[0]
    states = {
        name: dataclasses.replace(
            entry,
            checksums=_merged_sums(
                old.states[name].checksums if name in old.states else None,
                [part.states[name].checksums for part in parts],
                is_new=name not in old.states,
            ),
        )
        for name, entry in first.states.items()
    }
    checksums = _merged_sums(old.checksums, [part.checksums for part in parts], is_new=False)
    return dataclasses.replace(first, states=states, checksums=checksums)


def _merged_sums(old: list[str] | None, parts: list[list[str] | None], *, is_new: bool) -> list[str] | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or (old is None and not is_new):
        return None
    before = np.zeros(len(known[0]), np.uint64) if old is None else from_hex(old)
    merged = before.copy()
    for part in known:
        merged += from_hex(part) - before
    return to_hex(merged)


# A shard a rank


def commit_shards(
    storage: MMapEmbeddingStorage,
    ranks: Ranks,
    path: Path,
    current: GlobalManifest,
    step: int | None,
    extra: Mapping[str, Any] | None,
    *,
    durable: bool,
) -> GlobalManifest:
    """Commits all ranks' shards under the global manifest at `path`, of which rank 0's disk has the only one. To be
    called by all; returns the new one."""
    files = TableFiles(storage.path)
    with contextlib.ExitStack() as stack:

        def prepare() -> Any:
            prepared = stack.enter_context(storage.prepared_commit(step, extra, durable=durable))
            disk.write_file(files.prepared, prepared[0].to_json(), storage.path)
            return prepared

        manifest, adopt = ranks.together("commit: prepare", prepare)
        commits = ranks.gather("commit: shards", manifest.commit)
        decided = dataclasses.replace(
            current,
            commits=commits,
            generation=current.generation + 1,
            step=manifest.step,
            commit=ranks.broadcast("commit: name", new_commit()),
        )
        ranks.together("commit: decide", lambda: disk.write_file(path, decided.to_json(), storage.path), only=0)
        _go_forward(files)
        adopt(manifest)
    return decided


def settle(files: TableFiles, commit: str) -> None:
    """Brings a shard that nobody has open to the commit that the global manifest names: forward where it has only
    prepared it, else a prepared one is forgotten. What was stored since is undone when the shard is opened.

    Raises `ValueError` for a shard that has neither: it is of another moment than the global manifest.
    """
    if files.prepared.exists():
        if read_manifest(files.prepared).commit == commit:
            _go_forward(files)
        else:
            disk.os.unlink(files.prepared)
            disk.sync(files.table.parent)
    found = read_manifest(files.manifest)
    if found.commit != commit:
        raise with_way_out(
            ValueError(
                f"{files.table} is of commit {found.commit} (step {found.step}), and the global manifest says that "
                f"its commit {commit} counts: they are of different moments, or the shard was trained on alone"
            ),
            "Put both back from one copy, or begin from a checkpoint",
        )


def _go_forward(files: TableFiles) -> None:
    disk.rename(files.prepared, files.manifest)


def write_global(path: Path, manifest: GlobalManifest) -> None:
    """Puts the global manifest in place, whole or not at all."""
    disk.write_file(path, manifest.to_json())
