"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run_one_after_the_other_and_leave_the_files_they_name(tmp_path, run_here):
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 2
    run_here("\n".join(examples))
    (folder,) = (tmp_path / "data").iterdir()
    assert np.load(folder / "shadow_map.npy").shape == (129_280,)
    rows = np.memmap(folder / "engram_table.dat", "<f4", mode="r").reshape(-1, 16)
    assert rows.shape == (100_000, 16)


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\(((?!https?://)[^)#]+)", README):
        assert (ROOT / target).exists(), f"README.md links to {target}, which isn't there"
