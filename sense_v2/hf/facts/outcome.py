"""What teaching facts has done: which questions are answered, and how far the model is from what it was elsewhere

Success is greedy and exact: every token of the answer is the model's likeliest one, after the prompt and the answer's
tokens before it. Damage is the mean over a text's positions of KL(before ‖ after), in nats, and how many of the
likeliest next tokens are others. A text that looks up none of the changed rows can't change (its logits are the same
bits), so only the others are computed.

B batch, T tokens, K places of answers, V tokens of the vocabulary, U rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.facts.facts_file import Fact, text_lines
from sense_v2.hf.facts.wordings import Question, SubjectRows, ngrams_of_rows
from sense_v2.hf.insight.damage import damage as damage_of_blocks
from sense_v2.hf.insight.damage import own_samples
from sense_v2.hf.insight.evaluation import evaluating
from sense_v2.hf.overlays import tables_of

QUESTIONS_AT_ONCE = 32
SAMPLED_TEXTS, SAMPLED_TOKENS = 32, 32
MOST_TOKENS = 256
"""Of a neutral text; its beginning is taken."""
NO_LABEL = -100


def answer_logits(model: PreTrainedModel, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask questions, their answers given token by token.

    Returns:
        Logits [B, K, V] where some answer has a token, and those tokens [B, K], `NO_LABEL` where this one has none.
    """
    length = max(len(one.prompt_ids) + len(one.answer_ids) for one in questions)
    ids_BT = torch.zeros(len(questions), length, dtype=torch.int64)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, NO_LABEL)
    for row, one in enumerate(questions):
        start, end = len(one.prompt_ids), len(one.prompt_ids) + len(one.answer_ids)
        ids_BT[row, :end] = torch.tensor([*one.prompt_ids, *one.answer_ids])
        mask_BT[row, :end] = 1
        labels_BT[row, start:end] = ids_BT[row, start:end]
    keep_K = (labels_BT[:, 1:] != NO_LABEL).any(dim=0).nonzero()[:, 0].to(model.device)
    labels_BK = labels_BT[:, 1:].to(model.device)[:, keep_K]
    arguments = {"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**arguments, use_cache=False, logits_to_keep=keep_K).logits, labels_BK
    return model(**arguments, use_cache=False).logits[:, keep_K], labels_BK


def answered(
    model: PreTrainedModel, questions: Sequence[Question], advance: Callable[[int], Any] | None = None
) -> list[list[bool]]:
    """Whether each token of each question's answer is the model's likeliest."""
    order = sorted(range(len(questions)), key=lambda at: len(questions[at].prompt_ids))
    right: list[list[bool]] = [[] for _ in questions]
    with evaluating(model):
        for start in range(0, len(order), QUESTIONS_AT_ONCE):
            part = order[start : start + QUESTIONS_AT_ONCE]
            logits_BKV, labels_BK = answer_logits(model, [questions[at] for at in part])
            is_right_BK, is_asked_BK = logits_BKV.argmax(dim=-1) == labels_BK, labels_BK != NO_LABEL
            for row, at in enumerate(part):
                right[at] = is_right_BK[row][is_asked_BK[row]].tolist()
            if advance is not None:
                advance(len(part))
    return right


def success(
    facts: Sequence[Fact], questions: Sequence[Question], before: list[list[bool]], after: list[list[bool]]
) -> dict[str, Any]:
    """Count right answers, as JSON holds it: in all, by wording, by fact and by place in the answer."""
    asked = list(zip(questions, before, after, strict=True))

    def shares(chosen: Iterable[tuple[Question, list[bool], list[bool]]]) -> dict[str, Any]:
        found = list(chosen)
        count = len(found)
        return {
            "asked": count,
            "before": sum(all(old) for _, old, _ in found) / count if count else None,
            "after": sum(all(new) for _, _, new in found) / count if count else None,
        }

    by_fact: list[list[tuple[Question, list[bool], list[bool]]]] = [[] for _ in facts]
    by_wording: dict[tuple[str, bool], list[tuple[Question, list[bool], list[bool]]]] = {}
    for one in asked:
        by_fact[one[0].fact].append(one)
        by_wording.setdefault((one[0].wording, one[0].held_out), []).append(one)
    places = range(max((len(question.answer_ids) for question in questions), default=0))
    return {
        "taught": shares(one for one in asked if not one[0].held_out),
        "held_out": shares(one for one in asked if one[0].held_out),
        "by_wording": [
            {"wording": wording, "held_out": held_out, **shares(own)}
            for (wording, held_out), own in by_wording.items()
        ],
        "by_fact": [
            {
                "line": fact.line,
                "subject": fact.subject,
                "answer": fact.answer.strip(),
                "learned": all(all(new) for question, _, new in own if not question.held_out),
                "taught": shares(one for one in own if not one[0].held_out),
                "held_out": shares(one for one in own if one[0].held_out),
            }
            for fact, own in zip(facts, by_fact, strict=True)
        ],
        "by_place": [
            {
                "place": place + 1,
                "asked": len(own),
                "before": sum(old for old, _ in own) / len(own),
                "after": sum(new for _, new in own) / len(own),
            }
            for place in places
            for own in [[(old[place], new[place]) for _, old, new in asked if len(new) > place]]
        ],
    }


# Texts that nothing was taught about


def neutral_texts(path: Path, tokenizer: Any) -> list[list[int]]:
    """Read a file of texts, one a line, as token ids. Raises `ValueError` where none has two tokens."""
    lines = text_lines(path)
    texts = [encode([line], tokenizer, separator_id=None)[:MOST_TOKENS].tolist() for line in lines]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise with_way_out(ValueError(f"{path} has no text of two tokens"), "Write one text a line")
    return texts


def sampled_texts(model: PreTrainedModel, *, seed: int = 0, num_texts: int = SAMPLED_TEXTS) -> list[list[int]]:
    """Let the model write texts, each from a random token on."""
    generator = torch.Generator().manual_seed(seed)
    size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # transformers says Module
    first_ids_B = torch.randint(size, (num_texts,), generator=generator)
    return own_samples(model, first_ids_B, num_tokens=SAMPLED_TOKENS, seed=seed).tolist()


def texts_with_rows(model: PreTrainedModel, texts: Sequence[list[int]], row_ids_U: torch.Tensor) -> list[int]:
    """Which texts look up any of these rows: those that can change."""
    memory = tables_of(model)
    row_ids = set(row_ids_U.tolist())
    return [at for at, ids in enumerate(texts) if ngrams_of_rows(memory, ids, row_ids)]


def damage(
    model: PreTrainedModel,
    texts: Sequence[list[int]],
    words: Callable[[list[int]], str],
    rows: SubjectRows,
    facts: Sequence[Fact],
    as_before: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Compare the model with what it was, on texts that nothing was taught about, as JSON holds it.

    Args:
        model: As it is now.
        texts: Token ids.
        words: Token ids to text.
        rows: Those that were learned.
        facts: Whose they are.
        as_before: Within which the rows are as they were.
    """
    memory = tables_of(model)
    row_ids = set(rows.row_ids_U.tolist())
    total, num_tokens, num_top, changed = 0.0, 0, 0, []
    for ids in texts:
        num_tokens += len(ids)
        met = ngrams_of_rows(memory, ids, row_ids)
        if not met:
            continue
        harm = damage_of_blocks(model, as_before, torch.tensor([ids]))
        top = round(harm.changed * harm.tokens)
        total += harm.divergence
        num_top += top
        if harm.divergence:
            changed.append(
                {
                    "text": words(ids),
                    "kl": harm.divergence,
                    "tokens_changed": top,
                    "tokens": len(ids),
                    "rows": [
                        {
                            "row": row_id,
                            "layer": layer,
                            "ngram": words(ngram),
                            "facts": [facts[place].name() for place in rows.facts[row_id]],
                        }
                        for row_id, (layer, ngram) in sorted(met.items())
                    ],
                }
            )
    return {
        "texts": len(texts),
        "tokens": num_tokens,
        "kl": total / len(texts) if texts else None,
        "top_changed": num_top / num_tokens if num_tokens else None,
        "texts_changed": len(changed),
        "texts_of_other_words": sum(1 for one in changed if one["tokens_changed"]),
        "changed": sorted(changed, key=lambda one: -float(str(one["kl"]))),
    }
