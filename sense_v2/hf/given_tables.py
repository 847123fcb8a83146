"""Tables that are open already -> the layers of a model, once they fit its configuration.

Row ids of another layout, or of another tokenizer's map, find rows like any other: nothing fails, and what is looked
up means nothing. So all that is known of a table is compared before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.row_source import RowSource
from sense_v2.engram.tokenizer import IDENTITY, EngramTokenizer, write_identity_map
from sense_v2.engram.variants import VARIANTS

Placed = dict[int, tuple[int, RowSource]]
"""Layer of the model -> (layer of the configuration, table)."""


def placed_tables(storage: RowSource | Mapping[int, RowSource], config: EngramConfig) -> Placed:
    """What `attach_engram` was given as `storage`, by layer of the model. Raises `ValueError` where a table isn't
    `config`'s."""
    if not isinstance(storage, Mapping):
        if VARIANTS[config.variant].one_table:
            placed: Placed = {layer: (layer, storage) for layer in config.layer_indices}
        else:
            layer = _layer_of(storage, config.layer_indices[0])
            placed = {layer: (layer, storage)}
    elif VARIANTS[config.variant].one_table:
        raise with_way_out(
            ValueError(f"EngramConfig.variant = {config.variant!r} has one table for all layers"),
            "pass storage=table, not one a layer",
        )
    elif not storage:
        raise with_way_out(ValueError("storage = {}"), "name a table for at least one layer of the model")
    else:
        placed = {place: (_layer_of(table, place), table) for place, table in storage.items()}
    layout = HeadLayout.from_config(config)
    for layer, table in placed.values():
        _check(table, layer, config, layout)
    return placed


def _layer_of(table: RowSource, otherwise: int) -> int:
    """The layer that the rows were trained for, if the table says it."""
    known = table.belongs_to.layer
    return otherwise if known is None else known


def _check(table: RowSource, layer: int, config: EngramConfig, layout: HeadLayout) -> None:
    path, theirs = table.table.path, table.belongs_to
    if layer not in layout.layer_ids:
        raise with_way_out(
            ValueError(
                f"{path} is of layer {layer}, and the configuration has memory in layers {config.layer_indices}"
            ),
            "pass the configuration that the table was trained with (table.config)",
        )
    if theirs.variant not in (None, config.variant):
        raise ValueError(f"{path} is of variant {theirs.variant!r}, EngramConfig.variant = {config.variant!r}")
    if table.embedding_dim != config.row_dim:
        raise ValueError(
            f"{path}: rows of {table.embedding_dim} values; EngramConfig.engram_dim = {config.engram_dim} "
            f"makes {config.row_dim}"
        )
    if theirs.layout not in (None, layout):
        raise with_way_out(
            ValueError(
                f"{path}: the layout of its heads isn't that of the configuration (table_size, num_heads, "
                "ngram_orders, layer_indices)"
            ),
            "pass table.config",
        )
    num_rows = layout.num_rows_L[layout.layer_ids.index(layer)]
    if theirs.layout is None and table.num_embeddings != num_rows:
        raise ValueError(
            f"{path}: {table.num_embeddings} rows, and layer {layer} of the configuration has {num_rows}"
        )
    if theirs.seed not in (None, config.seed):
        raise ValueError(f"{path}: its hash has seed {theirs.seed}, EngramConfig.seed = {config.seed}")


def refuse_another_map(tables: Sequence[RowSource], shadow_map: EngramTokenizer) -> None:
    """Raises `ValueError` where a table's rows are of another map than this one."""
    for table in tables:
        path, theirs = table.table.path, table.belongs_to
        size, sha256 = theirs.compressed_vocab_size, theirs.map_sha256
        if size not in (None, shadow_map.compressed_vocab_size):
            raise with_way_out(
                ValueError(
                    f"{path}: its rows are of {size} compressed ids, and the map of {shadow_map.tokenizer_name} has "
                    f"{shadow_map.compressed_vocab_size}"
                ),
                "Pass the tokenizer that the table was trained with",
            )
        if sha256 is not None and sha256 != shadow_map.sha256:
            raise with_way_out(
                ValueError(
                    f"{path}: its rows are of the map with SHA-256 {sha256[:12]}…, and that of "
                    f"{shadow_map.tokenizer_name} has {shadow_map.sha256[:12]}…: another tokenizer, or another "
                    "revision"
                ),
                "Pass the one that the table was trained with",
            )


def identity_map(config: EngramConfig, tables: Sequence[RowSource], num_embeddings: int) -> EngramTokenizer:
    """The map of a variant that takes token ids as they are: read from `config.shadow_map_path`, or made there for as
    many ids as the model has whose table it is; a new table's are `num_embeddings`."""
    path = Path(config.paths()[1])
    if not path.exists():
        sizes = [table.belongs_to.compressed_vocab_size for table in tables]
        size = next((size for size in sizes if size), num_embeddings)
        write_identity_map(path, size, name=config.tokenizer_name)
    shadow_map = EngramTokenizer(path)
    if shadow_map.normalization not in (None, IDENTITY):
        raise with_way_out(
            ValueError(
                f"{path} folds token ids ({shadow_map.normalization!r}), and variant {config.variant!r} takes them "
                "as they are"
            ),
            "choose another EngramConfig.shadow_map_path",
        )
    return shadow_map
