"""Rows and hidden states -> fused hidden states: the layer that a backbone gets its memory from.

    memory = concatenated rows of the position's n-grams            [B, T, engram_dim]
    α = σ(norm(h)·norm(W_k memory)/√C)                              one gate per position (and residual stream)
    out = h + α·V + conv(α·V),  V = W_v memory

V and the convolution start at zero, so a fresh layer is the identity, and attaching memory changes no logit until
something is learned. It is W_v that is zero where rows are noise, or have learned; in front of a new table of zeros
(init_std = 0, sparse) W_v starts as noise instead. Zero rows behind a zero W_v would never move.

The convolution is `nn.Conv1d(kernel_size=3, padding=1)`. As it stands it would let a position see the next one, in
a causal model a leak of the label, so there it runs on an input padded by one more position on the left and is cut
to T. Padding is zeroed at its input, and where documents are packed its taps stop at their borders, as the n-grams
do.

The `paper` variant (arXiv 2601.07372 and its demo) takes the signed square root of the score before the sigmoid,
norms the convolution's input, puts SiLU behind it, and can feed several residual streams. `qwen_ple` is the same
without biases. `deepseek_v41` has the paper's gate and streams, no biases and no convolution: out = h + α·V.
`longcat_flash`, before a model's first layer, has α = 1 and takes the mean of the token embedding and the H rows,
each projected: out = (h + V) / (1 + H). It is the one variant whose fresh layer is not the identity.

B batch, T sequence, Q positions of the past and then these T, C hidden size, S residual streams, H rows a position,
D row width, V value (W_v memory), X = S·C channels of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram import operators
from sense_v2.engram.hashing import NgramHasher, boundary_masks, hash_tokens, token_rows
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.row_source import RowSource
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.engram.variants import VARIANTS


def open_table(
    config: EngramConfig,
    tokenizer: EngramTokenizer,
    *,
    layer: int | None = None,
    mode: str = "r+",
    hold: bool = False,
) -> MMapEmbeddingStorage:
    """Open the table that `config` describes: created if there is none yet (mode r+), else checked against it.

    Args:
        config: `storage_path` is the table's.
        tokenizer: The shadow map.
        layer: One of `config.layer_indices`, in a variant with a table for each of several layers.
        mode: "r+" or "r".
        hold: With "r", True keeps the rows that are there now, whatever this process stores to the table later.

    Raises:
        ValueError: The table's manifest differs from `config` or the shadow map; the error names where.
    """
    settings = table_settings(config, tokenizer, layer=layer)
    path, _ = config.paths(tokenizer.tokenizer_name)
    return MMapEmbeddingStorage(path=path, mode=mode, hold=hold, **settings)


def table_settings(config: EngramConfig, tokenizer: EngramTokenizer, *, layer: int | None = None) -> dict[str, Any]:
    """Make what `open_table` opens a table with, but for its path and mode."""
    layout = HeadLayout.from_config(config)
    place, of_layer = 0, {}
    if not VARIANTS[config.variant].one_table:
        if layer is None and len(layout.layer_ids) == 1:
            layer = layout.layer_ids[0]
        if layer not in layout.layer_ids:
            raise with_way_out(
                ValueError(
                    f"EngramConfig.variant = {config.variant!r} keeps one table per layer, {list(layout.layer_ids)}, "
                    f"and layer {layer} was asked for"
                ),
                "open_table(…, layer=…) opens one; a table for all layers has the variants "
                f"{', '.join(name for name, rules in VARIANTS.items() if rules.one_table)}",
            )
        place = layout.layer_ids.index(layer)
        # What the released layouts' config.json needs of it (`sense_v2.engram.released.exporting`).
        of_layer = {"layer": layer, "table_size": config.table_size}
        of_layer |= {} if config.pad_token_id is None else {"pad_token_id": config.pad_token_id}
    return {
        "num_embeddings": layout.num_rows_L[place],
        "embedding_dim": config.row_dim,
        "dtype": config.dtype,
        "seed": config.seed,
        "init_std": config.init_std,
        "sparse": config.sparse,
        "provenance": {
            "variant": config.variant,
            **of_layer,
            "seed": config.seed,
            "layout": layout.to_dict(),
            "compressed_vocab_size": tokenizer.compressed_vocab_size,
            "shadow_map_sha256": tokenizer.sha256,
            "tokenizer_name": config.tokenizer_name or tokenizer.tokenizer_name,
        },
    }


class ShortConv(nn.Conv1d):
    """A depthwise convolution [B, X, T] -> [B, X, T]; position t reads t and before, or is centred.

    A module of its own, so that its weight is read in its forward alone: what offloads weights brings them there.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int, *, causal: bool) -> None:
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=(kernel_size - 1) * dilation // 2,
            dilation=dilation,
            groups=channels,
            # A bias would add a constant to every position, padding and n-grams never seen included.
            bias=False,
        )
        self.causal = causal

    @property
    def reach(self) -> int:
        """How many positions back it reads."""
        span = (self.kernel_size[0] - 1) * self.dilation[0]
        return span if self.causal else span // 2

    def forward(
        self, inputs_BXT: torch.Tensor, sequence_ids_BT: torch.Tensor | None = None, *, num_last: int | None = None
    ) -> torch.Tensor:
        """Convolve tap by tap: each can stop at its document's border, a position has the same bits however many come
        with it, and on a processor it takes a third of `nn.Conv1d`'s time for few positions, as much for many. With
        `num_last` only so many of the last positions are computed."""
        num_positions, (dilation,) = inputs_BXT.shape[-1], self.dilation
        num_last = num_positions if num_last is None else num_last
        skipped = num_positions - num_last
        span = (self.kernel_size[0] - 1) * dilation
        before, after = max(self.reach - skipped, 0), span - self.reach
        padded_BXQ = F.pad(inputs_BXT, (before, after)) if before or after else inputs_BXT
        start = skipped - self.reach + before
        same = None if sequence_ids_BT is None else boundary_masks(None, sequence_ids_BT, farthest=span)
        total_BXT: torch.Tensor | None = None
        for tap, weight_X1 in enumerate(self.weight.unbind(-1)):
            first = tap * dilation
            tapped_BXT = padded_BXQ[..., start + first : start + first + num_last] * weight_X1
            # A tap is used where t and t - back, and all between, are of one document; looking forward from t is
            # looking back from t + n.
            back = self.reach - first
            same_BT = None if same is None else same[abs(back)]
            if same_BT is not None:
                same_BT = same_BT if back >= 0 else F.pad(same_BT[:, -back:], (0, min(-back, num_positions)))
                tapped_BXT = tapped_BXT * same_BT[:, None, skipped:]
            total_BXT = tapped_BXT if total_BXT is None else total_BXT + tapped_BXT
        assert total_BXT is not None
        return total_BXT


class StreamRMSNorm(nn.Module):
    """RMSNorm over C with a weight per residual stream, computed in float32: [..., S, C] -> [..., S, C]."""

    def __init__(self, num_streams: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_streams, hidden_size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.eps)
        return normed * self.weight.float()


class EngramGate(nn.Module):
    """α in float32: how much of the memory each position takes. A forward hook on it sees every gate.

    `hidden_BTSC`, `key_BTSC` (None for a gate that is open) -> `alpha_BTS`.
    """

    def __init__(self, kind: str, num_streams: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.kind = kind
        if kind != "open":
            self.query_norm = StreamRMSNorm(num_streams, hidden_size, eps)
            self.key_norm = StreamRMSNorm(num_streams, hidden_size, eps)

    def forward(self, hidden_BTSC: torch.Tensor, key_BTSC: torch.Tensor | None) -> torch.Tensor:
        if key_BTSC is None:
            return torch.ones(hidden_BTSC.shape[:-1], device=hidden_BTSC.device)
        score_BTS = (self.query_norm(hidden_BTSC) * self.key_norm(key_BTSC)).sum(-1)
        score_BTS = score_BTS / math.sqrt(hidden_BTSC.shape[-1])
        if self.kind == "signed_sqrt":
            score_BTS = score_BTS.abs().clamp_min(1e-6).sqrt() * score_BTS.sign()
        return score_BTS.sigmoid()


class EngramFusionLayer(nn.Module):
    """Adds what the table knows about the last few tokens to a layer's hidden states.

    Args:
        config: The memory. `enabled=False` makes a layer that passes hidden states through and opens no file.
        backbone_hidden_size: C.
        layer_id: One of `config.layer_indices`: the layer whose rows it looks up.
        tokenizer: The shadow map, shared between layers; opened from `config.shadow_map_path` if not given.
        storage: The table, shared between layers; opened from `config.storage_path`, or created, if not given.
        pad_token_id: A token id, for a configuration and a table that name none.
        place: The layer of the model that it stands before, if that isn't `layer_id`: a released table may stand
            before any layer.

    Raises:
        ValueError: A setting isn't allowed, or the table or map doesn't match the configuration.
    """

    def __init__(
        self,
        config: EngramConfig,
        backbone_hidden_size: int,
        layer_id: int,
        *,
        tokenizer: EngramTokenizer | None = None,
        storage: RowSource | None = None,
        pad_token_id: int | None = None,
        place: int | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.layer_id = layer_id if place is None else place
        """The layer of the model that it stands before."""
        self.enabled = config.enabled
        if not self.enabled:
            return
        rules = VARIANTS[config.variant]
        if not config.causal and rules.conv_kernel and rules.conv_kernel % 2 == 0:
            raise with_way_out(
                ValueError(
                    f"EngramConfig.causal = False: the {rules.conv_kernel}-tap convolution of variant "
                    f"{config.variant!r} has no centre"
                ),
                "use variant 'sense'",
            )
        self.tokenizer = EngramTokenizer(config.paths()[1]) if tokenizer is None else tokenizer
        self.storage: RowSource = open_table(config, self.tokenizer) if storage is None else storage
        self.hasher = NgramHasher.from_config(
            config,
            layer_id=layer_id,
            compressed_vocab_size=self.tokenizer.compressed_vocab_size,
            pad_id=self._pad_id(pad_token_id),
            num_spare_ids=self.tokenizer.num_spare_ids,
        )
        self.num_streams = config.num_streams
        self.hidden_size = backbone_hidden_size
        channels = config.num_streams * backbone_hidden_size
        self.W_k = (
            nn.Linear(config.engram_dim, channels, bias=rules.projection_bias) if rules.gate != "open" else None
        )
        self._parts = 1 + config.total_heads if rules.averages else 1
        """What the sum of hidden states and memory is divided by."""
        self.W_v = nn.Linear(config.engram_dim, backbone_hidden_size, bias=rules.projection_bias)
        self.gate = EngramGate(rules.gate, config.num_streams, backbone_hidden_size, rules.gate_norm_eps)
        self.conv_norm = (
            StreamRMSNorm(config.num_streams, backbone_hidden_size, rules.conv_norm_eps)
            if rules.conv_norm_eps is not None
            else None
        )
        dilation = max(config.ngram_orders) if rules.conv_dilation == "largest_order" else 1
        self.conv = (
            ShortConv(channels, rules.conv_kernel, dilation, causal=config.causal) if rules.conv_kernel else None
        )
        self.overlays: Callable[[torch.Tensor, RowSource], torch.Tensor] | None = None
        """Looks up, in the table, row ids that say which of several overlays they go through, if there are any."""
        self.use_storage(self.storage)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.enabled:
            self.use_storage(self.storage)  # a copy answers for itself

    def use_storage(self, storage: RowSource) -> None:
        """Look up, and train, through `storage` from here on."""
        self.storage = storage
        self.handle = operators.handle_of(self, storage.manifest.commit)

    def _pad_id(self, pad_token_id: int | None) -> int:
        """The table's own: what a model calls its pad token can change between two attachings, its rows don't."""
        pad_id = compressed_pad_id(self.config, self.tokenizer, pad_token_id)
        recorded = self.storage.recorded_pad_id(pad_id)
        if recorded != pad_id and self.config.pad_token_id is not None:
            raise with_way_out(
                ValueError(
                    f"EngramConfig.pad_token_id = {self.config.pad_token_id} is compressed id {pad_id}, and the "
                    f"rows of {self.storage.path} were trained with {recorded} as the pad id"
                ),
                "leave pad_token_id at None to take the table's",
            )
        return recorded

    @property
    def reach(self) -> int:
        """How many positions back a position's memory depends on, by its n-grams and the convolution."""
        return max(max(self.config.ngram_orders) - 1, 0 if self.conv is None else self.conv.reach)

    def reset_parameters(self) -> None:
        """Make the layer add nothing: the convolution is zero, and W_v or the rows behind it. W_k stays noise."""
        if self.W_k is not None:
            self.W_k.reset_parameters()
        if self.storage.is_new and self.storage.manifest.init_std == 0:
            # So that a row of length 1 gives a value of length 1, in whatever direction it points.
            nn.init.normal_(self.W_v.weight, std=self.hidden_size**-0.5)
        else:
            nn.init.zeros_(self.W_v.weight)
        if self.W_v.bias is not None:
            nn.init.zeros_(self.W_v.bias)
        if self.conv is not None:
            nn.init.zeros_(self.conv.weight)

    def row_ids(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hash token ids [B, T] to the row ids [B, T, H] that each position looks up."""
        return self.hasher(self.tokenizer(input_ids), attention_mask=attention_mask, sequence_ids=sequence_ids)

    def hash_tokens(self, *call: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer `operators.hash_tokens`."""
        return hash_tokens(self.tokenizer, [self.hasher], *call)  # type: ignore[arg-type]

    def lookup(self, row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Read the memory [B, T, E]. It is zero at masked positions, whose rows are neither read nor trained."""
        if not torch.compiler.is_compiling():
            return self.read_rows(row_ids_BTH, valid_BT)
        if self._trains_rows:
            return self._read_outside_of_the_graph(row_ids_BTH, valid_BT)
        width, dtype = self.config.engram_dim, self.storage.dtype
        return operators.read_rows(row_ids_BTH, valid_BT, width, dtype, self.handle)

    def read_rows(self, row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None) -> torch.Tensor:
        """Do what `lookup` does without a compiler; answers `operators.read_rows`."""
        weight: Any = self.W_v.weight
        is_frozen = isinstance(weight, torch.Tensor) and not (weight.requires_grad or weight.is_meta)
        if self._trains_rows and is_frozen and not weight.any():
            raise with_way_out(
                ValueError(
                    f"memory layer {self.layer_id}: W_v is zero and frozen, so no gradient can ever reach the rows"
                ),
                "unfreeze W_v, or freeze the rows too (storage.requires_grad_(False))",
            )
        if valid_BT is None or bool(valid_BT.all()):
            rows_BTHD = self._rows(row_ids_BTH)
        else:
            rows_BTHD = torch.zeros(
                *row_ids_BTH.shape, self.storage.embedding_dim, dtype=self.storage.dtype, device=row_ids_BTH.device
            )
            rows_BTHD = rows_BTHD.index_put((valid_BT,), self._rows(row_ids_BTH[valid_BT]))
        return rows_BTHD.flatten(-2)

    def _rows(self, row_ids: torch.Tensor) -> torch.Tensor:
        return self.storage(row_ids) if self.overlays is None else self.overlays(row_ids, self.storage)

    # A graph knows nothing of the storage, which the rows' gradient goes to.
    _read_outside_of_the_graph = torch.compiler.disable(read_rows)

    @property
    def _trains_rows(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.storage.rows_require_grad

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        row_ids_BTH: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        valid_BT: torch.Tensor | None = None,
        documents_BQ: torch.Tensor | None = None,
        remember: Callable[[torch.Tensor], torch.Tensor] | None = None,
        places_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the memory to hidden states: hidden + α·V + conv(α·V), or take the mean, as the variant has it.

        Takes token ids, or what an attached model has prepared of them: row ids, or the memory itself. A forward
        pre-hook may put `memory` in place of what would be looked up.

        At a masked position hidden states pass through unchanged. Its rows are not touched, no n-gram reaches across
        it, and the convolution reads zeros there. (Across padding in the middle of a sequence that is shorter than
        the convolution's reach, the convolution still reads what lies before it.)

        Args:
            hidden_states: [B, T, C], or [B, T, S, C] with S streams.
            input_ids: Token ids [B, T].
            attention_mask: [B, T], 0 at padding; goes with `input_ids`.
            position_ids: [B, T] or [1, T]; goes with `input_ids`. Positions that go back begin a packed document, and
                nothing reaches from one document into the next.
            row_ids_BTH: Row ids, in place of token ids.
            memory: [B, T, E], in place of rows that are looked up.
            valid_BT: Boolean, False at padding; goes with `row_ids_BTH` and `memory`.
            documents_BQ: The packed document of each position that the convolution reads.
            remember: Called with what the convolution reads of these positions, [B, T, X], if a sequence comes in
                parts. Keeps it, and returns that of all Q positions that these can reach. Without it Q is T.
            places_T: Where these positions, of a batch of one, are among all that `remember` returns; without it, the
                last T of each row.

        Returns:
            Fused hidden states, of the shape and dtype of `hidden_states`.

        Raises:
            ValueError: A shape doesn't fit.
            IndexError: A token id is outside the shadow map.
            TypeError: There are neither token ids nor row ids nor memory.
        """
        if not self.enabled:
            return hidden_states
        if input_ids is not None:
            rows = token_rows(
                self.tokenizer, [self.hasher], input_ids, attention_mask, position_ids, handle=self.handle
            )
            row_ids_BTH, valid_BT, documents_BQ = rows.row_ids_LBTH[0], rows.valid_BT, rows.documents_BQ
            streams = () if hidden_states.dim() == 3 and self.num_streams == 1 else (self.num_streams,)
            expected = (*input_ids.shape, *streams, self.hidden_size)
            if hidden_states.shape != expected:
                raise ValueError(f"hidden_states have shape {tuple(hidden_states.shape)}; expected {expected}")
        if memory is None:
            if row_ids_BTH is None:
                raise TypeError("a fusion layer takes input_ids, row_ids_BTH or memory beside hidden_states")
            memory = self.lookup(row_ids_BTH, valid_BT)
        weight: Any = self.W_v.weight
        if not (isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.itemsize > 1):
            weight = hidden_states  # the projection was quantized
        memory = memory.to(device=hidden_states.device, dtype=weight.dtype)

        hidden_BTSC = hidden_states if hidden_states.dim() == 4 else hidden_states[:, :, None]
        key_BTSC = None
        if self.W_k is not None:
            key_BTSC = self.W_k(memory).unflatten(-1, (self.num_streams, self.hidden_size))
        value_BT1C = self.W_v(memory)[:, :, None]
        alpha_BTS1 = self.gate(hidden_BTSC, key_BTSC)[..., None]
        gated_BTSC = alpha_BTS1.to(value_BT1C.dtype) * value_BT1C
        if valid_BT is not None:
            gated_BTSC = gated_BTSC * valid_BT[..., None, None]
        delta_BTSC = gated_BTSC
        if self.conv is not None:
            delta_BTSC = gated_BTSC + self._mixed(gated_BTSC, self.conv, valid_BT, documents_BQ, remember, places_T)
        fused = hidden_states + delta_BTSC.reshape(hidden_states.shape).to(hidden_states.dtype)
        if self._parts == 1:
            return fused
        mean = fused / self._parts
        if valid_BT is None:
            return mean
        return torch.where(valid_BT.view(*valid_BT.shape, *[1] * (mean.dim() - 2)), mean, hidden_states)

    def _mixed(
        self,
        gated_BTSC: torch.Tensor,
        conv: ShortConv,
        valid_BT: torch.Tensor | None,
        documents_BQ: torch.Tensor | None,
        remember: Callable[[torch.Tensor], torch.Tensor] | None,
        places_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute conv(α·V), [B, T, S, C]; see `forward`."""
        mixed_BTSC = gated_BTSC
        if self.conv_norm is not None:
            mixed_BTSC = self.conv_norm(mixed_BTSC).to(gated_BTSC.dtype)
        inputs_BQX = mixed_BTSC.flatten(-2)
        if remember is not None:
            inputs_BQX = remember(inputs_BQX)
        num_last = gated_BTSC.shape[1] if places_T is None else None
        mixed_BTX = conv(inputs_BQX.transpose(1, 2), documents_BQ, num_last=num_last).transpose(1, 2)
        if places_T is not None:
            mixed_BTX = mixed_BTX.flatten(0, 1)[None, places_T]
        mixed_BTSC = mixed_BTX.unflatten(-1, (self.num_streams, self.hidden_size))
        if self.conv_norm is not None:
            mixed_BTSC = F.silu(mixed_BTSC)
        if valid_BT is not None:
            mixed_BTSC = mixed_BTSC * valid_BT[..., None, None]
        return mixed_BTSC


def compressed_pad_id(config: EngramConfig, tokenizer: EngramTokenizer, pad_token_id: int | None) -> int:
    """Find the compressed id that stands for positions before a sequence: of the configuration's pad token, else
    `pad_token_id`, else the map's tokenizer's, else token 0."""
    candidates = (config.pad_token_id, pad_token_id, tokenizer.pad_token_id, 0)
    token_id = next(candidate for candidate in candidates if candidate is not None)
    if not 0 <= token_id < tokenizer.vocab_size:
        raise with_way_out(
            ValueError(f"pad_token_id = {token_id} is outside the shadow map's {tokenizer.vocab_size} token ids"),
            "set EngramConfig.pad_token_id to one of them",
        )
    return int(tokenizer(torch.tensor([token_id]))[0])
