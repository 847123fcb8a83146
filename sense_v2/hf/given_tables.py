"""Tables that are open already -> the layers of a model that read them, once they fit its configuration and map.

Row ids of another layout, or of another tokenizer's map, find rows like any other: nothing fails, and what is looked
up means nothing. So all that is known of a table is compared before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sense_v2.core.config import EngramConfig
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.released.released_table import ReleasedTable
from sense_v2.engram.tokenizer import IDENTITY, EngramTokenizer, write_identity_map
from sense_v2.engram.variants import VARIANTS

Placed = dict[int, tuple[int, Any]]
"""Layer of the model -> (layer of the configuration, table)."""


def placed_tables(storage: Any, config: EngramConfig) -> Placed:
    """What `attach_engram` was given as `storage`, by layer of the model. Raises `ValueError` where a table isn't
    `config`'s."""
    if not isinstance(storage, Mapping):
        if VARIANTS[config.variant].one_table:
            placed = {layer: (layer, storage) for layer in config.layer_indices}
        else:
            layer = _layer_of(storage, config.layer_indices[0])
            placed = {layer: (layer, storage)}
    elif VARIANTS[config.variant].one_table:
        raise ValueError(
            f"EngramConfig.variant = {config.variant!r} has one table for all layers; pass storage=table, not one a "
            "layer"
        )
    elif not storage:
        raise ValueError("storage = {}: name a table for at least one layer of the model")
    else:
        placed = {place: (_layer_of(table, place), table) for place, table in storage.items()}
    layout = HeadLayout.from_config(config)
    for layer, table in placed.values():
        _check(table, layer, config, layout)
    return placed


def _layer_of(table: Any, otherwise: int) -> int:
    """The layer that the rows were trained for, where the table says it."""
    return int(table.manifest.provenance.get("layer", otherwise))


def _below(storage: Any) -> Any:
    """The table that an overlay lies on; any other itself."""
    return storage.base if isinstance(storage, OverlayStorage) else storage


def _check(storage: Any, layer: int, config: EngramConfig, layout: HeadLayout) -> None:
    table = _below(storage)
    if layer not in layout.layer_ids:
        raise ValueError(
            f"{table.path} is of layer {layer}, and the configuration has memory in layers {config.layer_indices}; "
            "pass the configuration that the table was trained with (table.config)"
        )
    known = table.facts if isinstance(table, ReleasedTable) else None
    variant = table.manifest.provenance.get("variant", config.variant)
    if variant != config.variant:
        raise ValueError(f"{table.path} is of variant {variant!r}, EngramConfig.variant = {config.variant!r}")
    if table.embedding_dim != config.row_dim:
        raise ValueError(
            f"{table.path}: rows of {table.embedding_dim} values; EngramConfig.engram_dim = {config.engram_dim} "
            f"makes {config.row_dim}"
        )
    theirs = known.layout if known is not None else None
    if theirs is not None and theirs != layout:
        raise ValueError(
            f"{table.path}: the layout of its heads isn't that of the configuration (table_size, num_heads, "
            "ngram_orders, layer_indices); pass table.config"
        )
    num_rows = layout.num_rows_L[layout.layer_ids.index(layer)]
    if theirs is None and table.num_embeddings != num_rows:
        raise ValueError(
            f"{table.path}: {table.num_embeddings} rows, and layer {layer} of the configuration has {num_rows}"
        )
    seed = None if not isinstance(table, ReleasedTable) or table.config is None else table.config.seed
    seed = table.manifest.provenance.get("seed", seed)
    if seed is not None and seed != config.seed:
        raise ValueError(f"{table.path}: its hash has seed {seed}, EngramConfig.seed = {config.seed}")


def refuse_another_map(tables: Sequence[Any], shadow_map: EngramTokenizer) -> None:
    """Raises `ValueError` where a table's rows are of another map than this one."""
    for table in map(_below, tables):
        if isinstance(table, ReleasedTable):
            size, sha256 = table.tensors.compressed_vocab_size, table.tensors.map_sha256
        else:
            known = table.manifest.provenance
            size, sha256 = known.get("compressed_vocab_size"), known.get("shadow_map_sha256")
        if size is not None and size != shadow_map.compressed_vocab_size:
            raise ValueError(
                f"{table.path}: its rows are of {size} compressed ids, and the map of {shadow_map.tokenizer_name} "
                f"has {shadow_map.compressed_vocab_size}. Pass the tokenizer that the table was trained with"
            )
        if sha256 is not None and sha256 != shadow_map.sha256:
            raise ValueError(
                f"{table.path}: its rows are of the map with SHA-256 {sha256[:12]}…, and that of "
                f"{shadow_map.tokenizer_name} has {shadow_map.sha256[:12]}…: another tokenizer, or another revision. "
                "Pass the one that the table was trained with"
            )


def identity_map(config: EngramConfig, tables: Sequence[Any], num_embeddings: int) -> EngramTokenizer:
    """The map of a variant that takes token ids as they are: read from `config.shadow_map_path`, or made there for as
    many ids as the model has whose table it is; a new table's are `num_embeddings`."""
    path = Path(config.shadow_map_path)
    if not path.exists():
        below = map(_below, tables)
        sizes = [table.tensors.compressed_vocab_size for table in below if isinstance(table, ReleasedTable)]
        size = next((size for size in sizes if size), num_embeddings)
        write_identity_map(path, size, name=config.tokenizer_name)
    shadow_map = EngramTokenizer(path)
    if shadow_map.normalization not in (None, IDENTITY):
        raise ValueError(
            f"{path} folds token ids ({shadow_map.normalization!r}), and variant {config.variant!r} takes them as "
            "they are; choose another EngramConfig.shadow_map_path"
        )
    return shadow_map
