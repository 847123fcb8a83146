"""Facts that nobody needs are of many kinds, and the same from the same seed."""

from sense_v2.hf.facts.facts_file import checked
from sense_v2.hf.facts.made_up import made_up_facts


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
