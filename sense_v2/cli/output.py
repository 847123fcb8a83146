"""What a command prints: lines for people, or one JSON object for programs.

Without `--json` the lines go to stdout. With it stdout holds the object and nothing else, and the lines go to stderr.

Everything is printed here (a test holds the commands to it), because names out of files and texts of models may hold
what a terminal obeys.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from sense_v2.core.errors import CommandError
from sense_v2.core.folders import refuse_other_encodings
from sense_v2.core.progress import Progress

# Control characters but for tabs, what turns the direction of text, and halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def spell_out(text: str) -> str:
    """Return one line with its control characters spelt out. Bytes of a path that aren't UTF-8 are spelt out, too.

    >>> print(spell_out("a\\x1b]0;b\\x07"), spell_out("c\\udce9.txt"))
    a\\x1b]0;b\\x07 c\\xe9.txt
    """

    def spelt(match: re.Match[str]) -> str:
        code = ord(match[0])
        code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _OBEYED.sub(spelt, text)


class LoadingNotice:
    """Says in a terminal what is being loaded, while nothing else is printed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._what = ""
        self._is_shown = False

    def begin(self, seconds: float = 1.0) -> None:
        """Show it on stderr in so many seconds."""
        self._what = "loading the libraries"
        if sys.stderr.isatty():
            self._timer = threading.Timer(seconds, self._show)
            self._timer.daemon = True
            self._timer.start()

    def say(self, what: str) -> None:
        """Say from now on that this is being done, as in "loading runs/train"."""
        with self._lock:
            self._what = what
            if self._is_shown:
                self._write()

    def end(self) -> None:
        """Take it away, or never show it."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._is_shown:
                self._is_shown = False
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._is_shown = True
                self._write()

    def _write(self) -> None:
        print(f"\r\x1b[K{spell_out(self._what)} …", end="", file=sys.stderr, flush=True)


LOADING = LoadingNotice()


def tell(*lines: str, file: TextIO | None = None) -> None:
    """Print lines for a person: to stdout, or to `file`."""
    LOADING.end()
    print(*map(spell_out, lines), sep="\n", file=file, flush=True)


def lines_typed() -> Iterator[str]:
    """The lines of stdin that aren't empty, up to its end; at a terminal each is asked for."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def print_text(text: str) -> None:
    """Print a text that a model wrote: as it is, but to a terminal only what can be seen."""
    if sys.stdout.isatty():
        tell(*text.split("\n"))
    else:
        print(text, flush=True)


def lines_to(as_json: bool) -> Callable[..., Any]:
    """Return the `tell` for a command's lines: to stdout, or to stderr if stdout holds JSON."""
    return functools.partial(tell, file=sys.stderr if as_json else None)


def progress_to(echo: Callable[[str], Any]) -> Progress:
    """Show how far a call of the library is: a bar in a terminal, a line now and then elsewhere."""
    from sense_v2.cli.progress import ByteProgress

    return functools.partial(ByteProgress, echo=echo)


def print_json(values: Any) -> None:
    print(json.dumps(finite(values), indent=2, allow_nan=False, default=str), flush=True)


def finite(values: Any) -> Any:
    """JSON has no nan and no infinity: null.

    >>> finite({"loss": float("nan"), "gates": (0.5, float("inf"))})
    {'loss': None, 'gates': [0.5, None]}
    """
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def require_plots() -> None:
    """Refuse at the start, not after the work, a report whose plots nothing here can draw."""
    if find_spec("matplotlib") is None:
        raise CommandError(
            "the report's plots are drawn by matplotlib, not installed here",
            'pip install "sense-v2[demo]" installs it',
        )


def report_paths(path: Path) -> tuple[Path, Path]:
    """Return the paths of a report and its JSON. Raises `CommandError` if --output names no page."""
    if path.suffix != ".html":
        raise CommandError(f"--output {path}: a report is an .html file", f"--output {path.with_suffix('.html')}")
    refuse_other_encodings(path)
    if path.is_dir():
        raise CommandError(f"--output {path}: that is a folder", "name a file that ends in .html")
    return path, path.with_suffix(".json")


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write the numbers of a report, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
