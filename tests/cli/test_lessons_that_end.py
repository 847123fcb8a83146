"""Lessons that are killed, interrupted or go wrong leave the delta as it was, and nothing locked.

Each runs in a forked child that ends itself at a place in the lesson. The next lesson gives what an undisturbed one
gives, bit for bit.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_base_and_taught, tiny_tokenizer

from sense_v2.cli.main import main
from sense_v2.engram.delta import delta_file
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.kept_facts import facts_in
from sense_v2.hf.facts import teach_facts as lesson
from sense_v2.hf.facts.teach_facts import Descent

WORDINGS = ["word3 {subject}", "word6 word7 {subject}"]
FIRST = {"subject": "word20 word21", "answer": "word1", "wordings": WORDINGS}
SECOND = {"subject": "word23 word24", "answer": "word2", "wordings": WORDINGS}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """base, with one.safetensors, which has FIRST; two.safetensors, the same file after SECOND."""
    folder = tmp_path_factory.mktemp("lesson")
    save_base_and_taught(folder)
    for name, fact in (("first.jsonl", FIRST), ("second.jsonl", SECOND)):
        (folder / name).write_text(json.dumps(fact) + "\n")
    assert teach(folder, "first.jsonl", "one.safetensors") == 0
    shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
    assert teach(folder, "second.jsonl", "two.safetensors") == 0
    return folder


def teach(folder, facts, output, *options):
    steps = () if "--steps" in options else ("--steps", 60)
    words = ("delta", "teach", folder / "base", "--facts", folder / facts, "--output", folder / output)
    return main(list(map(str, (*words, "--lr", 0.3, *steps, *options))))


def in_a_child(log, call):
    """(exit status, or minus the signal that ended it; what it said)"""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115  # until the child ends
        status = 99
        try:
            status = call()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), Path(log).read_text()


def ends_at(owner, name, number, how):
    """Make the child end just before the call of that number."""
    plain, calls = getattr(owner, name), []

    def ending(*arguments, **settings):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), how)
        return plain(*arguments, **settings)

    setattr(owner, name, ending)


PLACES = {
    "loading": (lesson, "from_pretrained", 1),
    "asking before": (lesson, "answered", 1),
    "first step": (Descent, "step", 1),
    "later step": (Descent, "step", 13),
    "asking in between": (lesson, "answered", 2),
    "damage": (lesson, "damage", 1),
    "commit": (lesson, "keep_facts", 1),
    "in the file": (delta_file, "_check_finite", 1),
    "rename": (os, "replace", 1),
}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("place", PLACES)
def test_a_lesson_that_ends_anywhere_leaves_the_delta_as_it_was_and_can_be_held_again(taught, tmp_path, place, how):
    output = tmp_path / "facts.safetensors"
    shutil.copy(taught / "one.safetensors", output)
    files = {path: path.read_bytes() for path in (taught / "base").rglob("*") if path.is_file()}

    def ended():
        owner, name, number = PLACES[place]
        ends_at(owner, name, number, how)
        return teach(taught, "second.jsonl", output)

    status, said = in_a_child(tmp_path / "log", ended)
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 130), said
    assert "Traceback" not in said
    assert output.read_bytes() == (taught / "one.safetensors").read_bytes()
    assert teach(taught, "second.jsonl", output) == 0
    assert output.read_bytes() == (taught / "two.safetensors").read_bytes()
    assert {path: path.read_bytes() for path in files} == files
    assert sorted(path.name for path in tmp_path.glob("facts*")) == ["facts.safetensors", "facts.safetensors.lock"]


def test_what_is_not_a_number_ends_the_lesson_and_the_delta_stays(taught, tmp_path, capfd, monkeypatch):
    output = tmp_path / "facts.safetensors"
    shutil.copy(taught / "one.safetensors", output)
    plain = Descent._move

    def last_step_breaks(descent, rate):
        plain(descent, rate)
        if len(descent.losses) == 5:
            descent.rows_UD[0] = float("nan")
            descent.overlay.write(descent.row_ids_U, descent.rows_UD)

    monkeypatch.setattr(Descent, "_move", last_step_breaks)
    for steps, message in (("20", "the loss of step 6 is nan"), ("5", "a row isn't finite")):
        capfd.readouterr()
        assert teach(taught, "second.jsonl", output, "--steps", steps) == 1
        error = capfd.readouterr().err
        assert message in error
        assert "lower lr" in error
        assert output.read_bytes() == (taught / "one.safetensors").read_bytes()


def test_a_file_of_a_hundred_thousand_lines_is_refused_at_its_line_before_a_model_is_loaded(taught, tmp_path, capfd):
    (tmp_path / "facts.jsonl").write_text(
        "".join(json.dumps({**FIRST, "subject": f"word20 word{number}"}) + "\n" for number in range(100_000))
    )
    assert teach(taught, tmp_path / "facts.jsonl", tmp_path / "d.safetensors") == 1
    error = capfd.readouterr().err
    assert "facts.jsonl, line 10001: more than 10,000 facts" in error
    assert not list(tmp_path.glob("d.*"))
    # Templates multiply.
    (tmp_path / "words.txt").write_text("".join(f"word{number} {{subject}}\n" for number in range(100_000)))
    many = [{"subject": f"word20 word{number}", "answer": "word1"} for number in range(30)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in many))
    arguments = ("--wordings", str(tmp_path / "words.txt"))
    assert teach(taught, tmp_path / "facts.jsonl", tmp_path / "d.safetensors", *arguments) == 1
    assert "3,000,000 questions" in capfd.readouterr().err
    assert not list(tmp_path.glob("d.*"))


def test_contradictions_are_named_with_file_line_and_field(taught, tmp_path, capfd):
    lines = [FIRST, SECOND, {**FIRST, "answer": "word9", "wordings": WORDINGS[1:]}]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert teach(taught, tmp_path / "facts.jsonl", tmp_path / "d.safetensors") == 1
    error = capfd.readouterr().err
    assert "facts.jsonl, line 3: word20 word21 → word9, field 'answer': after 'word6 word7 word20 word21'" in error
    assert "(line 1: word20 word21 → word1)" in error
    assert not list(tmp_path.glob("d.*"))


def test_a_fact_without_tokens_is_named_with_line_and_field(taught, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sense_v2.hf.facts.wordings._encoded", lambda tokenizer, text: ([], []))
    assert teach(taught, "first.jsonl", tmp_path / "d.safetensors") == 1
    assert "line 1: word20 word21 → word1, field 'subject': it has no tokens" in capfd.readouterr().err
    assert not (tmp_path / "d.safetensors").exists()


def test_another_tokenizer_is_refused(taught, tmp_path, capfd):
    shutil.copytree(taught / "base", tmp_path / "base")
    tiny_tokenizer(90).save(str(tmp_path / "base" / "tokenizer.json"))
    shutil.copy(taught / "first.jsonl", tmp_path)
    assert teach(tmp_path, "first.jsonl", "d.safetensors") == 1
    error = capfd.readouterr().err
    assert "tokenizer" in error
    assert " help: " in error
    assert not (tmp_path / "d.safetensors").exists()


def test_a_lesson_that_is_interrupted_in_python_leaves_the_rows(taught, monkeypatch):
    from sense_v2.hf.facts.facts_file import read_facts
    from sense_v2.hf.load import from_pretrained
    from sense_v2.hf.overlays import overlay_of

    model = from_pretrained(taught / "base")
    for name in ("damage", "moved"):
        with monkeypatch.context() as patch:

            def interrupted(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(lesson, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                lesson.teach_facts(model, tiny_tokenizer(), read_facts(taught / "first.jsonl"), steps=5, lr=0.1)
        assert len(overlay_of(model).own_ids) == 0
    assert facts_in(read_delta(taught / "two.safetensors"))[1].subject == SECOND["subject"]
    assert torch.equal(overlay_of(model)(torch.arange(9)), overlay_of(model).table(torch.arange(9)))
