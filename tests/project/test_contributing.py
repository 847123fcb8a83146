"""What contributors find: workflows, hooks and templates are read, and call make targets that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import sense_v2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML = [*WORKFLOWS, *sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))]
YAML += [ROOT / name for name in (".pre-commit-config.yaml", "CITATION.cff", "mkdocs.yml")]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def read(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def calls(text: str) -> set[str]:
    """The targets of calls of make: in code of a page, or in a workflow's steps."""
    return set(re.findall(r"(?:^|`|run: |&& )make ([a-z][a-z-]*)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_it_is_yaml(path: Path) -> None:
    assert isinstance(read(path), dict)


@pytest.mark.parametrize("name", [*PAGES, ".ci/run", *(str(path.relative_to(ROOT)) for path in WORKFLOWS)])
def test_the_make_targets_that_it_calls_exist(name: str) -> None:
    assert calls((ROOT / name).read_text(encoding="utf-8")) <= TARGETS


def test_the_makefile_lists_its_targets() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) - {"broken"} == TARGETS


def test_each_workflow_runs_make_and_what_runs_here_runs_there() -> None:
    called = {path.stem: calls(path.read_text(encoding="utf-8")) for path in WORKFLOWS}
    assert {"tests", "docs", "wheels"} <= called.keys()
    assert all(called.values())
    everything = calls((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    # Other versions of what is installed are gigabytes: only the workflow tries them.
    assert set().union(*called.values()) == everything | {"test-oldest", "test-newest"}


def test_the_tests_run_on_every_python_that_is_promised() -> None:
    versions = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_hooks_are_those_of_make_lint() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    entries = " ".join(hook["entry"] for hook in repository["hooks"])
    for words in ("ruff check", "ruff format", "mypy"):
        assert words in entries
        assert f"-m {words}" in MAKEFILE


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == sense_v2.__version__
    assert PROJECT["dynamic"] == ["version"]  # of sense_v2/__init__.py
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["references"][0]["url"] == PROJECT["urls"]["Paper"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_the_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(((?!https?://)[^)#\s]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_what_pip_is_told_to_install_is_there():
    """Nothing is on a package index yet, so the pages install from the clone, and the extras exist."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install ['\"]?sense-v2", page), path.name
        assert set(re.findall(r"pip install -e ['\"]\.\[(\w+)\]", page)) <= set(PROJECT["optional-dependencies"])
