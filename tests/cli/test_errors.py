"""What is wrong and the way out: the exception carries both, and nothing is cut out of its sentences."""

import ast
import builtins
import re
from pathlib import Path

from sense_v2.cli.errors import explain
from sense_v2.core.errors import MissingPackageError

ROOT = Path(__file__).parents[2]
EXTRAS = set(
    re.findall(
        r"^([a-z]+) = \[",
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0],
        flags=re.MULTILINE,
    )
)


def test_the_way_out_of_a_missing_package_is_its_own():
    error = MissingPackageError("tasks need lm_eval. It isn't there", 'pip install "sense-v2[eval]" installs it')
    assert isinstance(error, ModuleNotFoundError)
    what, way_out = explain(error, "sense-engram eval")
    assert what == "tasks need lm_eval. It isn't there"
    assert way_out == 'pip install "sense-v2[eval]" installs it'


def test_no_module_raises_a_plain_import_error_and_each_extra_is_there():
    named = set()
    for path in (ROOT / "sense_v2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised = getattr(node.exc.func, "id", "")
                assert raised not in ("ImportError", "ModuleNotFoundError"), f"{path}:{node.lineno}"
                if raised == "MissingPackageError":
                    named.update(re.findall(r"sense-v2\[(\w+)\]", ast.unparse(node.exc.args[1])))
    assert {"demo", "eval", "gguf", "stream"} <= named <= EXTRAS


def test_tasks_without_their_package_name_the_extra_that_has_it(run, trained, monkeypatch):
    importing = builtins.__import__

    def without(name, *more):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return importing(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, error = run("eval", trained[0], "--tasks", "piqa")
    assert status == 1
    assert error.splitlines()[-1] == ' help: pip install "sense-v2[eval]" installs it'


def test_a_package_of_somebody_else_is_named():
    error = ModuleNotFoundError("No module named 'kernels.fast'", name="kernels.fast")
    what, way_out = explain(error, "sense-engram eval")
    assert what == "No module named 'kernels.fast'"
    assert way_out.startswith("pip install kernels")
