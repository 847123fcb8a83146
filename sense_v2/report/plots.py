"""The plots of the training report, as inline SVG or as a PNG.

matplotlib draws on a transparent ground; then each colour of PALETTE is replaced by the CSS variable of its name, and
texts stay texts, so a plot follows the page into dark mode and takes its font. Panels are about as wide as a phone: a
wider plot can't be read when it shrinks.

Lines are named at their ends. Colour, dash and marker each tell them apart, for readers who can't see one of these.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sense_v2.hf.experiments.step_times import is_clear
from sense_v2.report import verdict, wording

PALETTE = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "line": "#d8dee4",
    "run-plain": "#3d444d",
    "run-engram": "#0a5fb8",
    "run-random_rows": "#b45309",
    "run-shuffled": "#811bf3",
}
"""The light colours, as in style.css, which has the dark ones too."""

DASHES: dict[str, Any] = {"plain": "-", "engram": "-", "random_rows": (0, (5, 2)), "shuffled": (0, (1.5, 1.5))}
MARKERS = {"plain": "o", "engram": "D", "random_rows": "s", "shuffled": "^"}
WARM_UP = 0.1
"""The y axis ignores the first tenth of a run, where losses fall so far that the rest would look flat."""
LABEL_CHARACTERS = 15


@dataclass(frozen=True)
class Line:
    name: str
    label: str
    x: np.ndarray
    y: np.ndarray
    """NaN where the value isn't finite: a gap."""


def loss_panels(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Validation and smoothed training loss, each over steps and over time: caption and SVG of each panel.

    Time is steps times a step's seconds as measured in turns, so it is there for the two models that took turns, and
    only where their step times are clear.
    """
    times = results["step_times"]
    plain_seconds = times["seconds"]["plain"]["median"]
    step_seconds = {"plain": plain_seconds, "engram": plain_seconds * times["ratio"]} if is_clear(times) else {}
    panels = []
    for kind, lines_of in (("Validation", validation_lines), ("Training", training_lines)):
        lines = lines_of(results)
        timed = [replace(one, x=one.x * step_seconds[one.name]) for one in lines if one.name in step_seconds]
        for over, drawn in (("steps", lines), ("time", timed)):
            if not drawn:
                continue
            caption = f"{kind} loss over {over}"
            figure = Figure(figsize=(460 / 72, 300 / 72), dpi=72)
            with matplotlib.rc_context(style(13)):
                axes = figure.add_axes((0.1, 0.15, 0.6, 0.83))
                _draw(axes, drawn, over, markers=kind == "Validation")
                panels.append(
                    {"caption": caption, "svg": svg_of(figure, caption.lower().replace(" ", "-"), _told(drawn))}
                )
    return panels


def write_picture(results: dict[str, Any], path: str | Path) -> None:
    """Draw the picture for a README: validation perplexity over steps, each run named at its end with its value."""
    corpus = textwrap.shorten(wording.printable(results["corpus"]["name"]), 50, placeholder="…")
    told = f"Perplexity on held-out text of {corpus}, log scale; lower is better."
    lines = validation_lines(results, "perplexity")
    ends = _told(lines, wording.perplexity)
    with titled(path, verdict.headline(results), told, ends) as figure:
        axes = figure.add_axes((0.075, 0.13, 0.7, 0.68))
        _draw(axes, lines, "steps", markers=True, log=True, format_value=wording.perplexity)


@contextmanager
def titled(path: str | Path, title: str, told: str, values: str) -> Iterator[Figure]:
    """Give the figure of a README's picture, with a title and a line below it; afterwards it is a PNG at `path`.

    Its `Description` says what `values` it shows, so that a README's table can be compared with its picture.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 4.5), dpi=200, facecolor=PALETTE["page"])
    with matplotlib.rc_context(style(11)):
        balanced = _balanced(wording.typeset(title), 74)
        figure.text(0.03, 0.965, balanced, size=12.5, weight="bold", va="top", parse_math=False)
        below = 0.94 - 0.05 * len(balanced.splitlines())
        figure.text(0.03, below, told, size=10, va="top", color=PALETTE["muted"], parse_math=False)
        yield figure
        figure.savefig(path, format="png", metadata={"Software": None, "Title": title, "Description": values})


def validation_lines(results: dict[str, Any], value: str = "loss") -> list[Line]:
    """Each run's held-out values over steps. The last one is the run's own, which the tables have too: a control that
    deals rows at random gives another value each time it is evaluated."""

    def points(run: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        steps, values = [e["step"] for e in run["evals"]], [e[value] for e in run["evals"]]
        if steps and steps[-1] == run["steps"][-1]:
            values[-1] = run[value]
        return steps, values

    return _lines(results, points)


def training_lines(results: dict[str, Any]) -> list[Line]:
    def points(run: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        losses = _floats(run["train_loss"])
        # A plot has a few hundred pixels; every further point only makes the file larger.
        keep = slice(None, None, max(1, len(losses) // 400))
        return run["steps"][keep], list(smooth(losses, smoothing_window(len(losses)))[keep])

    return _lines(results, points)


def smoothing_window(num_steps: int) -> int:
    return max(1, num_steps // 30)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, over those that are finite; NaN where the value itself isn't.

    >>> smooth(np.array([4.0, 2.0, np.nan, 6.0]), 2)
    array([ 4.,  3., nan,  6.])
    """
    finite = np.isfinite(values)
    sums, counts = (np.cumsum(np.concatenate([[0.0], part])) for part in (np.where(finite, values, 0), finite))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / np.maximum(counts[ends] - counts[starts], 1)
    return np.where(finite, means, np.nan)


def _lines(results: dict[str, Any], points: Callable[[dict[str, Any]], tuple[list[Any], list[Any]]]) -> list[Line]:
    lines = []
    for name in verdict.RUNS:
        if name in results["runs"]:
            run = results["runs"][name]
            x, y = (_floats(values) for values in points(run))
            lines.append(Line(name, wording.printable(run["label"]), x, np.where(np.isfinite(x), y, np.nan)))
    return lines


def _balanced(text: str, characters: int) -> str:
    """Wrapped into as few lines as hold it, of about one length."""
    num_lines = len(textwrap.wrap(text, characters))
    width = next(w for w in range(1, characters + 1) if len(textwrap.wrap(text, w)) <= num_lines)
    return textwrap.fill(text, width)


def _floats(values: list[Any]) -> np.ndarray:
    return np.array([float(value) if wording.is_finite(value) else np.nan for value in values], dtype=np.float64)


def style(font_size: float) -> Any:
    """Return the settings that plots share, for `matplotlib.rc_context`."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": font_size,
        "text.color": PALETTE["ink"],
        "axes.edgecolor": PALETTE["muted"],
        "axes.labelcolor": PALETTE["muted"],
        "xtick.color": PALETTE["muted"],
        "ytick.color": PALETTE["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "sense_v2",
        "path.simplify": True,
    }


def _draw(
    axes: Axes,
    lines: list[Line],
    over: str,
    markers: bool,
    log: bool = False,
    format_value: Callable[[float], str] = wording.decimals,
) -> None:
    """Lines, scales and the labels at the lines' ends, into axes that have their final place in the figure."""
    drawn = [line for line in lines if np.isfinite(line.y).any()]
    if not drawn:
        axes.patch.set_visible(False)
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no finite value to draw", ha="center", transform=axes.transAxes)
        return
    unit, label = _time_unit(drawn) if over == "time" else (1.0, "training step")
    end = max(np.nanmax(line.x) for line in drawn) / unit
    for line in drawn:
        axes.plot(
            line.x / unit,
            line.y,
            color=PALETTE[f"run-{line.name}"],
            linestyle=DASHES[line.name],
            linewidth=2.4 if line.name == "engram" else 1.6,
            marker=MARKERS[line.name] if markers else None,
            markersize=4.5,
            markeredgewidth=0,
            solid_capstyle="round",
            zorder=4 if line.name == "engram" else 3,
        )
    prepare(axes, label)
    start = min(np.nanmin(line.x) for line in drawn) / unit
    axes.set_xlim(0, 1.012 * end if end > 0 else 1)  # a little more, so that the last marker isn't cut
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=over == "steps", steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    _scale_y(axes, drawn, max(start, WARM_UP * end) * unit, log)
    if over == "time":
        moment = min(line.x[-1] for line in drawn) / unit
        axes.axvline(moment, color=PALETTE["muted"], linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    _label_ends(axes, drawn, unit, format_value)


def prepare(axes: Axes, x_label: str) -> None:
    """Set what the axes of every plot share."""
    axes.patch.set_visible(False)
    axes.set_xlabel(x_label)
    axes.grid(axis="y", color=PALETTE["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, axis="y")


def _time_unit(lines: list[Line]) -> tuple[float, str]:
    longest = max(np.nanmax(line.x) for line in lines)
    for unit, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 3 * unit:
            return unit, f"training time ({name})"
    return 1.0, "training time (seconds)"


def _scale_y(axes: Axes, lines: list[Line], settled: float, log: bool) -> None:
    late = np.concatenate([line.y[line.x >= settled] for line in lines])
    late = late[np.isfinite(late)]
    shown = late if len(late) else np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    low, high = float(shown.min()), float(shown.max())
    if log and low > 0:
        room = max((high / low) ** 0.06, 1.05)
        axes.set_yscale("log")
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low / room, high * room)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = max(0.06 * (high - low), 0.01 * abs(high), 1e-6)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "−")))


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between `low` and `high`, the roundest set of at least four.

    >>> log_ticks(11, 95), log_ticks(11, 14)
    ([20.0, 30.0, 50.0, 70.0], [11.0, 11.5, 12.0, 12.5, 13.0, 13.5, 14.0])
    """
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for heads in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [float(head * 10.0**power) for power in powers for head in heads]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks
    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def _label_ends(axes: Axes, lines: list[Line], unit: float, format_value: Callable[[float], str]) -> None:
    """Name and last value of each line at the right, moved apart where they would overlap."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    size = matplotlib.rcParams["font.size"]
    height = axes.get_position().height * figure.get_size_inches()[1] * 72
    low, high = axes.get_ylim()
    ends, texts = [], []
    for line in lines:
        last = np.flatnonzero(np.isfinite(line.y))[-1]
        at = (line.x[last] / unit, float(line.y[last]))
        value = format_value(at[1]) if last == len(line.y) - 1 else wording.NOT_FINITE
        name = textwrap.wrap(line.label, LABEL_CHARACTERS)[:2] or [line.name]
        texts.append("\n".join([*name, value]))
        ends.append((at[0], min(max(at[1], low), high)))
    fractions = [float(axes.transAxes.inverted().transform(axes.transData.transform(end))[1]) for end in ends]
    heights = [size * (0.3 + 1.2 * (1 + text.count("\n"))) / height for text in texts]
    for line, text, end, middle in zip(lines, texts, ends, spread(fractions, heights), strict=True):
        color = PALETTE[f"run-{line.name}"]
        weight = "bold" if line.name == "engram" else "normal"
        axes.text(
            1.06, middle, text, color=color, weight=weight, va="center", transform=axes.transAxes, parse_math=False
        )
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axes.annotate("", end, (1.05, middle), "data", "axes fraction", leader, annotation_clip=False)


def spread(middles: list[float], heights: list[float]) -> list[float]:
    """Move labels apart, each as little as the others allow, and inside 0 to 1 where they fit.

    Labels that touch form a block, centred where its members want to be (pool adjacent violators).

    >>> spread([0.5, 0.5], [0.2, 0.2])
    [0.4, 0.6]
    """
    order = sorted(range(len(middles)), key=lambda i: middles[i])
    blocks: list[tuple[float, list[int]]] = []  # the bottom edge, and who is in it from the bottom up
    for i in order:
        members = [i]
        bottom = _bottom(members, middles, heights)
        while blocks and blocks[-1][0] + sum(heights[j] for j in blocks[-1][1]) > bottom:
            members = blocks.pop()[1] + members
            bottom = _bottom(members, middles, heights)
        blocks.append((bottom, members))
    placed = [0.0] * len(middles)
    for bottom, members in blocks:
        for i in members:
            placed[i] = round(bottom + heights[i] / 2, 6)
            bottom += heights[i]
    return placed


def _bottom(members: list[int], middles: list[float], heights: list[float]) -> float:
    """The bottom edge of a block whose labels lie as near as they can to where they want to be."""
    total = sum(heights[i] for i in members)
    below = [sum(heights[j] for j in members[:k]) + heights[i] / 2 for k, i in enumerate(members)]
    wanted = sum(middles[i] - offset for i, offset in zip(members, below, strict=True)) / len(members)
    return min(max(wanted, 0.0), max(1.0 - total, 0.0))


def _told(lines: list[Line], format_value: Callable[[float], str] = wording.decimals) -> str:
    values = [f"{line.label} {format_value(line.y[-1]) if len(line.y) else 'no value'}" for line in lines]
    return f"at the end: {', '.join(values)}"


def svg_of(figure: Figure, name: str, told: str) -> Markup:
    """Turn a figure into an SVG element for a page: own ids, no metadata, colours as CSS variables.

    Args:
        figure: The figure.
        name: Unique in the page; the first part of each id, and of what a screen reader says.
        told: What is drawn, in words.
    """
    file = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are unique in a page, not in a figure.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable, color in PALETTE.items():
        svg = svg.replace(color, f"var(--{variable})")
    label = escape(f"{name.replace('-', ' ')}, {told}")
    return Markup(re.sub(r"<svg ", lambda _: f'<svg role="img" aria-label="{label}" ', svg, count=1))
