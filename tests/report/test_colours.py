"""The reports' colours can be told apart by everybody: with either of the three kinds of colour blindness, and in
print. And the docs draw with the same ones."""

import itertools
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from report_pages import schemes

ROOT = Path(__file__).parents[2]
RUNS = ("run-plain", "run-engram", "run-random_rows", "run-shuffled")
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLIND = {
    "nobody": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def seen(color, kind):
    """sRGB -> CIELAB (D65), as somebody of that kind sees it."""
    srgb = np.asarray(color)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(BLIND[kind]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ linear / [0.9505, 1.0, 1.089]
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_runs_colours_can_be_told_apart(scheme, kind):
    colors = schemes()[scheme]
    for one, other in itertools.combinations(RUNS, 2):
        difference = np.linalg.norm(seen(colors[one], kind) - seen(colors[other], kind))
        assert difference > 20, (one, other, difference)  # 2.3 is what can just be seen; swatches are small


def test_the_docs_draw_in_the_reports_colours():
    dark = runpy.run_path(str(ROOT / "scripts" / "docs_pictures.py"))["DARK"]
    assert dark == {name: "#" + "".join(f"{round(255 * c):02x}" for c in schemes()["dark"][name]) for name in dark}
    colors = {"#" + "".join(f"{round(255 * c):02x}" for c in schemes()[one]["run-engram"]) for one in schemes()}
    site = (ROOT / "docs" / "assets" / "site.css").read_text()
    assert set(re.findall(r"--md-typeset-a-color: (#\w+);", site)) == colors
