"""The report of facts that were taught: what is answered, and what else the model says otherwise.

`write_report` makes one self-contained HTML file of the results, `lines` the gist for a terminal. The results are
what `sense_v2.hf.facts.teach_facts.teach_facts_delta` returns:

    {
      "model", "delta", "created": str, "facts", "lessons", "questions", "steps", "rows", "rows_in_all",
      "rows_left_out", "row_bytes", "bytes": int, "seconds", "lr", "kl_weight": float,
      "stopped": "answered" or "all steps", "layers": [int], "loss": [at first, at the end], "losses": [float],
      "sharing": [{"facts": [str], "rows": int}],
      "success": {"taught": SHARE, "held_out": SHARE, "by_wording": [{"wording", "held_out": bool, **SHARE}],
                  "by_fact": [{"line", "subject", "answer", "learned": bool, "taught": SHARE, "held_out": SHARE}],
                  "by_place": [{"place": int, **SHARE}]},
      "damage": {"texts", "tokens", "kl", "top_changed", "texts_changed", "texts_of_other_words", "sampled": bool,
                 "changed": [{"text", "kl", "tokens_changed", "tokens",
                              "rows": [{"row", "layer", "ngram", "facts": [str]}]}]},
      "not_learned": those of "by_fact"
    }
    SHARE = {"asked": int, "before": share or None, "after": share or None}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sense_v2.report import page, wording

MOST_CHANGED = 20


def write_report(results: dict[str, Any], path: str | Path) -> None:
    """Write the HTML report, making its folder. Raises `KeyError` where `results` lack a part."""
    page.write(
        path,
        "facts.html",
        results=results,
        kind="worse" if results["not_learned"] else "better",
        headline=headline(results),
        sentences=sentences(results),
        changed=results["damage"]["changed"][:MOST_CHANGED],
    )


def lines(results: dict[str, Any]) -> list[str]:
    """The gist, for a terminal."""
    taught, held_out, damage = (
        results["success"]["taught"],
        results["success"]["held_out"],
        results["damage"],
    )
    asked = f"; {_shares(held_out)} in wordings that were never taught" if held_out["asked"] else ""
    of_texts = f"{wording.count(damage['texts'])} {'texts of its own' if damage['sampled'] else 'texts'}"
    return [
        f"taught   {wording.number_of(results['facts'], 'fact')}, {wording.number_of(results['steps'], 'step')} at "
        f"rate {results['lr']:g} in {wording.duration(results['seconds'])}",
        f"answered {_shares(taught)} in the wordings that were taught{asked}",
        f"damage   KL {damage['kl']:.2g} nats a token over {of_texts}; {wording.count(damage['texts_changed'])} "
        f"changed, {wording.percent(damage['top_changed'])} of the likeliest tokens",
        f"delta    {results['delta']}: {wording.number_of(results['rows'], 'row')} of these facts, "
        f"{wording.count(results['rows_in_all'])} in all, {wording.size(results['bytes'])}",
    ]


def headline(results: dict[str, Any]) -> str:
    """How many facts are learned."""
    learned = results["facts"] - len(results["not_learned"])
    verb = "is" if results["facts"] == 1 else "are"
    return f"{wording.count(learned)} of {wording.number_of(results['facts'], 'fact')} {verb} learned."


def sentences(results: dict[str, Any]) -> list[str]:
    """What a reader should take away."""
    held_out, damage = results["success"]["held_out"], results["damage"]
    found = []
    if held_out["asked"]:
        found.append(f"In wordings that were never taught, {_shares(held_out)} of the answers are right.")
    found.append(
        f"Of {wording.number_of(damage['texts'], 'other text')}, {wording.count(damage['texts_changed'])} look up "
        f"a row that was taught; over all of them the mean KL is {damage['kl']:.2g} nats a token, and "
        f"{wording.percent(damage['top_changed'])} of the likeliest next tokens are others. The rest can’t "
        "have changed."
    )
    return found


def _shares(share: dict[str, Any]) -> str:
    return f"{wording.percent(share['after'])} ({wording.percent(share['before'])} before)"
