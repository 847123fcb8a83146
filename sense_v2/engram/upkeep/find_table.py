"""A path that a person typed -> the table that it means."""

from __future__ import annotations

from pathlib import Path

from sense_v2.core.errors import with_way_out

DEFAULT_STEM = "engram_table"
NO_TABLES = (".json", ".journal", ".lock", ".tmp")


def find_table(path: Path) -> Path:
    """The table that is meant by its own path, its manifest's, or its folder's. Raises `ValueError` where that isn't
    there, or isn't clear."""
    if path.is_dir():
        manifests = [one for one in path.glob("*.json") if one.stem == DEFAULT_STEM or _is_manifest(one)]
        tables = sorted({table for manifest in manifests for table in _tables_of(manifest)})
        if not tables and (path / f"{DEFAULT_STEM}.dat").exists():
            return path / f"{DEFAULT_STEM}.dat"
        where = f"in the folder {path}"
    elif path.suffix == ".json" and path.exists():
        tables, where = _tables_of(path), f"beside {path}"
    elif path.suffix in NO_TABLES and path.exists():
        raise with_way_out(
            ValueError(f"{path} belongs to a table, but isn't one"), "name the table, its manifest or its folder"
        )
    elif path.exists() or path.is_symlink() or path.with_suffix(".json").exists():
        return path
    else:
        raise ValueError(f"{path} isn't there")
    if not tables:
        raise ValueError(f"no table is {where}")
    if len(tables) > 1:
        raise with_way_out(
            ValueError(f"more than one table is {where}: {', '.join(table.name for table in tables)}"),
            "name the one that is meant",
        )
    return tables[0]


def _is_manifest(path: Path) -> bool:
    """As far as its beginning tells; other JSON lies in a model's folder, too."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return b'"byte_order"' in file.read(4096)
    except OSError:
        return False


def _tables_of(manifest: Path) -> list[Path]:
    """The files that it may describe; where none is there, the one that has most likely gone, which is a finding."""
    beside = [path for path in manifest.parent.iterdir() if path.suffix not in NO_TABLES]
    found = [path for path in beside if manifest.stem in (path.name, path.stem)]
    return sorted(found) or [manifest.with_suffix(".dat")]
