"""Sentences about a training run, made from the results that training.py describes.

The numbers choose and fill each sentence, so it reads right when the memory loses, when a run diverges and when the
controls were left out. "Level" means less than `wording.SAME` apart.
"""

from __future__ import annotations

from typing import Any

from sense_v2.hf.experiments.step_times import CONFIDENCE, is_clear
from sense_v2.report import wording
from sense_v2.report.wording import (
    SAME,
    change,
    count,
    decimals,
    duration,
    is_finite,
    listing,
    number_of,
    percent,
    perplexity,
    short,
    size,
    spare_rows,
)

CONTROLS = ("random_rows", "shuffled")
RUNS = ("plain", "engram", *CONTROLS)
"""The order in which every table, plot and sentence names the runs."""

MOST, LITTLE = 0.75, 0.25
"""Shares of the gain: a control that keeps more than MOST explains it, one below LITTLE doesn't."""


def outcome(results: dict[str, Any]) -> str:
    """Return better, worse, level or broken: the memory model's final perplexity against the plain model's."""
    return wording.outcome(*(results["runs"][name]["perplexity"] for name in ("engram", "plain")))


def headline(results: dict[str, Any]) -> str:
    """The answer to "did the memory help?" in one sentence or two."""
    plain, engram = (results["runs"][name]["perplexity"] for name in ("plain", "engram"))
    kind = outcome(results)
    if kind == "broken":
        models = (("memory", engram), ("plain", plain))
        bad = [name for name, value in models if not is_finite(value)]
        told = f"The {listing(bad)} model's" if len(bad) == 1 else f"The {listing(bad)} models'"
        other = "".join(
            f"The {name} model ended at {perplexity(value)}. " for name, value in models if name not in bad
        )
        return (
            f"{told} perplexity is not a finite number: training broke down. {other}"
            "This run does not say whether the memory helps."
        )
    if kind == "level":
        apart = abs(engram - plain) / plain
        distance = percent(apart) if apart >= 0.001 else f"less than {percent(0.001)}"
        return (
            "The memory model and the plain model end level: their perplexities, "
            f"{perplexity(engram)} and {perplexity(plain)}, are {distance} apart."
        )
    told = f"The memory model's perplexity is {change(engram, plain)}"
    if kind == "better":
        return f"{told}: {perplexity(engram)} instead of {perplexity(plain)}."
    return f"{told}: {perplexity(engram)} against {perplexity(plain)} without memory. Here the memory did not help."


def against_plain(results: dict[str, Any], name: str) -> str:
    """One run's perplexity against the plain run's, for a table cell."""
    plain, own = (results["runs"][run]["perplexity"] for run in ("plain", name))
    if name == "plain" or not (is_finite(plain) and is_finite(own)):
        return "–"
    return "the same" if own == plain else change(own, plain)


def steps(results: dict[str, Any]) -> str:
    """What a step costs, as measured in turns."""
    times = results["step_times"]
    if not all(is_finite(times[name]) for name in ("ratio", "low", "high")):
        return "The step times could not be compared."
    low, high = decimals(times["low"], 2), decimals(times["high"], 2)
    if not is_clear(times):
        return (
            "This machine's speed changed too much to say what a step costs: the memory model's step time, "
            f"divided by the plain model's, has a {percent(CONFIDENCE)} interval of {low} to {high}."
        )
    plain, engram = (times["seconds"][name]["median"] for name in ("plain", "engram"))
    found = f"({percent(CONFIDENCE)} interval {low} to {high}; median {duration(engram)} against {duration(plain)})"
    if times["low"] <= 1 <= times["high"]:
        return f"As far as this run can tell, a step of the memory model takes as long as a plain step {found}."
    return f"A step of the memory model takes {decimals(times['ratio'], 2)} times as long as a plain step {found}."


def equal_time(results: dict[str, Any]) -> str:
    """Both perplexities after equal training time, by the ratio of the step times."""
    found = results["equal_time"]
    if not found:
        return (
            "So no comparison at equal training time is made."
            if not is_clear(results["step_times"])
            else ("The models were not compared at equal training time.")
        )
    plain, engram = found["base"], found["other"]
    told = (
        f"At equal training time, {count(found['base_steps'])} plain steps and {count(found['other_steps'])} with "
        "memory, "
    )
    values = f"{perplexity(engram)} with memory and {perplexity(plain)} without"
    if not all(is_finite(found[name]) for name in ("base", "other", "ratio", "low", "high")):
        return f"{told}perplexity is {values}."
    if abs(found["ratio"] - 1) < SAME:
        return f"{told}the two are level: perplexity {values}."
    low, high = change(found["low"], 1), change(found["high"], 1)
    if found["low"] < 1 < found["high"]:
        return f"{told}this run doesn't tell which is better: perplexity {values}, somewhere from {low} to {high}."
    ends = "" if low == high else f" ({low} to {high} over that interval)"
    return (
        f"{told}the memory model's perplexity is {change(engram, plain)}{ends}: "
        f"{perplexity(engram)} against {perplexity(plain)}."
    )


def controls(results: dict[str, Any]) -> str:
    """What the controls say about where the gain comes from."""
    runs = results["runs"]
    present = [name for name in CONTROLS if name in runs]
    missing = [name.replace("_", " ") for name in CONTROLS if name not in runs]
    if not present:
        return (
            "This run left out the controls, so it does not tell whether a difference comes from what the rows "
            "hold or only from the weights that were added."
        )
    left_out = f" Left out of this run: {listing(missing)}." if missing else ""
    if outcome(results) != "better":
        told = {
            "worse": "There is no gain over the plain model",
            "level": "The two models end level, so there is no gain",
            "broken": "The gain is not a finite number, so there is nothing",
        }[outcome(results)]
        return f"{told} for the controls to keep. Their results are in the table above.{left_out}"
    kept = {name: results["controls"].get(name) for name in present}
    finite = {name: value for name, value in kept.items() if is_finite(value)}
    broken = [runs[name]["label"] for name in present if name not in finite]
    told = "".join(f"{_kept(runs[name]['label'], value)} " for name, value in finite.items())
    if broken:
        told += f"No share can be given for {listing(broken)}. "
    if finite:
        told += _meaning(finite, runs)
    return told.strip() + left_out


def _kept(label: str, fraction: float) -> str:
    if fraction <= 0:
        return f"“{label}” keeps nothing of the gain: it ends no better than the plain model."
    return f"“{label}” keeps {percent(fraction)} of the gain."


def _meaning(kept: dict[str, float], runs: dict[str, Any]) -> str:
    name, most = max(kept.items(), key=lambda item: item[1])
    label = runs[name]["label"]
    rest = percent(1 - max(most, 0))
    if most >= 1:
        return f"So what “{label}” takes away did not help here: without it the model is at least as good."
    if most > MOST:
        return (
            f"So most of the gain is there without what “{label}” takes away, which accounts for only {rest} of it."
        )
    if most < LITTLE:
        whole = "all" if most <= 0 else f"at least {rest}"
        return f"So nearly the whole gain, {whole} of it, comes from what the controls take away."
    return f"So {rest} of the gain comes from what “{label}” takes away; the rest is there without it."


def curiosities(results: dict[str, Any]) -> list[str]:
    """What a reader should know before trusting a number: losses that aren't finite."""
    told = []
    for name in RUNS:
        run = results["runs"].get(name)
        if run is None:
            continue
        evals = [(evaluation["step"], evaluation["loss"]) for evaluation in run["evals"]]
        training = list(zip(run["steps"], run["train_loss"], strict=True))
        for kind, losses in (("training", training), ("validation", evals)):
            bad = [step for step, loss in losses if not is_finite(loss)]
            if bad:
                told.append(
                    f"“{run['label']}”: {count(len(bad))} of {count(len(losses))} {kind} losses are not finite, "
                    f"the first at step {count(bad[0])}."
                )
    return told


def memory(results: dict[str, Any]) -> str:
    """How large the model is and what the memory adds to it."""
    model, table = results["model"], results["table"]
    asked = results["engram"]["table_size"]
    rounded = (
        f" (table_size asks for {count(asked)}; each head gets a prime number of rows.)"
        if asked != table["rows"]
        else ""
    )
    return (
        f"The plain model has {short(model['parameters'])} parameters. The memory model is the same with "
        f"{short(results['fusion_parameters'])} more parameters inside its layers and a table of "
        f"{count(table['rows'])} rows of {count(table['width'])} {table['dtype']} values, "
        f"{size(table['bytes'])} on disk.{rounded}"
    )


def trained_on(results: dict[str, Any]) -> str:
    """How much text each run read, which may be less than a corpus holds."""
    train, tokens = results["train"], results["trained_tokens"]
    share = tokens / results["corpus"]["tokens"]
    part = f"{percent(share)} of that text" if share < 1 else f"that text {decimals(share, 1)} times over"
    shape = f"{count(train['batch_size'])} × {count(train['sequence_length'])}"
    return f"{number_of(tokens, 'token')} in each run, {part}: {number_of(train['steps'], 'step')} of {shape}"


def rows_touched(results: dict[str, Any]) -> str:
    """How much of the table training reached, in all and by n-gram length."""
    heads = results["rows_touched"]
    rows, touched = (sum(head[key] for head in heads) for key in ("rows", "touched"))
    told = f"Training reached {count(touched)} of {count(rows)} rows, {percent(touched / rows)}"
    orders = sorted({head["order"] for head in heads})
    if len(orders) > 1:
        parts = []
        for order in orders:
            own = [head for head in heads if head["order"] == order]
            share = sum(head["touched"] for head in own) / sum(head["rows"] for head in own)
            parts.append(f"{percent(share)} of those for {order}-grams")
        told += f": {listing(parts)}"
    told += (
        f". A row that was never reached still holds what it began with.{spare_rows(results['table']['rows'], rows)}"
    )
    return told


def compression(part: dict[str, Any]) -> str:
    """How far a shadow map folds one tokenizer."""
    tokens, ids = part["tokens"], part["ids"]
    return f"{number_of(tokens, 'token')} fold into {count(ids)} compressed ids, {percent(1 - ids / tokens)} fewer."


def seeds(results: dict[str, Any]) -> str:
    """How often each run was made, which is what a small difference has to be held against."""
    return f"Each run was made once, from seed {results['train']['seed']}; the spread over seeds was not measured."
