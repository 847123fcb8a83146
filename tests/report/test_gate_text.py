"""A text coloured by its gates: what it shows must be what it was given, and must be readable."""

import doctest
import itertools
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from report_pages import contrast, luminance

from sense_v2.report import gate_text as gate_text_module
from sense_v2.report import page
from sense_v2.report.gate_text import STEPS, GateToken, gate_text

TOKENS = [
    GateToken("def", [0.2, 0.5], [("token id", "17")], [[("rows", "1 2")], [("rows", "8 9")]]),
    GateToken(" <main>\n", [0.9, 0.1], [("token id", "4")], [[("rows", "3")], [("rows", "4")]]),
    GateToken("&amp;", [None, math.nan]),
]


class Page(HTMLParser):
    """(classes, text, tip) of each token, by text block; a tip is what `.tip` holds."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.blocks, self.stack = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.stack.append(attributes.get("class", ""))
        if tag == "pre":
            self.blocks.append([])
        elif "tabindex" in attributes:
            self.blocks[-1].append([attributes["class"], "", []])

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, data):
        if self.blocks and "gate-text" in self.stack and len(self.stack) > 1:
            if "tip" in self.stack:
                self.blocks[-1][-1][2].append(data)
            else:
                self.blocks[-1][-1][1] += data


def test_each_layer_shows_each_token_with_its_own_gate_and_facts():
    first, second = Page(gate_text(TOKENS, layers=[1, 15], low=0, high=1)).blocks
    assert first == [
        ["g3", "def", ["def", "gate", "0.200", "token id", "17", "rows", "1 2"]],
        ["g14", " <main>↵\n", ["·<main>↵", "gate", "0.900", "token id", "4", "rows", "3"]],
        ["none", "&amp;", ["&amp;", "gate", "not finite"]],
    ]
    assert [token[0] for token in second] == ["g8", "g1", "none"]
    assert second[0][2][-1] == "8 9"


def test_the_scale_spans_all_layers_where_no_ends_are_given():
    html = gate_text(TOKENS, layers=[1, 15])
    assert re.search(r"gate 0\.100<.*>0\.900<", html)
    assert [token[0] for block in Page(html).blocks for token in block] == ["g2", "g15", "none", "g8", "g0", "none"]


def test_a_token_without_a_gate_for_each_layer_is_refused():
    with pytest.raises(ValueError, match="token 'x': 1 gates and facts of 0 layers, for 2 layers"):
        gate_text([GateToken("x", [0.1])], layers=[0, 1])
    with pytest.raises(ValueError, match="1 gates and facts of 2 layers, for 1 layers"):
        gate_text([GateToken("x", [0.1], (), [(), ()])], layers=[0])


def colors_of_steps():
    """[(light ground, light text), (dark ground, dark text)] of each step, from the stylesheet, as fractions."""
    css = (page.FOLDER / "style.css").read_text()
    found = {}
    for step, fallback, light, dark, text_fallback, *texts in re.findall(
        r"\.g(\d+) \{ background: (#\w{6}); background: light-dark\((#\w{6}), (#\w{6})\); "
        r"color: (#\w{6}); color: light-dark\((#\w{6}), (#\w{6})\); \}",
        css,
    ):
        assert (fallback, text_fallback) == (light, texts[0])
        colors = [tuple(int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)) for value in (light, dark, *texts)]
        found[int(step)] = [(colors[0], colors[2]), (colors[1], colors[3])]
    assert sorted(found) == list(range(STEPS))
    return [found[step] for step in range(STEPS)]


def test_the_scale_is_cividis_and_its_text_can_be_read():
    cividis = matplotlib.colormaps["cividis"]
    for step, (light, dark) in enumerate(colors_of_steps()):
        share = step / (STEPS - 1)
        paled = (1 - share) ** 1.5
        expected_light = np.array(cividis(1 - share)[:3]) * (1 - paled) + paled
        assert np.allclose(light[0], expected_light, atol=0.5 / 255 + 1e-9)
        assert np.allclose(dark[0], cividis(share)[:3], atol=0.5 / 255 + 1e-9)
        for ground, text in (light, dark):
            assert contrast(ground, text) >= 4.5


def test_lightness_alone_tells_the_steps_apart():
    for scheme, sign in ((0, -1), (1, 1)):
        steps = [luminance(colors[scheme][0]) for colors in colors_of_steps()]
        assert all(sign * (b - a) > 0 for a, b in itertools.pairwise(steps))


def test_examples_in_docstrings():
    result = doctest.testmod(gate_text_module)
    assert result.attempted > 0
    assert result.failed == 0
