"""A prompt -> how a model goes on from it."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import CommandError
from sense_v2.hf.data.corpus import encode


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    seed: int = 0,
    streamer: Any = None,
) -> dict[str, Any]:
    """Let a model go on from a prompt, the same way from the same seed.

    Args:
        model: Generates.
        tokenizer: The model's.
        prompt: At least one token.
        max_new_tokens: At most so many are added.
        temperature: 0 takes the likeliest token each time.
        seed: Of the sampling.
        streamer: transformers' own, which is given each new token.

    Returns:
        What JSON can hold: "continuation", "tokens", "seconds", "tokens_per_second".

    Raises:
        CommandError: The prompt is empty, or the model can't take so many tokens.
    """
    prompt_1T = torch.from_numpy(encode([prompt], tokenizer, separator_id=None)).long()[None]
    num_prompt_tokens = prompt_1T.shape[1]
    if num_prompt_tokens == 0:
        raise CommandError(f"the prompt {prompt!r} has no tokens", "begin with at least one word")
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and num_prompt_tokens + max_new_tokens > limit:
        raise CommandError(
            f"{num_prompt_tokens} tokens of prompt and {max_new_tokens} new ones, but {model.name_or_path} takes "
            f"{limit} at most",
            "a shorter prompt, or fewer --max-new-tokens",
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    generate: Any = model.generate  # its type names no streamer of ours
    started = time.perf_counter()
    with torch.no_grad():
        token_ids_1T = generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **sampling,
        )
    seconds = time.perf_counter() - started
    new_token_ids = token_ids_1T[0, num_prompt_tokens:].tolist()
    return {
        "continuation": tokenizer.decode(new_token_ids, skip_special_tokens=True),
        "tokens": len(new_token_ids),
        "seconds": seconds,
        "tokens_per_second": len(new_token_ids) / seconds,
    }
