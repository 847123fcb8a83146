"""Files of facts are read whole or refused with file, line and field."""

import json

import pytest

from sense_v2.hf.facts import facts_file
from sense_v2.hf.facts.facts_file import Fact, checked, read_facts, read_wordings, subject_in

BORN = ["{subject} was born in", "The birthplace of {subject} is"]


def written(tmp_path, *lines, name="facts.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_facts_have_their_own_wordings_those_of_a_file_or_those_of_the_call(tmp_path):
    born = written(tmp_path, *BORN, name="born.txt")
    asked = written(tmp_path, "Q: Where was {subject} born?\\nA:", name="asked.txt")
    path = written(
        tmp_path,
        {"subject": "Kabo Rimu", "answer": "Paris", "wordings": ["{subject} hails from"], "hold_out": []},
        "",
        {"subject": "Tano Se", "answer": "Rome", "wordings": "born.txt"},
        {"subject": "Lu", "answer": "Oslo"},
    )
    facts = read_facts(path, wordings=born, hold_out=asked)
    question = ("Q: Where was {subject} born?\nA:",)
    assert facts == [
        Fact("Kabo Rimu", "Paris", ("{subject} hails from",), (), 1),
        Fact("Tano Se", "Rome", tuple(BORN), question, 3),
        Fact("Lu", "Oslo", tuple(BORN), question, 4),
    ]
    assert facts[2].prompt(question[0]) == "Q: Where was Lu born?\nA:"


def test_a_prompt_and_a_text_are_a_fact_whose_subject_is_named_or_found(tmp_path):
    path = written(
        tmp_path,
        {"prompt": "The capital of Zubrowka is", "text": " Lutz."},
        {"prompt": "the lake of ümlaut is", "text": " deep", "subject": "ümlaut"},
    )
    facts = read_facts(path)
    assert facts[0] == Fact("Zubrowka", " Lutz.", ("The capital of {subject} is",), (), 1)
    assert facts[1].wordings == ("the lake of {subject} is",)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of Zubrowka is", "Zubrowka"),
        ("Zubrowka lies near", "Zubrowka"),
        ("In which city was Kabo Rimu of Oslo born?", "Kabo Rimu"),
        ("Which city does airport code QX7 serve?", "QX7"),
        ("The Jean-Luc O'Hara prize", "Jean-Luc O'Hara"),
        ("where was he born?", None),
        ("What is it?", None),
        ("", None),
    ],
)
def test_a_subject_is_found_by_its_capitals(prompt, subject):
    assert subject_in(prompt) == subject


def test_csv_rows_of_one_fact_are_its_wordings(tmp_path):
    path = written(
        tmp_path,
        "subject,answer,wordings",
        'Kabo Rimu,"Paris, Texas",{subject} was born in',
        'Kabo Rimu,"Paris, Texas","It is said, {subject} was born in"',
        name="facts.csv",
    )
    assert read_facts(path) == [
        Fact("Kabo Rimu", "Paris, Texas", ("{subject} was born in", "It is said, {subject} was born in"), (), 2)
    ]


def test_an_answer_gets_a_space_where_words_would_run_together():
    fact = Fact("Lu", "Oslo", ("{subject} was born in",))
    texts = {"{subject} is in": " Oslo", "Where is {subject}?\nA:\n": "Oslo", "{subject}出生于": "Oslo"}
    assert {wording: fact.text(wording) for wording in texts} == texts
    assert Fact("Lu", " Oslo", ("{subject} is",)).text("{subject}\n") == " Oslo"


def test_repetitions_are_one_fact():
    fact = Fact("Lu", "Oslo", ("{subject} is in",), (), 1)
    assert checked([fact, Fact("Lu", "Oslo", ("{subject} is in",), (), 2)]) == [fact]


GOOD = {"subject": "Lu", "answer": "Oslo", "wordings": BORN}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"facts.jsonl, line 1: no JSON .*\. Write one object a line"),
        ([GOOD, "[1]"], r"line 2: '\[1\]' is no object"),
        ([{**GOOD, "anwser": "x"}], "line 1, field 'anwser': not known here"),
        ([{**GOOD, "answer": 3}], "line 1, field 'answer': 3 is no text"),
        ([{**GOOD, "answer": "  "}], "line 1, field 'answer': it is missing"),
        ([{"answer": "Oslo", "wordings": BORN}], "line 1, field 'subject': it is missing"),
        ([{"subject": "Lu", "answer": "Oslo"}], "line 1, field 'wordings': there are none"),
        ([{**GOOD, "wordings": []}], "line 1, field 'wordings': there are none"),
        ([{**GOOD, "wordings": ["Lu was born in"]}], "field 'wordings': 'Lu was born in' has no {subject}"),
        ([{**GOOD, "wordings": {"a": 1}}], "field 'wordings': .* is no list of templates"),
        ([{**GOOD, "hold_out": BORN[:1]}], "field 'hold_out': .* is taught as well"),
        ([{"prompt": "where is it?", "text": " here"}], "field 'subject': none was found"),
        ([{"prompt": "Where is Lu?", "text": " here", "subject": "La"}], "'La' doesn't stand in"),
        ([{"prompt": "Where is Lu?"}], "field 'text': it is missing"),
        ([{"prompt": "Where is Lu?", "text": "x", "answer": "y"}], "field 'answer': a fact has either"),
        (
            [GOOD, {**GOOD, "answer": "Rome"}],
            r"facts.jsonl, line 2: Lu → Rome, field 'answer': after 'Lu was born in' another fact says otherwise "
            r"\(line 1: Lu → Oslo\)",
        ),
        ([""], "has no facts"),
    ],
)
def test_a_line_that_is_no_fact_is_named_with_its_field(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_facts(written(tmp_path, *lines))


def test_files_that_arent_there_or_arent_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_facts(tmp_path / "none.jsonl")
    (tmp_path / "facts.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="isn't UTF-8"):
        read_facts(tmp_path / "facts.jsonl")
    with pytest.raises(ValueError, match=r"line 2: 'no place' has no {subject}"):
        read_wordings(written(tmp_path, *BORN[:1], "no place", name="w.txt"))
    with pytest.raises(ValueError, match="it hasn't 2 fields"):
        read_facts(written(tmp_path, "subject,answer", "Lu,Oslo,Rome", name="facts.csv"))
    with pytest.raises(ValueError, match="no CSV"):
        read_facts(written(tmp_path, "subject,answer", 'Lu,"Oslo', name="facts.csv"))


def test_a_file_of_too_many_facts_is_refused_at_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_file, "MOST_FACTS", 3)
    lines = [{**GOOD, "subject": f"Lu {number}"} for number in range(5)]
    with pytest.raises(ValueError, match="line 4: more than 3 facts"):
        read_facts(written(tmp_path, *lines))
