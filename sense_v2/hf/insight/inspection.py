"""A text -> what a model's memory does at each of its tokens, as a page shows it: texts, rows, gates, probabilities.

The arrays are `observation.py`'s; here they get a text's tokens and n-grams in words, and become what JSON can hold.

T tokens, H rows a position.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sense_v2.hf.data.corpus import encode
from sense_v2.hf.data.token_texts import Words
from sense_v2.hf.insight.observation import observe
from sense_v2.hf.memory import memory_of


def inspect_text(
    model: PreTrainedModel, tokenizer: Any, text: str, *, max_tokens: int | None = None
) -> dict[str, Any]:
    """Everything about a text, as a dictionary that JSON can hold; of a text longer than `max_tokens` its end.

        {"dropped_tokens": int, "tokens": [str], "token_ids": [int], "compressed_ids": [int],
         "ngrams": {order: [str]}, the text that each position looks up by,
         "layers": [{"layer": int, "gates": [float], "shares": {order: [float]}, what its rows add, as a share of the
                     hidden state's length, "row_ids": [[int]], "row_norms": [[float]]}], T and T × H,
         "probabilities": {"with_memory": [float | None], "without_memory": the same}, of each token but the first}

    A text without tokens gives empty lists. Raises `ValueError` where no memory is attached.
    """
    memory = memory_of(model)
    all_ids_T = torch.from_numpy(encode([text], tokenizer, separator_id=None)).long()
    ids_T = all_ids_T if max_tokens is None else all_ids_T[-max_tokens:]
    token_ids, words, orders = ids_T.tolist(), Words(tokenizer), memory.config.ngram_orders
    result: dict[str, Any] = {
        "dropped_tokens": len(all_ids_T) - len(ids_T),
        "tokens": [words.of(token_id) for token_id in token_ids],
        "token_ids": token_ids,
        "compressed_ids": memory.tokenizer(ids_T).tolist(),
        "ngrams": {
            order: [words.text(token_ids[max(0, end - order) : end]) for end in range(1, len(token_ids) + 1)]
            for order in orders
        },
        "layers": [],
        "probabilities": {"with_memory": [], "without_memory": []},
    }
    if not token_ids:
        return result
    # One token alone has no loss to observe; what follows it changes nothing at it.
    seen = observe(model, ids_T[None] if len(ids_T) > 1 else ids_T.repeat(1, 2))
    own = slice(len(ids_T))
    result["probabilities"] = {
        name: [None, *np.exp(-losses_BT[0, : len(ids_T) - 1]).tolist()]
        for name, losses_BT in (("with_memory", seen.losses_with_BT), ("without_memory", seen.losses_without_BT))
    }
    result["layers"] = [
        {
            "layer": layer.layer_id,
            "gates": seen.gates_LBT[number, 0, own].tolist(),
            "shares": {order: seen.shares_LOBT[number, place, 0, own].tolist() for place, order in enumerate(orders)},
            "row_ids": seen.row_ids_LBTH[number, 0, own].tolist(),
            "row_norms": seen.row_norms_LBTH[number, 0, own].tolist(),
        }
        for number, layer in enumerate(memory)
    ]
    return result
