"""A table in shards, one on each rank's own disk: opened together, as their global manifest says they belong.

Rank 0's disk has the manifest that names the shards, the rows that each holds, and the commit that each is at.

W ranks, N rows of the whole table, D row width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sense_v2.core.errors import with_way_out
from sense_v2.engram.ranks import global_commit
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.global_commit import GlobalManifest
from sense_v2.engram.ranks.ownership import Ownership
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.opening import TableFiles


def shard_name(table_name: str, rank: int, num_ranks: int) -> str:
    """Name of one shard of a table.

    >>> shard_name("engram_table.dat", 1, 4)
    'engram_table.1-of-4.dat'
    """
    stem, dot, suffix = table_name.rpartition(".")
    return f"{stem}.{rank}-of-{num_ranks}{dot}{suffix}" if stem else f"{table_name}.{rank}-of-{num_ranks}"


def global_manifest_path(table_path: Path) -> Path:
    """Where the manifest that ties the shards of a table lies; on rank 0's disk."""
    return table_path.with_name(table_path.name.rpartition(".")[0] + ".shards.json")


def open_shards(
    table_path: Path, num_rows: int, width: int, ranks: Ranks, ownership: Ownership, settings: dict[str, Any]
) -> tuple[MMapEmbeddingStorage, GlobalManifest]:
    """Open, or make, this rank's shard; by all ranks.

    Args:
        table_path: What the shards' names are made from.
        num_rows: N.
        width: D.
        ranks: All of them.
        ownership: Which rows each owns.
        settings: What `MMapEmbeddingStorage` takes besides, `mode` and `provenance` among them.

    Returns:
        The shard, and the global manifest.

    Raises:
        ValueError: The shards are those of another number of ranks, or not of one commit; on all ranks.
        FileNotFoundError: The global manifest names a shard that isn't there.
    """
    global_path, own_rows = global_manifest_path(table_path), ownership.rows_of(ranks.rank)
    path = table_path.with_name(shard_name(table_path.name, ranks.rank, ranks.num_ranks))
    files = TableFiles(path)
    found = ranks.together("open: global manifest", lambda: _read_global(global_path), only=0)
    known: GlobalManifest | None = ranks.broadcast("open: global manifest", found)
    if known is not None and tuple(known.bounds) != ownership.bounds:
        raise with_way_out(
            ValueError(
                f"{global_path} ties {len(known.files)} shards of rows from {known.bounds}; {ranks.num_ranks} ranks "
                f"would own rows from {list(ownership.bounds)}"
            ),
            f"Go on with {len(known.files)} ranks, or restore a checkpoint into another path",
        )
    provenance = settings["provenance"]
    provenance["shard"] = {
        "number": ranks.rank,
        "of": ranks.num_ranks,
        "first_row": own_rows.start,
        "table_rows": num_rows,
    }

    def opened() -> MMapEmbeddingStorage:
        if known is not None:
            if not path.exists():
                raise FileNotFoundError(f"{path} isn't there, and {global_path} says that it is a shard")
            if settings["mode"] == "r+":
                global_commit.settle(files, known.commits[ranks.rank])
        first_row = own_rows.start
        storage = MMapEmbeddingStorage(len(own_rows), width, path, first_row=first_row, **settings)
        commit = storage.manifest.commit
        if known is None and storage.manifest.generation:
            raise with_way_out(
                ValueError(
                    f"{path} was trained (generation {storage.manifest.generation}), and no global manifest "
                    f"{global_path} on rank 0 says what it belongs to"
                ),
                "Put it back, or remove the shards",
            )
        if known is not None and known.commits[ranks.rank] != commit:
            raise ValueError(f"{path} is of commit {commit}, which {global_path} doesn't name")
        return storage

    storage = ranks.together("open: shards", opened)
    if known is None:
        commits = ranks.gather("open: commits", storage.manifest.commit or "")
        names = [shard_name(table_path.name, rank, ranks.num_ranks) for rank in range(ranks.num_ranks)]
        new = GlobalManifest(num_rows, list(ownership.bounds), names, commits)
        ranks.together("open: new", lambda: global_commit.write_global(global_path, new), only=0)
        return storage, new
    return storage, known


def _read_global(path: Path) -> GlobalManifest | None:
    try:
        return GlobalManifest.read(path)
    except FileNotFoundError:
        return None
