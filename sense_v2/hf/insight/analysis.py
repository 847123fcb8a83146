"""What was observed of a memory -> the numbers that a report shows; each function makes one part of it, for JSON.

    Observation (observation.py), Ngrams (upkeep/ngram_usage.py), RowLengths (upkeep/row_lengths.py) ──▶ dictionaries

Nothing here runs a model or opens a file. A loss belongs to the position that predicts, t, and to the token that is
predicted, t + 1: gates, n-grams and their counts are those of t, where the memory is looked up; the token named is
that of t + 1. Gain is the loss without memory less that with it: positive where the memory helps.

L layers with memory, O n-gram orders, B blocks, T tokens of a block, H rows a position, U distinct n-grams of an
order, R rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.upkeep.ngram_usage import Ngrams, head_usage, ngrams_per_row
from sense_v2.engram.upkeep.row_lengths import RowLengths
from sense_v2.hf.data.token_texts import CLASSES, Words
from sense_v2.hf.insight.ablation import paired_bootstrap
from sense_v2.hf.insight.observation import Observation

FREQUENCIES = (0, 1, 2, 4, 8, 16, 64, 256)
"""Where the groups of n-grams begin: never counted, once, 2 to 3, …"""
POSITIONS = 48
"""Points of a curve over the positions of a block."""
HISTOGRAM_BINS = 25
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HOT_SHARES = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of the table's rows: the hot sets whose coverage is given."""
CONTEXT_TOKENS = 12
SCATTERED = 1000
"""Tokens whose losses are given one by one, evenly spaced over the text."""
RESAMPLES = 1000


def gates(seen: Observation, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Of each layer: mean, quantiles, a histogram over 0 to 1, and the mean by position."""
    num_positions = seen.gates_LBT.shape[2]
    edges = np.unique(np.linspace(0, num_positions, min(POSITIONS, num_positions) + 1).astype(int))
    found = []
    for layer, gates_BT in zip(layers, seen.gates_LBT, strict=True):
        counts, _ = np.histogram(gates_BT, bins=HISTOGRAM_BINS, range=(0, 1))
        found.append(
            {
                "layer": layer,
                "mean": float(gates_BT.mean()),
                "quantiles": _quantiles(gates_BT.ravel()),
                "histogram": counts.tolist(),
                "by_position": [
                    {"from": int(low), "to": int(high) - 1, "gate": float(gates_BT[:, low:high].mean())}
                    for low, high in itertools.pairwise(edges)
                ],
            }
        )
    return found


def token_classes(seen: Observation, words: Words) -> list[dict[str, Any]]:
    """Of each class of tokens that is there: how many, each layer's mean gate at them, and the mean gain where they
    are the token to predict."""
    classes_BT = words.classes(seen.token_ids_BT)
    gain_BT = _gain(seen)
    found = []
    for number, name in enumerate(CLASSES):
        is_it_BT = classes_BT == number
        is_predicted_BT = is_it_BT[:, 1:]
        if not is_it_BT.any():
            continue
        found.append(
            {
                "class": name,
                "tokens": int(is_it_BT.sum()),
                "gates": [float(gates_BT[is_it_BT].mean()) for gates_BT in seen.gates_LBT],
                "gain": float(gain_BT[is_predicted_BT].mean()) if is_predicted_BT.any() else math.nan,
            }
        )
    return found


def coloured_text(
    seen: Observation,
    ngrams: Sequence[Ngrams],
    rows_LO: Sequence[Sequence[np.ndarray[Any, Any]]],
    layers: Sequence[int],
    words: Words,
    *,
    num_tokens: int,
    block: int = 0,
) -> dict[str, Any]:
    """The first tokens of a block, with all that is known of each.

    `rows_LO` has the rows [U, heads] of each order's n-grams in each layer. "others" says of each row how many other
    n-grams of the counted text have it.
    """
    shown = min(num_tokens, seen.token_ids_BT.shape[1])
    heads = rows_LO[0][0].shape[1]
    others_LO = [
        [
            np.stack([ngrams_per_row(rows_UH[:, head], own.counted_U) for head in range(heads)], axis=1)
            - (own.counted_U > 0)[:, None]
            for rows_UH, own in zip(rows_O, ngrams, strict=True)
        ]
        for rows_O in rows_LO
    ]
    tokens = []
    for at in range(shown):
        per_layer = []
        for number in range(len(layers)):
            per_order = []
            for place, own in enumerate(ngrams):
                which = int(own.numbers[0][block, at])
                slots = slice(place * heads, (place + 1) * heads)
                per_order.append(
                    {
                        "order": own.order,
                        "text": words.text(seen.token_ids_BT[block, max(0, at + 1 - own.order) : at + 1]),
                        "counted": int(own.counted_U[which]),
                        "rows": seen.row_ids_LBTH[number, block, at, slots].tolist(),
                        "norms": [float(norm) for norm in seen.row_norms_LBTH[number, block, at, slots]],
                        "others": others_LO[number][place][which].tolist(),
                        "share": float(seen.shares_LOBT[number, place, block, at]),
                    }
                )
            per_layer.append(per_order)
        token_id = int(seen.token_ids_BT[block, at])
        tokens.append(
            {
                "text": words.of(token_id),
                "token_id": token_id,
                "compressed_id": int(seen.compressed_ids_BT[block, at]),
                "gates": [float(gates_BT[block, at]) for gates_BT in seen.gates_LBT],
                # Of this very token, which the position before predicts.
                "loss_with": float(seen.losses_with_BT[block, at - 1]) if at else None,
                "loss_without": float(seen.losses_without_BT[block, at - 1]) if at else None,
                "layers": per_layer,
            }
        )
    return {"layers": list(layers), "block": block, "tokens": tokens}


def leaned_on(
    seen: Observation,
    ngrams: Sequence[Ngrams],
    layers: Sequence[int],
    words: Words,
    *,
    count: int = 12,
    least_times: int = 3,
) -> list[dict[str, Any]]:
    """Of each layer and order, the n-grams whose rows add most: by the mean share of the hidden state's length, of
    those that the analysed text has at least `least_times` times (once, where none is so frequent)."""
    gain_BT = np.pad(_gain(seen), ((0, 0), (0, 1)), constant_values=np.nan)
    found = []
    for number, layer in enumerate(layers):
        for place, own in enumerate(ngrams):
            numbers_P = own.numbers[0].ravel()
            times_U = own.analysed_U
            mean_U = _means(seen.shares_LOBT[number, place].ravel(), numbers_P, times_U)
            gate_U = _means(seen.gates_LBT[number].ravel(), numbers_P, times_U)
            enough_U = times_U >= min(least_times, int(times_U.max(initial=0)))
            ranked = np.argsort(-np.where(enough_U, mean_U, -1), kind="stable")[:count]
            entries = []
            for which in ranked[enough_U[ranked]]:
                places_P = np.flatnonzero(numbers_P == which)
                block, at = divmod(int(places_P[0]), seen.token_ids_BT.shape[1])
                gains = gain_BT.ravel()[places_P]
                gains = gains[np.isfinite(gains)]
                entries.append(
                    {
                        "text": words.text(seen.token_ids_BT[block, max(0, at + 1 - own.order) : at + 1]),
                        "times": int(times_U[which]),
                        "counted": int(own.counted_U[which]),
                        "gate": float(gate_U[which]),
                        "share": float(mean_U[which]),
                        "gain": float(gains.mean()) if len(gains) else math.nan,
                    }
                )
            found.append({"layer": layer, "order": own.order, "least_times": least_times, "ngrams": entries})
    return found


def by_frequency(seen: Observation, ngrams: Sequence[Ngrams]) -> list[dict[str, Any]]:
    """Of each order, tokens grouped by how often the n-gram that predicts them is in the counted text: how many, the
    mean losses, the mean gain and its 95 % interval over the blocks, and the group's part of all that is gained."""
    gain_BT = _gain(seen)
    total = float(gain_BT.sum())
    found = []
    for own in ngrams:
        counts_BT = own.counted_U[own.numbers[0][:, :-1]]
        for low, high in zip(FREQUENCIES, [*FREQUENCIES[1:], None], strict=True):
            group_BT = (counts_BT >= low) & (counts_BT < (high if high is not None else np.inf))
            if not group_BT.any():
                continue
            found.append(
                {
                    "order": own.order,
                    "low": low,
                    "high": None if high is None else high - 1,
                    "tokens": int(group_BT.sum()),
                    "loss_with": float(seen.losses_with_BT[group_BT].mean()),
                    "loss_without": float(seen.losses_without_BT[group_BT].mean()),
                    "gain": float(gain_BT[group_BT].mean()),
                    "interval": mean_interval(gain_BT, group_BT),
                    "part": float(gain_BT[group_BT].sum()) / total if total else math.nan,
                }
            )
    return found


def extreme_tokens(
    seen: Observation, ngrams: Sequence[Ngrams], words: Words, *, count: int = 20, harm: bool = False
) -> list[dict[str, Any]]:
    """The tokens that gain most from the memory, or with `harm` lose most; one entry for a token behind the same
    longest n-gram."""
    gain_BT = _gain(seen)
    longest = ngrams[-1]
    order_P = np.argsort(gain_BT.ravel() if harm else -gain_BT.ravel(), kind="stable")
    found: list[dict[str, Any]] = []
    known = set()
    for flat in order_P:
        block, at = divmod(int(flat), gain_BT.shape[1])
        gain = float(gain_BT[block, at])
        if len(found) == count or not (gain < 0 if harm else gain > 0):
            break
        token_id = int(seen.token_ids_BT[block, at + 1])
        key = int(longest.numbers[0][block, at]), token_id
        if key in known:
            continue
        known.add(key)
        found.append(
            {
                "context": words.text(seen.token_ids_BT[block, max(0, at + 1 - CONTEXT_TOKENS) : at + 1]),
                "token": words.of(token_id),
                "loss_with": float(seen.losses_with_BT[block, at]),
                "loss_without": float(seen.losses_without_BT[block, at]),
                "gain": gain,
                "gates": [float(gates_BT[block, at]) for gates_BT in seen.gates_LBT],
                "counted": [int(own.counted_U[own.numbers[0][block, at]]) for own in ngrams],
                "block": block,
                "position": at + 1,
            }
        )
    return found


def scattered(seen: Observation) -> dict[str, list[float]]:
    """The losses of some tokens, one by one: "with" the memory and "without"."""
    number = seen.losses_with_BT.size
    shown = np.unique(np.linspace(0, number - 1, min(SCATTERED, number)).round().astype(int))
    return {
        name: [round(float(loss), 3) for loss in losses_BT.ravel()[shown]]
        for name, losses_BT in (("with", seen.losses_with_BT), ("without", seen.losses_without_BT))
    }


def gain_spread(seen: Observation) -> dict[str, Any]:
    """How the gain is spread over tokens: shares that gain or lose more than a tenth of a nat, and quantiles."""
    gain_P = _gain(seen).ravel()
    return {
        "mean": float(gain_P.mean()),
        "helped": float((gain_P > 0.1).mean()),
        "harmed": float((gain_P < -0.1).mean()),
        "quantiles": _quantiles(gain_P),
    }


def heads(
    ngrams: Sequence[Ngrams],
    rows_LO: Sequence[Sequence[np.ndarray[Any, Any]]],
    layout: HeadLayout,
    lengths: RowLengths,
) -> list[dict[str, Any]]:
    """The usage of each head (`ngram_usage.head_usage`), and of its measured rows the share that never
    moved, None where that isn't known."""
    found = []
    for number, (layer, rows_O) in enumerate(zip(layout.layer_ids, rows_LO, strict=True)):
        for place, (own, rows_UH) in enumerate(zip(ngrams, rows_O, strict=True)):
            for head in range(rows_UH.shape[1]):
                slot = place * layout.num_heads + head
                first, num_rows = layout.offsets_LH[number][slot], layout.primes_LH[number][slot]
                moved = _between(lengths, first, first + num_rows)
                unmoved = None
                if lengths.drifts is not None and moved.stop > moved.start:
                    unmoved = float((lengths.drifts[moved] == 0).mean())
                found.append(
                    {
                        "layer": layer,
                        "order": own.order,
                        "head": head,
                        **head_usage(rows_UH[:, head], own, num_rows),
                        "unmoved": unmoved,
                    }
                )
    return found


def row_counts(
    ngrams: Sequence[Ngrams], rows_LO: Sequence[Sequence[np.ndarray[Any, Any]]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(ids_R ascending, lookups by the counted text, lookups by the analysed one), of rows that either uses."""
    ids, counted, analysed = [], [], []
    for rows_O in rows_LO:
        for own, rows_UH in zip(ngrams, rows_O, strict=True):
            for row_ids_U in rows_UH.T:
                ids_R, inverse_U = np.unique(row_ids_U, return_inverse=True)
                ids.append(ids_R)
                counted.append(np.bincount(inverse_U, weights=own.counted_U).astype(np.int64))
                analysed.append(np.bincount(inverse_U, weights=own.analysed_U).astype(np.int64))
    # Heads own ranges of rows, so no row comes twice; they stand in the order of their ranges.
    order = np.argsort(joined := np.concatenate(ids), kind="stable")
    return joined[order], np.concatenate(counted)[order], np.concatenate(analysed)[order]


def hot_sets(
    counted_R: np.ndarray[Any, Any], analysed_R: np.ndarray[Any, Any], num_rows: int
) -> list[dict[str, Any]]:
    """Of the hottest rows by the counted text: what share of the table they are, and what share of the analysed
    text's lookups they serve. A set larger than all rows that were counted is all of them."""
    hottest = np.argsort(-counted_R, kind="stable")[: int((counted_R > 0).sum())]
    served_R = np.cumsum(analysed_R[hottest])
    total = int(analysed_R.sum())
    found = []
    for share in HOT_SHARES:
        rows = min(math.ceil(share * num_rows), len(hottest))
        serves = float(served_R[rows - 1]) / total if rows and total else math.nan
        found.append({"share": share, "rows": rows, "serves": serves})
    return found


def zipf(ngrams: Sequence[Ngrams], *, points: int = 40) -> list[dict[str, Any]]:
    """Of each order: how often the n-gram of each rank is in the counted text, at ranks evenly spread on a log
    scale."""
    found = []
    for own in ngrams:
        counts = np.sort(own.counted_U[own.counted_U > 0])[::-1]
        if len(counts):
            ranks = np.unique(np.geomspace(1, len(counts), points).round().astype(int))
            found.append({"order": own.order, "ranks": ranks.tolist(), "counts": counts[ranks - 1].tolist()})
    return found


def rows(
    lengths: RowLengths, layout: HeadLayout, ids_R: np.ndarray[Any, Any], counted_R: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Lengths and drifts of the measured rows by layer and order, as histograms, and by how often the counted text
    looks a row up."""
    counts_M = np.zeros(len(lengths.row_ids), dtype=np.int64)
    where = np.searchsorted(ids_R, lengths.row_ids)
    known = where < len(ids_R)
    known[known] = ids_R[where[known]] == lengths.row_ids[known]
    counts_M[known] = counted_R[where[known]]
    in_heads = np.zeros(len(lengths.row_ids), dtype=np.bool_)
    groups = []
    for number, layer in enumerate(layout.layer_ids):
        for place, order in enumerate(layout.ngram_orders):
            slots = slice(place * layout.num_heads, (place + 1) * layout.num_heads)
            first = min(layout.offsets_LH[number][slots])
            # An order's heads lie next to each other.
            part = _between(lengths, first, first + sum(layout.primes_LH[number][slots]))
            in_heads[part] = True
            groups.append({"layer": layer, "order": order, **_lengths(lengths, part)})
    by_lookups = []
    for low, high in zip(FREQUENCIES, [*FREQUENCIES[1:], None], strict=True):
        group = in_heads & (counts_M >= low) & (counts_M < (high if high is not None else np.inf))
        if group.any():
            by_lookups.append(
                {"low": low, "high": None if high is None else high - 1, **_lengths(lengths, np.flatnonzero(group))}
            )
    return {
        "table_rows": lengths.table_rows,
        "measured_rows": len(lengths.row_ids),
        "rows_of_no_head": int((~in_heads).sum()),
        "groups": groups,
        "by_lookups": by_lookups,
        "norm_histogram": _histogram(lengths.norms[in_heads]),
        "drift_histogram": None if lengths.drifts is None else _histogram(lengths.drifts[in_heads]),
    }


def _lengths(lengths: RowLengths, part: Any) -> dict[str, Any]:
    norms = lengths.norms[part]
    found: dict[str, Any] = {"rows": len(norms), "norm": _quantiles(norms), "drift": None, "unmoved": None}
    if lengths.drifts is not None and len(norms):
        drifts = lengths.drifts[part]
        found |= {"drift": _quantiles(drifts), "unmoved": float((drifts == 0).mean())}
    return found


def _between(lengths: RowLengths, first: int, end: int) -> slice:
    """The measured rows from `first` to before `end`."""
    return slice(*np.searchsorted(lengths.row_ids, [first, end]).tolist())


def _histogram(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    high = float(values.max(initial=0.0)) or 1.0
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS, range=(0, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def mean_interval(gain_BT: np.ndarray[Any, Any], group_BT: np.ndarray[Any, Any]) -> list[float]:
    """Of a group's mean gain, from draws of its blocks: the tokens of one text aren't independent."""
    tokens_B = group_BT.sum(axis=1)
    there = tokens_B > 0
    gains_B = (gain_BT * group_BT).sum(axis=1)[there] / tokens_B[there]
    return list(paired_bootstrap(gains_B, resamples=RESAMPLES, seed=0, weights_B=tokens_B[there]))


def _quantiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    found = np.quantile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), np.nan)
    return {f"{quantile:g}": float(value) for quantile, value in zip(QUANTILES, found, strict=True)}


def _means(
    values_P: np.ndarray[Any, Any], numbers_P: np.ndarray[Any, Any], times_U: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The mean of each n-gram's values; 0 where it isn't there."""
    sums_U = np.bincount(numbers_P, weights=values_P, minlength=len(times_U))
    means: np.ndarray[Any, Any] = sums_U / np.maximum(times_U, 1)
    return means


def _gain(seen: Observation) -> np.ndarray[Any, Any]:
    return seen.losses_without_BT - seen.losses_with_BT
