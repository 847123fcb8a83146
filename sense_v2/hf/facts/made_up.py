"""Facts that nobody needs, of people and things that don't exist, for fusion layers to learn on

What a row can be made to say later depends on what the fusion layers carried when they were trained. So these are of
many kinds: people and things, the relations of made_up_relations.py, answers of one token and of several.
"""

from __future__ import annotations

import numpy as np

from sense_v2.hf.facts.facts_file import Fact
from sense_v2.hf.facts.made_up_relations import RELATIONS

_SYLLABLES = [
    onset + vowel + coda
    for onset in (
        "b",
        "d",
        "f",
        "g",
        "h",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "z",
        "br",
        "dr",
        "gl",
        "st",
        "th",
    )
    for vowel in ("a", "e", "i", "o", "u")
    for coda in ("", "", "", "l", "n", "r", "s")
]


def made_up_facts(num_facts: int, *, seed: int = 0) -> list[Fact]:
    """Invent people and things, and say one thing of each, the relations in turns."""
    draw = np.random.default_rng(seed)

    def name() -> str:
        return "".join(draw.choice(_SYLLABLES, draw.integers(2, 4))).capitalize()

    facts: dict[str, Fact] = {}
    while len(facts) < num_facts:
        form, answers, wordings = RELATIONS[len(facts) % len(RELATIONS)]
        subject = form.format(name(), name())
        answer = str(draw.choice(answers.split("|") if "|" in answers else answers.split(" ")))
        facts.setdefault(subject, Fact(subject, answer, wordings))
    return list(facts.values())
