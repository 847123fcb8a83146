"""`sense-engram verify`: is a table what its last commit left? One line a finding; `--repair` undoes what was not."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.report import wording

DEFAULT_STEM = "engram_table"
NO_TABLES = (".json", ".journal", ".lock", ".tmp")


def run_verify(
    table: str | Path, *, repair: bool = False, progress: bool | None = None, echo: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Checks the table at that path; returns what was found, one dictionary that JSON can hold.

    Without `repair` nothing changes. `progress` None shows a bar past 1 GB. Raises what reading, and with `repair`
    writing, the files raises; `BlockingIOError` where another process writes and `repair` is given.
    """
    from sense_v2.engram.upkeep.check import check_table, repair_table

    started = time.perf_counter()
    repaired: list[str] = []
    if repair:
        repaired, check = repair_table(table, progress=progress)
    else:
        check = check_table(table, progress=progress)
    manifest = check.manifest
    seconds = time.perf_counter() - started
    result = {
        "path": str(table),
        "rows": manifest and manifest.rows,
        "width": manifest and manifest.width,
        "dtype": manifest and manifest.dtype,
        "generation": manifest and manifest.generation,
        "step": manifest and manifest.step,
        "repaired": repaired,
        "findings": [dataclasses.asdict(finding) for finding in check.findings],
        "wrong": check.num_wrong,
        "files": len(check.files),
        "bytes": check.num_bytes,
        "seconds": seconds,
    }
    for line in _description(result):
        echo(line)
    return result


def _description(result: dict[str, Any]) -> list[str]:
    lines = [f"table     {result['path']}"]
    if result["rows"] is not None:
        step = "" if result["step"] is None else f", step {wording.count(result['step'])}"
        lines.append(
            f"commit    generation {wording.count(result['generation'])}{step}: {wording.count(result['rows'])} rows "
            f"of {result['width']} {result['dtype']}"
        )
    lines += [f"repaired  {text}" for text in result["repaired"]]
    for finding in sorted(result["findings"], key=lambda finding: not finding["is_wrong"]):
        lines.append(f"{'wrong' if finding['is_wrong'] else 'note':<8}  {finding['file']}: {finding['text']}")
    lines.append(
        f"read      {wording.count(result['rows'] if result['files'] else 0)} rows, {result['files']} "
        f"{'file' if result['files'] == 1 else 'files'}, {wording.size(result['bytes'])} in "
        f"{wording.duration(result['seconds'])}"
    )
    wrong = result["wrong"]
    found = "nothing is wrong" if not wrong else f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong"
    return [*lines, f"result    {found}"]


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
        raise ValueError(f"{path} belongs to a table, but isn't one; name the table, its manifest or its folder")
    elif path.exists() or path.is_symlink() or path.with_suffix(".json").exists():
        return path
    else:
        raise ValueError(f"{path} isn't there")
    if len(tables) != 1:
        found = (
            f"more than one table is {where}: {', '.join(table.name for table in tables)}; name the one that is meant"
        )
        raise ValueError(found if tables else f"no table is {where}")
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
