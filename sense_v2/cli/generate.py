"""`sense-engram generate`: how a trained model goes on from a prompt, with its memory or with it taken off."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from sense_v2.cli.progress import TokenProgress
from sense_v2.core.errors import CommandError
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.backbones import max_positions, open_trained
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.memory import attached_memory


def run_generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    seed: int = 0,
    without_memory: bool = False,
) -> dict[str, Any]:
    """The continuation of `prompt`, the same from the same seed; temperature 0 takes the likeliest token each time.

    Nothing in `folder` changes. Raises `CommandError`, and what loading the model raises.
    """
    model, tokenizer = open_trained(folder)
    has_memory = attached_memory(model) is not None
    if has_memory and without_memory:
        detach_engram(model)
    prompt_1T = torch.from_numpy(encode([prompt], tokenizer, separator_id=None)).long()[None]
    num_prompt_tokens = prompt_1T.shape[1]
    if num_prompt_tokens == 0:
        raise CommandError(f"the prompt {prompt!r} has no tokens", "begin with at least one word")
    limit = max_positions(model)
    if limit is not None and num_prompt_tokens + max_new_tokens > limit:
        raise CommandError(
            f"{num_prompt_tokens} tokens of prompt and {max_new_tokens} new ones, but {folder} takes {limit} at most",
            "a shorter prompt, or fewer --max-new-tokens",
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    generate: Any = model.generate
    started = time.perf_counter()
    with torch.no_grad(), TokenProgress("generating", max_new_tokens) as streamer:
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
        "model": str(folder),
        "prompt": prompt,
        "continuation": tokenizer.decode(new_token_ids, skip_special_tokens=True),
        "with_memory": has_memory and not without_memory,
        "tokens": len(new_token_ids),
        "seconds": seconds,
        "tokens_per_second": len(new_token_ids) / seconds,
    }
