"""A model with memory -> what each part of the memory is worth on a text.

    blocks of tokens ──ablations──▶ the model with one thing changed, each ──token_losses──▶ loss of each block
                     ──paired_bootstrap──▶ change of the mean loss, and the interval it lies in

Every block is its own control: what is resampled are the differences of the same blocks with and without the change,
so that easy and hard texts don't widen the interval. The model and its table are afterwards what they were
(`sense_v2.hf.insight.interventions`); nothing here trains.

What an ablation of a trained model says is what this model does without a part, not what one would do that was
trained without it.

L layers with memory, B blocks, T tokens of a block, R resamples, H rows a position, U unique rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sense_v2.hf.insight.evaluation import token_losses
from sense_v2.hf.insight.interventions import (
    gate_forced,
    heads_off,
    memory_off,
    one_row_per_head,
    rows_of_noise,
    rows_shuffled,
)
from sense_v2.hf.memory import EngramMemory, memory_of

CONFIDENCE = 0.95
# Rows whose deviation is computed at a time.
GATHERED_ROWS = 1 << 16


@dataclass(frozen=True)
class Ablation:
    """One thing that is changed."""

    name: str
    group: str
    """memory, rows, gate, layer, order or head."""
    change: Callable[[], AbstractContextManager[None]]
    layer: int | None = None
    order: int | None = None
    head: int | None = None
    """Among its order's, from 0."""


def ablations(
    memory: EngramMemory, token_ids_BT: torch.Tensor, *, seed: int = 0, single_heads: bool = True
) -> list[Ablation]:
    """Make all of them for a text: the rows that it looks up say which is the only row at capacity one, and how large
    noise is. Single layers are left out if there is one, single orders likewise."""
    row_ids_LPH = looked_up(memory, token_ids_BT)
    hottest_LH, std_LH = most_looked_up(row_ids_LPH), deviations(memory, row_ids_LPH)
    found = [
        Ablation("memory_off", "memory", lambda: memory_off(memory)),
        Ablation("rows_shuffled", "rows", lambda: rows_shuffled(memory, seed)),
        Ablation("capacity_one", "rows", lambda: one_row_per_head(memory, hottest_LH)),
        Ablation("random_table", "rows", lambda: rows_of_noise(memory, std_LH, seed)),
        Ablation("gate_shut", "gate", lambda: gate_forced(memory, 0.0)),
        Ablation("gate_open", "gate", lambda: gate_forced(memory, 1.0)),
    ]
    layers = [fusion.layer_id for fusion in memory]
    if len(layers) > 1:
        found += [
            Ablation(f"layer_{layer}_off", "layer", lambda layer=layer: memory_off(memory, [layer]), layer)  # type: ignore[misc]
            for layer in layers
        ]
    orders, num_heads = memory.config.ngram_orders, memory.config.num_heads

    def without(layer: int, heads: list[int]) -> Callable[[], AbstractContextManager[None]]:
        return lambda: heads_off(memory, layer, heads)

    for layer in layers:
        for place, order in enumerate(orders):
            heads, name = list(range(place * num_heads, (place + 1) * num_heads)), f"layer_{layer}_order_{order}"
            if len(orders) > 1:
                found.append(Ablation(f"{name}_off", "order", without(layer, heads), layer, order))
            found += [
                Ablation(f"{name}_head_{head}_off", "head", without(layer, [heads[head]]), layer, order, head)
                for head in range(num_heads if single_heads else 0)
            ]
    return found


def ablate(
    model: PreTrainedModel,
    token_ids_BT: torch.Tensor,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    single_heads: bool = True,
    batch_size: int = 8,
    advance: Callable[[int], Any] = lambda num_blocks: None,
) -> dict[str, Any]:
    """Compute the loss with the memory as it is, and with each ablation: one dictionary that JSON can hold.

        {"loss": float, "blocks": int, "tokens": int, "confidence": float, "resamples": int, "seed": int,
         "ablations": [{"name", "group", "layer", "order", "head",
                        "loss", "change": loss - that with memory, "low", "high": the change's interval,
                        "kept": share of what the memory gains that is left, or None where it gains nothing}]}

    Losses are nats a predicted token. `advance` is told of each block that was computed, `num_passes` times B in all.
    Raises as `evaluate`.
    """
    memory = memory_of(model)

    def losses() -> np.ndarray[Any, Any]:
        parts = []
        for part_BT in token_ids_BT.split(batch_size):
            parts.append(token_losses(model, part_BT, batch_size=batch_size).mean(dim=1).numpy())
            advance(len(part_BT))
        return np.concatenate(parts)

    with_memory_B = losses()
    found: list[dict[str, Any]] = []
    for ablation in ablations(memory, token_ids_BT, seed=seed, single_heads=single_heads):
        with ablation.change():
            changed_B = losses()
        # The same resamples for all, so that their intervals compare and don't depend on which others ran.
        low, high = paired_bootstrap(changed_B - with_memory_B, resamples=resamples, seed=seed)
        change = float((changed_B - with_memory_B).mean())
        what = {name: getattr(ablation, name) for name in ("name", "group", "layer", "order", "head")}
        found.append({**what, "loss": float(changed_B.mean()), "change": change, "low": low, "high": high})
    gain = found[0]["change"]
    for one in found:
        one["kept"] = 1 - one["change"] / gain if gain > 0 else None
    return {
        "loss": float(with_memory_B.mean()),
        "blocks": len(token_ids_BT),
        "tokens": len(token_ids_BT) * (token_ids_BT.shape[1] - 1),
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "seed": seed,
        "ablations": found,
    }


def num_passes(memory: EngramMemory, *, single_heads: bool = True) -> int:
    """Count how often `ablate` computes the text."""
    layers, orders = len(memory.layers), len(memory.config.ngram_orders)
    of_an_order = (orders > 1) + (memory.config.num_heads if single_heads else 0)
    return 1 + 6 + (layers if layers > 1 else 0) + layers * orders * of_an_order


def paired_bootstrap(
    differences_B: np.ndarray[Any, Any],
    *,
    resamples: int,
    seed: Any,
    confidence: float = CONFIDENCE,
    weights_B: np.ndarray[Any, Any] | None = None,
) -> tuple[float, float]:
    """The interval that holds the mean difference with that confidence: percentiles of the means of `resamples`
    draws of B blocks with replacement, each with its weight. nan where there is one block.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    num_blocks = len(differences_B)
    if num_blocks < 2:
        return float("nan"), float("nan")
    weights_B = np.ones(num_blocks) if weights_B is None else weights_B
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    # A few at a time: R × B numbers would be a gigabyte for long texts.
    step = max(1, (1 << 22) // num_blocks)
    for start in range(0, resamples, step):
        drawn = generator.integers(0, num_blocks, (min(step, resamples - start), num_blocks))
        weighed = (differences_B * weights_B)[drawn].sum(axis=1)
        means[start : start + step] = weighed / weights_B[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def looked_up(memory: EngramMemory, token_ids_BT: torch.Tensor) -> np.ndarray[Any, Any]:
    """int64 [L, B × T, H]: the rows of a text's blocks, each block on its own."""
    rows = [fusion.row_ids(token_ids_BT).flatten(0, 1).cpu().numpy() for fusion in memory]
    return np.stack(rows)


def most_looked_up(row_ids_LPH: np.ndarray[Any, Any]) -> torch.Tensor:
    """row_ids_LH: of each head the row that is looked up most, of equals the lowest."""
    hottest = []
    for row_ids_PH in row_ids_LPH:
        for row_ids_P in row_ids_PH.T:
            ids_U, counts_U = np.unique(row_ids_P, return_counts=True)
            hottest.append(int(ids_U[counts_U.argmax()]))
    return torch.tensor(hottest, dtype=torch.int64).view(row_ids_LPH.shape[0], row_ids_LPH.shape[2])


def deviations(memory: EngramMemory, row_ids_LPH: np.ndarray[Any, Any]) -> torch.Tensor:
    """float32 [L, H]: the root mean square of the values in each head's looked up rows, each row once."""
    found = []
    for row_ids_PH in row_ids_LPH:
        for row_ids_P in row_ids_PH.T:
            ids_U = torch.from_numpy(np.unique(row_ids_P))
            squares = sum(
                float(memory.storage.gather(part).double().square().sum()) for part in ids_U.split(GATHERED_ROWS)
            )
            found.append((squares / (len(ids_U) * memory.storage.embedding_dim)) ** 0.5)
    return torch.tensor(found, dtype=torch.float32).view(row_ids_LPH.shape[0], row_ids_LPH.shape[2])
