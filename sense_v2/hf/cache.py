"""What the memory needs to know of the tokens before a call, kept in the model's own KV cache.

    cache.layers = [the model's layer 0, …, its last layer, EngramState]
    EngramState  = compressed id, validity and position of each token so far, and the convolution's inputs of each
                   layer with memory

An n-gram reaches back over the tokens before, and the convolution over what the gate let through at them. Both belong
to a sequence, not to the model. As an entry of the cache's `layers` they follow everything that happens to it: beam
search reorders it, assisted decoding crops it, batches are selected and repeated, a prefix is copied and continued
twice, and two streams have two caches.

The entry comes after the model's own, whose place is their layer's number. It is of the kind that mask code passes
over ("linear attention"), since it holds neither keys nor values.

What is kept follows the cache. Where the model's layers keep all positions, so does the entry: a crop can go back
anywhere. Where they keep a window or a recurrent state, it keeps as much, and rolls back further only where they do,
after `activate_past_recording`. In a static cache it is allocated once and stored to in place, so that a compiled
step finds it at the same address.

B batch, T new positions, P positions of the past, X channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache, cache_utils

# Before transformers had caches of linear attention, no mask code looked for any.
_EntryBase: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", cache_utils.CacheLayerMixin)


class _Growing:
    """Values of the positions so far, [B, P, …]; where `keep` is a number, of the last `keep` to 2·`keep`."""

    def __init__(self, keep: int | None) -> None:
        self.keep = keep
        self.length = 0
        self.values: torch.Tensor | None = None

    def recent(self, count: int) -> torch.Tensor | None:
        """Those of the last `count` positions, or of as many as there are: [B, P, …]; None where there are none."""
        return None if self.values is None else self.values[:, -count:]

    def append(self, values_BT: torch.Tensor, *, trim: bool) -> None:
        self.values = values_BT if self.values is None else torch.cat([self.values, values_BT], dim=1)
        self.length += values_BT.shape[1]
        # Not at each step: a compiled one would have a graph for each length around the limit.
        if trim and self.keep is not None and self.values.shape[1] >= 2 * self.keep:
            self.trim()

    def trim(self) -> None:
        if self.keep is not None and self.values is not None:
            self.values = self.values[:, -self.keep :]

    def remove(self, count: int) -> None:
        """The last `count` positions never were."""
        self.length -= count
        if self.values is not None:
            self.values = self.values[:, : max(self.values.shape[1] - count, 0)] if self.length > 0 else None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.values is not None:
            self.values = change(self.values)

    def reset(self) -> None:
        self.length, self.values = 0, None


class _Ring:
    """Values of the last `size` positions, stored in place: position p lies at p mod size, whatever the length.

    The length is a tensor, so that a compiled step doesn't depend on it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.length: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def recent(self, count: int) -> torch.Tensor | None:
        """Those of the last `count` positions, [B, count, …], zeros before the first; None where nothing ever was."""
        if self.values is None or self.length is None:
            return None
        places_P = torch.arange(-count, 0, device=self.values.device) + self.length
        found = self.values.index_select(1, places_P % self.size)
        is_before = (places_P < 0).reshape(1, count, *[1] * (found.dim() - 2))
        return found.masked_fill(is_before, 0)

    def append(self, values_BT: torch.Tensor, *, trim: bool) -> None:
        if self.values is None or self.length is None:
            self.values = values_BT.new_zeros((values_BT.shape[0], self.size, *values_BT.shape[2:]))
            self.length = torch.zeros((), dtype=torch.int64, device=values_BT.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.values)
                torch._dynamo.mark_static_address(self.length)
        count = values_BT.shape[1]
        kept = min(count, self.size)
        places_T = torch.arange(count - kept, count, device=values_BT.device) + self.length
        self.values.index_copy_(1, places_T % self.size, values_BT[:, count - kept :])
        self.length.add_(count)

    def trim(self) -> None:
        pass

    def remove(self, count: int) -> None:
        if self.length is not None:
            self.length.sub_(count)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.values is None:
            return
        changed = change(self.values)
        if changed.shape == self.values.shape:
            self.values.copy_(changed)
        else:
            self.values = changed

    def reset(self) -> None:
        if self.values is not None and self.length is not None:
            self.values.zero_()
            self.length.zero_()


class EngramState(_EntryBase):
    """The memory's entry of a cache; `state_in` finds it or puts it there.

    `memory_id` says whose it is. `reach` is how many positions back the memory of a position depends on. With
    `capacity` it is for a static cache of that many positions; else it keeps the last `keep`, or, where that is None,
    all.
    """

    supports_early_init = False
    is_sliding = False

    def __init__(self, memory_id: str, reach: int, *, capacity: int | None, keep: int | None) -> None:
        self.memory_id = memory_id
        self.reach = reach
        self.capacity = capacity
        self.keep = keep
        self.record_past = False
        self.is_initialized = True
        # Whoever goes over a cache's layers expects them.
        self.keys = self.values = None
        self.tokens = self._track()
        self.conv_inputs: dict[int, _Growing | _Ring] = {}

    def _track(self) -> _Growing | _Ring:
        return _Growing(self.keep) if self.capacity is None else _Ring(self.capacity)

    # What the memory asks

    @property
    def length(self) -> int | torch.Tensor:
        """Positions so far; a tensor in a static cache."""
        return 0 if self.tokens.length is None else self.tokens.length

    def recent_tokens(self) -> torch.Tensor | None:
        """[B, P, 3] of the last positions, up to `reach`; one that is not valid may be before the sequence."""
        return self.tokens.recent(self.reach)

    def append_tokens(self, tokens_BT3: torch.Tensor) -> None:
        self.tokens.append(tokens_BT3, trim=not self.record_past)

    def remember(self, layer_id: int, inputs_BTX: torch.Tensor) -> torch.Tensor:
        """Keeps what a layer's convolution reads of these positions; returns it behind what it reads of the past."""
        if layer_id not in self.conv_inputs:
            self.conv_inputs[layer_id] = self._track()
        track = self.conv_inputs[layer_id]
        past_BPX = track.recent(self.reach)
        track.append(inputs_BTX, trim=not self.record_past)
        return inputs_BTX if past_BPX is None else torch.cat([past_BPX.to(inputs_BTX.device), inputs_BTX], dim=1)

    def is_whole(self) -> bool:
        """Whether every part has seen the same positions: a call that failed in the middle leaves them apart."""
        return all(int(track.length or 0) == int(self.length) for track in self.conv_inputs.values())

    # What transformers' Cache asks of its layers

    def _tracks(self) -> Iterable[_Growing | _Ring]:
        return (self.tokens, *self.conv_inputs.values())

    def __repr__(self) -> str:
        return f"EngramState(reach={self.reach})"

    @property
    def is_compileable(self) -> bool:
        return self.capacity is not None

    @property
    def is_croppable(self) -> bool:
        return True  # wherever the model's own layers are

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {0: self.tokens.values is not None}

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` positions; a positive number, as transformers used to have it, is how
        many to keep. Raises `RuntimeError` where those before them are no longer there.
        """
        length = int(self.length)
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        count = min(count, length)
        needed = min(self.reach, length - count)
        for track in self._tracks():
            if isinstance(track, _Growing) and track.values is not None and track.values.shape[1] < count + needed:
                raise RuntimeError(
                    f"the cache is cropped by {count} of {length} tokens, but the memory kept the last "
                    f"{track.values.shape[1]} only, as the model's own layers keep only a window or a state: call "
                    "cache.activate_past_recording() before the tokens that may be taken back"
                )
        for track in self._tracks():
            track.remove(count)
            track.trim()

    def reset(self) -> None:
        for track in self._tracks():
            track.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for track in self._tracks():
            track.each(lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for track in self._tracks():
            track.each(lambda values: values[indices.to(values.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        for track in self._tracks():
            track.each(lambda values: values.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass

    def get_max_length(self) -> int:
        return -1

    # transformers 5.0 asks every layer of a static cache for these.
    get_max_cache_shape = get_max_length

    @property
    def max_batch_size(self) -> int:
        return -1 if self.tokens.values is None else self.tokens.values.shape[0]

    @property
    def max_cache_len(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def get_seq_length(self) -> int | torch.Tensor:
        return self.length

    def _no_attention(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the memory's entry of a cache holds no attention or recurrent state")

    lazy_initialization = update = update_conv_state = update_recurrent_state = get_mask_sizes = _no_attention


def state_in(cache: Cache, *, depth: int, memory_id: str, reach: int, is_new: bool = False) -> EngramState:
    """The memory's entry of `cache`, put there where the cache is empty. `depth` is how many layers the model has;
    `is_new` says that the model made the cache in this call, whose first layers may have filled it by now.

    Raises `ValueError` where the cache holds tokens that this memory hasn't seen: the model ran without it, or with
    another, or a call failed in the middle.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    state = next((layer for layer in cache.layers if isinstance(layer, EngramState)), None)
    own = [layer for layer in cache.layers if layer is not state]
    way_out = "; start with a new cache, or call with use_cache=False"
    if state is not None and state.memory_id == memory_id:
        _refuse_other_length(state, own, way_out)
        return state
    if not is_new and _holds_tokens(own):
        found = "was filled with another memory attached" if state else "was filled without this memory"
        raise ValueError(f"the cache {found}, so the n-grams and the convolution of its tokens are unknown{way_out}")
    # A DynamicCache() makes its layers when they are first written to, and would put them behind this one.
    while cache.layer_class_to_replicate is not None and len(own) < depth:
        own.append(cache.layer_class_to_replicate())
    capacity = max((layer.max_cache_len for layer in own if isinstance(layer, cache_utils.StaticLayer)), default=None)
    state = EngramState(
        memory_id, reach, capacity=None if capacity is None else max(capacity, reach), keep=_keep(own, reach)
    )
    state.record_past = any(getattr(layer, "record_past", False) for layer in own)
    cache.layers[:] = [*own, state]
    return state


def _keep(own: list[Any], reach: int) -> int | None:
    """How many positions the model's layers can go back over, and the memory's reach before them; None is all."""
    window = 0
    for layer in own:
        if getattr(layer, "is_sliding", False):
            window = max(window, layer.sliding_window if hasattr(layer, "sliding_window") else layer.max_cache_len)
        elif isinstance(layer, cache_utils.CacheLayerMixin):
            return None
    return window + reach


def _attention_length(own: list[Any]) -> int | torch.Tensor | None:
    """Tokens in the model's layers; None where none of them counts."""
    counting = (layer for layer in own if isinstance(layer, cache_utils.CacheLayerMixin))
    layer = next(counting, None)
    return None if layer is None else layer.get_seq_length()


def _holds_tokens(own: list[Any]) -> bool:
    length = _attention_length(own)
    if length is not None:
        return int(length) > 0
    return any(any(getattr(layer, "has_previous_state", {}).values()) for layer in own)


def _refuse_other_length(state: EngramState, own: list[Any], way_out: str) -> None:
    if torch.compiler.is_compiling():
        # A graph can't branch on the numbers; where they are tensors, in a static cache, it can stop at them.
        for length in (_attention_length(own), *(track.length for track in state.conv_inputs.values())):
            if isinstance(length, torch.Tensor) and isinstance(state.length, torch.Tensor):
                found = "the cache holds other tokens than the memory has seen: the model ran on it without memory"
                torch._assert_async((length == state.length).all(), f"{found}{way_out}")
        return
    if any(isinstance(layer, cache_utils.StaticLayer) and not hasattr(layer, "cumulative_length") for layer in own):
        return  # transformers 5.0 guesses a static cache's length, from which keys aren't zero
    length = _attention_length(own)
    if length is None:
        length = state.length if _holds_tokens(own) == bool(int(state.length)) else -1
    if int(length) != int(state.length) or not state.is_whole():
        raise ValueError(
            f"the cache holds {int(length) if int(length) >= 0 else 'other'} tokens, of which the memory has seen "
            f"{int(state.length)}: the model ran on it without memory, or a call failed in the middle{way_out}"
        )
