"""The training report: did the memory help, what did it cost, and where does the gain come from.

`write_report` makes one self-contained HTML file of the results, `terminal_table` the same answer for a terminal,
`write_picture` the picture for a README. wording.py formats the numbers, verdict.py chooses the sentences, plots.py
draws. The results are one dictionary that JSON can hold:

    {
      "title": str, "created": str (ISO time),
      "corpus": {"name", "files", "held_out_files", "tokens", "held_out_tokens", "bytes", "held_out_bytes"},
      "compression": {"tokenizer", "tokens", "ids", "normalization",
                      "examples": [{"compressed_id": int, "tokens": [str, ...]}]},
      "demo_compression": the same, for the tokenizer that the runs used,
      "model": {"type", "layers", "hidden_size", "parameters"},
      "engram": the fields of EngramConfig, "train": the fields of TrainConfig,
      "trained_tokens": int, the tokens that each run read; "corpus"/"tokens" is all that it could have read,
      "table": {"rows", "width", "dtype", "bytes"}, "fusion_parameters": int,
      "reading": what the memory's lookups cost, as `ReadStats.summary` says it,
      "runs": {"plain": RUN, "engram": RUN, "random_rows": RUN (optional), "shuffled": RUN (optional)},
      "step_times": how long a step of "engram" takes as against "plain", measured in turns, and
      "equal_time": both runs after equal training time, or None, as sense_v2.hf.experiments.step_times gives them,
      "controls": {"random_rows": kept, "shuffled": kept}: share of the loss gain that a control keeps; may be empty,
      "changed": {"tokens": [str, ...], "gains": [float or None, ...]}, of held-out text: the loss of each token in
                 the plain model minus that in the memory model; may be empty,
      "gates": [{"layer", "tokens": [str, ...], "gates": [float, ...]}]: may be empty,
      "rows_touched": [{"layer", "order", "head", "rows", "touched"}]: may be empty,
      "generations": [{"prompt", "plain", "engram"}]: may be empty; a text may repeat its prompt,
      "machine": {"cpu", "cores", "memory_bytes", "python", "torch"}, "seconds": of everything together
    }

    RUN = {
      "label": str, "description": str (optional, what a control takes away),
      "steps": [int], "train_loss": [float], "seconds": [float], training seconds up to and with that step,
      "evals": [{"step", "loss", "perplexity"}], on held-out text, the last one at the end,
      "loss", "perplexity", "bits_per_byte": at the end, on held-out text
    }

The runs follow each other, and the speed of a machine drifts, so no page compares their seconds.

Losses are nats a token. A measured number may be NaN, infinite or None (what JSON has for both): the report says that
it isn't finite and goes on.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sense_v2.core.errors import with_way_out
from sense_v2.report import page, verdict, wording
from sense_v2.report.coloured_text import Token, gain_text, gate_scale, layer_text

REQUIRED = (
    *("title", "created", "corpus", "compression", "demo_compression", "model", "engram", "table"),
    *(
        "fusion_parameters",
        "reading",
        "train",
        "trained_tokens",
        "runs",
        "step_times",
        "equal_time",
        "controls",
        "changed",
        "gates",
    ),
    *("rows_touched", "generations", "machine", "seconds"),
)


def write_report(results: dict[str, Any], path: str | Path) -> None:
    """Write the HTML report, making its folder. Raises `ValueError` when `results` lacks a part."""
    from sense_v2.report import plots  # matplotlib takes a second to import, which terminal_table needn't wait for

    _check(results)
    runs = results["runs"]
    page.write(
        path,
        "training.html",
        results=results,
        runs=runs,
        names=_names(results),
        verdict=verdict,
        panels=plots.loss_panels(results),
        window=plots.smoothing_window(len(runs["engram"]["steps"])),
        step_bars=step_bars(results),
        control_bars=control_bars(results),
        changed=changed_text(**results["changed"]),
        gate_scale=gate_scale(),
        gate_layers=gate_layers(results["gates"]),
        columns=head_columns(results["rows_touched"]),
    )


def write_picture(results: dict[str, Any], path: str | Path) -> None:
    """Draw validation perplexity over steps, all runs, as a PNG. Raises `ValueError` for incomplete `results`."""
    from sense_v2.report import plots

    _check(results)
    plots.write_picture(results, path)


def terminal_table(results: dict[str, Any]) -> str:
    """Return the runs as a text table of at most 80 columns, and under it what they show.

    Raises `ValueError` when `results` lacks a part.
    """
    _check(results)
    rows = [("run", "perplexity", "change", "loss", "bits/byte", "training")]
    for name in _names(results):
        run = results["runs"][name]
        label = textwrap.shorten(run["label"], 28, placeholder="…")
        change = verdict.against_plain(results, name)
        losses = wording.decimals(run["loss"]), wording.decimals(run["bits_per_byte"])
        rows.append(
            (label, wording.perplexity(run["perplexity"]), change, *losses, wording.duration(run["seconds"][-1]))
        )
    sentences = [
        verdict.headline(results),
        f"{verdict.steps(results)} {verdict.equal_time(results)}",
        verdict.controls(results),
        *verdict.curiosities(results),
    ]
    return wording.terminal_text(rows, sentences)


def changed_text(tokens: list[str], gains: list[float | None]) -> Markup | None:
    """Held-out text, coloured by how much better the memory model expects each token; None where there is none."""
    if not tokens:
        return None
    return gain_text(
        [
            Token(
                text, (), [("gain", f"{wording.signed(gain, 3)} nats")] if wording.is_finite(gain) else (), (), gain
            )
            for text, gain in zip(tokens, gains, strict=True)
        ]
    )


def gate_layers(gates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each layer with its coloured text, its mean and where it is widest."""
    for layer in gates:
        if len(layer["tokens"]) != len(layer["gates"]):
            raise ValueError(
                f"gates of layer {layer['layer']}: {len(layer['tokens'])} tokens and {len(layer['gates'])} gates"
            )
    layers = []
    for layer in gates:
        pairs = list(zip(layer["tokens"], layer["gates"], strict=True))
        text = layer_text([Token(token, [gate]) for token, gate in pairs], 0)
        widest = sorted(
            ((gate, token) for token, gate in pairs if wording.is_finite(gate)), key=lambda pair: -pair[0]
        )
        own = [gate for gate, _ in widest]
        summary = {"low": own[-1], "high": own[0], "mean": sum(own) / len(own)} if own else {}
        layers.append({"layer": layer["layer"], "text": text, "widest": widest[:3], **summary})
    return layers


def step_bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the step times that were measured in turns, and their places in percent of the longest."""
    times = results["step_times"]["seconds"]
    longest = max((t for own in times.values() for t in own.values() if wording.is_finite(t)), default=0) or 1
    bars = []
    for name, own in times.items():
        label = results["runs"][name]["label"]
        bar = {"name": name, "label": label, **own, "drawn": all(map(wording.is_finite, own.values()))}
        if bar["drawn"]:
            left, middle, right = (round(100 * own[key] / longest, 2) for key in ("low", "median", "high"))
            bar |= {"left": left, "middle": middle, "width": round(right - left, 2)}
        bars.append(bar)
    return bars


def control_bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What each control keeps of the gain, beside the memory model's 100 %; empty where nothing was gained."""
    runs, kept = results["runs"], {"engram": 1.0}
    kept.update({name: results["controls"].get(name, math.nan) for name in verdict.CONTROLS if name in runs})
    if len(kept) == 1 or verdict.outcome(results) != "better":
        return []
    longest = max(share for share in kept.values() if wording.is_finite(share))
    return [
        {
            "name": name,
            "label": runs[name]["label"],
            "kept": share,
            "drawn": wording.is_finite(share),
            "width": round(100 * max(share, 0) / longest, 2) if wording.is_finite(share) else 0,
        }
        for name, share in kept.items()
    ]


def head_columns(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The heads by layer and n-gram order, each with the share of its rows that training reached."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for head in sorted(heads, key=lambda head: (head["layer"], head["order"], head["head"])):
        share = head["touched"] / head["rows"]
        groups.setdefault((head["layer"], head["order"]), []).append(
            {**head, "share": share, "height": round(100 * share, 1)}
        )
    return [{"layer": layer, "order": order, "heads": own} for (layer, order), own in groups.items()]


def _names(results: dict[str, Any]) -> list[str]:
    return [name for name in verdict.RUNS if name in results["runs"]]


def _check(results: dict[str, Any]) -> None:
    missing = [key for key in REQUIRED if key not in results]
    if missing:
        raise with_way_out(ValueError(f"the results lack {', '.join(missing)}"), f"{__name__} says what they hold")
    runs = results["runs"]
    missing = [name for name in ("plain", "engram") if name not in runs]
    unknown = [name for name in runs if name not in verdict.RUNS]
    if missing or unknown:
        raise with_way_out(
            ValueError(f"results['runs'] holds {', '.join(runs) or 'nothing'}"),
            f"allowed are {', '.join(verdict.RUNS)}, and the first two must be there",
        )
    for name, run in runs.items():
        lengths = {key: len(run[key]) for key in ("steps", "train_loss", "seconds")}
        if len(set(lengths.values())) > 1 or not run["steps"]:
            raise ValueError(f"results['runs'][{name!r}]: lists of one length, at least 1, are needed, not {lengths}")
