"""What mkdocs doesn't do by itself for the site of docs/ (mkdocs.yml names this file).

- Pages that are kept elsewhere or in the code: the log of benchmarks, the changelog, and, at the end of commands.md,
  every command's help, taken from the program itself.
- Links that lead out of docs/, as a reader of the repository follows them: to a page of the site where the file is
  one, else only its name.
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
    """Markdown of a file in `folder` of the repository, as it has to be on a page that lies in docs/."""

    def replaced(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder.as_posix(), target))
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{words}]({path.removeprefix('docs/')}{anchor})"
        return words

    return LINK.sub(replaced, text)
