"""Every module imports where no extra is installed, as `make wheel` finds in an empty environment, only sooner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Hides what the extras bring from every way of looking for a module, then imports all of ours.
WITHOUT_EXTRAS = """
import re, sys
from importlib import metadata
from pathlib import Path

def name(requirement):
    return re.match("[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")

requires = metadata.requires("sense-v2")
declared = {name(line) for line in requires if "extra ==" not in line}
extras = {name(line) for line in requires if "extra ==" in line} - declared
hidden = {
    top
    for top, homes in metadata.packages_distributions().items()
    if {home.lower().replace("_", "-") for home in homes} <= extras
}
assert {"matplotlib", "gradio", "datasets"} <= hidden, hidden

class WithoutExtras:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path = [WithoutExtras(finder) for finder in sys.meta_path]
sys.path.insert(0, sys.argv[1] + "/scripts")
import wheel_smoke
print(wheel_smoke.check_imports(Path(sys.argv[1])))
"""


def test_every_module_imports_without_the_extras() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, str(ROOT)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" modules\n")
