"""Facts are taught together in the rows of their subjects, asked in other words, and taken back bit for bit."""

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake
from tokenizers import pre_tokenizers

from sense_v2.engram.delta.apply import merge_deltas
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.kept_facts import KeptFact, facts_in, withdraw_facts
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.facts.facts_file import Fact
from sense_v2.hf.facts.outcome import answered
from sense_v2.hf.facts.teach_facts import Descent, shuffled, teach_facts
from sense_v2.hf.facts.wordings import questions_of, subject_rows
from sense_v2.hf.memory import memory_of
from sense_v2.hf.overlays import add_overlay, remove_overlay

TAUGHT = ("word3 {subject} word4", "{subject} word6 word7", "word8 word9 {subject} word5")
ASKED = ("word10 {subject} word11",)
FACTS = [
    Fact("word20+word21 word22", "word1", TAUGHT, ASKED, 1),
    Fact("word23+word24 word25", "word2", TAUGHT, ASKED, 2),
]
IDS = torch.tensor([[16, 19, 10, 4, 26, 10]])


@pytest.fixture
def model(tmp_path):
    """Memory of 8,000 rows that was trained, its table only read."""
    config = tiny_config(tmp_path, table_size=8_000, engram_dim=64)
    model = attach_engram(tiny_model("llama"), config, tiny_tokenizer())
    wake(memory_of(model))
    memory_of(model).storage.write(torch.tensor([0]), torch.zeros(1, 16))
    weights = memory_of(model).layers.state_dict()
    detach_engram(model)
    model = attach_engram(tiny_model("llama"), config, mode="r")
    memory_of(model).layers.load_state_dict(weights)
    return model


def syllables():
    """The tiny tokenizer, for words of several tokens: word20+word21."""
    tokenizer = tiny_tokenizer()
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("+", "removed")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def taught(model, facts=FACTS, **changes):
    settings = {"neutral": [IDS[0].tolist()], "lr": 0.3, "steps": 200, **changes}
    return teach_facts(model, syllables(), facts, **settings)


def test_rows_are_those_of_n_grams_within_the_subject(model):
    memory = memory_of(model)
    questions = questions_of(FACTS[:1], syllables())
    assert [(one.held_out, list(one.subject)) for one in questions] == [
        (False, [1, 2, 3]),
        (False, [0, 1, 2]),
        (False, [2, 3, 4]),
        (True, [1, 2, 3]),
    ]
    # Two words: two heads of the 2-gram and two of the 3-gram that reach from one into the other; in each wording.
    row_ids_TH = memory.hash_tokens(torch.tensor([questions[0].prompt_ids]))[1][0, 0]
    assert set(subject_rows(memory, questions).row_ids_U.tolist()) == set(row_ids_TH[3].tolist())
    # The same of words of several tokens.
    questions = questions_of([Fact("word20+word21 word22+word23", "word1", TAUGHT[:1])], syllables())
    row_ids_TH = memory.hash_tokens(torch.tensor([questions[0].prompt_ids]))[1][0, 0]
    rows = subject_rows(memory, questions)
    assert set(rows.row_ids_U.tolist()) == {*row_ids_TH[3].tolist(), *row_ids_TH[4, 2:].tolist()}
    fewer = subject_rows(memory, questions, max_rows=2)
    assert set(fewer.row_ids_U.tolist()) == set(row_ids_TH[4, 2:].tolist())  # 3-grams at the end
    assert fewer.left_out == 4
    # Three words: the 3-gram alone touches all of them.
    questions = questions_of([Fact("word20 word21 word22", "word1", TAUGHT[:1])], syllables())
    row_ids_TH = memory.hash_tokens(torch.tensor([questions[0].prompt_ids]))[1][0, 0]
    assert set(subject_rows(memory, questions).row_ids_U.tolist()) == set(row_ids_TH[3, 2:].tolist())
    # A single word: the longest.
    questions = questions_of([Fact("word20+word21+word22+word23", "word1", TAUGHT[:1])], syllables())
    row_ids_TH = memory.hash_tokens(torch.tensor([questions[0].prompt_ids]))[1][0, 0]
    assert set(subject_rows(memory, questions).row_ids_U.tolist()) == set(row_ids_TH[3:5, 2:].flatten().tolist())
    # Of a subject of one token, the n-grams that end in it.
    alone = subject_rows(memory, questions_of([Fact("word20", "word1", TAUGHT[:1])], syllables()))
    assert len(alone.row_ids_U) == 4


@pytest.mark.parametrize("near", ["word20+word21 word30+word31", "word30+word31 word22+word23"])
def test_a_neighbour_with_half_of_the_name_stays_the_same_bits(model, near):
    fact = Fact("word20+word21 word22+word23", "word1", TAUGHT, ASKED)
    (asked, *_) = questions_of([Fact(near, "word1", TAUGHT)], syllables())

    def expected():
        with torch.no_grad():
            return model(torch.tensor([asked.prompt_ids])).logits

    untouched = expected()
    done = teach_facts(model, syllables(), [fact], neutral=[asked.prompt_ids], lr=0.3, steps=200)
    assert done.not_learned == []
    assert torch.equal(expected(), untouched)


def test_facts_are_learned_in_words_that_were_never_taught_and_nothing_else_moves(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table, untouched = (tmp_path / "engram_table.dat").read_bytes(), logits(model)
    done = taught(model)
    report = done.report
    assert done.not_learned == []
    assert report["success"]["taught"] == {"asked": 6, "before": 0.0, "after": 1.0}
    assert report["success"]["held_out"] == {"asked": 2, "before": 0.0, "after": 1.0}
    assert [one["wording"] for one in report["success"]["by_wording"] if one["held_out"]] == list(ASKED)
    assert report["success"]["by_place"] == [{"place": 1, "asked": 8, "before": 0.0, "after": 1.0}]
    assert report["damage"]["texts_changed"] == 0
    assert torch.equal(logits(model), untouched)  # not one of the subjects' n-grams stands in it
    rows = subject_rows(memory_of(model), questions_of(FACTS, syllables())).row_ids_U
    assert torch.equal(done.taught.row_ids_U, rows)
    after = model.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == {"engram._extra_state"}
    assert (tmp_path / "engram_table.dat").read_bytes() == table
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    done.undo()
    assert len(done.taught.overlay.changed_ids) == 0
    assert torch.equal(logits(model), untouched)


def test_damage_names_the_text_and_the_row_that_it_shares(model):
    shared = questions_of(FACTS[:1], syllables())[0].prompt_ids
    report = taught(model, neutral=[IDS[0].tolist(), shared], steps=60).report["damage"]
    assert report["texts"] == 2
    assert report["texts_changed"] == 1
    assert report["kl"] > 0
    (changed,) = report["changed"]
    assert changed["kl"] == pytest.approx(2 * report["kl"])
    assert {name for row in changed["rows"] for name in row["facts"]} == {FACTS[0].name()}
    assert "word21 word22" in {row["ngram"] for row in changed["rows"]}


def test_a_kl_term_keeps_what_shares_rows_nearer(model):
    shared = [questions_of(FACTS[:1], syllables())[3].prompt_ids]
    plain = taught(model, neutral=shared, steps=40)
    harm = plain.report["damage"]["kl"]
    plain.undo()
    assert taught(model, neutral=shared, steps=40, kl_weight=100.0).report["damage"]["kl"] < 0.7 * harm


def test_the_rate_is_found_and_a_fact_that_isnt_learned_is_named(model):
    done = taught(model, lr=None, steps=1)
    assert done.report["lr"] in (0.03, 0.1, 0.3)
    assert done.report["steps"] == 1
    assert [fact["subject"] for fact in done.not_learned] == [fact.subject for fact in FACTS]


def test_facts_that_share_rows_are_named_before_the_training(model):
    told = []
    both = [FACTS[0], Fact("Word20+word21 word22", "word1", TAUGHT[:1], (), 2)]
    report = taught(model, both, steps=1, tell=told.append).report
    assert told[
        0
    ] == "line 1: word20+word21 word22 → word1 shares all of its rows with other facts, and may not be " + (
        "told from them"
    )
    assert report["sharing"] == [{"facts": [fact.name() for fact in both], "rows": 4}]


def test_what_ends_the_training_leaves_the_rows_as_they_were(model, monkeypatch):
    asked = questions_of(FACTS, syllables())[0].prompt_ids

    def expected():
        with torch.no_grad():
            return model(torch.tensor([asked])).logits

    untouched = expected()
    with pytest.raises(FloatingPointError, match="lower lr"):
        taught(model, lr=float("nan"))
    step = Descent.step

    def interrupted(descent, *arguments):
        step(descent, *arguments)
        if len(descent.losses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Descent, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        taught(model)
    assert len(memory_of(model).storage.changed_ids) == 0
    assert torch.equal(expected(), untouched)


def test_what_cant_be_taught_is_refused_before_anything_is_taught(model):
    with pytest.raises(ValueError, match="another fact says otherwise"):
        taught(model, [FACTS[0], Fact(FACTS[0].subject, "word9", TAUGHT)])
    with pytest.raises(ValueError, match="this tokenizer isn't the memory's"):
        teach_facts(model, tiny_tokenizer(90), FACTS)
    for layer in memory_of(model):
        torch.nn.init.zeros_(layer.W_v.weight)
    with pytest.raises(ValueError, match="never trained: W_v is zero"):
        taught(model)


def test_without_neutral_texts_the_model_writes_some(model):
    report = taught(model, neutral=None, steps=1).report["damage"]
    assert report["sampled"]
    assert report["texts"] > 10


def test_batches_hold_questions_of_like_length_and_each_once_an_epoch():
    wordings = tuple("{subject}" + " word4" * length for length in range(9))
    lessons = questions_of([Fact(f"word{n}", "word1", wordings) for n in range(11)], syllables())  # 99
    batches = shuffled(lessons, 16, seed=3)
    for _ in range(2):
        epoch = [next(batches) for _ in range(8)]  # two pools of four
        assert sorted(id(one) for batch in epoch for one in batch) == sorted(map(id, lessons))
        assert {len(batch) for batch in epoch} == {12, 13}
        spreads = [max(map(length_of, batch)) - min(map(length_of, batch)) for batch in epoch]
        assert max(spreads) <= 5  # of 8
    again = shuffled(lessons, 16, seed=3)
    assert next(again) != next(again)
    assert [len(batch) for batch in (next(shuffled(lessons[:3], 16, seed=0)),)] == [3]


def length_of(question):
    return len(question.prompt_ids) + len(question.answer_ids)


# Later and again


def said(model, fact):
    """Which of a fact's questions the model answers."""
    return [all(one) for one in answered(model, questions_of([fact], syllables()))]


def test_a_fact_is_corrected_in_a_delta_on_top_and_the_other_stays(model, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    add_overlay(model, first)
    taught(model).commit()
    assert [fact.name() for fact in facts_in(read_delta(first))] == [fact.name()[8:] for fact in FACTS]
    remove_overlay(model)
    raw, table, plain = first.read_bytes(), (tmp_path / "engram_table.dat").read_bytes(), logits(model)
    add_overlay(model, [first, second])
    told = []
    changed = Fact(FACTS[0].subject, "word3", TAUGHT, ASKED)
    done = taught(model, [changed], tell=told.append)
    assert told == [f"{changed.name()} corrects {FACTS[0].name()[8:]}"]
    assert done.not_learned == []
    assert said(model, FACTS[1]) == [True] * 4
    done.undo()
    assert said(model, FACTS[0]) == said(model, FACTS[1]) == [True] * 4
    done = taught(model, [changed])
    done.commit()
    remove_overlay(model)
    assert said(model, FACTS[0]) == [True] * 4
    remove_overlay(model)
    assert torch.equal(logits(model), plain)
    assert (first.read_bytes(), (tmp_path / "engram_table.dat").read_bytes()) == (raw, table)
    delta = read_delta(second)
    assert facts_in(delta) == [
        KeptFact(changed.subject, "word3", tuple(map(changed.prompt, TAUGHT)), facts_in(delta)[0].row_ids)
    ]
    assert facts_in(delta)[0].row_ids == tuple(delta.row_ids_U.tolist())
    # One of both, with the correction's rows where they meet.
    merge_deltas([first, second], tmp_path / "both.safetensors", prefer="last")
    add_overlay(model, tmp_path / "both.safetensors")
    assert said(model, changed) == said(model, FACTS[1]) == [True] * 4
    remove_overlay(model)
    # And the other one withdrawn.
    withdraw_facts(tmp_path / "both.safetensors", [FACTS[1].subject], tmp_path / "one.safetensors")
    add_overlay(model, tmp_path / "one.safetensors")
    assert said(model, changed) == [True] * 4
    assert said(model, FACTS[1]) == [False] * 4
    remove_overlay(model)
    done = withdraw_facts(tmp_path / "one.safetensors", [changed.subject], tmp_path / "none.safetensors")
    assert len(done.delta.row_ids_U) == 0
    add_overlay(model, tmp_path / "none.safetensors")
    assert torch.equal(logits(model), plain)


def test_facts_that_share_rows_with_those_of_a_delta_are_named_before_the_training(model, tmp_path):
    add_overlay(model, tmp_path / "facts.safetensors")
    taught(model, steps=1).commit()
    told = []
    other = Fact(FACTS[1].subject, "word9", ("word12 {subject}",))  # another relation
    taught(model, [other], steps=1, tell=told.append)
    assert told == [
        f"{other.name()} learns in 4 rows that {FACTS[1].name()[8:]} has: ask it again, or teach both at once"
    ]
