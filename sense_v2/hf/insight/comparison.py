"""A prompt -> how a model goes on with its memory and without it, and what each says of the other's text.

Both sides are the same weights: without memory is the backbone alone, bit for bit. After
the two have written, both read both texts once more, so that each token has two probabilities given the same text
before it. Two texts that differ at one token differ in all that follows; the two probabilities of a token tell where
the memory decided and where the texts only follow from that.

T tokens of prompt and continuation, K candidates, V tokens of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import CommandError, with_way_out
from sense_v2.hf.backbones import max_positions
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.data.token_texts import Words
from sense_v2.hf.insight.evaluation import evaluating
from sense_v2.hf.insight.interventions import memory_off
from sense_v2.hf.memory import memory_of

WITH_MEMORY, WITHOUT_MEMORY = "with_memory", "without_memory"
NUM_CANDIDATES = 5


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Two continuations of `prompt`, each at most `max_new_tokens` long; temperature 0 takes the likeliest token each
    time, and else both draw from the same seed. Of a prompt that doesn't fit `max_tokens` with them, the end is used.

        {"prompt_tokens": int, used, "dropped_tokens": int, "with_memory": SIDE, "without_memory": SIDE}
        SIDE = {"tokens": [str], "probabilities": [float], "other_probabilities": [float], the other side's at the
                same place, "candidates": [[[str, float]]], the likeliest at each place}

    Raises `ValueError` where the prompt has no tokens or no memory is attached.
    """
    ids_T = _encoded(tokenizer, prompt)
    room = len(ids_T) if max_tokens is None else max(1, max_tokens - max_new_tokens)
    prompt_1T = ids_T[-room:][None].to(model.device)
    num_prompt = prompt_1T.shape[1]
    result: dict[str, Any] = {"prompt_tokens": num_prompt, "dropped_tokens": len(ids_T) - num_prompt}
    words = Words(tokenizer)
    with evaluating(model):
        for side in (WITH_MEMORY, WITHOUT_MEMORY):
            with _side(model, side):
                token_ids_1T = continued(model, prompt_1T, max_new_tokens, temperature, seed)
            other = WITHOUT_MEMORY if side == WITH_MEMORY else WITH_MEMORY
            own_TV, other_TV = (_probabilities(model, token_ids_1T, num_prompt, name) for name in (side, other))
            new_T1 = token_ids_1T[0, num_prompt:, None]
            top = own_TV.topk(min(NUM_CANDIDATES, own_TV.shape[-1]))
            result[side] = {
                "tokens": [words.of(token_id) for token_id in new_T1[:, 0].tolist()],
                "probabilities": own_TV.gather(1, new_T1)[:, 0].tolist(),
                "other_probabilities": other_TV.gather(1, new_T1)[:, 0].tolist(),
                "candidates": [
                    [[words.of(token_id), value] for token_id, value in zip(ids_K, values_K, strict=True)]
                    for ids_K, values_K in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ],
            }
    return result


def continue_text(model: PreTrainedModel, tokenizer: Any, prompt: str, *, max_new_tokens: int) -> str:
    """What the model goes on with, its likeliest token each time. Raises `ValueError` for a prompt of no tokens."""
    prompt_1T = _encoded(tokenizer, prompt)[None].to(model.device)
    with evaluating(model):
        token_ids_1T = continued(model, prompt_1T, max_new_tokens)
    return Words(tokenizer).text(token_ids_1T[0, prompt_1T.shape[1] :].tolist())


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
        What JSON can hold: "continuation", "tokens", the token by which the model "end"ed it (None where it wrote
        all that it might), "seconds", "tokens_per_second".

    Raises:
        CommandError: The prompt is empty, or the model can't take so many tokens.
    """
    ids_T = torch.from_numpy(encode([prompt], tokenizer, separator_id=None)).long()
    num_prompt = len(ids_T)
    if num_prompt == 0:
        raise CommandError(f"the prompt {prompt!r} has no tokens", "begin with at least one word")
    limit = max_positions(model)
    if limit is not None and num_prompt + max_new_tokens > limit:
        raise CommandError(
            f"{num_prompt} tokens of prompt and {max_new_tokens} new ones, but {model.name_or_path} takes "
            f"{limit} at most",
            "a shorter prompt, or fewer --max-new-tokens",
        )
    started = time.perf_counter()
    with torch.no_grad():
        token_ids_1T = continued(model, ids_T[None], max_new_tokens, temperature, seed, streamer=streamer)
    seconds = time.perf_counter() - started
    new_token_ids = token_ids_1T[0, num_prompt:].tolist()
    return {
        "continuation": tokenizer.decode(new_token_ids, skip_special_tokens=True),
        "tokens": len(new_token_ids),
        "end": tokenizer.decode(new_token_ids[-1:]) if new_token_ids[-1] in _end_ids(model) else None,
        "seconds": seconds,
        "tokens_per_second": len(new_token_ids) / seconds,
    }


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Return a chat as the model's own template writes it, up to where the model answers.

    Args:
        tokenizer: The model's.
        messages: What was said so far: {"role": "user" or "assistant", "content": str}.

    Raises:
        CommandError: The tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CommandError(
            "the model's tokenizer has no chat template, which models that were trained to chat bring along",
            "leave --chat out, or put its chat_template.jinja into the model's folder",
        )
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def _end_ids(model: PreTrainedModel) -> list[int]:
    """The tokens at which the model stops."""
    found = model.generation_config.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]


def _encoded(tokenizer: Any, prompt: str) -> torch.Tensor:
    ids_T = torch.from_numpy(encode([prompt], tokenizer, separator_id=None)).long()
    if len(ids_T) == 0:
        raise with_way_out(ValueError("the prompt has no tokens"), "begin with at least one word")
    return ids_T


def _side(model: PreTrainedModel, side: str) -> Any:
    return memory_off(memory_of(model)) if side == WITHOUT_MEMORY else nullcontext()


def continued(
    model: Any,
    prompt_1T: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    streamer: Any = None,
) -> torch.Tensor:
    """The token ids of a prompt and of what a model adds to it [1, T]; arguments as `continue_prompt`."""
    prompt_1T = prompt_1T.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        token_ids_1T: torch.Tensor = model.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **sampling,
        )
    return token_ids_1T


def _probabilities(model: Any, token_ids_1T: torch.Tensor, num_prompt: int, side: str) -> torch.Tensor:
    """[new tokens, V]: what one side expected at each place of the continuation."""
    with _side(model, side):
        logits_TV = model(input_ids=token_ids_1T, use_cache=False).logits[0, num_prompt - 1 : -1]
    return logits_TV.float().softmax(dim=-1)
