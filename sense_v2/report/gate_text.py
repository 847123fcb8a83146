"""A text coloured by its gates, as HTML that needs nothing but style.css.

    gate_text([GateToken("def", [0.2]), GateToken(" main", [0.9], facts=[("token id", "17")])], layers=[1])

Reports and the playground share it. The facts about a token open under the pointer, the keyboard's focus or a tap,
without a script, which a report's page forbids. Colours are sixteen steps of cividis, whose lightness says the same
as its hue, so they can be read without colour vision and on paper; the text on them is black or white, whichever is
easier to read. The widest gate is the darkest on a light page and the brightest on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sense_v2.report import wording

STEPS = 16
"""Colours of the scale: the classes g0 (least) to g15 of style.css."""

Facts = Sequence[tuple[str, str]]
"""What is known about a token, as (label, value), in the order in which it is shown."""


@dataclass(frozen=True)
class GateToken:
    """A token, as `gate_text` shows it."""

    text: str
    gates: Sequence[float | None]
    """One a layer; None or NaN where there is none, which shows as a dashed frame."""
    facts: Facts = ()
    """Shown in each layer's text."""
    layer_facts: Sequence[Facts] = ()
    """Shown in that layer's text, behind `facts`; one a layer, or none at all."""


def gate_text(
    tokens: Sequence[GateToken], layers: Sequence[int], *, low: float | None = None, high: float | None = None
) -> Markup:
    """Return the scale and, for each layer, the text coloured by that layer's gates.

    Args:
        tokens: The text.
        layers: Numbers of the memory layers.
        low: The scale's lower end; by default the least gate of all layers, so their colours compare.
        high: The scale's upper end; by default the greatest gate of all layers.

    Raises:
        ValueError: A token hasn't one gate for each layer.
    """
    for token in tokens:
        if len(token.gates) != len(layers) or len(token.layer_facts) not in (0, len(layers)):
            raise ValueError(
                f"token {token.text!r}: {len(token.gates)} gates and facts of {len(token.layer_facts)} layers, for "
                f"{len(layers)} layers; give one of each a layer"
            )
    low, high = gate_range((gate for token in tokens for gate in token.gates), low, high)
    parts = [gate_scale(low, high)]
    for number, layer in enumerate(layers):
        if len(layers) > 1:
            parts.append(Markup('<p class="gate-layer">Layer {}</p>').format(layer))
        parts.append(layer_text(tokens, number, low, high))
    return Markup("\n").join(parts)


def layer_text(tokens: Sequence[GateToken], number: int, low: float, high: float) -> Markup:
    """Return the text of one layer: the `number`-th of each token's gates, on a scale from `low` to `high`."""
    spans = []
    for token in tokens:
        gate = token.gates[number]
        own = token.layer_facts[number] if token.layer_facts else ()
        facts = [("gate", wording.decimals(gate)), *token.facts, *own]
        spans.append(token_span(token.text, facts, css_class=gate_class(gate, low, high)))
    return Markup('<pre class="gate-text">{}</pre>').format(Markup("").join(spans))


def gate_range(
    gates: Iterable[float | None], low: float | None = None, high: float | None = None
) -> tuple[float, float]:
    """Return the ends of a scale: those given, else the least and the greatest finite gate, else (0, 1).

    >>> gate_range([0.2, None, 0.7]), gate_range([0.2, 0.7], low=0), gate_range([])
    ((0.2, 0.7), (0, 0.7), (0.0, 1.0))
    """
    finite = [gate for gate in gates if gate is not None and math.isfinite(gate)]
    least, greatest = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return least if low is None else low, greatest if high is None else high


def gate_class(gate: float | None, low: float, high: float) -> str:
    """Return the class that colours a gate on a scale from `low` to `high`; beyond its ends, the end's.

    >>> gate_class(0.2, 0, 1), gate_class(1.0, 0, 1), gate_class(7, 0, 1), gate_class(None, 0, 1)
    ('g3', 'g15', 'g15', 'none')
    """
    if gate is None or not math.isfinite(gate):
        return "none"
    share = (gate - low) / (high - low) if high > low else 0.0
    return f"g{min(max(math.floor(share * STEPS), 0), STEPS - 1)}"


def gate_scale(low: float, high: float) -> Markup:
    """What the colours mean, from `low` to `high`."""
    steps = Markup("").join(Markup('<i class="g{}"></i>').format(step) for step in range(STEPS))
    ends = wording.decimals(low), wording.decimals(high)
    return Markup(
        '<p class="gate-scale"><span>gate {}</span><span aria-hidden="true">{}</span><span>{}</span></p>'
    ).format(ends[0], steps, ends[1])


def token_span(text: str, facts: Facts, *, css_class: str = "", breaks: bool = True) -> Markup:
    """Return one token of a `<pre class="gate-text">`, white space made visible, and the facts that open on it.

    Args:
        text: The token's text.
        facts: What is known about it, as (label, value).
        css_class: Classes that colour it.
        breaks: False to show its line breaks without breaking the line.
    """
    rows = Markup("").join(Markup("<span>{}</span><span>{}</span>").format(label, value) for label, value in facts)
    shown = wording.show_spaces(text, inline=True)
    tip = Markup('<span class="tip" role="tooltip"><b>{}</b>{}</span>').format(shown, rows)
    return Markup('<span class="{}" tabindex="0">{}{}</span>').format(
        css_class, tip, wording.show_spaces(text) if breaks else shown
    )
