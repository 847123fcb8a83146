"""A text, counted -> a memory that knows what follows its n-grams, before any step of training.

    most of the text ──▶ rows: of each n-gram, the mean of the output embeddings of the tokens that followed it
    the rest of it   ──▶ W_v:  how strongly they speak, found by measuring the loss

A late hidden state is about to be compared with the output embeddings, so a vector of their space, added there,
raises the logits of the tokens that it is made of. What comes out is an n-gram model inside the network, which
attention and the gates weigh as they weigh other rows.

    row   = Sᵀ Σ (embedding of the next token - mean) / (n + PRIOR)        over the n times that the n-gram is met
    W_v   = strength · S,  S = V·spread^(-1/4)

V are the main directions of the embeddings in this text, and `spread` the variance along each. S on both sides
divides by the square root of the variance, which sets apart tokens that share a large direction; neither none nor
all of it was as good (benchmarks/LOG.md). Each head of an order keeps every H-th direction, so that n-grams that
share a row in one head are apart in others. PRIOR is there because what was met once proves little. Rows that no
n-gram of the text hashes to stay zero.

The strength can't be found on text that was counted: the rows know its answers, and the loss would fall without
end. For the same reason, fusion layers that are then trained on counted text learn to trust rows too much.

V vocabulary, C hidden size, K directions (heads of an order × D), T tokens, H heads, D row width, N rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import number_of, with_way_out
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.model import EngramFusionLayer
from sense_v2.engram.variants import VARIANTS
from sense_v2.hf.insight.evaluation import token_losses
from sense_v2.hf.memory import EngramMemory, memory_of

CHUNK_TOKENS = 1 << 16
PRIOR = 3.0
MEASURED_SEQUENCES, MEASURED_TOKENS = 8, 128
SHARE_KEPT_BACK = 32
"""One token in so many isn't counted, and finds the strength."""
FIRST_STRENGTH, STRENGTH_FACTOR, WEAKEST, STRONGEST = 0.2, 1.5, 0.03, 10
GAIN_KEPT = 0.95
"""Of the best strength's gain: the loss is flat around it, and what is lost of other text grows with its square."""


@dataclass(frozen=True)
class Counted:
    """What `count_rows` did."""

    tokens: int
    """Those that were counted."""
    rows: int
    """Rows that hold something now."""
    strength: float
    """The length of what an order adds where one token always follows, of the hidden state's, at a gate of 1; 0 if
    no strength lowered the loss."""
    loss_before: float
    """Nats a token on the text that wasn't counted,"""
    loss_after: float
    """and with the rows."""
    seconds: float


def count_rows(
    model: PreTrainedModel,
    token_ids: np.ndarray[Any, Any] | torch.Tensor,
    *,
    measured_BT: torch.Tensor | None = None,
    max_memory_bytes: int = 1 << 30,
    progress: Progress = no_progress,
) -> Counted:
    """Fill a fresh memory's rows with what follows each n-gram of a text, and commit them.

    Only rows and W_v change. The memory best stands before one of the last layers (`late_memory_for`).

    Args:
        model: With memory attached whose table is new and zeros (`init_std=0`, or `sparse=True`).
        token_ids: The text, [T]. A `np.memmap` is read in pieces, as often as `max_memory_bytes` makes it.
        measured_BT: Sequences that find the strength, and aren't in the text. By default the end of the text, a
            thirty-second of it, is kept back for them.
        max_memory_bytes: What sums may take. A table that is larger is filled in several passes.
        progress: Told how far it is.

    Returns:
        What was counted, and what it does to the loss.

    Raises:
        ValueError: The table isn't fresh, the text is too short, or the model or its memory isn't of this kind.

    >>> counted = count_rows(attach_engram(model, config, tokenizer), token_ids)  # doctest: +SKIP
    """
    started = time.perf_counter()
    memory = memory_of(model)
    ids_T = torch.as_tensor(token_ids) if isinstance(token_ids, torch.Tensor) else token_ids
    _refuse(model, memory, ids_T)
    if measured_BT is None:
        ids_T, measured_BT = _kept_back(ids_T)
    num_directions = memory.config.num_heads * memory.config.row_dim
    projection_CK, rows_VK = _directions(model, ids_T, num_directions)
    passes = [(fusion, pieces) for fusion in memory for pieces in _passes(fusion, max_memory_bytes)]
    num_rows = 0
    with ExitStack() as commits, progress("counting n-grams", len(passes) * len(ids_T), unit="tokens") as advance:
        for storage in memory.storages:
            commits.enter_context(storage.one_commit())
        for fusion, pieces in passes:
            num_rows += _fill(fusion, pieces, ids_T, rows_VK, advance)
        for storage in memory.storages:
            storage.commit()
    with progress("finding their strength", 0, unit="tokens") as advance:
        strength, before, after = _find_strength(model, memory, projection_CK, measured_BT, advance)
    return Counted(len(ids_T), num_rows, strength, before, after, time.perf_counter() - started)


def _refuse(model: PreTrainedModel, memory: EngramMemory, ids_T: Any) -> None:
    for storage in memory.storages:
        if storage.mode != "r+" or storage.needs_all_ranks or storage.table is not storage:
            raise with_way_out(
                ValueError(f"{storage.path}: rows are counted into a table that one process may write to by itself"),
                "attach it with mode='r+', in one process, without overlays",
            )
        if not storage.is_new or storage.manifest.init_std != 0:
            found = "has rows that were written before" if not storage.is_new else "began as noise"
            raise with_way_out(
                ValueError(f"{storage.path} {found}, and rows are counted into a fresh table of zeros"),
                "attach a memory with init_std=0 and another EngramConfig.storage_path",
            )
    if not memory.config.causal or VARIANTS[memory.config.variant].averages:
        raise with_way_out(
            ValueError(
                f"EngramConfig.causal = {memory.config.causal}, variant {memory.config.variant!r}: counted rows "
                "foretell the next token, and are added to hidden states"
            ),
            "train these rows instead",
        )
    head = model.get_output_embeddings()
    if head is None:
        raise with_way_out(
            ValueError(f"{type(model).__name__} has no output embeddings, of which rows are made"),
            "use the causal language model of this kind, or train its rows",
        )
    shortest = 4 * max(memory.config.ngram_orders)
    if len(ids_T) < shortest:
        raise with_way_out(
            ValueError(f"the text has {number_of(len(ids_T), 'token')}; counting takes {shortest} at least"),
            "give more text",
        )


def _kept_back(ids_T: Any) -> tuple[Any, torch.Tensor]:
    """Take sequences off the end of a text: what is left, and measured_BT."""
    num_tokens = min(max(len(ids_T) // SHARE_KEPT_BACK, MEASURED_SEQUENCES * MEASURED_TOKENS), len(ids_T) // 4)
    length = min(MEASURED_TOKENS, num_tokens)
    num_sequences = min(MEASURED_SEQUENCES, num_tokens // length)
    begins = len(ids_T) - num_tokens + np.arange(num_sequences) * (num_tokens // num_sequences)
    measured = [_tensor(ids_T[begin : begin + length]) for begin in begins.tolist()]
    return ids_T[: len(ids_T) - num_tokens], torch.stack(measured)


def _tensor(ids_T: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(ids_T).astype(np.int64))


@torch.no_grad()
def _output_embeddings(model: PreTrainedModel) -> torch.Tensor:
    """[V, C] in float32, also of a layer whose weight is quantized or elsewhere."""
    head: Any = model.get_output_embeddings()
    weight = head.weight
    if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point() and not weight.is_meta:
        return weight.detach().float().cpu()
    size = int(model.config.get_text_config().hidden_size)
    eye_CC = torch.eye(size, dtype=model.dtype, device=model.device)
    return (head(eye_CC) - head(torch.zeros_like(eye_CC[:1]))).float().cpu().T


@torch.no_grad()
def _directions(model: PreTrainedModel, ids_T: Any, num_directions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S, scaled to add values of length 1, and every token's row before it is cut by heads, [V, K]."""
    embeddings_VC = _output_embeddings(model)
    counts_V = torch.zeros(len(embeddings_VC), dtype=torch.float64)
    for first in range(0, len(ids_T), CHUNK_TOKENS):
        counts_V += torch.bincount(_tensor(ids_T[first : first + CHUNK_TOKENS]), minlength=len(counts_V))
    shares_V1 = (counts_V / counts_V.sum()).float()[:, None]
    embeddings_VC = embeddings_VC - (embeddings_VC * shares_V1).sum(0)
    spread_C, directions_CC = torch.linalg.eigh(((embeddings_VC * shares_V1).T @ embeddings_VC).double())
    num_kept = min(num_directions, int((spread_C > 1e-6 * spread_C[-1]).sum()))
    spread_K, directions_CK = spread_C.flip(0)[:num_kept], directions_CC.flip(1)[:, :num_kept]
    projection_CK = (directions_CK * spread_K**-0.25).float()
    # Rows whose values have a mean square of 1, and values whose has.
    rows_VK = embeddings_VC @ projection_CK * float(spread_K.sqrt().mean()) ** -0.5
    projection_CK = projection_CK * float(spread_K.sqrt().mean() * len(spread_C) / num_kept) ** 0.5
    pad = (0, num_directions - num_kept)  # rows wider than the embeddings: the rest stays zero
    return torch.nn.functional.pad(projection_CK, pad), torch.nn.functional.pad(rows_VK, pad)


Piece = tuple[int, int, int]
"""A head, and the first and the last row but one of a part of its rows."""


def _passes(fusion: EngramFusionLayer, max_memory_bytes: int) -> Iterator[list[Piece]]:
    """Cut a layer's rows into lists of pieces whose sums, counts included, lie in memory together."""
    most = max(1, max_memory_bytes // (4 * (fusion.storage.embedding_dim + 1)))
    pieces, room = [], most
    for head, (first, size) in enumerate(zip(*_ranges(fusion), strict=True)):
        begin, stop = first, first + size
        while begin < stop:
            end = min(stop, begin + room)
            pieces.append((head, begin, end))
            room -= end - begin
            begin = end
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


def _ranges(fusion: EngramFusionLayer) -> tuple[list[int], tuple[int, ...]]:
    """The first row of each head, and how many it has."""
    hasher = fusion.hasher
    place = hasher.layout.layer_ids.index(hasher.layer_id)
    return [hasher.first_row + offset for offset in hasher.layout.offsets_LH[place]], hasher.layout.primes_LH[place]


@torch.no_grad()
def _fill(
    fusion: EngramFusionLayer,
    pieces: Sequence[Piece],
    ids_T: Any,
    rows_VK: torch.Tensor,
    advance: Callable[[int], Any],
) -> int:
    """Count these pieces' rows and store them; returns how many there are."""
    storage: Any = fusion.storage
    num_heads = fusion.hasher.layout.num_heads
    sums = [torch.zeros(stop - first, storage.embedding_dim) for _, first, stop in pieces]
    counts = [torch.zeros(stop - first) for _, first, stop in pieces]
    rows_HVD = [rows_VK[:, head::num_heads].contiguous() for head in range(num_heads)]
    for row_ids_TH, next_T in _ngrams(fusion, ids_T):
        for (head, first, stop), sums_ND, counts_N in zip(pieces, sums, counts, strict=True):
            row_ids_T = row_ids_TH[:, head] - first
            is_here_T = (row_ids_T >= 0) & (row_ids_T < stop - first)
            row_ids_T, followers_T = row_ids_T[is_here_T], next_T[is_here_T]
            sums_ND.index_add_(0, row_ids_T, rows_HVD[head % num_heads][followers_T])
            counts_N.index_add_(0, row_ids_T, torch.ones(len(row_ids_T)))
        advance(len(next_T))
    num_rows = 0
    for (_, first, _), sums_ND, counts_N in zip(pieces, sums, counts, strict=True):
        for part_U in counts_N.nonzero()[:, 0].split(CHUNK_TOKENS):
            storage.write(part_U + first, sums_ND[part_U] / (counts_N[part_U] + PRIOR)[:, None])
            num_rows += len(part_U)
    return num_rows


def _ngrams(fusion: EngramFusionLayer, ids_T: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each position's row ids and the token behind it, a piece of the text at a time."""
    overlap = fusion.reach
    for first in range(0, len(ids_T) - 1, CHUNK_TOKENS):
        before = min(first, overlap)
        part_T = _tensor(ids_T[first - before : first + CHUNK_TOKENS + 1])
        yield fusion.row_ids(part_T[None, :-1])[0, before:], part_T[before + 1 :]


def _find_strength(
    model: PreTrainedModel,
    memory: EngramMemory,
    projection_CK: torch.Tensor,
    measured_BT: torch.Tensor,
    advance: Callable[[int], Any],
) -> tuple[float, float, float]:
    """Set W_v to the gentlest strength that nearly has the best one's gain; returns it, and the losses."""
    lengths = {}

    def note(fusion: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # Most tokens': a sequence's first are far longer in many models.
        lengths[fusion] = float(hidden.float().square().mean(-1).sqrt().median())

    def loss_at(strength: float) -> float:
        for fusion in memory:
            _speak(fusion, projection_CK, strength * lengths.get(fusion, 0.0))
        return float(token_losses(model, measured_BT, batch_size=4, advance=advance).mean())

    hooks = [fusion.register_forward_pre_hook(note, with_kwargs=True) for fusion in memory]
    try:
        losses = {0.0: loss_at(0.0)}
    finally:
        for hook in hooks:
            hook.remove()
    best = FIRST_STRENGTH
    losses[best] = loss_at(best)
    for factor in (STRENGTH_FACTOR, 1 / STRENGTH_FACTOR):
        while best * factor not in losses and WEAKEST < best < STRONGEST:
            losses[best * factor] = loss_at(best * factor)
            if losses[best * factor] >= losses[best]:
                break
            best *= factor
        if best > FIRST_STRENGTH:
            break
    needed = losses[0.0] - GAIN_KEPT * (losses[0.0] - losses[best])
    gains = losses[best] < losses[0.0]
    strength = min(one for one, loss in losses.items() if one and loss <= needed) if gains else 0.0
    for fusion in memory:
        _speak(fusion, projection_CK, strength * lengths[fusion])
    return strength, losses[0.0], losses[strength]


@torch.no_grad()
def _speak(fusion: EngramFusionLayer, projection_CK: torch.Tensor, scale: float) -> None:
    """W_v: for each order the heads' directions, one head's after the other's."""
    layout = fusion.hasher.layout
    heads = [projection_CK[:, head :: layout.num_heads] for head in range(layout.num_heads)]
    fusion.W_v.weight.copy_(scale * torch.cat(heads * len(layout.ngram_orders), dim=1))
