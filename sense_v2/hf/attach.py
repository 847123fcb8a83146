"""attach_engram / detach_engram: memory for a transformers model, in place.

    model(input_ids) ──hook on the base model──▶ token ids, mask, positions ride along as a keyword argument
                     ──hook on each named layer──▶ hidden states + memory ──▶ the layer as it was

The ids travel as an argument, not as state on a module: gradient checkpointing replays a layer with the arguments
it was first called with, and two forwards (or two threads) never see each other's ids. No weight of the backbone is
touched, moved or renamed; `detach_engram` removes the hooks and the model is what it was.

What was attached lies in `model.engram` (`EngramMemory`): one table, one shadow map, one fusion layer per index.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from sense_v2.core.config import EngramConfig
from sense_v2.engram.model import EngramFusionLayer, open_table
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder

# The keyword argument that carries the ids from the base model's hook through transformers' **kwargs to the layers.
CARRIER = "engram_inputs"
# Token ids for a call with `inputs_embeds`: the memory is looked up by ids.
IDS_ARGUMENT = "engram_input_ids"
# An embedding is often padded to a round number of rows; more than this many rows without a token is another
# tokenizer's map.
MAX_PADDED_ROWS = 1024


@dataclass
class EngramInputs:
    """What the memory layers need of one forward call."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor | None
    position_ids_BT: torch.Tensor | None


class EngramMemory(nn.Module):
    """What `attach_engram` adds to a model: `layers` (by layer number), and the table and map they share."""

    def __init__(
        self,
        config: EngramConfig,
        hidden_size: int,
        tokenizer: EngramTokenizer,
        pad_token_id: int | None,
        mode: str = "r+",
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.storage = open_table(config, tokenizer, mode=mode)
        self.layers = nn.ModuleDict(
            {
                str(layer_id): EngramFusionLayer(
                    config,
                    hidden_size,
                    layer_id,
                    tokenizer=tokenizer,
                    storage=self.storage,
                    pad_token_id=pad_token_id,
                )
                for layer_id in config.layer_indices
            }
        )
        self._undo: list[Any] = []

    def prefetch(self, input_ids_BT: torch.Tensor) -> None:
        """Begins to read the rows of these token ids [B, T], the first layer's first, and returns at once. Does
        nothing where rows were in memory lately."""
        if self.storage.reads_the_disk:
            for fusion in self:
                self.storage.prefetch(fusion.row_ids(input_ids_BT))

    def __iter__(self) -> Iterator[EngramFusionLayer]:
        return iter(self.layers.values())  # type: ignore[arg-type]  # a ModuleDict doesn't know its modules' type


def attach_engram(
    model: PreTrainedModel, config: EngramConfig, tokenizer: Any = None, *, mode: str = "r+"
) -> PreTrainedModel:
    """Puts memory before the decoder layers named by `config.layer_indices`, in place; returns `model`.

    `tokenizer` is whatever `EngramTokenizerBuilder` takes (a tokenizer, a hub name, a folder, a tokenizer.json). It
    makes the shadow map where `config.shadow_map_path` doesn't exist yet, and is checked against it where it does.
    A table that doesn't exist yet is created; one that does is checked against its manifest. With mode "r" it is only
    read: nothing on disk changes, and its folder may be one that can't be written to.

    The fusion layers get the backbone's dtype and device. A fresh memory changes no output. `model.generate` runs
    without the KV cache while memory is attached. `config.enabled=False` attaches nothing and warns.

    Raises `ValueError` for a layer the model doesn't have, a table or map that doesn't match, memory attached
    twice; `FileNotFoundError` where there is neither a shadow map nor a tokenizer to make one.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = attach_engram(LlamaForCausalLM(...), EngramConfig(layer_indices=[1]), tokenizer)  # doctest: +SKIP
    """
    config.validate()
    if attached_memory(model) is not None:
        raise ValueError("this model has memory attached already; call detach_engram(model) first")
    if not config.enabled:
        warnings.warn("EngramConfig.enabled is False: no memory is attached", UserWarning, stacklevel=2)
        return model
    layers = decoder_layers(model)
    depth = len(layers)
    for layer_id in config.layer_indices:
        if layer_id >= depth:
            raise ValueError(
                f"EngramConfig.layer_indices holds {layer_id}, but this {type(model).__name__} has {depth} layers "
                f"(0 to {depth - 1})"
            )
    base = model.base_model
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values()):
        raise ValueError(
            f"{type(base).__name__}.forward takes no **kwargs to hand down to its layers, so memory can't reach "
            "them; this model type isn't supported"
        )

    shadow_map = _shadow_map(config, tokenizer)
    embedding = model.get_input_embeddings()
    num_embeddings = _rows(embedding)
    _check_vocabulary(shadow_map, num_embeddings, config)
    pad_token_id = getattr(model.config, "pad_token_id", None)
    memory = EngramMemory(config, int(model.config.get_text_config().hidden_size), shadow_map, pad_token_id, mode)
    weight = next(layers[config.layer_indices[0]].parameters())
    memory.to(device=weight.device, dtype=weight.dtype)
    memory.train(model.training)

    model.engram = memory
    carry = _carry_ids(base, embedding, num_embeddings, shadow_map)
    memory._undo.append(base.register_forward_pre_hook(carry, with_kwargs=True))
    fusions = {fusion.layer_id: fusion for fusion in memory}
    for layer_id, layer in enumerate(layers):
        hook = _add_memory(fusions.get(layer_id), layer_id)
        memory._undo.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        memory._undo.append(_AttributeChange(generation_config, "use_cache", False))
    return model


def memory_of(model: nn.Module) -> EngramMemory:
    """`model.engram`, typed. Raises `ValueError` where nothing is attached."""
    memory = attached_memory(model)
    if memory is None:
        raise ValueError("this model has no memory attached; attach_engram(model, config) does it")
    return memory


def attached_memory(model: nn.Module) -> EngramMemory | None:
    """`model.engram`, or None where nothing is attached."""
    memory = getattr(model, "engram", None)
    return memory if isinstance(memory, EngramMemory) else None


def detach_engram(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the memory off again; the model is what it was before, bit for bit. The table stays on disk.

    Rows that were trained since the last `storage.flush()` are flushed first. Raises `ValueError` where nothing is
    attached.
    """
    memory = memory_of(model)
    if memory.storage.mode == "r+":
        memory.storage.flush()
    for change in memory._undo:
        change.remove()
    del model.engram
    memory.storage.close()
    return model


class _AttributeChange:
    """Sets an attribute; `remove()` puts the old value back, as a hook's handle does."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.old, self.new = owner, name, getattr(owner, name), value
        setattr(owner, name, value)

    def remove(self) -> None:
        setattr(self.owner, self.name, self.old)

    def apply(self) -> None:
        setattr(self.owner, self.name, self.new)


@contextmanager
def own_settings(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, the model's settings are those it had before memory was attached: for saving it."""
    memory = attached_memory(model)
    changes = [change for change in memory._undo if isinstance(change, _AttributeChange)] if memory else []
    for change in changes:
        change.remove()
    try:
        yield
    finally:
        for change in changes:
            change.apply()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The backbone's list of layers: the one `ModuleList` of the base model as long as the configuration says.

    Raises `ValueError` where there is none, or more than one.
    """
    depth = int(model.config.get_text_config().num_hidden_layers)
    found = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and not name.startswith("engram.")
    }
    # A list inside another's layers (experts, say) is not the backbone's.
    outer = {name: found[name] for name in found if not any(name.startswith(f"{other}.") for other in found)}
    if len(outer) != 1:
        names = ", ".join(outer) or "none"
        raise ValueError(f"can't tell the {depth} layers of {type(model).__name__} apart: candidates are {names}")
    return next(iter(outer.values()))


def _shadow_map(config: EngramConfig, tokenizer: Any) -> EngramTokenizer:
    """The map at `config.shadow_map_path`, made from `tokenizer` where there is none, checked against it else."""
    path = Path(config.shadow_map_path)
    if isinstance(tokenizer, EngramTokenizer):
        return tokenizer
    if not path.exists():
        if tokenizer is None:
            raise FileNotFoundError(
                f"{path}: no shadow map there; pass attach_engram(..., tokenizer=...) to make one, or run "
                "`sense-engram setup`"
            )
        EngramTokenizerBuilder(tokenizer, normalization=config.normalization).build_mapping(path)
        return EngramTokenizer(path)
    shadow_map = EngramTokenizer(path)
    if shadow_map.normalization not in (None, config.normalization):
        raise ValueError(
            f"EngramConfig.normalization = {config.normalization!r}, but the shadow map {path} was made with "
            f"{shadow_map.normalization!r}"
        )
    if tokenizer is not None:
        expected = EngramTokenizerBuilder(tokenizer, normalization=config.normalization).description().sha256
        if shadow_map.sha256 != expected:
            raise ValueError(
                f"the shadow map {path} (tokenizer {shadow_map.tokenizer_name}, SHA-256 {shadow_map.sha256}) was "
                f"not made from this tokenizer (its map's SHA-256 is {expected}); use the tokenizer it was made "
                "from, or another EngramConfig.shadow_map_path"
            )
    return shadow_map


def _rows(embedding: nn.Module) -> int:
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _check_vocabulary(shadow_map: EngramTokenizer, num_embeddings: int, config: EngramConfig) -> None:
    if not 0 <= num_embeddings - shadow_map.vocab_size <= MAX_PADDED_ROWS:
        raise ValueError(
            f"the shadow map {config.shadow_map_path} covers {shadow_map.vocab_size} token ids, the model embeds "
            f"{num_embeddings}: it was made from another tokenizer; make one with `sense-engram setup --tokenizer …`"
        )


def _carry_ids(base: nn.Module, embedding: nn.Module, num_embeddings: int, shadow_map: EngramTokenizer) -> Any:
    """The hook on the base model: finds ids, mask and positions among its arguments and sends them along."""
    signature = inspect.signature(base.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        kwargs = dict(kwargs)
        input_ids_BT = kwargs.pop(IDS_ARGUMENT, None)
        arguments = signature.bind_partial(*args, **kwargs).arguments
        if input_ids_BT is None:
            input_ids_BT = arguments.get("input_ids")
        if input_ids_BT is None:
            raise ValueError(
                "memory is looked up by token ids, and this call has none (inputs_embeds alone): pass the ids "
                f"along as {IDS_ARGUMENT}=…"
            )
        current = _rows(embedding)
        if current != num_embeddings:
            raise ValueError(
                f"the vocabulary was resized from {num_embeddings} to {current} after memory was attached; "
                "detach_engram, make a shadow map of the new tokenizer, attach again"
            )
        # An id that no token has is named here; the embedding, which comes next, only says "index out of range".
        shadow_map(input_ids_BT)
        past = _cache_in({**arguments, **kwargs})
        if past is not None and past.get_seq_length() > 0:
            raise ValueError(
                "a KV cache that holds earlier tokens was passed, and this version of the memory doesn't see their "
                "n-grams: call with use_cache=False"
            )
        mask = arguments.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {shape}: with memory attached it must be [batch, sequence] with 0 at padding, so "
                "that n-grams can stop there"
            )
        kwargs[CARRIER] = EngramInputs(input_ids_BT, mask, arguments.get("position_ids"))
        return args, kwargs

    return hook


def _cache_in(arguments: dict[str, Any]) -> Cache | None:
    """The KV cache among a call's arguments, by its type: its name is `past_key_values` or, since transformers 5.24,
    `cache`, and one that isn't looked for would be wrong tokens instead of an error."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def _add_memory(fusion: EngramFusionLayer | None, layer_id: int) -> Any:
    """The hook on a layer: takes the carried ids off its arguments and, where the layer has memory, adds it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        kwargs = dict(kwargs)
        carried = kwargs.pop(CARRIER, None)
        if fusion is None:
            return args, kwargs
        if carried is None:
            raise ValueError(
                f"layer {layer_id} was called without token ids: call the model, not its layers; if the model was "
                "called, its type doesn't hand keyword arguments down and isn't supported"
            )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        fused = fusion(hidden_states, carried.input_ids_BT, carried.attention_mask_BT, carried.position_ids_BT)
        if args:
            return (fused, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": fused}

    return hook
