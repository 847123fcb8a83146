"""Pieces of HTML for the page of `sense-engram play`, and its stylesheet.

They show what was found about a text, a comparison, or a fact that was taught, each a dictionary that JSON can hold.
Nothing here knows Gradio or a model. Jinja escapes whatever a template prints: users and the model write the texts.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from sense_v2.report import page, wording
from sense_v2.report.coloured_text import Token, coloured_text, gain_class, token_span

SIDES = (("with_memory", "With memory", "run-engram"), ("without_memory", "Without memory", "run-plain"))


def piece(template: str, **values: Any) -> str:
    """Return a template of this folder as HTML that goes into a page; see `page.render`."""
    return page.UNPRINTABLE.sub("\ufffd", page.render(template, **values))


def stylesheet() -> str:
    """Return the reports' stylesheet, confined to `.sense`, and the playground's own.

    The reports' rules must not touch Gradio's own headings, tables and texts. Gradio says by a class which colour
    scheme the page is in; the class follows the system or `?__theme=dark`.
    """
    reports = (page.FOLDER / "style.css").read_text(encoding="utf-8")
    reports = re.sub(r"@media \(prefers-color-scheme: dark\)", ".dark &", reports)
    reports = re.sub(r"^( *)(:root|body)(?= \{)", r"\1&", reports, flags=re.MULTILINE)
    reports = re.sub(r"^ *(html|main) \{[^}]*\}\n", "", reports, flags=re.MULTILINE)
    own = (page.FOLDER / "playground.css").read_text(encoding="utf-8")
    return f".sense {{\n{reports}}}\n{own}"


def inspection(found: dict[str, Any]) -> str:
    """Return a text coloured by what memory changed; a token's n-grams, rows and probabilities open on it.

    `found` is what `inspect_text` returns. Its layers may have `moved`: which of a token's rows were taught.
    """
    orders = list(found["ngrams"])
    tokens = []
    for place, text in enumerate(found["tokens"]):
        facts = [
            ("token id", f"{found['token_ids'][place]}"),
            ("compressed id", f"{found['compressed_ids'][place]}"),
            *(
                (f"{order}-gram", wording.show_spaces(found["ngrams"][order][place], inline=True))
                for order in orders
                if place + 1 >= order
            ),
            *(
                (f"probability {label.lower()}", wording.chance(found["probabilities"][name][place]))
                for name, label, _ in SIDES
                if place > 0
            ),
        ]
        layer_facts = [_row_facts(layer, place, orders) for layer in found["layers"]]
        gates = [layer["gates"][place] for layer in found["layers"]]
        without, with_memory = (found["probabilities"][name][place] for name in ("without_memory", "with_memory"))
        tokens.append(Token(text, gates, facts, layer_facts, _gain(without, with_memory)))
    layers = [layer["layer"] for layer in found["layers"]]
    return piece(
        "play_inspection.html",
        text=coloured_text(tokens, layers) if tokens else None,
        dropped=found["dropped_tokens"],
    )


def _row_facts(layer: dict[str, Any], place: int, orders: Sequence[int]) -> list[tuple[str, str]]:
    """The rows of a token, by n-gram, with their norms; those that were taught are named."""
    row_ids, norms = layer["row_ids"][place], layer["row_norms"][place]
    moved = layer["moved"][place] if "moved" in layer else [False] * len(row_ids)
    heads = len(row_ids) // len(orders)
    facts = []
    for number, order in enumerate(orders):
        own = slice(number * heads, (number + 1) * heads)
        facts.append((f"rows, {order}-gram", " ".join(map(str, row_ids[own]))))
        facts.append(("their norms", " ".join(wording.decimals(norm, 2) for norm in norms[own])))
        facts.append(("they add", f"{wording.percent(layer['shares'][order][place])} of the hidden state’s length"))
    if any(moved):
        facts.append(("taught here", f"{sum(moved)} of these {len(moved)} rows"))
    return facts


def rows_table(found: dict[str, Any]) -> str:
    """Return the same as a table, one line per token."""
    return piece("play_rows.html", found=found, orders=list(found["ngrams"]))


def comparison(found: dict[str, Any]) -> str:
    """Return two continuations side by side, as `insight.comparison.compare` finds them.

    Tokens that differ are marked, and each token's probabilities open on it.
    """
    marks = differing(found["with_memory"]["tokens"], found["without_memory"]["tokens"])
    sides = []
    for (name, label, style), differs in zip(SIDES, marks, strict=True):
        side = found[name]
        other_label = next(their_label for their_name, their_label, _ in SIDES if their_name != name)
        columns = (side[key] for key in ("tokens", "probabilities", "other_probabilities", "candidates"))
        tokens = [
            token_span(
                text,
                [
                    (label.lower(), wording.chance(probability)),
                    (other_label.lower(), wording.chance(other)),
                    *(
                        (f"{number}. {wording.show_spaces(token, inline=True)}", wording.chance(p))
                        for number, (token, p) in enumerate(candidates, 1)
                    ),
                ],
                css_class="differs" if different else "",
                breaks=breaks,
            )
            for different, breaks, text, probability, other, candidates in zip(
                differs, line_breaks(side["tokens"]), *columns, strict=True
            )
        ]
        sides.append({"label": label, "style": style, "tokens": tokens})
    return piece("play_comparison.html", sides=sides, summary=parting(found), dropped=found["dropped_tokens"])


def line_breaks(tokens: Sequence[str]) -> list[bool]:
    """Return which tokens break the line. Small models tend to end in empty lines; of a run of those, one is enough.

    >>> line_breaks(["a", "\\n", "\\n", "\\n", "b\\n"])
    [True, True, False, True, True]
    """
    empty = [token != "" and token.strip("\n") == "" for token in tokens]
    return [
        not (one and before and after)
        for one, before, after in zip(empty, [False, *empty], [*empty[1:], False], strict=False)
    ]


def differing(tokens: Sequence[str], others: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """Return which tokens of each text have no counterpart in the other: what `diff` would mark.

    >>> differing(["a", "b", "c"], ["a", "x", "c", "d"])
    ([False, True, False], [False, True, False, True])
    """
    marks = [True] * len(tokens), [True] * len(others)
    for match in SequenceMatcher(None, tokens, others, autojunk=False).get_matching_blocks():
        marks[0][match.a : match.a + match.size] = [False] * match.size
        marks[1][match.b : match.b + match.size] = [False] * match.size
    return marks


def parting(found: dict[str, Any]) -> str:
    """One sentence or two: where the texts part, and how often memory decided."""
    remembering, plain = found["with_memory"], found["without_memory"]
    pairs = list(zip(remembering["probabilities"], remembering["other_probabilities"], strict=True))
    doubled = sum(own >= 2 * other for own, other in pairs)
    written = wording.number_of(len(pairs), "token")
    often = f"Memory at least doubled the probability of {doubled} of the {written} written with it."
    if remembering["tokens"] == plain["tokens"]:
        return f"Both write the same {written}. {often}"
    length = min(len(remembering["tokens"]), len(plain["tokens"]))
    place = next((i for i in range(length) if remembering["tokens"][i] != plain["tokens"][i]), length)
    if place == length:
        return f"One of them ends after {wording.number_of(length, 'token')}; up to there they are the same. {often}"
    chosen = [
        f"{label} “{wording.show_spaces(side['tokens'][place], inline=True)}” "
        f"({wording.chance(side['probabilities'][place])})"
        for label, side in (("with memory", remembering), ("without", plain))
    ]
    return f"They part at token {place + 1}: {', '.join(chosen)}. {often}"


def lesson(found: dict[str, Any]) -> str:
    """Return what teaching a fact did, and what else it moved.

    {"prompt", "text": str, "losses": [float], before and after each step, "said": whether the model says the text
     now, "rows": how many moved,
     "table_rows": int, "continued": [str, str], from the prompt, before and after,
     "watched": [{"before", "after": what `inspect_text` found, "moved": [bool]}], whether a token's rows moved}
    """
    others = [_watched(one) for one in found["watched"] if one["before"]["tokens"]]
    chances = [math.exp(-loss) for loss in (found["losses"][0], found["losses"][-1])]
    return piece("play_lesson.html", found=found, chances=chances, steps=len(found["losses"]) - 1, others=others)


def facts(pairs: Sequence[tuple[str, str]], num_rows: int) -> str:
    """Return what a tab was taught: pairs of prompt and text, and how many rows differ from the table's."""
    return piece("play_facts.html", pairs=pairs, num_rows=num_rows)


def saved(path: str, num_rows: int, num_bytes: int, *, model: str) -> str:
    """Return where a delta was written, and the command that applies it to the table of `model`."""
    command = f"sense-engram delta apply {shlex.quote(path)} {shlex.quote(model)}"
    return piece("play_saved.html", path=path, num_rows=num_rows, num_bytes=num_bytes, command=command)


def note(text: str) -> str:
    return piece("play_note.html", text=text, way_out=None)


def refusal(what: str, way_out: str) -> str:
    """Return what can't be done with what was typed, and the way out."""
    return piece("play_note.html", text=what, way_out=way_out)


def _watched(one: dict[str, Any]) -> dict[str, Any]:
    """A text with its tokens coloured by how much likelier or less likely each has become."""
    names = one["before"]["tokens"]
    pairs = list(zip(*(one[when]["probabilities"]["with_memory"] for when in ("before", "after")), strict=True))
    tokens = [
        token_span(
            text,
            [
                ("before", "the first token" if before is None else wording.chance(before)),
                *([] if after is None else [("after", wording.chance(after))]),
                ("its rows", "some were moved" if moved else "none was moved"),
            ],
            css_class=" ".join([shift_class(before, after), *(["moved"] if moved else [])]).strip(),
        )
        for text, (before, after), moved in zip(names, pairs, one["moved"], strict=True)
    ]
    known = [place for place, (before, after) in enumerate(pairs) if before and after]
    most = max(known, key=lambda place: abs(math.log(pairs[place][1] / pairs[place][0])), default=None)
    return {
        "tokens": tokens,
        "sharing": sum(one["moved"]),
        "count": len(names),
        "most": None if most is None else _change(names[most], *pairs[most]),
        "is_moved": most is not None and bool(shift_class(*pairs[most])),
    }


def _change(text: str, before: float, after: float) -> dict[str, Any]:
    times = max(before, after) / min(before, after)
    how_often = wording.decimals(times, 1) if times < 10 else wording.count(times)
    return {
        "text": text,
        "before": before,
        "after": after,
        "how": f"{how_often} times {'likelier' if after > before else 'less likely'}",
    }


def shift_class(before: float | None, after: float | None) -> str:
    """Return the class for how much likelier or less likely a token has become; see `gain_class`.

    >>> shift_class(0.5, 0.51), shift_class(0.2, 0.3), shift_class(0.3, 0.2), shift_class(0.1, 0.9)
    ('', 'up2', 'down2', 'up4')
    >>> shift_class(None, None), shift_class(0.0, 0.1), shift_class(0.0, 0.0)
    ('', 'up4', '')
    """
    return gain_class(_gain(before, after))


def _gain(before: float | None, after: float | None) -> float | None:
    """By how many nats the loss of a token fell with its probabilities; a probability of 0 counts as a tiny one."""
    if before is None or after is None:
        return None
    return math.log(max(after, 1e-12) / max(before, 1e-12))
