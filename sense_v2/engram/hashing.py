"""Compressed ids -> row ids: which H rows of the table belong to each position.

    mix[t]   = c[t]·m[0] ⊕ c[t-1]·m[1] ⊕ … ⊕ c[t-n+1]·m[n-1]        for each n-gram order n
    row[t,h] = mix[t] mod prime[h] + offset[h]                       for each head h of that order

The multipliers m (`head_layout.py`) are odd and bounded so that no product leaves int64. Every head has a prime of
its own, so heads that share an n-gram collide on different ones. A position before the sequence, behind padding or
in another packed document counts as the pad id, and so does everything behind it: an n-gram never reaches across.

`ngram_hash` is the pure function; `NgramHasher` holds what it needs for one layer. `token_rows` goes from a call's
token ids, mask, positions and past to the row ids of all layers. NumPy arrays and torch tensors on any device give
the same values; those in this machine's memory are hashed by `_ngrams.c` where it was compiled.

In the `qwen_ple` variant the pad id is the model's end-of-sequence token, and behind one of those a new n-gram begins
as if the sequence did. In `longcat_flash` it is the same, and token ids are the digits of a number in base V:

    row[t,h] = (c[t] + c[t-1]·V + … + c[t-n+1]·V^(n-1)) mod size[h] + offset[h]

with 0 for what lies behind an end.

Source: Engram (arXiv 2601.07372) and its demo, transformers' models/qwen4_exp, and LongCat-Flash-Lite's own code;
held against tests/golden/{paper_demo,deepseek_v41,qwen_ple,longcat_flash}_hash.json.

B batch, T sequence, P positions of history, L layers, H heads in all (orders × heads per order), N rows.

Long because the formula stands here alone: by operators, compiled, and for a call's tokens of every layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram import operators
from sense_v2.engram.head_layout import HeadLayout, hash_multipliers, power_multipliers, splitmix_multipliers
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.engram.variants import VARIANTS

Ids = TypeVar("Ids", np.ndarray, torch.Tensor)

# Marks a position of `history` that no n-gram may reach across (padding, or before the sequence).
NO_TOKEN = -1
# What `TokenRows.to_remember` says of each token, in this order.
COMPRESSED_ID, VALID, POSITION, OVERLAY = range(4)


def _load_compiled() -> Any:
    try:
        return importlib.import_module("sense_v2.engram._ngrams")
    except ImportError:  # no compiler where it was installed
        return None


compiled: Any = _load_compiled()


def sequences_until(end_id: int, ids_BT: torch.Tensor, sequence_ids_BT: torch.Tensor | None) -> torch.Tensor:
    """Make sequence_ids_BT that also change behind each `end_id`."""
    ended_BT = _shift((ids_BT == end_id).cumsum(dim=1), 1, fill=0)
    if sequence_ids_BT is None:
        return ended_BT
    return sequence_ids_BT.to(torch.int64) * (ids_BT.shape[1] + 1) + ended_BT


def boundary_masks(
    valid_BT: torch.Tensor | None, sequence_ids_BT: torch.Tensor | None, *, farthest: int
) -> list[torch.Tensor | None]:
    """Find where the n-gram at t may use the token 0, 1, … `farthest` positions back: ok_BT of each, boolean.

    It may where that token and all between are valid and of t's sequence. None if nothing but the start of the
    batch's rows limits, which the shift itself handles.
    """
    ok_BT = valid_BT
    found = [ok_BT]
    for back in range(1, farthest + 1):
        if valid_BT is not None and ok_BT is not None:
            ok_BT = ok_BT & _shift(valid_BT, back, fill=False)
        if sequence_ids_BT is not None:
            later_BT = _shift(sequence_ids_BT, back - 1, fill=NO_TOKEN)
            same_BT = _shift(sequence_ids_BT, back, fill=NO_TOKEN) == later_BT
            ok_BT = same_BT if ok_BT is None else ok_BT & same_BT
        found.append(ok_BT)
    return found


def _shift(values_BT: torch.Tensor, back: int, *, fill: int) -> torch.Tensor:
    """Put values[t - back] at t, and `fill` where that lies before the start."""
    if back == 0:
        return values_BT
    shifted_BT = torch.full_like(values_BT, fill)
    shifted_BT[:, back:] = values_BT[:, : max(values_BT.shape[1] - back, 0)]
    return shifted_BT


def look_back(
    compressed_ids_BT: torch.Tensor,
    *,
    largest_order: int,
    pad_id: int,
    valid_BT: torch.Tensor | None,
    sequence_ids_BT: torch.Tensor | None,
) -> torch.Tensor:
    """Find what each position's n-grams are made of: ids 0, 1, … positions back [K, B, T], K the largest order."""
    masks = boundary_masks(valid_BT, sequence_ids_BT, farthest=largest_order - 1)
    ids_KBT = []
    for back, ok_BT in enumerate(masks):
        ids_BT = _shift(compressed_ids_BT, back, fill=pad_id)
        ids_KBT.append(ids_BT if ok_BT is None else torch.where(ok_BT, ids_BT, pad_id))
    return torch.stack(ids_KBT)


def ngram_hash(
    ids_KBT: torch.Tensor,
    *,
    multipliers_K: torch.Tensor,
    ngram_orders: Sequence[int],
    primes_H: torch.Tensor,
    offsets_H: torch.Tensor,
) -> torch.Tensor:
    """Hash what `look_back` made, int64, to row_ids_BTH by the formula of the module's docstring."""
    terms_KBT = ids_KBT * multipliers_K[:, None, None]
    mixes_BT = [terms_KBT[0]]
    for term_BT in terms_KBT[1:]:
        mixes_BT.append(mixes_BT[-1] ^ term_BT)
    mix_BTO1 = torch.stack([mixes_BT[order - 1] for order in ngram_orders], dim=-1)[..., None]
    return (mix_BTO1 % primes_H.view(len(ngram_orders), -1)).flatten(-2) + offsets_H


def digits_hash(
    ids_KBT: torch.Tensor, *, multipliers_KH: torch.Tensor, sizes_H: torch.Tensor, offsets_H: torch.Tensor
) -> torch.Tensor:
    """Hash what `look_back` made, int64, to row_ids_BTH: the ids as digits, see the module's docstring."""
    sum_BTH = ids_KBT[0, ..., None] * multipliers_KH[0]
    for ids_BT, multipliers_H in zip(ids_KBT[1:], multipliers_KH[1:], strict=True):
        sum_BTH = sum_BTH + ids_BT[..., None] * multipliers_H
    return sum_BTH % sizes_H + offsets_H


class NgramHasher:
    """Hashes for one layer of a variant: `hasher(compressed_ids_BT) -> row_ids_BTH`.

    `NgramHasher.from_config` makes one of an `EngramConfig`.

    Args:
        variant: A name of `VARIANTS`.
        layer_id: The layer, one of `layer_ids`.
        layer_ids: All layers that share the primes.
        ngram_orders: Lengths of n-grams, as [2, 3].
        num_heads: Heads of each order.
        table_size: Rows, as the variant counts them.
        compressed_vocab_size: Compressed ids, which the multipliers depend on.
        pad_id: A *compressed* id; in a variant whose lookback stops at the end of a sequence, that token's.
        seed: Of the multipliers.
        num_spare_ids: Compressed ids behind those, which the multipliers don't depend on. Their products can leave
            int64, and wrap around then, on every device alike.

    Raises:
        ValueError: A name or id is unknown, or `table_size` has no room for the heads.

    >>> import torch
    >>> hasher = NgramHasher("sense", layer_id=1, layer_ids=[1], ngram_orders=[2], num_heads=2, table_size=100,
    ...                      compressed_vocab_size=50, pad_id=0)
    >>> hasher(torch.tensor([[3, 4, 3, 4]])).shape
    torch.Size([1, 4, 2])
    """

    def __init__(
        self,
        variant: str,
        *,
        layer_id: int,
        layer_ids: Sequence[int],
        ngram_orders: Sequence[int],
        num_heads: int,
        table_size: int,
        compressed_vocab_size: int,
        pad_id: int,
        seed: int = 0,
        num_spare_ids: int = 0,
    ) -> None:
        if variant not in VARIANTS:
            raise with_way_out(ValueError(f"no variant {variant!r}"), f"there are {', '.join(VARIANTS)}")
        if layer_id not in layer_ids:
            raise ValueError(f"layer_id = {layer_id} is not among layer_ids = {list(layer_ids)}")
        if not 0 <= pad_id < compressed_vocab_size:
            raise ValueError(f"pad_id = {pad_id}: must be a compressed id, from 0 to {compressed_vocab_size - 1}")
        self.layout = HeadLayout.build(
            variant, layer_ids=layer_ids, ngram_orders=ngram_orders, num_heads=num_heads, table_size=table_size
        )
        self.layer_id = layer_id
        self.pad_id = pad_id
        self.compressed_vocab_size = compressed_vocab_size
        self.num_ids = compressed_vocab_size + num_spare_ids
        layer = self.layout.layer_ids.index(layer_id)
        self.num_rows = self.layout.num_rows_L[layer]
        rules = VARIANTS[variant]
        self._ends_at_pad = rules.lookback_ends == "end_of_sequence"
        self._is_digits = rules.multipliers == "powers"
        if self._is_digits:
            self.multipliers = power_multipliers(self.layout, layer, compressed_vocab_size=compressed_vocab_size)
        else:
            splitmix = rules.multipliers == "splitmix64"
            self.multipliers = (splitmix_multipliers if splitmix else hash_multipliers)(
                layer if splitmix else layer_id,
                largest_order=max(ngram_orders),
                compressed_vocab_size=compressed_vocab_size,
                seed=seed,
            )
        self._multipliers = torch.from_numpy(self.multipliers)
        self._primes_H = torch.tensor(self.layout.primes_LH[layer], dtype=torch.int64)
        self._offsets_H = torch.tensor(self.layout.offsets_LH[layer], dtype=torch.int64)
        orders_H = np.repeat(self.layout.ngram_orders, num_heads)
        reach_KH = np.arange(len(self.multipliers))[:, None] < orders_H
        multipliers_KH = self.multipliers if self._is_digits else self.multipliers[:, None] * reach_KH
        self._of_heads = (multipliers_KH, self._is_digits, self._primes_H.numpy(), self._offsets_H.numpy())
        self.first_row = 0
        """Where the layer's table begins, if it is one of several that are joined."""

    @classmethod
    def from_config(
        cls, config: EngramConfig, *, layer_id: int, compressed_vocab_size: int, pad_id: int, num_spare_ids: int = 0
    ) -> NgramHasher:
        """Make the hasher of one layer of `config`; `pad_id` is a compressed id."""
        return cls(
            config.variant,
            layer_id=layer_id,
            layer_ids=config.layer_indices,
            ngram_orders=config.ngram_orders,
            num_heads=config.num_heads,
            table_size=config.table_size,
            compressed_vocab_size=compressed_vocab_size,
            pad_id=pad_id,
            seed=config.seed,
            num_spare_ids=num_spare_ids,
        )

    def __call__(
        self,
        compressed_ids_BT: Ids,
        *,
        attention_mask: Ids | None = None,
        sequence_ids: Ids | None = None,
        history: Ids | None = None,
        looked_back: torch.Tensor | None = None,
    ) -> Ids:
        """Hash compressed ids to row ids.

        Args:
            compressed_ids_BT: Integers [B, T], a NumPy array or a torch tensor on any device.
            attention_mask: [B, T], 0 at padding.
            sequence_ids: [B, T], the packed document of each position; 0 is padding.
            history: [B, P], compressed ids just before these, of the first position's document; `NO_TOKEN` where
                there is none. P ≥ largest order - 1 is exact; any P is taken.
            looked_back: What `look_back` of a hasher with the same pad id made of the other arguments, as tensors.

        Returns:
            Row ids [B, T, H], int64, of the kind and on the device of `compressed_ids_BT`.

        Raises:
            ValueError: A shape doesn't fit.
            IndexError: An id is outside the compressed range.
        """
        if isinstance(compressed_ids_BT, np.ndarray):
            tensors = [None if x is None else torch.from_numpy(x) for x in (attention_mask, sequence_ids, history)]
            return self._rows(self.look_back(torch.from_numpy(compressed_ids_BT), *tensors)).numpy()
        if looked_back is None:
            looked_back = self.look_back(compressed_ids_BT, attention_mask, sequence_ids, history)
        return self._rows(looked_back)

    def look_back(
        self,
        ids_BT: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Find what the n-grams at each position are made of, [K, B, T]; see `__call__`. The same for all layers."""
        if ids_BT.dim() != 2:
            raise ValueError(f"compressed ids have shape {tuple(ids_BT.shape)}; expected [batch, sequence]")
        for name, extra_BT in (("attention_mask", attention_mask), ("sequence_ids", sequence_ids)):
            if extra_BT is not None and extra_BT.shape != ids_BT.shape:
                raise ValueError(f"{name} has shape {tuple(extra_BT.shape)}; expected {tuple(ids_BT.shape)}")
        if history is not None and (history.dim() != 2 or history.shape[0] != ids_BT.shape[0]):
            raise ValueError(f"history has shape {tuple(history.shape)}; expected [{ids_BT.shape[0]}, positions]")
        nothing = 0 if self._is_digits else self.pad_id
        device = ids_BT.device
        if compiled is not None and device.type == "cpu":
            found_KBT = self._look_back_compiled(nothing, ids_BT, attention_mask, sequence_ids, history)
            if found_KBT is not None:
                return found_KBT
        _check_range(ids_BT, 0, self.num_ids, "compressed ids")
        ids_BT = ids_BT.to(torch.int64)
        valid_BT = None if attention_mask is None else attention_mask.to(device) != 0
        if sequence_ids is not None:
            sequence_ids = sequence_ids.to(device)
            in_document_BT = sequence_ids != 0
            valid_BT = in_document_BT if valid_BT is None else valid_BT & in_document_BT
        num_history = 0 if history is None else history.shape[1]
        if history is not None and num_history:
            _check_range(history, NO_TOKEN, self.num_ids, "history")
            history = history.to(device=device, dtype=torch.int64)
            valid_BT = torch.ones_like(ids_BT, dtype=torch.bool) if valid_BT is None else valid_BT
            valid_BT = torch.cat([history != NO_TOKEN, valid_BT], dim=1)
            ids_BT = torch.cat([history.clamp_min(0), ids_BT], dim=1)
            if sequence_ids is not None:
                past_BP = sequence_ids[:, :1].expand(-1, num_history)
                sequence_ids = torch.cat([past_BP, sequence_ids], dim=1)
        if self._ends_at_pad:
            sequence_ids = sequences_until(self.pad_id, ids_BT, sequence_ids)
        masks = {"valid_BT": valid_BT, "sequence_ids_BT": sequence_ids}
        ids_KBQ = look_back(ids_BT, largest_order=len(self.multipliers), pad_id=nothing, **masks)
        return ids_KBQ[..., num_history:]

    def _look_back_compiled(
        self,
        nothing: int,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        documents_BT: torch.Tensor | None,
        history_BP: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """As `look_back`, of ids in memory; None where one of them is none that there is."""
        if not (_are_integers(ids_BT) and (history_BP is None or _are_integers(history_BP))):
            return None
        ids, documents, history = (
            None if x is None else x.to(device="cpu", dtype=torch.int64).contiguous().numpy()
            for x in (ids_BT, documents_BT, history_BP)
        )
        valid = None if mask_BT is None else (mask_BT.cpu() != 0).contiguous().numpy()
        found_KBT = torch.empty((len(self.multipliers), *ids_BT.shape), dtype=torch.int64, device="cpu")
        end_id = self.pad_id if self._ends_at_pad else NO_TOKEN
        is_inside = compiled.look_back(
            ids, valid, documents, history, len(ids_BT), self.num_ids, end_id, nothing, found_KBT.numpy()
        )
        return found_KBT if is_inside else None

    def _rows(self, ids_KBT: torch.Tensor) -> torch.Tensor:
        device = ids_KBT.device
        if compiled is not None and device.type == "cpu":
            found_BTH = torch.empty((*ids_KBT.shape[1:], len(self._primes_H)), dtype=torch.int64, device="cpu")
            compiled.hash_rows(ids_KBT.contiguous().numpy(), *self._of_heads, self.first_row, found_BTH.numpy())
            return found_BTH
        multipliers, primes_H = self._multipliers.to(device), self._primes_H.to(device)
        offsets_H = self._offsets_H.to(device) + self.first_row
        if self._is_digits:
            return digits_hash(ids_KBT, multipliers_KH=multipliers, sizes_H=primes_H, offsets_H=offsets_H)
        orders = self.layout.ngram_orders
        return ngram_hash(
            ids_KBT, multipliers_K=multipliers, ngram_orders=orders, primes_H=primes_H, offsets_H=offsets_H
        )


def _are_integers(ids: torch.Tensor) -> bool:
    return not (ids.dtype.is_floating_point or ids.dtype == torch.bool)


def _check_range(ids: torch.Tensor, low: int, high: int, what: str) -> None:
    if not _are_integers(ids):
        raise TypeError(f"{what} are {ids.dtype}; expected integers")
    if ids.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(ids))
    if least < low or most >= high:
        bad = least if least < low else most
        raise IndexError(
            f"{what} hold {bad}, outside {low} to {high - 1}: they must come from the shadow map this was made for"
        )


@dataclass
class TokenRows:
    """The rows that the tokens of one call look up, and where their memory stops."""

    row_ids_LBTH: torch.Tensor
    valid_BT: torch.Tensor | None
    """Boolean; None if no position is masked."""
    documents_BQ: torch.Tensor | None
    """The packed document of the past's positions and of these; None if there is one document."""
    compressed_BT: torch.Tensor
    positions_BT: torch.Tensor | None
    num_past: int
    """P."""
    places_T: torch.Tensor | None = None
    """Where these tokens are among the Q positions, if not behind the P of the past."""
    overlays_B: torch.Tensor | None = None
    """The number of each sequence's overlay; None if no sequence has one."""

    def to_remember(self) -> torch.Tensor:
        """Make what a cache keeps of these tokens, [B, T, 4] int64: COMPRESSED_ID, VALID, POSITION, OVERLAY."""
        valid_BT, positions_BT = self.valid_BT, self.positions_BT
        if valid_BT is None:
            valid_BT = torch.ones_like(self.compressed_BT)
        if positions_BT is None:
            positions_BT = counted_positions(self.compressed_BT, 0)
        overlays_BT = torch.zeros_like(self.compressed_BT)
        if self.overlays_B is not None:
            overlays_BT = self.overlays_B[:, None].expand_as(self.compressed_BT)
        return torch.stack([self.compressed_BT, valid_BT.long(), positions_BT.long(), overlays_BT], dim=-1)


def token_rows(
    tokenizer: EngramTokenizer,
    hashers: Sequence[NgramHasher],
    token_ids_BT: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    past_BP4: torch.Tensor | None = None,
    num_before: int | torch.Tensor = 0,
    handle: int,
) -> TokenRows:
    """Find the rows of every layer that a call's tokens need.

    Positions that go back begin a new packed document; positions that go on belong to the document before, in a cache
    as anywhere else.

    Args:
        tokenizer: The shadow map.
        hashers: One a layer.
        token_ids_BT: [B, T], integers on any device.
        attention_mask: [B, T], 0 at padding.
        position_ids: [B, T] or [1, T], or of several kinds [3 or 4, B, T]; without them positions count on from
            `num_before`.
        past_BP4: What `TokenRows.to_remember` made of the last P tokens before these.
        num_before: How many tokens came before these.
        handle: Who answers `operators.hash_tokens` in a compiled graph.

    Raises:
        ValueError: A shape doesn't fit.
        IndexError: A token id is outside the shadow map.
    """
    if token_ids_BT.dim() != 2:
        raise ValueError(f"input_ids have shape {tuple(token_ids_BT.shape)}; expected [batch, sequence]")
    shape, device = tuple(token_ids_BT.shape), token_ids_BT.device
    valid_BT = positions_BT = documents_BQ = documents_BT = history_BP = None
    if attention_mask is not None:
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of input_ids, {shape}, with "
                "0 at padding"
            )
        valid_BT = attention_mask.to(device) != 0
        if not torch.compiler.is_compiling() and valid_BT.all():
            valid_BT = None
    if position_ids is not None and position_ids.dim() == 3:
        # Of text, time, height and width (Qwen-VL); without text's, positions say nothing of documents.
        position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
    if position_ids is not None:
        if tuple(position_ids.shape) not in ((1, shape[1]), shape):
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}; expected that of input_ids, {shape}"
            )
        positions_BT = position_ids.to(device).expand_as(token_ids_BT)
    if past_BP4 is None:
        if positions_BT is not None:
            documents_BQ = documents_BT = packed_documents(positions_BT)
    else:
        if past_BP4.shape[0] != shape[0]:
            raise ValueError(f"the cache holds {past_BP4.shape[0]} sequences, input_ids have {shape[0]}")
        past_BP4 = past_BP4.to(device)
        if positions_BT is None:
            positions_BT = counted_positions(token_ids_BT, num_before)
        reachable_BP = past_BP4[..., VALID] != 0
        documents_BQ = packed_documents(torch.cat([past_BP4[..., POSITION], positions_BT], dim=1))
        if documents_BQ is not None:
            documents_BT = documents_BQ[:, past_BP4.shape[1] :]
            reachable_BP = reachable_BP & (documents_BQ[:, : past_BP4.shape[1]] == documents_BT[:, :1])
        history_BP = past_BP4[..., COMPRESSED_ID].masked_fill(~reachable_BP, NO_TOKEN)
    if torch.compiler.is_compiling():
        layout = hashers[0].layout
        sizes = len(hashers), layout.num_heads * len(layout.ngram_orders)
        compressed_BT, row_ids_LBTH = operators.hash_tokens(
            token_ids_BT, history_BP, valid_BT, documents_BT, *sizes, handle
        )
    else:
        compressed_BT, row_ids_LBTH = hash_tokens(
            tokenizer, hashers, token_ids_BT, history_BP, valid_BT, documents_BT
        )
    num_past = 0 if past_BP4 is None else past_BP4.shape[1]
    return TokenRows(row_ids_LBTH, valid_BT, documents_BQ, compressed_BT, positions_BT, num_past)


def hash_tokens(
    tokenizer: EngramTokenizer,
    hashers: Iterable[NgramHasher],
    token_ids_BT: torch.Tensor,
    history_BP: torch.Tensor | None = None,
    valid_BT: torch.Tensor | None = None,
    documents_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute compressed ids [B, T] and every layer's row ids [L, B, T, H]; arguments as `NgramHasher`'s."""
    compressed_BT = tokenizer(token_ids_BT)
    return compressed_BT, hash_layers(hashers, compressed_BT, valid_BT, documents_BT, history_BP)


def hash_layers(
    hashers: Iterable[NgramHasher],
    compressed_BT: torch.Tensor,
    valid_BT: torch.Tensor | None = None,
    documents_BT: torch.Tensor | None = None,
    history_BP: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hash compressed ids for every layer, [L, B, T, H]; looks back once. Arguments as `NgramHasher`'s."""
    looked_back: dict[int, torch.Tensor] = {}
    row_ids_LBTH = []
    for hasher in hashers:
        if (pad_id := hasher.pad_id) not in looked_back:
            looked_back[pad_id] = hasher.look_back(compressed_BT, valid_BT, documents_BT, history_BP)
        row_ids_LBTH.append(hasher(compressed_BT, attention_mask=valid_BT, looked_back=looked_back[pad_id]))
    return torch.stack(row_ids_LBTH)


def packed_documents(position_ids_BT: torch.Tensor) -> torch.Tensor | None:
    """Number packed documents from 1, by positions that go back; None if there is one document.

    Positions that stand still begin none, but for 0 after 0, which is a document of one token, unless later ones
    stand still, too.

    >>> packed_documents(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [0, 0, 1, 1, 2]]))
    tensor([[1, 1, 1, 2, 2],
            [1, 2, 2, 2, 2],
            [1, 1, 1, 1, 1]])
    """
    before_BT, after_BT = position_ids_BT[:, :-1], position_ids_BT[:, 1:]
    # A compiled graph can't depend on what the positions are, only on their number.
    if not torch.compiler.is_compiling() and (after_BT > before_BT).all():
        return None
    stands_BT = after_BT == before_BT
    repeats_B1 = (stands_BT & (after_BT != 0)).any(dim=1, keepdim=True)
    starts_BT = (after_BT < before_BT) | (stands_BT & ~repeats_B1 & (after_BT == 0))
    if not torch.compiler.is_compiling() and not starts_BT.any():
        return None
    return F.pad(starts_BT.long().cumsum(dim=1), (1, 0)) + 1


def counted_positions(token_ids_BT: torch.Tensor, num_before: int | torch.Tensor) -> torch.Tensor:
    """Count the positions of a call that names none, as models do."""
    return (torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device) + num_before).expand_as(token_ids_BT)
