"""A released table -> one of ours, which is mapped, trained and converted as any other.

Streamed, taken up again after a kill, read back and compared (`sense_v2.engram.upkeep.transfer`); checked before as
`open_released_table` checks (`sense_v2.engram.released.released_table`). Where no other dtype is asked for, a row's
bytes stay what they are: our float8_e4m3fn has DeepSeek's codes with their scales behind them, our bfloat16 Qwen's
values, our int4 the blocks of GGUF's IQ4_NL.

The manifest says which rows they are: variant, layer, layout, the tokenizer map's checksum. The fusion weights that
the checkpoint has for the layer lie beside the table, under our names (`sense_v2.engram.released.fusion_names`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import CommandError, with_way_out
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.reading.block_rows import BLOCK_FORMATS, BlockCoding
from sense_v2.engram.reading.gguf_headers import is_gguf
from sense_v2.engram.reading.safetensors_headers import TensorSpan, find_tensors
from sense_v2.engram.released.find_tables import (
    ReleasedTensors,
    find_released_table,
    released_tables,
    row_bytes,
    warn_unchecked,
)
from sense_v2.engram.released.fusion_names import FUSION_NAMES, Tensors, ours_from_theirs, scale_name
from sense_v2.engram.table import disk
from sense_v2.engram.table.compact_rows import BLOCK_VALUES, FLOAT8, INT4
from sense_v2.engram.table.disk import new_file
from sense_v2.engram.table.format import Manifest, as_json_object, file_bytes, row_dtype
from sense_v2.engram.table.row_dtypes import DtypeCoding, ScaledCodes
from sense_v2.engram.table.row_files import Column, Piece
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.upkeep.convert import Conversion, make_table
from sense_v2.engram.upkeep.shadow_map_setup import temporary_shadow_map
from sense_v2.engram.upkeep.transfer import Side
from sense_v2.engram.variants import VARIANTS

FUSION_SUFFIX = ".fusion.safetensors"
# A released type -> the row type of ours with the same bytes.
OUR_DTYPES = {"F8_E4M3": FLOAT8, "BF16": "bfloat16", "F16": "float16", "F32": "float32", "IQ4_NL": INT4}


@dataclass
class Imported:
    """What `import_table` did."""

    table: Conversion
    source: ReleasedTensors
    fusion_path: Path | None
    """The layer's fusion weights under our names, where the checkpoint has them."""

    @property
    def num_bytes(self) -> int:
        """Of the new table's file."""
        return self.table.manifest.table_bytes


def import_tables(
    place: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    layer: int | None = None,
    tokenizer: str | None = None,
    progress: Progress = no_progress,
) -> Iterator[Imported]:
    """Convert a checkpoint's tables one after another; yield what each conversion did.

    Args:
        place: The checkpoint's folder, index or file; or a GGUF file, whose fusion weights stay where they are.
        output: A table's file, or a folder for layer_1.dat, ….
        dtype: Of the new rows; without it their bytes stay what they are.
        layer: Only this layer's table.
        tokenizer: The name of the tokenizer whose map the rows should be of.
        progress: Is told how many bytes are read and written.

    Raises:
        CommandError: There is no such table, or `output` is one file for several.
        ValueError: As `import_table`.
    """
    output = Path(output)
    tables = [facts for facts in released_tables(place) if layer in (None, facts.layer)]
    if not tables:
        of = "" if layer is None else f" of layer {layer}"
        raise CommandError(f"{place}: no released table{of}", f"sense-engram inspect {place} says what is there")
    is_file = bool(output.suffix) and not output.is_dir()
    if is_file and len(tables) > 1:
        layers = ", ".join(str(facts.layer) for facts in tables)
        raise CommandError(f"{place} has tables of layers {layers}, and {output} is one file", "choose a --layer")
    rules = VARIANTS[tables[0].variant]
    with contextlib.ExitStack() as stack:
        shadow_map = None
        if tokenizer is not None and rules.compresses:
            builder = EngramTokenizerBuilder(tokenizer, str(rules.defaults["normalization"]))
            shadow_map = stack.enter_context(temporary_shadow_map(builder))
        for facts in tables:
            # Without a dtype of ours for them, import_table asks for one.
            new_bytes = file_bytes(facts.num_rows, facts.width, dtype or OUR_DTYPES.get(facts.dtype, FLOAT8))
            with progress(f"layer {facts.layer}", facts.num_bytes + new_bytes) as advance:
                done = import_table(
                    place,
                    facts.layer,
                    output if is_file else output / f"layer_{facts.layer}.dat",
                    dtype=dtype,
                    variant=facts.variant,
                    tokenizer=shadow_map,
                    advance=advance,
                )
            yield done


def import_table(
    place: str | os.PathLike[str],
    layer: int,
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    variant: str | None = None,
    config: EngramConfig | None = None,
    tokenizer: EngramTokenizer | None = None,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> Imported:
    """Write one table of a released checkpoint as one of ours, or go on with it.

    The manifest gets what is known: variant, layer, layout, the shadow map's checksum. The layer's fusion weights, if
    the checkpoint has them, go to `output` with the suffix .fusion.safetensors, for
    `EngramFusionLayer.load_state_dict`.

    Args:
        place: The checkpoint's folder, index or file; or a GGUF file, whose fusion weights stay where they are.
        layer: Whose table.
        output: The new table's file.
        dtype: Of the rows; without it their bytes stay what they are, else they are widened or coded anew.
        variant: As `open_released_table` takes it, which checks the same; so are `config` and `tokenizer`.
        advance: Is told how many bytes are read and written.

    Raises:
        ValueError: No dtype of ours has these bytes; or as `open_released_table` and `convert_table`.
    """
    output = Path(output)
    found = find_released_table(place, layer, variant=variant, config=config, tokenizer=tokenizer)
    warn_unchecked(found, stacklevel=3)
    coding = _coding_of(found)
    if dtype is None and isinstance(coding, BlockCoding):
        raise with_way_out(
            ValueError(f"{found.path}, layer {layer}: rows of {coding.name} are no row type of ours"),
            "dtype='float32' keeps every value as it is looked up, 'int8' and 'int4' code them anew",
        )
    if dtype is None and isinstance(coding, ScaledCodes):
        raise with_way_out(
            ValueError(
                f"{found.path}, layer {layer}: float8 codes with one scale ({coding.scale}) for the whole table are "
                "no row type of ours"
            ),
            "dtype='bfloat16' keeps every value as it is looked up, 'float8_e4m3fn' codes them anew",
        )
    wanted = Manifest(
        found.facts.num_rows, found.facts.width, dtype or coding.name, provenance=_provenance(found, tokenizer)
    )
    done = make_table(
        Side(found.path, _columns(found), coding),
        output,
        wanted,
        identity=lambda: _identity(found),
        advance=advance,
    )
    weights = _released_fusion(place, found.facts.variant, layer, len({span.name for span in found.weights}))
    fusion_path = output.with_suffix(FUSION_SUFFIX) if weights else None
    if fusion_path is not None:
        content = to_safetensors(weights, metadata={"format": "pt"})
        if not fusion_path.exists():
            with new_file(fusion_path) as fd:
                disk.write_at(fd, content, 0)
        elif fusion_path.read_bytes() != content:
            done.notes.append(f"{fusion_path} is there already, with other weights (trained?): it stays as it is")
    return Imported(done, found, fusion_path)


def _coding_of(found: ReleasedTensors) -> DtypeCoding | ScaledCodes | BlockCoding:
    if found.scale is not None:
        return ScaledCodes(float(found.scale), found.scale.dtype)
    name = OUR_DTYPES.get(found.facts.dtype)
    return BlockCoding(BLOCK_FORMATS[found.facts.dtype]) if name is None else DtypeCoding(row_dtype(name))


def _columns(found: ReleasedTensors) -> list[Column]:
    columns = [_column(found.weights, row_bytes(found.facts))]
    if found.scales and found.scale is None:
        columns.append(_column(found.scales, found.facts.width // BLOCK_VALUES))
    return columns


def _column(spans: Sequence[TensorSpan], row_bytes: int) -> Column:
    return Column(row_bytes, tuple(Piece(span.path, span.offset, span.shape[0]) for span in spans if span.shape[0]))


def _identity(found: ReleasedTensors) -> dict[str, Any]:
    """Say which rows these are, as far as that is known without reading them all."""
    paths = sorted({span.path for span in (*found.weights, *found.scales)})
    files = [[path.name, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]
    facts = found.facts
    return {"variant": facts.variant, "layer": facts.layer, "dtype": facts.dtype, "files": files}


def _provenance(found: ReleasedTensors, tokenizer: EngramTokenizer | None) -> dict[str, Any]:
    facts, config = found.facts, found.config
    known = {
        "variant": facts.variant,
        "layer": facts.layer,
        "seed": None if config is None else config.seed,
        "table_size": None if config is None else config.table_size,
        "pad_token_id": None if config is None else config.pad_token_id,
        "layout": None if facts.layout is None else facts.layout.to_dict(),
        "compressed_vocab_size": found.compressed_vocab_size,
        "shadow_map_sha256": found.map_sha256,
        "tokenizer_name": None if tokenizer is None else tokenizer.tokenizer_name,
    }
    return as_json_object({name: value for name, value in known.items() if value is not None})


def released_projections(place: str | os.PathLike[str], num_heads: int) -> Tensors:
    """Read LongCat's projections, `ngram_embeddings.post_projs.{h}.weight` [C, D], as the W_v [C, H·D] of
    `EngramFusionLayer`. Returns {} if there are none; raises `ValueError` if one is missing or has another shape."""
    named = re.compile(r"(?:model\.)?ngram_embeddings\.post_projs\.(\d+)\.weight")
    spans = {
        int(named.fullmatch(name)[1]): found[0]  # type: ignore[index]
        for name, found in find_tensors(place, lambda name: named.fullmatch(name) is not None).tensors.items()
    }
    parts = []
    for head in range(num_heads if spans else 0):
        if head not in spans:
            raise with_way_out(
                ValueError(f"{place}: ngram_embeddings.post_projs.{head}.weight isn't there"), "Fetch the rest"
            )
        span = spans[head]
        if len(span.shape) != 2 or span.shape != spans[0].shape:
            raise ValueError(
                f"{span.path}: {span.name} has shape {list(span.shape)}; expected that of the first, "
                f"{list(spans[0].shape)}"
            )
        with safe_open(span.path, framework="pt") as file:
            parts.append(file.get_tensor(span.name).float())
    return {"W_v.weight": torch.cat(parts, dim=1)} if parts else {}


def _released_fusion(place: str | os.PathLike[str], variant: str, layer: int, num_heads: int) -> Tensors:
    if is_gguf(place):  # quantized, and under other names
        return {}
    if variant not in FUSION_NAMES:
        return released_projections(place, num_heads)
    names = [name.theirs for name in FUSION_NAMES[variant]]
    names += [scale_name(name.theirs) for name in FUSION_NAMES[variant] if name.blocks]
    of_layer = re.compile(rf"(?:model\.)?(?:language_model\.)?layers\.{layer}\.({'|'.join(map(re.escape, names))})")
    spans = {
        of_layer.fullmatch(name)[1]: found[0]  # type: ignore[index]
        for name, found in find_tensors(place, lambda name: of_layer.fullmatch(name) is not None).tensors.items()
    }

    def get(theirs: str) -> torch.Tensor | None:
        span = spans.get(theirs)
        if span is None:
            return None
        with safe_open(span.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(span.name)
            return tensor

    try:
        return ours_from_theirs(variant, get)
    except (KeyError, ValueError, RuntimeError) as error:
        raise with_way_out(
            ValueError(f"{place}, layer {layer}: its fusion weights aren't whole ({error})"),
            "Fetch the rest of the checkpoint",
        ) from None
