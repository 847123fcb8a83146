"""The ablation report: what each part of a memory is worth on a text.

`write_report` makes one self-contained HTML file of the results, `terminal_table` the same for a terminal. The
results are one dictionary that JSON can hold:

    {
      "model": str, "created": str (ISO time),
      "corpus": {"name", "files", "held_out": bool, "tokens", "trained_on"},
      "trained_alone": whether nothing but the memory was trained, "sequences", "sequence_length",
      "loss": nats a token with the memory as it is, "perplexity", "bits_per_byte",
      "blocks", "tokens", "confidence", "resamples", "seed",
      "ablations": [{"name", "group", "layer", "order", "head", "loss", "change", "low", "high", "kept"}],
                   as sense_v2.hf.insight.ablation.ablate gives them, "memory_off" among them,
      "seconds": of everything together
    }

The numbers choose the sentences. A change counts where its interval doesn't hold 0; elsewhere the report says that
this text doesn't tell.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sense_v2.report import page, wording
from sense_v2.report.verdict import LITTLE, MOST
from sense_v2.report.wording import decimals, is_finite, percent, perplexity, signed

FEW_BLOCKS = 20
"""Below this many blocks an interval is a rough guess."""
GROUPS = {
    "memory": "The memory as a whole",
    "rows": "What its rows hold",
    "gate": "Its gate",
    "layer": "Single layers",
    "order": "Single n-gram lengths",
    "head": "Single heads",
}
LABELS = {
    "memory_off": ("memory off", "the backbone alone"),
    "rows_shuffled": ("rows shuffled", "each position gets another position’s rows"),
    "capacity_one": ("capacity one", "every lookup of a head goes to the row that it looks up most"),
    "random_table": ("random table", "fresh noise of the rows’ own size instead of what they hold"),
    "gate_shut": ("gate shut", "forced to 0, which must be the same as memory off"),
    "gate_open": ("gate open", "forced to 1: everything found is added"),
}


def label(one: dict[str, Any], *, with_layer: bool) -> str:
    """Return an ablation's name.

    >>> label({"name": "capacity_one"}, with_layer=True)
    'capacity one'
    >>> label({"name": "…", "group": "head", "layer": 3, "order": 2, "head": 5}, with_layer=True)
    'layer 3, 2-grams, head 5 off'
    """
    if one["name"] in LABELS:
        return LABELS[one["name"]][0]
    parts = [f"layer {one['layer']}"] if with_layer or one["group"] == "layer" else []
    parts += [f"{one['order']}-grams"] if one["order"] is not None else []
    parts += [f"head {one['head']}"] if one["head"] is not None else []
    return f"{', '.join(parts)} off"


def write_report(results: dict[str, Any], path: str | Path) -> None:
    """Write the HTML report, making its folder. Raises `KeyError` where `results` lack a part."""
    page.write(
        path,
        "ablation.html",
        results=results,
        kind=outcome(results),
        headline=headline(results),
        sentences=sentences(results),
        panels=panels(results),
        rows=_rows(results),
    )


def terminal_table(results: dict[str, Any]) -> str:
    """Return the ablations as a text table of at most 80 columns, and under it what they show."""
    rows = [
        ("without", "perplexity", "loss", "change", f"{percent(results['confidence'])} interval"),
        ("nothing (as it is)", perplexity(results["perplexity"]), decimals(results["loss"], 4), "", ""),
    ]
    for one in _rows(results):
        interval = f"{signed(one['low'])} to {signed(one['high'])}" if is_finite(one["low"]) else "one block: none"
        measured = perplexity(one["perplexity"]), decimals(one["loss"], 4), signed(one["change"])
        rows.append((one["label"], *measured, interval))
    return wording.terminal_text(rows, [headline(results), *sentences(results)])


def sentences(results: dict[str, Any]) -> list[str]:
    """What a reader should take away, each chosen by the numbers."""
    return [contents(results), where(results), gate(results), *cautions(results)]


def effect(one: dict[str, Any]) -> int:
    """+1: the loss rises without it; -1: it falls; 0: this text doesn't tell."""
    if not (is_finite(one["low"]) and is_finite(one["high"])):
        return 0
    return 1 if one["low"] > 0 else -1 if one["high"] < 0 else 0


def outcome(results: dict[str, Any]) -> str:
    """better, worse, level or broken, as the training report has them."""
    off = _named(results, "memory_off")
    if not (is_finite(off["loss"]) and is_finite(results["loss"])):
        return "broken"
    return {1: "better", -1: "worse", 0: "level"}[effect(off)]


def headline(results: dict[str, Any]) -> str:
    """The answer to "did the memory help?" in one sentence or two."""
    off, kind = _named(results, "memory_off"), outcome(results)
    if kind == "broken":
        return "A loss is not a finite number, so this doesn't say whether the memory helps."
    between = f"perplexity {perplexity(results['perplexity'])} with it, {perplexity(_exp(off['loss']))} without"
    told = {
        "better": "The memory helps",
        "worse": "The memory harms on this text",
        "level": "This text doesn't tell whether the memory helps",
    }[kind]
    return f"{told}: {_change(off, results)} when it is taken off ({between})."


def contents(results: dict[str, Any]) -> str:
    """Whether the gain comes from what the rows hold: what the three ablations of the rows keep of it."""
    ablations = [_named(results, name) for name in ("rows_shuffled", "capacity_one", "random_table")]
    if outcome(results) != "better":
        return "Taking it off costs nothing here that can be told from chance, so there is no gain to divide up."
    if not all(is_finite(one["kept"]) for one in ablations):
        return "No share of the gain can be given: a loss is not a finite number."
    most = max(ablations, key=lambda one: one["kept"])
    kept = most["kept"]
    if kept <= 0:
        return (
            "Nothing of that gain remains with rows shuffled, with capacity one or with a random table: all of it "
            "depends on what the rows hold."
        )
    parts = [
        f"{percent(one['kept']) if one['kept'] > 0 else 'nothing'} with {label(one, with_layer=False)}"
        for one in ablations
    ]
    told = f"What remains of that gain is {', '.join(parts[:-1])}, and {parts[-1]}"
    if kept > MOST:
        return f"{told}. So most of it does not depend on looking up the right row of this table."
    if kept < LITTLE:
        return f"{told}. So nearly all of it depends on what the rows hold."
    return f"{told}. So {percent(1 - kept)} of it depends on what the rows hold."


def where(results: dict[str, Any]) -> str:
    """Which layer, n-gram length and head the loss rises most without."""
    several = _several_layers(results)
    told = []
    for group, what in (("layer", "layer"), ("order", "n-gram length"), ("head", "head")):
        own = [one for one in results["ablations"] if one["group"] == group and is_finite(one["change"])]
        if len(own) < 2:
            continue
        most = max(own, key=lambda one: one["change"])
        name = label(most, with_layer=several).removesuffix(" off")
        if effect(most) < 1:
            told.append(f"Taking off a single {what} never raises the loss measurably")
            continue
        rising = sum(effect(one) == 1 for one in own)
        told.append(
            f"Taken off one at a time, {rising} of {len(own)} {what}s {'raises' if rising == 1 else 'raise'} the "
            f"loss measurably, most of all {name} ({signed(most['change'], 3)})"
        )
    if not told:
        return "There is one layer and one n-gram length, and single heads weren't taken off."
    return ". ".join(told) + "."


def gate(results: dict[str, Any]) -> str:
    """Whether deciding how much of the memory to take is worth anything."""
    opened = _named(results, "gate_open")
    found = {
        1: "The gate earns its place: {} when it is forced open everywhere.",
        -1: "The gate shuts too often: {} when it is forced open everywhere.",
        0: "This text doesn't tell what the gate is worth: {} when it is forced open everywhere.",
    }[effect(opened)]
    return found.format(_change(opened, results))


def cautions(results: dict[str, Any]) -> list[str]:
    """What a reader should know before trusting a number."""
    told = []
    if results["blocks"] == 1:
        told.append("There is only 1 block, so no interval could be computed: --sequences takes more.")
    elif results["blocks"] < FEW_BLOCKS:
        told.append(f"There are only {results['blocks']} blocks, so the intervals are rough: --sequences takes more.")
    shut, off = _named(results, "gate_shut"), _named(results, "memory_off")
    if is_finite(shut["loss"]) and abs(shut["loss"] - off["loss"]) > 1e-4:
        told.append("A shut gate isn't the same as memory off here, which it should be: please report this.")
    return told


def panels(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of bars: where a change and its interval stand on the group's own scale, in percent of its width."""
    rows = _rows(results)
    found = []
    for title, groups in (
        ("The memory as a whole, its rows and its gate", ("memory", "rows", "gate")),
        *((GROUPS[group], (group,)) for group in ("layer", "order", "head")),
    ):
        own = [one for one in rows if one["group"] in groups]
        if not own:
            continue
        values = [one[name] for one in own for name in ("change", "low", "high")]
        least, most = (end([0.0, *filter(is_finite, values)]) for end in (min, max))
        room = 0.03 * (most - least) or 1e-6
        scale = least - room, most + room
        bars = []
        for one in own:
            bar = {**one, "drawn": is_finite(one["change"]), "spans": is_finite(one["low"]), "effect": effect(one)}
            if bar["drawn"]:
                bar["at"] = _place(one["change"], *scale)
            if bar["spans"]:
                low, high = (_place(one[name], *scale) for name in ("low", "high"))
                bar |= {"from": low, "width": round(high - low, 2)}
            bars.append(bar)
        found.append({"title": title, "bars": bars, "zero": _place(0.0, *scale)})
    return found


def _place(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 2)


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    several = _several_layers(results)
    return [
        {
            **one,
            "label": label(one, with_layer=several),
            "description": LABELS.get(one["name"], ("", ""))[1],
            "perplexity": _exp(one["loss"]),
            "kept_text": percent(one["kept"]) if is_finite(one["kept"]) else "–",
        }
        for one in results["ablations"]
    ]


def _several_layers(results: dict[str, Any]) -> bool:
    return len({one["layer"] for one in results["ablations"] if one["layer"] is not None}) > 1


def _named(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in results["ablations"] if one["name"] == name)


def _exp(loss: float | None) -> float:
    return math.nan if loss is None or not is_finite(loss) else math.inf if loss > 700 else math.exp(loss)


def _change(one: dict[str, Any], results: dict[str, Any]) -> str:
    """ "the loss rises by 0.51 nats a token (95 % interval 0.47 to 0.55)" """
    if not is_finite(one["change"]):
        return "the loss is not a finite number"
    verb = "rises" if one["change"] > 0 else "falls"
    told = f"the loss {verb} by {decimals(abs(one['change']), 3)} nats a token"
    if not is_finite(one["low"]):
        return told
    ends = sorted((one["low"], one["high"])) if one["change"] > 0 else sorted((-one["low"], -one["high"]))
    return f"{told} ({percent(results['confidence'])} interval {decimals(ends[0], 3)} to {decimals(ends[1], 3)})"
