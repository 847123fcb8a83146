"""Runs code in a Python that finds none of some installed packages, as where they were never installed."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Takes them out of every way of looking for a module.
HIDE = """
import sys
hidden, *arguments = sys.argv[1:]
hidden = set(hidden.split(","))

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""


def distribution(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def required(name: str, *, of_extras: bool = False) -> set[str]:
    """The distributions that one asks for by itself; or those of its extras."""
    lines = metadata.requires(name) or []
    asked = [line for line in lines if ("extra ==" in line) == of_extras]
    return {distribution(re.match("[A-Za-z0-9._-]+", line)[0]) for line in asked}


def modules() -> dict[str, set[str]]:
    """The names that can be imported here, and the distributions that bring each."""
    return {top: set(map(distribution, homes)) for top, homes in metadata.packages_distributions().items()}


def run_without(hidden: set[str], code: str, *arguments: str) -> str:
    """What the code prints; it finds its `arguments` in a list of that name."""
    command = [sys.executable, "-c", HIDE + code, ",".join(sorted(hidden)), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
