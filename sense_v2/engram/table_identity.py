"""Which table this is, and what its rows belong to: what tables are compared by.

`TableIdentity` names one table's rows, bit for bit; a delta carries that of the table it was made on. `Origin` names
the memory that rows were trained for: rows of another layout, or of another tokenizer's map, are found without an
error and mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sense_v2.core.errors import with_way_out
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.table.format import Manifest, provenance_differences

BLOCK_CHECKSUMS, SAMPLED_ROWS = "block checksums", "sampled rows"


@dataclass(frozen=True)
class TableIdentity:
    """One table as it was last committed: its shape, and a digest of its rows."""

    rows: int
    width: int
    dtype: str
    """Of the rows on disk: float32, int8, F8_E4M3, …"""
    digest: str
    digest_of: str
    """BLOCK_CHECKSUMS, or SAMPLED_ROWS where nothing lists checksums."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def refuse_other(self, found: TableIdentity, delta: object, table: object) -> None:
        """Raises `ValueError`, naming all that differs, where `found`, the table at hand, isn't this one."""
        names = ("rows", "width", "dtype", "digest_of", "digest")
        differences = [
            *provenance_differences(self.provenance, found.provenance),
            *((name, getattr(self, name), getattr(found, name)) for name in names),
        ]
        named = "; ".join(f"{name} {old!r}, here {new!r}" for name, old, new in differences if old != new)
        if named:
            raise with_way_out(
                ValueError(f"{delta} was made on another table than {table}: {named}"),
                "Use it with the table it was made on, as that was then (sense-engram delta show names it)",
            )


def identity_of(manifest: Manifest, path: object) -> TableIdentity:
    """Names the table of this manifest. Raises `ValueError` if the manifest has no checksums."""
    if manifest.checksums is None:
        raise with_way_out(
            ValueError(f"{path} has no checksums in its manifest, which are how a delta names it"),
            f"Add them once: sense-engram verify --repair {path}",
        )
    digest, provenance = digest_of_blocks(manifest.checksums), meaning_of(manifest)
    return TableIdentity(manifest.rows, manifest.width, manifest.dtype, digest, BLOCK_CHECKSUMS, provenance)


def meaning_of(manifest: Manifest) -> dict[str, Any]:
    """What its rows mean: its provenance, without how the table came to be."""
    return {name: value for name, value in manifest.provenance.items() if name != "converted_from"}


def digest_of_blocks(checksums: list[str]) -> str:
    return hashlib.sha256("".join(checksums).encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Origin:
    """The memory that a table's rows were trained for; None where the table doesn't say."""

    variant: str | None = None
    layer: int | None = None
    """In variants with a table for each layer."""
    seed: int | None = None
    layout: HeadLayout | None = None
    compressed_vocab_size: int | None = None
    map_sha256: str | None = None
    """Of the shadow map."""

    @classmethod
    def of_provenance(cls, known: Mapping[str, Any]) -> Origin:
        names = ("variant", "layer", "seed", "compressed_vocab_size")
        return cls(**{name: known.get(name) for name in names}, map_sha256=known.get("shadow_map_sha256"))
