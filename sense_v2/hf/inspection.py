"""A text -> what a model's memory does at each of its tokens: n-grams, rows, gates, and what the model expects.

T tokens, H rows a position, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.hf.comparison import memory_off, token_text
from sense_v2.hf.corpus import encode
from sense_v2.hf.evaluation import evaluating, recorded_gates
from sense_v2.hf.memory import memory_of


def inspect_text(
    model: PreTrainedModel, tokenizer: Any, text: str, *, max_tokens: int | None = None
) -> dict[str, Any]:
    """Everything about a text, as a dictionary that JSON can hold; of a text longer than `max_tokens` its end.

        {"dropped_tokens": int, "tokens": [str], "token_ids": [int], "compressed_ids": [int],
         "ngrams": {order: [str]}, the text that each position looks up by,
         "layers": [{"layer": int, "gates": [float], "row_ids": [[int]], "row_norms": [[float]]}], T and T × H,
         "probabilities": {"with_memory": [float | None], "without_memory": the same}, of each token but the first}

    A text without tokens gives empty lists. Raises `ValueError` where no memory is attached.
    """
    memory = memory_of(model)
    all_ids_T = torch.from_numpy(encode([text], tokenizer, separator_id=None)).long()
    ids_T = all_ids_T if max_tokens is None else all_ids_T[-max_tokens:]
    token_ids = ids_T.tolist()
    result: dict[str, Any] = {
        "dropped_tokens": len(all_ids_T) - len(ids_T),
        "tokens": [token_text(tokenizer, token_id) for token_id in token_ids],
        "token_ids": token_ids,
        "compressed_ids": memory.tokenizer(ids_T).tolist(),
        "ngrams": {
            order: [
                str(tokenizer.decode(token_ids[max(0, end - order) : end], skip_special_tokens=False))
                for end in range(1, len(token_ids) + 1)
            ]
            for order in memory.config.ngram_orders
        },
        "layers": [],
        "probabilities": {"with_memory": [], "without_memory": []},
    }
    if not token_ids:
        return result
    with evaluating(model):
        with recorded_gates(model) as gates:
            result["probabilities"]["with_memory"] = _probabilities(model, ids_T)
        with memory_off(model):
            result["probabilities"]["without_memory"] = _probabilities(model, ids_T)
        for layer in memory:
            row_ids_TH = layer.row_ids(ids_T[None])[0]
            result["layers"].append(
                {
                    "layer": layer.layer_id,
                    "gates": gates[layer.layer_id],
                    "row_ids": row_ids_TH.tolist(),
                    "row_norms": layer.storage(row_ids_TH).float().norm(dim=-1).tolist(),
                }
            )
    return result


def _probabilities(model: Any, ids_T: torch.Tensor) -> list[float | None]:
    """Of each token, given those before it; None for the first."""
    logits_TV = model(input_ids=ids_T[None].to(model.device), use_cache=False).logits[0, :-1].float()
    return [None, *logits_TV.softmax(dim=-1).gather(1, ids_T[1:, None].to(logits_TV.device))[:, 0].tolist()]
