"""Tables of ours -> a checkpoint in a released layout, which a serving engine loads.

    model-00001-of-0000n.safetensors    a table's rows: one file a layer
    model-0000n-of-0000n.safetensors    the fusion layers' weights, where they are given
    model.safetensors.index.json        what lies where
    config.json                         the layout, under the released checkpoint's keys; comes last

A conversion is a table of names (`LAYOUTS`, `sense_v2.engram.released.fusion_names`) around the transfer that all
conversions share: streamed, taken up again after a kill, read back and compared (`sense_v2.engram.upkeep.transfer`).

Only a memory with the published row ids can be written so: those of the variants `sense` and `paper` would be looked
up by an engine under other ids. What no key of config.json can say is refused by name.

N rows, D row width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.reading.safetensors_headers import INDEX_NAME
from sense_v2.engram.released.find_tables import released_tables
from sense_v2.engram.released.fusion_names import Tensors, ours_from_theirs, theirs_from_ours
from sense_v2.engram.released.layouts import (
    LAYOUTS,
    DescribedTable,
    Shard,
    config_json,
    hash_buffers,
    parts_of,
    table_shard,
)
from sense_v2.engram.table import disk
from sense_v2.engram.table.compact_rows import BLOCK_VALUES, FLOAT8, FLOAT8_MAX
from sense_v2.engram.table.disk import WriterLock, new_file
from sense_v2.engram.table.format import Manifest, row_dtype
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.table.row_dtypes import Coding, DtypeCoding, ScaledCodes
from sense_v2.engram.table.row_files import RowFiles
from sense_v2.engram.upkeep.convert import identity_of, progress_path, readable_manifest, table_side, temporary
from sense_v2.engram.upkeep.transfer import ERRORS, PART_VALUES, NewFile, Target, Transfer, is_made
from sense_v2.engram.variants import VARIANTS


@dataclass
class Exported:
    """What `export_tables` did."""

    folder: Path
    variant: str
    dtype: str
    """Of the rows, as safetensors spells it."""
    files: list[str]
    num_rows: int
    source_bytes: int
    num_bytes: int = 0
    """Of all tensors that were written."""
    resumed_rows: int = 0
    """Rows that an earlier call had done."""
    errors: dict[int, dict[str, float]] = field(default_factory=dict)
    """By layer, of the rows: `transfer.ERRORS`."""
    fusion_errors: dict[int, dict[str, float]] = field(default_factory=dict)
    """By layer, of all fusion weights: max_error, rms_error."""
    notes: list[str] = field(default_factory=list)


def export_tables(
    tables: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    variant: str,
    *,
    dtype: str | None = None,
    fusion: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    config: EngramConfig | None = None,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> Exported:
    """Write tables as a checkpoint in a released layout, or go on with it.

    Args:
        tables: One for each layer.
        folder: The checkpoint's. One that is this conversion's result stays as it is.
        variant: Whose layout.
        dtype: Of the rows, by default what the layout has.
        fusion: The fusion layers' weights by layer (`EngramFusionLayer.state_dict()`), of all layers or of none.
        config: The memory's, for what a table's manifest doesn't say.
        advance: Is told how many bytes are read and written.

    Raises:
        ValueError: The layout can't express the memory; else as `convert_table`.
    """
    folder = Path(folder)
    if variant not in LAYOUTS:
        raise with_way_out(ValueError(f"{variant!r} is no released layout"), f"there are {', '.join(LAYOUTS)}")
    allowed = LAYOUTS[variant].dtypes
    name = row_dtype(dtype or allowed[0]).name
    if name not in allowed:
        raise ValueError(f"rows of {name}: the released layout {variant} has {' or '.join(allowed)}")
    described = sorted(
        (described_table(Path(path), variant, config) for path in tables), key=lambda table: table.layer
    )
    _refuse_strangers(described)
    if fusion and set(fusion) != {table.layer for table in described}:
        raise ValueError(f"fusion weights of layers {sorted(fusion)} beside tables of {[t.layer for t in described]}")
    fused, fusion_errors = _fusion_tensors(variant, fusion or {}, described[0])
    streams = next(iter(fusion.values()))["gate.query_norm.weight"].shape if fusion else (None, None)
    row_bytes = described[0].manifest.width * (1 if name == FLOAT8 else 2)
    num_parts = parts_of(described[0].manifest.rows, row_bytes)
    settings = config_json(variant, described, *streams, is_float8=name == FLOAT8, num_parts=num_parts)
    folder.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(folder / "model.lock", str(folder))
    try:
        done = _export(described, folder, variant, name, num_parts, fused, settings, advance)
        done.fusion_errors = fusion_errors
        missing = sorted(set(described[0].layout.layer_ids) - {table.layer for table in described})
        if missing:
            done.notes.append(
                f"config.json names layer {', '.join(map(str, missing))} as well, whose table isn't here: an engine "
                "needs it from elsewhere"
            )
    finally:
        (folder / "model.lock").unlink(missing_ok=True)
        lock.release()
    return done


def _export(
    tables: Sequence[DescribedTable],
    folder: Path,
    variant: str,
    dtype: str,
    num_parts: int,
    fused: Tensors,
    settings: dict[str, Any],
    advance: Callable[[int], Any],
) -> Exported:
    total = len(tables) + (1 if fused else 0)
    files = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    of_tables = [table.manifest for table in tables]
    done = Exported(
        folder,
        variant,
        "BF16" if dtype == "bfloat16" else "F8_E4M3",
        files,
        num_rows=sum(manifest.rows for manifest in of_tables),
        source_bytes=sum(manifest.table_bytes for manifest in of_tables),
    )
    fusion_bytes = to_safetensors(fused, metadata={"format": "pt"}) if fused else b""
    for path, content in ((folder / "config.json", _as_json(settings)), (folder / files[-1], fusion_bytes)):
        if content and path.exists() and path.read_bytes() != content:
            raise with_way_out(
                FileExistsError(f"{path} is there already, of something else"), "choose another --output"
            )
    earlier = _earlier_errors(folder / INDEX_NAME)
    weight_map: dict[str, str] = {}
    for table, file in zip(tables, files, strict=False):
        coding = _target_coding(variant, dtype, table)
        shard = table_shard(temporary(folder / file), variant, table, coding, num_parts=num_parts)
        _export_rows(table, folder / file, shard, coding, earlier, done, advance)
        weight_map |= dict.fromkeys(shard.tensors, file)
        done.num_bytes += sum(shard.tensors.values())
    if fused:
        _write(folder / files[-1], fusion_bytes)
        weight_map |= dict.fromkeys(fused, files[-1])
        done.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in fused.values())
    # To nine digits: sums of the same numbers in other parts differ behind those.
    errors = {
        layer: {name: float(f"{value:.9g}") for name, value in of.items() if math.isfinite(value)}
        for layer, of in done.errors.items()
    }
    metadata = {"total_size": done.num_bytes, "conversion_errors": errors}
    _write(folder / INDEX_NAME, _as_json({"metadata": metadata, "weight_map": weight_map}))
    _write(folder / "config.json", _as_json(settings))
    released_tables(folder)  # as a reader finds them: types, shapes, bytes, rows against the layout
    for file in files:
        progress_path(folder / file).unlink(missing_ok=True)
    return done


def _export_rows(
    table: DescribedTable,
    path: Path,
    shard: Shard,
    coding: Coding,
    earlier: Mapping[str, dict[str, float]],
    done: Exported,
    advance: Callable[[int], Any],
) -> None:
    """Make one table's file, or find it made."""
    exists = path.exists()
    made = NewFile(path if exists else temporary(path), shard.num_bytes, shard.head)
    manifest_path = TableFiles(table.path).manifest
    transfer = Transfer(
        table_side(table.path, table.manifest),
        Target(path, shard.columns, coding),
        num_rows=table.manifest.rows,
        width=table.manifest.width,
        files=[made],
        progress_path=progress_path(path),
        identity=lambda: identity_of(read_manifest(manifest_path)),
        source_checksums=table.manifest.checksums,
        source_version=table.manifest.format_version,
    )
    if exists:  # by an earlier call: what it cost is in the progress file, or, at its end, in the index
        _refuse_another(made)
        advance(table.manifest.table_bytes + table.manifest.rows * coding.row_bytes(table.manifest.width))
        done.resumed_rows += table.manifest.rows
        of_index = earlier.get(str(table.layer), {})
        known = (
            transfer.errors() if transfer.resumed_rows else {name: of_index.get(name, math.nan) for name in ERRORS}
        )
        done.errors[table.layer] = known
        return
    transfer.run(advance)
    disk.rename(temporary(path), path)
    done.resumed_rows += transfer.resumed_rows
    done.notes += transfer.notes
    done.errors[table.layer] = transfer.errors()


def described_table(path: Path, variant: str, config: EngramConfig | None) -> DescribedTable:
    """Return what is known of a table of ours. Raises `ValueError` if the layout can't express it."""
    manifest = readable_manifest(path)
    known = dict(manifest.provenance)
    if config is not None:
        known |= {"table_size": config.table_size, "pad_token_id": config.pad_token_id}
    found = known.get("variant")
    if found != variant:
        one = found in VARIANTS and VARIANTS[found].one_table
        why = "one table for all layers, and row ids of its own" if one else "another layout"
        raise with_way_out(
            ValueError(
                f"{path} is of variant {found!r}: {why}, which an engine that computes {variant}'s row ids would "
                "never look up"
            ),
            f"Train a memory of that layout (variant_config({variant!r}, layer_indices=[…])), or serve this one "
            "with sense-engram serve",
        )
    try:
        described = known["layout"]
        layout = HeadLayout.build(
            variant,
            layer_ids=described["layer_ids"],
            ngram_orders=described["ngram_orders"],
            num_heads=described["num_heads"],
            table_size=known.get("table_size") or described["primes"][0][0],
        )
        layer = known["layer"] if "layer" in known else described["layer_ids"][0]
        place = layout.layer_ids.index(layer)
        missing = [name for name in ("compressed_vocab_size", "pad_token_id", "seed") if known.get(name) is None]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise with_way_out(
            ValueError(f"{TableFiles(path).manifest} doesn't say which layout its rows have ({error!r})"),
            "Name the model's folder",
        ) from None
    if missing:
        raise with_way_out(
            ValueError(f"{TableFiles(path).manifest} doesn't say {', '.join(missing)}, which config.json needs"),
            "Name the model's folder, or convert the checkpoint that it came from again, with its config.json",
        )
    if layout.to_dict() != described:
        raise ValueError(
            f"{path}: its heads aren't those of the variant {variant}; they can't be written in its layout"
        )
    if manifest.rows != layout.num_rows_L[place]:
        raise ValueError(
            f"{path}: {manifest.rows} rows, but layer {layer} of its layout has {layout.num_rows_L[place]}"
        )
    _refuse_inexpressible(path, variant, manifest, layout, known, config)
    return DescribedTable(
        path, manifest, layer, layout, {**known, "table_size": known.get("table_size") or described["primes"][0][0]}
    )


def _refuse_inexpressible(
    path: Path,
    variant: str,
    manifest: Manifest,
    layout: HeadLayout,
    known: Mapping[str, Any],
    config: EngramConfig | None,
) -> None:
    """Raise `ValueError` for what a config.json of that layout has no key for."""
    orders = list(layout.ngram_orders)
    if orders != list(range(2, max(orders) + 1)):
        raise with_way_out(
            ValueError(f"{path}: n-gram orders {orders}; the released layouts have all from 2 on"), "Train with those"
        )
    if variant == "deepseek_v41":
        if manifest.width % BLOCK_VALUES:
            raise with_way_out(
                ValueError(
                    f"{path}: rows of {manifest.width} values, and the layout has a scale for each {BLOCK_VALUES}"
                ),
                f"Train with a row width that is a multiple of {BLOCK_VALUES}",
            )
        if known["seed"] != 0:
            raise with_way_out(
                ValueError(
                    f"{path}: its hash has seed {known['seed']}, and the layout has no key for one: engines take 0"
                ),
                "Train with seed=0",
            )
        if config is not None and config.normalization != "deepseek":
            raise with_way_out(
                ValueError(
                    f"{path}: its tokenizer map folds by {config.normalization!r}, and engines of that layout by "
                    "'deepseek'"
                ),
                "Train with normalization='deepseek'",
            )


def _refuse_strangers(tables: Sequence[DescribedTable]) -> None:
    """Raise `ValueError` unless one config.json describes all tables, and each layer once."""
    if not tables:
        raise with_way_out(ValueError("no table to write"), "name one, or a folder of them")
    first = tables[0]
    layers = [table.layer for table in tables]
    if len(set(layers)) != len(layers):
        raise with_way_out(
            ValueError(f"{', '.join(str(t.path) for t in tables)}: two tables of one layer ({layers})"), "name one"
        )
    for table in tables[1:]:
        for name in ("layout", "seed", "pad_token_id", "compressed_vocab_size", "shadow_map_sha256"):
            if table.known.get(name) != first.known.get(name) or table.manifest.width != first.manifest.width:
                raise ValueError(f"{first.path} and {table.path} differ in {name}; they are of two memories")


def _target_coding(variant: str, dtype: str, table: DescribedTable) -> Coding:
    if variant != "qwen_ple" or dtype != FLOAT8:
        return DtypeCoding(row_dtype(dtype))
    return ScaledCodes(_fitting_scale(_largest_value(table)))


def _fitting_scale(largest: float) -> float:
    """The least bfloat16 with which 448 is enough for `largest`.

    >>> _fitting_scale(448.0), _fitting_scale(0.0)
    (1.0, 1.0)
    """
    if largest == 0:
        return 1.0
    scale = torch.tensor(largest / FLOAT8_MAX, dtype=torch.bfloat16)
    if float(scale) * FLOAT8_MAX < largest:
        scale = torch.nextafter(scale, torch.tensor(math.inf, dtype=torch.bfloat16))
    return float(scale)


def _largest_value(table: DescribedTable) -> float:
    """Return the largest |value|; reads all rows."""
    side, largest = table_side(table.path, table.manifest), 0.0
    rows, width = table.manifest.rows, table.manifest.width
    part_rows = max(1, min(PART_VALUES // width, rows))
    with RowFiles(side.columns) as files:
        buffer = np.empty((part_rows, files.row_bytes), dtype=np.uint8)
        for start in range(0, rows, part_rows):
            rows_UB = buffer[: min(part_rows, rows - start)]
            if files.hold_data(start, len(rows_UB)):
                files.read(start, rows_UB)
                found = float(side.coding.decode(rows_UB, width).abs().max())
                if not math.isfinite(found):
                    raise with_way_out(
                        ValueError(f"{table.path} holds NaN or an infinity"), "sense-engram verify says where"
                    )
                largest = max(largest, found)
    return largest


def _fusion_tensors(
    variant: str, fusion: Mapping[int, Mapping[str, torch.Tensor]], table: DescribedTable
) -> tuple[Tensors, dict[int, dict[str, float]]]:
    """Return released tensors by their full names, and by layer what writing them so costs."""
    tensors: Tensors = {}
    errors: dict[int, dict[str, float]] = {}
    for layer, weights in sorted(fusion.items()):
        try:
            of_layer = theirs_from_ours(variant, weights)
        except KeyError as error:
            raise with_way_out(
                ValueError(
                    f"the fusion weights of layer {layer} have no {error}: they aren't of the variant {variant}"
                ),
                "Pass those of EngramFusionLayer.state_dict()",
            ) from None
        back = ours_from_theirs(variant, of_layer.get)
        lost = torch.cat(
            [(back[name] - weights[name].float().cpu().reshape(back[name].shape)).flatten() for name in back]
        )
        errors[layer] = {"max_error": float(lost.abs().max()), "rms_error": float(lost.square().mean().sqrt())}
        prefix = LAYOUTS[variant].prefix.format(layer=layer)
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in of_layer.items()}
        if variant == "qwen_ple":
            tensors |= {
                f"{prefix}ple.ple_embedding.{name}": tensor for name, tensor in hash_buffers(layer, table).items()
            }
    return tensors, errors


def _refuse_another(made: NewFile) -> None:
    """Raise `FileExistsError` for a shard that isn't this conversion's."""
    if not is_made(made):
        raise with_way_out(
            FileExistsError(f"{made.path} is there already, of something else"), "choose another --output"
        )


def _earlier_errors(index: Path) -> dict[str, dict[str, float]]:
    """Read the errors that a finished earlier call wrote. Raises `FileExistsError` for another index."""
    if not index.exists():
        return {}
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["metadata"]["conversion_errors"]
        return {layer: {name: float(value) for name, value in of.items()} for layer, of in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise with_way_out(
            FileExistsError(f"{index} is there already, of another checkpoint"), "choose another --output"
        ) from None


def _write(path: Path, content: bytes) -> None:
    with new_file(path, replace=True) as fd:
        disk.write_at(fd, content, 0)


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
