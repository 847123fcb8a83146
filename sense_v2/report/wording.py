"""Numbers and texts as a reader sees them: each number as a short text with its unit.

Every report formats through here, so a number looks the same in a table, a sentence, a plot and the terminal. A value
that isn't a finite number says so in words and never raises: a run that diverged is a result, too.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

NOT_FINITE = "not finite"
SAME = 0.005
"""Two values less than half a percent apart are called level: one run can't tell them from chance."""
COLUMNS = 80
"""Width of what a terminal shows."""


def is_finite(value: Any) -> bool:
    """Return True if `value` is a number to compute with; None stands for a missing number.

    >>> [is_finite(value) for value in (1, 2.5, None, float("nan"), float("inf"))]
    [True, True, False, False, False]
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: float | None) -> str:
    """
    >>> count(129280)
    '129,280'
    """
    return f"{value:,.0f}" if value is not None and is_finite(value) else NOT_FINITE


def number_of(value: float | None, noun: str) -> str:
    """
    >>> number_of(1, "token"), number_of(2000, "token")
    ('1 token', '2,000 tokens')
    """
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def spare_rows(table_rows: int, head_rows: int) -> str:
    """Why the rows of all heads are fewer than the table's; nothing where they aren't.

    >>> spare_rows(2_097_152, 2_097_074)
    ' The table has 78 more: each head gets a prime number of rows, and these are left over.'
    >>> spare_rows(100, 100)
    ''
    """
    spare = table_rows - head_rows
    left_over = "this one is" if spare == 1 else "these are"
    return (
        f" The table has {count(spare)} more: each head gets a prime number of rows, and {left_over} left over."
        if spare
        else ""
    )


def short(value: float | None) -> str:
    """
    >>> short(3_412_992), short(950)
    ('3.41 M', '950')
    """
    if value is None or not is_finite(value):
        return NOT_FINITE
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}" if value < 999.5 * size else f"{value / size:.0f} {name}"
    return f"{value:.0f}"


def decimals(value: float | None, digits: int = 3) -> str:
    """A loss or a ratio: a fixed number of decimals, with a minus sign.

    >>> decimals(2.51049), decimals(-0.5, 2)
    ('2.510', '−0.50')
    """
    return f"{value:.{digits}f}".replace("-", "−") if value is not None and is_finite(value) else NOT_FINITE


def signed(value: float | None, digits: int = 4) -> str:
    """A difference, with its sign.

    >>> signed(0.51234), signed(-0.5, 2), signed(0.0)
    ('+0.5123', '−0.50', '0.0000')
    """
    return ("+" if is_finite(value) and round(float(value or 0), digits) > 0 else "") + decimals(value, digits)


def perplexity(value: float | None) -> str:
    """
    >>> perplexity(12.3081), perplexity(1503.2), perplexity(float("inf"))
    ('12.31', '1,503', 'not finite')
    """
    if value is None or not is_finite(value):
        return NOT_FINITE
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def percent(fraction: float | None) -> str:
    """
    >>> percent(0.4102), percent(0.0312), percent(-0.07), percent(0.0), percent(0.0002), percent(-0.0002)
    ('41 %', '3.1 %', '−7.0 %', '0 %', '< 0.1 %', '> −0.1 %')
    """
    if fraction is None or not is_finite(fraction):
        return NOT_FINITE
    value = 100 * fraction
    if 0 < abs(value) < 0.05:
        return "< 0.1 %" if value > 0 else "> −0.1 %"
    text = f"{value:,.1f}" if 0 < abs(value) < 9.95 else f"{value:,.0f}"
    return text.replace("-", "−") + " %"


def chance(probability: float | None) -> str:
    """A probability as a percentage that never says 0 or 100 where it isn't.

    >>> chance(0.412), chance(0.00001), chance(0.9999), chance(1.0), chance(float("nan"))
    ('41 %', '< 0.1 %', '> 99.9 %', '100 %', 'not finite')
    """
    if probability is None or not is_finite(probability):
        return NOT_FINITE
    if 0 < probability < 0.001:
        return "< 0.1 %"
    if 0.999 < probability < 1:
        return "> 99.9 %"
    return percent(probability)


def outcome(new: float | None, old: float | None) -> str:
    """Return better, worse, level or broken: the perplexity `new` against `old`.

    >>> outcome(59, 100), outcome(101, 100), outcome(100.4, 100), outcome(None, 100)
    ('better', 'worse', 'level', 'broken')
    """
    if new is None or old is None or not (is_finite(new) and is_finite(old)):
        return "broken"
    if abs(new - old) < SAME * old:
        return "level"
    return "better" if new < old else "worse"


def change(new: float, old: float) -> str:
    """How `new` compares with `old`, both finite and above 0; past ten times as high a percentage says little.

    >>> change(59, 100), change(112, 100), change(2000, 100)
    ('41 % lower', '12 % higher', '20 times as high')
    """
    if new > 10 * old:
        return f"{new / old:,.0f} times as high"
    return f"{percent(abs(new - old) / old)} {'lower' if new < old else 'higher'}"


def duration(seconds: float | None) -> str:
    """
    >>> duration(0.03812), duration(4.5), duration(83), duration(725), duration(7380)
    ('38.1 ms', '4.50 s', '83 s', '12 min 5 s', '2 h 3 min')
    """
    if seconds is None or not is_finite(seconds):
        return NOT_FINITE
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    large, small, size = ("h", "min", 3600) if seconds >= 7200 else ("min", "s", 60)
    parts = round(seconds / size * 60)
    return f"{parts // 60} {large} {parts % 60} {small}"


def size(num_bytes: float | None) -> str:
    """
    >>> size(2_560_000_000), size(16_774_144), size(900)
    ('2.56 GB', '16.8 MB', '900 bytes')
    """
    if num_bytes is None or not is_finite(num_bytes):
        return NOT_FINITE
    for factor, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {name}" if num_bytes < 999.5 * factor else f"1,000 {name}"
    return f"{num_bytes:.0f} bytes"


def taken_off(trained_alone: bool) -> str:
    """What a model is whose memory is taken off.

    >>> taken_off(True)
    'the model as it was before, since its memory alone was trained'
    """
    if trained_alone:
        return "the model as it was before, since its memory alone was trained"
    return "this model with its memory taken off; one that was trained without may do better"


def reading(table: dict[str, Any]) -> str:
    """What reading a table has cost, of a `ReadStats.summary`.

    >>> reading({"calls": 1, "rows": 2048, "bytes": 524_288, "asked": 1, "slow": 1, "wait_seconds": 0.012})
    '1 lookup of 2,048 rows, 524 KB; 1 asked for from the disk, 1 slow, 12 ms in all'
    """
    waits = f", {duration(table['wait_seconds'])} in all" if table["slow"] else ""
    lookups = f"{number_of(table['calls'], 'lookup')} of {number_of(table['rows'], 'row')}"
    asked = f"{count(table['asked'])} asked for from the disk"
    return f"{lookups}, {size(table['bytes'])}; {asked}, {count(table['slow'])} slow{waits}"


def setting(value: Any) -> str:
    """A value of a configuration, as it would be written in its file.

    >>> setting([2, 3]), setting(None), setting(True), setting(3e-3)
    ('[2, 3]', 'null', 'true', '0.003')
    """
    return value if isinstance(value, str) else json.dumps(value)


def moment(iso_time: str) -> str:
    """
    >>> moment("2026-01-31T14:05:09+00:00"), moment("yesterday")
    ('31 January 2026, 14:05 UTC', 'yesterday')
    """
    try:
        time = datetime.fromisoformat(iso_time.replace("Z", "+00:00"))
    except ValueError:
        return iso_time
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".rstrip()


def listing(names: list[str]) -> str:
    """
    >>> listing(["a", "b", "c"]), listing(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def show_spaces(text: str, inline: bool = False) -> str:
    """A token's text with its white space made visible. Running text keeps its spaces and breaks its lines behind
    the arrow; `inline` gives a single line, for a token that stands alone.

    >>> show_spaces("):\\n"), show_spaces("    "), show_spaces("\\t"), show_spaces(" foo"), show_spaces("")
    ('):↵\\n', '····', '⇥\\t', ' foo', '∅')
    >>> show_spaces(" foo\\n", inline=True)
    '·foo↵'
    """
    if not text:
        return "∅"
    if inline:
        text = text.replace(" ", "·")
    if not text.strip(" "):
        return "·" * len(text)
    marks = {"\n": "↵" if inline else "↵\n", "\t": "⇥" if inline else "⇥\t", "\x7f": "␡"}
    return "".join(marks.get(c) or (chr(0x2400 + ord(c)) if ord(c) < 0x20 else c) for c in text)


def printable(text: str) -> str:
    """One line that a font can draw and a terminal can print: no control characters, no halves of surrogate pairs.

    >>> printable("a\\tb") == "a b", printable("a\\x1b[2J") == "a\\ufffd[2J"
    (True, True)
    """
    return "".join(" " if c.isspace() else c if c.isprintable() else "\ufffd" for c in text)


def tie(text: str) -> str:
    """Holds a number and its unit together with a no-break space, at which textwrap doesn't break a line either.

    >>> tie("41 % lower after 83 s").replace(chr(160), "~")
    '41~% lower after 83~s'
    """
    return re.sub(r"(?<=\d) (?=(%|[KMGT]?B|bytes|[KMT]|ms|s|min|h)(\W|$))", "\u00a0", text)


def typeset(text: str) -> str:
    """A sentence as a page sets it: units tied to their numbers, a printer's apostrophe.

    >>> typeset("the model's perplexity")
    'the model’s perplexity'
    """
    return re.sub(r"(?<=\w)'(?=\w|\s)", "’", tie(text))


def terminal_text(rows: Sequence[Sequence[str]], sentences: Iterable[str]) -> str:
    """A table for a terminal, its header first, and under it the sentences, of at most `COLUMNS` columns.

    >>> print(terminal_text([("run", "loss"), ("plain", "3.1")], ["It ran."]), end="")
    run    loss
    -----  ----
    plain   3.1
    <BLANKLINE>
    It ran.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "".join(printable(line) + "\n" for line in [*lines, "", *wrapped(sentences)])


def wrapped(sentences: Iterable[str]) -> list[str]:
    """Lines of at most `COLUMNS` columns; each sentence begins one."""
    return [printable(line) for sentence in sentences for line in textwrap.wrap(tie(sentence), COLUMNS)]
