"""Checks that no page, stylesheet or script of a built site loads anything from elsewhere.

    python scripts/check_site.py site

Links that a reader clicks may lead anywhere; what a browser fetches by itself may not. In scripts, it looks for the
addresses that the theme could load code from. Two of them are known and unused here (diagrams, browsers of 2019).
Prints what is wrong and exits with status 1.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches by itself.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
UNUSED = ("https://unpkg.com/mermaid@", "https://unpkg.com/resize-observer-polyfill")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.has_diagram = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag in FETCHED and values.get(FETCHED[tag]):
            self.fetched.append(str(values[FETCHED[tag]]))
        elif tag == "link" and RELATIONS & set(str(values.get("rel")).split()):
            self.fetched.append(str(values.get("href")))
        self.has_diagram |= "mermaid" in str(values.get("class")).split()


def problems(site: Path) -> list[str]:
    """Return one line for each thing that is wrong."""
    found = []
    pages = sorted(site.rglob("*.html"))
    if not pages:
        return [f"{site}: no pages there"]
    for path in pages:
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        if page.has_diagram:
            found.append(
                f"{path}: a mermaid diagram, for which the theme loads a script from unpkg.com; draw a picture"
            )
        for address in page.fetched:
            if re.match(r"(https?:)?//", address):
                found.append(f"{path}: loads {address}")
            elif not address.startswith(("data:", "#")) and path.name != "404.html":
                target = (path.parent / address.split("#")[0].split("?")[0]).resolve()
                if not target.exists():
                    found.append(f"{path}: loads {address}, which isn't there")
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(
            r"(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"')]+)", path.read_text(encoding="utf-8")
        ):
            found.append(f"{path}: loads {address}")
    for path in sorted(site.rglob("*.js")):
        for address in re.findall(r"https?://[\w.-]+/[\w@.-]+", path.read_text(encoding="utf-8")):
            if "unpkg.com" in address and not address.startswith(UNUSED):
                found.append(f"{path}: may load {address}")
    return found


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines) or f"{sys.argv[1]}: loads nothing from elsewhere")
    sys.exit(bool(lines))
