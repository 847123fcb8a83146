"""Holds the rules of docs/architecture.md by reading every import in the package, without running any.

- A package imports from itself and from the packages below it (`PACKAGES`). An import counts wherever it is written:
  at the top, in a function, behind `TYPE_CHECKING`, relative, or through `importlib`.
- No modules import each other in a circle.
- No name that begins with `_` is imported from another module.
- A folder has at most `MOST_MODULES` files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from source_files import parsed

ROOT = Path(__file__).parents[2]

# From the bottom to the top; "engram" is what lies in that folder itself, the flow's ground floor.
PACKAGES = (
    "core",
    "engram.table",
    "engram.reading",
    "engram",
    "engram.upkeep",
    "engram.released",
    "engram.delta",
    "engram.ranks",
    "hf",
    "report",
    "cli",
)
MOST_MODULES = 14


@dataclass(frozen=True)
class Import:
    line: int
    module: str
    """The module whose code runs: `from sense_v2.engram import storage` is sense_v2.engram.storage."""
    name: str | None = None
    """What is taken from the module, where that is no module of the tree itself."""
    through_init: bool = False
    """Whether the module is a package's `__init__`."""


def module_names(package: Path) -> dict[str, Path]:
    """Module name -> file, for all of a package; an `__init__.py` has its folder's name."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Everything in `path` that imports a part of the package, resolved to absolute names.

    Raises `ValueError` for an import by a computed name that can't be told from the text.
    """
    root = module.split(".")[0]
    is_package = path.name == "__init__.py"
    tree = parsed(path.read_text(encoding="utf-8"), str(path))
    importers = {"import_module", "__import__"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "importlib"
        for alias in node.names
        if alias.name == "import_module" and alias.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == root:
                    yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            # One dot is the package a module lies in, and the package itself for its `__init__`.
            up = node.level - 1 if is_package else node.level
            origin = ".".join(parts[: len(parts) - up]) if node.level else ""
            origin = ".".join(part for part in (origin, node.module) if part)
            if origin.split(".")[0] != root:
                continue
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                if inner in modules:
                    yield Import(node.lineno, inner)
                else:
                    lies_in_init = origin in modules and modules[origin].name == "__init__.py"
                    yield Import(node.lineno, origin, alias.name, lies_in_init)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in importers and node.args:
                start = _known_start(node.args[0], module)
                if not start or start.startswith("."):
                    raise ValueError(
                        f"{path}:{node.lineno}: {module} imports a computed name; write it out, absolute"
                    )
                if start.split(".")[0] == root:
                    yield Import(node.lineno, start.rstrip("."))


def _known_start(argument: ast.expr, module: str) -> str:
    """The constant beginning of a string; `f"{__name__}.{x}"` begins with the module's own name and a dot."""
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    start = ""
    for part in argument.values if isinstance(argument, ast.JoinedStr) else []:
        if isinstance(part, ast.Constant):
            start += str(part.value)
        elif isinstance(part, ast.FormattedValue) and getattr(part.value, "id", None) == "__name__":
            start += module
        else:
            # Only up to the last dot is it certain which package is meant.
            return start[: start.rfind(".") + 1]
    return start


def package_of(module: str) -> str | None:
    """The package of `PACKAGES` that a module lies in, or is; None for the root and for what has no place."""
    inner = module.partition(".")[2]
    fitting = [name for name in PACKAGES if inner == name or inner.startswith(f"{name}.")]
    return max(fitting, key=len, default=None)


def refusal(module: str, is_init: bool, used: Import) -> str | None:
    """Why `module` may not import this; None where it may."""
    package, target = package_of(module), package_of(used.module)
    if used.name is not None and used.name.startswith("_") and used.name != "__version__":
        return f"{used.name} is private to {used.module}"
    if package is None:
        return f"{target} sits on top of the root" if target else None
    if target is None:
        return None if used.name == "__version__" else "only __version__ comes from the package's root"
    if used.through_init and not is_init:
        return f"import from the module that defines it, not through {used.module}/__init__.py"
    if is_init and module.count(".") == 1 and target.split(".")[0] == package.split(".")[0]:
        return None  # the lazy public names of core, engram and hf
    if PACKAGES.index(target) > PACKAGES.index(package):
        return f"{target} sits on top of {package}"
    return None


def violations(package: Path) -> list[str]:
    """Every import of the package that breaks the rules, and every module that has no place in it."""
    found = []
    modules = module_names(package)
    uses: dict[str, set[str]] = {}
    for module, path in modules.items():
        is_init = path.name == "__init__.py"
        if package_of(module) is None and "." in module:
            found.append(f"{path}: {module} has no place: it lies in none of {', '.join(PACKAGES)}")
            continue
        try:
            for used in imports(module, path, modules):
                reason = refusal(module, is_init, used)
                if used.module != module:
                    uses.setdefault(module, set()).add(used.module)
                if reason:
                    taken = f"{used.name} from " if used.name else ""
                    found.append(f"{path}:{used.line}: {module} imports {taken}{used.module}: {reason}")
        except ValueError as error:
            found.append(str(error))
    return found or [f"{package}: modules import each other: {' -> '.join(circle)}" for circle in circles(uses)]


def circles(uses: dict[str, set[str]]) -> list[list[str]]:
    """One way around for each module from which an import leads back to it."""
    found = []
    for start in uses:
        ways = [[start]]
        seen = set()
        while ways:
            way = ways.pop()
            for used in uses.get(way[-1], ()):
                if used == start:
                    found.append([*way, start])
                    ways = []
                    break
                if used not in seen:
                    seen.add(used)
                    ways.append([*way, used])
    return found


def test_the_package_holds_its_layers() -> None:
    assert len(module_names(ROOT / "sense_v2")) > 5, "the package wasn't found"
    assert "\n".join(violations(ROOT / "sense_v2")) == ""


def test_no_folder_has_more_than_fourteen_modules() -> None:
    """A folder is a thought: its reader keeps all of its files in mind."""
    counts = Counter(path.parent.relative_to(ROOT) for path in (ROOT / "sense_v2").rglob("*.py"))
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_only_scripts_and_tests_use_the_command_line(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        # Seen as a module of the package's root.
        for used in imports(f"sense_v2.{path.stem}", path, module_names(ROOT / "sense_v2")):
            assert package_of(used.module) != "cli", f"{path}:{used.line}"


def test_a_long_file_says_why() -> None:
    """Past 500 lines a file is split by responsibility, or its docstring says "Long because …"."""
    silent = []
    for module, path in module_names(ROOT / "sense_v2").items():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 500 and "Long because" not in (ast.get_docstring(parsed(text)) or ""):
            silent.append(module)
    assert silent == []


# The test of the test: a tree that holds, then one broken import at a time.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    package = tmp_path / "sense_v2"
    files = {
        "__init__.py": "__version__ = '0'\n",
        "core/__init__.py": "",
        "core/config.py": "import json\n",
        "engram/__init__.py": (
            "from importlib import import_module\n"
            "def __getattr__(name):\n    return import_module(f'{__name__}.{HOME[name]}')\n"
        ),
        "engram/table/__init__.py": "",
        "engram/table/format.py": "from sense_v2 import __version__\nfrom sense_v2.core.config import Config\n",
        "engram/table/journal.py": "from sense_v2.engram.table.format import Manifest\n",
        "engram/reading/__init__.py": "",
        "engram/reading/pages.py": "from ..table import format\n",
        "engram/variants.py": "from sense_v2.core.config import Config\n",
        "engram/hashing.py": "from sense_v2.engram import variants\nfrom . import variants as v\n",
        "engram/storage.py": "from sense_v2.engram.table.format import Manifest\nfrom ..core import config\n",
        "engram/upkeep/__init__.py": "",
        "engram/upkeep/check.py": "from sense_v2.engram.storage import x\n",
        "engram/delta/__init__.py": "",
        "engram/delta/overlay.py": "from sense_v2.engram.upkeep.check import x\n",
        "hf/__init__.py": "",
        "hf/attach.py": "from sense_v2.engram.hashing import NgramHasher\nfrom sense_v2.hf import cache\n",
        "hf/cache.py": "import torch\n",
        "report/__init__.py": "",
        "report/page.py": "import sense_v2.core.config\nfrom sense_v2.hf.cache import x\n",
        "cli/__init__.py": "",
        "cli/main.py": "from sense_v2.hf.attach import x\nfrom sense_v2.report import page\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert violations(package) == []
    return package


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("engram/table/format.py", "from sense_v2.engram.storage import x", "engram sits on top of engram.table"),
        ("engram/table/format.py", "from sense_v2.engram import storage", "engram sits on top of engram.table"),
        ("engram/table/format.py", "import sense_v2.engram.storage as s", "engram sits on top of engram.table"),
        ("engram/table/format.py", "from .. import storage", "engram sits on top of engram.table"),
        ("engram/table/format.py", "from ..storage import x", "engram sits on top of engram.table"),
        ("engram/table/format.py", "from ...engram import storage", "engram sits on top of engram.table"),
        ("engram/table/format.py", "def f():\n    import sense_v2.engram.storage", "engram sits on top of"),
        ("engram/table/format.py", "if TYPE_CHECKING:\n    from ..storage import x", "engram sits on top of"),
        (
            "engram/table/format.py",
            "try:\n    import sense_v2.engram.storage\nexcept ImportError:\n    pass",
            "on top",
        ),
        ("engram/table/format.py", "from ..reading.pages import x", "engram.reading sits on top of engram.table"),
        ("engram/reading/pages.py", "from ..hashing import x", "engram sits on top of engram.reading"),
        ("engram/storage.py", "from .delta.overlay import x", "engram.delta sits on top of engram"),
        ("engram/upkeep/check.py", "from ..delta.overlay import x", "engram.delta sits on top of engram.upkeep"),
        ("engram/hashing.py", "importlib.import_module('sense_v2.hf.cache')", "hf sits on top of engram"),
        ("engram/hashing.py", "__import__('sense_v2.hf')", "hf sits on top of engram"),
        ("engram/hashing.py", "from importlib import import_module as im\nim('sense_v2.hf')", "hf sits on top"),
        ("engram/hashing.py", "importlib.import_module('.storage', __package__)", "imports a computed name"),
        ("engram/hashing.py", "importlib.import_module(name)", "imports a computed name"),
        ("engram/hashing.py", "importlib.import_module(f'sense_v2.h{x}')", "only __version__ comes from"),
        ("engram/hashing.py", "importlib.import_module(f'sense{x}')", "imports a computed name"),
        # The lazy names of a package's __init__ would lead anywhere.
        ("engram/hashing.py", "from sense_v2.engram import MMapEmbeddingStorage", "import from the module that"),
        ("engram/hashing.py", "from sense_v2.engram import *", "import from the module that defines it"),
        ("engram/hashing.py", "import sense_v2", "only __version__ comes from the package's root"),
        ("engram/hashing.py", "from sense_v2 import attach_engram", "only __version__ comes from"),
        ("engram/hashing.py", "from sense_v2.engram.variants import _x", "_x is private to sense_v2.engram.variants"),
        ("hf/attach.py", "from sense_v2.hf.cache import _x as x", "_x is private to sense_v2.hf.cache"),
        ("engram/storage.py", "from sense_v2.hf.cache import x", "hf sits on top of engram"),
        ("engram/storage.py", "from sense_v2 import report", "report sits on top of engram"),
        ("engram/storage.py", "from .. import cli", "cli sits on top of engram"),
        ("core/config.py", "from sense_v2.engram.variants import x", "engram sits on top of core"),
        ("core/__init__.py", "from sense_v2.engram import variants", "engram sits on top of core"),
        ("engram/__init__.py", "from sense_v2.hf import attach", "hf sits on top of engram"),
        ("hf/attach.py", "from sense_v2.report import page", "report sits on top of hf"),
        ("hf/attach.py", "from sense_v2.cli import main", "cli sits on top of hf"),
        ("hf/attach.py", "importlib.import_module(f'sense_v2.cli.{x}')", "cli sits on top of hf"),
        ("report/page.py", "from ..cli.main import app", "cli sits on top of report"),
        ("__init__.py", "from sense_v2.cli.main import app", "cli sits on top of the root"),
        ("tools.py", "", "sense_v2.tools has no place"),
    ],
)
def test_a_broken_import_is_found(tree: Path, name: str, text: str, reason: str) -> None:
    path = tree / name
    path.write_text((path.read_text() if path.exists() else "") + text + "\n")
    found = violations(tree)
    assert len(found) == 1, found
    assert str(path) in found[0]
    assert reason in found[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"hf/cache.py": "from sense_v2.hf import attach"},
        {"hf/cache.py": "def f():\n    from sense_v2.hf.attach import x"},
        {"engram/variants.py": "from . import storage", "engram/storage.py": "from . import hashing"},
    ],
)
def test_a_circle_of_imports_is_found(tree: Path, changes: dict[str, str]) -> None:
    for name, text in changes.items():
        (tree / name).write_text((tree / name).read_text() + text + "\n")
    assert any("modules import each other" in line for line in violations(tree))


# What an import costs.


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sense_v2", ["torch", "numpy", "transformers"]),
        ("sense_v2.engram", ["torch", "numpy", "transformers"]),
        ("sense_v2.core.config", ["torch", "transformers"]),
        ("sense_v2.engram.variants", ["torch", "transformers"]),
        ("sense_v2.engram.storage", ["transformers", "tokenizers"]),
    ],
)
def test_what_an_import_does_not_load(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
