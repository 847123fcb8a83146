"""What mkdocs doesn't do by itself for the site of docs/ (mkdocs.yml names this file).

- It adds pages that are kept elsewhere: the log of benchmarks, the changelog, and, at the end of commands.md, every
  command's help, taken from the program itself.
- It rewrites links that lead out of docs/. They become links to a page of the site if there is one, and plain text
  otherwise.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from docs_commands import commands

ROOT = Path(__file__).parents[1]
PAGES = {"benchmarks/LOG.md": "log.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository -> the site's pages that they become."""
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, Path(source).parent)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri in PAGES.values():
        return markdown
    if page.file.src_uri == "commands.md":
        markdown += "\n" + commands()
    return _relinked(markdown, Path("docs"))


def _relinked(text: str, folder: Path) -> str:
    """Return the Markdown of a file in `folder` with links that work on a page of the site."""

    def replaced(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder.as_posix(), target))
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{words}]({path.removeprefix('docs/')}{anchor})"
        return words

    return LINK.sub(replaced, text)
