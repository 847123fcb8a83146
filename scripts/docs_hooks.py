"""What mkdocs doesn't do by itself for the site of docs/ (mkdocs.yml names this file).

- Pages that are kept elsewhere or in the code: the log of benchmarks, the changelog, and, at the end of commands.md,
  every command's help, taken from the program itself.
- Links that lead out of docs/, as a reader of the repository follows them: to a page of the site where the file is
  one, else only its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.main import get_command

from sense_v2.cli import main

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


def commands() -> str:
    """Every command's help as Markdown."""
    parts = ["## Each command", ""]
    registered = get_command(main.app).commands  # type: ignore[attr-defined]
    for heading, listed in main.COMMANDS.items():
        parts += [f"**{heading}:** " + ", ".join(f"[`{name}`](#sense-engram-{name})" for name in listed), ""]
    for listed in main.COMMANDS.values():
        for name in listed:
            command = registered[name]
            told, _, example = command.help.partition("Example: ")
            parts += [f"### sense-engram {name}", "", told.strip(), "", "```sh", example.strip(), "```", ""]
            parts += ["| | |", "|---|---|"]
            for parameter in command.params:
                if parameter.name != "help":
                    parts.append(f"| {_called(parameter)} | {_cell(parameter.help)}{_default(parameter)} |")
            parts.append("")
    return "\n".join(parts)


def _called(parameter: Any) -> str:
    """`--layers 1,15`"""
    is_option = parameter.param_type_name == "option"
    name = parameter.opts[0] if is_option else (parameter.metavar or parameter.name.upper())
    value = f" {parameter.metavar}" if is_option and parameter.metavar else ""
    value = value or ("" if not is_option or parameter.is_flag else " …")
    return f"`{_cell(name + value)}`"


def _default(parameter: Any) -> str:
    """What is taken where the option isn't given."""
    if parameter.param_type_name != "option" or parameter.is_flag or parameter.default in (None, (), []):
        return " Needed." if parameter.required and parameter.param_type_name == "option" else ""
    return f" Else `{_cell(str(parameter.default))}`."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
