"""README.md of this folder lists every attack, and nothing else."""

import ast
import re
from pathlib import Path

from source_files import parsed

FOLDER = Path(__file__).parent


def test_every_attack_is_in_the_list() -> None:
    sections = re.split(r"^## .*: (test_\w+\.py)$", (FOLDER / "README.md").read_text(encoding="utf-8"), flags=re.M)
    listed = {
        name: set(re.findall(r"`(test_\w+)`", text))
        for name, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    there = {
        path.name: {
            node.name
            for node in parsed(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for path in FOLDER.glob("test_attacks_on_*.py")
    }
    assert listed == there
