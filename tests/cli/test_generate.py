"""`sense-engram generate`: a prompt, a chat by the model's own template, and what an empty answer is due to."""

import io
import json
import shutil

import pytest

from sense_v2.hf.training.fresh_model import END_OF_TEXT

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
LIKELIEST = ("--temperature", 0, "--max-new-tokens", 6)


@pytest.fixture
def chatting(trained, tmp_path):
    """The trained model with a chat template."""
    folder = tmp_path / "chatting"
    shutil.copytree(trained[0], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def answer(run_json, folder, text):
    return run_json("generate", folder, text, *LIKELIEST)["continuation"]


def test_chat_puts_the_prompt_into_the_template(run, run_json, chatting):
    found = run_json("generate", chatting, "def name", "--chat", *LIKELIEST)
    assert found["continuation"] == answer(run_json, chatting, "<user>def name\n<answer>")
    assert found["prompt"] == "def name"
    assert run("generate", chatting, "def name", "--chat", *LIKELIEST)[1] == found["continuation"] + "\n"


def test_a_chat_in_the_terminal_keeps_what_was_said(run, run_json, chatting, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def name\n\nreturn\n"))
    status, out, error = run("generate", chatting, "--chat", *LIKELIEST)
    assert status == 0, error
    first = answer(run_json, chatting, "<user>def name\n<answer>")
    second = answer(run_json, chatting, f"<user>def name\n<assistant>{first}\n<user>return\n<answer>")
    assert out == f"{first}\n{second}\n"


def test_a_chat_takes_a_template_and_generate_a_prompt_or_a_chat(run, trained, chatting):
    status, _, error = run("generate", trained[0], "def", "--chat")
    assert status == 1
    assert "has no chat template" in error
    for arguments in ((), ("--chat", "--json")):
        status, _, error = run("generate", chatting, *arguments)
        assert status == 2
        assert "PROMPT" in error


def test_an_empty_answer_says_why(run, run_json, chatting):
    config = json.loads((chatting / "generation_config.json").read_text())
    end = json.loads((chatting / "config.json").read_text())["eos_token_id"]
    assert end is not None
    # The last token that may be written is the end of the text: here it is the first, too.
    (chatting / "generation_config.json").write_text(json.dumps({**config, "forced_eos_token_id": end}))
    call = ("generate", chatting, "def", "--max-new-tokens", 1)
    status, out, error = run(*call)
    assert (status, out) == (0, "\n")
    assert error == (
        f"note: the model wrote nothing: its first token, {END_OF_TEXT}, ends the text; "
        "--chat asks it as its chat template does\n"
    )
    assert (
        run(*call, "--chat")[2] == f"note: the model wrote nothing: its first token, {END_OF_TEXT}, ends the text\n"
    )
    found = run_json(*call)
    assert (found["continuation"], found["end"]) == ("", END_OF_TEXT)
    longer = run_json("generate", chatting, "def", "--max-new-tokens", 3)
    assert longer["continuation"] != ""
