"""A live model's memory, changed for a while: off, a layer or head off, other rows, another gate.

Each function here is a context manager. Inside it the model computes with the change; afterwards it is the object it
was, whatever ended the block. Nothing is written: methods of the fusion layers are covered by others on the same
objects, and uncovered again, so weights, hooks and table aren't touched and forward hooks see what they always see.

    with memory_off(memory_of(model)):
        model(input_ids=token_ids_BT, use_cache=False)

Calls with a KV cache of another state of the memory don't mix with these; pass `use_cache=False`.

L layers with memory, B batch, T sequence, S residual streams, H rows a position, D row width, U unique rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sense_v2.engram.model import EngramFusionLayer
from sense_v2.hf.memory import EngramMemory
from sense_v2.hf.training.controls import PermutedHasher


@contextmanager
def memory_off(memory: EngramMemory, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Hidden states pass these layers (their numbers; all by default) as if no memory were attached."""

    def pass_on(fusion: EngramFusionLayer) -> Callable[..., torch.Tensor]:
        return lambda hidden_states, memory, **masks: hidden_states

    with _covered(_named(memory, layers), "fuse", pass_on):
        yield


@contextmanager
def gate_forced(memory: EngramMemory, alpha: float) -> Iterator[None]:
    """Every gate of every layer is `alpha`, from 0 (shut) to 1 (open)."""

    def constant(gate: torch.nn.Module) -> Callable[..., torch.Tensor]:
        # Shape [B, T, S], float32, as the gate's own.
        return lambda hidden_BTSC, key_BTSC: torch.full(
            hidden_BTSC.shape[:-1], alpha, dtype=torch.float32, device=hidden_BTSC.device
        )

    with _covered([fusion.gate for fusion in memory], "forward", constant):
        yield


@contextmanager
def rows_shuffled(memory: EngramMemory, seed: int) -> Iterator[None]:
    """A batch's rows are dealt to its positions at random, each position's H rows together."""
    with _covered(memory, "hasher", lambda fusion: PermutedHasher(fusion.hasher, seed + fusion.layer_id)):
        yield


@contextmanager
def one_row_per_head(memory: EngramMemory, row_ids_LH: torch.Tensor) -> Iterator[None]:
    """Every position looks up the same row of each head: a table of capacity one."""
    place = {fusion.layer_id: number for number, fusion in enumerate(memory)}

    def constant(fusion: EngramFusionLayer) -> Callable[..., torch.Tensor]:
        row_ids_H = row_ids_LH[place[fusion.layer_id]]
        return lambda compressed_BT, **masks: row_ids_H.to(compressed_BT.device).expand(*compressed_BT.shape, -1)

    with _covered(memory, "hasher", constant):
        yield


@contextmanager
def heads_off(memory: EngramMemory, layer: int, heads: Sequence[int]) -> Iterator[None]:
    """These heads of that layer (0 to H - 1, ordered as the memory vector is) read zeros: as if all their rows
    were."""

    def without(fusion: EngramFusionLayer) -> Callable[..., torch.Tensor]:
        lookup = fusion.lookup

        def zeroed(row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
            rows_BTHD = lookup(row_ids_BTH, valid_BT).unflatten(-1, (row_ids_BTH.shape[-1], -1)).clone()
            rows_BTHD[..., list(heads), :] = 0
            return rows_BTHD.flatten(-2)

        return zeroed

    with _covered(_named(memory, [layer]), "lookup", without):
        yield


@contextmanager
def rows_of_noise(memory: EngramMemory, std_LH: torch.Tensor, seed: int) -> Iterator[None]:
    """Every row is noise of that head's deviation, the same noise wherever the row is looked up: a fresh table that
    takes no room."""
    place = {fusion.layer_id: number for number, fusion in enumerate(memory)}

    def noise(fusion: EngramFusionLayer) -> Callable[..., torch.Tensor]:
        std_H = std_LH[place[fusion.layer_id]]

        def drawn(row_ids_BTH: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
            ids_U, inverse = np.unique(row_ids_BTH.cpu().numpy(), return_inverse=True)
            rows_UD = torch.from_numpy(noise_rows(ids_U, fusion.storage.embedding_dim, seed))
            rows_BTHD = rows_UD[torch.from_numpy(inverse.reshape(row_ids_BTH.shape))] * std_H[:, None]
            if valid_BT is not None:
                rows_BTHD = rows_BTHD * valid_BT.cpu()[..., None, None]
            return rows_BTHD.flatten(-2).to(row_ids_BTH.device)

        return drawn

    with _covered(memory, "lookup", noise):
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
        raise ValueError(f"layer {unknown[0]} has no memory; layers {', '.join(map(str, known))} have")
    return [fusion for fusion in memory if layers is None or fusion.layer_id in layers]


@contextmanager
def _covered(objects: Iterable[Any], name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, `name` of each object is `replacement(object)`; then what the object itself had, or nothing,
    where it was its class's."""
    objects = list(objects)
    missing = object()
    before = [vars(one).get(name, missing) for one in objects]
    try:
        for one in objects:
            vars(one)[name] = replacement(one)
        yield
    finally:
        for one, own in zip(objects, before, strict=True):
            if own is missing:
                vars(one).pop(name, None)
            else:
                vars(one)[name] = own
