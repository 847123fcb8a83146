"""A text coloured by gain and by gate: what it shows must be what it was given, and must be readable."""

import dataclasses
import doctest
import itertools
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from report_pages import contrast, luminance, schemes
from test_colours import BLIND, seen

from sense_v2.report import coloured_text as module
from sense_v2.report import page
from sense_v2.report.coloured_text import STEPS, Token, coloured_text

TOKENS = [
    Token("def", [0.2, 0.5], [("token id", "17")], [[("rows", "1 2")], [("rows", "8 9")]]),
    Token(" <main>\n", [0.9, 0.1], [("token id", "4")], [[("rows", "3")], [("rows", "4")]]),
    Token("&amp;", [None, math.nan]),
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


GAINS = (math.log(1.3), -math.log(6), 0.01)


def test_each_layer_shows_each_token_with_its_own_gate_and_facts():
    html = coloured_text(TOKENS, layers=[1, 15])
    first, second = Page(html).blocks
    assert first == [
        ["g3", "def", ["def", "gate", "0.200", "token id", "17", "rows", "1 2"]],
        ["g14", " <main>↵\n", ["·<main>↵", "gate", "0.900", "token id", "4", "rows", "3"]],
        ["none", "&amp;", ["&amp;", "gate", "not finite"]],
    ]
    assert [token[0] for token in second] == ["g8", "g1", "none"]
    assert second[0][2][-1] == "8 9"
    assert "details" not in html


def test_an_open_gate_looks_open_whatever_the_others_are():
    wide = [Token("a", [0.983]), Token("b", [1.0]), Token("c", [0.99])]
    assert [token[0] for token in Page(coloured_text(wide, layers=[1])).blocks[0]] == ["g15", "g15", "g15"]
    assert re.search(r"gate 0, shut<.*>1, open<", coloured_text(wide, layers=[1]))


def test_the_colour_is_what_memory_changed_and_the_gates_stand_folded_below():
    tokens = [dataclasses.replace(token, gain=gain) for token, gain in zip(TOKENS, GAINS, strict=True)]
    html = coloured_text(tokens, layers=[1, 15])
    by_gain, first, second = Page(html).blocks
    assert by_gain[0] == [
        "up2",
        "def",
        ["def", "token id", "17", "gate, layer 1", "0.200", "rows", "1 2", "gate, layer 15", "0.500", "rows", "8 9"],
    ]
    assert [token[0] for token in by_gain] == ["up2", "down4", ""]
    assert [token[0] for token in first] == ["g3", "g14", "none"]
    assert len(second) == 3
    legend, _, rest = html.partition('<pre class="gate-text">')
    assert re.findall(r'<i class="(\w+)">', legend) == [
        *("down4", "down3", "down2", "down1", "same", "up1", "up2", "up3", "up4")
    ]
    assert "5 times less likely" in legend
    assert rest.index("<details><summary>") < rest.index('class="g3"')


def test_a_token_without_a_gate_for_each_layer_is_refused():
    with pytest.raises(ValueError, match="token 'x': 1 gates and facts of 0 layers, for 2 layers"):
        coloured_text([Token("x", [0.1])], layers=[0, 1])
    with pytest.raises(ValueError, match="1 gates and facts of 2 layers, for 1 layers"):
        coloured_text([Token("x", [0.1], (), [(), ()])], layers=[0])


def grounds_of_gains():
    """{(scheme, class): the ground of a helped or harmed token, as a fraction}: its hue, mixed with the page's."""
    css = (page.FOLDER / "style.css").read_text()
    hues = dict(re.findall(r":is\(\.(up|down)1, .*?\) \{ --shift: var\(--([\w-]+)\); color: var\(--ink\); \}", css))
    shares = dict(
        re.findall(r":is\(\.up(\d), \.down\1\) \{ background: color-mix\(in srgb, var\(--shift\) (\d+)%", css)
    )
    assert (sorted(hues), sorted(shares)) == (["down", "up"], ["1", "2", "3", "4"])
    return {
        (scheme, f"{way}{strength}"): tuple(
            int(share) / 100 * hue + (1 - int(share) / 100) * ground
            for hue, ground in zip(colors[variable], colors["page"], strict=True)
        )
        for scheme, colors in schemes().items()
        for way, variable in hues.items()
        for strength, share in shares.items()
    }


def test_helped_and_harmed_tokens_can_be_read_and_told_apart_by_everybody():
    grounds = grounds_of_gains()
    assert all(contrast(ground, schemes()[scheme]["ink"]) >= 4.5 for (scheme, _), ground in grounds.items())
    for scheme, kind, strength in itertools.product(schemes(), BLIND, (2, 3, 4)):
        up, down = (seen(grounds[scheme, f"{way}{strength}"], kind) for way in ("up", "down"))
        assert np.linalg.norm(up - down) > 10, (scheme, kind, strength)


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
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
