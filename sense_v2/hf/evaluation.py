"""A trained model -> numbers: loss, perplexity, bits per byte on held-out text, gates, rows touched.

B batch, T sequence, S residual streams, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sense_v2.hf.attach import memory_of


@dataclass
class Evaluation:
    """Means over the predicted tokens (each sequence's first is not predicted)."""

    loss: float
    """Nats a token."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the predicted tokens."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss per byte of text: comparable between tokenizers, as perplexity isn't."""
        return self.loss * self.tokens / math.log(2) / max(self.text_bytes, 1)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients; afterwards the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: PreTrainedModel, token_ids_BT: torch.Tensor, *, tokenizer: Any = None, batch_size: int = 8
) -> Evaluation:
    """The model's loss on blocks of tokens, each block on its own. `tokenizer` (anything with `decode`) counts the
    bytes; without one `text_bytes` is 0."""
    total, count, text_bytes = 0.0, 0, 0
    with evaluating(model):
        for block_BT in token_ids_BT.split(batch_size):
            logits_BTV = model(input_ids=block_BT.to(model.device), use_cache=False).logits[:, :-1]
            targets_BT = block_BT[:, 1:].to(logits_BTV.device)
            total += float(F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum"))
            count += targets_BT.numel()
            if tokenizer is not None:
                text_bytes += sum(len(tokenizer.decode(row).encode()) for row in targets_BT.tolist())
    return Evaluation(total / count, count, text_bytes)


def gate_strengths(model: PreTrainedModel, token_ids_T: torch.Tensor) -> dict[int, list[float]]:
    """The gate α of each memory layer at each token of one sequence (the mean over streams), by layer number."""
    gates: dict[int, list[float]] = {}
    hooks = []
    for layer in memory_of(model):
        store = lambda module, inputs, alpha_BTS, layer=layer: gates.__setitem__(  # noqa: E731
            layer.layer_id, alpha_BTS[0].mean(-1).tolist()
        )
        hooks.append(layer.gate.register_forward_hook(store))
    try:
        with evaluating(model):
            model(input_ids=token_ids_T[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return gates


def rows_touched(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> list[dict[str, int]]:
    """How many rows of each head the token ids in `batches` look up: one entry a head, with layer, order, head, rows
    and touched. Hashes only; no row is read. Needs one byte a row of the table."""
    memory = memory_of(model)
    seen_N = np.zeros(memory.storage.num_embeddings, dtype=np.bool_)
    for token_ids_BT in batches:
        for layer in memory:
            seen_N[layer.row_ids(token_ids_BT).flatten().numpy()] = True
    counts = []
    for layer in memory:
        layout = layer.hasher.layout
        position = layout.layer_ids.index(layer.layer_id)
        heads = zip(layout.primes_LH[position], layout.offsets_LH[position], strict=True)
        for number, (rows, first) in enumerate(heads):
            counts.append(
                {
                    "layer": layer.layer_id,
                    "order": layout.ngram_orders[number // layout.num_heads],
                    "head": number % layout.num_heads,
                    "rows": rows,
                    "touched": int(seen_N[first : first + rows].sum()),
                }
            )
    return counts
