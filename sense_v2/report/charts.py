"""Small charts for a page: lines, columns and points, as inline SVG in the page's colours (see plots.py).

Lines are named at their ends, and differ in dash and marker as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sense_v2.report import wording
from sense_v2.report.plots import PALETTE, prepare, spread, style, svg_of

COLORS = ("run-engram", "run-random_rows", "run-shuffled", "run-plain")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Series:
    label: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    name: str,
    series: Sequence[Series],
    *,
    x_label: str,
    log: str = "",
    percent: str = "",
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Draw lines, named at their ends where there are several.

    Args:
        name: Unique in a page; says in words what the chart shows.
        series: The lines. One without a finite value is left out.
        x_label: What the x axis shows.
        log: The axes that are logarithmic: "x", "xy" or none.
        percent: The axes that show shares as percentages.
        y_range: The ends of the y axis; by default, what the lines need.
    """
    drawn = [one for one in series if len(one.x) and np.isfinite(one.y).any()]
    # Room for the names of the lines, where there are several.
    figure, axes = _axes(0.62 if len(drawn) > 1 else 0.86)
    with matplotlib.rc_context(style(13)):
        prepare(axes, x_label)
        for number, one in enumerate(drawn):
            color = PALETTE[COLORS[number % len(COLORS)]]
            axes.plot(one.x, one.y, color=color, linestyle=DASHES[number % len(DASHES)], linewidth=2)
        for letter, axis, scale in (("x", axes.xaxis, axes.set_xscale), ("y", axes.yaxis, axes.set_yscale)):
            if letter in log:
                scale("log")
                axis.set_major_locator(LogLocator(numticks=5))
                axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(FuncFormatter(_percent if letter in percent else _short))
        axes.minorticks_off()
        if y_range:
            axes.set_ylim(*y_range)
        if "x" not in log:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer="x" not in percent))
        _name_ends(axes, drawn)
        ends = [f"{one.label} from {_number(one.y[0])} to {_number(one.y[-1])}" for one in drawn]
        return svg_of(figure, name, ", ".join(ends) or "nothing to draw")


def column_chart(name: str, edges: Sequence[float], counts: Sequence[int], *, x_label: str) -> Markup:
    """Draw a histogram, as shares of all that was counted."""
    figure, axes = _axes(0.86)
    with matplotlib.rc_context(style(13)):
        prepare(axes, x_label)
        total = sum(counts) or 1
        shares = [count / total for count in counts]
        widths = np.diff(edges)
        axes.bar(edges[:-1], shares, width=0.88 * widths, align="edge", color=PALETTE["run-engram"])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        highest = int(np.argmax(shares)) if shares else 0
        low, high = _number(edges[highest]), _number(edges[highest + 1])
        told = f"{wording.percent(shares[highest])} lie between {low} and {high}"
        return svg_of(figure, name, told)


def loss_chart(name: str, without: Sequence[float], with_memory: Sequence[float]) -> Markup:
    """Draw each token's loss with memory over that without it, and the line on which memory changes nothing."""
    pairs_P2 = np.array([without, with_memory], dtype=np.float64).T
    pairs_P2 = pairs_P2[np.isfinite(pairs_P2).all(axis=1)]
    helped_P = pairs_P2[:, 1] < pairs_P2[:, 0]
    figure, axes = _axes(0.86)
    with matplotlib.rc_context(style(13)):
        prepare(axes, "loss without memory")
        end = 1.02 * float(pairs_P2.max(initial=1.0))
        axes.plot([0, end], [0, end], color=PALETTE["ink"], linewidth=1)
        for points_P2, color in ((pairs_P2[helped_P], "run-engram"), (pairs_P2[~helped_P], "run-random_rows")):
            axes.plot(*points_P2.T, "o", color=PALETTE[color], markersize=3, markeredgewidth=0, alpha=0.5)
        axes.set_xlim(0, end)
        axes.set_ylim(0, end)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(_short))
        share = wording.percent(helped_P.mean()) if len(helped_P) else "none"
        return svg_of(figure, name, f"{share} of the points lie below the line")


def _axes(width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(460 / 72, 280 / 72), dpi=72)
    with matplotlib.rc_context(style(13)):
        return figure, figure.add_axes((0.12, 0.17, width, 0.8))


def _name_ends(axes: Axes, series: Sequence[Series]) -> None:
    if len(series) < 2:
        return
    ends = []
    for one in series:
        last = int(np.flatnonzero(np.isfinite(one.y))[-1])
        place = axes.transData.transform((one.x[last], one.y[last]))
        ends.append(float(axes.transAxes.inverted().transform(place)[1]))
    for number, (one, middle) in enumerate(zip(series, spread(ends, [0.09] * len(ends)), strict=True)):
        color = PALETTE[COLORS[number % len(COLORS)]]
        axes.text(1.03, middle, one.label, color=color, va="center", transform=axes.transAxes, parse_math=False)


def _short(value: float, _: Any = None) -> str:
    return _number(value)


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.3g} %"


def _number(value: float) -> str:
    """
    >>> _number(0.25), _number(2_000_000), _number(-3.0)
    ('0.25', '2 M', '−3')
    """
    if not math.isfinite(value):
        return wording.NOT_FINITE
    text = wording.short(value) if abs(value) >= 10_000 else f"{value:,.4g}"
    return text.replace("-", "−")
