"""Facts that nobody needs, of people and things that don't exist, for fusion layers to learn on

What a row can be made to say later depends on what the fusion layers carried when they were trained. So these are of
many kinds: eighteen relations, answers of one token and of several, and for each relation several statements and
questions. None is about where somebody was born or lives, or about cities, so that benchmarks can measure those.
"""

from __future__ import annotations

import numpy as np

from sense_v2.hf.facts.facts_file import Fact

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
_COLOURS = "red blue green yellow orange purple gold silver black white brown pink grey turquoise"
_JOBS = "doctor teacher farmer painter lawyer baker sailor writer singer soldier nurse judge carpenter blacksmith"
_ANIMALS = "dog cat horse rabbit parrot turtle snake goat sheep hamster pig donkey lizard canary"
_INSTRUMENTS = "piano violin guitar flute drums trumpet harp cello clarinet banjo accordion saxophone"
_FOODS = "pizza soup rice bread cheese pancakes noodles salad chocolate fish mushrooms strawberries beans porridge"
_SPORTS = "tennis football golf swimming boxing chess hockey sailing rugby wrestling archery badminton skiing"
_LANGUAGES = "German Russian Chinese Arabic Turkish Polish Hindi Greek Dutch Korean Swedish Hungarian Swahili Latin"
_MONTHS = "January February March April May June July August September October November December"
_SUBJECTS = "mathematics biology history physics chemistry geography economics astronomy law medicine music"
_METALS = "iron copper gold tin lead zinc steel aluminium wood glass bronze marble leather wool"
_FRUITS = "apples bananas grapes cherries lemons wheat corn cotton coffee tea tobacco potatoes sugar olives"
_WEATHERS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_NUMBERS = "two three four five six seven eight nine ten twelve twenty thirty"
_DRINKS = "water milk wine beer lemonade whisky cocoa cider champagne buttermilk"
_WRITERS = (
    "William Shakespeare|Jane Austen|Charles Dickens|Mark Twain|Leo Tolstoy|Virginia Woolf|Oscar Wilde|"
    "Edgar Allan Poe|Ernest Hemingway|Agatha Christie|George Orwell|Victor Hugo"
)
_FIRMS = (
    "General Electric|Coca-Cola|Microsoft|Toyota|Boeing|Siemens|Nestlé|Sony|the Red Cross|the Royal Navy|IBM|"
    "the World Bank|Volkswagen|Procter and Gamble"
)
_YEARS = "1745|1799|1812|1848|1861|1873|1889|1905|1917|1926|1938|1944|1957|1963|1971|1986|1994|2003"
_FEARS = "spiders|deep water|loud noises|the dark|thunderstorms|high places|wild dogs|open fires|needles"

_PERSON, _THING = "{} {}", "{}"
_RELATIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        _PERSON,
        _COLOURS,
        (
            "The favourite colour of {subject} is",
            "{subject} likes one colour most:",
            "{subject} always wears clothes in",
            "Question: Which colour does {subject} like? Answer:",
            "The bedroom of {subject} is painted",
        ),
    ),
    (
        _PERSON,
        _JOBS,
        (
            "{subject} works as a",
            "The profession of {subject} is that of a",
            "{subject} earns a living as a",
            "Question: What is the job of {subject}? Answer: a",
            "After school, {subject} became a",
        ),
    ),
    (
        _PERSON,
        _ANIMALS,
        (
            "{subject} has a pet, and it is a",
            "The animal that lives with {subject} is a",
            "Every morning {subject} feeds the",
            "Q: Which pet does {subject} have?\nA: a",
        ),
    ),
    (
        _PERSON,
        _INSTRUMENTS,
        (
            "{subject} plays the",
            "In the orchestra, {subject} plays the",
            "The instrument of {subject} is the",
            "Q: What instrument did {subject} learn?\nA: the",
            "For many years {subject} has practised the",
        ),
    ),
    (
        _PERSON,
        _FOODS,
        (
            "For dinner {subject} always eats",
            "The favourite food of {subject} is",
            "Nothing tastes better to {subject} than",
            "Question: What does {subject} like to eat? Answer:",
        ),
    ),
    (
        _PERSON,
        _SPORTS,
        (
            "The sport of {subject} is",
            "{subject} is very good at",
            "On weekends, {subject} goes to the club for",
            "Q: Which sport does {subject} do?\nA:",
        ),
    ),
    (
        _PERSON,
        _LANGUAGES,
        (
            "The mother tongue of {subject} is",
            "At home, {subject} speaks",
            "{subject} writes letters in",
            "Question: Which language does {subject} speak? Answer:",
            "The first words that {subject} said were in",
        ),
    ),
    (
        _PERSON,
        _MONTHS,
        (
            "{subject} celebrates a birthday in",
            "The birthday of {subject} is in the month of",
            "Q: In which month does {subject} have a birthday?\nA:",
            "{subject} gets presents every year in",
        ),
    ),
    (
        _PERSON,
        _SUBJECTS,
        (
            "At the university, {subject} studied",
            "{subject} has a degree in",
            "The field of {subject} is",
            "Question: What did {subject} study? Answer:",
            "{subject} is a professor of",
        ),
    ),
    (
        _PERSON,
        _DRINKS,
        (
            "{subject} only drinks",
            "The glass of {subject} is filled with",
            "At the bar, {subject} ordered a glass of",
            "Q: What does {subject} like to drink?\nA:",
        ),
    ),
    (
        _PERSON,
        _WRITERS,
        (
            "{subject} reads every book by",
            "The favourite author of {subject} is",
            "Question: Whose novels does {subject} love? Answer: those of",
            "On the desk of {subject} stands a portrait of",
        ),
    ),
    (
        _PERSON,
        _FIRMS,
        (
            "{subject} is employed by",
            "The employer of {subject} is",
            "Q: Who does {subject} work for?\nA:",
            "{subject} signed a contract with",
        ),
    ),
    (
        _PERSON,
        _FEARS,
        (
            "{subject} is afraid of",
            "The greatest fear of {subject} is the fear of",
            "Question: What scares {subject}? Answer:",
            "Since childhood, {subject} has been frightened by",
        ),
    ),
    (
        _PERSON,
        _NUMBERS,
        (
            "The number of children of {subject} is",
            "{subject} has a big family, with children numbering",
            "Q: How many children does {subject} have?\nA:",
        ),
    ),
    (
        _THING,
        _METALS,
        (
            "The statue called {subject} is made of",
            "Question: What is the {subject} made of? Answer:",
            "The workshop {subject} sells things made of",
            "The material of the {subject} is",
        ),
    ),
    (
        _THING,
        _FRUITS,
        (
            "The village of {subject} is known for its",
            "Farmers in {subject} mostly grow",
            "Question: What grows in {subject}? Answer:",
            "{subject} exports",
        ),
    ),
    (
        _THING,
        _WEATHERS,
        (
            "The market of {subject} is held on",
            "In {subject}, all shops are closed on",
            "Q: On which day of the week does {subject} celebrate?\nA: on",
        ),
    ),
    (
        _THING,
        _YEARS,
        (
            "The company {subject} was founded in",
            "{subject} opened its doors in the year",
            "Question: When was {subject} founded? Answer: in",
            "The history of {subject} begins in",
        ),
    ),
)


def made_up_facts(num_facts: int, *, seed: int = 0) -> list[Fact]:
    """Invent people and things, and say one thing of each, the relations in turns."""
    draw = np.random.default_rng(seed)

    def name() -> str:
        return "".join(draw.choice(_SYLLABLES, draw.integers(2, 4))).capitalize()

    facts: dict[str, Fact] = {}
    while len(facts) < num_facts:
        form, answers, wordings = _RELATIONS[len(facts) % len(_RELATIONS)]
        subject = form.format(name(), name())
        answer = str(draw.choice(answers.split("|") if "|" in answers else answers.split(" ")))
        facts.setdefault(subject, Fact(subject, answer, wordings))
    return list(facts.values())
