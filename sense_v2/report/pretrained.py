"""The report of a pretrained model that read new text: what each way learned, and what it lost.

`write_report` makes one self-contained HTML file of the results, `terminal_table` the same answer for a terminal,
`write_picture` the picture for a README. The results are what `sense_v2.hf.experiments.pretrained.run_pretrained`
returns:

    {
      "title", "created": str, "corpus": {"name", "files", "held_out_files", "tokens", "held_out_tokens"},
      "model": {"name", "type", "layers", "hidden_size", "parameters"},
      "engram": the fields of EngramConfig, "train": the fields of TrainConfig,
      "table": {"rows", "width", "dtype", "bytes", "layers"},
      "runs": {"untouched": RUN, "counted": RUN, "memory": RUN, "lora": RUN,
               "both": RUN (optional), "random_rows": RUN (optional)},
      "changes": {"memory - lora": {"mean", "low", "high"}, …}: of the loss, over the same sequences,
      "random_rows_keep": share of the memory's gain that random rows keep, or None,
      "reading": what the memory's lookups cost, as `ReadStats.summary` says it,
      "step_times": a step with a memory ("other") and one with a LoRA ("base"), measured in turns,
      "generations": [{"prompt", "untouched", "memory", …}], "machine": {…}, "seconds": float
    }
    RUN = {"label", "description", "steps", "seconds", "loss", "perplexity", "bits_per_byte",
           "damage": None or {"divergence", "changed", "tokens"}, "trained": {"fusion", "lora"}}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sense_v2.hf.experiments.step_times import CONFIDENCE, is_clear
from sense_v2.report import page, wording
from sense_v2.report.wording import decimals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "untouched": "run-plain",
    "counted": "run-engram",
    "memory": "run-engram",
    "lora": "run-random_rows",
    "both": "run-shuffled",
    "random_rows": "muted",
}
"""The name of each way's colour in `plots.PALETTE` and style.css."""


def write_report(results: dict[str, Any], path: str | Path) -> None:
    """Write the HTML report, making its folder. Raises `KeyError` where `results` lack a part."""
    # matplotlib comes with the extra "demo", and takes a second to import.
    import matplotlib
    from matplotlib.figure import Figure

    from sense_v2.report import plots

    figure = Figure(figsize=(520 / 72, 330 / 72), dpi=72)
    with matplotlib.rc_context(plots.style(13)):
        _draw(figure.add_axes((0.13, 0.16, 0.83, 0.8)), results["runs"])
        told = "; ".join(f"{run['label']}: loss {decimals(run['loss'])}" for run in results["runs"].values())
        picture = plots.svg_of(figure, "learned-and-lost", told)
    page.write(
        path,
        "pretrained.html",
        results=results,
        runs=results["runs"],
        colors=COLORS,
        kind=wording.outcome(*(results["runs"][name]["perplexity"] for name in ("memory", "untouched"))),
        headline=headline(results),
        sentences=sentences(results),
        costs=costs(results),
        picture=picture,
    )


def write_picture(results: dict[str, Any], path: str | Path) -> None:
    """Draw what each way learned over what it lost, as a PNG."""
    from sense_v2.report import plots

    told = f"{results['model']['name']} reads {results['corpus']['name']}; further down and left is better."
    runs = results["runs"]
    values = ", ".join(f"{run['label']} {decimals(run['loss'])} nats a token" for run in runs.values())
    with plots.titled(path, headline(results), wording.printable(told), wording.printable(values)) as figure:
        _draw(figure.add_axes((0.115, 0.14, 0.845, 0.63)), runs)


def terminal_table(results: dict[str, Any]) -> str:
    """Return the ways as a text table of at most 80 columns, and under it what they show."""
    rows = [("way", "perplexity", "change", "loss", "damage", "other tokens", "steps")]
    before = results["runs"]["untouched"]
    for run in results["runs"].values():
        lost = run["damage"]
        rows.append(
            (
                run["label"],
                wording.perplexity(run["perplexity"]),
                "–" if run is before else wording.change(run["perplexity"], before["perplexity"]),
                decimals(run["loss"]),
                "–" if lost is None else decimals(lost["divergence"], 4),
                "–" if lost is None else percent(lost["changed"]),
                wording.count(run["steps"]),
            )
        )
    return wording.terminal_text(rows, [headline(results), *sentences(results), costs(results)])


def headline(results: dict[str, Any]) -> str:
    """What the memory learned, and what it lost beside a LoRA."""
    before, memory, lora = (results["runs"][name] for name in ("untouched", "memory", "lora"))
    if not all(wording.is_finite(run["loss"]) for run in (before, memory, lora)):
        return "Training broke down: a loss is not a finite number."
    told = f"Memory: perplexity {wording.change(memory['perplexity'], before['perplexity'])}"
    told += f"; a LoRA: {wording.change(lora['perplexity'], before['perplexity'])}"
    times = _times(lora["damage"]["divergence"], memory["damage"]["divergence"])
    return f"{told}{times and f', and {times} the damage'}."


def sentences(results: dict[str, Any]) -> list[str]:
    """What a reader should take away."""
    runs, changes = results["runs"], results["changes"]
    found = [
        f"Against a LoRA in as many seconds, the memory’s held-out loss is {_difference(changes['memory - lora'])}.",
        f"Rows that are counted, in {runs['counted']['seconds']:.0f} s and without a step of training, against the "
        f"model as it is: {_difference(changes['counted - untouched'])}; against the LoRA: "
        f"{_difference(changes['counted - lora'])}.",
    ]
    if "both" in runs:
        found.append(f"Both together against the LoRA: {_difference(changes['both - lora'])}.")
    memory, lora = (runs[name]["damage"] for name in ("memory", "lora"))
    found.append(
        "On texts that the untouched model wrote, the likeliest next token is another one at "
        f"{percent(memory['changed'])} of the places with the memory, at {percent(lora['changed'])} with the LoRA."
    )
    kept = results["random_rows_keep"]
    if kept is not None:
        found.append(
            f"A table that stays noise keeps {percent(kept)} of the memory’s gain; the rest is in the rows."
            if wording.is_finite(kept) and 0 < kept < 1
            else "A table that stays noise keeps nothing of the memory’s gain."
            if wording.is_finite(kept) and kept <= 0
            else "A table that stays noise is no worse than one that learns, so the rows did not help here."
        )
    return found


def costs(results: dict[str, Any]) -> str:
    """What a step with a memory takes, of a step with a LoRA."""
    times = results["step_times"]
    low, high = decimals(times["low"], 2), decimals(times["high"], 2)
    if not is_clear(times):
        return (
            "This machine’s speed changed too much to say what a step costs: the memory’s step time, divided by the "
            f"LoRA’s, has a {percent(CONFIDENCE)} interval of {low} to {high}."
        )
    return (
        f"A training step with the memory takes {decimals(times['ratio'], 2)} times as long as one with the LoRA "
        f"({percent(CONFIDENCE)} interval {low} to {high})."
    )


def _difference(change: dict[str, float]) -> str:
    """A difference of losses in nats, with its interval; negative is better."""
    mean, low, high = (change[name] for name in ("mean", "low", "high"))
    interval = f"({percent(CONFIDENCE)} interval {wording.signed(low, 3)} to {wording.signed(high, 3)})"
    if low <= 0 <= high:
        return f"not clearly different: {wording.signed(mean, 3)} nats a token {interval}"
    return f"{decimals(abs(mean))} nats a token {'lower' if mean < 0 else 'higher'} {interval}"


def _times(high: float, low: float) -> str:
    """How many times more, in words; nothing where it doesn't say anything.

    >>> _times(0.24, 0.008), _times(0.0, 0.0)
    ('30 times', '')
    """
    if not (wording.is_finite(high) and wording.is_finite(low) and low > 0 and high > 0):
        return ""
    ratio = high / low
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _draw(axes: Axes, runs: dict[str, dict[str, Any]]) -> None:
    """A point for each way: damage to the right, held-out loss upwards, each named beside it."""
    from sense_v2.report import plots

    points = {
        name: (0.0 if run["damage"] is None else run["damage"]["divergence"], run["loss"])
        for name, run in runs.items()
    }
    points = {name: point for name, point in points.items() if all(map(wording.is_finite, point))}
    widest = max((x for x, _ in points.values()), default=0.0) or 1.0
    plots.prepare(axes, "damage: KL on texts that the untouched model wrote, nats a token")
    axes.set_ylabel("held-out loss, nats a token", labelpad=8)
    axes.set_xlim(-0.03 * widest, 1.06 * widest)
    axes.margins(y=0.15)
    for name, (x, y) in points.items():
        axes.plot([x], [y], marker="o", markersize=9, color=plots.PALETTE[COLORS[name]], linestyle="none")
    for is_right in (False, True):
        _name_points(
            axes, {name: at for name, at in points.items() if (at[0] > widest / 2) == is_right}, runs, is_right
        )


def _name_points(
    axes: Axes, points: dict[str, tuple[float, float]], runs: dict[str, dict[str, Any]], is_right: bool
) -> None:
    """Names of the points of one half, on the side that has room, moved apart where they would overlap."""
    import matplotlib

    from sense_v2.report import plots

    axes.autoscale_view()  # it would wait for the drawing
    to_fraction = axes.transData + axes.transAxes.inverted()
    height = axes.bbox.height / axes.get_figure(root=True).dpi * 72  # type: ignore[union-attr]
    middles = [float(to_fraction.transform(at)[1]) for at in points.values()]
    placed = plots.spread(middles, [1.5 * matplotlib.rcParams["font.size"] / height] * len(middles))
    for (name, at), middle, place in zip(points.items(), middles, placed, strict=True):
        axes.annotate(
            wording.printable(runs[name]["label"]),
            at,
            (-10 if is_right else 10, (place - middle) * height),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="center",
            color=plots.PALETTE[COLORS[name]],
            weight="bold" if name == "memory" else "normal",
            bbox={"facecolor": plots.PALETTE["page"], "linewidth": 0, "pad": 1.5},  # no grid line runs through it
            parse_math=False,
        )
