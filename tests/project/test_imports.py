"""Every module imports where no extra is installed, as `make wheel` finds in an empty environment, only sooner."""

from __future__ import annotations

from hidden_packages import ROOT, modules, required, run_without

IMPORT_ALL = """
from pathlib import Path
sys.path.insert(0, arguments[0] + "/scripts")
import wheel_smoke
print(wheel_smoke.check_imports(Path(arguments[0])))
"""


def test_every_module_imports_without_the_extras() -> None:
    extras = required("sense-v2", of_extras=True) - required("sense-v2")
    hidden = {top for top, homes in modules().items() if homes <= extras}
    assert {"matplotlib", "gradio", "datasets"} <= hidden
    assert run_without(hidden, IMPORT_ALL, str(ROOT)).endswith(" modules\n")
