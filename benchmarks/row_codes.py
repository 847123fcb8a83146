"""What four bits a value cost a trained table: int4 against NF4's levels, fitted levels, and mixed types.

    sense-engram train --corpus TEXTS --output runs/train
    python benchmarks/row_codes.py runs/train

The rows that a lookup returns are replaced by what each code would have made of them, so that no table is written.
All codes of four bits have a float16 scale for each block; of a few scales the one with the least error is taken, and
each is fitted once to the codes that it gave, as the library's int4 does.

    RMS error      of the rows that training changed (a sample), of their RMS
    loss           nats a token on the model's held-out text, the difference to float32 rows
    KL             float32 rows ‖ this: less noisy than the loss, which a changed row makes better as often as worse

Mixed types: the rows that the training text looks up most in a wider type, the others int4, at the bytes of a
uniform type. Shares are of the rows that training changed: the others are zeros, which any type holds.

The last line is one JSON object. benchmarks/LOG.md keeps the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.engram.table.compact_rows import INT4_LEVELS, decode_rows, encode_rows
from sense_v2.hf.backbones import open_with_memory, token_stream
from sense_v2.hf.data.held_out import read_blocks
from sense_v2.hf.data.preparing import memory_hashers
from sense_v2.hf.insight.damage import log_probabilities
from sense_v2.hf.insight.evaluation import evaluating

# QLoRA (arXiv 2305.14314), appendix E.
NF4_LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
              1.0)  # fmt: skip
SAMPLE_ROWS = 100_000
Rows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(row ids [U], float32 rows [U, D]) -> the rows as they would come back."""


def four_bits(rows_UD: torch.Tensor, levels: tuple[float, ...], block: int, multiples: tuple[float, ...]) -> Any:
    """Rows through codes of 16 levels. The scales tried make a block's largest value each of `multiples` of the
    largest level."""
    levels_16 = np.array(levels, dtype=np.float32) / max(map(abs, levels))
    values_RV = rows_UD.numpy().reshape(-1, block)
    extreme_R1 = np.take_along_axis(values_RV, np.abs(values_RV).argmax(axis=1, keepdims=True), axis=1)
    borders = (levels_16[1:] + levels_16[:-1]) / 2
    best_R1 = np.full((len(values_RV), 1), np.inf, np.float32)
    found_RV = np.zeros_like(values_RV)
    with np.errstate(all="ignore"):
        for multiple in multiples:
            tried_R1 = (extreme_R1 / np.float32(multiple)).astype(np.float16).astype(np.float32)
            for _ in range(2):
                level_RV = levels_16[np.searchsorted(borders, np.nan_to_num(values_RV / tried_R1))]
                error_R1 = np.square(level_RV * tried_R1 - values_RV).sum(axis=1, keepdims=True)
                is_better_R1 = (error_R1 < best_R1) & (tried_R1 != 0)
                best_R1 = np.where(is_better_R1, error_R1, best_R1)
                found_RV = np.where(is_better_R1, level_RV * tried_R1, found_RV)
                fitted_R1 = (values_RV * level_RV).sum(axis=1, keepdims=True)
                fitted_R1 = fitted_R1 / np.square(level_RV).sum(axis=1, keepdims=True)
                tried_R1 = fitted_R1.astype(np.float16).astype(np.float32)
    return torch.from_numpy(found_RV.reshape(rows_UD.shape))


def fitted_levels(rows_UD: torch.Tensor, block: int, rounds: int = 30) -> tuple[float, ...]:
    """16 levels with the least error for these rows, each block's largest value at ±1 (Lloyd's algorithm)."""
    values_RV = rows_UD.numpy().reshape(-1, block)
    scaled = (values_RV / np.abs(values_RV).max(axis=1, keepdims=True).clip(1e-12)).reshape(-1)
    levels = np.quantile(scaled, (np.arange(16) + 0.5) / 16)
    for _ in range(rounds):
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)
        count = np.bincount(codes, minlength=16)
        levels = np.where(count > 0, np.bincount(codes, weights=scaled, minlength=16) / count.clip(1), levels)
    return tuple(float(level) for level in levels)


def through(dtype: str) -> Rows:
    """Rows of one of the library's own types."""
    if dtype == "bfloat16":
        return lambda ids_U, rows_UD: rows_UD.bfloat16().float()
    return lambda ids_U, rows_UD: decode_rows(encode_rows(rows_UD, dtype), rows_UD.shape[1], dtype)


def mixed(hot_N: np.ndarray, hot: Rows, cold: Rows) -> Rows:
    is_hot_N = torch.from_numpy(hot_N)
    return lambda ids_U, rows_UD: torch.where(is_hot_N[ids_U][:, None], hot(ids_U, rows_UD), cold(ids_U, rows_UD))


def make_ways(sample_UD: torch.Tensor, counts_N: np.ndarray, changed_N: np.ndarray) -> dict[str, tuple[float, Rows]]:
    """(bytes of a row, what becomes of rows) of each way."""
    width = sample_UD.shape[1]
    own = max(map(abs, INT4_LEVELS))
    iq4 = tuple(extreme / own for extreme in (-127.0, 113.0, -140.0, 125.0))
    either = (-1.0, 1.0, -1.1, 1.1)
    fitted = fitted_levels(sample_UD, 32)

    def codes(levels: tuple[float, ...], block: int, multiples: tuple[float, ...]) -> tuple[float, Rows]:
        bytes_of_row = width / 2 + 2 * width / block
        return bytes_of_row, lambda ids_U, rows_UD: four_bits(rows_UD, levels, block, multiples)

    ways = {
        "int4 (the library's)": (width / 2 + width / 16, through("int4")),
        "NF4's levels, scale from the largest value": codes(NF4_LEVELS, 32, (1.0,)),
        "NF4's levels, best of 4 scales": codes(NF4_LEVELS, 32, either),
        "levels fitted to this table, best of 4 scales": codes(fitted, 32, either),
        "int4's levels, blocks of 16": codes(INT4_LEVELS, 16, iq4),
        "NF4's levels, blocks of 16": codes(NF4_LEVELS, 16, either),
        "int8": (width + 4, through("int8")),
    }
    hottest = np.argsort(-np.where(changed_N, counts_N, -1), kind="stable")
    for wide, wide_bytes in (("bfloat16", 2 * width), ("int8", width + 4)):
        for uniform in ("int4's levels, blocks of 16", "int8"):
            budget, four = ways[uniform][0], ways["int4 (the library's)"]
            share = (budget - four[0]) / (wide_bytes - four[0])
            if 0 < share < 1:
                hot_N = np.zeros(len(changed_N), dtype=bool)
                hot_N[hottest[: round(share * changed_N.sum())]] = True
                name = f"{100 * share:.1f} % hottest {wide}, others int4"
                ways[name] = (budget, mixed(hot_N, through(wide), four[1]))
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model that sense-engram train wrote, with float32 rows")
    parser.add_argument("--sequences", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, memory = open_with_memory(arguments.folder, "measure", device="cpu")
    blocks = read_blocks(
        arguments.folder, model, tokenizer, corpus=None, sequences=arguments.sequences, sequence_length=None,
        all_files=False,
    )  # fmt: skip
    table = memory.storage
    changed_N = (table.weight != 0).any(dim=1).numpy()  # a table of the demo's kind starts at zero
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(changed_N))[:SAMPLE_ROWS]
    sample_U, sample_UD = torch.from_numpy(chosen), table.weight[torch.from_numpy(chosen)].clone()
    stream = torch.from_numpy(token_stream(blocks.corpus.train_texts, tokenizer).astype(np.int64))
    counts_N = np.zeros(len(changed_N), dtype=np.int64)
    for hasher in memory_hashers(memory.config, memory.tokenizer):
        for part in stream.split(1 << 16):
            ids, times = np.unique(hasher(memory.tokenizer(part[None])).numpy(), return_counts=True)
            counts_N[ids] += times
    ways = make_ways(sample_UD, counts_N, changed_N)

    def measure(way: Rows | None, told: list[torch.Tensor]) -> tuple[float, float, list[torch.Tensor]]:
        """(loss, KL from what `told` holds, log probabilities)."""
        hook = None
        if way is not None:
            rewrite = way

            def replace(module: Any, inputs: Any, rows: torch.Tensor) -> torch.Tensor:
                ids = inputs[0].reshape(-1)
                return rewrite(ids, rows.detach().reshape(len(ids), -1)).reshape(rows.shape)

            hook = table.register_forward_hook(replace)
        losses, divergence, found = [], [], []
        with evaluating(model), torch.no_grad():
            for number, block_BT in enumerate(blocks.token_ids_BT.split(8)):
                log_BTV = log_probabilities(model, block_BT)
                losses.append(-log_BTV[:, :-1].gather(-1, block_BT[:, 1:, None])[..., 0].double())
                if told:
                    before_BTV = told[number].float()
                    divergence.append((before_BTV.exp() * (before_BTV - log_BTV)).sum(-1).double())
                else:
                    found.append(log_BTV)
        if hook is not None:
            hook.remove()
        return float(torch.cat(losses).mean()), float(torch.cat(divergence).mean()) if told else 0.0, found

    loss, _, told = measure(None, [])
    tokens = blocks.token_ids_BT.numel()
    print(f"{blocks.line()}: {loss:.5f} nats with float32 rows")
    print(
        f"{int(changed_N.sum()):,} rows of {len(changed_N):,} changed in training, {sample_UD.shape[1]} values each"
    )
    print(f"{'':58} bytes    RMS error   loss         KL")
    results = []
    for name, (row_bytes, way) in ways.items():
        came_UD = way(sample_U, sample_UD)
        error = float((came_UD - sample_UD).square().mean().sqrt() / sample_UD.square().mean().sqrt())
        now, kl, _ = measure(way, told)
        print(f"{name:58} {row_bytes:5.1f}    {100 * error:6.3f} %    {now - loss:+.6f}    {kl:.3e}", flush=True)
        results.append({"way": name, "row_bytes": row_bytes, "rms_error": error, "loss_change": now - loss, "kl": kl})
    print(json.dumps({"benchmark": "row_codes", "loss": loss, "tokens": tokens, "results": results}))


if __name__ == "__main__":
    main()
