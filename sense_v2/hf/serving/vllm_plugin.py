"""A plugin of vLLM: its own models with memory, for a folder that `save_pretrained` wrote.

    vllm serve FOLDER --enforce-eager
        config.json: sense_engram ──`register`──▶ the backbone's configuration, with an architecture of ours
        LlamaForCausalLM of vLLM ──hooks──▶ rows of the mapped table ──▶ hidden states + memory ──▶ each layer

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). The table is mapped by each
worker, which share its pages; it is never loaded. With tensor parallelism each rank computes the memory of all
channels, which come whole before each layer.

The state of earlier tokens lies in tensors of our own, at the slots of the first layer's keys and values, and is read
through the same block table: prefixes that are shared, prompts in chunks and preemption follow. (vLLM doesn't count
these tensors when it sizes its cache: a slot takes 4 bytes, and for each layer with memory its hidden size.)

Uses, of vLLM: its model classes and their layers' arguments, the registry, the forward context, and what the
attention backends call `query_start_loc`, `seq_lens`, `block_table` and `slot_mapping`.

N sequences, T new tokens, P positions of past, S slots, X channels, C hidden size.
"""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sense_v2.core.errors import with_way_out
from sense_v2.hf.serving import paged_state
from sense_v2.hf.serving.paged_call import PagedCall

# The backbone's architecture -> where vLLM has it, and ours.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "EngramLlamaForCausalLM"),
    "MistralForCausalLM": ("mistral", "EngramMistralForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "EngramQwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "EngramQwen3ForCausalLM"),
}


def register() -> None:
    """Make vLLM know folders with memory; it calls this in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from sense_v2.hf.saving.model_config import MODEL_TYPE, EngramModelConfig

    class ServedConfig(EngramModelConfig):
        """What vLLM finds for such a folder: the backbone's own, with an architecture of ours."""

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            asks_for_rest = kwargs.pop("return_unused_kwargs", False)
            backbone = EngramModelConfig(**config_dict).backbone()
            (name,) = backbone.architectures or ["?"]
            if name not in ARCHITECTURES:
                raise with_way_out(
                    ValueError(f"{name} with memory isn't served by vLLM here; {', '.join(ARCHITECTURES)} are"),
                    "`sense-engram serve` serves it",
                )
            backbone.architectures = [ARCHITECTURES[name][1]]
            return (backbone, kwargs) if asks_for_rest else backbone

    AutoConfig.register(MODEL_TYPE, ServedConfig, exist_ok=True)
    for _, name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> Any:
    """Make one of `ARCHITECTURES` when vLLM asks for it: vLLM's class of the backbone, with memory."""
    for backbone, (module, ours) in ARCHITECTURES.items():
        if name == ours:
            of_vllm = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), backbone)
            made = type(name, (MemoryOfVllm, of_vllm), {"__module__": __name__})
            return globals().setdefault(name, made)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class SlotState:
    """The state of all sequences of a worker: tensors [S, X], one for each that is asked for."""

    def __init__(self, num_slots: int, page_size: int) -> None:
        self.num_slots, self.page_size = num_slots, page_size
        self.pages: dict[int | None, torch.Tensor] = {}

    def of(self, layer_id: int | None, like_TX: torch.Tensor) -> torch.Tensor:
        """Those of a layer, made when it is first met."""
        if layer_id not in self.pages:
            self.pages[layer_id] = like_TX.new_zeros((self.num_slots, like_TX.shape[1]))
        return self.pages[layer_id]


class SlotCall(PagedCall):
    """A step of vLLM.

    Args:
        state: Of this worker.
        metadata: Of the first layer's attention: `query_start_loc`, `seq_lens`, `block_table`, `slot_mapping`.
        num_new: T.
        reach: P.
    """

    def __init__(self, state: SlotState, metadata: Any, *, num_new: int, reach: int) -> None:
        self.state = state
        starts_N1 = metadata.query_start_loc.long()
        num_sequences = len(starts_N1) - 1
        before_N = metadata.seq_lens[:num_sequences].long() - starts_N1.diff()
        self.step = paged_state.step(starts_N1, before_N, num_new=num_new, reach=reach)
        table_NM = metadata.block_table[:num_sequences]
        self.slots_NP = paged_state.slots_in_table(table_NM, self.step.positions_NP, state.page_size)
        self.write_slots_T = metadata.slot_mapping[:num_new]

    def exchange(self, layer_id: int | None, values_TX: torch.Tensor) -> torch.Tensor:
        """See `PagedCall.exchange`."""
        pages_SX = self.state.of(layer_id, values_TX)
        past_NPX = paged_state.tail(pages_SX, self.slots_NP)
        paged_state.write(pages_SX, self.write_slots_T, values_TX)
        return self.step.interleave(past_NPX, values_TX)


def open_memory(folder: Path, hidden_size: int, pad_token_id: int | None, num_embeddings: int) -> Any:
    """Open the memory of a saved folder to be read, with its fusion layers' weights."""
    from sense_v2.core.config import EngramConfig
    from sense_v2.engram.tokenizer import EngramTokenizer
    from sense_v2.hf.load import load_fusion
    from sense_v2.hf.memory import EngramMemory
    from sense_v2.hf.saving.folder import CONFIG_FILE, MAP_FILE, MEMORY_FOLDER, check_folder, table_of

    check_folder(folder)
    memory_folder = folder / MEMORY_FOLDER
    config = dataclasses.replace(
        EngramConfig.load(memory_folder / CONFIG_FILE),
        storage_path=str(table_of(memory_folder)),
        shadow_map_path=str(memory_folder / MAP_FILE),
    )
    shadow_map = EngramTokenizer(memory_folder / MAP_FILE)
    shadow_map.cover(num_embeddings)
    memory = EngramMemory(config, hidden_size, shadow_map, pad_token_id, "r")
    load_fusion(memory, memory_folder)
    return memory.eval()


class MemoryOfVllm:
    """What each of our architectures adds to vLLM's class of the backbone."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]  # vLLM's
        refuse(vllm_config)
        config = vllm_config.model_config.hf_config
        weight = next(self.model.layers[0].parameters())  # type: ignore[attr-defined]  # of vLLM's class
        with torch.device("cpu"):
            memory = open_memory(
                Path(vllm_config.model_config.model),
                config.hidden_size,
                getattr(config, "pad_token_id", None),
                config.vocab_size,
            )
        self.engram = memory.to(device=weight.device, dtype=vllm_config.model_config.dtype)
        self._page_size = vllm_config.cache_config.block_size
        self._state: SlotState | None = None
        self._rows: Any = None
        for layer_id, layer in enumerate(self.model.layers):  # type: ignore[attr-defined]
            if str(layer_id) in memory.layers:
                layer.register_forward_pre_hook(partial(_add_memory, self, layer_id))

    def forward(self, input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's class: the rows of these tokens are known before its layers run."""
        self._rows = None if input_ids is None else self._rows_of(input_ids)
        try:
            return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._rows = None

    def load_weights(self, weights: Any) -> set[str]:
        """See vLLM's class; the memory has its own, from its own file."""
        loaded = super().load_weights(  # type: ignore[misc]
            (name, weight) for name, weight in weights if not name.startswith("engram.")
        )
        return set(loaded) | {f"engram.{name}" for name, _ in self.engram.named_parameters()}

    def _rows_of(self, input_ids: torch.Tensor) -> Any:
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures its memory
            return None
        attention = self.model.layers[0].self_attn.attn  # type: ignore[attr-defined]
        of_layer = metadata[attention.layer_name]
        if self._state is None:
            per_slot = 2 * attention.num_kv_heads * attention.head_size
            self._state = SlotState(attention.kv_cache.numel() // per_slot, self._page_size)
            refuse_other_slots(of_layer, self._page_size)
        num_new = int(of_layer.num_actual_tokens)
        call = SlotCall(self._state, of_layer, num_new=num_new, reach=self.engram.reach)
        rows = call.rows(self.engram, input_ids[None, :num_new])
        self.engram.begin_rows(rows.row_ids_LBTH, None)
        return call, rows


def _add_memory(model: Any, layer_id: int, layer: Any, args: tuple[Any, ...]) -> Any:
    """Add the memory before a decoder layer, whose residual vLLM hands on beside the hidden states."""
    if model._rows is None:
        return None
    call, rows = model._rows
    positions, hidden_TC, residual_TC, *rest = args
    whole_TC = hidden_TC if residual_TC is None else hidden_TC + residual_TC
    num_new = rows.row_ids_LBTH.shape[2]
    fused_BTC = model.engram.layers[str(layer_id)](
        whole_TC[None, :num_new],
        row_ids_BTH=rows.row_ids_LBTH[list(model.engram.layers).index(str(layer_id))],
        documents_BQ=rows.documents_BQ,
        remember=partial(call.remember, layer_id),
        places_T=rows.places_T,
    )
    fused_TC = torch.cat([fused_BTC[0], whole_TC[num_new:]])
    return (positions, fused_TC, None, *rest)


def refuse(vllm_config: Any) -> None:
    """Raise `ValueError` for what the memory can't run in."""
    if not vllm_config.model_config.enforce_eager:
        raise with_way_out(
            ValueError("a step with memory reads rows from the disk, which no compiled graph holds"),
            "serve with --enforce-eager (enforce_eager=True)",
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise with_way_out(
            ValueError("the memory is looked up by token ids, which only the first pipeline rank gets"), "use one"
        )
    if vllm_config.speculative_config is not None:
        raise with_way_out(ValueError("speculative decoding with memory isn't tested"), "serve without")


def refuse_other_slots(metadata: Any, page_size: int) -> None:
    """Raise `ValueError` if a token's slot isn't where its sequence's table and the page size say."""
    starts_N1 = metadata.query_start_loc.long()
    last_N1 = metadata.seq_lens[: len(starts_N1) - 1].long()[:, None] - 1
    expected_N = paged_state.slots_in_table(metadata.block_table[: len(last_N1)], last_N1, page_size).flatten()
    found_N = metadata.slot_mapping[starts_N1[1:] - 1].long()
    if not torch.equal(expected_N, found_N):
        raise ValueError(
            f"this attention backend keeps tokens at slots {found_N.tolist()[:4]}, and block table and a block of "
            f"{page_size} say {expected_N.tolist()[:4]}: memory isn't served with it"
        )
