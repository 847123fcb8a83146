"""What a larger table gives and costs: the demo trained with tables of 10⁴ to 10⁸ rows, in one picture.

The physics. Rows are shared by n-grams whose hashes collide. With few rows a row has to serve many of them; once
there are more rows than n-grams in the text, more rows change nothing. A step reads and writes the rows of its batch,
so its time and its memory shouldn't know how long the file is.

All sizes and the model without memory train on the same batches with the demo's settings, one seed after the other.
Each is a process of its own (its anonymous memory is nobody else's); they take turns every few steps, so that step
times compare whatever else the machine does. The demo's rows start at zero, and so a sparse file is the same table
and takes disk space only where it is written to; all sizes are such files, in a temporary folder, removed after each
seed.

    python benchmarks/scaling.py [--quick] [--output runs/scaling] [--picture docs/scaling.png] [--plot-only]

Every run is written to a JSON file of its own once its seed is done; what is there isn't run again. The last line of
stdout is one JSON object. Needs Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from turns import MemoryPeak, ProcessorClock, Text, Turn, machine, prepare_text, take_turns

from sense_v2.core.config import TrainConfig
from sense_v2.hf.experiments.step_times import spread
from sense_v2.hf.insight.evaluation import evaluate
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fit import History, fit
from sense_v2.report.plots import PALETTE, style

PLAIN = 0
"""In the place of a number of rows: the model without memory."""
CORPUS_BYTES = 16 * 2**20
"""As much of the standard library as the demo reads."""
NEEDED_BYTES = 20 * 10**9
"""Disk space that a seed's tables may take: a page for each row that is met, in several sizes at once."""
WARM_UP_STEPS = 10
"""Steps that count neither for time nor for memory: buffers and pages are met for the first time."""
STEPS_A_TURN = 4


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: TrainConfig
    text_bytes: int

    @property
    def runs(self) -> tuple[int, ...]:
        return (PLAIN, *self.sizes)


def full_plan() -> Plan:
    return Plan(tuple(10**power for power in range(4, 9)), (0, 1, 2), TrainConfig(), CORPUS_BYTES)


def quick_plan() -> Plan:
    settings = dataclasses.replace(TrainConfig(), steps=WARM_UP_STEPS + 4, eval_sequences=4, warmup_steps=2)
    return Plan((10**4, 10**5), (0,), settings, 200_000)


# Training


@dataclass(frozen=True)
class Run:
    text: Text
    folder: Path
    rows: int
    settings: TrainConfig


def train_one(turn: Turn, run: Run) -> dict[str, Any]:
    """A child: trains with a table of that size, and says what came of it."""
    settings = run.settings
    memory = run.text.memory(run.folder, run.rows, seed=settings.seed, sparse=True) if run.rows else None
    assert memory is None or memory.init_std == 0, "a sparse table is another one than the demo's"
    model = run.text.model(settings, memory)
    held_out_BT = run.text.batches(settings, "held_out").sample(settings.eval_sequences)
    peaks: list[int] = []
    with MemoryPeak() as peak:
        turn.wait()  # the others are made before the first one trains
        clock = ProcessorClock()

        def on_step(history: History) -> None:
            clock.step_is_done()
            done = len(history.steps)
            if done == WARM_UP_STEPS:
                peak.begin()
            if done < settings.steps:  # the evaluation after the last step isn't training
                peaks.append(peak.bytes)
            turn.on_step(history)
            clock.go_on()

        batches = run.text.batches(settings)
        history = fit(model, batches, settings, evaluate=lambda model: evaluate(model, held_out_BT), on_step=on_step)
    result: dict[str, Any] = {
        "rows": run.rows,
        "seed": settings.seed,
        "settings": settings.to_dict(),
        "held_out_loss": history.evals[-1]["loss"],
        "step_seconds": spread(history.step_seconds()[WARM_UP_STEPS:]),
        # The last step's has the evaluation in it.
        "processor_seconds": spread(clock.seconds[WARM_UP_STEPS:-1]),
        "peak_bytes": peaks[-1],
        "machine": machine(),
    }
    if memory is not None:
        storage = memory_of(model).storage
        layers = list(memory_of(model))
        seen = [layer.row_ids(ids).flatten() for ids in islice(batches, settings.steps) for layer in layers]
        result |= {
            "table_rows": storage.num_embeddings,
            "table_bytes": storage.path.stat().st_size,
            "disk_bytes": sum(file.stat().st_blocks * 512 for file in run.folder.iterdir()),
            "touched_rows": len(torch.unique(torch.cat(seen))),
        }
        storage.close()
    return result


def run_file(folder: Path, rows: int, seed: int) -> Path:
    return folder / f"rows-{rows}-seed-{seed}.json"


def run_plan(plan: Plan, folder: Path) -> None:
    """Trains what isn't in `folder` yet, a seed at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in plan.seeds if not all(run_file(folder, rows, seed).exists() for rows in plan.runs)]
    free_bytes = shutil.disk_usage(folder).free
    if missing and free_bytes < NEEDED_BYTES:
        raise SystemExit(f"{folder}: {free_bytes:,} bytes free, the tables may need {NEEDED_BYTES:,}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        text = prepare_text(Path(temporary), plan.text_bytes) if missing else None
        for seed in missing:
            assert text is not None
            settings = dataclasses.replace(plan.settings, seed=seed, eval_every=0)
            with tempfile.TemporaryDirectory(dir=folder) as tables:
                runs = [Run(text, Path(tables) / str(rows), rows, settings) for rows in plan.runs]
                for result in take_turns(train_one, runs, steps=STEPS_A_TURN):
                    write_json(run_file(folder, result["rows"], seed), result)
                    print(describe(result), flush=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def describe(result: dict[str, Any]) -> str:
    name = f"{result['rows']:>11,} rows" if result["rows"] else "      without memory"
    step = result["step_seconds"]
    return (
        f"seed {result['seed']} {name:16}: held-out loss {result['held_out_loss']:.4f}, a step "
        f"{step['median'] * 1e3:.1f} ms ({step['low'] * 1e3:.1f} to {step['high'] * 1e3:.1f}), of the processor "
        f"{result['processor_seconds']['median'] * 1e3:.1f} ms, "
        f"{result['peak_bytes'] / 1e6:.0f} MB anonymous"
    )


# The picture


def read_runs(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of rows, of the seeds for which all sizes are there."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rows-*-seed-*.json"))]
    sizes = sorted({run["rows"] for run in found})
    seeds = {seed: {run["rows"] for run in found if run["seed"] == seed} for seed in {run["seed"] for run in found}}
    whole = {seed for seed, rows in seeds.items() if rows == set(sizes)}
    return {rows: [run for run in found if run["rows"] == rows and run["seed"] in whole] for rows in sizes}


def summary(runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, and how the largest table compares with the smallest."""

    def mean(rows: int, value: Any) -> float:
        return statistics.mean(value(run) for run in runs[rows])

    found = {
        str(rows): {
            "held_out_loss": mean(rows, lambda run: run["held_out_loss"]),
            "step_seconds": mean(rows, lambda run: run["step_seconds"]["median"]),
            "processor_seconds": mean(rows, lambda run: run["processor_seconds"]["median"]),
            "peak_bytes": mean(rows, lambda run: run["peak_bytes"]),
            "seeds": len(runs[rows]),
        }
        for rows in runs
    }
    sizes = [rows for rows in runs if rows]
    least, most = found[str(sizes[0])], found[str(sizes[-1])]
    ratios = {name: most[name] / least[name] for name in ("step_seconds", "processor_seconds", "peak_bytes")}
    return {"benchmark": "scaling", "sizes": found, "largest_to_smallest": ratios}


def draw(runs: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Three panels over the number of rows: held-out loss, step time, anonymous memory; a dot for each seed."""
    sizes = [rows for rows in runs if rows]
    told = summary(runs)
    least, most = told["sizes"][str(sizes[0])], told["sizes"][str(sizes[-1])]
    num_seeds = len(runs[sizes[0]])
    figure = Figure(figsize=(11.5, 4.7), dpi=170, facecolor=PALETTE["page"])
    with matplotlib.rc_context(style(10)):
        title = (
            f"From {count(sizes[0])} to {count(sizes[-1])} rows: held-out loss {least['held_out_loss']:.2f} → "
            f"{most['held_out_loss']:.2f}, step time × {told['largest_to_smallest']['step_seconds']:.2f}, "
            f"memory × {told['largest_to_smallest']['peak_bytes']:.2f}"
        )
        figure.text(0.025, 0.955, title, size=13, weight="bold", va="top")
        seeds = f"{num_seeds} seeds: a dot each, the line through their means" if num_seeds > 1 else "one seed"
        below = (
            f"The demo's model ({runs[sizes[0]][0]['settings']['steps']} steps), its table in a sparse file. "
            f"{seeds[0].upper()}{seeds[1:]}."
        )
        figure.text(0.025, 0.885, below, size=10, va="top", color=PALETTE["muted"])
        panels = (
            ("Held-out loss (nats a token)", lambda run: run["held_out_loss"], "{:.2f}"),
            ("Time of a training step (ms)", lambda run: run["step_seconds"]["median"] * 1e3, "{:.0f}"),
            ("Peak anonymous memory (MB)", lambda run: run["peak_bytes"] / 1e6, "{:.0f}"),
        )
        for number, (name, value, form) in enumerate(panels):
            axes = figure.add_axes((0.05 + 0.325 * number, 0.19, 0.255, 0.54))
            panel(axes, runs, sizes, value, name, form, from_zero=number > 0)
            if number == 0:
                mark_crowding(axes, runs, sizes)
        figure.text(
            0.5, 0.025, "rows of the table, and the length of its file", size=10, ha="center", color=PALETTE["muted"]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})


def panel(
    axes: Axes,
    runs: dict[int, list[dict[str, Any]]],
    sizes: list[int],
    value: Any,
    name: str,
    form: str,
    *,
    from_zero: bool,
) -> None:
    color, plain_color = PALETTE["run-engram"], PALETTE["run-plain"]
    means = [statistics.mean(value(run) for run in runs[rows]) for rows in sizes]
    axes.set_xscale("log")
    axes.plot(sizes, means, color=color, linewidth=2.2, zorder=3)
    for rows in sizes:
        values = [value(run) for run in runs[rows]]
        axes.plot(
            [rows] * len(values), values, "D", color=color, markersize=4, markeredgewidth=0, alpha=0.6, zorder=4
        )
    highest = max(value(run) for rows in sizes for run in runs[rows])
    lowest = min(value(run) for rows in sizes for run in runs[rows])
    if runs.get(PLAIN):
        plain = [value(run) for run in runs[PLAIN]]
        middle = statistics.mean(plain)
        axes.axhspan(min(plain), max(plain), color=plain_color, alpha=0.15, linewidth=0, zorder=1)
        axes.axhline(middle, color=plain_color, linewidth=1.4, linestyle=(0, (5, 2)), zorder=2)
        highest, lowest = max(highest, *plain), min(lowest, *plain)
        text = f"without memory {form.format(middle)}"
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "color": plain_color,
            "size": 9,
        }
        axes.annotate(text, (0.01, lowest if from_zero else max(plain)), (0, -5 if from_zero else 4), **place,
                      va="top" if from_zero else "bottom")  # fmt: skip
        close = [abs(mean - middle) < 0.12 * highest and middle > mean and from_zero for mean in means]
    else:
        close = [False] * len(means)
    for number in (0, -1):
        # Above its seeds' dots, and above the line of the model without memory where that is just above this one.
        highest_here = max(value(run) for run in runs[sizes[number]])
        at = (sizes[number], max(middle, highest_here) if close[number] else highest_here)
        style: dict[str, Any] = {"textcoords": "offset points", "color": color, "weight": "bold", "ha": "center"}
        axes.annotate(form.format(means[number]), at, (0, 8), **style)
    room = 0.12 * (highest - lowest) or 0.05 * highest
    axes.set_ylim(0 if from_zero else lowest - room, highest * 1.25 if from_zero else highest + 1.5 * room)
    axes.set_xlim(sizes[0] / 2, sizes[-1] * 2)
    axes.set_xticks(sizes, [f"{power_of_ten(rows)}\n{size(runs[rows][0]['table_bytes'])}" for rows in sizes])
    axes.minorticks_off()
    axes.grid(axis="y", color=PALETTE["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_title(name, size=11, loc="left", color=PALETTE["ink"], pad=10)


def mark_crowding(axes: Axes, runs: dict[int, list[dict[str, Any]]], sizes: list[int]) -> None:
    """Where there are as many rows as the text needs: what the largest table touched, almost without collisions."""
    needed = statistics.mean(run["touched_rows"] for run in runs[sizes[-1]])
    if not sizes[0] < needed < sizes[-1]:
        return
    axes.axvline(needed, color=PALETTE["muted"], linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.annotate(
        "a row for each\nn-gram and head", (needed, 0.6), (5, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", size=8.5, va="top", ha="left", color=PALETTE["muted"],
    )  # fmt: skip


def power_of_ten(rows: int) -> str:
    power = len(str(rows)) - 1
    return f"$10^{{{power}}}$" if rows == 10**power else f"{rows:,}"


def count(rows: int) -> str:
    """>>> count(10_000), count(100_000_000)
    ('10 thousand', '100 million')
    """
    for unit, name in ((10**6, "million"), (10**3, "thousand")):
        if rows >= unit and rows % unit == 0:
            return f"{rows // unit} {name}"
    return f"{rows:,}"


def size(num_bytes: int) -> str:
    """>>> size(12_800_000_000), size(1_280_000)
    ('12.8 GB', '1.3 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}" if num_bytes < 100 * unit else f"{num_bytes / unit:.0f} {name}"
    return f"{num_bytes} B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small tables, a few steps: whether it runs")
    parser.add_argument("--output", type=Path, help="where the runs are kept (default: runs/scaling)")
    parser.add_argument("--picture", type=Path, help="default: docs/scaling.png; with --quick beside the runs")
    parser.add_argument("--plot-only", action="store_true", help="draw what is there")
    arguments = parser.parse_args()
    output = arguments.output or Path("runs/scaling-quick" if arguments.quick else "runs/scaling")
    picture = arguments.picture or (output / "scaling.png" if arguments.quick else Path("docs/scaling.png"))
    if not arguments.plot_only:
        run_plan(quick_plan() if arguments.quick else full_plan(), output)
    runs = read_runs(output)
    if not any(runs.values()):
        raise SystemExit(f"{output}: no seed is complete there")
    draw(runs, picture)
    for rows in runs:
        for run in runs[rows]:
            print(describe(run))
    print(f"picture: {picture}")
    print(json.dumps(summary(runs)))


if __name__ == "__main__":
    main()
