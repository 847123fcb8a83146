"""A `Player` without its page: what one tab teaches, no other sees, and the table never changes."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from test_save import in_place
from tiny import tiny_tokenizer

from sense_v2.cli.errors import explain
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.kept_facts import facts_in
from sense_v2.hf import from_pretrained, save_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.report.play.player import MAX_SHOWN, Player

PROMPT, FACT, WATCHED = "word1 word2", "word9 word8", "word1 word2 word3\nword40 word41"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("player") / "model"
    model = in_place(folder)
    model.generation_config.eos_token_id = None
    save_pretrained(model, folder, tokenizer=tiny_tokenizer())
    memory_of(model).storage.close()
    return folder


@pytest.fixture
def player(folder, tmp_path):
    before = content(folder)
    explained = partial(explain, command="sense-engram play")
    player = Player(from_pretrained(folder, mode="r"), tiny_tokenizer(), "a model", tmp_path / "saved", explained)
    yield player
    assert player.memory.storage is player.base, "a tab's rows were left in the model"
    assert content(folder) == before


def taught(player, notebook=None, prompt=PROMPT, fact=FACT):
    html, facts, notebook = player.teach(prompt, fact, 30, "word5 word6", WATCHED, notebook)
    assert "warning" not in html, html
    return html, facts, notebook


def test_a_fact_is_learned_shown_and_taken_back(player):
    text = f"{PROMPT} {FACT}"
    fresh = player.look(text, None)
    html, facts, notebook = taught(player)
    before, after = (float(found) for found in re.findall(r"<b>(?:&[lg]t; )?([\d.]+)\xa0%</b>", html))
    assert after > 1.3 * before  # a random model; tests/hf/training/test_teaching.py has one that can learn
    assert "word9 word8" in facts.replace("·", " ")
    assert "taught here" in player.look(text, notebook)[0]
    assert player.look(text, None) == fresh

    html, facts, notebook = player.undo(notebook)
    assert "is taken back" in html
    assert "Nothing is taught in this tab" in facts
    assert player.look(text, notebook) == fresh
    assert len(notebook.overlay.changed_ids) == 0
    assert "Nothing was taught" in player.undo(notebook)[0]


def test_an_endless_text_is_refused_before_it_is_tokenised(player, monkeypatch):
    endless = "word1 " * 2_000_000
    monkeypatch.setattr("sense_v2.report.play.player.encode", None)
    for html in (
        player.look(endless, None)[0],
        player.go_on(endless, 4, 0, 0, None),
        player.teach(PROMPT, FACT, 1, endless, "", None)[0],
        player.teach(PROMPT, FACT, 1, "", endless, None)[0],
        player.teach(endless, FACT, 1, "", "", None)[0],
    ):
        assert "The text has 12000000 characters" in html
        assert "warning" in html


def test_two_facts_are_taken_back_one_by_one(player):
    notebook = taught(player)[2]
    one = player.look("word1 word2 word9", notebook)
    html, facts, notebook = taught(player, notebook, "word1", "word2 word30")
    assert html.count("gate-text") >= 3, "the first fact is watched too"
    assert facts.count("<li>") == 2
    assert player.look("word1 word2 word9", notebook) != one
    player.undo(notebook)
    assert player.look("word1 word2 word9", notebook) == one
    assert len(notebook.facts) == 1


def test_tabs_at_once_get_what_each_would_get_alone(player):
    first, second = taught(player)[2], taught(player, None, "word1 word2", "word50")[2]
    texts = ["word1 word2 word9 word8", "word1 word2 word50", "word7"]
    books = [first, second, None]
    alone = [(player.look(text, book), player.go_on(text, 5, 0, 0, book)) for text in texts for book in books]
    with ThreadPoolExecutor(6) as pool:
        asked = [
            (pool.submit(player.look, text, book), pool.submit(player.go_on, text, 5, 0, 0, book))
            for text in texts
            for book in books
        ]
        together = [(look.result(), go_on.result()) for look, go_on in asked]
    assert together == alone
    assert alone[0] != alone[1]


def test_a_saved_delta_has_the_rows_that_were_taught(player, tmp_path):
    assert "nothing to save" in player.save(None)
    assert not (tmp_path / "saved").exists()
    notebook = taught(player)[2]
    paths = [re.search(r'class="path">(.*?)<', player.save(notebook))[1] for _ in range(2)]
    assert len(set(paths)) == 2
    delta = read_delta(paths[0])
    changed_ids = notebook.overlay.changed_ids
    assert torch.equal(torch.from_numpy(delta.row_ids_U), changed_ids)
    assert torch.equal(delta.rows_UD, notebook.overlay(changed_ids).detach())
    assert not torch.equal(delta.rows_UD, player.base(changed_ids))
    assert facts_in(delta)[0].name() == f"{PROMPT} → {FACT.strip()}"
    assert set(facts_in(delta)[0].row_ids) == set(changed_ids.tolist())


def test_a_file_that_cannot_be_written_is_said(player, tmp_path):
    notebook = taught(player)[2]
    (tmp_path / "saved").write_text("no folder")
    assert 'class="warning"' in player.save(notebook)


@pytest.mark.parametrize("text", ["", "   \n"])
def test_no_text_is_no_error_to_look_at_and_a_word_elsewhere(player, text):
    assert "Type something" in player.look(text, None)[0]
    assert "The prompt has no tokens" in player.go_on(text, 5, 0, 0, None)
    html, _, notebook = player.teach(PROMPT, text, 5, "", "", None)
    assert "There is nothing to teach yet" in html
    assert notebook is None


def test_a_text_that_the_model_cannot_take_is_shown_from_its_end(player):
    limit = player.max_tokens
    assert limit == 128 < MAX_SHOWN
    words = " ".join(f"word{number % 30}" for number in range(1000))
    html, table = player.look(words, None)
    assert "872 tokens before it were left out" in html
    assert table.count("<tr>") == 1 + 128
    assert "its first 877 tokens were left out" in player.go_on(words, 5, 0, 0, None)
    html, _, _ = player.teach(words, " word1", 5, "", "", None)
    assert "The fact has 1001 tokens, and 116 are the most here: make it shorter." in html


def test_a_fact_without_a_prompt(player):
    html, _, notebook = taught(player, None, "", "word70 word71 word72")
    assert "word70" in html
    assert len(notebook.facts) == 1
