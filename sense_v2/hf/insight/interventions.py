"""A live model's memory, changed for a while: off, a layer or head off, other rows, another gate.

Each function here is a context manager. Inside it the model computes with the change; afterwards it is the object it
was, whatever ended the block. The changes are forward hooks on fusion layers, gates and projections, and another
`hasher` of a fusion layer, so weights and table aren't touched.

    with memory_off(model):
        model(input_ids=token_ids_BT, use_cache=False)

A KV cache that was filled with the memory in another state doesn't go with these; pass `use_cache=False`.

L layers with memory, B batch, T sequence, S residual streams, H rows a position, D row width, U unique rows, E width
of the memory vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import with_way_out
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.model import EngramFusionLayer
from sense_v2.hf.experiments.controls import PermutedHasher
from sense_v2.hf.memory import EngramMemory, memory_of


@contextmanager
def _hooks() -> Iterator[ExitStack]:
    """Hooks while the block lasts, in which nothing runs compiled: a compiled model has no guard on hooks."""
    with torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        yield hooks


@contextmanager
def memory_off(model: torch.nn.Module, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Let hidden states pass these layers (their numbers; all by default) as if no memory were attached.

    `model.disable_memory()` is the same, as a method. A memory may be given in the model's place.
    """
    memory = model if isinstance(model, EngramMemory) else memory_of(model)

    def pass_on(fusion: torch.nn.Module, args: Any, kwargs: dict[str, Any], fused: torch.Tensor) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    with _hooks() as hooks:
        for fusion in _named(memory, layers):
            hooks.enter_context(fusion.register_forward_hook(pass_on, with_kwargs=True))
        yield


@contextmanager
def gate_forced(memory: EngramMemory, alpha: float) -> Iterator[None]:
    """Set every gate of every layer to `alpha`, from 0 (shut) to 1 (open)."""

    def constant(gate: torch.nn.Module, args: Any, alpha_BTS: torch.Tensor) -> torch.Tensor:
        return torch.full_like(alpha_BTS, alpha)

    with _hooks() as hooks:
        for fusion in memory:
            # Before other hooks, so that these see the gate that is used.
            hooks.enter_context(fusion.gate.register_forward_hook(constant, prepend=True))
        yield


@contextmanager
def rows_shuffled(memory: EngramMemory, seed: int) -> Iterator[None]:
    """Deal a batch's rows to its positions at random, each position's H rows together."""
    with _hashers(memory, lambda fusion: PermutedHasher(fusion.hasher, seed + fusion.layer_id)):
        yield


@contextmanager
def one_row_per_head(memory: EngramMemory, row_ids_LH: torch.Tensor) -> Iterator[None]:
    """Look up the same row of each head at every position: a table of capacity one."""
    row_ids = dict(zip(memory, row_ids_LH, strict=True))
    with _hashers(memory, lambda fusion: ConstantHasher(fusion.hasher, row_ids[fusion])):
        yield


class ConstantHasher:
    """A hasher with the same row ids, [H], for every position."""

    def __init__(self, hasher: NgramHasher, row_ids_H: torch.Tensor) -> None:
        self.row_ids_H = row_ids_H
        self.pad_id, self.look_back = hasher.pad_id, hasher.look_back

    def __call__(self, compressed_ids_BT: torch.Tensor, **masks: Any) -> torch.Tensor:
        return self.row_ids_H.to(compressed_ids_BT.device).expand(*compressed_ids_BT.shape, -1)


@contextmanager
def heads_off(memory: EngramMemory, layer: int, heads: Sequence[int]) -> Iterator[None]:
    """Make these heads of that layer (0 to H - 1, ordered as the memory vector is) read zeros, as if all their rows
    were."""

    def without(projection: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        rows_BTHD = args[0].unflatten(-1, (-1, memory.config.row_dim)).clone()
        rows_BTHD[..., list(heads), :] = 0
        return (rows_BTHD.flatten(-2),)

    with _hooks() as hooks:
        for fusion in _named(memory, [layer]):
            for projection in filter(None, (fusion.W_k, fusion.W_v)):
                hooks.enter_context(projection.register_forward_pre_hook(without))
        yield


@contextmanager
def rows_of_noise(memory: EngramMemory, std_LH: torch.Tensor, seed: int) -> Iterator[None]:
    """Make every row noise of that head's deviation, the same noise wherever the row is looked up: a fresh table that
    takes no room."""
    std = dict(zip(memory, std_LH, strict=True))

    def drawn(fusion: EngramFusionLayer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        row_ids_BTH, valid_BT = kwargs["row_ids_BTH"], kwargs["valid_BT"]
        ids_U, inverse = np.unique(row_ids_BTH.cpu().numpy(), return_inverse=True)
        rows_UD = torch.from_numpy(noise_rows(ids_U, fusion.storage.embedding_dim, seed))
        rows_BTHD = rows_UD[torch.from_numpy(inverse.reshape(row_ids_BTH.shape))] * std[fusion][:, None]
        if valid_BT is not None:
            rows_BTHD = rows_BTHD * valid_BT.cpu()[..., None, None]
        return args, {**kwargs, "memory": rows_BTHD.flatten(-2)}

    with _hooks() as hooks:
        for fusion in memory:
            hooks.enter_context(fusion.register_forward_pre_hook(drawn, with_kwargs=True))
        yield


def noise_rows(row_ids_U: np.ndarray[Any, Any], width: int, seed: int) -> np.ndarray[Any, Any]:
    """float32 [U, width], standard normal: a row's values depend on its id and the seed alone.

    SplitMix64 of each value's number gives the uniform draw, the normal quantile the value.
    """
    with np.errstate(over="ignore"):
        start = np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        numbers = row_ids_U.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(width, dtype=np.uint64) + start
        z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    # The middle of one of 2^53 equal parts, so that neither 0 nor 1 comes up.
    uniform = ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    normal: np.ndarray[Any, Any] = torch.special.ndtri(torch.from_numpy(uniform)).float().numpy()
    return normal


def _named(memory: EngramMemory, layers: Sequence[int] | None) -> list[EngramFusionLayer]:
    known = [fusion.layer_id for fusion in memory]
    unknown = [layer for layer in layers or () if layer not in known]
    if unknown:
        raise with_way_out(
            ValueError(f"layer {unknown[0]} has no memory"), f"layers {', '.join(map(str, known))} have"
        )
    return [fusion for fusion in memory if layers is None or fusion.layer_id in layers]


@contextmanager
def _hashers(memory: EngramMemory, replacement: Callable[[EngramFusionLayer], Any]) -> Iterator[None]:
    """Hash each layer's tokens by `replacement(layer)` instead."""
    before = [(fusion, fusion.hasher) for fusion in memory]
    try:
        for fusion in memory:
            fusion.hasher = replacement(fusion)
        yield
    finally:
        for fusion, own in before:
            fusion.hasher = own
