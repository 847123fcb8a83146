"""A text coloured by what memory changed, and by its gates, as HTML with style.css alone.

    coloured_text([Token("def", [0.2]), Token(" main", [0.9], [("token id", "17")], gain=1.3)], layers=[1])

Reports and the playground share it. The facts about a token open under the pointer, the keyboard's focus or a tap,
without a script, which a report's page forbids.

A token's gain is its loss without memory minus its loss with it. Helped tokens are blue and harmed ones orange, which
nobody takes for each other, in four strengths. Gates are sixteen steps of cividis from 0 to 1, whose lightness says
the same as its hue, so they can be read without colour vision and on paper; the text on them is black or white,
whichever is easier to read. The widest gate is the darkest on a light page and the brightest on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sense_v2.core.errors import with_way_out
from sense_v2.report import wording

STEPS = 16
"""Colours of the gates' scale: the classes g0 (shut) to g15 (open) of style.css."""
TIMES = (1.05, 1.25, 2.0, 5.0)
"""How many times likelier, or less likely, a token must have become for each strength of its colour."""

Facts = Sequence[tuple[str, str]]
"""What is known about a token, as (label, value), in the order in which it is shown."""


@dataclass(frozen=True)
class Token:
    """A token, as `coloured_text` shows it."""

    text: str
    gates: Sequence[float | None]
    """One a layer; None or NaN where there is none, which shows as a dashed frame."""
    facts: Facts = ()
    """Shown wherever the token is."""
    layer_facts: Sequence[Facts] = ()
    """Shown behind `facts`, with that layer's gate; one a layer, or none at all."""
    gain: float | None = None
    """Its loss without memory minus its loss with it, in nats; None where there is none."""


def coloured_text(tokens: Sequence[Token], layers: Sequence[int]) -> Markup:
    """Return the text coloured by gain, and folded below it once more for each layer, coloured by that layer's gates.

    What is known of a token opens in the first. Where no token has a gain there are only the latter, not folded.

    Args:
        tokens: The text.
        layers: Numbers of the memory layers.

    Raises:
        ValueError: A token hasn't one gate for each layer.
    """
    for token in tokens:
        if len(token.gates) != len(layers) or len(token.layer_facts) not in (0, len(layers)):
            raise with_way_out(
                ValueError(
                    f"token {token.text!r}: {len(token.gates)} gates and facts of {len(token.layer_facts)} layers, "
                    f"for {len(layers)} layers"
                ),
                "give one of each a layer",
            )
    if not any(wording.is_finite(token.gain) for token in tokens):
        return _by_gate(tokens, layers)
    by_gate = _by_gate([Token(one.text, one.gates) for one in tokens], layers)
    return Markup("{}\n<details><summary>The same text, coloured by gate</summary>\n{}\n</details>").format(
        gain_text(tokens, layers), by_gate
    )


def gain_text(tokens: Sequence[Token], layers: Sequence[int] = ()) -> Markup:
    """Return the text coloured by gain, and what its colours mean. Each token needs a gate for each layer."""
    spans = []
    for token in tokens:
        facts = [*token.facts]
        for number, layer in enumerate(layers):
            label = f"gate, layer {layer}" if len(layers) > 1 else "gate"
            facts.append((label, wording.decimals(token.gates[number])))
            facts += token.layer_facts[number] if token.layer_facts else ()
        spans.append(token_span(token.text, facts, css_class=gain_class(token.gain)))
    return Markup('{}\n<pre class="gate-text">{}</pre>').format(gain_scale(), Markup("").join(spans))


def _by_gate(tokens: Sequence[Token], layers: Sequence[int]) -> Markup:
    parts = [gate_scale()]
    for number, layer in enumerate(layers):
        if len(layers) > 1:
            parts.append(Markup('<p class="gate-layer">Layer {}</p>').format(layer))
        parts.append(layer_text(tokens, number))
    return Markup("\n").join(parts)


def layer_text(tokens: Sequence[Token], number: int) -> Markup:
    """Return the text coloured by the `number`-th of each token's gates."""
    spans = []
    for token in tokens:
        gate = token.gates[number]
        own = token.layer_facts[number] if token.layer_facts else ()
        facts = [("gate", wording.decimals(gate)), *token.facts, *own]
        spans.append(token_span(token.text, facts, css_class=gate_class(gate)))
    return Markup('<pre class="gate-text">{}</pre>').format(Markup("").join(spans))


def gate_class(gate: float | None) -> str:
    """Return the class that colours a gate.

    >>> gate_class(0.0), gate_class(0.2), gate_class(1.0), gate_class(None)
    ('g0', 'g3', 'g15', 'none')
    """
    if not wording.is_finite(gate):
        return "none"
    return f"g{min(max(math.floor((gate or 0.0) * STEPS), 0), STEPS - 1)}"


def gain_class(gain: float | None) -> str:
    """Return the class of a token that was helped ("up1" to "up4") or harmed ("down1" to "down4"); none for little.

    >>> gain_class(0.01), gain_class(math.log(1.5)), gain_class(-0.1), gain_class(3.0), gain_class(None)
    ('', 'up2', 'down1', 'up4', '')
    """
    if gain is None or math.isnan(gain):
        return ""
    strength = sum(abs(gain) > math.log(times) for times in TIMES)
    return f"{'up' if gain > 0 else 'down'}{strength}" if strength else ""


def gate_scale() -> Markup:
    """What the gates' colours mean."""
    steps = Markup("").join(Markup('<i class="g{}"></i>').format(step) for step in range(STEPS))
    return Markup(
        '<p class="gate-scale"><span>gate 0, shut</span><span aria-hidden="true">{}</span><span>1, open</span></p>'
    ).format(steps)


def gain_scale() -> Markup:
    """What the colours of helped and harmed tokens mean."""
    strengths = range(1, len(TIMES) + 1)
    names = [*(f"down{strength}" for strength in reversed(strengths)), "same", *(f"up{step}" for step in strengths)]
    steps = Markup("").join(Markup('<i class="{}"></i>').format(name) for name in names)
    least, most = (f"{times:g} times" for times in (TIMES[0], TIMES[-1]))
    return Markup(
        '<p class="gate-scale"><span>harmed: {most} less likely with memory</span><span aria-hidden="true">{steps}'
        '</span><span>helped: {most} likelier</span><span class="muted">uncoloured: less than {least} either way'
        "</span></p>"
    ).format(most=most, least=least, steps=steps)


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
