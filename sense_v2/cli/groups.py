"""Commands by name, each made into a typer command when it is called, completed, or asked for its help.

typer makes all commands of a program at each start, and lists them through rich: on two cores that took longer than
the rest of `sense-engram --help`. Here a list of commands needs their functions' docstrings alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from sense_v2.core.errors import one_line

Entry = Callable[..., None] | typer.Typer
"""A command's function, or a group within the group."""


class _MadeOnDemand(Mapping[str, Any]):
    """Name -> typer command."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            entry = self._entries[name]
            if not isinstance(entry, typer.Typer):
                function, entry = entry, typer.Typer(add_completion=False, rich_markup_mode=None)
                entry.command(name)(function)
            self._made[name] = get_command(entry)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def group(headings: Mapping[str, Mapping[str, Entry]], **settings: Any) -> typer.Typer:
    """Make a group whose help lists its commands by heading.

    Args:
        headings: Heading -> the entries under it, by the names they are called by.
        settings: What `typer.Typer` takes.
    """
    entries = {name: entry for listed in headings.values() for name, entry in listed.items()}

    class Group(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands: Any = _MadeOnDemand(entries)

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            for heading, listed in headings.items():
                with formatter.section(heading):
                    formatter.write_dl([(name, _sentences(entry)) for name, entry in listed.items()])

    # Without a callback typer makes no group of what has no commands yet.
    return typer.Typer(
        cls=Group, callback=lambda: None, rich_markup_mode=None, pretty_exceptions_enable=False, **settings
    )


def _sentences(entry: Entry) -> str:
    """The first paragraph of what an entry's help says."""
    text = str(entry.info.help) if isinstance(entry, typer.Typer) else inspect.getdoc(entry) or ""
    return one_line(text.partition("\n\n")[0])
