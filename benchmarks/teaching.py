"""What does a fact cost, taught into rows, and what else does it change? Against the same facts in the weights.

Made-up facts ("The capital of Kovira is Melun.") are taught to the demo's model one after the other, each until its
loss is below 0.1 or for 40 steps: into the rows of its n-grams by `teach`, and, the peer, into all weights of the
backbone by AdamW, as anybody would who has no memory. For each rate: how many facts the model says right after they
were taught, how many still when all are, the loss on held-out text (the standard library's, as the demo holds it out;
0 is the ceiling of what it may rise by), and the bytes that changed.

    make demo && python benchmarks/teaching.py runs/demo/model --facts 40

Nothing in the folder changes. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from turns import machine

from sense_v2.hf.data.corpus import encode, read_corpus
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.overlays import add_overlay
from sense_v2.hf.training.teaching import teach

STEPS, STOP_BELOW = 40, 0.1
ROW_RATES, WEIGHT_RATES = (0.01, 0.02, 0.05, 0.1), (1e-4, 3e-4, 1e-3)
HELD_OUT_BLOCKS, BLOCK_TOKENS = 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, with tokenizer.json")
    parser.add_argument("--facts", type=int, default=40)
    arguments = parser.parse_args()
    model = from_pretrained(arguments.model)
    tokenizer = Tokenizer.from_file(f"{arguments.model}/tokenizer.json")
    facts = made_up_facts(arguments.facts)
    corpus = read_corpus(None, max_bytes=16 * 2**20)
    stream = torch.from_numpy(encode(corpus.held_out_texts, tokenizer, separator_id=0)).long()
    held_out_BT = stream[: HELD_OUT_BLOCKS * BLOCK_TOKENS].view(-1, BLOCK_TOKENS)
    untouched = loss_on(model, held_out_BT)
    print(f"{machine()}\n{len(facts)} facts; held-out loss before: {untouched:.4f}\n")
    head = ("where", "rate", "said at once", "at the end", "held-out", "bytes", "a fact")
    print("{:<8} {:>7} {:>13} {:>11} {:>9} {:>10} {:>8}".format(*head))

    results = []
    for where, rates in (("rows", ROW_RATES), ("weights", WEIGHT_RATES)):
        for rate in rates:
            one = copy.deepcopy(model)
            learn, changed_bytes = (into_rows if where == "rows" else into_weights)(one, tokenizer, rate)
            seconds, at_once = 0.0, 0
            for prompt, answer in facts:
                started = time.perf_counter()
                learn(prompt, answer)
                seconds += time.perf_counter() - started
                at_once += says(one, tokenizer, prompt, answer)
            result = {
                "where": where,
                "rate": rate,
                "at_once": at_once / len(facts),
                "at_the_end": sum(says(one, tokenizer, *fact) for fact in facts) / len(facts),
                "held_out_change": loss_on(one, held_out_BT) - untouched,
                "changed_bytes": changed_bytes(),
                "seconds_a_fact": seconds / len(facts),
            }
            results.append(result)
            print(
                f"{where:<8} {rate:>7} {result['at_once']:>13.0%} {result['at_the_end']:>11.0%} "
                f"{result['held_out_change']:>+9.4f} {result['changed_bytes']:>10,} "
                f"{result['seconds_a_fact']:>6.2f} s"
            )
    print(json.dumps({"machine": machine(), "facts": len(facts), "held_out_loss": untouched, "results": results}))


def made_up_facts(count: int) -> list[tuple[str, str]]:
    """(prompt, answer), the same from the same count; places and answers that no text has."""
    draws = random.Random(0)

    def name() -> str:
        return "".join(draws.choice("bcdfghjklmnprstvwz") + draws.choice("aeiou") for _ in range(3)).capitalize()

    kinds = ["The capital of {} is", "The author of {} is", "The best friend of {} is", "The river through {} is"]
    return [(kinds[number % len(kinds)].format(name()), f" {name()}.") for number in range(count)]


def into_rows(
    model: Any, tokenizer: Tokenizer, rate: float
) -> tuple[Callable[[str, str], object], Callable[[], int]]:
    overlay = add_overlay(model)

    def learn(prompt: str, answer: str) -> object:
        return teach(model, tokenizer, answer, prompt=prompt, steps=STEPS, lr=rate, stop_below=STOP_BELOW)

    return learn, lambda: len(overlay.changed_ids) * (8 + overlay.embedding_dim * overlay.dtype.itemsize)


def into_weights(
    model: Any, tokenizer: Tokenizer, rate: float
) -> tuple[Callable[[str, str], object], Callable[[], int]]:
    memory = memory_of(model)
    memory.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def learn(prompt: str, answer: str) -> None:
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        context, learned = (encode([part], tokenizer, separator_id=None).tolist() for part in (prompt, answer))
        token_ids_1T = torch.tensor([context + learned])
        labels_1T = token_ids_1T.clone()
        labels_1T[:, : len(context)] = -100
        for _ in range(STEPS):
            loss = model(input_ids=token_ids_1T, labels=labels_1T, use_cache=False).loss
            if loss.item() < STOP_BELOW:
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return learn, lambda: sum(weight.numel() * weight.element_size() for weight in weights)


@torch.no_grad()
def says(model: Any, tokenizer: Tokenizer, prompt: str, answer: str) -> bool:
    """Whether the likeliest continuation is the answer."""
    prompt_1T, answer_1T = (
        torch.from_numpy(encode([part], tokenizer, separator_id=None)).long()[None] for part in (prompt, answer)
    )
    # One forward says it: each token of the answer must be the likeliest after those before it.
    likeliest_1T = model(input_ids=torch.cat([prompt_1T, answer_1T], dim=1), use_cache=False).logits.argmax(-1)
    return bool((likeliest_1T[:, prompt_1T.shape[1] - 1 : -1] == answer_1T).all())


@torch.no_grad()
def loss_on(model: Any, token_ids_BT: torch.Tensor) -> float:
    losses = [float(model(input_ids=ids[None], labels=ids[None], use_cache=False).loss) for ids in token_ids_BT]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
