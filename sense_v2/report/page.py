"""One HTML file that asks nothing of anybody. Goes in: a template of this folder and its values. Comes out: a page
with its stylesheet inside, which opens from a disk, a mail or an artifact store, without a network.

Every report extends `page.html` and shares `style.css`. The page carries a content security policy that forbids
every request and every script, so that "self-contained" is held by the browser and not only by this code; and
Jinja escapes whatever a template prints, because the texts in a report come from models and from corpora.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sense_v2.report import wording

FOLDER = Path(__file__).parent

# What a model may generate and a page can't show: control characters, which HTML forbids; halves of surrogate pairs,
# which UTF-8 can't hold; overrides of the writing direction, which would turn the words behind them around.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def render(template: str, **values: Any) -> str:
    """The page as text. A value that the template names and `values` lacks raises `jinja2.UndefinedError`."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (
        "chance",
        "count",
        "decimals",
        "duration",
        "moment",
        "percent",
        "perplexity",
        "setting",
        "signed",
        "size",
    )
    environment.filters.update({name: getattr(wording, name) for name in (*formats, "typeset", "visible")})
    style = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def write(path: str | Path, template: str, **values: Any) -> None:
    """Renders a template to `path`, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = UNPRINTABLE.sub("\ufffd", render(template, **values))
    path.write_text(html, encoding="utf-8")
