"""The pages of docs/: their code runs, their calls of `sense-engram` are right, and their links lead somewhere.

What is done with a code block:

python  runs, one block after the other, as they stand
sh      each `sense-engram …` line is parsed by the program itself, on all pages and in the README. On the pages of
        `RUN_CALLS` it also runs, between the page's Python blocks, with less training (`SHORTER`); the commands of
        `PARSED_ONLY` never do
yaml    is read as a configuration, and lies in the folder as run.yaml for the lines that follow
text    output; that of an error is compared with the program's own
"""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_calls import COMMANDS, calls, parse
from tiny import write_corpus

from sense_v2.cli import main
from sense_v2.core.config import Config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
TEXTS = {name: (DOCS / name).read_text(encoding="utf-8") for name in PAGES}
RUN_ELSEWHERE = {
    "delta.md": "test_guides.py",
    "huggingface.md": "test_guides.py",
    "preparing.md": "test_guides.py",
    "released.md": "test_released_guide.py",
    "training.md": "test_guides.py",
}
"""Pages whose Python runs as a process of its own in another file of tests."""
RUN_CALLS = ("tutorial.md", "corpus.md", "out-of-core.md", "small-machines.md")
SMALL = ("--batch-size", "2", "--sequence-length", "32", "--table-size", "2000")
SHORTER = {
    "train": ("--steps", "3", *SMALL),
    "create": ("--table-size", "20000", "--engram-dim", "64"),
    "generate": ("--max-new-tokens", "2"),
}
"""What a command gets behind the page's own options: the last one counts."""
BEGINS_WITH = {
    "corpus.md": ("my_texts", "more", "my_model"),
    "small-machines.md": ("my_texts", "runs"),
}
"""What lies in the folder where a page's code runs; else only a text."""
PARSED_ONLY = ("demo", "serve")
on_every_page = pytest.mark.parametrize("name", PAGES)


def blocks(text):
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


# What stands on a page


def test_every_page_is_in_the_sites_navigation():
    def pages(entry):
        inner = list(entry.values()) if isinstance(entry, dict) else entry if isinstance(entry, list) else None
        return [entry] if inner is None else [page for one in inner for page in pages(one)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    made = {"log.md", "changelog.md"}  # by scripts/docs_hooks.py
    assert sorted(listed) == sorted({*PAGES, *made})


@on_every_page
def test_its_links_lead_somewhere(name):
    for target in re.findall(r"\]\(((?!https?://)[^)#\s]+)", TEXTS[name]):
        assert (DOCS / target).exists(), f"docs/{name} links to {target}, which isn't there"


@on_every_page
def test_each_block_says_its_language(name):
    fences = re.findall(r"^```(.*)$", TEXTS[name], flags=re.MULTILINE)
    openings = fences[::2]
    known = {"python", "sh", "yaml", "text", "json", ""}
    assert set(openings) <= known
    # A block without one is a drawing in letters.
    assert all(language or name in ("architecture.md", "format.md", "distributed.md") for language in openings)


@pytest.mark.parametrize("path", [*(DOCS / name for name in PAGES), ROOT / "README.md"], ids=lambda path: path.name)
def test_the_program_takes_its_calls(path):
    text = path.read_text(encoding="utf-8")
    for language, block in blocks(text):
        if language == "sh":
            for words in calls(block):
                parse([word for word in words if word != "--json"])
    # In a sentence a call may be a part of one; its options are those of the command.
    for name, rest in re.findall(r"`sense-engram ([a-z]+)\b([^`]*)`", text):
        if name not in COMMANDS and rest.split():
            name = f"{name} {rest.split()[0]}"
        if not rest.strip() and any(command.startswith(f"{name} ") for command in COMMANDS):
            continue  # a group of commands
        assert name in COMMANDS, f"{path.name}: sense-engram has no command {name!r}"
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word for word in rest.split() if word.startswith("--")} <= known | {"--help"}


@on_every_page
def test_its_configurations_are_read(name):
    for language, block in blocks(TEXTS[name]):
        if language == "yaml":
            Config.from_yaml(block)


def test_the_error_that_is_shown_is_the_programs_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (shown,) = [block for language, block in blocks(TEXTS["commands.md"]) if language == "text"]
    assert main.main(["eval", "runs/nothing"]) == 1
    assert capsys.readouterr().err == shown


def test_the_benchmarks_that_are_named_are_there():
    named = set(re.findall(r"python (benchmarks/\w+\.py)", TEXTS["benchmarks.md"]))
    assert len(named) >= 6
    assert all((ROOT / path).exists() for path in named)


# What a page does


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What pages begin with: a folder of text, a model with memory trained on it, and one without."""
    folder = tmp_path_factory.mktemp("pages")
    corpus = write_corpus(folder / "my_texts")
    shutil.copytree(corpus, folder / "more")
    (folder / "more" / "notes.txt").write_text("A table lies on disk.\n" * 200)
    common = ("--corpus", str(corpus), "--steps", "2", *SMALL)
    for output, more in (("runs/train", ()), ("my_model", ("--no-memory",))):
        assert main.main(["train", *common, "--output", str(folder / output), *more, "--json"]) == 0
    return folder


def test_pages_with_python_run_here_or_elsewhere():
    for name, where in RUN_ELSEWHERE.items():
        assert name in Path(__file__).with_name(where).read_text(encoding="utf-8")
    assert set(RUN_CALLS) <= set(PAGES)


@pytest.mark.parametrize(
    "name",
    [name for name in PAGES if name not in RUN_ELSEWHERE and (name in RUN_CALLS or "```python" in TEXTS[name])],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_its_code_runs(name, made, tmp_path, monkeypatch, capsys):
    for part in BEGINS_WITH.get(name, ("my_texts",)):
        shutil.copytree(made / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for language, block in blocks(TEXTS[name]):
        if language == "python":
            exec(compile(block, f"docs/{name}", "exec"), names)
        elif language == "yaml":
            Path("run.yaml").write_text(block)
        elif language == "sh" and name in RUN_CALLS:
            for words in calls(block):
                if words[0] in COMMANDS and words[0] not in PARSED_ONLY:
                    if words[0] in ("train", "eval", "profile") and "--corpus" not in words:
                        words += ["--corpus", "my_texts"]  # in place of the standard library
                    assert main.main([*words, *SHORTER.get(words[0], ())]) == 0, capsys.readouterr().err


# What is drawn and built


def test_the_site_lists_every_command_with_its_options():
    text = runpy.run_path(str(ROOT / "scripts" / "docs_commands.py"))["commands"]()
    for name, command in COMMANDS.items():
        assert f"\n### sense-engram {name}\n" in text
        assert f"(#sense-engram-{name.replace(' ', '-')})" in text
        for parameter in command.params:
            assert parameter.name == "help" or parameter.opts[0] in text or parameter.param_type_name == "argument"


def test_the_pictures_are_those_that_the_code_draws(tmp_path):
    """By their texts, among them every id and label: lines and curves depend on the version of matplotlib."""
    runpy.run_path(str(ROOT / "scripts" / "docs_pictures.py"))["main"](tmp_path)
    drawn, committed = (
        {path.name: path.read_text() for path in folder.iterdir()} for folder in (tmp_path, DOCS / "pictures")
    )
    assert set(drawn) == set(committed)
    for name, svg in drawn.items():
        assert re.findall(r"<text[^>]*>(.*?)</text>", svg) == re.findall(r"<text[^>]*>(.*?)</text>", committed[name])
        assert f"pictures/{name}" in TEXTS["how-it-works.md"]


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<script src="app.js"></script><a href="https://example.org">out</a>', None),
        ('<script src="https://example.org/app.js"></script>', "loads https://example.org/app.js"),
        ('<link rel="stylesheet" href="//fonts.example.org/css">', "loads //fonts.example.org/css"),
        ('<img src="gone.png">', "loads gone.png, which isn't there"),
        ('<pre class="mermaid"></pre>', "mermaid"),
    ],
)
def test_what_a_site_would_load_from_elsewhere_is_found(tmp_path, html, problem):
    (tmp_path / "index.html").write_text(html)
    (tmp_path / "app.js").write_text("")
    command = [sys.executable, str(ROOT / "scripts" / "check_site.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (problem is not None)
    assert (problem or "nothing from elsewhere") in done.stdout
