"""The help of every command as Markdown: the end of the site's page on the command line."""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from sense_v2.cli import main


def commands() -> str:
    """Return every command's help as Markdown."""
    parts = ["## Each command", ""]
    for heading, listed in main.COMMANDS.items():
        parts += [f"**{heading}:** " + ", ".join(f"[`{name}`](#sense-engram-{_slug(name)})" for name in listed), ""]
    for listed in main.COMMANDS.values():
        for name in listed:
            command = _command(name)
            told, _, example = command.help.partition("Example: ")
            parts += [f"### sense-engram {name}", "", told.strip(), "", "```sh", example.strip(), "```", ""]
            parts += ["| | |", "|---|---|"]
            for parameter in command.params:
                if parameter.name != "help":
                    parts.append(f"| {_called(parameter)} | {_cell(parameter.help)}{_default(parameter)} |")
            parts.append("")
    return "\n".join(parts)


def _command(name: str) -> Any:
    """Find a command by its whole name, as in "delta show"."""
    found: Any = get_command(main.app)
    for word in name.split():
        found = found.commands[word]
    return found


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _called(parameter: Any) -> str:
    """`--layers 1,15`"""
    is_option = parameter.param_type_name == "option"
    name = parameter.opts[0] if is_option else (parameter.metavar or parameter.name.upper())
    value = f" {parameter.metavar}" if is_option and parameter.metavar else ""
    value = value or ("" if not is_option or parameter.is_flag else " …")
    return f"`{_cell(name + value)}`"


def _default(parameter: Any) -> str:
    """Say which value an option has if it isn't given."""
    if parameter.param_type_name != "option" or parameter.is_flag or parameter.default in (None, (), []):
        return " Required." if parameter.required and parameter.param_type_name == "option" else ""
    return f" Default: `{_cell(str(parameter.default))}`."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
