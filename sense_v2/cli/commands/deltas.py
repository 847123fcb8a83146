"""Commands for rows that were changed in a table: delta teach, make-writable, export, apply, revert, merge, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sense_v2.cli.options import DeviceOption, FolderArgument, JsonOption, choice, table_path_of
from sense_v2.cli.output import lines_to, print_json, progress_to, report_paths, write_json
from sense_v2.core.errors import CommandError
from sense_v2.report import wording

if TYPE_CHECKING:
    from sense_v2.engram.delta.apply import Applied

PREFERENCES = ("first", "last", "mean")
PreferOption = Annotated[
    str | None,
    choice(PREFERENCES, "Whose row is taken where several changed one to different values; refused without it."),
]
SHORT = 12  # digits of a digest that are shown
LEAST_SHARE = 0.001

OutputOption = Annotated[Path, typer.Option(metavar="FILE", help="The new delta, NAME.safetensors.")]
TableArgument = Annotated[
    Path, typer.Argument(callback=table_path_of, help="A table, or the folder of a model with memory.")
]


def teach(
    folder: FolderArgument,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The delta, NAME.safetensors; one that is there is added to.")
    ],
    text: Annotated[
        str | None, typer.Argument(help="What the model is to say; mind the space that it begins with.")
    ] = None,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text that comes before it.")] = "",
    facts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Many facts, one a line, instead of a text (docs/delta.md).")
    ] = None,
    wordings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Templates with {subject} that facts are taught in.")
    ] = None,
    hold_out: Annotated[
        Path | None, typer.Option("--hold-out", metavar="FILE", help="Templates that are asked and never taught.")
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Other texts, one a line, to measure the damage on.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", help="With --facts: a page of what was learned; its JSON goes beside it."),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            "--kl-weight", metavar="NUMBER", min=0, help="With --facts: how firmly neutral texts are held in place."
        ),
    ] = None,
    on: Annotated[
        list[Path] | None,
        typer.Option("--on", metavar="DELTA", help="With --facts: a delta that this one lies on top of; repeatable."),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", metavar="N", min=1, help="With --facts: how many rows may learn.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Steps at most.")] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="How far a row moves in a step; by default found out.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Teach a model a short text or a file of facts. Only rows of their n-grams change; they go to a small file.

    Example: sense-engram delta teach runs/demo/model " Lutz." --prompt "The capital is" --output facts.safetensors
    """
    if not (folder / "engram").is_dir():
        from sense_v2.hf.serving.offload import has_ngram_tables

        if not has_ngram_tables(folder):
            raise CommandError(f"{folder} is no folder of a model with memory", "name what train, or demo, has saved")
    given = {name: value for name, value in (("steps", steps), ("lr", lr)) if value is not None}
    of_facts: dict[str, Any] = {
        "wordings": wordings,
        "hold_out": hold_out,
        "neutral": neutral,
        "kl_weight": kl_weight,
    }
    of_facts = {
        name: value
        for name, value in {**of_facts, "on": on or None, "max_rows": max_rows}.items()
        if value is not None
    }
    if (text is None) == (facts is None) or (facts is None and (of_facts or report)) or (facts and prompt):
        raise typer.BadParameter("give either a text (and a prompt), or --facts FILE (and its options)")
    if facts is not None:
        return _teach_facts(folder, facts, output, report, as_json, device=device, **given, **of_facts)

    from sense_v2.hf.training.teaching import teach_delta

    echo = lines_to(as_json)
    result = teach_delta(folder, str(text), output, prompt=prompt, device=device, progress=progress_to(echo), **given)
    before, after = (wording.decimals(loss, 2) for loss in result["loss"])
    after_prompt = f" after {prompt!r}" if prompt else ""
    lines = [
        f"taught   {text!r}{after_prompt}: loss {before} before, {after} now, "
        f"{wording.number_of(result['steps'], 'step')} in {wording.duration(result['seconds'])}"
    ]
    if result["before"] is not None:
        lines += [f"before   {result['before']!r}", f"now      {result['after']!r}"]
    echo(
        *lines,
        f"delta    {output}: {wording.number_of(result['rows'], 'row')} of this text, "
        f"{wording.count(result['rows_in_all'])} in all, {wording.size(result['bytes'])}",
    )
    if as_json:
        print_json(result)


def make_writable(
    folder: FolderArgument,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The new folder; the first one stays as it is.")],
    facts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Facts to train on, each with its own wordings, instead of made-up ones."),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Batches of 16 questions.")] = 250,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the made-up facts and their order.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train the fusion layers of a memory, once, until they carry facts, so that `delta teach` can write rows alone.

    Example: sense-engram delta make-writable runs/train --output runs/writable
    """
    if not (folder / "engram").is_dir():
        raise CommandError(f"{folder} is no folder of a model with memory", "name what train, or demo, has saved")

    from sense_v2.hf.facts.writable import make_folder_writable

    echo = lines_to(as_json)
    result = make_folder_writable(
        folder, output, facts_file=facts, steps=steps, seed=seed, device=device, progress=progress_to(echo)
    )
    first, last = (wording.decimals(loss, 2) for loss in result["loss"])
    echo(
        f"taught   fusion layers {wording.listing(list(map(str, result['layers'])))}: loss {first} before, {last} "
        f"now, {wording.number_of(result['steps'], 'step')} in {wording.duration(result['seconds'])}",
        f"saved    {output}, its rows as they were; sense-engram delta teach {output} --facts FILE",
    )
    if as_json:
        print_json(result)


def export(
    source: Annotated[
        Path,
        typer.Argument(help="A trained table or model; or an overlay's file, to leave its optimizer states out."),
    ],
    output: OutputOption,
    base: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The table, or the model's folder, it was trained from.")
    ] = None,
    rows_only: Annotated[
        bool,
        typer.Option("--rows-only", help="Export even if the fusion layers were trained, too, which no delta holds."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the rows that were changed in a table to a small file, which names the table they were changed in.

    Example: sense-engram delta export runs/taught --base runs/demo/model --output facts.safetensors
    """
    from sense_v2.engram.delta.exporting import describe, export_changes

    result = describe(export_changes(source, output, base=base, rows_only=rows_only))
    lines_to(as_json)(f"delta    {output}, written and verified", *_delta_lines(result))
    if as_json:
        print_json(result)


def apply(
    delta: Annotated[Path, typer.Argument(help="What export, or an overlay, has written.")],
    table: TableArgument,
    as_json: JsonOption = False,
) -> None:
    """Put a delta's rows into the table they were changed in, in place, and keep beside it what they replace.

    Example: sense-engram delta apply facts.safetensors runs/demo/model
    """
    from sense_v2.engram.delta.apply import apply_delta

    done = apply_delta(delta, table)
    undo = "none: nothing differed"
    if done.undo is not None:
        undo = f"{done.undo}, {wording.size(done.undo.stat().st_size)}; sense-engram delta revert {table}"
    lines_to(as_json)(
        f"applied  {_already(done)}{delta} to {table}: {_rows(done.num_rows)}, one commit, verified",
        *_digest_lines(done),
        f"undo     {undo}",
    )
    if as_json:
        print_json(_applied(done))


def revert(table: TableArgument, as_json: JsonOption = False) -> None:
    """Take the delta that was applied last out of a table again. Its rows are then what they were, bit for bit.

    Example: sense-engram delta revert runs/demo/model
    """
    from sense_v2.engram.delta.apply import revert_delta

    done = revert_delta(table)
    lines_to(as_json)(
        f"reverted {_already(done)}{table}: {_rows(done.num_rows)} as they were, bit for bit, one commit, verified",
        *_digest_lines(done),
    )
    if as_json:
        print_json(_applied(done))


def merge(
    deltas: Annotated[list[Path], typer.Argument(help="Two or more deltas of one table.")],
    output: OutputOption,
    prefer: PreferOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make one delta of several of the same table.

    Example: sense-engram delta merge facts.safetensors names.safetensors --output both.safetensors
    """
    from sense_v2.engram.delta.apply import collisions, merge_deltas
    from sense_v2.engram.delta.exporting import describe, refuse_existing

    if prefer is not None and prefer not in PREFERENCES:
        raise typer.BadParameter(f"{prefer!r}: {', '.join(PREFERENCES)}", param_hint="--prefer")
    refuse_existing(output)
    echo = lines_to(as_json)
    met = collisions(deltas)
    for one in met:
        if any(one.facts.values()):
            echo(f"collide  {one.text()}")
    merged = merge_deltas(deltas, output, prefer=prefer)
    result = {
        **describe(merged.delta),
        "merged": [str(path) for path in deltas],
        "shared": merged.num_shared,
        "conflicts": merged.num_conflicts,
        "prefer": prefer,
        "collisions": [
            {
                "row_ids": list(one.row_ids),
                "facts": {name: [fact.name() for fact in facts] for name, facts in one.facts.items()},
            }
            for one in met
        ],
    }
    conflicts = ""
    if merged.num_conflicts:
        conflicts = f", {_rows(merged.num_conflicts)} to other values: the {prefer} taken"
    echo(
        f"delta    {output}, made of {len(deltas)}, written and verified",
        f"shared   {_rows(merged.num_shared)} in more than one{conflicts}",
        *_delta_lines(result),
    )
    if as_json:
        print_json(result)


def withdraw(
    delta: Annotated[Path, typer.Argument(help="A delta that facts were taught into.")],
    facts: Annotated[list[str], typer.Argument(help="Their subjects, or 'subject → answer'.")],
    output: OutputOption,
    as_json: JsonOption = False,
) -> None:
    """Make a delta without some of its facts, whose rows are then what they were without them.

    Example: sense-engram delta withdraw facts.safetensors "Kabo Rimu" --output fewer.safetensors
    """
    from sense_v2.engram.delta.exporting import describe, refuse_existing
    from sense_v2.engram.delta.kept_facts import first_ids, names_of, withdraw_facts

    refuse_existing(output)
    done = withdraw_facts(delta, facts, output)
    result = {
        **describe(done.delta),
        "withdrawn": [{"fact": fact.name(), "row_ids": list(fact.row_ids)} for fact in done.facts],
        "shared": [{"row": row, "facts": [fact.name() for fact in facts]} for row, facts in done.shared.items()],
    }
    verb = "is what it was" if len(done.row_ids) == 1 else "are what they were"
    without = "it" if len(done.facts) == 1 else "them"
    lines = [f"withdrew {names_of(done.facts)}: {_rows(len(done.row_ids))} {verb} without {without}"]
    if done.shared:
        others = list(dict.fromkeys(fact for facts in done.shared.values() for fact in facts))
        has = "has" if len(others) == 1 else "have"
        lines.append(
            f"stay     {_rows(len(done.shared))} of {without} ({first_ids(done.shared)}), "
            f"which {names_of(others)} {has} as well"
        )
    lines_to(as_json)(*lines, f"delta    {output}, written and verified", *_delta_lines(result))
    if as_json:
        print_json(result)


def show(
    delta: Annotated[Path, typer.Argument(help="What export, merge, or an overlay has written.")],
    base: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A table, or a model's folder: is it the delta's base?")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all rows of the base, rather than believe its manifest.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is in a delta, and check it: rows, layers, bytes, and which table it belongs to.

    Example: sense-engram delta show facts.safetensors --base runs/demo/model
    """
    from sense_v2.engram.delta.delta_file import read_delta
    from sense_v2.engram.delta.exporting import check_base, describe

    echo = lines_to(as_json)
    found = read_delta(delta)
    result = {**describe(found), "fits": None, "verified": None}
    echo(f"delta    {delta}, undamaged", *_delta_lines(result))
    if base is not None:
        table, num_bytes = check_base(found, base, verify=verify)
        result |= {"fits": str(table), "verified": num_bytes}
        read = f", all of its {wording.size(num_bytes)} read" if verify else ""
        echo(f"fits     {table}{read}")
    elif verify:
        raise CommandError("--verify reads the base, and none is named", "add --base TABLE")
    if as_json:
        print_json(result)


def _teach_facts(folder: Path, facts: Path, output: Path, page: Path | None, as_json: bool, **options: Any) -> None:
    from sense_v2.hf.facts.teach_facts import teach_facts_delta
    from sense_v2.report.facts import lines, write_report

    echo = lines_to(as_json)
    paths = None if page is None else report_paths(page)
    result = teach_facts_delta(
        folder,
        facts,
        output,
        progress=progress_to(echo),
        tell=lambda line: echo(f"note     {line}"),
        **options,
    )
    if paths is not None:
        write_report(result, paths[0])
        write_json(result, paths[1])
    echo(*lines(result), *([f"report   {page}"] if page else []))
    if as_json:
        print_json(result)
    if result["not_learned"]:
        named = "; ".join(f"{fact['subject']} → {fact['answer']}" for fact in result["not_learned"][:10])
        more = "; …" * (len(result["not_learned"]) > 10)
        raise CommandError(
            f"not learned: {wording.count(len(result['not_learned']))} of "
            f"{wording.number_of(result['facts'], 'fact')} ({named}{more}); {output} has the others",
            "more --steps, another --lr or more wordings may do it; the report says which wordings failed",
        )


# What is printed


def _delta_lines(result: dict[str, Any]) -> list[str]:
    from sense_v2.engram.delta.kept_facts import KeptFact, names_of

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
    for table in result["tables"]:
        digest = f"digest {str(table['digest'])[:SHORT]}…"
        lines.append(f"layer {table['layer']:<3}{_rows(table['rows'])} of its own table, {digest}")
    lines.append(f"base     {base['dtype']}, digest {base['digest'][:SHORT]}… (of its {base['digest_of']})")
    if result["facts"]:
        facts = [KeptFact(**fact) for fact in result["facts"]]
        lines.append(f"facts    {wording.count(len(facts))}: {names_of(facts)}")
    if result["states"]:
        states = ", ".join(f"{name} ({wording.number_of(step, 'step')})" for name, step in result["states"].items())
        lines.append(f"states   {states}; sense-engram delta export leaves them out")
    return lines


def _rows(count: int) -> str:
    return f"{wording.count(count)} {'row' if count == 1 else 'rows'}"


def _already(done: Applied) -> str:
    return "" if done.is_new else "already: "


def _digest_lines(done: Applied) -> list[str]:
    lines = [f"digest   {done.digest_before[:SHORT]}… before, {done.digest[:SHORT]}… now"]
    if done.states:
        lines.append(f"states   {', '.join(done.states)} of the table left as they were")
    return lines


def _applied(done: Applied) -> dict[str, Any]:
    return {
        "table": str(done.table),
        "rows": done.num_rows,
        "digest_before": done.digest_before,
        "digest": done.digest,
        "undo": None if done.undo is None else str(done.undo),
        "states": list(done.states),
        "already": not done.is_new,
    }
