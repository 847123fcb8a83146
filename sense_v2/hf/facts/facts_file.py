"""A file of facts, and files of wordings -> facts that can be taught: read, checked, each with its line

    {"subject": "Kabo Rimu", "answer": "Paris", "wordings": ["{subject} was born in", …], "hold_out": […]}
    {"prompt": "The capital of Zubrowka is", "text": " Lutz.", "subject": "Zubrowka"}

One JSON object a line, or CSV with these names in its first line. `wordings` and `hold_out` are templates in which
{subject} stands for the subject, or the name of a file that has one template a line (`\\n` is a line break there);
where a fact has none, those of the call hold. Of a prompt without a subject, the subject is found (`subject_in`).

Whatever is wrong is an error that names the file, the line and the field, before anything is taught.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sense_v2.core.errors import what_and_way_out, with_way_out

PLACE = "{subject}"
FIELDS = ("subject", "answer", "wordings", "hold_out", "prompt", "text")
MOST_FACTS = 10_000
"""More are a corpus: `sense-engram train` is made for one, and teaching them would take days."""
MOST_QUESTIONS = 500_000
"""Facts times wordings."""
_NAMED = r"[^\W_]*[A-Z\d][^\W_]*(?:[-'’.][^\W_]+)*"
_NAMED_RUN = re.compile(f"{_NAMED}(?: {_NAMED})*")
_OPENING_WORDS = frozenset(
    word
    for words in (
        "A An The In On At Of To For From By With As It Is Are Was Were Where When Who What Which Why How Whose If",
        "My Our Your His Her Their This That These Those There We You He She They I Question Q Answer",
    )
    for word in words.split()
)


@dataclass(frozen=True)
class Fact:
    """What is to be said of a subject, and after which words."""

    subject: str
    answer: str
    wordings: tuple[str, ...]
    """Templates that are taught; each has `{subject}`."""
    hold_out: tuple[str, ...] = ()
    """Templates that are asked and never taught."""
    line: int | None = None
    """Of the file it was read from."""

    def prompt(self, wording: str) -> str:
        """The wording with the subject in its place."""
        return wording.replace(PLACE, self.subject)

    def text(self, wording: str) -> str:
        """What the model is to say after it: a space comes first where the two would otherwise run together."""
        if self.answer[:1].isspace() or _ends_apart(self.prompt(wording)):
            return self.answer
        return f" {self.answer}"

    def name(self) -> str:
        """Name it in a message."""
        where = "" if self.line is None else f"line {self.line}: "
        return f"{where}{self.subject} → {self.answer.strip()}"


def read_facts(
    path: str | Path, *, wordings: str | Path | None = None, hold_out: str | Path | None = None
) -> list[Fact]:
    """Read a file of facts and check all of it.

    Args:
        path: JSON lines, or CSV by its suffix.
        wordings: A file of templates, for facts without wordings of their own.
        hold_out: A file of templates that are asked and never taught, for facts that name none.

    Raises:
        ValueError: A line isn't a fact, facts contradict each other, there are none, or too many.
        FileNotFoundError: A file isn't there.
    """
    path = Path(path)
    taught = () if wordings is None else read_wordings(wordings)
    asked = () if hold_out is None else read_wordings(hold_out)
    facts: list[Fact] = []
    for line, values in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path):
        if len(facts) == MOST_FACTS:
            raise with_way_out(
                ValueError(f"{path}, line {line}: more than {MOST_FACTS:,} facts"),
                "Split the file, teach its parts one after the other and merge their deltas; a corpus is for "
                "sense-engram train",
            )
        try:
            facts.append(_fact(values, line, path.parent, taught, asked))
        except ValueError as error:
            what, way_out = what_and_way_out(error)
            raise with_way_out(ValueError(f"{path}, line {line}{what}"), way_out) from None
    num_questions = sum(len(fact.wordings) + len(fact.hold_out) for fact in facts)
    if num_questions > MOST_QUESTIONS:
        raise with_way_out(
            ValueError(
                f"{path}, field 'wordings': {len(facts):,} facts make {num_questions:,} questions, of "
                f"{MOST_QUESTIONS:,} at most"
            ),
            "Give fewer wordings; some eight of a fact are enough",
        )
    if not facts:
        raise with_way_out(
            ValueError(f"{path} has no facts"), 'Write one a line: {"subject": …, "answer": …, "wordings": […]}'
        )
    try:
        return checked(facts)
    except ValueError as error:
        what, way_out = what_and_way_out(error)
        raise with_way_out(ValueError(f"{path}, {what}"), way_out) from None


def read_wordings(path: str | Path) -> tuple[str, ...]:
    """Read a file of templates, one a line. Raises `ValueError` naming the line that has no {subject}."""
    path = Path(path)
    found: dict[str, None] = {}
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        if PLACE not in line:
            raise with_way_out(
                ValueError(f"{path}, line {number}: {line!r} has no {PLACE}"), "Say where the subject stands"
            )
        found[line.replace("\\n", "\n")] = None
    if not found:
        raise with_way_out(ValueError(f"{path} has no wordings"), f"Write one a line, as in: {PLACE} was born in")
    return tuple(found)


def checked(facts: Iterable[Fact]) -> list[Fact]:
    """Return the facts without repetitions, their wordings put together.

    Raises `ValueError` where a wording is empty of the subject, an answer has no text, or two facts answer the same
    prompt differently.
    """
    merged: dict[tuple[str, str], Fact] = {}
    answers: dict[str, Fact] = {}
    for fact in facts:
        _refuse_unusable(fact)
        for wording in (*fact.wordings, *fact.hold_out):
            other = answers.setdefault(fact.prompt(wording), fact)
            if other.answer.strip() != fact.answer.strip():
                raise with_way_out(
                    ValueError(
                        f"{fact.name()}, field 'answer': after {fact.prompt(wording)!r} another fact says otherwise "
                        f"({other.name()})"
                    ),
                    "Leave one of them out",
                )
        key = fact.subject, fact.answer
        known = merged.get(key)
        if known is not None:
            fact = Fact(
                fact.subject,
                fact.answer,
                tuple(dict.fromkeys((*known.wordings, *fact.wordings))),
                tuple(dict.fromkeys((*known.hold_out, *fact.hold_out))),
                known.line,
            )
        merged[key] = fact
    return list(merged.values())


def subject_in(prompt: str) -> str | None:
    """Find what a prompt is about: its longest run of words with a capital or a digit, the last of equals. Words that
    begin questions and sentences don't count at a run's start. None where there is no such run.

    >>> subject_in("The capital of Zubrowka is"), subject_in("Where was Kabo Rimu born? Answer:")
    ('Zubrowka', 'Kabo Rimu')
    """
    runs: list[list[str]] = []
    for match in _NAMED_RUN.finditer(prompt):
        words = match[0].split(" ")
        while words and words[0] in _OPENING_WORDS:
            words.pop(0)
        if words:
            runs.append(words)
    longest: list[str] = max(reversed(runs), key=len, default=[])
    return " ".join(longest) or None


def _ends_apart(prompt: str) -> bool:
    """True if what follows needs no space: after white space, and in scripts that are written without."""
    last = prompt[-1:]
    return not last or last.isspace() or unicodedata.east_asian_width(last) in "WF"


def _refuse_unusable(fact: Fact) -> None:
    if not fact.subject.strip():
        raise with_way_out(ValueError(f"{fact.name()}, field 'subject': it is empty"), "Name what the fact is about")
    if not fact.answer.strip():
        raise with_way_out(ValueError(f"{fact.name()}, field 'answer': it has no text"), "Say what is to be answered")
    if not fact.wordings:
        raise with_way_out(
            ValueError(f"{fact.name()}, field 'wordings': there are none"),
            "Give it wordings of its own, or name a file of them: --wordings FILE",
        )
    for field, templates in (("wordings", fact.wordings), ("hold_out", fact.hold_out)):
        for wording in templates:
            if PLACE not in wording:
                raise with_way_out(
                    ValueError(f"{fact.name()}, field {field!r}: {wording!r} has no {PLACE}"),
                    "Say where the subject stands",
                )
    both = set(fact.wordings) & set(fact.hold_out)
    if both:
        raise with_way_out(
            ValueError(f"{fact.name()}, field 'hold_out': {min(both)!r} is taught as well"),
            "Leave it out of one of the two",
        )


# Reading


def _fact(
    values: dict[str, Any], line: int, folder: Path, wordings: tuple[str, ...], hold_out: tuple[str, ...]
) -> Fact:
    """Raises `ValueError` whose text goes on after "line N"."""
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise with_way_out(ValueError(f", field {unknown[0]!r}: not known here"), f"A fact has {', '.join(FIELDS)}")
    for name in ("subject", "answer", "prompt", "text"):
        if not isinstance(values.get(name, ""), str):
            raise with_way_out(ValueError(f", field {name!r}: {values[name]!r} is no text"), "Write it in quotes")
    if "prompt" in values or "text" in values:
        return _free(values, line, hold_out)
    for name in ("subject", "answer"):
        if not values.get(name, "").strip():
            raise with_way_out(ValueError(f", field {name!r}: it is missing"), "A fact has a subject and an answer")
    own = _templates(values, "wordings", folder)
    asked = _templates(values, "hold_out", folder)
    fact = Fact(
        values["subject"].strip(),
        values["answer"].rstrip(),
        wordings if own is None else own,
        hold_out if asked is None else asked,
        line,
    )
    return _usable(fact)


def _free(values: dict[str, Any], line: int, hold_out: tuple[str, ...]) -> Fact:
    """A pair of prompt and text."""
    for name in ("prompt", "text"):
        if not values.get(name, "").strip():
            raise with_way_out(ValueError(f", field {name!r}: it is missing"), "A free pair has a prompt and a text")
    for name in ("answer", "wordings"):
        if name in values:
            raise with_way_out(
                ValueError(f", field {name!r}: a fact has either a prompt and a text, or this"), "Leave one out"
            )
    prompt, subject = values["prompt"], values.get("subject") or subject_in(values["prompt"])
    if not subject:
        raise with_way_out(ValueError(f", field 'subject': none was found in {prompt!r}"), "Name it")
    if subject not in prompt:
        raise with_way_out(
            ValueError(f", field 'subject': {subject!r} doesn't stand in {prompt!r}"), "Name it as the prompt has it"
        )
    # The last mention: what comes after it reads all of them.
    head, _, tail = prompt.rpartition(subject)
    return _usable(Fact(subject, values["text"], (f"{head}{PLACE}{tail}",), hold_out, line))


def _usable(fact: Fact) -> Fact:
    try:
        _refuse_unusable(fact)
    except ValueError as error:
        what, way_out = what_and_way_out(error)
        raise with_way_out(ValueError(what.removeprefix(fact.name())), way_out) from None
    return fact


def _templates(values: dict[str, Any], field: str, folder: Path) -> tuple[str, ...] | None:
    found = values.get(field)
    if found is None or found == "":
        return None
    if isinstance(found, str):
        return (found,) if PLACE in found else read_wordings(folder / found)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise with_way_out(
            ValueError(f", field {field!r}: {found!r} is no list of templates, and no file of them"), "Write a list"
        )
    return tuple(dict.fromkeys(found))


def _json_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise with_way_out(
                ValueError(f"{path}, line {number}: no JSON ({error})"), "Write one object a line"
            ) from None
        if not isinstance(values, dict):
            raise with_way_out(
                ValueError(f"{path}, line {number}: {line[:40]!r} is no object"), "Write one object a line"
            )
        yield number, values


def _csv_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO("\n".join(text_lines(path)), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise with_way_out(
                    ValueError(f"{path}, line {reader.line_num}: it hasn't {count} fields"), "Quote what has commas"
                )
            yield reader.line_num, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise with_way_out(
            ValueError(f"{path}, line {reader.line_num}: no CSV ({error})"), "Quote what has commas"
        ) from None


def text_lines(path: Path) -> Sequence[str]:
    """Read a file's lines. Raises `FileNotFoundError`, or `ValueError` where it isn't UTF-8."""
    if not path.is_file():
        raise with_way_out(FileNotFoundError(f"{path}: no such file"), "Check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise with_way_out(ValueError(f"{path} isn't UTF-8 (byte {error.start})"), "Save it as UTF-8") from None
    return text.split("\n")
