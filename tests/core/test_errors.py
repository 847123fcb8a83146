"""Errors carry the way out: through wrapping, pickling and the system's numbers, for each that the library raises."""

import ast
import builtins
import errno
import pickle
import re
from pathlib import Path

import pytest

from sense_v2.core.config import Config
from sense_v2.core.errors import CommandError, MissingPackageError, what_and_way_out, with_way_out

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "way_out", "message"),
    [
        (ValueError("it has 3 tokens"), "take more text", "it has 3 tokens; take more text"),
        (KeyError("row"), "Name another", "'row. Name another'"),
        (OSError(errno.ENOSPC, "no room"), "Make some", f"[Errno {errno.ENOSPC}] no room. Make some"),
    ],
)
def test_the_message_says_both_and_each_is_there_alone(error, way_out, message):
    what = error.args[-1]
    found = with_way_out(error, way_out)
    assert found is error
    assert str(error) == message
    assert what_and_way_out(error) == (what, way_out)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), what_and_way_out(copy)) == (type(error), message, (what, way_out))


def test_the_number_of_the_system_stays():
    error = with_way_out(OSError(errno.EACCES, "closed"), "open it")
    assert isinstance(error, PermissionError)
    assert (error.errno, error.strerror) == (errno.EACCES, "closed; open it")


def test_an_error_without_a_way_out_has_none():
    error = ValueError("a; b. Do c")
    assert with_way_out(error, None) is error
    assert what_and_way_out(error) == ("a; b. Do c", None)


@pytest.mark.parametrize("kind", [CommandError, MissingPackageError])
def test_errors_of_commands_come_back_from_a_worker_process(kind):
    error = pickle.loads(pickle.dumps(kind("no peft", "pip install peft")))
    assert isinstance(error, kind)
    assert what_and_way_out(error) == ("no peft", "pip install peft")


def test_an_error_that_names_the_file_keeps_the_way_out(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"train": {"stepz": 3}}')
    with pytest.raises(ValueError, match="stepz") as found:
        Config.load(path)
    what, way_out = what_and_way_out(found.value)
    assert what == f"{path}: TrainConfig has no field 'stepz'"
    assert "steps" in way_out


def messages():
    """(where, message) of each exception that sense_v2 makes without a way out; values in it are left out."""
    for path in sorted((ROOT / "sense_v2").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        given = {
            id(node.args[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "with_way_out"
        }
        for node in ast.walk(tree):
            kind = getattr(builtins, getattr(getattr(node, "func", None), "id", ""), None)
            if isinstance(kind, type) and issubclass(kind, Exception) and node.args and id(node) not in given:
                texts = [part.value for part in ast.walk(node.args[-1]) if isinstance(part, ast.Constant)]
                yield f"{path.relative_to(ROOT)}:{node.lineno}", " ".join(map(str, texts))


def test_what_to_do_is_given_as_the_way_out_and_not_written_into_the_message():
    told = list(messages())
    assert len(told) > 100
    verbs = (
        "add|build|call|check|choose|copy|delete|fetch|give|go|leave|load|lower|make|mend|move|name|open|pass|pip|put"
    )
    verbs += "|remove|restart|run|save|see|serve|set|start|take|train|try|use|wait|write"
    asks = re.compile(rf"(?:[.;:] )(?:{verbs})\b", flags=re.IGNORECASE)
    assert [(where, text) for where, text in told if asks.search(text)] == []
