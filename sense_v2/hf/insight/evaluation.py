"""A trained model -> numbers: loss, perplexity, bits per byte on held-out text, gates, rows touched.

B batch, T sequence, S residual streams, N rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sense_v2.hf.memory import EngramMemory, memory_of


@dataclass
class Evaluation:
    """Means over the predicted tokens (each sequence's first is not predicted)."""

    loss: float
    """Nats a token."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the predicted tokens; 0 where they weren't counted."""

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss > 700 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The loss per byte of text: comparable between tokenizers, as perplexity isn't. nan without bytes."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes if self.text_bytes else math.nan


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: PreTrainedModel,
    token_ids_BT: torch.Tensor,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    advance: Callable[[int], Any] | None = None,
) -> Evaluation:
    """Compute the model's loss on blocks of tokens, each block on its own.

    Args:
        model: With memory or without; its mode and gradients stay as they are.
        token_ids_BT: Blocks of T tokens.
        tokenizer: Of `tokenizers` or transformers; counts the bytes (`count_text_bytes`). None counts none.
        batch_size: Blocks that are computed together.
        advance: Called with the number of tokens after each batch.

    Raises:
        ValueError: There is no token to predict.
    """
    losses_BT = token_losses(model, token_ids_BT, batch_size=batch_size, advance=advance)
    text_bytes = 0 if tokenizer is None else count_text_bytes(token_ids_BT[:, 1:], tokenizer)
    return Evaluation(float(losses_BT.mean()), losses_BT.numel(), text_bytes)


def token_losses(
    model: PreTrainedModel,
    token_ids_BT: torch.Tensor,
    *,
    batch_size: int = 8,
    advance: Callable[[int], Any] | None = None,
) -> torch.Tensor:
    """float64 [B, T - 1]: the loss of each token but each block's first, in nats. `advance`, and what it raises, as
    `evaluate`."""
    if token_ids_BT.dim() != 2 or len(token_ids_BT) == 0 or token_ids_BT.shape[1] < 2:
        raise ValueError(
            f"token ids of shape {list(token_ids_BT.shape)} have nothing to predict: evaluation takes "
            "[blocks, tokens], at least one block of two tokens"
        )
    losses = []
    with evaluating(model):
        for block_BT in token_ids_BT.split(batch_size):
            logits_BTV = model(input_ids=block_BT.to(model.device), use_cache=False).logits[:, :-1]
            targets_BT = block_BT[:, 1:].to(logits_BTV.device)
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
            losses.append(loss.view(targets_BT.shape).cpu().double())
            if advance is not None:
                advance(block_BT.numel())
    return torch.cat(losses)


def count_text_bytes(token_ids_BT: torch.Tensor, tokenizer: Any) -> int:
    """UTF-8 bytes of the text that the tokens stand for; a special token stands for none.

    A block often begins or ends within a character. Decoding it puts U+FFFD, three bytes, where one or two are. So
    where a token says by itself how many bytes it is (byte-level tokenizers, and those that fall back to bytes), the
    tokens' bytes are added up. Only other tokenizers, of words say, are asked to decode.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    kinds = decoder_kinds(getattr(backend, "decoder", None))
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        return sum(len(backend.decode(row, skip_special_tokens=True).encode()) for row in token_ids_BT.tolist())
    is_byte_level = "ByteLevel" in kinds
    added = backend.get_added_tokens_decoder()
    total = 0
    for token_id, count in zip(*np.unique(token_ids_BT.cpu().numpy(), return_counts=True), strict=True):
        if token_id in added:
            token_bytes = 0 if added[token_id].special else len(added[token_id].content.encode())
        else:
            token_bytes = _token_bytes(backend.id_to_token(int(token_id)) or "", is_byte_level)
        total += int(count) * token_bytes
    return total


def decoder_kinds(decoder: Any) -> set[str]:
    """The names of a `tokenizers` decoder's parts; none for anything else."""
    if decoder is None or not type(decoder).__module__.startswith("tokenizers"):
        return set()
    description = json.loads(decoder.__getstate__())
    return {part["type"] for part in description.get("decoders", [description])}


def _token_bytes(token: str, is_byte_level: bool) -> int:
    """Bytes that a raw token stands for.

    >>> _token_bytes("ĠcafÃ©", True), _token_bytes("▁café", False), _token_bytes("<0xC3>", False)
    (6, 6, 1)
    """
    if is_byte_level:
        return len(token)  # its alphabet has a character a byte
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())


def gate_strengths(model: PreTrainedModel, token_ids_T: torch.Tensor) -> dict[int, list[float]]:
    """Find the gate α of each memory layer at each token of one sequence (the mean over streams), by layer number."""
    with gates_seen(memory_of(model)) as seen, evaluating(model):
        model(input_ids=token_ids_T[None].to(model.device), use_cache=False)
    return {layer_id: alpha_BTS[0].mean(-1).tolist() for layer_id, (alpha_BTS, _) in seen.items()}


@contextmanager
def gates_seen(memory: EngramMemory) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Collect the last gates α_BTS of each memory layer, and the hidden states that they saw, by layer number."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def store(layer_id: int, gate: torch.nn.Module, inputs: Any, alpha_BTS: torch.Tensor) -> None:
        seen[layer_id] = (alpha_BTS, inputs[0])

    # A compiled model has no guard on hooks.
    with torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        for fusion in memory:
            hooks.enter_context(fusion.gate.register_forward_hook(partial(store, fusion.layer_id)))
        yield seen


def rows_touched(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> list[dict[str, int]]:
    """Count the rows of each head that the token ids in `batches` look up: one entry a head, with layer, order, head,
    rows and touched. Hashes only; no row is read. Needs one byte a row of the table."""
    memory = memory_of(model)
    seen_N = np.zeros(memory.storage.num_embeddings, dtype=np.bool_)
    for token_ids_BT in batches:
        for layer in memory:
            seen_N[layer.row_ids(token_ids_BT).flatten().cpu().numpy()] = True
    counts = []
    for layer in memory:
        layout = layer.hasher.layout
        place = layout.layer_ids.index(layer.hasher.layer_id)
        for number, (rows, first) in enumerate(zip(layout.primes_LH[place], layout.offsets_LH[place], strict=True)):
            order, head = layout.ngram_orders[number // layout.num_heads], number % layout.num_heads
            touched = int(seen_N[first : first + rows].sum())
            counts.append({"layer": layer.layer_id, "order": order, "head": head, "rows": rows, "touched": touched})
    return counts
