"""What a person should know of facts before they are taught: which share rows, which correct what is known

Facts that share all of their rows can't be told apart, and one that learns in rows of a fact of an earlier lesson may
overwrite it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from sense_v2.core.errors import number_of
from sense_v2.engram.delta.kept_facts import KeptFact, corrections, facts_by_row
from sense_v2.hf.facts.facts_file import Fact
from sense_v2.hf.facts.wordings import SubjectRows

MOST_NOTES = 10
"""Of one kind."""


def kept_fact(fact: Fact, row_ids: Sequence[int]) -> KeptFact:
    """What a delta keeps of a fact."""
    return KeptFact(fact.subject, fact.answer, tuple(map(fact.prompt, fact.wordings)), tuple(row_ids))


def notes_on(facts: Sequence[Fact], rows: SubjectRows, known: Sequence[KeptFact]) -> Iterator[str]:
    """Say what a person should know of facts before they are taught on top of those that are known."""
    yield from _first(_about_known(facts, rows, known))
    own: dict[int, int] = {}
    for owners in rows.facts.values():
        for place in owners:
            own[place] = own.get(place, 0) + (len(owners) == 1)
    for place, fact in enumerate(facts):
        if place not in own:
            yield f"{fact.name()} has no row to learn in: the budget leaves none"
        elif not own[place]:
            yield f"{fact.name()} shares all of its rows with other facts, and may not be told from them"
    if rows.left_out:
        yield f"{rows.left_out:,} rows of the subjects are left out, for which there is no room in the budget"
    for group, count in rows.shared()[:5]:
        named = "; ".join(facts[place].name() for place in group[:4])
        yield f"{count} rows are shared by {len(group)} facts: {named}{'; …' * (len(group) > 4)}"


def _about_known(facts: Sequence[Fact], rows: SubjectRows, known: Sequence[KeptFact]) -> Iterator[str]:
    """What the facts have to do with those that are known."""
    asked = {kept_fact(fact, ()): fact for fact in facts}
    corrected = corrections(known, asked)
    for old, correction in corrected.items():
        yield f"{asked[correction].name()} corrects {old.name()}"
    of_rows, met = facts_by_row(known), Counter[tuple[int, KeptFact]]()
    for row_id, owners in rows.facts.items():
        met.update((place, old) for place in owners for old in of_rows.get(row_id, ()) if old not in corrected)
    for (place, old), count in met.items():
        fact = facts[place]
        if (old.subject, old.answer) != (fact.subject, fact.answer):
            shared = f"{fact.name()} learns in {number_of(count, 'row')} that {old.name()} has"
            yield f"{shared}: ask it again, or teach both at once"


def _first(lines: Iterator[str]) -> Iterator[str]:
    yield from islice(lines, MOST_NOTES)
    more = sum(1 for _ in lines)
    if more:
        yield f"and {number_of(more, 'other')} of the same kind"
