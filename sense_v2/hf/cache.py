"""What the memory needs to know of the tokens before a call, kept in the model's own KV cache.

    cache.engram = EngramState
    EngramState  = compressed id, validity, position and overlay of each token so far, and the convolution's inputs
                   of each layer with memory

An n-gram reaches back over the tokens before, and the convolution over what the gate let through at them. Both belong
to a sequence, not to the model. So they follow everything that happens to its cache: beam search reorders it,
assisted decoding crops it, batches are selected and repeated, a prefix is copied and continued twice, and two streams
have two caches. transformers passes these on to `cache.layers`, one entry a layer of the model; methods on this one
cache pass them on to the memory's state as well. (They could go if a cache told others what happens to it.)

What is kept follows the cache. Where the model's layers keep all positions, so does the state: a crop can go back
anywhere. Where they keep a window or a recurrent state, it keeps as much, and rolls back further only where they do,
after `activate_past_recording`. In a static cache it is allocated once and stored to in place, so that a compiled
step finds it at the same address.

B batch, T new positions, P positions of the past, X channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache, cache_utils

from sense_v2.core.errors import with_way_out

_ANEW = "start with a new cache, or call with use_cache=False"

# What happens to a cache.
_EVENTS = (
    "activate_past_recording",
    "batch_repeat_interleave",
    "batch_select_indices",
    "crop",
    "reorder_cache",
    "reset",
)


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


class EngramState:
    """The memory's part of a cache; `state_in` finds it or puts it there.

    `memory_id` says whose it is. `reach` is how many positions back the memory of a position depends on. With
    `capacity` it is for a static cache of that many positions; else it keeps the last `keep`, or, where that is None,
    all.
    """

    def __init__(self, memory_id: str, reach: int, *, capacity: int | None, keep: int | None) -> None:
        self.memory_id = memory_id
        self.reach = reach
        self.capacity = capacity
        self.keep = keep
        self.record_past = False
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
        """[B, P, 4] of the last positions, up to `reach`; one that is not valid may be before the sequence."""
        return self.tokens.recent(self.reach)

    def append_tokens(self, tokens_BT4: torch.Tensor) -> None:
        self.tokens.append(tokens_BT4, trim=not self.record_past)

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

    # What happens to a cache

    def _tracks(self) -> Iterable[_Growing | _Ring]:
        return (self.tokens, *self.conv_inputs.values())

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
                raise with_way_out(
                    RuntimeError(
                        f"the cache is cropped by {count} of {length} tokens, but the memory kept the last "
                        f"{track.values.shape[1]} only, as the model's own layers keep only a window or a state"
                    ),
                    "call cache.activate_past_recording() before the tokens that may be taken back",
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


def state_in(cache: Cache, *, memory_id: str, reach: int, is_new: bool = False) -> EngramState:
    """The memory's state of `cache`, put there where the cache is empty. `is_new` says that the model made the cache
    in this call, whose first layers may have filled it by now.

    Raises `ValueError` where the cache holds tokens that this memory hasn't seen: the model ran without it, or with
    another, or a call failed in the middle.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    state: EngramState | None = getattr(cache, "engram", None)
    if state is not None and state.memory_id == memory_id:
        _refuse_other_length(state, cache.layers)
        return state
    if not is_new and _holds_tokens(cache.layers):
        found = "was filled with another memory attached" if state else "was filled without this memory"
        raise with_way_out(
            ValueError(f"the cache {found}, so the n-grams and the convolution of its tokens are unknown"), _ANEW
        )
    layers: list[Any] = cache.layers
    static = [layer.max_cache_len for layer in layers if isinstance(layer, cache_utils.StaticLayer)]
    capacity = max(*static, reach) if static else None
    state = EngramState(memory_id, reach, capacity=capacity, keep=_keep(cache, reach))
    state.record_past = any(getattr(layer, "record_past", False) for layer in layers)
    cache.engram = state  # type: ignore[attr-defined]
    for name in _EVENTS:
        if hasattr(type(cache), name):
            setattr(cache, name, partial(_pass_on, cache, name))
    return state


def _pass_on(cache: Any, name: str, *given: Any, **named: Any) -> None:
    """What happens to a cache, happens to its memory's state. Not a method: a deep copy and a pickle make one of
    these for the copy."""
    getattr(type(cache), name)(cache, *given, **named)
    getattr(cache.engram, name)(*given, **named)


def _keep(cache: Any, reach: int) -> int | None:
    """How many positions the model's layers can go back over, and the memory's reach before them; None is all."""
    window = 0
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            window = max(window, layer.sliding_window if hasattr(layer, "sliding_window") else layer.max_cache_len)
        elif isinstance(layer, cache_utils.CacheLayerMixin):
            return None
    # A DynamicCache() makes its layers when they are first written to; they keep all.
    return None if cache.layer_class_to_replicate is not None else window + reach


def _attention_length(own: list[Any]) -> int | torch.Tensor | None:
    """Tokens in the first of the model's layers that has any; None where none of them counts."""
    length: int | torch.Tensor | None = None
    for layer in own:
        if isinstance(layer, cache_utils.CacheLayerMixin):
            length = layer.get_seq_length()
            if isinstance(length, torch.Tensor) or length > 0:
                break
    return length


def _holds_tokens(own: list[Any]) -> bool:
    length = _attention_length(own)
    if length is not None:
        return int(length) > 0
    return any(any(getattr(layer, "has_previous_state", {}).values()) for layer in own)


def _refuse_other_length(state: EngramState, own: list[Any]) -> None:
    if torch.compiler.is_compiling():
        # A graph can't branch on the numbers; where they are tensors, in a static cache, it can stop at them.
        for length in (_attention_length(own), *(track.length for track in state.conv_inputs.values())):
            if isinstance(length, torch.Tensor) and isinstance(state.length, torch.Tensor):
                found = "the cache holds other tokens than the memory has seen: the model ran on it without memory"
                torch._assert_async((length == state.length).all(), f"{found}; {_ANEW}")
        return
    if any(isinstance(layer, cache_utils.StaticLayer) and not hasattr(layer, "cumulative_length") for layer in own):
        return  # transformers 5.0 guesses a static cache's length, from which keys aren't zero
    length = _attention_length(own)
    if length is None:
        length = state.length if _holds_tokens(own) == bool(int(state.length)) else -1
    if int(length) != int(state.length) or not state.is_whole():
        raise with_way_out(
            ValueError(
                f"the cache holds {int(length) if int(length) >= 0 else 'other'} tokens, of which the memory has "
                f"seen {int(state.length)}: the model ran on it without memory, or a call failed in the middle"
            ),
            _ANEW,
        )
