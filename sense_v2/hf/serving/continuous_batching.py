"""transformers' continuous batching with memory: the memory's state in its paged cache.

    model.generate_batch ──manager──▶ PagedAttentionCache: L layers of keys and values, and E more for the memory
    model(input_ids, cache=…) ──▶ `paged_call`: tails read through the step's slots, row ids ──▶ `PagedCall.remember`

The manager makes its cache by the model's configuration. It is shown one with E layers more (`manager_with_memory`),
whose keys and values are the memory's: compressed id and overlay of each token, and what each fusion layer's
convolution reads. So pages, slots, block tables, copies for forks, offloading and the sizing of the cache are the
engine's own, and hold for the memory as for keys and values. A layer is filled as far as it is needed; what is less
than one costs one. `sense_v2.hf.serving.paged_state` says how a step's positions lie.

A request's overlay is said by its prompt's token ids (`sense_v2.hf.overlays.ids_with_overlay`), by which the engine
finds what requests can share. Keys and values of two overlays differ, and so do their ids.

(Of transformers' own this uses what the manager asks of a model, `init_continuous_batching` of the class, and
`layer_to_allocator` and `update` of the cache. It could go if a model could say what its paged cache holds beside
keys and values.)

N sequences, T new tokens, P positions of past, Q = T + N·P, E further layers, X channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sense_v2.core.errors import with_way_out
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.serving import paged_state
from sense_v2.hf.serving.paged_call import ID_DTYPE, TOKEN_VALUES, PagedCall


class _Seen:
    """An object as others are to see it: `changes` in place of its attributes. What is set, is set on the object."""

    def __init__(self, seen: Any, **changes: Any) -> None:
        vars(self).update(changes)
        vars(self)["seen"] = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["seen"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.seen, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.seen(*args, **kwargs)


def manager_with_memory(
    model: Any,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
) -> Any:
    """Do what the class's `init_continuous_batching` does, for a model with memory.

    Raises:
        ValueError: The memory can't be served so; before anything starts, as an error in the manager's thread would
            only be logged and every answer be empty.
    """
    from transformers import ContinuousBatchingConfig

    memory, config = memory_of(model), model.config.get_text_config()
    _refuse(model, memory, config)
    given = ContinuousBatchingConfig() if continuous_batching_config is None else continuous_batching_config
    graphs = given.use_cuda_graph
    compiled = (given.varlen_compile_config, given.decode_compile_config, given.default_compile_level or None)
    if any(compiled) or (any(graphs) if isinstance(graphs, tuple) else graphs):
        raise with_way_out(
            ValueError(
                "a step of continuous batching with memory reads rows from the disk, which no CUDA graph and no "
                "compiled step holds"
            ),
            "leave use_cuda_graph and the compile settings of ContinuousBatchingConfig alone",
        )
    layers = _layers(memory, config, model.dtype)
    num_more = sum(map(len, layers.values()))
    kinds = getattr(config, "layer_types", None)
    kind = "full_attention" if kinds is None or "full_attention" in kinds else "sliding_attention"
    changes = {
        "num_hidden_layers": config.num_hidden_layers + num_more,
        "layer_types": None if kinds is None else [*kinds, *[kind] * num_more],
        "engram_layers": layers,
    }
    shown_config = _Seen(model.config, get_text_config=lambda *_, **__: _Seen(config, **changes))
    shown = _Seen(model, config=shown_config)
    vars(shown)["eval"] = lambda: (model.eval(), shown)[1]
    return type(model).init_continuous_batching(
        shown, generation_config, replace(given, use_cuda_graph=False), workload_hints
    )


def why_not_batched(model: Any) -> str | None:
    """Say why continuous batching can't run a model, with memory or without; None if it can."""
    config, memory = model.config.get_text_config(), attached_memory(model)
    kinds = set(getattr(config, "layer_types", None) or [])
    if getattr(model, "_is_stateful", False) or kinds - {"full_attention", "sliding_attention"}:
        return f"{type(model).__name__} has layers that are no attention, for which transformers has no paged cache"
    if not (hasattr(model, "init_continuous_batching") and getattr(model, "_supports_attention_backend", False)):
        return f"{type(model).__name__} doesn't take transformers' paged attention"
    try:
        if memory is not None:
            _refuse(model, memory, config)
    except ValueError as error:
        return str(error)
    return None


def _refuse(model: Any, memory: EngramMemory, config: Any) -> None:
    """Raise `ValueError` for what can't be served."""
    if not memory.config.causal:
        raise ValueError(
            "this memory looks ahead (EngramConfig.causal = False), so it can't go on from a cache: model.generate "
            "with use_cache=False"
        )
    windows = _windows(config)
    if windows and min(windows) <= memory.reach:
        raise with_way_out(
            ValueError(
                f"the memory of a position depends on {memory.reach} before it, and the model's paged cache keeps "
                f"{min(windows) - 1} (sliding_window = {min(windows)})"
            ),
            "use model.generate, a batch at a time",
        )
    if getattr(model, "tp_size", None) not in (None, 1):
        raise ValueError("continuous batching with memory runs on one device; the model is spread over several")


def _windows(config: Any) -> list[int]:
    """The sliding window, if no layer keeps all positions."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    slides = window is not None if kinds is None else "full_attention" not in kinds
    return [window] if slides and window is not None else []


def _layer_words(config: Any) -> int:
    """Count a token's values in one layer of the cache, keys and values together."""
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

    return int(2 * find_num_key_value_heads(config) * find_head_dim(config))


def _layers(memory: EngramMemory, config: Any, cache_dtype: torch.dtype) -> dict[int | None, range]:
    """Find which layers of the cache keep what of a token: None, its compressed id and overlay; a layer's id, what
    its convolution reads."""
    widths: dict[int | None, int] = {None: paged_state.words_of(ID_DTYPE, TOKEN_VALUES, cache_dtype)}
    for fusion in memory:
        if fusion.conv is not None:
            dtype = fusion.conv.weight.dtype
            widths[fusion.layer_id] = paged_state.words_of(dtype, fusion.conv.in_channels, cache_dtype)
    first, layers = config.num_hidden_layers, {}
    for layer_id, width in widths.items():
        layers[layer_id] = range(first, first - (-width // _layer_words(config)))
        first = layers[layer_id].stop
    return layers


class CacheCall(PagedCall):
    """A step of transformers' manager, whose paged cache has layers for the memory."""

    def __init__(self, memory: EngramMemory, arguments: dict[str, Any]) -> None:
        cache = self.cache = arguments["cache"]
        self.layers: dict[int | None, range] = cache.config.engram_layers
        allocator = self.allocator = cache.layer_to_allocator[max(layers.stop for layers in self.layers.values()) - 1]
        starts_N1 = arguments["cu_seq_lens_q"].long()
        ends_N1 = arguments["cu_seq_lens_k"][allocator.layer_type].long()
        num_new_N = starts_N1.diff()
        self.step = paged_state.step(
            starts_N1, ends_N1.diff() - num_new_N, num_new=arguments["input_ids"].shape[1], reach=memory.reach
        )
        read_index = arguments["read_index"][allocator.index]
        self.write_slots_T = arguments["write_index"][allocator.index]
        self.slots_NP: torch.Tensor | None = None
        table = arguments.get("block_table")
        if table is not None:
            page = allocator.tokens_per_page
            table_NM = table[allocator.index]
            self.slots_NP = paged_state.slots_in_table(table_NM, self.step.positions_NP, page)
            now_N1 = (ends_N1.diff() - num_new_N)[:, None]
            self.write_slots_T = paged_state.slots_in_table(table_NM, now_N1, page).flatten()
        elif len(read_index):
            slots_NP = paged_state.slots_before(read_index, ends_N1[1:] - num_new_N, self.step.known_NP)
            # Some slots of a sliding window's list stand for values that come with the call.
            self.slots_NP = slots_NP.masked_fill(~self.step.known_NP, allocator.read_trash_index)

    def exchange(self, layer_id: int | None, values_TX: torch.Tensor) -> torch.Tensor:
        """See `PagedCall.exchange`."""
        layers = self.layers[layer_id]
        heads, dim = self.allocator.num_key_value_heads, self.allocator.head_dim
        kept = paged_state.as_words(values_TX, self.cache.dtype, len(layers) * 2 * heads * dim)
        kept = kept.view(-1, len(layers), 2, heads, dim)
        # Where nothing was kept yet, the engine reads nothing.
        slots = self.write_slots_T[:0] if self.slots_NP is None else self.slots_NP.flatten()
        found = []
        for number, layer in enumerate(layers):
            # Reads before it writes, or after; the slots differ.
            found += self.allocator.update(kept[:, number, 0], kept[:, number, 1], layer, slots, self.write_slots_T)
        past_NPX = None
        if self.slots_NP is not None:
            words = torch.cat([part.flatten(1) for part in found], dim=1)
            past = paged_state.from_words(words, values_TX.dtype, values_TX.shape[1])
            past_NPX = past.view(*self.slots_NP.shape, -1)
        return self.step.interleave(past_NPX, values_TX)


def paged_call(memory: EngramMemory, arguments: dict[str, Any]) -> CacheCall | None:
    """The call's step, if its cache has a place for the memory: `manager_with_memory` saw to it."""
    has_place = isinstance(getattr(arguments.get("cache"), "config", None), _Seen)
    return CacheCall(memory, arguments) if has_place else None
