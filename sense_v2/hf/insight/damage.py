"""What training cost: how far a model has moved from the untouched one, on text that the untouched one wrote.

Held-out text of the corpus says what was learned. On what a model samples by itself, all that it knew counts, in the
shares in which it would say it, and no other text has to be at hand.

B batch, T sequence, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.hf.insight.evaluation import evaluating
from sense_v2.hf.insight.interventions import memory_off
from sense_v2.hf.memory import attached_memory


@dataclass
class Damage:
    """Means over the tokens of a text, the untouched model against the one at hand."""

    divergence: float
    """KL(untouched ‖ now) of the next token, in nats."""
    changed: float
    """The share of positions whose likeliest next token is another one."""
    tokens: int


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Let a model compute as it did before its memory, and its PEFT adapter if it has one, were trained."""
    memory = attached_memory(model)
    with ExitStack() as off:
        if memory is not None:
            off.enter_context(memory_off(memory))
        if hasattr(model, "disable_adapter"):
            # Of PEFT's own class: the one on a model with memory warns that the memory stays on.
            off.enter_context(type(model).disable_adapter(model))
        yield


def own_samples(model: PreTrainedModel, first_ids_B: torch.Tensor, *, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Return token ids [B, T] that a model samples at temperature 1 after each first token, T = `num_tokens`."""
    first_ids_B1 = first_ids_B[:, None].to(model.device)
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        generate: Any = model.generate
        sampled: torch.Tensor = generate(
            input_ids=first_ids_B1,
            attention_mask=torch.ones_like(first_ids_B1),
            max_new_tokens=num_tokens - 1,
            min_new_tokens=num_tokens - 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    return sampled.cpu()


def damage(
    model: PreTrainedModel,
    before: Callable[[], AbstractContextManager[Any]],
    token_ids_BT: torch.Tensor,
    *,
    batch_size: int = 4,
) -> Damage:
    """Compare a model with what it is inside of `before()`, on blocks of tokens, each on its own."""
    divergence, changed, tokens = 0.0, 0, 0
    with evaluating(model):
        for block_BT in token_ids_BT.to(model.device).split(batch_size):
            with before():
                before_BTV = log_probabilities(model, block_BT)
            now_BTV = log_probabilities(model, block_BT)
            divergence += float((before_BTV.exp() * (before_BTV - now_BTV)).sum(-1).double().sum())
            changed += int((before_BTV.argmax(-1) != now_BTV.argmax(-1)).sum())
            tokens += block_BT.numel()
    return Damage(divergence / tokens, changed / tokens, tokens)


def log_probabilities(model: PreTrainedModel, token_ids_BT: torch.Tensor) -> torch.Tensor:
    """What a model expects after each token, [B, T, V] in float32."""
    logits_BTV: torch.Tensor = model(input_ids=token_ids_BT, use_cache=False).logits
    return logits_BTV.float().log_softmax(-1)
