"""Deltas of tables and of saved models: export, which table one is of, what is in one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sense_v2.core.errors import CommandError, what_and_way_out
from sense_v2.engram.delta.apply import export_delta, open_table_as_it_is, strip_delta
from sense_v2.engram.delta.delta_file import Delta
from sense_v2.engram.delta.kept_facts import FACTS, facts_in
from sense_v2.engram.upkeep.check import check_table
from sense_v2.engram.upkeep.find_table import find_table

# As a saved model has them (`sense_v2.hf.saving.folder`, which lies above this package).
MEMORY_FOLDER, FUSION_FILE = "engram", "fusion.safetensors"


def export_changes(source: Path, output: Path, *, base: Path | None = None, rows_only: bool = False) -> Delta:
    """Write the rows of a table that differ from its base's to a delta.

    Args:
        source: A table or a model; or an overlay's delta, whose optimizer states are left out.
        output: The new delta.
        base: The table, or the model, that `source` was trained from.
        rows_only: True to export rows whose fusion layers were trained with them.

    Raises:
        CommandError: There is a file at `output`, no base, or fusion layers that no delta holds.
        ValueError: The tables, or their files, don't fit together.
    """
    refuse_existing(output)
    if source.is_file() and source.suffix == ".safetensors":
        delta = strip_delta(source, output)
        if base is not None:
            _refuse_other_base(delta, _table_in(base))
        return delta
    if base is None:
        raise CommandError(
            f"{source} is a table, and nothing says what it was trained from",
            "name that table, or its model's folder: --base BASE",
        )
    if not rows_only:
        _refuse_other_fusion(source, base)
    return export_delta(_table_in(source), _table_in(base), output)


def refuse_existing(output: Path) -> None:
    """Raises `CommandError` where a file is at `output`."""
    if output.exists():
        raise CommandError(f"{output} is there already", "choose another --output, or remove it")


def check_base(delta: Delta, base: Path, *, verify: bool = False) -> tuple[Path, int | None]:
    """Check that a table is a delta's base.

    Args:
        delta: Says which table it is of.
        base: The table, or the folder of a model.
        verify: True to read all of the table, rather than believe its manifest.

    Returns:
        The table's path, and how many bytes were read if `verify`.

    Raises:
        ValueError: It is another table.
        CommandError: There is none, or it isn't what its manifest says.
    """
    table = _table_in(base)
    _refuse_other_base(delta, table)
    if not verify:
        return table, None
    check = check_table(table)
    if check.num_wrong:
        raise CommandError(
            f"{table} isn't what its manifest says: {check.findings[0].text}",
            f"sense-engram verify {table} lists all that is wrong",
        )
    return table, check.num_bytes


def describe(delta: Delta) -> dict[str, Any]:
    """Say what is in a delta, as JSON holds it."""
    info = delta.info
    return {
        "path": str(delta.path),
        "rows": len(delta.row_ids_U),
        "width": delta.rows_UD.shape[1],
        "dtype": str(delta.rows_UD.dtype).removeprefix("torch."),
        "bytes": delta.num_bytes,
        "base": dataclasses.asdict(info.base),
        "states": {name: info.state_steps[name] for name in delta.states},
        "step": info.step,
        "extra": {name: value for name, value in info.extra.items() if name != FACTS},
        "facts": [dataclasses.asdict(fact) for fact in facts_in(delta)],
        "heads": _heads(delta),
        "tables": _tables(delta),
    }


def _heads(delta: Delta) -> list[dict[str, int]]:
    """Changed rows of each layer's heads that have any; [] where the base doesn't say which those are."""
    layout: Any = delta.info.base.provenance.get("layout")
    try:
        heads = [
            {"layer": layer, "order": order, "head": head, "first": offset, "end": offset + prime}
            for layer, offsets, primes in zip(layout["layer_ids"], layout["offsets"], layout["primes"], strict=True)
            for (order, head), offset, prime in zip(
                [(order, head) for order in layout["ngram_orders"] for head in range(layout["num_heads"])],
                offsets,
                primes,
                strict=True,
            )
        ]
        ends = [np.searchsorted(delta.row_ids_U, [head.pop("first"), head.pop("end")]) for head in heads]
    except (TypeError, KeyError, ValueError):
        return []
    counted = [{**head, "rows": int(end - start)} for head, (start, end) in zip(heads, ends, strict=True)]
    return [head for head in counted if head["rows"]]


def _tables(delta: Delta) -> list[dict[str, Any]]:
    """Changed rows of each table of a base that is several, joined; [] where it is one."""
    tables: Any = delta.info.base.provenance.get("tables", [])
    try:
        ends = np.cumsum([0, *(table["rows"] for table in tables)])
        counts = np.diff(np.searchsorted(delta.row_ids_U, ends)).tolist()
        return [
            {"layer": table["layer"], "digest": table["digest"], "rows": count}
            for table, count in zip(tables, counts, strict=True)
        ]
    except (TypeError, KeyError, ValueError):
        return []


def _table_in(path: Path) -> Path:
    try:
        return find_table(path / MEMORY_FOLDER if (path / MEMORY_FOLDER).is_dir() else path)
    except ValueError as error:
        raise CommandError(
            what_and_way_out(error)[0], "name a table, its folder, or the folder of a model with memory"
        ) from None


def _refuse_other_base(delta: Delta, table: Path) -> None:
    storage = open_table_as_it_is(table)
    try:
        delta.info.base.refuse_other(storage.identity(), delta.path, table)
    finally:
        storage.close()


def _refuse_other_fusion(source: Path, base: Path) -> None:
    """A delta holds rows. Rows that were trained together with the fusion layers say something else behind others."""
    files = [folder / MEMORY_FOLDER / FUSION_FILE for folder in (source, base)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        raise CommandError(
            f"the fusion layers of {source} aren't those of {base}, and a delta holds rows alone, which would mean "
            "something else behind the old ones",
            "train with the fusion layers frozen, or send the whole model; --rows-only exports the rows all the same",
        )
