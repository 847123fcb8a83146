"""`sense-engram delta`: export, apply, revert, merge and show the rows that were changed in a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sense_v2.cli.verify import find_table
from sense_v2.core.errors import CommandError
from sense_v2.engram.delta.apply import (
    Applied,
    apply_delta,
    export_delta,
    merge_deltas,
    open_table_as_it_is,
    revert_delta,
    strip_delta,
)
from sense_v2.engram.delta.delta_file import Delta, base_of, read_delta
from sense_v2.engram.upkeep.check import check_table
from sense_v2.report import wording

MEMORY_FOLDER, FUSION_FILE = "engram", "fusion.safetensors"
SHORT = 12  # digits of a digest that are shown
LEAST_SHARE = 0.001


def run_export(
    source: Path,
    output: Path,
    *,
    base: Path | None = None,
    rows_only: bool = False,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """The rows of `source`, a table or a model, that differ from `base`; or an overlay's delta, without its optimizer
    states. Returns one dictionary that JSON can hold.

    Raises `CommandError`, and what the tables' and deltas' files raise.
    """
    if output.exists():
        raise CommandError(f"{output} is there already", "choose another --output, or remove it")
    if _is_delta(source):
        delta = strip_delta(source, output)
        if base is not None:
            _refuse_other_base(delta, _table_in(base))
    elif base is None:
        raise CommandError(
            f"{source} is a table, and nothing says what it was trained from",
            "name that table, or its model's folder: --base BASE",
        )
    else:
        if not rows_only:
            _refuse_other_fusion(source, base)
        delta = export_delta(_table_in(source), _table_in(base), output)
    result = _described(delta)
    echo(f"delta    {output}, written and verified")
    for line in _lines(result):
        echo(line)
    return result


def run_apply(path: Path, table: Path, *, echo: Callable[[str], Any] = print) -> dict[str, Any]:
    """Puts a delta into its base, in place. Raises what `apply_delta` raises."""
    done = apply_delta(path, table)
    echo(f"applied  {path} to {table}: {_rows(done.num_rows)}, one commit, verified")
    _echo_digests(done, echo)
    if done.undo is None:
        echo("undo     none: nothing differed")
    else:
        echo(f"undo     {done.undo}, {wording.size(done.undo.stat().st_size)}; sense-engram delta revert {table}")
    return _as_json(done)


def run_revert(table: Path, *, echo: Callable[[str], Any] = print) -> dict[str, Any]:
    """Takes the last applied delta out of the table again. Raises what `revert_delta` raises."""
    done = revert_delta(table)
    echo(f"reverted {table}: {_rows(done.num_rows)} as they were, bit for bit, one commit, verified")
    _echo_digests(done, echo)
    return _as_json(done)


def run_merge(
    paths: Sequence[Path], output: Path, *, prefer: str | None = None, echo: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Makes one delta of several. Raises `CommandError`, and what `merge_deltas` raises."""
    if output.exists():
        raise CommandError(f"{output} is there already", "choose another --output, or remove it")
    merged = merge_deltas(paths, output, prefer=prefer)
    result = {
        **_described(merged.delta),
        "merged": [str(path) for path in paths],
        "shared": merged.num_shared,
        "conflicts": merged.num_conflicts,
        "prefer": prefer,
    }
    echo(f"delta    {output}, made of {len(paths)}, written and verified")
    of_them = f", {_rows(merged.num_conflicts)} to other values" * (merged.num_conflicts > 0)
    taken = f": the {prefer} taken" * (merged.num_conflicts > 0)
    echo(f"shared   {_rows(merged.num_shared)} in more than one{of_them}{taken}")
    for line in _lines(result):
        echo(line)
    return result


def run_show(
    path: Path, *, base: Path | None = None, verify: bool = False, echo: Callable[[str], Any] = print
) -> dict[str, Any]:
    """What is in a delta, all of which is read and checked; with `base`, whether that is its base, and with `verify`
    whether that table's rows are what its manifest says, all of which are read. Raises `ValueError` where not."""
    delta = read_delta(path)
    result: dict[str, Any] = {**_described(delta), "fits": None, "verified": None}
    echo(f"delta    {path}, undamaged")
    for line in _lines(result):
        echo(line)
    if base is not None:
        table = _table_in(base)
        _refuse_other_base(delta, table)
        result["fits"] = str(table)
        if verify:
            check = check_table(table)
            if check.num_wrong:
                raise CommandError(
                    f"{table} isn't what its manifest says: {check.findings[0].text}",
                    f"sense-engram verify {table} lists all that is wrong",
                )
            result["verified"] = check.num_bytes
        read = f", all of its {wording.size(result['verified'])} read" if verify else ""
        echo(f"fits     {table}{read}")
    elif verify:
        raise CommandError("--verify reads the base, and none is named", "add --base TABLE")
    return result


def _is_delta(path: Path) -> bool:
    return path.is_file() and path.suffix == ".safetensors"


def _table_in(path: Path) -> Path:
    """The table at a path, or in a model's folder. Raises `CommandError`."""
    try:
        return find_table(path / MEMORY_FOLDER if (path / MEMORY_FOLDER).is_dir() else path)
    except ValueError as error:
        raise CommandError(str(error), "name a table, its folder, or the folder of a model with memory") from None


def _refuse_other_base(delta: Delta, table: Path) -> None:
    storage = open_table_as_it_is(table)
    try:
        delta.info.base.refuse_other(base_of(storage), delta.path, table)
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


def _described(delta: Delta) -> dict[str, Any]:
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
        "extra": info.extra,
        "heads": _heads(delta),
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


def _lines(result: dict[str, Any]) -> list[str]:
    base = result["base"]
    share = result["rows"] / base["rows"]
    lines = [
        f"rows     {wording.count(result['rows'])} of {wording.count(base['rows'])}"
        f"{f' ({wording.percent(share)})' * (share >= LEAST_SHARE)}, {result['width']} {result['dtype']} each, "
        f"{wording.size(result['bytes'])} in all"
    ]
    of_layers: dict[int, dict[int, int]] = {}
    for head in result["heads"]:
        orders = of_layers.setdefault(head["layer"], {})
        orders[head["order"]] = orders.get(head["order"], 0) + head["rows"]
    for layer, orders in of_layers.items():
        grams = ", ".join(f"{wording.count(count)} of {order}-grams" for order, count in orders.items())
        lines.append(f"layer {layer:<3}{grams}")
    lines.append(f"base     {base['dtype']}, digest {base['digest'][:SHORT]}… (of its {base['digest_of']})")
    if result["states"]:
        states = ", ".join(f"{name} ({wording.count(step)} steps)" for name, step in result["states"].items())
        lines.append(f"states   {states}; sense-engram delta export leaves them out")
    return lines


def _rows(count: int) -> str:
    return f"{wording.count(count)} {'row' if count == 1 else 'rows'}"


def _echo_digests(done: Applied, echo: Callable[[str], Any]) -> None:
    echo(f"digest   {done.digest_before[:SHORT]}… before, {done.digest[:SHORT]}… now")
    if done.states:
        echo(f"states   {', '.join(done.states)} of the table left as they were")


def _as_json(done: Applied) -> dict[str, Any]:
    return {
        "table": str(done.table),
        "rows": done.num_rows,
        "digest_before": done.digest_before,
        "digest": done.digest,
        "undo": None if done.undo is None else str(done.undo),
        "states": list(done.states),
    }
