"""Step times of several models, measured in blocks of steps that take turns.

The speed of a machine drifts: other work, heat, a virtual machine's neighbours. Times of runs that follow each other
therefore don't compare. Here a round runs a block of steps of each model and then the same blocks in reverse order,
so that a steady drift within the round cancels, and only times of one round are divided by each other.

The ratio of two models is the median over the rounds. Its interval comes from the order of the rounds' ratios alone
(the sign test), so it needs no assumption about the noise and no random numbers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
"""Of the interval of a ratio."""
TOO_WIDE = 0.2
"""A ratio whose interval reaches further than this share of it, up or down, is not told."""


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    block_steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run steps of each model in blocks that take turns, and time them.

    One more round comes first and doesn't count; it warms up caches and optimizers.

    Args:
        steps: What takes one training step of each model, by name.
        rounds: Rounds that count. In each, every model has two blocks.
        block_steps: Steps a block.
        clock: Returns seconds.

    Returns:
        Seconds a step by name: one number a round, the mean of its two blocks' medians.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        blocks: dict[str, list[float]] = {name: [] for name in steps}
        for name in [*steps, *reversed(list(steps))]:
            times = []
            for _ in range(block_steps):
                started = clock()
                steps[name]()
                times.append(clock() - started)
            blocks[name].append(statistics.median(times))
        if number:
            for name, medians in blocks.items():
                seconds[name].append(statistics.fmean(medians))
    return seconds


def compare(seconds: Mapping[str, Sequence[float]], *, base: str, other: str) -> dict[str, Any]:
    """Compare the step times of two models that took turns.

    Args:
        seconds: Seconds a step by name, one number a round, as `take_turns` returns them.
        base: The model that `other` is divided by.
        other: The model to compare.

    Returns:
        What JSON can hold: `ratio` (the median over the rounds), `low` and `high` (its interval), `rounds`, and
        `seconds`, by name the `spread` of the rounds.

    Raises:
        ValueError: Fewer than six rounds, which have no interval.
    """
    ratios = [mine / theirs for mine, theirs in zip(seconds[other], seconds[base], strict=True)]
    low, high = median_interval(ratios)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "rounds": len(ratios),
        "seconds": {name: spread(seconds[name]) for name in (base, other)},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and, as `low` and `high`, the 10th and 90th percentile.

    >>> spread([1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 1.2, 'high': 2.8}
    """
    low, high = (float(np.quantile(values, quantile)) for quantile in (0.1, 0.9))
    return {"median": float(statistics.median(values)), "low": low, "high": high}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Bound the median of what `values` are drawn from, by order statistics.

    Raises `ValueError` for fewer than six values, whose extremes hold the median less often than `CONFIDENCE`.

    >>> median_interval([5, 1, 4, 2, 3, 6]), median_interval(range(1, 13))
    ((1, 6), (3, 10))
    """
    num_values, missed, skipped = len(values), 0.0, -1
    while True:
        missed += 2 * math.comb(num_values, skipped + 1) / 2**num_values
        if missed > 1 - CONFIDENCE:
            break
        skipped += 1
    if skipped < 0:
        raise ValueError(f"{num_values} values have no {CONFIDENCE:.0%} interval of their median; six are needed")
    ordered = sorted(values)
    return ordered[skipped], ordered[-1 - skipped]


def is_clear(times: Mapping[str, Any]) -> bool:
    """Return True if the ratio of `compare` is known well enough to be told.

    >>> is_clear({"ratio": 1.3, "low": 1.2, "high": 1.5}), is_clear({"ratio": 1.3, "low": 0.9, "high": 1.5})
    (True, False)
    >>> is_clear({"ratio": 1.3, "low": None, "high": float("nan")})
    False
    """
    ratio, low, high = (math.nan if times[name] is None else times[name] for name in ("ratio", "low", "high"))
    return (1 - TOO_WIDE) * ratio <= low <= high <= (1 + TOO_WIDE) * ratio


def at_equal_time(
    base: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], times: Mapping[str, Any]
) -> dict[str, float] | None:
    """Compare two runs of equally many steps at the moment when the one with the shorter steps ends.

    Both losses are read off the runs' evaluations by steps, never by the runs' own clocks: one step of `other` lasts
    as long as `times["ratio"]` steps of `base`.

    Args:
        base: Evaluations in order, with `step` and `loss` (nats a token).
        other: Those of the other run.
        times: What `compare` returned.

    Returns:
        `base_steps`, `other_steps`, `base` and `other` (the perplexities), `ratio` (of `other` to `base`), and `low`
        and `high`, that ratio at the ends of the interval of the step times. None where the step times aren't clear
        or where the moment comes before a run's first evaluation.
    """
    if not is_clear(times):
        return None

    def compared(ratio: float) -> dict[str, float] | None:
        last = base[-1]["step"]
        base_steps, other_steps = min(last, last * ratio), min(last, last / ratio)
        found = {"base_steps": base_steps, "other_steps": other_steps}
        for name, evals, step in (("base", base, base_steps), ("other", other, other_steps)):
            if step < evals[0]["step"]:
                return None
            losses = [one["loss"] for one in evals]
            found[name] = math.exp(np.interp(step, [one["step"] for one in evals], losses))
        return {**found, "ratio": found["other"] / found["base"]}

    middle, *ends = (compared(times[name]) for name in ("ratio", "low", "high"))
    if middle is None or None in ends:
        return None
    spread = [end["ratio"] for end in ends if end is not None]
    return {**middle, "low": min(spread), "high": max(spread)}
