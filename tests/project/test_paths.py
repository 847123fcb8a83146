"""Modules and files that are named in prose exist: in the docs, in docstrings and comments, in the settings of tools.

A file may be named by the end of its path (`table/format.py`). Tests mirror the package's folders.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_files import parsed

ROOT = Path(__file__).parents[2]
CODE = ("sense_v2", "tests", "scripts", "benchmarks", "examples")
SETTINGS = ("Makefile", "mkdocs.yml", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml", ".gitignore")
PAGES = ("docs/*.md", "[A-Z]*.md", ".github/**/*.*", "tests/*/*.md")
SUFFIXES = "py|c|h|md|html|css|yml|cff|svg|png|toml"
DOTTED = re.compile(r"(?<![\w/.])sense_v2(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(rf"(?<![\w/.{{}}<>…*-])(?:[\w-]+/)*[\w-]+\.(?:{SUFFIXES})\b(?![\w/(*])")
NOT_OURS = {
    # What a run, a build or a user makes.
    "site/index.html",
    "runs/demo/report.html",
    "runs/demo-pretrained/report.html",
    "report.html",
    "ablation.html",
    "analysis.html",
    "run.yaml",
    "my_task.yaml",
    "folder/README.md",
    "dist/notes.md",
    "notes.md",
    "changelog.md",
    "log.md",
    # Patterns, and names that nothing should have.
    "cli/NAME.py",
    "utils.py",
    # The system's, and those of projects whose formats are read.
    "linux/fs.h",
    "ggml/src/ggml-common.h",
    "docs/gguf.md",
    "conversion/qwen4exp.py",
    "mlx_lm/models/longcat_flash_ngram.py",
    "modeling_longcat_ngram.py",
    "tests/kernels/test_ngram_embedding.py",
}
OWN_FOLDERS = {"project", "attacks", "fuzz", "contract", "vllm"}
"""Folders of tests/ that have no counterpart in sense_v2/."""


def files() -> list[str]:
    """Every file that is in the repository or about to be, as paths from its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]  # an unpacked archive


FILES = files()


def prose(path: Path) -> str:
    """Docstrings and comments of Python; all of any other file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    parts = [
        node.value.value
        for node in ast.walk(parsed(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join([*parts, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def names_of(path: Path) -> set[str]:
    """What a module defines or imports at its top, and the lazy names of a package."""
    found: set[str] = set()
    for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
            if any(getattr(target, "id", "") == "_HOME" for target in targets) and isinstance(node.value, ast.Dict):
                found |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    return found


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:end])
        module = next((p for p in (folder.with_suffix(".py"), folder / "__init__.py") if p.exists()), None)
        if module is not None:
            return end == len(parts) or parts[end] in names_of(module)
        if folder.parent.is_dir() and any(folder.parent.glob(f"{folder.name}.*")):
            return True  # compiled
    return False


def missing(text: str, source: str = "") -> Iterator[str]:
    """The names in a text that lead nowhere. The package and its tests name a file of benchmarks/ by its path."""
    inside = source.startswith(("sense_v2/", "tests/"))
    near = [name for name in FILES if not (inside and name.startswith("benchmarks/"))]
    for dotted in DOTTED.findall(text):
        if not is_there(dotted):
            yield dotted
    for named in PATH.findall(re.sub(r"https?://\S+", "", text)):
        among = FILES if "/" in named else near
        if named not in NOT_OURS and not any(f"/{name}".endswith(f"/{named}") for name in among):
            yield named


def sources() -> list[str]:
    pages = [str(path.relative_to(ROOT)) for pattern in PAGES for path in ROOT.glob(pattern)]
    code = [name for name in FILES if name.split("/")[0] in CODE and name.endswith((".py", ".c", ".h"))]
    return sorted({*pages, *SETTINGS, *code})


def test_what_is_named_exists() -> None:
    found = {name: sorted(set(missing(prose(ROOT / name), name))) for name in sources()}
    assert len(found) > 200, "the sources weren't found"
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`sense_v2.engram.storage.MMapEmbeddingStorage.commit` and sense_v2.hf.from_pretrained", []),
        ("sense_v2.engram.overlay", ["sense_v2.engram.overlay"]),
        ("sense_v2.engram.storage.Nothing", ["sense_v2.engram.storage.Nothing"]),
        ("`table/format.py` and (hashing.py), tests/core/test_config.py, docs/format.md", []),
        ("(`parts.py`), tests/test_config.py", ["parts.py", "tests/test_config.py"]),
        ("https://example.org/parts.py, runs/demo/report.html", []),
    ],
)
def test_a_name_that_leads_nowhere_is_found(text: str, found: list[str]) -> None:
    assert list(missing(text)) == found


def test_tests_mirror_the_package() -> None:
    """A test file lies in a folder that sense_v2/ has, or in one of its own."""
    for name in FILES:
        path = Path(name)
        if path.parts[0] == "tests" and path.name.startswith("test_"):
            folder = Path(*path.parts[1:-1])
            assert len(path.parts) > 2, f"{name} lies in no folder"
            mirrored = path.parts[1] in OWN_FOLDERS or (ROOT / "sense_v2" / folder).is_dir()
            assert mirrored, f"{name}: sense_v2/ has no {folder}/"
