"""What is printed of names that came out of files: nothing that a terminal obeys, whichever command prints it."""

import ast
import os
from pathlib import Path

import pytest
from source_files import parsed

import sense_v2.cli
from sense_v2.cli import main, output

TITLE = "\x1b]0;mine\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a{TITLE}b", r"a\x1b]0;mine\x07b"),
        ("a\rb\x9b2J\x7f", r"a\x0db\x9b2J\x7f"),
        ("name\nerror: forged", r"name\x0aerror: forged"),
        ("gnp.\u202etxt", r"gnp.\u202etxt"),
        ("caf\udce9 \ud800", r"caf\xe9 \ud800"),
        ("é 漢字 \u200c 👩\u200d👩 a\tb", "é 漢字 \u200c 👩\u200d👩 a\tb"),
    ],
)
def test_what_a_terminal_obeys_is_spelt_out(text, shown, capsys):
    output.lines_to(False)(text)
    output.lines_to(True)(text)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")


def test_errors_notes_and_tracebacks_are_printed_so(tmp_path, capsys):
    corpus = tmp_path / f"a{TITLE}"
    corpus.mkdir()
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    (corpus / "short.txt").write_text("short")
    for debug in ([], ["--debug"]):
        assert main.main([*debug, "train", "--corpus", str(corpus), "--output", str(tmp_path / TITLE)]) == 1
        out, error = capsys.readouterr()
        assert error.count("note: 1 of 2 files") == error.count("error: ") == 1
        assert r"a\x1b]0;mine\x07" in error
        assert "\x1b" not in out + error
    assert main.main(["train", "--config", os.fsdecode(b"caf\xe9.yaml")]) == 1
    assert r"caf\xe9.yaml: no such configuration file" in capsys.readouterr().err


def test_a_text_that_a_model_wrote_is_printed_as_it_is_but_to_a_terminal(capsys, monkeypatch):
    output.print_text(f"a{TITLE}\nb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.print_text(f"a{TITLE}\nb")
    assert capsys.readouterr().out == f"a{TITLE}\nb\n" + "a\\x1b]0;mine\\x07\nb\n"


def test_no_command_prints_in_another_way():
    for path in Path(sense_v2.cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                printing = name == "print" or (name.endswith(("stdout.write", "stderr.write", "typer.echo")))
                helps = name == "typer.echo" and "get_help" in ast.unparse(node)
                assert not printing or helps or path.name == "output.py", f"{path}:{node.lineno}"
