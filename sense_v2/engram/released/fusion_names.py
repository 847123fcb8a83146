"""A released checkpoint's fusion tensors <-> those of `EngramFusionLayer`, by name.

    deepseek_v41   layers.{i}.engram.wkv.weight   F8_E4M3 [(S + 1)·C, engram_dim], with .scale F8_E8M0, one for
                   32 × 32 values: the keys of all streams, then the value; q_weight and k_weight BF16 [S, C]
    qwen_ple       …layers.{i}.ple.key_proj, value_proj, conv1d, norm_key, norm_query, norm_conv: BF16, the norms
                   [S·C] and kept as what they differ from 1 by

Matrices may be BF16, F16 or F32 in a checkpoint that is read; they are written as above.

C hidden size, S residual streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sense_v2.engram.table.compact_rows import BLOCK_VALUES, FLOAT8_MAX

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FusionName:
    """One tensor of a layer, under both names."""

    theirs: str
    """Behind the layer's own prefix."""
    ours: tuple[str, ...]
    """Of `EngramFusionLayer.state_dict()`; two lie one behind the other in theirs, the last one C rows high."""
    blocks: bool = False
    """Written as float8 with a scale for each block of 32 × 32."""
    is_norm: bool = False
    """[S, C] here."""
    less_one: bool = False
    """Theirs is ours less 1, flat."""


FUSION_NAMES: dict[str, tuple[FusionName, ...]] = {
    "deepseek_v41": (
        FusionName("engram.q_weight", ("gate.query_norm.weight",), is_norm=True),
        FusionName("engram.k_weight", ("gate.key_norm.weight",), is_norm=True),
        FusionName("engram.wkv.weight", ("W_k.weight", "W_v.weight"), blocks=True),
    ),
    "qwen_ple": (
        FusionName("ple.value_proj.weight", ("W_v.weight",)),
        FusionName("ple.key_proj.weight", ("W_k.weight",)),
        FusionName("ple.conv1d.weight", ("conv.weight",)),
        FusionName("ple.norm_query.weight", ("gate.query_norm.weight",), is_norm=True, less_one=True),
        FusionName("ple.norm_key.weight", ("gate.key_norm.weight",), is_norm=True, less_one=True),
        FusionName("ple.norm_conv.weight", ("conv_norm.weight",), is_norm=True, less_one=True),
    ),
}


def scale_name(theirs: str) -> str:
    """Of a matrix's block scales.

    >>> scale_name("engram.wkv.weight")
    'engram.wkv.scale'
    """
    return f"{theirs.removesuffix('.weight')}.scale"


def ours_from_theirs(variant: str, get: Callable[[str], torch.Tensor | None]) -> Tensors:
    """Return a layer's weights as float32. `get` gives the released tensors by `FusionName.theirs`, or None.

    Returns {} if there is none of them; raises `KeyError` with the name of one that is missing beside others.
    """
    found = {name.theirs: get(name.theirs) for name in FUSION_NAMES[variant]}
    if all(tensor is None for tensor in found.values()):
        return {}
    weights: Tensors = {}
    hidden_size = 0
    for name in FUSION_NAMES[variant]:
        tensor = found[name.theirs]
        if tensor is None:
            raise KeyError(name.theirs)
        values = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = get(scale_name(name.theirs))
            if scale is None:
                raise KeyError(scale_name(name.theirs))
            values = decode_blocks(tensor, scale)
        if not hidden_size:  # the first of each variant says it
            hidden_size = values.shape[1] if name.is_norm else values.shape[0]
        if name.is_norm:
            values = values.reshape(-1, hidden_size) + (1 if name.less_one else 0)
        parts = values.split([len(values) - hidden_size, hidden_size]) if len(name.ours) == 2 else [values]
        weights |= {ours: part.contiguous() for ours, part in zip(name.ours, parts, strict=True)}
    return weights


def theirs_from_ours(variant: str, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """Return one layer's weights as released tensors, by `FusionName.theirs` and `scale_name`."""
    tensors: Tensors = {}
    for name in FUSION_NAMES[variant]:
        values = torch.cat([weights[ours].detach().float().cpu() for ours in name.ours])
        if name.less_one:
            values = values.flatten() - 1
        if name.blocks:
            tensors[name.theirs], tensors[scale_name(name.theirs)] = encode_blocks(values)
        else:
            tensors[name.theirs] = values.to(torch.bfloat16)
    return tensors


def encode_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [R, K] -> codes, float8_e4m3fn [R, K], and scales, float8_e8m0fnu [⌈R/32⌉, ⌈K/32⌉]: the least power of
    two that keeps every code of the block in range. Raises `ValueError` for NaN and infinities."""
    if not bool(values.isfinite().all()):
        raise ValueError("a fusion weight is NaN or an infinity, for which float8 has no scale")
    num_rows, num_columns = values.shape
    padded = F.pad(values, (0, -num_columns % BLOCK_VALUES, 0, -num_rows % BLOCK_VALUES))
    blocks = padded.unflatten(1, (-1, BLOCK_VALUES)).unflatten(0, (-1, BLOCK_VALUES))
    largest = blocks.abs().amax(dim=(1, 3))
    # largest / 448 = mantissa × 2^exponent with a mantissa from 0.5 on: of 0.5 itself a smaller power is enough.
    mantissa, exponent = torch.frexp(largest.double() / FLOAT8_MAX)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-127, 127).where(largest > 0, 0)
    scales = (exponent + 127).to(torch.uint8)
    codes = (blocks * torch.exp2(-exponent.float())[:, None, :, None]).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).flatten(2).flatten(0, 1)[:num_rows, :num_columns].contiguous()
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode what `encode_blocks` gives: float32 [R, K]. Raises `ValueError` for scales of another shape."""
    expected = [-(-size // BLOCK_VALUES) for size in codes.shape]
    if list(scales.shape) != expected:
        raise ValueError(f"scales {list(scales.shape)} beside a matrix {list(codes.shape)}; expected {expected}")
    factors = torch.exp2(scales.view(torch.uint8).double() - 127).float()
    factors = factors.repeat_interleave(BLOCK_VALUES, 0).repeat_interleave(BLOCK_VALUES, 1)
    return codes.float() * factors[: codes.shape[0], : codes.shape[1]]
