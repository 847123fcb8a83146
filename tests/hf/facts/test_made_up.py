"""Facts that nobody needs are of many kinds, and the same from the same seed."""

import re

from sense_v2.hf.facts.facts_file import PLACE, checked
from sense_v2.hf.facts.made_up import made_up_facts
from sense_v2.hf.facts.made_up_relations import PERSON, RELATIONS


def test_made_up_facts_are_the_same_from_the_same_seed_and_can_be_taught():
    facts = made_up_facts(60, seed=3)
    assert facts == made_up_facts(60, seed=3) == checked(facts)
    assert facts != made_up_facts(60, seed=4)
    assert len({fact.subject for fact in facts}) == 60


def test_made_up_facts_are_of_many_kinds():
    facts = made_up_facts(150)
    assert len({fact.wordings for fact in facts}) >= 15  # relations
    assert len({fact.answer for fact in facts}) > 80
    assert any(" " in fact.answer for fact in facts)  # several tokens
    assert {len(fact.subject.split()) for fact in facts} == {1, 2}
    assert all(len(fact.wordings) >= 3 for fact in facts)


def test_each_relation_is_said_in_many_ways_and_asked_in_questions():
    for form, answers, wordings in RELATIONS:
        assert len(wordings) == len({*wordings}) >= 6
        assert all(PLACE in wording for wording in wordings)
        assert sum(wording.startswith(("Q: ", "Question: ")) for wording in wordings) >= 2
        assert len(answers) > len(form)


def test_no_relation_is_about_where_somebody_was_born_or_lives():
    of_people = [wording for form, _, wordings in RELATIONS if form == PERSON for wording in wordings]
    measured = r"\b(born|birthplace|home|hails|raised|citizen|comes from|lives|lived|city)\b"
    assert not [wording for wording in of_people if re.search(measured, wording)]
