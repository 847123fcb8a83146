"""Facts in their wordings -> token ids, and the rows that belong to their subjects' own n-grams

    "{subject} was born in"  ──▶  prompt ids, answer ids, which positions are the subject's
    subject's positions      ──▶  ids of rows whose n-gram lies within the subject and touches most of its words

A row at the end of a prompt is read after that prompt alone. What a row of the subject adds is read by all later
positions through attention, whatever the words around it: that is where a fact is kept for wordings that were never
taught (MEMIT, 2210.07229, found the last token of the subject). And an n-gram that reaches out of the subject belongs
to one wording, and to other texts: its rows are left alone. So are those of half a name, which belong to all who
share it: a neighbour who looks up none of the rows stays the same bits. Of a subject of a single token no n-gram lies
within; it gets those that end in it.

L layers with memory, T tokens, H rows a position, U rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer

from sense_v2.core.errors import with_way_out
from sense_v2.hf.facts.facts_file import PLACE, Fact
from sense_v2.hf.memory import EngramMemory
from sense_v2.hf.serving.offload import OffloadedTables


@dataclass(frozen=True)
class Question:
    """One fact in one wording."""

    fact: int
    """Its place in the list of facts."""
    wording: str
    held_out: bool
    prompt_ids: list[int] = field(repr=False)
    answer_ids: list[int] = field(repr=False)
    subject: range = field(repr=False)
    """Positions of the prompt that are the subject's."""
    words: list[int] = field(repr=False)
    """Those of them at which a word of the subject begins."""


@dataclass(frozen=True)
class SubjectRows:
    """The rows that are learned, and whose they are."""

    row_ids_U: torch.Tensor
    """Ascending."""
    facts: dict[int, list[int]]
    """Row id -> the facts whose subject looks it up."""
    left_out: int
    """Rows that a budget left no room for."""

    def shared(self) -> list[tuple[list[int], int]]:
        """Groups of facts that share rows, and how many, most first."""
        groups: dict[tuple[int, ...], int] = {}
        for owners in self.facts.values():
            if len(owners) > 1:
                groups[tuple(owners)] = groups.get(tuple(owners), 0) + 1
        return sorted(((list(group), count) for group, count in groups.items()), key=lambda one: -one[1])


def questions_of(facts: Sequence[Fact], tokenizer: Any) -> list[Question]:
    """All facts in all their wordings, the taught ones and those that are only asked.

    Prompt and answer are encoded apart, as they are when the model is given the prompt; what the tokenizer begins
    each text with comes first.

    Raises `ValueError` where an answer, or a subject, has no tokens.
    """
    opening = _opening(tokenizer)
    questions = []
    for place, fact in enumerate(facts):
        for wording in (*fact.wordings, *fact.hold_out):
            text = fact.prompt(wording)
            start = wording.rindex(PLACE) + (len(fact.subject) - len(PLACE)) * (wording.count(PLACE) - 1)
            ids, spans = _encoded(tokenizer, text)
            inside = [at for at, (low, high) in enumerate(spans) if high > start and low < start + len(fact.subject)]
            answer_ids, _ = _encoded(tokenizer, fact.text(wording))
            for what, found in (("subject", inside), ("answer", answer_ids)):
                if not found:
                    raise with_way_out(
                        ValueError(f"{fact.name()}, field {what!r}: it has no tokens"), "Write it in other characters"
                    )
            first = len(opening) + inside[0]
            subject = range(first, len(opening) + inside[-1] + 1)
            words = [len(opening) + at for at in inside if at == inside[0] or _begins_word(text, spans[at])]
            held_out = wording in fact.hold_out
            questions.append(Question(place, wording, held_out, [*opening, *ids], answer_ids, subject, words))
    return questions


def subject_rows(
    memory: EngramMemory | OffloadedTables, questions: Iterable[Question], *, max_rows: int | None = None
) -> SubjectRows:
    """The rows of the subjects' own n-grams, in the wordings that are taught: of the n-grams that lie within the
    subject, those that touch the most of its words (of a subject of one word, the most of its tokens).

    With `max_rows`, the rows nearest the subjects' ends are taken, longer n-grams first: they are of fewer other
    texts.
    """
    orders = memory.head_orders[0][1]
    owners: dict[int, set[int]] = {}
    ranks: dict[int, tuple[int, int]] = {}
    for question in questions:
        if question.held_out:
            continue
        row_ids_LTH = memory.hash_tokens(_one(question.prompt_ids, memory))[1][:, 0].cpu()
        last = question.subject[-1]
        for at, order in _whole_ngrams(question, sorted(set(orders))):
            for head in (head for head, its_order in enumerate(orders) if its_order == order):
                for row_id in row_ids_LTH[:, at, head].tolist():
                    owners.setdefault(row_id, set()).add(question.fact)
                    ranks[row_id] = min(ranks.get(row_id, (last - at, -order)), (last - at, -order))
    chosen = sorted(owners, key=lambda row_id: (ranks[row_id], row_id))[:max_rows]
    ids_U = torch.tensor(sorted(chosen), dtype=torch.int64)
    return SubjectRows(
        ids_U, {row_id: sorted(owners[row_id]) for row_id in ids_U.tolist()}, len(owners) - len(chosen)
    )


def _whole_ngrams(question: Question, orders: Sequence[int]) -> list[tuple[int, int]]:
    """Where the n-grams end that say who is meant, and their orders."""
    subject = question.subject
    if len(subject) < min(orders):
        return [(at, order) for at in subject for order in orders]
    parts = question.words if len(question.words) > 1 else subject
    # An n-gram touches the parts that begin in it, and the one that it begins in the middle of.
    touched = {
        (at, order): sum(at - order + 1 < one <= at for one in parts) + 1
        for at in subject
        for order in orders
        if at - order + 1 >= subject[0]
    }
    return [one for one, count in touched.items() if count == max(touched.values())]


def ngrams_of_rows(
    memory: EngramMemory | OffloadedTables, token_ids: Sequence[int], row_ids: set[int]
) -> dict[int, tuple[int, list[int]]]:
    """Which of these rows a text looks up: row id -> (layer, the n-gram's token ids, as first met)."""
    found: dict[int, tuple[int, list[int]]] = {}
    row_ids_LTH = memory.hash_tokens(_one(token_ids, memory))[1][:, 0].cpu()
    for (layer_id, orders), row_ids_TH in zip(memory.head_orders, row_ids_LTH.tolist(), strict=True):
        for at, row_ids_H in enumerate(row_ids_TH):
            for order, row_id in zip(orders, row_ids_H, strict=True):
                if row_id in row_ids and row_id not in found:
                    found[row_id] = layer_id, list(token_ids[max(0, at - order + 1) : at + 1])
    return found


def _one(token_ids: Sequence[int], memory: EngramMemory | OffloadedTables) -> torch.Tensor:
    """[1, T], where the memory is."""
    return torch.tensor([list(token_ids)], device=memory.device)


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, and the characters that each stands for."""
    if isinstance(tokenizer, Tokenizer):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise with_way_out(
            ValueError(
                f"{type(tokenizer).__name__} can't say which characters a token stands for, so no subject is found "
                "in its tokens"
            ),
            "Use the model's fast tokenizer (tokenizer.json)",
        ) from None
    return found["input_ids"], found["offset_mapping"]


def _begins_word(text: str, span: tuple[int, int]) -> bool:
    """True if a token stands after a space, which tokenizers count as part of it or not."""
    low, high = span
    return text[low:high][:1].isspace() or text[:low][-1:].isspace()


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before each text."""
    if isinstance(tokenizer, Tokenizer):
        return []
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    return list(whole[: starts[0]]) if starts else []
