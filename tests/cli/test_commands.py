"""What holds for every command of `sense-engram`, found by walking through the program itself: a new one is in."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from cli_calls import COMMANDS, parse

from sense_v2.cli import main
from sense_v2.core.errors import CommandError

ROOT = Path(__file__).parents[2]
FUNCTIONS = {name: function for commands in main.COMMANDS.values() for name, function in commands.items()}
every_command = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture
def run(run, monkeypatch):
    """run("create", …) -> (exit status, stdout, stderr)"""
    monkeypatch.setenv("COLUMNS", "300")  # a help text is not cut into lines
    return run


def in_process(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "sense_v2.cli.main", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "300", **more},
    )


def example(name):
    """The arguments of the call that the command's help shows."""
    found = re.findall(rf"Example: sense-engram ({name} .*)", COMMANDS[name].help)
    assert len(found) == 1, f"{name}: the help needs one line `Example: sense-engram {name} …`"
    return shlex.split(found[0])


def test_each_is_registered_in_the_list():
    listed = [name for commands in main.COMMANDS.values() for name in commands]
    assert sorted(COMMANDS) == sorted(listed)
    assert len(listed) >= 13


@every_command
def test_its_help_shows_an_example_that_could_be_run(name):
    parse(example(name))


@every_command
def test_its_help_says_what_it_does_and_what_each_option_is_for(name):
    command = COMMANDS[name]
    sentence = command.help.split("\n\n")[0]
    assert sentence.endswith(".")
    assert "\n" not in sentence
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name}: no help"


@every_command
def test_its_help_names_what_an_option_takes_not_a_type_of_python(name):
    """A user reads N, FILE or NUMBER; typer says INTEGER, PATH or FLOAT <range> where it isn't told."""
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and not parameter.is_flag:
            assert parameter.metavar, f"{name} {parameter.opts[0]}: no metavar"


@every_command
def test_it_has_json(name):
    (option,) = (parameter for parameter in COMMANDS[name].params if "--json" in parameter.opts)
    assert option.is_flag
    assert "stdout" in option.help
    # And uses it: lines for people make way, and the object is printed.
    source = inspect.getsource(FUNCTIONS[name])
    assert "print_json" in source
    assert "lines_to(as_json)" in source or "if as_json:" in source


@every_command
def test_an_unknown_option_is_a_wrong_call_in_two_lines(run, name):
    status, out, error = run(*name.split(), "--no-such-option")
    assert (status, out) == (2, "")
    assert_two_lines(error)
    assert f"`sense-engram {name} --help` lists what there is" in error


@every_command
def test_what_is_not_there_is_refused_in_two_lines_without_a_traceback(run, name, tmp_path, monkeypatch):
    """Every argument and every option that takes a text gets a path that leads nowhere."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    arguments = []
    types = typing.get_type_hints(FUNCTIONS[name])
    for number, parameter in enumerate(COMMANDS[name].params):
        if re.search(r"\b(str|Path)\b", str(types.get(parameter.name))):
            nowhere = str(tmp_path / f"nowhere_{number}" / "file")
            is_option = parameter.param_type_name == "option"
            arguments += [parameter.opts[0], nowhere] if is_option else [nowhere]
    status, out, error = run(*name.split(), *arguments, "--json")
    assert (status, out) in ((1, ""), (2, "")), error
    assert_two_lines(error)
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def assert_two_lines(error):
    first, second = error.splitlines()
    assert first.startswith("error: ")
    assert second.startswith(" help: ")
    assert "Traceback" not in error


# Exit statuses


def test_the_help_and_the_docs_say_every_exit_status(run):
    status, out, _ = run("--help")
    assert status == 0
    documented = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for number, meaning in (
        (0, "done"),
        (1, "failed, or verify found something wrong"),
        (2, "a wrong call"),
        (130, "ended by Ctrl-C"),
    ):
        assert f"{number} {meaning}" in out
        assert f"| {number} |" in documented


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (ValueError("3 is too many; give 2"), 1),
        (CommandError("no", "yes"), 1),
        (RuntimeError("a bug"), 1),
        (typer.BadParameter("wrong"), 2),
        (typer.Exit(1), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_way_to_end_has_its_status(run, monkeypatch, error, status):
    def end():
        if error is not None:
            raise error

    app = typer.Typer()
    app.command()(end)
    monkeypatch.setattr(main, "app", app)
    assert run()[0] == status


@pytest.mark.parametrize("command", [(), ("train",), ("delta",), ("delta", "teach")])
def test_h_is_short_for_help(run, command):
    assert run(*command, "-h") == run(*command, "--help")


def test_a_closed_pipe_ends_it_without_a_word():
    script = f"{shlex.quote(sys.executable)} -m sense_v2.cli.main --help; echo STATUS $? >&2"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "STATUS 1\n"


# Shell completion


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sense-engram ver", {"verify"}),
        ("sense-engram convert --dty", {"--dtype"}),
        ("sense-engram convert table.dat --dtype f", {"float8_e4m3fn", "float32", "float16"}),
        ("sense-engram lookup text --variant q", {"qwen_ple"}),
        ("sense-engram setup --normalization d", {"deepseek"}),
    ],
)
def test_the_shell_completes(words, expected):
    environment = {"_SENSE_ENGRAM_COMPLETE": "complete_bash", "COMP_WORDS": words}
    done = in_process(**environment, COMP_CWORD=str(len(words.split()) - 1))
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_can_be_shown(shell):
    done = in_process(_SENSE_ENGRAM_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert "_SENSE_ENGRAM_COMPLETE=complete_" in done.stdout
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
