"""A template and its values become one self-contained HTML file.

The stylesheet lies inside, so a report opens from a disk, an email or an artifact store without a network. Every
report extends `page.html` and shares `style.css`, and every function of wording.py is a filter. A content security
policy forbids every request and every script, so the browser enforces it, too. Jinja escapes whatever a template
prints: the texts come from models and corpora.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sense_v2.report import wording

FOLDER = Path(__file__).parent

# What a model may generate and a page can't show: control characters, which HTML forbids; halves of surrogate pairs,
# which UTF-8 can't hold; overrides of the writing direction, which would turn the words after them around.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def render(template: str, **values: Any) -> str:
    """Return the page as text. Raises `jinja2.UndefinedError` where `values` lacks what the template names."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: value for name, value in vars(wording).items() if inspect.isfunction(value)})
    style = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def write(path: str | Path, template: str, **values: Any) -> None:
    """Render a template to `path`, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = UNPRINTABLE.sub("\ufffd", render(template, **values))
    path.write_text(html, encoding="utf-8")
