"""What tests of pages share: a reader of HTML, a hostile text, and the stylesheet's colours."""

import re
from html.parser import HTMLParser

from sense_v2.report import page

NAN = float("nan")
HOSTILE = "<script>alert('x')</script>&\"quote\" $x^2$ \u202e\x00\ud83d ]]> -->"


class Page(HTMLParser):
    """Reads a page: the text, the elements, and whether every element that was opened was closed."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def luminance(color: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def schemes() -> dict[str, dict[str, tuple[float, ...]]]:
    css = (page.FOLDER / "style.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    found = {}
    for name, part in (("light", light), ("dark", dark.split("* {")[0])):
        colors = {
            key: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
            for key, value in re.findall(r"--([\w-]+): #(\w{6});", part)
        }
        found[name] = colors
    return found
