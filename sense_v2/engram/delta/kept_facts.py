"""Which rows of a delta are of which fact: said in the delta itself, so that one fact can be corrected or withdrawn

    keep_facts       what was taught into an overlay ──▶ its delta, and in it each fact with its rows
    withdraw_facts   a delta ──▶ one without some of its facts; rows that others look up as well stay, and are named
    colliding_facts  rows that several deltas changed differently ──▶ which of their facts those are of

A fact is corrected where another answer is taught after one of its prompts, in its delta or in one on top. Rows of it
that the correction doesn't look up are the table's again, but for those of other facts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sense_v2.core.errors import number_of, with_way_out
from sense_v2.engram.delta.delta_file import Delta, Source, read_delta, write_delta
from sense_v2.engram.delta.overlay import OverlayStorage

FACTS = "facts"
SHOWN = 8
"""Names, or row ids, in a message."""


@dataclass(frozen=True)
class KeptFact:
    """A fact that a delta was taught."""

    subject: str
    answer: str
    prompts: tuple[str, ...]
    """What the answer was taught after."""
    row_ids: tuple[int, ...]
    """The rows that it has in the delta, ascending."""

    def name(self) -> str:
        """Name it in a message."""
        return f"{self.subject} → {self.answer.strip()}"


@dataclass(frozen=True)
class Withdrawn:
    """What `withdraw_facts` has made."""

    delta: Delta
    facts: list[KeptFact]
    row_ids: tuple[int, ...]
    """Rows that are no longer in the delta."""
    shared: dict[int, list[KeptFact]]
    """Rows that stay, and the facts that look them up as well."""


@dataclass(frozen=True)
class Collision:
    """Rows that several deltas changed to different values, and what each was taught in them."""

    row_ids: tuple[int, ...]
    facts: dict[str, list[KeptFact]]
    """A delta's name -> its facts in these rows; none where it doesn't say."""

    def text(self) -> str:
        """Say it in a line."""
        return f"{number_of(len(self.row_ids), 'row')} ({first_ids(self.row_ids)}): {self.facts_text()}"

    def facts_text(self) -> str:
        """Say which facts collide."""
        return "; ".join(f"{names_of(facts) or 'unknown facts'} of {name}" for name, facts in self.facts.items())


def first_ids(row_ids: Iterable[int]) -> str:
    """List row ids in a message."""
    ids = list(row_ids)
    return ", ".join(map(str, ids[:SHOWN])) + ", …" * (len(ids) > SHOWN)


def names_of(facts: Sequence[KeptFact]) -> str:
    """Name facts in a message."""
    return "; ".join(fact.name() for fact in facts[:SHOWN]) + "; …" * (len(facts) > SHOWN)


def facts_in(delta: Delta) -> list[KeptFact]:
    """The facts that a delta says it has. Raises `ValueError` naming the file where what it says can't be."""
    return _facts(delta.info.extra, delta.path, delta.info.base.rows)


def known_facts(overlay: OverlayStorage) -> list[KeptFact]:
    """The facts of an overlay, then those of overlays below it."""
    found: list[KeptFact] = []
    storage: Any = overlay
    while storage is not storage.table:
        found += _facts(storage.manifest.extra, storage.path, storage.num_embeddings)
        storage = storage.base
    return found


def keep_facts(overlay: OverlayStorage, facts: Iterable[KeptFact]) -> None:
    """Commit an overlay, and say in it which of its rows these facts have. Rows that didn't move are left out.

    Raises as `OverlayStorage.commit`.
    """
    facts = list(facts)
    own = _facts(overlay.manifest.extra, overlay.path, overlay.num_embeddings)
    known = known_facts(overlay)
    corrected = corrections(known, facts)
    needed = {row for fact in (*facts, *(old for old in known if old not in corrected)) for row in fact.row_ids}
    added: dict[KeptFact, set[int]] = {fact: set(fact.row_ids) for fact in facts}
    for old, correction in corrected.items():
        left = sorted(set(old.row_ids) - needed)
        _take_back(overlay, left)
        added[correction] |= set(left)
    own_ids = set(overlay.own_ids.tolist())
    old_ones = [_with_rows(old, own_ids.intersection(old.row_ids)) for old in own]
    new_ones = [_with_rows(fact, own_ids & rows) for fact, rows in added.items()]
    overlay.commit(extra={**overlay.manifest.extra, **as_extra(together(old_ones, new_ones))})


def corrections(known: Iterable[KeptFact], new: Iterable[KeptFact]) -> dict[KeptFact, KeptFact]:
    """Find which known facts are corrected, and by which: one that answers the same prompt otherwise."""
    by_prompt = {prompt: fact for fact in new for prompt in fact.prompts}
    met = ((old, by_prompt[prompt]) for old in known for prompt in old.prompts if prompt in by_prompt)
    return {old: fact for old, fact in met if old.answer.strip() != fact.answer.strip()}


def together(known: Sequence[KeptFact], new: Sequence[KeptFact]) -> list[KeptFact]:
    """Put facts together: what is the same fact is one, and one that is corrected goes where no row is its alone."""
    corrected = corrections(known, new)
    found: dict[tuple[str, str], KeptFact] = {}
    for fact in [*(old for old in known if old not in corrected), *new]:
        old = found.get((fact.subject, fact.answer))
        if old is not None:
            prompts = tuple(dict.fromkeys((*old.prompts, *fact.prompts)))
            fact = _with_rows(dataclasses.replace(fact, prompts=prompts), {*old.row_ids, *fact.row_ids})
        found[fact.subject, fact.answer] = fact
    owned = {row for fact in found.values() for row in fact.row_ids}
    return [*(old for old in known if old in corrected and not owned.issuperset(old.row_ids)), *found.values()]


def withdraw_facts(path: Path, names: Sequence[str], output: Path) -> Withdrawn:
    """Write a delta without some of its facts: their rows are the table's again, or those of the delta below.

    Rows that other facts look up as well stay. Optimizer states are left out.

    Args:
        path: The delta, which stays as it is.
        names: Of the facts: the subject, or "subject → answer".
        output: The new delta.

    Raises:
        ValueError: The delta doesn't say which rows its facts have, has no such fact or several, or all rows of one
            are other facts', too.
    """
    delta = read_delta(path)
    facts = facts_in(delta)
    if not facts:
        raise with_way_out(
            ValueError(
                f"{path} doesn't say which rows belong to which fact: an earlier release made it, or training"
            ),
            "Teach its facts anew, with `sense-engram delta teach`",
        )
    gone = [_fact_of(name, facts, path) for name in names]
    stay = [fact for fact in facts if fact not in gone]
    others = facts_by_row(stay)
    for fact in gone:
        if fact.row_ids and others.keys() >= set(fact.row_ids):
            owners = list(dict.fromkeys(other for row in fact.row_ids for other in others[row]))
            raise with_way_out(
                ValueError(
                    f"all rows of {fact.name()} are rows of other facts ({names_of(owners)}), which would go with it"
                ),
                "Withdraw them together and teach the others again, or correct the fact: teach another answer",
            )
    rows = {row for fact in gone for row in fact.row_ids}
    left_U = [at for at, row in enumerate(delta.row_ids_U.tolist()) if row not in rows or row in others]
    places_U = torch.tensor(left_U, dtype=torch.int64)
    info = dataclasses.replace(delta.info, state_steps={}, extra={**delta.info.extra, **as_extra(stay)})
    source = Source(delta.rows_UD.shape[1], delta.rows_UD.dtype, lambda part: delta.rows_UD[places_U[part]])
    write_delta(output, info, delta.row_ids_U[left_U], {"rows": source}, like=path)
    shared = {row: others[row] for row in sorted(rows & others.keys())}
    return Withdrawn(read_delta(output), gone, tuple(sorted(rows - others.keys())), shared)


def colliding_facts(deltas: Sequence[Delta], row_ids: Sequence[int]) -> list[Collision]:
    """Say of rows that deltas changed to different values which of their facts collide there, most rows first."""
    groups: dict[tuple[tuple[str, tuple[KeptFact, ...]], ...], list[int]] = {}
    names = [delta.path.name for delta in deltas]
    if len(set(names)) < len(names):
        names = [str(delta.path) for delta in deltas]
    owned = [facts_by_row(facts_in(delta)) for delta in deltas]
    held = [set(delta.row_ids_U.tolist()) for delta in deltas]
    for row in row_ids:
        key = tuple(
            (name, tuple(owners.get(row, ())))
            for name, owners, rows in zip(names, owned, held, strict=True)
            if row in rows
        )
        groups.setdefault(key, []).append(row)
    found = [Collision(tuple(rows), {name: list(facts) for name, facts in key}) for key, rows in groups.items()]
    return sorted(found, key=lambda one: -len(one.row_ids))


def facts_by_row(facts: Sequence[KeptFact]) -> dict[int, list[KeptFact]]:
    """Row id -> the facts that have it."""
    found: dict[int, list[KeptFact]] = {}
    for fact in facts:
        for row in fact.row_ids:
            found.setdefault(row, []).append(fact)
    return found


def as_extra(facts: Sequence[KeptFact]) -> dict[str, Any]:
    """What a delta's `extra` says of its facts."""
    return {FACTS: [dataclasses.asdict(fact) for fact in facts]}


def _facts(extra: dict[str, Any], path: object, num_rows: int) -> list[KeptFact]:
    found = extra.get(FACTS, [])
    try:
        facts = [
            KeptFact(one["subject"], one["answer"], tuple(one["prompts"]), tuple(one["row_ids"]))
            for one in found
            if one.keys() == {field.name for field in dataclasses.fields(KeptFact)}
        ]
        texts = [text for fact in facts for text in (fact.subject, fact.answer, *fact.prompts)]
        rows = [row for fact in facts for row in fact.row_ids]
        is_right = len(facts) == len(found) and all(isinstance(text, str) for text in texts)
        is_right = is_right and all(type(row) is int and 0 <= row < num_rows for row in rows)
    except (TypeError, AttributeError):
        is_right = False
    if not is_right:
        raise with_way_out(
            ValueError(
                f"{path}: extra.{FACTS} must be a list of facts with their subject, answer, prompts and row_ids"
            ),
            "Make the delta anew",
        )
    return facts


def _with_rows(fact: KeptFact, row_ids: Iterable[int]) -> KeptFact:
    return dataclasses.replace(fact, row_ids=tuple(sorted(row_ids)))


def _fact_of(name: str, facts: Sequence[KeptFact], path: Path) -> KeptFact:
    found = [fact for fact in facts if name in (fact.name(), fact.subject)]
    if not found:
        raise with_way_out(ValueError(f"no fact {name!r} in {path}: it has {names_of(facts)}"), "Name one of these")
    if len(found) > 1:
        named = " or ".join(repr(fact.name()) for fact in found)
        raise with_way_out(ValueError(f"{len(found)} facts of {path} are of {name!r}"), f"Name one: {named}")
    return found[0]


def _take_back(overlay: OverlayStorage, row_ids: Sequence[int]) -> None:
    """These rows are the table's again, whatever an overlay below says."""
    if row_ids:
        ids_U = torch.tensor(row_ids)
        overlay.forget(ids_U)
        rows_UD = overlay.table(ids_U)
        differ_U = (overlay.base(ids_U) != rows_UD).any(dim=1)
        overlay.write(ids_U[differ_U], rows_UD[differ_U])
