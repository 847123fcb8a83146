"""The published architectures as one table. Goes in: a variant's name. Comes out: what makes it different.

A variant is data: how head sizes are chosen, whether layers share a table, which gate and which convolution. Code
elsewhere asks for these fields and never for a name, so that a new variant is a new row here.

Sources: `paper` is the demo configuration of Engram (arXiv 2601.07372); `deepseek_v41` the layout of the released
DeepSeek-V4.1 tables; `qwen_ple` the per-layer embedding of Qwen4-Exp, as transformers has it (models/qwen4_exp);
`longcat_flash` the n-grams at the input embedding of LongCat-Flash-Lite (arXiv 2601.21204), as its own code has them
(modeling_longcat_ngram.py in the model's repository); `sense` this project's own, with one table of a given size for
all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out


@dataclass(frozen=True)
class Variant:
    name: str
    """As `EngramConfig.variant` spells it."""
    head_sizes: str
    """budget: distinct primes just below table_size / (layers × heads), together at most table_size rows.
    per_head: distinct primes just above table_size, one after the other over layers, orders and heads.
    by_twos: table_size + 1, + 3, + 5, …, in each layer; no primes."""
    one_table: bool
    """True: all layers' heads lie one after the other in one table. False: each layer has its own, from row 0."""
    gate: str
    """sigmoid: σ(s); signed_sqrt: σ(sign(s)·√max(|s|, 1e-6)), with s = norm(h)·norm(k)/√C; open: 1, without keys."""
    conv_kernel: int
    """Taps of the short depthwise convolution; 0: none."""
    conv_dilation: str
    """one, or largest_order: taps stand that many positions apart."""
    gate_norm_eps: float
    """Of the RMSNorms of query and key."""
    conv_norm_eps: float | None
    """Not None: the convolution's input is RMS-normed with this epsilon, and its output goes through SiLU."""
    projection_bias: bool
    """Whether W_k and W_v have a bias."""
    compresses: bool = True
    """Whether token ids go through a shadow map first. False: a compressed id is the token id."""
    lookback_ends: str = "padding"
    """What no n-gram reaches across. padding: padding alone. end_of_sequence: the pad id's token as well, which is
    the model's end of a sequence here and belongs to the sequence that it ends."""
    multipliers: str = "numpy"
    """Where the hash multipliers come from. numpy: its generator, seeded with the layer's number in the model.
    splitmix64: that sequence, seeded with the layer's place among those with memory. powers: those of the number of
    ids, so that ids are digits; products are added, not XORed, and what lies before a sequence counts as 0 instead of
    the pad id."""
    vocab_size: int | None = None
    """Where tokens aren't compressed: the published model's vocab_size, which the multipliers depend on. It counts
    more ids than its tokenizer has tokens."""
    averages: bool = False
    """False: h + α·V. True: (h + α·V) / (1 + H), the mean of the hidden states and the H rows, each projected."""
    row_multiple: int = 1
    """A table's rows are filled up to a multiple of this; the last ones belong to no head."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The published values of `EngramConfig` fields."""


VARIANTS: dict[str, Variant] = {
    "sense": Variant(
        name="sense",
        head_sizes="budget",
        one_table=True,
        gate="sigmoid",
        conv_kernel=3,
        conv_dilation="one",
        gate_norm_eps=1e-6,
        conv_norm_eps=None,
        projection_bias=True,
    ),
    "paper": Variant(
        name="paper",
        head_sizes="per_head",
        one_table=True,
        gate="signed_sqrt",
        conv_kernel=4,
        conv_dilation="largest_order",
        # What torch.nn.RMSNorm takes by default in float32.
        gate_norm_eps=1.1920928955078125e-07,
        conv_norm_eps=1e-5,
        projection_bias=True,
        defaults={
            "table_size": 646_400,
            "engram_dim": 1024,
            "num_heads": 8,
            "ngram_orders": [2, 3],
            "layer_indices": [1, 15],
            "normalization": "deepseek",
            "pad_token_id": 2,
            "seed": 0,
        },
    ),
    "deepseek_v41": Variant(
        name="deepseek_v41",
        head_sizes="per_head",
        one_table=False,
        gate="signed_sqrt",
        conv_kernel=0,
        conv_dilation="one",
        gate_norm_eps=1e-6,
        conv_norm_eps=None,
        projection_bias=False,
        defaults={
            "table_size": 16_000_000,
            "engram_dim": 6144,
            "num_heads": 8,
            "ngram_orders": [2, 3, 4],
            "layer_indices": [1, 14],
            "normalization": "deepseek",
            "pad_token_id": 2,
            "seed": 0,
        },
    ),
    "qwen_ple": Variant(
        name="qwen_ple",
        head_sizes="per_head",
        one_table=False,
        gate="signed_sqrt",
        conv_kernel=4,
        conv_dilation="largest_order",
        gate_norm_eps=1e-6,
        conv_norm_eps=1e-6,
        projection_bias=False,
        compresses=False,
        vocab_size=248_320,
        lookback_ends="end_of_sequence",
        multipliers="splitmix64",
        row_multiple=128,
        defaults={
            "table_size": 20_000_000,
            "engram_dim": 2560,
            "num_heads": 8,
            "ngram_orders": [2, 3],
            # The model's ple_layer_ids, [2], count from 1.
            "layer_indices": [1],
            "pad_token_id": 248_044,
            "seed": 1234,
        },
    ),
    "longcat_flash": Variant(
        name="longcat_flash",
        head_sizes="by_twos",
        one_table=False,
        gate="open",
        conv_kernel=0,
        conv_dilation="one",
        gate_norm_eps=1e-6,
        conv_norm_eps=None,
        projection_bias=False,
        compresses=False,
        vocab_size=131_072,
        lookback_ends="end_of_sequence",
        multipliers="powers",
        averages=True,
        defaults={
            # ngram_vocab_size_ratio × vocab_size
            "table_size": 78 * 131_072,
            "engram_dim": 3072,
            "num_heads": 4,
            "ngram_orders": [2, 3, 4],
            # What enters the first layer is the token embedding.
            "layer_indices": [0],
            "pad_token_id": 2,
            "seed": 0,
        },
    ),
}


def variant_config(name: str, **overrides: Any) -> EngramConfig:
    """The `EngramConfig` a variant was published with, changed by `overrides`.

    Raises `ValueError` for an unknown name, an unknown field or a value that isn't allowed.

    >>> variant_config("paper", storage_path="paper.dat").table_size
    646400
    """
    if name not in VARIANTS:
        raise with_way_out(ValueError(f"no variant {name!r}"), f"there are {', '.join(VARIANTS)}")
    if "variant" in overrides:
        raise with_way_out(
            ValueError(f"variant_config({name!r}, variant={overrides['variant']!r})"), "name one variant"
        )
    defaults = {k: list(v) if isinstance(v, list) else v for k, v in VARIANTS[name].defaults.items()}
    return EngramConfig.from_dict({**defaults, "variant": name, **overrides})
