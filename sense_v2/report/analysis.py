"""The analysis report: what a memory does on a text, token by token and row by row.

`write_report` makes one self-contained HTML file of the results, `lines` the gist for a terminal. The results are one
dictionary that JSON can hold:

    {
      "model": str, "created": str (ISO time),
      "corpus": {"name", "files", "held_out": bool, "tokens", "trained_on"},
      "trained_alone": whether nothing but the memory was trained, "sequences", "sequence_length", "tokens",
      "counted": {"held_out": whether it is the part that training reads, "tokens", "of_tokens"},
      "loss", "perplexity", "bits_per_byte": {"with", "without"},
      "table": {"rows", "width", "dtype", "bytes", "heads"},
      "gain", "scattered", "gates", "classes", "text", "leaned_on", "helped", "harmed", "by_frequency", "heads",
      "zipf", "hot_sets", "rows": what the functions of sense_v2.hf.insight.analysis return,
      "seconds": of everything together
    }

Every n-gram count is of the counted text. The numbers choose the sentences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from sense_v2.report import page, wording
from sense_v2.report.coloured_text import Token, coloured_text
from sense_v2.report.wording import change, count, decimals, is_finite, percent, perplexity, signed

AS_CHANCE = 0.02
"""Collisions that differ from the expected number by less than this share count as chance."""
LOADED = 0.5
"""N-grams per row above which a head is crowded: hardly any n-gram has a row of its own."""


def write_report(results: dict[str, Any], path: str | Path) -> None:
    """Write the HTML report, making its folder. Raises `KeyError` where `results` lack a part."""
    page.write(
        path,
        "analysis.html",
        results=results,
        kind=outcome(results),
        headline=headline(results),
        sentences=sentences(results),
        counted=counted(results),
        text=coloured(results["text"]),
        panels=panels(results),
        heads=heads(results["heads"]),
        head_rows=sum(head["rows"] for head in results["heads"]),
        frequencies=frequencies(results["by_frequency"]),
        span=span,
        cell=cell,
    )


def lines(results: dict[str, Any]) -> list[str]:
    """The gist, for a terminal."""
    return wording.wrapped([headline(results), *sentences(results)])


def outcome(results: dict[str, Any]) -> str:
    """better, worse, level or broken: with the memory against without."""
    return wording.outcome(*(results["perplexity"][name] for name in ("with", "without")))


def headline(results: dict[str, Any]) -> str:
    """What the memory does to the perplexity."""
    with_memory, without = (results["perplexity"][name] for name in ("with", "without"))
    kind = outcome(results)
    if kind == "broken":
        return "A loss is not a finite number, so the gain is unknown."
    if kind == "level":
        return f"With its memory the model is as good as with it taken off: perplexity {perplexity(with_memory)}."
    return (
        f"With its memory the model's perplexity is {change(with_memory, without)} than with it taken off: "
        f"{perplexity(with_memory)} against {perplexity(without)}."
    )


def sentences(results: dict[str, Any]) -> list[str]:
    """What a reader should take away, each chosen by the numbers."""
    return [told for part in (_spread, _frequency, _collisions, _rows) if (told := part(results))]


def counted(results: dict[str, Any]) -> str:
    """Which text n-grams were counted in."""
    own = results["counted"]
    name = results["corpus"]["name"]
    part = (
        f"the part of {name} that training draws from (a run may read less of it)"
        if own["held_out"]
        else f"all of {name}, this text included"
    )
    cut = "" if own["tokens"] >= own["of_tokens"] else f"the first {count(own['tokens'])} of "
    return f"{part}, {cut}{wording.number_of(own['of_tokens'], 'token')}"


def _spread(results: dict[str, Any]) -> str:
    gain = results["gain"]
    if not is_finite(gain["mean"]):
        return ""
    return (
        f"It lowers the loss of {percent(gain['helped'])} of the tokens by more than a tenth of a nat and raises "
        f"that of {percent(gain['harmed'])}; the mean gain is {decimals(gain['mean'])} nats a token."
    )


def _frequency(results: dict[str, Any]) -> str:
    longest = max((one["order"] for one in results["by_frequency"]), default=0)
    groups = [one for one in results["by_frequency"] if one["order"] == longest and is_finite(one["gain"])]
    if len(groups) < 2:
        return ""
    best = max(groups, key=lambda one: one["gain"])
    told = f"Tokens gain most after {longest}-grams that were counted {span(best)} ({signed(best['gain'], 2)} nats)"
    never = next((one for one in groups if one["low"] == 0), None)
    if never is None or never is best:
        return f"{told}."
    return f"{told}; after those that were never counted the gain is {signed(never['gain'], 2)}."


def _collisions(results: dict[str, Any]) -> str:
    sharing, expected, ngrams = (
        sum(head[name] for head in results["heads"]) for name in ("sharing", "expected_sharing", "ngrams")
    )
    if not ngrams:
        return ""
    told = f"{percent(sharing / ngrams)} of the n-grams share their row with another"
    if expected and abs(sharing - expected) <= AS_CHANCE * expected:
        verdict = f"about as many as chance alone gives ({percent(expected / ngrams)})"
    else:
        more = "more" if sharing > expected else "fewer"
        verdict = f"{more} than chance alone gives ({percent(expected / ngrams)})"
    full = [head for head in results["heads"] if head["ngrams"] > LOADED * head["rows"]]
    if not full:
        return f"{told}, {verdict}."
    names = wording.listing([f"{order}-grams" for order in sorted({head["order"] for head in full})])
    return (
        f"{told}, {verdict}. The heads of {names} have more than one n-gram for every two rows: a larger table would "
        "separate them."
    )


def _rows(results: dict[str, Any]) -> str:
    rows, used = (sum(head[name] for head in results["heads"]) for name in ("rows", "rows_used"))
    told = f"{percent(used / rows)} of the rows are looked up by the counted text"
    groups = [group for group in results["rows"]["groups"] if group["unmoved"] is not None and group["rows"]]
    if not groups:
        return f"{told}; how far they have moved isn't known, because the table's first values aren't known."
    total = sum(group["rows"] for group in groups)
    unmoved = sum(group["unmoved"] * group["rows"] for group in groups) / total
    return f"{told}; {percent(unmoved)} of all rows are bit for bit what they were before training."


def span(group: dict[str, Any]) -> str:
    """How often, in words.

    >>> span({"low": 0, "high": 0}), span({"low": 1, "high": 1}), span({"low": 4, "high": 7})
    ('never', 'once', '4 to 7 times')
    >>> span({"low": 256, "high": None})
    '256 times or more'
    """
    low, high = group["low"], group["high"]
    if high is None:
        return f"{count(low)} times or more"
    if high == low:
        return {0: "never", 1: "once"}.get(low, f"{count(low)} times")
    return f"{count(low)} to {count(high)} times"


def coloured(text: dict[str, Any]) -> Markup:
    """The text coloured by what memory changed, with all that is known of each token behind it."""
    tokens = []
    for token in text["tokens"]:
        facts = [("token id", f"{token['token_id']}, compressed {token['compressed_id']}")]
        with_memory, without, gain = token["loss_with"], token["loss_without"], None
        if is_finite(with_memory) and is_finite(without):
            gain = without - with_memory
            told = f"{decimals(with_memory)} with memory, {decimals(without)} without"
            facts.append(("its loss", f"{told}: gain {signed(gain, 3)}"))
        layer_facts = [[fact for ngram in layer for fact in _ngram_facts(ngram)] for layer in token["layers"]]
        tokens.append(Token(token["text"], token["gates"], facts, layer_facts, gain))
    return coloured_text(tokens, text["layers"])


def _ngram_facts(ngram: dict[str, Any]) -> list[tuple[str, str]]:
    others = ngram["others"]
    text = wording.show_spaces(ngram["text"], inline=True)
    return [
        (f"{ngram['order']}-gram", f"{text}, counted {count(ngram['counted'])}"),
        ("adds", f"{percent(ngram['share'])} of the hidden state’s length"),
        ("rows", ", ".join(map(str, ngram["rows"]))),
        ("their norms", ", ".join(decimals(norm, 2) for norm in ngram["norms"])),
        ("others there", ", ".join(map(str, others)) if any(others) else "none"),
    ]


def heads(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The heads with what a table shows of each."""
    several = len({head["layer"] for head in found}) > 1
    return [
        {
            **head,
            "name": f"{'layer ' + str(head['layer']) + ', ' if several else ''}{head['order']}-grams, {head['head']}",
            "used": head["rows_used"] / head["rows"],
            "expected_used": head["expected_rows_used"] / head["rows"],
            "shared": head["sharing"] / head["ngrams"] if head["ngrams"] else None,
            "expected_shared": head["expected_sharing"] / head["ngrams"] if head["ngrams"] else None,
        }
        for head in found
    ]


def frequencies(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups by order, each with the places of its bar and of its interval, in percent of a track that has 0 in
    its middle."""
    values = [value for one in found for value in (one["gain"], *one["interval"]) if is_finite(value)]
    largest = max(map(abs, values), default=0) or 1
    groups = []
    for order in sorted({one["order"] for one in found}):
        bars = []
        for one in found:
            if one["order"] == order:
                drawn = is_finite(one["gain"])
                width = round(50 * abs(one["gain"]) / largest, 2) if drawn else 0
                left = 50.0 if not drawn or one["gain"] >= 0 else round(50 - width, 2)
                effect = "harms" if left < 50 else "helps"
                bar = {**one, "label": span(one), "width": width, "left": left, "effect": effect}
                if all(map(is_finite, one["interval"])):
                    low, high = (round(50 + 50 * end / largest, 2) for end in one["interval"])
                    bar |= {"from": low, "spans": round(high - low, 2)}
                bars.append(bar)
        groups.append({"order": order, "bars": bars})
    return groups


def panels(results: dict[str, Any]) -> dict[str, Any]:
    """The charts: a name in the template and its SVG, or a list of them."""
    from sense_v2.report.charts import Series, column_chart, line_chart, loss_chart

    gates, rows, hot_sets = results["gates"], results["rows"], results["hot_sets"]
    bins = len(gates[0]["histogram"])
    edges = [edge / bins for edge in range(bins + 1)]
    served = Series("served", [one["share"] for one in hot_sets], [one["serves"] for one in hot_sets])
    ngrams = [Series(f"{own['order']}-grams", own["ranks"], own["counts"]) for own in results["zipf"]]
    by_position = []
    for own in gates:
        places = [(point["from"] + point["to"]) / 2 for point in own["by_position"]]
        by_position.append(Series(f"layer {own['layer']}", places, [point["gate"] for point in own["by_position"]]))
    histograms = []
    for own in gates:
        svg = column_chart(f"gates-of-layer-{own['layer']}", edges, own["histogram"], x_label="gate")
        histograms.append({"layer": own["layer"], "svg": svg})
    drifts = rows["drift_histogram"]
    return {
        "losses": loss_chart("loss-of-each-token", results["scattered"]["without"], results["scattered"]["with"]),
        "histograms": histograms,
        "positions": line_chart(
            "mean-gate-by-position", by_position, x_label="position in the sequence", y_range=(0, 1.02)
        ),
        "zipf": line_chart("how-often-n-grams-are-counted", ngrams, x_label="rank of the n-gram", log="xy"),
        "hot": line_chart(
            "lookups-served-by-the-hottest-rows",
            [served],
            x_label="hottest rows, of the table",
            log="x",
            percent="xy",
            y_range=(0, 1.02),
        ),
        "norms": column_chart("lengths-of-rows", **rows["norm_histogram"], x_label="length of a row"),
        "drifts": drifts and column_chart("drift-of-rows", **drifts, x_label="distance from its first values"),
    }


def cell(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else decimals(value, digits)
