"""Holds the layering of docs/architecture.md by reading every import in the package, without running any.

A module of `sense_v2.core` or `sense_v2.engram` imports only modules that stand before it in `ORDER`. `hf`, `report`
and `cli` sit on top: `cli` may use the other two, and nothing uses `cli`. An import counts wherever it is written: at
the top, in a function, behind `TYPE_CHECKING`, relative, or through `importlib`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A unit is a module of core or engram, or a package there with everything in it.
ORDER = (
    "core.config",
    "engram.variants",
    "engram.pretrained_tokenizer",
    "engram.tokenizer",
    "engram.hashing",
    "engram.usage",
    "engram.checksums",
    "engram.compact",
    "engram.format",
    "engram.scan",
    "engram.disk",
    "engram.coding",
    "engram.columns",
    "engram.fill",
    "engram.drift",
    "engram.journal",
    "engram.undo",
    "engram.opening",
    "engram._gather",
    "engram.gather",
    "engram.pages",
    "engram.devices",
    "engram.gradients",
    "engram.reader",
    "engram.rounding",
    "engram.storage",
    "engram.snapshot",
    "engram.check",
    "engram.transfer",
    "engram.convert",
    "engram.hot",
    "engram.optim",
    "engram.ownership",
    "engram.tree_sum",
    "engram.watch",
    "engram.exchange",
    "engram.global_commit",
    "engram.sharding",
    "engram.range_copy",
    "engram.shards",
    "engram.parts",
    "engram.released",
    "engram.delta",
    "engram.overlay",
    "engram.patch",
    "engram.fusion_names",
    "engram.from_released",
    "engram.released_layouts",
    "engram.to_released",
    "engram.operators",
    "engram.model",
)
# Which of the packages on top each may use, itself included.
ON_TOP = {"hf": {"hf"}, "report": {"report"}, "cli": {"cli", "hf", "report"}}


@dataclass(frozen=True)
class Import:
    line: int
    module: str
    """The module whose code runs: `from sense_v2.engram import storage` is sense_v2.engram.storage."""
    name: str | None = None
    """What is taken from a package's `__init__`, where it is no module of the tree."""


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
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
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
                    yield Import(node.lineno, origin, alias.name if lies_in_init else None)
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


def _unit(module: str) -> str:
    return ".".join(module.split(".")[1:3])


def refusal(module: str, is_init: bool, used: Import) -> str | None:
    """Why `module` may not import this; None where it may."""
    layer, target = _unit(module).split(".")[0], _unit(used.module)
    target_layer = target.split(".")[0]
    if target_layer == "cli" and layer != "cli":
        return "nothing imports cli"
    if layer in ON_TOP:
        if target_layer in ON_TOP and target_layer not in ON_TOP[layer]:
            return f"{layer} may import core, engram and {', '.join(sorted(ON_TOP[layer]))}"
        return None
    if not layer:
        return None
    if target_layer in ON_TOP:
        return f"{target_layer} sits on top of {layer}"
    if is_init and _unit(module) == layer:
        return None if target_layer == layer else f"{layer}/__init__.py serves only {layer}"
    if not target:
        return None if used.name == "__version__" else "only __version__ comes from the package's root"
    if target not in ORDER:
        if target == target_layer:
            return f"import from the module that defines it, not through {target}/__init__.py"
        return f"{target} isn't in ORDER"
    if target != _unit(module) and ORDER.index(target) > ORDER.index(_unit(module)):
        return f"{target} stands after {_unit(module)} in the flow"
    return None


def violations(package: Path) -> list[str]:
    """Every import of the package that breaks the layering, and every module that has no place in it."""
    found = []
    modules = module_names(package)
    for module, path in modules.items():
        is_init = path.name == "__init__.py"
        layer, _, inner = _unit(module).partition(".")
        placed = (
            layer in ON_TOP or (not layer) or (not inner and layer in ("core", "engram")) or _unit(module) in ORDER
        )
        if not placed:
            found.append(f"{path}: {module} has no place: add {_unit(module)!r} to ORDER in tests/test_layering.py")
            continue
        try:
            for used in imports(module, path, modules):
                reason = refusal(module, is_init, used)
                if reason:
                    taken = f"{used.name} from " if used.name else ""
                    found.append(f"{path}:{used.line}: {module} imports {taken}{used.module}: {reason}")
        except ValueError as error:
            found.append(str(error))
    return found


def test_the_package_holds_its_layers() -> None:
    assert len(module_names(ROOT / "sense_v2")) > 5, "the package wasn't found"
    assert "\n".join(violations(ROOT / "sense_v2")) == ""


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_only_scripts_and_tests_use_the_command_line(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        # Seen as a module of the package's root, which may import anything but cli.
        for used in imports(f"sense_v2.{path.stem}", path, module_names(ROOT / "sense_v2")):
            assert _unit(used.module).split(".")[0] != "cli", f"{path}:{used.line}"


def test_the_picture_shows_the_flow_as_it_is() -> None:
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    for module in ORDER:
        names = tuple(f"{module.split('.')[1]}{suffix} " for suffix in (".py", ".c"))
        line = next((line for line in lines if line.strip().startswith(names)), "")
        assert line, f"{module} is missing in docs/architecture.md"
        path = ROOT / "sense_v2" / module.replace(".", "/")
        exists = path.with_suffix(".py").exists() or path.with_suffix(".c").exists()
        assert exists != line.endswith("(planned)"), f"docs/architecture.md: is {module} planned, or is it there?"


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
        "engram/variants.py": "from sense_v2.core.config import Config\n",
        "engram/format.py": "from sense_v2 import __version__\n",
        "engram/hashing.py": "from sense_v2.engram import variants\nfrom . import variants as v\n",
        "engram/storage.py": "from sense_v2.engram.format import Manifest\nfrom ..core import config\n",
        "hf/__init__.py": "",
        "hf/attach.py": "from sense_v2.engram import NgramHasher\nfrom sense_v2.hf import cache\n",
        "hf/cache.py": "import torch\n",
        "report/__init__.py": "",
        "report/page.py": "import sense_v2.core.config\nimport sense_v2.report.page\n",
        "cli/__init__.py": "",
        "cli/main.py": "from sense_v2.hf.attach import x\nfrom sense_v2.report import page\nimport sense_v2.cli\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert violations(package) == []
    return package


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("engram/hashing.py", "from sense_v2.engram.storage import x", "engram.storage stands after engram.hashing"),
        ("engram/hashing.py", "from sense_v2.engram import storage", "engram.storage stands after engram.hashing"),
        ("engram/hashing.py", "import sense_v2.engram.storage as s", "engram.storage stands after engram.hashing"),
        ("engram/hashing.py", "from . import storage", "engram.storage stands after engram.hashing"),
        ("engram/hashing.py", "from .storage import x", "engram.storage stands after engram.hashing"),
        ("engram/hashing.py", "from ..engram import storage", "engram.storage stands after engram.hashing"),
        ("engram/hashing.py", "def f():\n    import sense_v2.engram.storage", "stands after engram.hashing"),
        ("engram/hashing.py", "if TYPE_CHECKING:\n    from .storage import x", "stands after engram.hashing"),
        ("engram/hashing.py", "try:\n    import sense_v2.engram.storage\nexcept ImportError:\n    pass", "after"),
        ("engram/hashing.py", "from sense_v2.engram.model import x", "engram.model stands after engram.hashing"),
        ("engram/hashing.py", "importlib.import_module('sense_v2.engram.storage')", "stands after engram.hashing"),
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
        ("engram/storage.py", "from sense_v2.hf.cache import x", "hf sits on top of engram"),
        ("engram/storage.py", "from sense_v2 import report", "report sits on top of engram"),
        ("engram/storage.py", "from .. import cli", "nothing imports cli"),
        ("core/config.py", "from sense_v2.engram.variants import x", "engram.variants stands after core.config"),
        ("core/config.py", "from sense_v2.engram.slots import x", "engram.slots isn't in ORDER"),
        ("core/__init__.py", "from sense_v2.engram import variants", "core/__init__.py serves only core"),
        ("engram/__init__.py", "from sense_v2.hf import attach", "hf sits on top of engram"),
        ("hf/attach.py", "from sense_v2.report import page", "hf may import core, engram and hf"),
        ("hf/attach.py", "from sense_v2.cli import main", "nothing imports cli"),
        ("hf/attach.py", "importlib.import_module(f'sense_v2.cli.{x}')", "nothing imports cli"),
        ("report/page.py", "from sense_v2.hf import cache", "report may import core, engram and report"),
        ("report/page.py", "from ..cli.main import app", "nothing imports cli"),
        ("__init__.py", "from sense_v2.cli.main import app", "nothing imports cli"),
        ("engram/slots.py", "", "sense_v2.engram.slots has no place: add 'engram.slots' to ORDER"),
        ("core/paths.py", "", "sense_v2.core.paths has no place: add 'core.paths' to ORDER"),
        ("tools.py", "", "sense_v2.tools has no place: add 'tools' to ORDER"),
    ],
)
def test_a_broken_import_is_found(tree: Path, name: str, text: str, reason: str) -> None:
    path = tree / name
    path.write_text((path.read_text() if path.exists() else "") + text + "\n")
    found = violations(tree)
    assert len(found) == 1, found
    assert str(path) in found[0]
    assert reason in found[0]


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
